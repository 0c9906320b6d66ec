/* Sessions: opened, closed, and what they leave reclaimed. */
#include "claim_ops.h"
#include "engine_internal.h"
#include "wait_ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t tenant_of(ts_engine *e, uint32_t uid)
{
    for (uint32_t i = 0; i < e->num_tenants; i++)
        if (e->tenants[i] == uid)
            return i;
    if (e->num_tenants == TS_TENANTS_MAX)
        return TS_NONE;
    for (uint32_t i = 0; i < e->num_pools; i++)
        if (ts_engine_has_pool(e, i) &&
            ts_pool_add_tenant(&e->pools[i].books, e->num_tenants) != TS_OK)
            return TS_NONE;
    e->tenants[e->num_tenants] = uid;
    return e->num_tenants++;
}

void ts_engine_session_open(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)s;
    bool is_operator = c->session_open.is_operator;
    if (e->draining && !is_operator)
        return ts_refuse(answer, TS_EBUSY, "the daemon is being drained: it takes no new sessions");
    uint32_t kept =
        !is_operator && e->limits.sessions > 2 * TS_OPERATOR_SESSIONS ? TS_OPERATOR_SESSIONS : 0;
    if (e->live_sessions >= e->limits.sessions - kept)
        return ts_refuse_more(answer, TS_EQUOTA, e->live_sessions, 1, e->limits.sessions - kept,
                              "%u sessions are open; the limit is %u%s", e->live_sessions,
                              e->limits.sessions,
                              kept == 0 ? "" : ", the last 8 of them for operators");
    uint32_t tenant = tenant_of(e, c->session_open.uid);
    if (tenant == TS_NONE)
        return ts_refuse_more(answer, TS_EQUOTA, e->num_tenants, 1, TS_TENANTS_MAX,
                              "uid %u would be tenant %u; the limit is %u", c->session_open.uid,
                              e->num_tenants + 1, TS_TENANTS_MAX);
    if (!is_operator && e->limits.tenant_sessions != 0 &&
        e->tenant_sessions[tenant] >= e->limits.tenant_sessions)
        return ts_refuse_more(
            answer, TS_EQUOTA, e->tenant_sessions[tenant], 1, e->limits.tenant_sessions,
            "uid %u has %u sessions; the limit is %u (tenant_sessions)", c->session_open.uid,
            e->tenant_sessions[tenant], e->limits.tenant_sessions);
    uint32_t *owned = malloc(TS_POOLS_MAX * sizeof *owned);
    if (owned == NULL)
        return ts_refuse(answer, TS_ENOMEM, "no memory for a session");
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++)
        owned[i] = TS_NONE;
    uint32_t index = e->free_session;
    if (index != TS_NONE)
        e->free_session = e->sessions[index].next_free;
    else
        e->sessions[index = e->num_sessions++].generation = e->limits.first_generation;
    ts_session *opened = &e->sessions[index];
    *opened = (ts_session){.generation = opened->generation + 1,
                           .live = true,
                           .tenant = tenant,
                           .pid = c->session_open.pid,
                           .process_started = c->session_open.process_started,
                           .step_list = TS_NONE,
                           .owned = owned};
    snprintf(opened->program, sizeof opened->program, "%s", c->session_open.program);
    memcpy(opened->token, c->session_open.token, sizeof opened->token);
    memcpy(opened->nonce, c->session_open.nonce, sizeof opened->nonce);
    e->live_sessions++;
    e->present_tenants += e->tenant_sessions[tenant]++ == 0;
    answer->session = ts_engine_session_id(e, index);
}

ts_session *ts_engine_session_of(const ts_engine *e, uint32_t uid,
                                 const uint8_t nonce[TS_SECRET_BYTES])
{
    static const uint8_t none[TS_SECRET_BYTES];
    for (uint32_t i = 0; i < e->num_sessions; i++) {
        ts_session *s = &e->sessions[i];
        if (s->live && !s->closing && e->tenants[s->tenant] == uid &&
            memcmp(s->nonce, nonce, sizeof s->nonce) == 0 && memcmp(nonce, none, sizeof none) != 0)
            return s;
    }
    return NULL;
}

/* What a quarantined step's worker may write is still waited for, and runs on streams, which are
 * done again without being asked for. */
void ts_engine_restarted(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    (void)none;
    (void)answer;
    for (uint32_t i = 0; i < e->num_steps; i++) {
        ts_step *step = &e->steps[i];
        if (!step->live)
            continue;
        const uint32_t others = (step->copying ? 1u : 0u) + (step->quarantined ? 1u : 0u);
        if (step->in_flight > others && c->restarted.crashed)
            step->crashes++;
        if (e->sessions[step->session].closing) /* nobody waits for them */
            step->num_stream_runs = 0;
        step->in_flight = others + step->num_stream_runs;
        if (step->aborted && step->in_flight == 0)
            ts_engine_step_abort(e, step);
    }
    for (uint32_t i = 0; i < e->num_sessions; i++) {
        ts_session *s = &e->sessions[i];
        if (s->live && s->closing && !s->in_closing)
            (void)ts_engine_reclaim(e, s, TS_SWEEP_ENTRIES);
        if (!s->live || s->closing)
            continue;
        s->away = true;
        if (s->wait.kind == TS_WAIT_ROOM)
            ts_waits_answered(e, s);
        else
            ts_waits_end(e, s);
    }
}

