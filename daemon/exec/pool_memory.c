#include "pool_memory.h"

#include "block_sums.h"
#include "log.h"
#include "plain_text.h"
#include "slab_supply.h"
#include "step_work.h"
#include "stored_memory.h"
#include "verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void ts_pool_memory_describe(const ts_pool_config *p, char *text, size_t bytes)
{
    const ts_geometry *g = &p->geometry;
    const uint64_t block_bytes = ts_geometry_block_bytes(g);
    const bool one = p->max_blocks <= p->slab_blocks;
    char block[32], all[32], slab[32], grown[64] = "";
    if (p->max_blocks > p->num_blocks)
        snprintf(grown, sizeof grown, ", and %llu when it has grown",
                 (unsigned long long)p->max_blocks * g->block_tokens);
    snprintf(text, bytes,
             "pool '%s' on %s: %s, %u layers, %u KV heads of %u, %u tokens a block, %u blocks of "
             "%s (%s) in %s of %s%s: up to %llu tokens%s",
             p->name, p->device, ts_dtype_name(g->dtype), g->layers, g->kv_heads, g->head_dim,
             g->block_tokens, p->num_blocks, ts_text_bytes(block_bytes, block, sizeof block),
             ts_text_bytes(block_bytes * p->num_blocks, all, sizeof all),
             one ? "one slab" : "slabs",
             ts_text_bytes(block_bytes * p->slab_blocks, slab, sizeof slab),
             one ? ", so for one user at a time" : "",
             (unsigned long long)p->num_blocks * g->block_tokens, grown);
}

static uint64_t machine_bytes(void)
{
    return (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Whether the machine has room for `bytes` more than its other pools take. Their pages come when
 * they are first written: too many would end a process then. */
static ts_status check_host_fit(uint64_t others, uint64_t bytes, char *why, size_t why_bytes)
{
    char asked[32], has[32], taken[32];
    uint64_t all = machine_bytes();
    if (bytes <= all && others <= all - bytes)
        return TS_OK;
    snprintf(why, why_bytes,
             "%s are asked for in host memory; this machine has %s, of which other pools take %s",
             ts_text_bytes(bytes, asked, sizeof asked), ts_text_bytes(all, has, sizeof has),
             ts_text_bytes(others, taken, sizeof taken));
    return TS_ENOMEM;
}

/* Bytes of host memory that the service's pools may take. */
static uint64_t host_bytes(const ts_exec *x)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < x->engine->num_pools; i++)
        if (ts_engine_has_pool(x->engine, i) && x->gpu_of[i] == NULL)
            bytes += ts_geometry_block_bytes(&x->engine->pools[i].config.geometry) *
                     x->engine->pools[i].books.num_blocks;
    return bytes;
}

/* A session's runs that were refused may be over after it; the next one in its place has a word,
 * too.
 */
#define WORDS_EACH 2u

/* The GPU, opened at its first mention; NULL with a sentence. */
static const ts_exec_gpu *open_gpu(ts_exec *x, uint32_t ordinal, char *why, size_t why_bytes)
{
    for (uint32_t i = 0; i < x->num_gpus; i++)
        if (ts_gpu_get_info(x->gpus[i].gpu)->ordinal == ordinal)
            return &x->gpus[i];
    if (x->num_gpus == TS_GPUS_MAX) {
        snprintf(why, why_bytes, "cuda:%u would be GPU number %u; the limit is %u", ordinal,
                 x->num_gpus + 1, TS_GPUS_MAX);
        return NULL;
    }
    ts_exec_gpu *g = &x->gpus[x->num_gpus];
    if (ts_gpu_open(ordinal, &g->gpu, why, why_bytes) != TS_OK)
        return NULL;
    g->exchange_bytes = calloc(TS_TENANTS_MAX, sizeof *g->exchange_bytes);
    ts_status status = TS_ENOMEM;
    if (g->exchange_bytes == NULL)
        snprintf(why, why_bytes, "no memory for a table of %u tenants", TS_TENANTS_MAX);
    else
        status = ts_done_words_new(g->gpu, WORDS_EACH * x->engine->limits.sessions, &g->words, why,
                                   why_bytes);
    if (status == TS_OK)
        status = ts_gpu_executor_new(g->gpu, x->submit_ms, x->join_us, x->device_failed,
                                     &g->executor, why, why_bytes);
    if (status == TS_OK) {
        x->num_gpus++;
        return g;
    }
    ts_done_words_release(g->words);
    g->words = NULL;
    free(g->exchange_bytes);
    ts_gpu_close(g->gpu);
    return NULL;
}

