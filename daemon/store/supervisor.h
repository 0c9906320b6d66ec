/*
 * `tinyserved --supervise`: the parent of a daemon, where no systemd plays its part. It holds the
 * daemon's descriptors (store_wire.h), starts the daemon and starts it again when it dies, with all
 * that it held. It has one thread, no GPU, no message of clients, and no state but the descriptors.
 *
 * What it does with the daemon's end:
 *
 * | the daemon | the supervisor |
 * |---|---|
 * | ends with 0, or after the supervisor was told to end | ends with the daemon's status |
 * | dies by a signal or ends with another status | starts it again at once; if it lived for less
 * than stable_ms: after 10 ms; and if it never served: after 10, 20, 40, ... at most 1 s |
 * | ends with TS_EXIT_AGAIN | starts it again at once; the log doesn't call it an error |
 *
 * SIGTERM and SIGINT are forwarded, and end both; one that comes later than kill_after_ms kills the
 * daemon. SIGHUP is forwarded. READY=1, RELOADING=1, STATUS= and WATCHDOG=1 go on to the
 * supervisor's own NOTIFY_SOCKET.
 *
 * Beside the daemon's socket it has two of its own, of mode 0600: SOCKET.notify, the daemon's
 * NOTIFY_SOCKET, where it hears its own daemon alone, and SOCKET.store, where a daemon whose
 * supervisor died comes to the next one. It is adopted: it sends all its descriptors again, and is
 * watched as a child is. A daemon is known to be alive by its lock, SOCKET.lock.
 */
#ifndef TS_SUPERVISOR_H
#define TS_SUPERVISOR_H

#include <stdint.h>

typedef struct ts_supervise_options {
    const char *socket;     /* the daemon's */
    char *const *argv;      /* of the daemon, which is this program; NULL at the end */
    uint32_t stable_ms;     /* a daemon that lived for this long is started again at once */
    uint32_t kill_after_ms; /* a second SIGTERM kills this long after the first, or later */
    uint32_t adopt_ms;      /* how long a live daemon has to come to be adopted */
} ts_supervise_options;

#define TS_SUPERVISE_OPTIONS_INIT                                                                  \
    {                                                                                              \
        .stable_ms = 1000, .kill_after_ms = 10000, .adopt_ms = 10000                               \
    }

/*
 * Returns when the daemon has ended for good: its exit status, 128 and the signal's number if a
 * signal ended it, or 1 with a line in the log: the supervisor can't do its work. The caller holds
 * what keeps a second supervisor away, and has seen to it that nothing lies at the two paths.
 * Thread: the process's only one.
 */
int ts_supervise(const ts_supervise_options *options);

#endif
