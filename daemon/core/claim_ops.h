/* What the engine does with claims (claims.h).
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_CLAIM_OPS_H
#define TS_CLAIM_OPS_H

#include "engine.h"

/* What a match found of a claim that it would share more with. */
typedef struct ts_claim_found {
    uint32_t claim;  /* TS_NONE: none */
    uint32_t tokens; /* of the prompt that would be found when the claim has come to `until` */
    uint32_t until;
} ts_claim_found;

/*
 * Looks for a claim of the block `ids`, the prompt's from token `at` on, of which `count` may be
 * shared; *found is improved upon. Sessions' own claims are looked at if they are `own`, else
 * others'.
 */
void ts_claims_look(const ts_engine *engine, const ts_session *session, bool own, uint32_t pool,
                    ts_index_parent parent, uint32_t hash, uint32_t at, const uint32_t *ids,
                    uint32_t count, ts_claim_found *found);

/* The session's sequence is going to get the prompt's tokens beyond those it has. Without memory,
 * or past a bound, nobody will wait for it. */
void ts_claims_add_prompt(ts_engine *engine, ts_session *session, uint32_t pool, uint32_t seq,
                          const uint32_t *ids, uint32_t count, uint32_t prompt);

/* A step of the sequence's was begun: with `known` tokens with these ids, of `count`. */
void ts_claims_step_begun(ts_engine *engine, ts_session *session, uint32_t pool, uint32_t seq,
                          const uint32_t *ids, uint32_t known, uint32_t count);

/* The step that the sequence was in has ended. */
void ts_claims_step_ended(ts_engine *engine, uint32_t pool, uint32_t seq);

/* The session waits until found->claim has come to found->until. Its own claims without an open
 * step end. */
void ts_claims_wait(ts_engine *engine, ts_session *session, const ts_claim_found *found);

/* Ends the sequence's claim, if it has one; all of the session's. */
void ts_claims_end_of(ts_engine *engine, uint32_t pool, uint32_t seq);
void ts_claims_end_all(ts_engine *engine, const ts_session *session);

/* Ends claims that were idle for too long. */
void ts_claims_end_idle(ts_engine *engine);

#endif
