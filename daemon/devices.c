#include "devices.h"

#include "log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIB ((double)(1u << 30))

void ts_devices_describe(const ts_pool_config *p, char *text, size_t bytes)
{
    const ts_geometry *g = &p->geometry;
    snprintf(text, bytes,
             "pool '%s' on %s: %s, %u layers, %u KV heads of %u, %u tokens a block, %u blocks of "
             "%.1f KiB (%.1f GiB) in slabs of %.1f MiB",
             p->name, p->device, ts_dtype_name(g->dtype), g->layers, g->kv_heads, g->head_dim,
             g->block_tokens, p->num_blocks, (double)ts_geometry_block_bytes(g) / 1024,
             (double)ts_geometry_block_bytes(g) * p->num_blocks / GIB,
             (double)ts_geometry_block_bytes(g) * p->slab_blocks / (1 << 20));
}

/* What goes on while the pools are started. */
typedef struct start {
    ts_service *service;
    const ts_config *config;
    void (*failed)(const char *why);
    uint64_t planned[TS_GPUS_MAX]; /* bytes of each GPU that pools will take as they need them */
    char why[256];                 /* what is wrong */
} start;

/* The GPU, opened at its first mention; NULL with a sentence. */
static const ts_service_gpu *open_gpu(start *st, uint32_t ordinal)
{
    ts_service *s = st->service;
    for (uint32_t i = 0; i < s->num_gpus; i++)
        if (ts_gpu_get_info(s->gpus[i].gpu)->ordinal == ordinal)
            return &s->gpus[i];
    if (s->num_gpus == TS_GPUS_MAX) {
        snprintf(st->why, sizeof st->why, "cuda:%u would be GPU number %u; the limit is %u",
                 ordinal, s->num_gpus + 1, TS_GPUS_MAX);
        return NULL;
    }
    ts_service_gpu *g = &s->gpus[s->num_gpus];
    if (ts_gpu_open(ordinal, &g->gpu, st->why, sizeof st->why) != TS_OK)
        return NULL;
    if (ts_gpu_batch_new(g->gpu, s->engine->limits.sessions, st->config->submit_ms, st->failed,
                         &g->batch, st->why, sizeof st->why) != TS_OK) {
        ts_gpu_close(g->gpu);
        return NULL;
    }
    s->num_gpus++;
    return g;
}

/* Decides the device; *gpu is NULL for host memory. TS_EDEVICE with a sentence. */
static ts_status choose_device(start *st, const ts_config_pool *wanted, ts_pool_config *p,
                               const ts_service_gpu **gpu)
{
    unsigned ordinal = 0;
    *gpu = NULL;
    bool any = strcmp(p->device, "auto") == 0;
    bool host = strcmp(p->device, "host") == 0 || (any && wanted->provider == TS_PROVIDER_HOST);
    if (any && !host) {
        char reason[128];
        if (ts_gpu_count(reason, sizeof reason) == 0) {
            if (wanted->provider != TS_PROVIDER_AUTO) {
                snprintf(st->why, sizeof st->why, "provider = %s needs a GPU: %s",
                         ts_provider_name(wanted->provider), reason);
                return TS_EDEVICE;
            }
            ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = p->name},
                      "pool '%s': device = auto: host memory, there is no GPU (%s)", p->name,
                      reason);
            host = true;
        }
    }
    if (host && p->kernel != TS_KERNEL_AUTO) {
        snprintf(st->why, sizeof st->why, "kernel = %s runs on a GPU, and there is none",
                 ts_kernel_name(p->kernel));
        return TS_EDEVICE;
    }
    if (host) {
        snprintf(p->device, sizeof p->device, "host");
        return TS_OK;
    }
    if (!any)
        (void)sscanf(p->device, "cuda:%u", &ordinal); /* config.c has seen to its form */
    *gpu = open_gpu(st, ordinal);
    if (*gpu == NULL)
        return TS_EDEVICE;
    if (any)
        ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = p->name},
                  "pool '%s': device = auto: cuda:0, the first GPU", p->name);
    snprintf(p->device, sizeof p->device, "cuda:%u", ordinal);
    return TS_OK;
}

static ts_status check_fit(start *st, const ts_pool_config *p, ts_gpu *gpu, uint64_t planned)
{
    size_t bytes = ts_geometry_block_bytes(&p->geometry) * p->num_blocks;
    uint64_t available;
    ts_status status = ts_gpu_free_bytes(gpu, &available, st->why, sizeof st->why);
    if (status != TS_OK)
        return status;
    if (bytes <= available - (planned < available ? planned : available))
        return TS_OK;
    snprintf(st->why, sizeof st->why,
             "%.2f GiB are asked for on %s (%s); it has %.2f GiB free of %.2f GiB, and other pools "
             "take %.2f GiB of that",
             (double)bytes / GIB, p->device, ts_gpu_get_info(gpu)->name, (double)available / GIB,
             (double)ts_gpu_get_info(gpu)->total_bytes / GIB, (double)planned / GIB);
    return TS_ENOMEM;
}

