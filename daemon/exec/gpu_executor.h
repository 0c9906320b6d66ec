/*
 * The way to a GPU: what host_executor.h is to the processor's kernels. Jobs wait here, and one
 * thread turns them into launches: copies, and attends that may start at once, those of like shape
 * as one launch; and attends on streams whose worker has not submitted yet, each as a launch of its
 * own that waits on the GPU. Such waiting launches are few for each session and not all that there
 * are, so that a worker that never submits holds up nobody else; the rest wait here.
 * Where many sessions are at work, most runs wait here for their workers, and those that are ready
 * together, of any layer, are one launch.
 *
 * Nothing here waits for the device. A job's `done` is called when the device has done it, by one
 * thread for all launches.
 *
 * Thread: the engine's owner submits.
 */
#ifndef TS_GPU_EXECUTOR_H
#define TS_GPU_EXECUTOR_H

#include "gpu.h"
#include "host_executor.h"

typedef struct ts_gpu_executor ts_gpu_executor;

/*
 * A worker has submit_ms to submit a run that it has asked for; after that the run fails with
 * TS_ETIMEOUT. (While a launch waits for a worker nothing can be given back on the device: gpu.h.)
 * Where many sessions are at work, a ready run waits for others for join_us at most; 0: each run
 * is queued ahead, however many sessions there are. `failed` is told once when the device is lost,
 * on any thread; every job fails from then on. On failure a sentence is in `why`.
 */
ts_status ts_gpu_executor_new(ts_gpu *gpu, uint32_t submit_ms, uint32_t join_us,
                              void (*failed)(const char *why), ts_gpu_executor **out, char *why,
                              size_t why_bytes);

/* Looks whether the device is lost; if it is, `failed` is told. Any thread. */
bool ts_gpu_executor_is_lost(ts_gpu_executor *executor);

/* Lets every waiting launch go on, finishes what was submitted, then ends. */
void ts_gpu_executor_free(ts_gpu_executor *executor);

/* The job is the executor's until it calls done. */
void ts_gpu_executor_submit(ts_gpu_executor *executor, ts_job *job);

/* Attends done so far, and how many launches they took. Any thread. */
void ts_gpu_executor_counts(const ts_gpu_executor *executor, uint64_t *runs, uint64_t *launches);

#endif
