/*
 * Sessions that wait: each for one thing at most, told by its ts_wait.
 *
 * A command that may wait and can't be carried out is answered TS_WAITS, and its session waits. The
 * event that it waits for *wakes* it: it comes onto the engine's list (ts_engine_woken), and
 * whoever applies commands applies its command again, with `again` set. That one takes the session
 * off the list. The answer may be TS_WAITS once more. Without `wait` the command is answered as if
 * it had never waited. TS_OP_WAIT_END ends a wait without an answer.
 *
 * For room, a pool's sessions wait in one queue. Its *head* is the first session of the tenant
 * whose turn it is; those whose tenant is at its own limit aren't in the way, and those whose
 * tenant would pass its share come after the others. What the head needs nobody else gets
 * (ts_waits_withheld), with two exceptions. For TS_WAIT_OVERTAKEN_MS steps of at most one block a
 * sequence go on: the head may be waiting for just those to end. And what a head beyond its share
 * needs isn't kept from another tenant within its own. Sessions whose clients have yet to come back
 * to a daemon that was restarted keep their places, and are in nobody's way.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_WAITS_H
#define TS_WAITS_H

#include "block_pool.h"

#define TS_WAIT_OVERTAKEN_MS 100u

typedef enum ts_wait_kind {
    TS_WAIT_NONE,
    TS_WAIT_CLAIM, /* until `claim` (claims.h) has got as far as `until`, or ends */
    TS_WAIT_ROOM,  /* until `pool` has `blocks` blocks for the tenant */
} ts_wait_kind;

typedef struct ts_wait {
    ts_wait_kind kind;
    bool woken;
    uint32_t pool;
    uint32_t claim, until; /* CLAIM: tokens of its sequence */
    uint32_t blocks;       /* ROOM */
    uint64_t since_ms;     /* ... */
    uint32_t prev, next;   /* sessions that wait for the same claim, or in the pool's queue */
    uint32_t prev_woken, next_woken;
} ts_wait;

/* The ends of a list of sessions; TS_NONE: it is empty. */
typedef struct ts_wait_list {
    uint32_t first, last;
} ts_wait_list;

#endif
