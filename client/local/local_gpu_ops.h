/*
 * Between libtinyserve and libtinyserve-cuda, which has the kernels that run on a GPU and is loaded
 * when a worker first attends there itself: libtinyserve is the same with and without CUDA.
 *
 * Thread: the client's. The device's primary context is current.
 */
#ifndef TS_LOCAL_GPU_OPS_H
#define TS_LOCAL_GPU_OPS_H

#include "gpu.h"

#define TS_LOCAL_GPU_LIBRARY "libtinyserve-cuda.so.0"
#define TS_LOCAL_GPU_VERSION 4u /* of this interface, which is the two libraries' own */

/* It has the structs' shapes, too: whatever changes one of them raises it. */
_Static_assert(sizeof(ts_gpu_plan_limits) == 24 && sizeof(ts_gpu_run) == 104 &&
                   sizeof(ts_attention_variant) == 24 && sizeof(ts_attention_seq) == 96 &&
                   sizeof(ts_geometry) == 24,
               "TS_LOCAL_GPU_VERSION");

typedef struct ts_local_gpu_ops {
    uint32_t version;

    /* TS_EDEVICE, TS_ENOMEM with a sentence. */
    ts_status (*open)(uint32_t ordinal, ts_gpu **out, char *why, size_t why_bytes);
    void (*close)(ts_gpu *gpu);

    /* Plans a step's runs by the kernel of that name, and waits until they can be launched. *plan:
     * NULL, or that of an earlier step, which is renewed or freed. */
    ts_status (*plan)(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads, ts_dtype io_dtype,
                      const char *kernel, const ts_attention_seq *seqs, uint32_t num_seqs,
                      ts_gpu_plan **plan, char *why, size_t why_bytes);
    void (*plan_free)(ts_gpu_plan *plan);

    /* gpu.h: ts_gpu_plan_new_persistent and so on. */
    ts_status (*persistent_new)(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                                ts_dtype io_dtype, const char *kernel,
                                const ts_gpu_plan_limits *limits, ts_gpu_plan **out, char *why,
                                size_t why_bytes);
    ts_status (*persistent_set)(ts_gpu_plan *plan, const ts_attention_seq *seqs, uint32_t num_seqs,
                                char *why, size_t why_bytes);
    ts_status (*persistent_clear)(ts_gpu_plan *plan, char *why, size_t why_bytes);

    /* Queues one run on the stream; without one (on_stream false), waits for its end. */
    ts_status (*attend)(ts_gpu *gpu, bool on_stream, void *stream, unsigned char *base,
                        const ts_attention_variant *variant, const ts_gpu_run *run, char *why,
                        size_t why_bytes);

    /* Waits for all runs that were queued; those of captured streams aside. */
    ts_status (*await)(ts_gpu *gpu, char *why, size_t why_bytes);
} ts_local_gpu_ops;

/* The library's one symbol. */
const ts_local_gpu_ops *ts_local_gpu_get(void);

#endif