/*
 * Decides the device: *host, or the GPU with this ordinal. TS_EDEVICE with a sentence. `note` says
 * why there is no GPU where one would have been taken.
 */
static ts_status decide(const ts_config_pool *wanted, bool *host, uint32_t *ordinal, char *note,
                        size_t note_bytes, char *why, size_t why_bytes)
{
    const ts_pool_config *p = &wanted->pool;
    char reason[128] = "";
    bool any = strcmp(p->device, "auto") == 0;
    *ordinal = 0;
    note[0] = '\0';
    *host = strcmp(p->device, "host") == 0 || (any && wanted->provider == TS_PROVIDER_HOST);
    uint32_t count = *host ? 0 : ts_gpu_count(reason, sizeof reason);
    if (any && !*host && count == 0) {
        if (wanted->provider != TS_PROVIDER_AUTO) {
            snprintf(why, why_bytes, "provider = %s needs a GPU: %s",
                     ts_provider_name(wanted->provider), reason);
            return TS_EDEVICE;
        }
        snprintf(note, note_bytes, "%s", reason);
        *host = true;
    }
    if (*host && p->kernel != TS_KERNEL_AUTO) {
        snprintf(why, why_bytes, "kernel = %s runs on a GPU, and there is none",
                 ts_kernel_name(p->kernel));
        return TS_EDEVICE;
    }
    if (!any && !*host)
        (void)sscanf(p->device, "cuda:%u", ordinal); /* its form was seen to */
    if (*host || *ordinal < count)
        return TS_OK;
    snprintf(why, why_bytes, "device = %s: this machine has %u GPU%s%s%s", p->device, count,
             count == 1 ? "" : "s", count == 0 ? ": " : ", counted from 0", reason);
    return TS_EDEVICE;
}

/* Decides the device, and opens it; *gpu is NULL for host memory. */
static ts_status choose_device(ts_exec *x, const ts_config_pool *wanted, ts_pool_config *p,
                               const ts_exec_gpu **gpu, char *why, size_t why_bytes)
{
    bool any = strcmp(p->device, "auto") == 0, host;
    uint32_t ordinal;
    char note[128];
    *gpu = NULL;
    ts_status status = decide(wanted, &host, &ordinal, note, sizeof note, why, why_bytes);
    if (status != TS_OK)
        return status;
    if (host) {
        if (note[0] != '\0')
            ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = p->name},
                      "pool '%s': device = auto: host memory, there is no GPU (%s)", p->name, note);
        snprintf(p->device, sizeof p->device, "host");
        return TS_OK;
    }
    *gpu = open_gpu(x, ordinal, why, why_bytes);
    if (*gpu == NULL)
        return TS_EDEVICE;
    if (any)
        ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = p->name},
                  "pool '%s': device = auto: cuda:0, the first GPU", p->name);
    snprintf(p->device, sizeof p->device, "cuda:%u", ordinal);
    return TS_OK;
}

/* Bytes of a GPU that its pools will take as they need them. */
static uint64_t planned_bytes(const ts_exec *x, const ts_exec_gpu *g)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < x->engine->num_pools; i++)
        if (x->gpu_of[i] == g && x->memory[i]->ipc_handle == NULL) {
            const ts_pool_books *books = &x->engine->pools[i].books;
            bytes += (uint64_t)(books->num_slabs - books->ungranted) * x->memory[i]->slab_bytes;
        }
    return bytes;
}

