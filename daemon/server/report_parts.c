#define _GNU_SOURCE
#include "report_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *ts_report_zalloc(size_t count, size_t bytes)
{
    return calloc(count > 0 ? count : 1, bytes);
}

void ts_report_refuse(Tspb__Reply *reply, ts_status status, const char *format, const char *word)
{
    char *message = NULL;
    if (asprintf(&message, format, word) < 0)
        message = strdup("no memory");
    reply->status = (uint32_t)status;
    reply->message = message;
}

void ts_report_no_memory(Tspb__Reply *reply)
{
    ts_report_refuse(reply, TS_ENOMEM, "no memory for the %s", "answer");
}

uint64_t *ts_report_copy(const uint64_t *counts, size_t count)
{
    uint64_t *copy = ts_report_zalloc(count, sizeof *copy);
    if (copy != NULL && count > 0)
        memcpy(copy, counts, count * sizeof *copy);
    return copy;
}

Tspb__PoolSummary *ts_report_summarise(const ts_service *s, uint32_t index)
{
    const ts_engine_pool *pool = &s->exec.engine->pools[index];
    const ts_geometry *g = &pool->config.geometry;
    Tspb__PoolSummary *p = malloc(sizeof *p);
    if (p == NULL)
        return NULL;
    tspb__pool_summary__init(p);
    p->name = strdup(pool->config.name);
    p->device = strdup(pool->config.device);
    p->memory = strdup(pool->config.memory);
    p->device_name = strdup(pool->config.device_name);
    p->kernel = strdup(pool->config.on_gpu ? ts_kernel_name(pool->config.kernel)
                                           : ts_isa_name(ts_attention_isa(s->exec.attention)));
    p->evicted_by_cause = ts_report_copy(pool->books.evicted, TS_EVICT_CAUSES);
    p->evicted_by_age = ts_report_copy(pool->books.ages, TS_AGE_BINS);
    if (p->name == NULL || p->device == NULL || p->memory == NULL || p->device_name == NULL ||
        p->kernel == NULL || p->evicted_by_cause == NULL || p->evicted_by_age == NULL) {
        tspb__pool_summary__free_unpacked(p, NULL);
        /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): free_unpacked frees it */
        return NULL;
    }
    p->layers = g->layers;
    p->kv_heads = g->kv_heads;
    p->head_dim = g->head_dim;
    p->block_tokens = g->block_tokens;
    p->dtype = g->dtype;
    p->layout = g->layout;
    p->blocks = pool->books.num_blocks;
    p->max_blocks = pool->books.max_blocks;
    p->used_blocks = pool->books.used;
    p->shared_blocks = pool->books.shared;
    p->cached_blocks = pool->books.cached;
    p->evicted_blocks = ts_pool_evicted(&pool->books);
    p->asked_tokens = pool->asked_tokens;
    p->found_tokens = pool->found_tokens;
    p->waiting_sessions = pool->waiting;
    p->cache_off = pool->config.cache == TS_CACHE_OFF;
    p->n_evicted_by_cause = TS_EVICT_CAUSES;
    p->n_evicted_by_age = TS_AGE_BINS;
    p->evicted_age_sum_s = pool->books.age_sum;
    p->sequences = pool->seqs.live;
    p->kept_sequences = pool->seqs.kept;
    p->open_steps = pool->open_steps;
    p->block_bytes = ts_geometry_block_bytes(g);
    p->slab_blocks = pool->books.slab_blocks;
    p->slabs = pool->books.num_slabs;
    p->mps = pool->config.mps;
    p->granted_slabs = pool->books.ungranted;
    return p;
}

bool ts_report_find_pool(const ts_service *s, const char *name, uint32_t *index, Tspb__Reply *reply)
{
    ts_answer answer = {0};
    *index = ts_engine_pool_named(s->exec.engine, name, &answer);
    if (*index == TS_NONE)
        ts_report_refuse(reply, answer.status, "%s", answer.message);
    return *index != TS_NONE;
}
