/*
 * Attention that this process does itself on a GPU, through libtinyserve-cuda, which is loaded at
 * the first need.
 *
 * Thread: the client's.
 */
#ifndef TS_LOCAL_GPU_H
#define TS_LOCAL_GPU_H

#include "local_run.h"

typedef struct ts_local_gpu ts_local_gpu;
ts_status ts_local_gpu_open(ts_client *client, const ts_pool *pool);
void ts_local_gpu_close(ts_client *client);
/* *plan: NULL, or one of an earlier step that may be renewed. */
ts_status ts_local_gpu_plan(ts_pool *pool, const ts_attention_seq *seqs, uint32_t num_seqs,
                            uint32_t heads, ts_dtype io_dtype, const char *kernel,
                            ts_gpu_plan **plan);
void ts_local_gpu_plan_free(ts_client *client, ts_gpu_plan *plan);

/* A persistent plan, for one step after another (gpu.h). */
ts_status ts_local_gpu_persistent_new(ts_pool *pool, const ts_frame_options *options,
                                      ts_gpu_plan **out);
ts_status ts_local_gpu_persistent_set(ts_client *client, ts_gpu_plan *plan,
                                      const ts_attention_seq *seqs, uint32_t num_seqs);
void ts_local_gpu_persistent_clear(ts_client *client, ts_gpu_plan *plan);
ts_status ts_local_gpu_attend(ts_pool *pool, ts_gpu_plan *plan, const ts_local_run *run);

/* Waits for the runs that were queued on streams. */
ts_status ts_local_gpu_await(ts_client *client);

#endif