/* Whether a GPU has room for `bytes` more than its pools have or will take. */
static ts_status check_fit(const ts_exec *x, const ts_exec_gpu *g, const char *device,
                           uint64_t bytes, char *why, size_t why_bytes)
{
    uint64_t available, planned = planned_bytes(x, g);
    ts_status status = ts_gpu_free_bytes(g->gpu, &available, why, why_bytes);
    if (status != TS_OK)
        return status;
    if (bytes <= available - (planned < available ? planned : available))
        return TS_OK;
    char asked[32], unused[32], all[32], taken[32];
    snprintf(why, why_bytes,
             "%s are asked for on %s (%s); it has %s free of %s, and other pools take %s of that",
             ts_text_bytes(bytes, asked, sizeof asked), device, ts_gpu_get_info(g->gpu)->name,
             ts_text_bytes(available, unused, sizeof unused),
             ts_text_bytes(ts_gpu_get_info(g->gpu)->total_bytes, all, sizeof all),
             ts_text_bytes(planned, taken, sizeof taken));
    return TS_ENOMEM;
}

static ts_status new_gpu_memory(const ts_exec *x, const ts_config_pool *wanted, ts_pool_config *p,
                                const ts_exec_gpu *g, ts_memory **out, char *why, size_t why_bytes)
{
    ts_gpu *gpu = g->gpu;
    const ts_gpu_info *info = ts_gpu_get_info(gpu);
    size_t block_bytes = ts_geometry_block_bytes(&p->geometry);
    bool any = wanted->provider == TS_PROVIDER_AUTO;
    ts_status status =
        check_fit(x, g, p->device, (uint64_t)block_bytes * p->num_blocks, why, why_bytes);
    if (status == TS_OK)
        status = ts_kernel_check(p->kernel, &p->geometry, info->warp_groups, why, why_bytes);
    if (status == TS_OK)
        status = ts_gpu_load(gpu, &p->geometry, why, why_bytes);
    if (status != TS_OK)
        return status;
    p->on_gpu = true;
    p->warp_groups = info->warp_groups;
    p->mps = info->mps;
    snprintf(p->device_name, sizeof p->device_name, "%.95s", info->name);
    memcpy(p->device_uuid, info->uuid, sizeof p->device_uuid);
    if (wanted->provider == TS_PROVIDER_CUDA_VMM || (any && info->vmm)) {
        uint32_t slabs = (p->max_blocks - 1) / p->slab_blocks + 1;
        snprintf(p->memory, sizeof p->memory, "cuda-vmm");
        ts_log_on(
            TS_LOG_INFO, &(ts_log_about){.pool = p->name},
            "pool '%s': cuda-vmm%s: slabs of its own for each tenant, handed out as descriptors",
            p->name, any ? " (auto: the device has it)" : "");
        return ts_memory_cuda_vmm_new(gpu, slabs, block_bytes * p->slab_blocks, out, why,
                                      why_bytes);
    }
    if (p->max_blocks > p->num_blocks) {
        snprintf(why, why_bytes, "cuda-ipc memory is one piece, which can't grow: no memory_max");
        return TS_EINVAL;
    }
    snprintf(p->memory, sizeof p->memory, "cuda-ipc");
    ts_log_on(
        TS_LOG_WARNING, &(ts_log_about){.pool = p->name},
        "pool '%s': cuda-ipc%s: one slab, so one tenant (the first to store a token) until the "
        "daemon restarts, and whoever maps it can write it",
        p->name, any ? " (auto: the device can't export VMM memory)" : "");
    p->slab_blocks = p->num_blocks;
    return ts_memory_cuda_ipc_new(gpu, block_bytes * p->num_blocks, out, why, why_bytes);
}

ts_status ts_pool_memory_check_exchange(const ts_exec *x, uint32_t pool, uint32_t tenant,
                                        uint64_t bytes, char *why, size_t why_bytes)
{
    const ts_exec_gpu *g = x->gpu_of[pool];
    uint64_t held = __atomic_load_n(&g->exchange_bytes[tenant], __ATOMIC_ACQUIRE);
    uint64_t most = x->tenant_exchange_bytes != 0 ? x->tenant_exchange_bytes
                                                  : ts_gpu_get_info(g->gpu)->total_bytes / 4;
    if (held <= most && bytes <= most - held)
        return check_fit(x, g, x->engine->pools[pool].config.device, bytes, why, why_bytes);
    snprintf(why, why_bytes,
             "uid %u has %llu bytes of %s in exchanges and would get %llu more; the limit is %llu "
             "(tenant_exchange)",
             x->engine->tenants[tenant], (unsigned long long)held,
             x->engine->pools[pool].config.device, (unsigned long long)bytes,
             (unsigned long long)most);
    return TS_EQUOTA;
}