static ts_status new_gpu_memory(start *st, const ts_config_pool *wanted, ts_pool_config *p,
                                const ts_service_gpu *g, ts_memory **out)
{
    ts_gpu *gpu = g->gpu;
    const ts_gpu_info *info = ts_gpu_get_info(gpu);
    uint64_t *planned = &st->planned[g - st->service->gpus];
    size_t block_bytes = ts_geometry_block_bytes(&p->geometry);
    bool any = wanted->provider == TS_PROVIDER_AUTO;
    ts_status status = check_fit(st, p, gpu, *planned);
    if (status == TS_OK)
        status =
            ts_kernel_check(p->kernel, &p->geometry, info->warp_groups, st->why, sizeof st->why);
    if (status != TS_OK)
        return status;
    p->on_gpu = true;
    p->warp_groups = info->warp_groups;
    snprintf(p->device_name, sizeof p->device_name, "%.95s", info->name);
    memcpy(p->device_uuid, info->uuid, sizeof p->device_uuid);
    if (wanted->provider == TS_PROVIDER_CUDA_VMM || (any && info->vmm)) {
        uint32_t slabs = (p->num_blocks - 1) / p->slab_blocks + 1;
        snprintf(p->memory, sizeof p->memory, "cuda-vmm");
        ts_log_on(
            TS_LOG_INFO, &(ts_log_about){.pool = p->name},
            "pool '%s': cuda-vmm%s: slabs of its own for each tenant, handed out as descriptors",
            p->name, any ? " (auto: the device has it)" : "");
        *planned += block_bytes * p->num_blocks; /* its slabs are taken as they are needed */
        return ts_memory_cuda_vmm_new(gpu, slabs, block_bytes * p->slab_blocks, out, st->why,
                                      sizeof st->why);
    }
    snprintf(p->memory, sizeof p->memory, "cuda-ipc");
    ts_log_on(
        TS_LOG_WARNING, &(ts_log_about){.pool = p->name},
        "pool '%s': cuda-ipc%s: one slab, so one tenant (the first to store a token) until the "
        "daemon restarts, and whoever maps it can write it",
        p->name, any ? " (auto: the device can't export VMM memory)" : "");
    p->slab_blocks = p->num_blocks;
    return ts_memory_cuda_ipc_new(gpu, block_bytes * p->num_blocks, out, st->why, sizeof st->why);
}

static ts_status start_pool(start *st, const ts_config_pool *wanted)
{
    ts_service *s = st->service;
    ts_pool_config p = wanted->pool;
    const ts_service_gpu *gpu;
    ts_memory *memory = NULL;
    ts_status status = choose_device(st, wanted, &p, &gpu);
    if (status != TS_OK)
        return status;
    if (gpu != NULL)
        status = new_gpu_memory(st, wanted, &p, gpu, &memory);
    else
        status = ts_memory_host_new((p.num_blocks - 1) / p.slab_blocks + 1,
                                    ts_geometry_block_bytes(&p.geometry) * p.slab_blocks, &memory,
                                    st->why, sizeof st->why);
    if (status == TS_OK)
        status = ts_engine_add_pool(s->engine, &p, st->why, sizeof st->why);
    if (status != TS_OK) {
        ts_memory_free(memory);
        return status;
    }
    uint32_t index = s->engine->num_pools - 1;
    s->memory[index] = memory;
    s->gpu_of[index] = gpu;
    char text[256];
    ts_devices_describe(&p, text, sizeof text);
    ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = p.name}, "%s", text);
    return TS_OK;
}

ts_status ts_devices_start(ts_service *s, const ts_config *c, void (*failed)(const char *why))
{
    start st = {.service = s, .config = c, .failed = failed};
    for (uint32_t i = 0; i < c->num_pools; i++) {
        ts_status status = start_pool(&st, &c->pools[i]);
        if (status != TS_OK) {
            ts_log_on(TS_LOG_ERROR, &(ts_log_about){.pool = c->pools[i].pool.name}, "pool '%s': %s",
                      c->pools[i].pool.name, st.why);
            return status;
        }
    }
    return TS_OK;
}

void ts_devices_stop(ts_service *s)
{
    for (uint32_t i = 0; i < s->num_gpus; i++)
        ts_gpu_batch_free(s->gpus[i].batch);
}
