/* libtinyserve-cuda: the kernels, launched on a worker's own streams. */
#include "local_gpu_ops.h"

#include <stdio.h>

/* Says why a call on the launch failed. */
static ts_status said(const ts_gpu_launch *l, ts_status status, char *why, size_t why_bytes)
{
    if (status != TS_OK)
        snprintf(why, why_bytes, "%s", ts_gpu_launch_why(l));
    return status;
}

static ts_status find(const char *kernel, ts_kernel *k, char *why, size_t why_bytes)
{
    *k = ts_kernel_find(kernel);
    if (*k != TS_KERNEL_COUNT)
        return TS_OK;
    snprintf(why, why_bytes, "kernel '%s', which this library has not", kernel);
    return TS_EINVAL;
}

static ts_status keep(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads, ts_dtype io_dtype,
                      const char *kernel, const ts_gpu_plan_limits *limits, ts_gpu_plan **out,
                      char *why, size_t why_bytes)
{
    ts_kernel k;
    ts_status status = find(kernel, &k, why, why_bytes);
    return status != TS_OK ? status
                           : ts_gpu_plan_new_persistent(gpu, geometry, heads, io_dtype, k, limits,
                                                        out, why, why_bytes);
}

static ts_status renew(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads, ts_dtype io_dtype,
                       const char *kernel, const ts_attention_seq *seqs, uint32_t num_seqs,
                       ts_gpu_plan **plan, char *why, size_t why_bytes)
{
    ts_kernel k;
    ts_status status = find(kernel, &k, why, why_bytes);
    if (status != TS_OK)
        return status;
    status =
        ts_gpu_plan_renew(gpu, geometry, heads, io_dtype, k, seqs, num_seqs, plan, why, why_bytes);
    if (status != TS_OK)
        return status;
    ts_gpu_launch *l = ts_gpu_launch_on_own(gpu);
    status = said(l, ts_gpu_launch_prepare(l, *plan), why, why_bytes);
    if (status != TS_OK) {
        ts_gpu_plan_free(*plan);
        *plan = NULL;
    }
    return status;
}

static ts_status attend(ts_gpu *gpu, bool on_stream, void *stream, unsigned char *base,
                        const ts_attention_variant *variant, const ts_gpu_run *run, char *why,
                        size_t why_bytes)
{
    ts_gpu_launch *l = on_stream ? ts_gpu_launch_on(gpu, stream) : ts_gpu_launch_on_own(gpu);
    ts_status status = ts_gpu_launch_attend(l, base, variant, run, 1);
    if (status == TS_OK)
        status = ts_gpu_launch_mark(l);
    if (status == TS_OK && !on_stream)
        status = ts_gpu_launch_await_mark(l);
    return said(l, status, why, why_bytes);
}

static ts_status await(ts_gpu *gpu, char *why, size_t why_bytes)
{
    ts_gpu_launch *l = ts_gpu_launch_on_own(gpu);
    return said(l, ts_gpu_launch_await_mark(l), why, why_bytes);
}

const ts_local_gpu_ops *ts_local_gpu_get(void)
{
    static const ts_local_gpu_ops ops = {.version = TS_LOCAL_GPU_VERSION,
                                         .open = ts_gpu_open_for_streams,
                                         .close = ts_gpu_close,
                                         .plan = renew,
                                         .plan_free = ts_gpu_plan_free,
                                         .persistent_new = keep,
                                         .persistent_set = ts_gpu_plan_set,
                                         .persistent_clear = ts_gpu_plan_clear,
                                         .attend = attend,
                                         .await = await};
    return &ops;
}