/* Warns where the pool's slabs may take more than half of the descriptors that the holder of the
 * memory accepts: each slab is one. */
static void warn_of_store(const ts_exec *x, const ts_pool_config *p)
{
    const uint32_t most = x->books == NULL ? 0 : ts_store_fds_max(x->store);
    const uint32_t slabs = (p->max_blocks - 1) / p->slab_blocks + 1;
    if (most == 0 || slabs <= most / 2)
        return;
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.pool = p->name},
              "pool '%s' may have %u slabs, each a descriptor to be stored, and whoever holds them "
              "takes %u of all pools and sessions: beyond that steps are refused; larger slabs "
              "(slab =) need fewer",
              p->name, slabs, most);
}

/* An operator's command is a call of its session. */
static void set_caller(ts_command *c, const ts_caller *by)
{
    c->session = by == NULL ? 0 : by->session;
    c->call = by == NULL ? 0 : by->call;
}

ts_status ts_pool_memory_add(ts_exec *x, const ts_config_pool *wanted, const ts_caller *by,
                             char *why, size_t why_bytes)
{
    ts_pool_config p = wanted->pool;
    const ts_exec_gpu *gpu;
    ts_memory *memory = NULL;
    uint32_t index;
    ts_status status = ts_engine_pool_place(x->engine, &p, &index, why, why_bytes);
    if (status == TS_OK) /* before anything is taken for it */
        status = choose_device(x, wanted, &p, &gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    if (gpu != NULL)
        status = new_gpu_memory(x, wanted, &p, gpu, &memory, why, why_bytes);
    else
        status = check_host_fit(host_bytes(x),
                                (uint64_t)ts_geometry_block_bytes(&p.geometry) * p.num_blocks, why,
                                why_bytes);
    if (status == TS_OK && gpu == NULL)
        status = ts_memory_host_new((p.max_blocks - 1) / p.slab_blocks + 1,
                                    ts_geometry_block_bytes(&p.geometry) * p.slab_blocks, &memory,
                                    why, why_bytes);
    ts_answer added = {0};
    if (status == TS_OK) {
        memory->outlives = x->books != NULL;
        ts_command command = {.op = TS_OP_POOL_ADD, .pool_add.config = &p};
        set_caller(&command, by);
        ts_exec_apply(x, &command, &added);
        status = added.status;
        snprintf(why, why_bytes, "%s", added.message);
    }
    if (status != TS_OK) {
        ts_memory_free(memory);
        return status;
    }
    x->memory[added.pool] = memory;
    x->gpu_of[added.pool] = gpu;
    char text[320];
    ts_pool_memory_describe(&p, text, sizeof text);
    ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = p.name}, "%s", text);
    warn_of_store(x, &p);
    ts_verify_begin(x, added.pool);
    if (p.on_gpu && !p.mps)
        ts_log_on(
            TS_LOG_WARNING, &(ts_log_about){.pool = p.name},
            "pool '%s': CUDA's multi-process service (MPS) is off on %s, so the GPU is handed "
            "from process to process; under MPS workers and daemon share it, and each layer "
            "that the daemon attends takes a fraction of a millisecond less",
            p.name, p.device);
    return TS_OK;
}

/* The GPU of a pool that an earlier daemon had; NULL with a sentence. It is where it was, or where
 * the devices' order has put it. */
static const ts_exec_gpu *find_gpu(ts_exec *x, const ts_pool_config *p, char *why, size_t why_bytes)
{
    char reason[128] = "";
    uint32_t first = 0, count = ts_gpu_count(reason, sizeof reason);
    why[0] = '\0';
    (void)sscanf(p->device, "cuda:%u", &first);
    for (uint32_t i = 0; i < count; i++) {
        const ts_exec_gpu *g = open_gpu(x, (first + i) % count, why, why_bytes);
        if (g != NULL &&
            memcmp(ts_gpu_get_info(g->gpu)->uuid, p->device_uuid, sizeof p->device_uuid) == 0)
            return g;
    }
    if (count == 0 || why[0] == '\0')
        snprintf(why, why_bytes, "its GPU, %s, isn't there%s%s", p->device_name,
                 reason[0] == '\0' ? "" : ": ", reason);
    return NULL;
}

