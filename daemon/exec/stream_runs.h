/*
 * Runs on streams beyond their ordinary life (step_work.h): posted ones that are refused, or that
 * no daemon has taken, and those that an earlier daemon left.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_STREAM_RUNS_H
#define TS_STREAM_RUNS_H

#include "exec.h"
#include "session_memory.h"

/* What is left of a posted run (proto/signals.h) that the answer refuses: it takes its number, its
 * step fails, and the worker's stream goes on when it has come to it. Unless it isn't the next. */
void ts_stream_run_refuse(ts_exec *exec, const ts_session_memory *memory, const ts_command *run,
                          const ts_answer *answer);

/* Whether one more must wait, since as many as a session may have are yet to come in their turn. */
bool ts_stream_run_refusal_waits(const ts_session_memory *memory);

/* Does the run that the session's worker has posted and no daemon has taken, if there is one. */
void ts_stream_run_take_posted(ts_exec *exec, uint64_t session, ts_session_memory *memory);

/* Does it where a run that isn't posted comes behind it. True: it can't be taken yet, and this one
 * must wait. */
bool ts_stream_run_comes_before(ts_exec *exec, ts_session_memory *memory, const ts_command *run);

/* Runs on streams of a session's that an earlier daemon didn't finish, or didn't tell the engine
 * of: those that are over are told now, the others handed to the kernels again, before their worker
 * asks for anything. What can't be done again fails its step, and the worker's stream goes on. */
void ts_stream_runs_resume(ts_exec *exec, uint64_t session, ts_session_memory *memory);

/* Tells the engine that none of these runs comes: the session's worker is gone. */
void ts_stream_runs_give_up(ts_exec *exec, uint64_t session);

#endif
