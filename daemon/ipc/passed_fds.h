/*
 * Descriptors that a peer passes over a Unix socket: nobody wants them. The kernel closes what
 * isn't received, in the thread that reads the message or closes the socket, and that may wait: of
 * a TCP socket that lingers, for as long as its maker likes. So the daemon's sockets refuse
 * descriptors; where the kernel can't do that, a signal ends the wait. (No descriptor is ever
 * received: a close of a FUSE file's could then wait for ever.)
 */
#ifndef TS_PASSED_FDS_H
#define TS_PASSED_FDS_H

#include <stdbool.h>
#include <time.h>

/* Has the kernel refuse descriptors that are sent to this socket, or to one that is accepted from
 * it later. False: the kernel can't (before Linux 6.16). */
bool ts_passed_refuse(int socket);

/* Ends the waits of one thread. */
typedef struct ts_hurry {
    timer_t timer;
    bool ready;
} ts_hurry;

/* Of the calling thread, which alone may use it. False, with errno: no timer. */
bool ts_hurry_init(ts_hurry *hurry);
void ts_hurry_fini(ts_hurry *hurry);

/* From `begin` to `end`, a close waits for about a millisecond at most. Both do nothing if the
 * struct is all 0. */
void ts_hurry_begin(const ts_hurry *hurry);
void ts_hurry_end(const ts_hurry *hurry);

#endif