void ts_engine_session_back(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)e;
    (void)c;
    (void)answer;
    s->away = false;
}

void ts_engine_drain(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    (void)none;
    (void)answer;
    e->draining = c->drain.on;
}

/* What its arrays and its ids are made with stays. */
void ts_engine_set_limits(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    (void)none;
    (void)answer;
    ts_engine_limits next = *c->limits.limits;
    next.sessions = e->limits.sessions;
    next.first_generation = e->limits.first_generation;
    next.hash_seed = e->limits.hash_seed;
    e->limits = next;
}

uint32_t ts_engine_reclaim(ts_engine *e, ts_session *s, uint32_t entries)
{
    for (uint32_t i = s->step_list; i != TS_NONE && entries > 0;) {
        ts_step *step = &e->steps[i];
        i = step->next;
        if (step->in_flight > 0)
            continue;
        uint32_t count = 1 + step->num_seqs;
        for (uint32_t j = 0; j < step->num_seqs; j++)
            count += step->seqs[j].reserved;
        ts_engine_step_abort(e, step);
        entries -= count < entries ? count : entries;
    }
    for (uint32_t p = 0; p < e->num_pools; p++) {
        ts_engine_pool *pool = &e->pools[p];
        for (uint32_t i = s->owned[p]; i != TS_NONE && entries > 0;) {
            ts_sequence *seq = &pool->seqs.all[i];
            i = seq->next;
            if (seq->step != TS_NONE)
                continue;
            uint32_t count = 1 + seq->num_blocks;
            ts_sequence_free(&pool->seqs, &pool->books, seq, &s->owned[p]);
            s->sequences--;
            entries -= count < entries ? count : entries;
        }
    }
    if (entries == 0 && !s->in_closing) {
        s->in_closing = true;
        s->next_closing = e->closing;
        e->closing = (uint32_t)(s - e->sessions);
    }
    if (s->steps > 0 || s->in_closing)
        return entries;
    uint32_t index = (uint32_t)(s - e->sessions);
    for (uint32_t p = 0; p < e->num_pools; p++)
        ts_pool_leave_home(&e->pools[p].books, index);
    free(s->owned);
    s->owned = NULL;
    s->live = false;
    e->live_sessions--;
    e->present_tenants -= --e->tenant_sessions[s->tenant] == 0;
    if (s->generation < UINT32_MAX) {
        s->next_free = e->free_session;
        e->free_session = index;
    }
    return entries;
}

void ts_engine_exchange_open(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    uint64_t bytes = c->exchange_open.bytes;
    if (bytes == 0 || bytes > e->limits.exchange_bytes || bytes % 4096 != 0)
        return ts_refuse_beyond(
            answer, TS_EINVAL, bytes, e->limits.exchange_bytes,
            "an exchange of %llu bytes; it must be a multiple of 4096, at most %llu",
            (unsigned long long)bytes, (unsigned long long)e->limits.exchange_bytes);
    if (bytes < s->exchange_bytes && !c->exchange_open.other_memory)
        return ts_refuse(answer, TS_EINVAL, "an exchange of %llu bytes would replace one of %llu",
                         (unsigned long long)bytes, (unsigned long long)s->exchange_bytes);
    for (uint32_t i = s->step_list; i != TS_NONE; i = e->steps[i].next)
        for (uint32_t k = 0; k < e->steps[i].num_stream_runs; k++)
            e->steps[i].stream_runs[k].flags |= TS_RUN_REPLACED;
    s->exchange_bytes = bytes;
    s->exchange = c->exchange_open.source;
    s->exchanges++;
}

bool ts_engine_session_writes(const ts_engine *e, uint64_t id)
{
    const ts_session *s = ts_engine_session(e, id);
    for (uint32_t i = s == NULL ? TS_NONE : s->step_list; i != TS_NONE; i = e->steps[i].next)
        if (e->steps[i].by_worker)
            return true;
    return false;
}

void ts_engine_session_close(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)answer;
    ts_waits_end(e, s);
    ts_claims_end_all(e, s);
    s->closing = true;
    for (uint32_t i = s->step_list; i != TS_NONE && c->session_close.quarantine;
         i = e->steps[i].next)
        if (e->steps[i].by_worker) { /* as if a run of the daemon's were under way */
            e->steps[i].quarantined = true;
            e->steps[i].in_flight++;
        }
    (void)ts_engine_reclaim(e, s, TS_SWEEP_ENTRIES);
}

void ts_engine_session_gone(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    (void)none;
    const uint32_t index = (uint32_t)c->session;
    ts_session *s = index < e->num_sessions ? &e->sessions[index] : NULL;
    if (s == NULL || !s->live || !s->closing || s->generation != (uint32_t)(c->session >> 32))
        return ts_refuse(answer, TS_ENOENT, "no session %llx is closing",
                         (unsigned long long)c->session);
    for (uint32_t i = s->step_list; i != TS_NONE; i = e->steps[i].next)
        if (e->steps[i].quarantined) {
            e->steps[i].quarantined = false;
            e->steps[i].in_flight--;
        }
    if (!s->in_closing) /* else a sweep goes on with it */
        (void)ts_engine_reclaim(e, s, TS_SWEEP_ENTRIES);
}
