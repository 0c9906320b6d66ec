/*
 * Descriptors that a peer passes over a Unix socket, wanted or not. Closing the last one of a file
 * may wait: of a TCP socket that lingers, for as long as its maker likes. The kernel closes what
 * isn't received too, in the thread that receives the message or closes the socket. So sockets
 * that need no descriptors refuse them, and a thread that may be made to close some has a signal
 * end the wait.
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
