/*
 * A libtinyserve-cuda.so.0 without kernels: what a worker of fake_libcuda.c's device needs to begin
 * and end steps that it attends itself. Its plans hold sequences to a frame's limits, and that is
 * all. fake_plan_base is the cache's address that the last frame's was made with.
 */
#include "local_gpu_ops.h"

#include <stdio.h>
#include <stdlib.h>

extern unsigned char *fake_plan_base;
unsigned char *fake_plan_base;

struct ts_gpu_plan {
    ts_gpu_plan_limits limits;
};

static ts_status open_gpu(uint32_t ordinal, ts_gpu **out, char *why, size_t why_bytes)
{
    (void)ordinal;
    (void)why;
    (void)why_bytes;
    *out = NULL;
    return TS_OK;
}

static void close_gpu(ts_gpu *gpu)
{
    (void)gpu;
}

static ts_status new_plan(const ts_gpu_plan_limits *limits, ts_gpu_plan **out, char *why,
                          size_t why_bytes)
{
    *out = malloc(sizeof **out);
    if (*out == NULL) {
        snprintf(why, why_bytes, "no memory for a plan");
        return TS_ENOMEM;
    }
    (*out)->limits = *limits;
    return TS_OK;
}

static ts_status plan(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads, ts_dtype io_dtype,
                      const char *kernel, const ts_attention_seq *seqs, uint32_t num_seqs,
                      ts_gpu_plan **out, char *why, size_t why_bytes)
{
    const ts_gpu_plan_limits none = {0};
    (void)gpu;
    (void)geometry;
    (void)heads;
    (void)io_dtype;
    (void)kernel;
    (void)seqs;
    (void)num_seqs;
    return *out != NULL ? TS_OK : new_plan(&none, out, why, why_bytes);
}

static void plan_free(ts_gpu_plan *p)
{
    free(p);
}

static ts_status persistent_new(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                                ts_dtype io_dtype, const char *kernel,
                                const ts_gpu_plan_limits *limits, ts_gpu_plan **out, char *why,
                                size_t why_bytes)
{
    (void)gpu;
    (void)geometry;
    (void)heads;
    (void)io_dtype;
    (void)kernel;
    fake_plan_base = limits->base;
    return new_plan(limits, out, why, why_bytes);
}

static ts_status persistent_set(ts_gpu_plan *p, const ts_attention_seq *seqs, uint32_t num_seqs,
                                char *why, size_t why_bytes)
{
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < num_seqs; i++)
        tokens += seqs[i].kv_tokens;
    if (num_seqs <= p->limits.seqs && tokens <= p->limits.kv_tokens)
        return TS_OK;
    snprintf(why, why_bytes, "%u sequences of %llu tokens; the limits are %u of %llu", num_seqs,
             (unsigned long long)tokens, p->limits.seqs, (unsigned long long)p->limits.kv_tokens);
    return TS_EINVAL;
}

static ts_status persistent_clear(ts_gpu_plan *p, char *why, size_t why_bytes)
{
    (void)p;
    (void)why;
    (void)why_bytes;
    return TS_OK;
}

static ts_status attend(ts_gpu *gpu, bool on_stream, void *stream, unsigned char *base,
                        const ts_attention_variant *variant, const ts_gpu_run *run, char *why,
                        size_t why_bytes)
{
    (void)gpu;
    (void)on_stream;
    (void)stream;
    (void)base;
    (void)variant;
    (void)run;
    (void)why;
    (void)why_bytes;
    return TS_OK;
}

static ts_status await(ts_gpu *gpu, char *why, size_t why_bytes)
{
    (void)gpu;
    (void)why;
    (void)why_bytes;
    return TS_OK;
}

const ts_local_gpu_ops *ts_local_gpu_get(void)
{
    static const ts_local_gpu_ops ops = {.version = TS_LOCAL_GPU_VERSION,
                                         .open = open_gpu,
                                         .close = close_gpu,
                                         .plan = plan,
                                         .plan_free = plan_free,
                                         .persistent_new = persistent_new,
                                         .persistent_set = persistent_set,
                                         .persistent_clear = persistent_clear,
                                         .attend = attend,
                                         .await = await};
    return &ops;
}
