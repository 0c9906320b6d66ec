/*
 * What goes over the handle socket: the small AF_UNIX SOCK_SEQPACKET socket beside NNG's that
 * passes file descriptors, as NNG can't.
 *
 * One ts_handle_request, one ts_handle_reply with the same tag. A reply with status TS_OK carries
 * exactly one descriptor (SCM_RIGHTS), which becomes the receiver's; only that to
 * TS_HANDLE_TAKE_EXCHANGE carries none, as requests do. A client that may not stay gets a reply
 * with tag 0 and a reason before the connection ends. Both sides are on one machine, so fields are
 * in host byte order.
 */
#ifndef TS_HANDLE_WIRE_H
#define TS_HANDLE_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define TS_PROTOCOL 8u /* version of the messages, the rings, this layout and blocks */
#define TS_HANDLE_MAGIC 0x48535354u
#define TS_TOKEN_BYTES 16

/* What a SessionResume tells of at most: it fits into the shortest message_max. */
#define TS_GIVEN_UP_MOST 64u
#define TS_ABORTED_STEPS_MOST 256u
#define TS_HANDLE_SUFFIX ".handles" /* to the path of NNG's socket: the handle socket's */

enum ts_handle_kind {
    TS_HANDLE_EXCHANGE = 1,
    TS_HANDLE_SLAB = 2,
    TS_HANDLE_SIGNALS = 3, /* the page of signals.h; made at the first asking */
    /* Memory of `bytes` for rings (rings.h) or an exchange in host memory. It is 0, and the client
     * must allocate all of it (fallocate), so that it is charged with the pages, and map it. Then
     * it asks for the doorbell, or has the exchange taken: the daemon seals the memory, which can
     * be mapped to write no more, and its pages stay. What is new takes the place of what was. */
    TS_HANDLE_NEW_RINGS = 4,
    TS_HANDLE_DOORBELL = 5, /* the eventfd that wakes the daemon */
    TS_HANDLE_NEW_EXCHANGE = 6,
    TS_HANDLE_TAKE_EXCHANGE = 7,
    /* The page of revocations.h, made at the first asking, and the eventfd that rings for it. Who
     * has not asked for the page gets no slab of a GPU's. */
    TS_HANDLE_REVOCATIONS = 8,
    TS_HANDLE_REVOCATION_BELL = 9,
};

typedef struct ts_handle_request {
    uint32_t magic;
    uint32_t protocol;
    uint64_t session;
    uint8_t token[TS_TOKEN_BYTES]; /* from SessionOpened */
    uint32_t kind;
    uint32_t pool;
    uint32_t slab;
    uint32_t writable;
    uint32_t tag;     /* not 0 */
    char version[20]; /* the client's, for the daemon's log; NUL-terminated */
    uint64_t bytes;   /* of the memory that it asks for */
} ts_handle_request;

typedef struct ts_handle_reply {
    uint32_t magic;
    uint32_t status;     /* ts_status */
    uint64_t bytes;      /* length of the memory */
    uint32_t generation; /* of the slab */
    uint32_t writable;
    uint32_t tag;
    uint32_t protocol; /* the daemon's */
    char message[232]; /* NUL-terminated: why it was refused; empty when status is TS_OK */
} ts_handle_reply;

_Static_assert(sizeof(ts_handle_request) == 80, "layout is shared by two programs");
_Static_assert(offsetof(ts_handle_request, kind) == 32, "layout is shared by two programs");
_Static_assert(sizeof(ts_handle_reply) == 264, "layout is shared by two programs");
_Static_assert(offsetof(ts_handle_reply, message) == 32, "layout is shared by two programs");

#endif
