/*
 * Claims: who computes which tokens, so that others may wait for them instead of computing them
 * too.
 *
 * A claim belongs to a sequence and tells tokens that come next in it. A match that may wait and
 * finds less than its prompt makes one of the rest (the caller is going to compute it). A step with
 * token ids that fill a block makes one for as long as it is open. A match of another session of
 * the tenant that would share more with a claim than it finds waits until that is there.
 *
 * A claim advances with its sequence's commits. It ends when all its whole blocks are there; when
 * the sequence gets other tokens, or some without ids, or is cut, freed or kept; with its session;
 * when its session waits itself; and when no step of it was open for TS_CLAIM_IDLE_MS. Whoever
 * waits for it is woken then, the first one first: it becomes the claimant, and the others wait
 * for it.
 *
 * Claims are found as children in the prefix index are: by the block that comes next, by its hash
 * and its parent's number, and its ids are compared.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_CLAIMS_H
#define TS_CLAIMS_H

#include "waits.h"

#define TS_CLAIM_IDLE_MS 1000u
#define TS_CLAIM_BUCKETS 4096u
#define TS_CLAIM_CHAIN_MAX 32u /* of one bucket; more aren't looked at */
/* A tenant's claims have at most TS_CLAIM_TENANT_IDS token ids, where each claim counts for
 * TS_CLAIM_COST ids more than it has. */
#define TS_CLAIM_TENANT_IDS (1u << 22)
#define TS_CLAIM_COST 64u
#define TS_CLAIM_SESSION_CLAIMS (1u << 12)

typedef struct ts_claim {
    uint32_t *ids;      /* of tokens from..end; NULL: an open step's, which the index has stored */
    uint32_t from, end; /* whole blocks of the sequence */
    uint32_t at;        /* the block that comes next begins here */
    uint32_t pool, space, seq, session, prompt; /* `prompt` of the match that made it */
    ts_index_parent parent;
    uint32_t hash;
    uint32_t next;          /* in its bucket, or of the free ones */
    uint32_t older, newer;  /* of the same session */
    uint64_t idle_since_ms; /* 0: a step was open when it was last looked at */
    ts_wait_list waiters;
    bool live;
} ts_claim;

typedef struct ts_claims {
    ts_claim *all;
    uint32_t count, live, free_head;
    uint64_t looked_ms; /* for idle ones */
    size_t capacity;
    uint32_t buckets[TS_CLAIM_BUCKETS]; /* claim + 1 */
} ts_claims;

#endif