/* A slab whose memory is gone gets new memory, and what it had is lost. A store that has no room
 * for that is no reason to lose the rest. */
static ts_status lose_slab(ts_exec *x, uint32_t pool, uint32_t slab, uint64_t *lost, char *why,
                           size_t why_bytes)
{
    const ts_engine_pool *p = &x->engine->pools[pool];
    ts_answer answer;
    ts_stored_slab_forget(
        x->store, &(ts_stored_slab){x->memory[pool], pool, slab, p->books.slabs[slab].generation});
    ts_exec_apply(x, &(ts_command){.op = TS_OP_SLAB_LOST, .pool = pool, .slab_grant.slab = slab},
                  &answer);
    *lost += answer.dropped;
    ts_status status = ts_memory_renew(x->memory[pool], slab, why, why_bytes);
    if (status != TS_OK)
        return status;
    const ts_stored_slab next = {x->memory[pool], pool, slab, p->books.slabs[slab].generation};
    ts_stored_slab_forget(x->store, &next); /* memory that was never granted */
    if (ts_stored_slab_put(x->store, &next, why, why_bytes) != TS_OK)
        ts_log_on(TS_LOG_ERROR, &(ts_log_about){.pool = p->config.name},
                  "pool '%s', slab %u isn't stored: what will lie there is lost at the next "
                  "restart: %s",
                  p->config.name, slab, why);
    return TS_OK;
}

static ts_status restore_pool(ts_exec *x, uint32_t pool, char *why, size_t why_bytes)
{
    const ts_engine_pool *p = &x->engine->pools[pool];
    const size_t slab_bytes = ts_geometry_block_bytes(&p->config.geometry) * p->config.slab_blocks;
    const uint32_t slabs = (p->books.max_blocks - 1) / p->books.slab_blocks + 1;
    const bool ipc = strcmp(p->config.memory, "cuda-ipc") == 0;
    ts_memory **memory = &x->memory[pool];
    char health[TS_GPU_WHY_BYTES];
    uint64_t lost = 0;
    ts_gpu *gpu = NULL;
    ts_status status = TS_OK;
    if (p->config.on_gpu) {
        if ((x->gpu_of[pool] = find_gpu(x, &p->config, why, why_bytes)) == NULL)
            return TS_EDEVICE;
        gpu = x->gpu_of[pool]->gpu;
        status = ts_gpu_load(gpu, &p->config.geometry, why, why_bytes);
    }
    if (status == TS_OK)
        status = gpu == NULL ? ts_memory_host_new(slabs, slab_bytes, memory, why, why_bytes)
                 : ipc       ? ts_memory_cuda_ipc_new(gpu, slab_bytes, memory, why, why_bytes)
                       : ts_memory_cuda_vmm_new(gpu, slabs, slab_bytes, memory, why, why_bytes);
    if (status != TS_OK)
        return status;
    (*memory)->outlives = true;
    for (uint32_t i = 0; i < p->books.ungranted && status == TS_OK; i++) {
        const ts_stored_slab slab = {*memory, pool, i, p->books.slabs[i].generation};
        if (ts_stored_slab_take(x->store, &slab, why, why_bytes) == TS_OK)
            continue;
        if (gpu != NULL && ts_gpu_health(gpu, health, sizeof health) != TS_OK)
            return TS_EDEVICE; /* the slab is what it was: the next daemon maps it */
        ts_log_on(TS_LOG_WARNING, &(ts_log_about){.pool = p->config.name}, "pool '%s', slab %u: %s",
                  p->config.name, i, why);
        status = lose_slab(x, pool, i, &lost, why, why_bytes);
    }
    if (lost > 0)
        ts_log_on(TS_LOG_ERROR, &(ts_log_about){.pool = p->config.name},
                  "pool '%s': %llu sequences are lost: their memory is gone%s", p->config.name,
                  (unsigned long long)lost, ipc ? ", as cuda-ipc memory is with its daemon" : "");
    return status;
}

