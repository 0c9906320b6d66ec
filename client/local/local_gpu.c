/* Finds libtinyserve-cuda and attends through it. */
#define _GNU_SOURCE
#include "local_gpu.h"

#include "error.h"
#include "gpu_context.h"
#include "local_gpu_ops.h"
#include "pool_map.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ts_local_gpu {
    void *library;
    const ts_local_gpu_ops *ops;
    ts_gpu *gpu;
};

/* Where the loader finds it, else beside this library. */
static void *load(void)
{
    void *library = dlopen(TS_LOCAL_GPU_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    Dl_info self;
    char path[1024];
    if (library != NULL || dladdr((void *)load, &self) == 0)
        return library;
    const char *slash = strrchr(self.dli_fname, '/');
    int folder = slash == NULL ? 0 : (int)(slash - self.dli_fname) + 1;
    int n = snprintf(path, sizeof path, "%.*s%s", folder, self.dli_fname, TS_LOCAL_GPU_LIBRARY);
    return n > 0 && (size_t)n < sizeof path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
}

ts_status ts_local_gpu_open(ts_client *c, const ts_pool *p)
{
    ts_cuda *cuda;
    if (c->local_gpu != NULL)
        return TS_OK;
    ts_status status = ts_client_cuda(c, p, &cuda);
    if (status != TS_OK)
        return status;
    ts_local_gpu *l = calloc(1, sizeof *l);
    if (l == NULL)
        return ts_fail(c, TS_ENOMEM, "no memory for a GPU");
    const ts_local_gpu_ops *(*find)(void) = NULL;
    l->library = load();
    if (l->library != NULL)
        *(void **)&find = dlsym(l->library, "ts_local_gpu_get");
    if (find == NULL) {
        status = ts_fail(c, TS_EDEVICE,
                         "local execution on a GPU needs " TS_LOCAL_GPU_LIBRARY ": %s", dlerror());
    } else if (find()->version != TS_LOCAL_GPU_VERSION) {
        status = ts_fail(c, TS_EDEVICE,
                         TS_LOCAL_GPU_LIBRARY " has interface %u; this library "
                                              "needs %u",
                         find()->version, TS_LOCAL_GPU_VERSION);
    } else {
        l->ops = find();
        status = ts_cuda_enter(c, cuda);
        if (status == TS_OK) {
            char why[TS_GPU_WHY_BYTES];
            status = l->ops->open((uint32_t)ts_cuda_ordinal(cuda), &l->gpu, why, sizeof why);
            if (status != TS_OK)
                (void)ts_fail(c, status, "%s", why);
            ts_cuda_leave(cuda);
        }
    }
    if (status != TS_OK) {
        free(l); /* the library stays loaded, as CUDA's do */
        return status;
    }
    c->local_gpu = l;
    return TS_OK;
}

void ts_local_gpu_close(ts_client *c)
{
    ts_local_gpu *l = c->local_gpu;
    if (l == NULL)
        return;
    if (ts_cuda_enter(c, c->cuda) == TS_OK) {
        l->ops->close(l->gpu);
        ts_cuda_leave(c->cuda);
    }
    free(l);
    c->local_gpu = NULL;
}

ts_status ts_local_gpu_plan(ts_pool *p, const ts_attention_seq *seqs, uint32_t num_seqs,
                            uint32_t heads, ts_dtype io_dtype, const char *kernel,
                            ts_gpu_plan **plan)
{
    ts_client *c = p->client;
    char why[TS_GPU_WHY_BYTES];
    ts_status status = ts_cuda_enter(c, c->cuda);
    if (status != TS_OK)
        return status;
    status = c->local_gpu->ops->plan(c->local_gpu->gpu, &p->geometry, heads, io_dtype,
                                     kernel != NULL ? kernel : p->kernel, seqs, num_seqs, plan, why,
                                     sizeof why);
    ts_cuda_leave(c->cuda);
    return status == TS_OK ? TS_OK : ts_fail(c, status, "%s", why);
}

void ts_local_gpu_plan_free(ts_client *c, ts_gpu_plan *plan)
{
    if (plan != NULL)
        c->local_gpu->ops->plan_free(plan);
}

ts_status ts_local_gpu_persistent_new(ts_pool *p, const ts_frame_options *o, ts_gpu_plan **out)
{
    ts_client *c = p->client;
    char why[TS_GPU_WHY_BYTES];
    *out = NULL;
    ts_status status = ts_pool_reserve(p); /* nothing of it may be mapped yet */
    if (status == TS_OK)
        status = ts_cuda_enter(c, c->cuda);
    if (status != TS_OK)
        return status;
    const ts_gpu_plan_limits limits = {o->seqs, o->new_tokens, o->tokens, p->base};
    status = c->local_gpu->ops->persistent_new(
        c->local_gpu->gpu, &p->geometry, o->step->heads, o->step->io_dtype,
        o->step->kernel != NULL ? o->step->kernel : p->kernel, &limits, out, why, sizeof why);
    ts_cuda_leave(c->cuda);
    return status == TS_OK ? TS_OK : ts_fail(c, status, "%s", why);
}

ts_status ts_local_gpu_persistent_set(ts_client *c, ts_gpu_plan *plan, const ts_attention_seq *seqs,
                                      uint32_t num_seqs)
{
    char why[TS_GPU_WHY_BYTES];
    ts_status status = ts_cuda_enter(c, c->cuda);
    if (status != TS_OK)
        return status;
    status = c->local_gpu->ops->persistent_set(plan, seqs, num_seqs, why, sizeof why);
    ts_cuda_leave(c->cuda);
    return status == TS_OK ? TS_OK : ts_fail(c, status, "%s", why);
}

void ts_local_gpu_persistent_clear(ts_client *c, ts_gpu_plan *plan)
{
    char why[TS_GPU_WHY_BYTES];
    if (ts_cuda_enter(c, c->cuda) != TS_OK)
        return;
    (void)c->local_gpu->ops->persistent_clear(plan, why,
                                              sizeof why); /* a lost device runs nothing */
    ts_cuda_leave(c->cuda);
}

ts_status ts_local_gpu_attend(ts_pool *p, ts_gpu_plan *plan, const ts_local_run *local)
{
    ts_client *c = p->client;
    const ts_layer_run *run = &local->run;
    const ts_attention_variant variant =
        ts_layer_run_resolve(run, local->scale, p->geometry.head_dim);
    ts_attention_seq all; /* rows of all sequences */
    char why[TS_GPU_WHY_BYTES];
    ts_layer_run_point(run, c->exchange, &p->geometry, local->heads, local->io_dtype, 0, &all);
    const ts_gpu_run there = ts_gpu_run_over(plan, &all);
    ts_status status = ts_cuda_enter(c, c->cuda);
    if (status != TS_OK)
        return status;
    status = c->local_gpu->ops->attend(c->local_gpu->gpu, run->flags & TS_RUN_ON_STREAM,
                                       local->stream, p->base, &variant, &there, why, sizeof why);
    ts_cuda_leave(c->cuda);
    return status == TS_OK ? TS_OK : ts_fail(c, status, "layer %u: %s", run->layer, why);
}

ts_status ts_local_gpu_await(ts_client *c)
{
    char why[TS_GPU_WHY_BYTES];
    if (c->local_gpu == NULL)
        return TS_OK;
    ts_status status = ts_cuda_enter(c, c->cuda);
    if (status != TS_OK)
        return status;
    status = c->local_gpu->ops->await(c->local_gpu->gpu, why, sizeof why);
    ts_cuda_leave(c->cuda);
    return status == TS_OK ? TS_OK : ts_fail(c, status, "waiting for the runs: %s", why);
}
