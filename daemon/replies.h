/*
 * The answers that a connection got last, by request id, so that a repeated request gets the first
 * answer again and is applied once. Bounded in number and in bytes: an answer that had to go is
 * known to have been given, and no more.
 *
 * Thread: the engine's.
 */
#ifndef TS_REPLIES_H
#define TS_REPLIES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TS_REPLIES_KEPT 64u
#define TS_REPLY_BYTES_KEPT (1u << 20)

struct ts_request;

typedef struct ts_kept_reply {
    uint64_t id;                /* 0: none */
    bool pending;               /* the first is still in progress */
    struct ts_request *waiters; /* repeats that came meanwhile */
    unsigned char *bytes;       /* NULL and not pending: no longer kept */
    size_t size;
} ts_kept_reply;

typedef struct ts_replies {
    ts_kept_reply slots[TS_REPLIES_KEPT]; /* id % TS_REPLIES_KEPT */
    size_t bytes;
} ts_replies;

void ts_replies_fini(ts_replies *replies);

/* The place of this id; it may be another's. */
ts_kept_reply *ts_replies_at(ts_replies *replies, uint64_t id);

/* Gives the place to this id; what was there must not be pending. */
void ts_replies_start(ts_replies *replies, ts_kept_reply *kept, uint64_t id);

/* Keeps a copy of the answer, dropping the oldest ones where there would be too much. */
void ts_replies_keep(ts_replies *replies, ts_kept_reply *kept, const void *bytes, size_t size);

#endif
