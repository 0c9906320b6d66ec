/*
 * What goes over the handle socket: the small AF_UNIX SOCK_SEQPACKET socket beside NNG's that
 * passes file descriptors, which NNG can't. One ts_handle_request, one ts_handle_reply; a reply
 * with status TS_OK carries exactly one descriptor (SCM_RIGHTS), but for a nudge. Both sides are on
 * one machine, so fields are in host byte order. The descriptor becomes the receiver's.
 */
#ifndef TS_HANDLE_WIRE_H
#define TS_HANDLE_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define TS_PROTOCOL 2u /* version of the messages, of this layout and of blocks */
#define TS_HANDLE_MAGIC 0x48535354u
#define TS_TOKEN_BYTES 16

enum ts_handle_kind {
    TS_HANDLE_EXCHANGE = 1,
    TS_HANDLE_SLAB = 2,
    /* No descriptor and no session: "your NNG socket doesn't answer". The reply says, in `bytes`,
     * whether the daemon made a new one (1), so that connecting again helps. */
    TS_HANDLE_NUDGE = 3,
    TS_HANDLE_SIGNALS = 4,  /* the page of signals.h; made at the first asking */
    TS_HANDLE_RINGS = 5,    /* the memory of rings.h; made at the first asking */
    TS_HANDLE_DOORBELL = 6, /* ... and the eventfd that wakes the daemon */
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
} ts_handle_request;

typedef struct ts_handle_reply {
    uint32_t magic;
    uint32_t status;     /* ts_status */
    uint64_t bytes;      /* length of the memory */
    uint32_t generation; /* of the slab */
    uint32_t writable;
    char message[232]; /* NUL-terminated; empty when status is TS_OK */
} ts_handle_reply;

_Static_assert(sizeof(ts_handle_request) == 48, "layout is shared by two programs");
_Static_assert(offsetof(ts_handle_request, kind) == 32, "layout is shared by two programs");
_Static_assert(sizeof(ts_handle_reply) == 256, "layout is shared by two programs");
_Static_assert(offsetof(ts_handle_reply, message) == 24, "layout is shared by two programs");

#endif
