/*
 * A device of the test's own behind kernels/gpu/gpu.h, so that what the daemon does around a GPU is
 * tested where there is none: launches are threads that wait, attend with the processor's kernels
 * (outputs and all) and signal. "Device" memory is host memory. A daemon that is linked with it
 * finds one device where TS_TEST_FAKE_GPU is set.
 */
#ifndef TS_FAKE_GPU_H
#define TS_FAKE_GPU_H

#include "gpu.h"

#define FAKE_GPU_BYTES ((uint64_t)1 << 30) /* all of them free */

typedef struct fake_gpu_log {
    uint32_t launches;     /* finished or under way */
    uint32_t plans;        /* made */
    uint32_t renewals;     /* of them, from an earlier step's */
    uint32_t sequences;    /* of the last attend */
    uint32_t waiting;      /* launches that wait for a worker now */
    uint32_t most_waiting; /* ... at the same time */
    uint32_t words;        /* that launches were told to wait for */
    uint32_t refused;      /* launches that were asked for while all were taken */
    uint32_t lacked;       /* what was asked for and there was no memory for */
    uint32_t company;      /* that is expected */
    ts_kernel kernel;      /* of the last attend */
} fake_gpu_log;

ts_gpu *fake_gpu_new(void);
void fake_gpu_free(ts_gpu *gpu);
fake_gpu_log fake_gpu_read(ts_gpu *gpu);

/* Blocks until `count` launches wait for workers. */
void fake_gpu_await_waiting(ts_gpu *gpu, uint32_t count);

/* From now on no launch may wait for a worker, as while frees are due; or one may again. */
void fake_gpu_refuse_waits(ts_gpu *gpu, bool refuses);

/* While the gate is shut, whoever queues an attend stops there; blocks until somebody does. */
void fake_gpu_shut_gate(ts_gpu *gpu);
void fake_gpu_await_at_gate(ts_gpu *gpu);
void fake_gpu_open_gate(ts_gpu *gpu);

/* Blocks until `count` launches were asked for in vain. */
void fake_gpu_await_refused(ts_gpu *gpu, uint32_t count);

/* Blocks until every launch that was finished has ended. */
void fake_gpu_await_idle(ts_gpu *gpu);

/* What there is no memory for, from now on. */
typedef enum fake_gpu_lack {
    FAKE_LACKS_NOTHING,
    FAKE_LACKS_PLANS,
    FAKE_LACKS_SCRATCH
} fake_gpu_lack;
void fake_gpu_let_lack(ts_gpu *gpu, fake_gpu_lack lack);

/* From now on every launch fails as if the device were lost. */
void fake_gpu_break(ts_gpu *gpu);

/* What stands before memory is given, or taken over (fake_gpu_memory.c). TS_EDEVICE: the device is
 * lost. */
ts_status fake_gpu_ask_for_memory(ts_gpu *gpu, char *why, size_t why_bytes);
ts_status fake_gpu_ask_to_adopt(ts_gpu *gpu, char *why, size_t why_bytes);

#endif
