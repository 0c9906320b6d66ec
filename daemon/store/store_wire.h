/*
 * What the daemon and the holder of its descriptors say to each other: sd_notify(3)'s protocol.
 *
 * A message is one datagram of lines KEY=VALUE, sent to the socket that NOTIFY_SOCKET names. A
 * descriptor that is stored, or a barrier's pipe, comes with it. A daemon that starts finds the
 * stored descriptors from number 3 on; LISTEN_FDS counts and LISTEN_FDNAMES names them.
 *
 * The supervisor (supervisor.h) adds four things. It sets TINYSERVE_SUPERVISOR, the path of a
 * SOCK_SEQPACKET socket where a daemon whose supervisor died reaches the next one; the same
 * messages then go over that connection. It greets such a daemon with FDSTORE=<max>. It writes one
 * byte into a barrier's pipe before it closes it, so that its death isn't taken for an answer. And
 * it reads EXIT_STATUS=<n> beside STOPPING=1, since it can't wait for a daemon that isn't its
 * child.
 *
 * Thread: any, except where a function changes the environment.
 */
#ifndef TS_STORE_WIRE_H
#define TS_STORE_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define TS_STORE_NAME_BYTES 32 /* of a stored descriptor's name, [a-z0-9.] */
/*
 * Of all names with a separator each. They come back in one string of the environment, which Linux
 * limits to 128 KiB (MAX_ARG_STRLEN); what is left is for "LISTEN_FDNAMES=" and listening sockets.
 */
#define TS_STORE_NAMES_BYTES 130000
#define TS_STORE_FDS 4096           /* what the supervisor holds at most, and the units allow */
#define TS_STORE_MESSAGE_BYTES 4096 /* of one datagram */
#define TS_STORE_SOCKET_SUFFIX ".store"
#define TS_NOTIFY_SOCKET_SUFFIX ".notify"

/* How many descriptors the holder takes: systemd sets the first from version 254 on; for older
 * ones the unit sets the second. */
#define TS_ENV_FDSTORE "FDSTORE"
#define TS_ENV_FDSTORE_OF_UNIT "TINYSERVE_FDSTORE"
#define TS_ENV_SUPERVISOR "TINYSERVE_SUPERVISOR"
#define TS_ENV_DEATHS "TINYSERVE_DEATHS"         /* how many daemons have died before this one */
#define TS_ENV_LAST_DEATH "TINYSERVE_LAST_DEATH" /* "signal 9", "status 3", "unknown" */

/* The exit status of a daemon that wants to be started again: nothing has failed. */
#define TS_EXIT_AGAIN 4

/* 1 to 32 of [a-z0-9.], and not with ".socket" at the end: systemd calls listening sockets so. */
bool ts_store_name_ok(const char *name);

/* A whole decimal number from 0 to `most`; -1: it isn't one. */
int64_t ts_store_number(const char *text, int64_t most);

/*
 * Connects a new socket of this type, close-on-exec and non-blocking, to a path, or to an abstract
 * name that begins with '@'. -1 with errno.
 */
int ts_store_connect(const char *path, int type);

/* Sends one message, with the descriptor unless it is -1; never blocks. 0, or errno. */
int ts_store_send(int socket, const char *text, int fd);

/* One received message, with the descriptor and the sender that came with it. */
typedef struct ts_store_datagram {
    char text[TS_STORE_MESSAGE_BYTES + 1]; /* ends with NUL */
    size_t bytes;
    int fd;            /* close-on-exec, the caller's; -1: none */
    pid_t pid;         /* 0: unknown */
    const char *fault; /* why it is no message: it, or its descriptors, are too many; else NULL */
} ts_store_datagram;

/* Never blocks. 1: one came; 0: the other side ended the connection; -1 with errno. */
int ts_store_receive(int socket, ts_store_datagram *d);

/* What a message asks of the holder. */
typedef struct ts_store_message {
    bool store, remove, barrier;
    bool ready, stopping;
    int exit_status;                          /* of a daemon that stops; 0 unless it says another */
    char name[TS_STORE_NAME_BYTES + 1];       /* of store and remove */
    char forward[TS_STORE_MESSAGE_BYTES + 1]; /* lines for the holder's own holder; "": none */
} ts_store_message;

/*
 * Reads a datagram strictly: unknown keys are passed over, as sd_notify(3) has it; a known key with
 * a wrong value, two orders in one, or a descriptor too many or too few make it a fault. NULL, or
 * what is wrong with it.
 */
const char *ts_store_parse(const ts_store_datagram *d, ts_store_message *m);

/*
 * Tells each descriptor that was passed to this process at start, marks all close-on-exec, and
 * unsets the variables. The callee owns the descriptor. Before threads start.
 */
void ts_store_passed(void (*each)(void *arg, const char *name, int fd), void *arg);

/* Tells whoever started this process something, e.g. "READY=1": to NOTIFY_SOCKET, if it is set.
 * Waits for at most 5 s where its reader is slow. */
void ts_store_notify(const char *state);

/* The same to this path. */
void ts_store_notify_at(const char *path, const char *state);

#endif
