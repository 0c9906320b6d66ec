/*
 * The answers that a connection got last, by request id, so that a repeated request gets the first
 * answer again and is applied once. Bounded in number and in bytes, the bytes also for all
 * connections of a uid together. Of an answer that had to go it is only known that it was given.
 *
 * Thread: the engine's.
 */
#ifndef TS_REPLY_CACHE_H
#define TS_REPLY_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TS_REPLIES_KEPT 64u
#define TS_REPLIES_SLOTS (TS_REPLIES_KEPT + 16u) /* and requests in progress (TS_PEER_REQUESTS) */
#define TS_REPLY_BYTES_KEPT (1u << 20)
#define TS_REPLY_BYTES_UID (16u << 20)

struct ts_request;
typedef struct ts_reply_cache ts_reply_cache;

typedef struct ts_kept_reply {
    uint64_t id;                /* 0: none */
    bool pending;               /* the first is still in progress */
    struct ts_request *waiters; /* repeats that came meanwhile */
    unsigned char *bytes;       /* NULL and not pending: no longer kept */
    size_t size;
    ts_reply_cache *owner;               /* where bytes are kept: these three */
    struct ts_kept_reply *older, *newer; /* of the uid's */
} ts_kept_reply;

/* What is kept for one uid. */
typedef struct ts_reply_account {
    struct ts_reply_account *next;
    uint32_t uid, users;
    size_t bytes;
    ts_kept_reply *oldest, *newest;
} ts_reply_account;

struct ts_reply_cache {
    ts_kept_reply slots[TS_REPLIES_SLOTS];
    size_t bytes;
    uint64_t forgotten; /* the highest id whose place was given to another */
    ts_reply_account *account;
};

/* *accounts: the list of all. False: out of memory. */
bool ts_reply_cache_init(ts_reply_cache *replies, ts_reply_account **accounts, uint32_t uid);
void ts_reply_cache_fini(ts_reply_cache *replies, ts_reply_account **accounts);

/* The place of this id; NULL: it has none. */
ts_kept_reply *ts_reply_cache_at(ts_reply_cache *replies, uint64_t id);

/* Gives a place to an id that has none: an empty one, or that of the oldest answer. NULL: the id
 * may be one whose place was given away. */
ts_kept_reply *ts_reply_cache_start(ts_reply_cache *replies, uint64_t id);

/* Keeps a copy of the answer, dropping the oldest ones where there would be too much. */
void ts_reply_cache_keep(ts_reply_cache *replies, ts_kept_reply *kept, const void *bytes,
                         size_t size);

#endif