ts_status ts_pool_memory_restore(ts_exec *x, bool crashed, char *why, size_t why_bytes)
{
    ts_answer answer;
    ts_status status = TS_OK;
    ts_exec_apply(x, &(ts_command){.op = TS_OP_RESTARTED, .restarted.crashed = crashed}, &answer);
    for (uint32_t i = 0; i < x->engine->num_pools && status == TS_OK; i++)
        if (ts_engine_has_pool(x->engine, i))
            status = restore_pool(x, i, why, why_bytes);
    if (status == TS_OK)
        status = ts_verify_all(x, why, why_bytes);
    for (uint32_t i = 0; i < x->engine->num_steps && status == TS_OK; i++) {
        const ts_step *step = &x->engine->steps[i];
        if (!step->live || !step->copying)
            continue;
        const ts_command made = {.op = TS_OP_STEP_DONE,
                                 .step_done = {.step = step->id, .layer = TS_NONE}};
        status = ts_step_work_copy_again(x, step, why, why_bytes);
        if (status == TS_OK) /* else it is for the next daemon */
            ts_exec_apply(x, &made, &answer);
    }
    return status;
}

/* Whether a pool of `bytes` fits on its GPU beside others that take *others of it, and can be
 * attended there. */
static ts_status check_on_gpu(const ts_pool_config *p, uint32_t ordinal, uint64_t others,
                              uint64_t bytes, char *why, size_t why_bytes)
{
    ts_gpu *gpu;
    ts_status status = ts_gpu_open(ordinal, &gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    const ts_gpu_info *info = ts_gpu_get_info(gpu);
    char asked[32], all[32], taken[32];
    if (bytes > info->total_bytes || others > info->total_bytes - bytes) {
        status = TS_ENOMEM;
        snprintf(why, why_bytes,
                 "%s are asked for on cuda:%u (%s), which has %s, of which other pools take %s",
                 ts_text_bytes(bytes, asked, sizeof asked), ordinal, info->name,
                 ts_text_bytes(info->total_bytes, all, sizeof all),
                 ts_text_bytes(others, taken, sizeof taken));
    } else {
        status = ts_kernel_check(p->kernel, &p->geometry, info->warp_groups, why, why_bytes);
    }
    ts_gpu_close(gpu);
    return status;
}

ts_status ts_pool_memory_check(ts_config *c)
{
    uint64_t in_host = 0, on_gpus[TS_POOLS_MAX] = {0};
    uint32_t ordinals[TS_POOLS_MAX], num_gpus = 0; /* which GPUs those are */
    for (uint32_t i = 0; i < c->num_pools; i++) {
        const ts_config_pool *p = &c->pools[i];
        const uint64_t bytes =
            p->pool.num_blocks == 0
                ? 0
                : (uint64_t)ts_geometry_block_bytes(&p->pool.geometry) * p->pool.num_blocks;
        char why[200], note[128];
        bool host;
        uint32_t ordinal;
        if (bytes == 0) /* it has problems of its own */
            continue;
        if (decide(p, &host, &ordinal, note, sizeof note, why, sizeof why) != TS_OK) {
            ts_config_complain(c, ts_config_pool_line(p, "device"), "pool '%s': %s", p->pool.name,
                               why);
            continue;
        }
        uint32_t gpu = 0;
        while (!host && gpu < num_gpus && ordinals[gpu] != ordinal)
            gpu++;
        if (!host && gpu == num_gpus)
            ordinals[num_gpus++] = ordinal;
        uint64_t *others = host ? &in_host : &on_gpus[gpu];
        ts_status status = host ? check_host_fit(*others, bytes, why, sizeof why)
                                : check_on_gpu(&p->pool, ordinal, *others, bytes, why, sizeof why);
        const char *key = status == TS_ENOMEM ? "memory" : "device";
        if (status != TS_OK)
            ts_config_complain(c, ts_config_pool_line(p, key), "pool '%s': %s", p->pool.name, why);
        else
            *others += bytes;
    }
    return c->num_problems == 0 ? TS_OK : TS_EINVAL;
}

ts_status ts_pool_memory_resize(ts_exec *x, uint32_t pool, uint32_t num_blocks, const ts_caller *by,
                                ts_answer *answer)
{
    const ts_engine_pool *p = &x->engine->pools[pool];
    ts_memory *memory = x->memory[pool];
    ts_command command = {
        .op = TS_OP_POOL_RESIZE, .pool = pool, .pool_resize.num_blocks = num_blocks};
    set_caller(&command, by);
    (void)ts_slab_supply_finish(x);
    uint32_t before = p->books.num_slabs, blocks = p->books.num_blocks;
    if (memory->ipc_handle != NULL && num_blocks != blocks) {
        ts_refuse(answer, TS_EINVAL,
                  "pool '%s' is cuda-ipc memory: one piece, which keeps its size", p->config.name);
        return answer->status;
    }
    if (num_blocks > blocks && num_blocks <= p->books.max_blocks) {
        char why[TS_MESSAGE_BYTES];
        uint64_t more =
            (uint64_t)ts_geometry_block_bytes(&p->config.geometry) * (num_blocks - blocks);
        ts_status status =
            x->gpu_of[pool] == NULL
                ? check_host_fit(host_bytes(x), more, why, sizeof why)
                : check_fit(x, x->gpu_of[pool], p->config.device, more, why, sizeof why);
        if (status != TS_OK) {
            ts_refuse(answer, status, "pool '%s': %.200s", p->config.name, why);
            return status;
        }
    }
    ts_exec_apply(x, &command, answer);
    for (uint32_t i = p->books.num_slabs; answer->status == TS_OK && i < before; i++) {
        ts_exec_slab_goes(x, pool, i);
        const ts_stored_slab slab = {memory, pool, i, p->books.slabs[i].generation};
        ts_stored_slab_forget(x->store, &slab);
        ts_block_sums_leave_slab(x->sums, pool, i);
        ts_slab_drop(&slab);
    }
    return answer->status;
}

ts_status ts_pool_memory_remove(ts_exec *x, uint32_t pool, const ts_caller *by, ts_answer *answer)
{
    ts_command command = {.op = TS_OP_POOL_REMOVE, .pool = pool};
    set_caller(&command, by);
    const ts_engine_pool *p = &x->engine->pools[pool];
    (void)ts_slab_supply_finish(x);
    if (x->memory[pool]->ipc_handle != NULL && p->books.ungranted > 0) {
        /* Freed, it could become somebody else's under the eyes of who keeps it mapped. */
        ts_refuse(answer, TS_EPERM,
                  "pool '%s' is cuda-ipc memory that its tenant may still map: it stays until the "
                  "daemon is restarted",
                  p->config.name);
        return answer->status;
    }
    /* The books go with the pool, and with them the generations, which the names have. */
    const uint32_t slabs = p->books.ungranted;
    uint32_t *generations = calloc(slabs + 1ull, sizeof *generations);
    if (generations == NULL) {
        ts_refuse(answer, TS_ENOMEM, "no memory to end a pool of %u slabs", slabs);
        return answer->status;
    }
    for (uint32_t i = 0; i < slabs; i++)
        generations[i] = p->books.slabs[i].generation;
    ts_exec_apply(x, &command, answer);
    if (answer->status == TS_OK)
        ts_block_sums_remove(x->sums, pool); /* nobody reads a block any more */
    for (uint32_t i = 0; i < x->memory[pool]->num_slabs && answer->status == TS_OK; i++)
        ts_exec_slab_goes(x, pool, i);
    for (uint32_t i = 0; i < slabs && answer->status == TS_OK; i++) {
        const ts_stored_slab slab = {x->memory[pool], pool, i, generations[i]};
        ts_stored_slab_forget(x->store, &slab);
        ts_slab_drop(&slab); /* freed with the pool, it would stay for whoever maps it */
    }
    free(generations);
    if (answer->status != TS_OK)
        return answer->status;
    ts_memory_free(x->memory[pool]);
    x->memory[pool] = NULL;
    x->gpu_of[pool] = NULL;
    return TS_OK;
}

void ts_pool_memory_stop(ts_exec *x)
{
    ts_slab_supply_stop(x);
    for (uint32_t i = 0; i < x->num_gpus; i++)
        ts_gpu_executor_free(x->gpus[i].executor);
}
