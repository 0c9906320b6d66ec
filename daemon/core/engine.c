#include "engine_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

void ts_refuse(ts_answer *answer, ts_status status, const char *format, ...)
{
    answer->status = status;
    va_list args;
    va_start(args, format);
    vsnprintf(answer->message, sizeof answer->message, format, args);
    va_end(args);
}

void ts_refuse_more(ts_answer *answer, ts_status status, uint64_t used, uint64_t needed,
                    uint64_t limit, const char *format, ...)
{
    answer->status = status;
    answer->amounts =
        (ts_amounts){.needed = needed, .free = limit > used ? limit - used : 0, .limit = limit};
    va_list args;
    va_start(args, format);
    vsnprintf(answer->message, sizeof answer->message, format, args);
    va_end(args);
}

void ts_refuse_beyond(ts_answer *answer, ts_status status, uint64_t needed, uint64_t limit,
                      const char *format, ...)
{
    answer->status = status;
    answer->amounts = (ts_amounts){.needed = needed, .limit = limit};
    va_list args;
    va_start(args, format);
    vsnprintf(answer->message, sizeof answer->message, format, args);
    va_end(args);
}

bool ts_engine_grow(void **memory, size_t *capacity, size_t count, size_t bytes)
{
    if (count <= *capacity)
        return true;
    size_t wanted = *capacity == 0 ? 64 : *capacity;
    while (wanted < count)
        wanted *= 2;
    void *grown = realloc(*memory, wanted * bytes);
    if (grown == NULL)
        return false;
    *memory = grown;
    *capacity = wanted;
    return true;
}

void ts_engine_default_limits(ts_engine_limits *limits)
{
    *limits = (ts_engine_limits){
        .sessions = 4096,
        .session_sequences = 1u << 24,
        .session_steps = 256,
        .step_runs = 4,
        .batch = 65536,
        .step_tokens = 1u << 20,
        .exchange_bytes = (uint64_t)1 << 30,
    };
}

ts_engine *ts_engine_new(const ts_engine_limits *limits)
{
    ts_engine *e = calloc(1, sizeof *e);
    if (e == NULL)
        return NULL;
    e->limits = *limits;
    e->free_session = e->free_step = e->closing = e->claims.free_head = TS_NONE;
    e->woken = (ts_wait_list){TS_NONE, TS_NONE};
    e->pools = calloc(TS_POOLS_MAX, sizeof *e->pools);
    e->tenants = calloc(TS_TENANTS_MAX, sizeof *e->tenants);
    e->tenant_sessions = calloc(TS_TENANTS_MAX, sizeof *e->tenant_sessions);
    e->tenant_claim_ids = calloc(TS_TENANTS_MAX, sizeof *e->tenant_claim_ids);
    e->sessions = calloc(limits->sessions, sizeof *e->sessions);
    if (e->pools == NULL || e->tenants == NULL || e->tenant_sessions == NULL ||
        e->tenant_claim_ids == NULL || e->sessions == NULL) {
        ts_engine_free(e);
        return NULL;
    }
    return e;
}

void ts_engine_free(ts_engine *e)
{
    if (e == NULL)
        return;
    for (uint32_t i = 0; i < e->num_pools; i++) {
        ts_pool_fini(&e->pools[i].books);
        ts_sequences_fini(&e->pools[i].seqs);
    }
    for (uint32_t i = 0; i < e->num_sessions; i++)
        /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): no sessions, no memory of them */
        free(e->sessions[i].owned);
    for (uint32_t i = 0; i < e->num_steps; i++) {
        free(e->steps[i].seqs);
        free(e->steps[i].stream_runs);
    }
    free(e->pools);
    free(e->tenants);
    free(e->tenant_sessions);
    free(e->tenant_claim_ids);
    ts_engine_forget_claims(e);
    ts_engine_forget_graves(e);
    free(e->sessions);
    free(e->steps);
    free(e->out_ids);
    free(e->out_words);
    free(e->out_copies);
    free(e->out_names);
    free(e);
}

ts_session *ts_engine_session(const ts_engine *e, uint64_t id)
{
    uint32_t index = (uint32_t)id;
    if (index >= e->num_sessions || !e->sessions[index].live || e->sessions[index].closing ||
        e->sessions[index].generation != (uint32_t)(id >> 32))
        return NULL;
    return &e->sessions[index];
}

uint64_t ts_engine_session_id(const ts_engine *e, uint32_t index)
{
    return (uint64_t)e->sessions[index].generation << 32 | index;
}
