/*
 * libtinyserve: sequences, and where their tokens lie. tinyserve.h includes this header, and says
 * what holds for all calls: errors, threads, fork(), options.
 *
 * A sequence is a list of tokens whose K and V lie in blocks of a pool. Sequences share blocks: by
 * forks, and where a match finds a prompt's beginning. Nothing is copied until it is written.
 */
#ifndef TINYSERVE_SEQUENCES_H
#define TINYSERVE_SEQUENCES_H

#include "tinyserve_types.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ts_pool ts_pool;
typedef uint64_t ts_seq; /* a sequence of one pool; never 0; never used again once freed */

/* ---- sequences ---- */

/* Makes `count` empty sequences. TS_EQUOTA: too many. */
TS_WARN_UNUSED ts_status ts_seq_create(ts_pool *pool, uint32_t count, ts_seq *out);

typedef struct ts_seq_options {
    size_t size;        /* sizeof(ts_seq_options) */
    const void *space;  /* the sequence's namespace: bytes that name the model, its adapter and
                           whatever else changes K and V; NULL: the pool's, its `model`. A
                           sequence with neither takes no token ids: TS_EINVAL */
    size_t space_bytes; /* at most 64 */
    /* Of ts_seq_match: */
    uint32_t wait_ms; /* it waits this long, beside the call's time, while another session of the
                         tenant computes what is missing, or has matched it with a wait and is going
                         to: that one has a second to begin. 0: it doesn't wait */
    uint32_t *twins;  /* with wait_ms: gets for each prompt the number of the earlier one in this
                         call that lacks the same, and so should be computed before it, or its own;
                         may be NULL */
} ts_seq_options;

#define TS_SEQ_OPTIONS_INIT                                                                        \
    {                                                                                              \
        sizeof(ts_seq_options), NULL, 0, 0, NULL                                                   \
    }

/* ts_seq_create with options, which may be NULL. TS_EQUOTA also: 1024 namespaces are in use. */
TS_WARN_UNUSED ts_status ts_seq_create_with(ts_pool *pool, uint32_t count,
                                            const ts_seq_options *options, ts_seq *out);

/*
 * Makes for each of `count` prompts a sequence that shares the longest beginning of it that the
 * pool holds, by its token ids: at most all tokens but the last. matched[i] is how many; nothing is
 * copied. counts[i] tokens of prompt i lie in `tokens`, one prompt after another. The pool holds
 * what was committed with token ids (ts_step_options.tokens) in the same namespace by sessions of
 * the tenant, as far as it fills blocks, until it is evicted. out NULL: only tells how much is
 * there. TS_EINVAL: there is no namespace, and the pool has no `model`.
 */
TS_WARN_UNUSED ts_status ts_seq_match(ts_pool *pool, const uint32_t *tokens, const uint32_t *counts,
                                      uint32_t count, const ts_seq_options *options, ts_seq *out,
                                      uint32_t *matched);

/* Makes `count` sequences that share the parent's blocks. A shared block is copied when a sequence
 * first writes into it. */
TS_WARN_UNUSED ts_status ts_seq_fork(ts_pool *pool, ts_seq parent, uint32_t count, ts_seq *out);

/* The same, sharing only the first `length` tokens. TS_EINVAL: the parent has fewer. */
TS_WARN_UNUSED ts_status ts_seq_fork_at(ts_pool *pool, ts_seq parent, uint32_t length,
                                        uint32_t count, ts_seq *out);

/* Shortens sequence i to lengths[i] tokens; all or none. TS_EBUSY: one is in an open step. */
TS_WARN_UNUSED ts_status ts_seq_truncate(ts_pool *pool, const ts_seq *seqs, const uint32_t *lengths,
                                         uint32_t count);

/* The same, by how many of its last tokens each loses. */
TS_WARN_UNUSED ts_status ts_seq_shorten(ts_pool *pool, const ts_seq *seqs, const uint32_t *counts,
                                        uint32_t num_seqs);

/* Frees the sequences; all or none. What was committed with token ids stays cached. TS_EBUSY: one
 * is in an open step. */
TS_WARN_UNUSED ts_status ts_seq_free(ts_pool *pool, const ts_seq *seqs, uint32_t count);

/* The same, and what no other sequence uses of them isn't cached. */
TS_WARN_UNUSED ts_status ts_seq_forget(ts_pool *pool, const ts_seq *seqs, uint32_t count);

/*
 * Goes on with some of `count` sequences, in one call: out[i] continues seqs[from[i]], for i below
 * `picked`. The first that does is that sequence itself; others are forks. Those that none
 * continues are freed. It takes no block, so beam search goes on in a full pool. All or none.
 * TS_EBUSY: one is in an open step. TS_EINVAL: one is there twice, or from[i] isn't below `count`.
 */
TS_WARN_UNUSED ts_status ts_seq_select(ts_pool *pool, const ts_seq *seqs, uint32_t count,
                                       const uint32_t *from, uint32_t picked, ts_seq *out);

/* Keeps a sequence under a name (1 to 127 bytes of UTF-8, no control characters): it outlives the
 * session, and every session of the tenant may attach to it. NULL removes the name and makes the
 * sequence this session's own. TS_EEXIST: the tenant has another sequence of this name. TS_EINVAL:
 * a bad name, which is told before anything else. Sequence 0, which is none, asks about the name
 * alone: TS_ENOENT, if it is a good one. */
