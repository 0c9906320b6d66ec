/*
 * The engine's commands, a row each: OPERATION(name, what it needs, who carries it out, ...).
 *
 * It needs NOTHING, a SESSION, or a POOL that its session has opened: it is refused where that
 * isn't there. ts_engine_NAME carries it out (engine_internal.h). The rest is what the books store
 * of it (restart/command_codec.c): BODY is its struct in ts_command, POINTS_TO the arrays that the
 * struct points to. IDS: its answer has the ids of sequences, and nothing else (ts_answer.seqs).
 * LOOKS: it changes nothing but the engine's time.
 *
 * Whoever includes this defines OPERATION. A row is only added at the end: the books have a
 * command's number.
 */
OPERATION(SESSION_OPEN, NOTHING, session_open, BODY(session_open),
          POINTS_TO(TEXT(session_open.program)))
OPERATION(SESSION_CLOSE, SESSION, session_close, BODY(session_close))
/* A closed session's process has nothing to write any more. */
OPERATION(SESSION_GONE, NOTHING, session_gone)
OPERATION(EXCHANGE_OPEN, SESSION, exchange_open, BODY(exchange_open))
OPERATION(POOL_OPEN, SESSION, pool_open, BODY(pool_open), POINTS_TO(TEXT(pool_open.name)))
OPERATION(POOL_CLOSE, POOL, pool_close)
OPERATION(SEQ_CREATE, POOL, seq_create, BODY(seq_create), POINTS_TO(SPACE(seq_create.space)), IDS)
OPERATION(SEQ_FORK, POOL, seq_fork, BODY(seq_fork), IDS)
OPERATION(SEQ_FREE, POOL, seq_change, BODY(seq_batch),
          POINTS_TO(LIST(seq_batch.seqs, seq_batch.count)))
OPERATION(SEQ_SELECT, POOL, seq_select, BODY(seq_select),
          POINTS_TO(LIST(seq_select.seqs, seq_select.count),
                    LIST(seq_select.from, seq_select.picked)),
          IDS)
OPERATION(POOL_ROOM, POOL, pool_room, LOOKS)
OPERATION(SEQ_TRUNCATE, POOL, seq_change, BODY(seq_batch),
          POINTS_TO(LIST(seq_batch.seqs, seq_batch.count),
                    LIST(seq_batch.lengths, seq_batch.count)))
OPERATION(SEQ_KEEP, POOL, seq_keep, BODY(seq_keep), POINTS_TO(TEXT(seq_keep.name)))
OPERATION(SEQ_ATTACH, POOL, seq_attach, BODY(seq_keep), POINTS_TO(TEXT(seq_keep.name)), IDS)
OPERATION(SEQ_LENGTHS, POOL, seq_lengths, BODY(seq_batch),
          POINTS_TO(LIST(seq_batch.seqs, seq_batch.count)), LOOKS)
OPERATION(SEQ_BLOCKS, POOL, seq_blocks, BODY(seq_blocks), LOOKS)
OPERATION(SEQ_MATCH, POOL, seq_match, BODY(seq_match),
          POINTS_TO(LIST(seq_match.counts, seq_match.count),
                    SUM(seq_match.tokens, seq_match.counts, seq_match.count),
                    SPACE(seq_match.space)))
OPERATION(SEQ_TICKET, POOL, seq_ticket, BODY(seq_ticket))
OPERATION(SEQ_REDEEM, POOL, seq_redeem, BODY(seq_redeem), IDS)
OPERATION(SEQ_LIST, POOL, seq_list, BODY(seq_list),
          POINTS_TO(TEXT(seq_list.prefix), TEXT(seq_list.after)), LOOKS)
OPERATION(STEP_BEGIN, POOL, step_begin, BODY(step_begin),
          POINTS_TO(LIST(step_begin.seqs, step_begin.count),
                    LIST(step_begin.new_tokens, step_begin.count),
                    SUM(step_begin.tokens, step_begin.new_tokens, step_begin.count)))
OPERATION(STEP_RUN, SESSION, step_run, BODY(step_run))
OPERATION(STEP_COMMIT, SESSION, step_end, BODY(step_end),
          POINTS_TO(LIST(step_end.accepted, step_end.count)))
OPERATION(STEP_ABORT, SESSION, step_end, BODY(step_end),
          POINTS_TO(LIST(step_end.accepted, step_end.count)))
OPERATION(STEP_DONE, NOTHING, step_done, BODY(step_done))
OPERATION(SLAB_GRANT, NOTHING, slab_grant, BODY(slab_grant))
/* Operators' orders, as far as CACHE_SET. SEQ_REMOVE frees a sequence, whosever it is. POOL_REMOVE
   ends a pool that no session has open. POOL_QUOTAS changes what tenants may have of a pool, LIMITS
   what sessions may have of the daemon. After DRAIN only operators' sessions are opened. CACHE_DROP
   forgets what is cached. CACHE_SET switches the prefix index on or off. */
OPERATION(SEQ_REMOVE, NOTHING, seq_remove, BODY(seq_remove))
OPERATION(POOL_ADD, NOTHING, pool_add, BODY(pool_add), POINTS_TO(STRUCT(pool_add.config)))
OPERATION(POOL_REMOVE, NOTHING, pool_remove)
OPERATION(POOL_RESIZE, NOTHING, pool_resize, BODY(pool_resize))
OPERATION(POOL_QUOTAS, NOTHING, pool_quotas, BODY(pool_quotas),
          POINTS_TO(STRUCT(pool_quotas.config)))
OPERATION(LIMITS, NOTHING, set_limits, BODY(limits), POINTS_TO(STRUCT(limits.limits)))
OPERATION(DRAIN, NOTHING, drain, BODY(drain))
OPERATION(CACHE_DROP, NOTHING, cache_drop, BODY(cache_drop), POINTS_TO(SPACE(cache_drop.space)))
OPERATION(CACHE_SET, NOTHING, cache_set, BODY(cache_set))
/* Ends lives, and goes on with what is freed bit by bit (ts_engine_sweeps). */
OPERATION(SWEEP, NOTHING, sweep)
/* The session waits no more. */
OPERATION(WAIT_END, SESSION, wait_end)
/* The slab's memory is gone: what had anything there is freed, and its steps are aborted. */
OPERATION(SLAB_LOST, NOTHING, slab_lost, BODY(slab_grant))
/* The daemon before has gone, with what its kernels had: sessions ask for runs again, and the
   caller makes copies again. Sessions keep their places in the queue for room, in nobody's way,
   until they come back: SESSION_BACK. */
OPERATION(RESTARTED, NOTHING, restarted, BODY(restarted))
OPERATION(SESSION_BACK, SESSION, session_back)
/* A block doesn't hold what was stored in it: it is forgotten, what had it is freed, and its
   steps are aborted. */
OPERATION(BLOCK_LOST, NOTHING, block_lost, BODY(block_lost))
