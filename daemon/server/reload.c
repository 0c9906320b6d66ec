#define _GNU_SOURCE
#include "reload.h"

#include "wait_ops.h"

#include <stdio.h>
#include <string.h>

/* Quotas belong to the engine's owner. */
typedef struct change {
    ts_work work;
    ts_config *running;
    const ts_config *next;
} change;

static void change_quotas(ts_pool_config *at, const ts_pool_config *to)
{
    at->tenant_blocks_max = to->tenant_blocks_max;
    at->tenant_pinned_max = to->tenant_pinned_max;
    at->tenant_sequences_max = to->tenant_sequences_max;
    at->tenant_entries_max = to->tenant_entries_max;
}

static void switch_cache(ts_service *s, uint32_t pool, ts_cache_mode mode)
{
    const ts_engine_pool *p = &s->exec.engine->pools[pool];
    const bool on = mode == TS_CACHE_ON;
    ts_answer answer;
    if (p->config.cache == mode)
        return;
    const uint32_t cached = p->books.cached;
    ts_exec_apply(&s->exec, &(ts_command){.op = TS_OP_CACHE_SET, .pool = pool, .cache_set.on = on},
                  &answer);
    if (on)
        ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = p->config.name},
                  "pool '%s': its prefix cache is on", p->config.name);
    else
        ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = p->config.name},
                  "pool '%s': its prefix cache is off, and its %u cached blocks are dropped",
                  p->config.name, cached);
}

static void apply(ts_work *work, void *service)
{
    change *ch = (change *)work;
    ts_service *s = service;
    ts_engine *e = s->exec.engine;
    pthread_mutex_lock(&s->operators_lock);
    s->operators = ch->next->operators;
    pthread_mutex_unlock(&s->operators_lock);
    s->http_shows_all = ch->next->metrics_show == TS_METRICS_ALL;
    s->exec.tenant_exchange_bytes = ch->next->tenant_exchange_bytes;
    ch->running->tenant_exchange_bytes = ch->next->tenant_exchange_bytes;
    const ts_engine_limits *to = &ch->next->limits;
    ts_engine_limits *at[] = {&e->limits, &ch->running->limits};
    for (int i = 0; i < 2; i++) {
        at[i]->tenant_sessions = to->tenant_sessions;
        at[i]->session_sequences = to->session_sequences;
        at[i]->session_steps = to->session_steps;
        at[i]->session_blocks = to->session_blocks;
        at[i]->batch = to->batch;
        at[i]->step_tokens = to->step_tokens;
        at[i]->exchange_bytes = to->exchange_bytes;
    }
    for (uint32_t i = 0; i < ch->next->num_pools; i++)
        for (uint32_t j = 0; j < e->num_pools; j++)
            if (strcmp(ch->next->pools[i].pool.name, e->pools[j].config.name) == 0) {
                change_quotas(&e->pools[j].config, &ch->next->pools[i].pool);
                ts_waits_look_again(e, j);
                switch_cache(s, j, ch->next->pools[i].pool.cache);
            }
    ts_exec_look_for_woken(&s->exec);
}

static const ts_config_pool *find(const ts_config *c, const char *name)
{
    for (uint32_t i = 0; i < c->num_pools; i++)
        if (strcmp(c->pools[i].pool.name, name) == 0)
            return &c->pools[i];
    return NULL;
}

/* What can't be changed, as far as it fits. */
typedef struct list {
    char text[256];
} list;

static void note(void *arg, const char *what)
{
    list *l = arg;
    size_t used = strlen(l->text);
    snprintf(l->text + used, sizeof l->text - used, "%s%s", used == 0 ? "" : ", ", what);
}

static void note_pool(list *l, const ts_config_pool *p)
{
    char what[80];
    snprintf(what, sizeof what, "pool %s", p->pool.name);
    note(l, what);
}

void ts_reload(ts_service *s, ts_config *running, const ts_config *next)
{
    list fixed = {""};
    ts_config_compare(running, next, note, &fixed);
    for (uint32_t i = 0; i < running->num_pools; i++) {
        const ts_config_pool *was = &running->pools[i], *is = find(next, was->pool.name);
        if (is == NULL || ts_config_pools_differ(was, is))
            note_pool(&fixed, was);
    }
    for (uint32_t i = 0; i < next->num_pools; i++)
        if (find(running, next->pools[i].pool.name) == NULL)
            note_pool(&fixed, &next->pools[i]);

    running->log_level = next->log_level;
    ts_log_show(next->log_level);
    change ch = {.work.run = apply, .running = running, .next = next};
    ts_queue_put(&s->exec.queue, &ch.work);
    ts_queue_flush(&s->exec.queue);
    ts_log(TS_LOG_INFO,
           "the configuration was read again: log_level, quotas and caches are as it says");
    if (fixed.text[0] != '\0')
        ts_log(TS_LOG_WARNING, "to change %s, the daemon must be started again", fixed.text);
}
