/*
 * Attention that this process does itself, over the pool's blocks that it has mapped.
 *
 * Thread: the client's.
 */
#ifndef TS_LOCAL_EXEC_H
#define TS_LOCAL_EXEC_H

#include "local_run.h"

/* What the daemon answers to a begin. */
typedef struct ts_begun {
    const uint32_t *starts; /* tokens of each sequence before the step */
    const uint32_t *blocks; /* entries of their block tables, one sequence after the other */
    const uint32_t *counts; /* of each sequence's */
    const uint32_t *firsts; /* which of its table's is the first; NULL: the first touched one */
    size_t num_seqs, num_blocks;
} ts_begun;

/* A step that this process attends in: its sequences. It goes to the next step: of new memory every
 * page costs, and a plan of the same sequences is renewed. */
typedef struct ts_local {
    ts_attention_seq *seqs;
    uint32_t num_seqs, seqs_room;
    ts_gpu_plan *plan; /* of a GPU pool; between steps the last one's */
    bool plan_is_kept; /* it is a frame's */
} ts_local;

/* Who executes a step in the pool (*exec): this process, the daemon, or both, to be timed. An
 * error: the client asked for this process, and it can't. */
ts_status ts_local_choose(ts_client *client, const ts_pool *pool, ts_exec *exec);

/* The same where there is no choice: TS_OK, or why it can't be here. */
ts_status ts_local_require(ts_client *client, const ts_pool *pool);

/* Notes the tables of a step that was begun, with new_tokens[i] new tokens of seqs[i], and maps
 * what lies in them. */
ts_status ts_local_new(ts_pool *pool, uint64_t step, const ts_seq *seqs, const uint32_t *new_tokens,
                       const ts_begun *begun, ts_local **out);
void ts_local_free(ts_client *client, ts_local *local);

/* Frees what was kept for the next one. */
void ts_local_close(ts_client *client);

/* The same for runs on the pool's GPU: kernel NULL: the pool's. */
ts_status ts_local_plan(ts_pool *pool, ts_local *local, uint32_t heads, ts_dtype io_dtype,
                        const char *kernel);

/* The same by a persistent plan. */
ts_status ts_local_plan_in(ts_pool *pool, ts_local *local, ts_gpu_plan *plan);

ts_status ts_local_attend(ts_pool *pool, ts_local *local, const ts_local_run *run);

#endif