TS_WARN_UNUSED ts_status ts_seq_keep(ts_pool *pool, ts_seq seq, const char *name);

typedef struct ts_keep_options {
    size_t size;     /* sizeof(ts_keep_options) */
    uint64_t ttl_ms; /* the sequence is freed this long after its last use: being kept, attached to
                        or forked, or a step's end; 0: never */
    bool replace;    /* the sequence that has the name, if there is one, loses it and is freed, in
                        the same instant; TS_EBUSY: it is in an open step */
} ts_keep_options;

#define TS_KEEP_OPTIONS_INIT                                                                       \
    {                                                                                              \
        sizeof(ts_keep_options), 0, false                                                          \
    }

/* ts_seq_keep with options, which may be NULL. Keeping a sequence again under its own name sets its
 * time to live anew. */
TS_WARN_UNUSED ts_status ts_seq_keep_with(ts_pool *pool, ts_seq seq, const char *name,
                                          const ts_keep_options *options);

/* Finds a kept sequence; *length (may be NULL) gets its number of tokens. TS_ENOENT. */
TS_WARN_UNUSED ts_status ts_seq_attach(ts_pool *pool, const char *name, ts_seq *out,
                                       uint32_t *length);

typedef struct ts_kept {
    char name[128];
    ts_seq seq;
    uint64_t left_ms; /* until it is freed, if it isn't used before; 0: it never is */
    uint32_t length;  /* tokens */
    uint32_t blocks;  /* that it refers to */
} ts_kept;

/* Lists the tenant's kept sequences whose names begin with `prefix` (NULL: all), in the order of
 * the names' bytes, from the first name after `after` on (NULL: from the beginning), at most `room`
 * of them. Fewer than `room`: these were the last. `after` may be a name that is gone. kept_bytes:
 * sizeof(ts_kept). */
TS_WARN_UNUSED ts_status ts_seq_list(ts_pool *pool, const char *prefix, const char *after,
                                     ts_kept *out, size_t kept_bytes, uint32_t room,
                                     uint32_t *count);

/*
 * Puts a sequence on a ticket: bytes that nobody can guess, by which another session of the tenant,
 * also in another process, makes the sequence its own. `seq` names nothing from now on. The ticket
 * is good for ttl_ms (0: 30 s; at most an hour), also after this session's end; then the sequence
 * is freed. TS_EBUSY: it is in an open step. TS_EINVAL: it is kept under a name. TS_EQUOTA: the
 * tenant has 1024 tickets.
 */
TS_WARN_UNUSED ts_status ts_seq_ticket(ts_pool *pool, ts_seq seq, uint32_t ttl_ms,
                                       uint8_t ticket[TS_TICKET_BYTES]);

/* Makes the ticket's sequence this session's own, with its token ids and namespace; *length (may be
 * NULL) gets its number of tokens. A ticket serves once. TS_ENOENT: the pool has no such ticket, or
 * it was redeemed, or its time is over, or it is another tenant's. */
TS_WARN_UNUSED ts_status ts_seq_redeem(ts_pool *pool, const uint8_t ticket[TS_TICKET_BYTES],
                                       ts_seq *out, uint32_t *length);

/* Tokens of each sequence. */
TS_WARN_UNUSED ts_status ts_seq_lengths(ts_pool *pool, const ts_seq *seqs, uint32_t count,
                                        uint32_t *lengths);

/* ---- slots: where a token's K and V lie ---- */

/* The slots of tokens first to first + count - 1 at this layer: the same at all layers today. A
 * slot is block * block_tokens + offset. */
TS_WARN_UNUSED ts_status ts_seq_slots(ts_pool *pool, ts_seq seq, uint32_t layer, uint32_t first,
                                      uint32_t count, uint64_t *slots);

typedef struct ts_kv {
    void *k, *v;        /* KV head 0; head h lies head_stride * h bytes further */
    size_t head_stride; /* bytes */
} ts_kv;

/*
 * Where K and V of one token lie at one layer, in this process; a device address for a GPU pool.
 * Maps the slab if need be. The slot must come from this session's last answer about its sequence.
 * Without TS_POOL_WRITABLE the memory is read-only, and a write ends this process (under CUDA MPS
 * every process of the MPS server). cuda-ipc memory is always writable.
 */
TS_WARN_UNUSED ts_status ts_slot_kv(ts_pool *pool, uint64_t slot, uint32_t layer, ts_kv *out);

/* Maps the slabs of all the slots, which are this layer's, and gives the address of block 0; each
 * further block lies ts_geometry_block_bytes further. Slabs that were never mapped can't be read on
 * a GPU, and read as zeros in host memory. */
TS_WARN_UNUSED ts_status ts_pool_map(ts_pool *pool, const uint64_t *slots, size_t count,
                                     uint32_t layer, void **base);

/* Adds tokens whose K and V the worker writes itself (TS_POOL_WRITABLE). They are part of the
 * sequences at once: write them before another session can attach. slots (may be NULL) gets the new
 * tokens' slots at layer 0 in order. TS_ENOSPC, TS_EQUOTA: nothing was added. */
TS_WARN_UNUSED ts_status ts_seq_append(ts_pool *pool, const ts_seq *seqs,
                                       const uint32_t *new_tokens, uint32_t count, uint64_t *slots);

#ifdef __cplusplus
}
#endif
#endif
