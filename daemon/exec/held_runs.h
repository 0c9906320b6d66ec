/*
 * What an executor of a GPU can't launch yet: a queue for each session, whose runs go one after the
 * other, so only the first may be ready; and one for jobs of no session, which are always ready.
 * Queues that hold something are listed, and take turns.
 *
 * Thread: the executor's. Ownership: jobs stay the executor's.
 */
#ifndef TS_HELD_RUNS_H
#define TS_HELD_RUNS_H

#include "host_executor.h"
#include "session_memory.h"

typedef struct ts_held_runs {
    ts_held_queue *first, *last; /* of the list */
    ts_held_queue others;        /* of no session */
} ts_held_runs;

/* Adds a job, behind those that its session has here. */
void ts_held_add(ts_held_runs *held, ts_job *job);

/* Adds jobs that were taken, a list in order, before those that their sessions have here. */
void ts_held_put_back(ts_held_runs *held, ts_job *jobs);

/* Takes the job out of its queue, behind `before` (NULL: it is the first). Then the queue's session
 * may end. */
void ts_held_take(ts_held_runs *held, ts_job *before, ts_job *job);

/* The next queue has its turn. */
void ts_held_turn(ts_held_runs *held);

#endif
