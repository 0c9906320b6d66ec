/*
 * What the engine's own files use of each other: dispatch.c calls what carries out the commands,
 * which lie in the files of what they change.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_ENGINE_INTERNAL_H
#define TS_ENGINE_INTERNAL_H

#include "engine.h"

/* Sequences of a pool that was removed: only their tables are left to be freed. */
typedef struct ts_engine_grave {
    struct ts_engine_grave *next;
    ts_sequences seqs;
} ts_engine_grave;

/* Carries out a command. `session` is NULL where it needs none. */
typedef void ts_engine_op(ts_engine *engine, ts_session *session, const ts_command *command,
                          ts_answer *answer);

#define OPERATION(name, needs, apply, ...) ts_engine_op ts_engine_##apply;
#include "operations.inc.h"
#undef OPERATION

/*
 * The sequence with this id if the session may use it: one that it owns, or one that its tenant
 * keeps; with to_change, only one that is in no open step. Else NULL, and the answer refuses.
 */
ts_sequence *ts_engine_sequence(ts_engine *engine, uint32_t pool, const ts_session *session,
                                uint64_t id, bool to_change, ts_answer *answer);

/* The name, or the pool's `model` if it is empty. */
ts_space_name ts_engine_space_name(const ts_engine_pool *pool, const ts_space_name *name);

/* The tenant's namespace of this name in the pool; TS_NONE: it has nothing, or the pool has no
 * index. False, and the answer refuses. */
bool ts_engine_find_space(const ts_engine *engine, uint32_t pool, const ts_session *session,
                          const ts_space_name *name, uint32_t *space, ts_answer *answer);

/* The tenant's namespace of this name, or of the pool's `model`, with one user more; TS_NONE: there
 * is no name, or the pool has no index. False, and the answer refuses. */
bool ts_engine_use_space(ts_engine *engine, uint32_t pool, const ts_session *session,
                         const ts_space_name *name, uint32_t *space, ts_answer *answer);

/* Whether the session may own `count` sequences more; makes room for them and for their ids. Else
 * the answer refuses. */
bool ts_engine_reserve_sequences(ts_engine *engine, ts_session *session, uint32_t pool,
                                 uint32_t count, ts_answer *answer);

/* An empty sequence of the session's, for which there is room; its id becomes out_ids[i]. */
ts_sequence *ts_engine_new_sequence(ts_engine *engine, ts_session *session, uint32_t pool,
                                    uint32_t space, uint32_t i);

/* Frees what a closing session still has, as far as no kernel works on it: one step or sequence
 * after another, until these had `entries` block table entries. How many of `entries` are left. */
uint32_t ts_engine_reclaim(ts_engine *engine, ts_session *session, uint32_t entries);

/* The sequence's own tail block where an open step has put a copy in its place, else TS_NONE. */
uint32_t ts_engine_replaced_tail(const ts_engine *engine, uint32_t pool, const ts_sequence *seq);

/* Frees a sequence that is in no open step. What would change more block table entries than
 * *entries is freed bit by bit. */
void ts_engine_free_sequence(ts_engine *engine, uint32_t pool, ts_sequence *seq, uint32_t *entries);

/* Whether sweeping frees sequences of the pool: what is short may be there afterwards. */
bool ts_engine_frees_more(const ts_engine *engine, uint32_t pool);

/* Whether the session may own one more of its tenant's sequences, which has `blocks` blocks; else
 * the answer refuses. */
bool ts_engine_check_owned(const ts_engine *engine, const ts_session *session, uint32_t pool,
                           uint32_t blocks, ts_answer *answer);

/* Whether the session may have `more` block table entries, or its tenant may pin `more` blocks;
 * else the answer refuses. */
bool ts_engine_check_entries(const ts_engine *engine, const ts_session *session, uint32_t pool,
                             uint64_t more, ts_answer *answer);
bool ts_engine_check_pinned(const ts_engine *engine, const ts_session *session, uint32_t pool,
                            uint64_t more, ts_answer *answer);

/* Nothing more can be done in this command: it is applied again after the next TS_OP_SWEEP. */
void ts_engine_go_on_later(ts_engine *engine, ts_answer *answer);

/* The session's own open step, or NULL and the answer refuses. */
ts_step *ts_engine_own_step(ts_engine *engine, const ts_session *session, uint64_t id,
                            ts_answer *answer);
void ts_engine_step_abort(ts_engine *engine, ts_step *step);

/* Ends the step: sequence i keeps accepted[i] of its new tokens; NULL keeps `all` or none. */
void ts_engine_step_settle(ts_engine *engine, ts_step *step, const uint32_t *accepted, bool all);

/* Keeps a removed pool's sequences until they are freed. */
void ts_engine_bury(ts_engine *engine, ts_sequences *seqs);

/* Frees all of them at once; and the claims. */
void ts_engine_forget_graves(ts_engine *engine);
void ts_engine_forget_claims(ts_engine *engine);

#endif
