#define _GNU_SOURCE
#include "reload.h"

#include <stdio.h>
#include <string.h>

/* Quotas belong to the engine's owner. */
typedef struct change {
    ts_work work;
    ts_config *running;
    const ts_config *next;
} change;

static void apply(ts_work *work, void *service)
{
    change *ch = (change *)work;
    ts_service *s = service;
    ts_engine *e = s->engine;
    pthread_mutex_lock(&s->operators_lock);
    s->operators = ch->next->operators;
    pthread_mutex_unlock(&s->operators_lock);
    const ts_engine_limits *to = &ch->next->limits;
    ts_engine_limits *at[] = {&e->limits, &ch->running->limits};
    for (int i = 0; i < 2; i++) {
        at[i]->session_sequences = to->session_sequences;
        at[i]->session_steps = to->session_steps;
        at[i]->session_blocks = to->session_blocks;
        at[i]->batch = to->batch;
        at[i]->step_tokens = to->step_tokens;
        at[i]->exchange_bytes = to->exchange_bytes;
    }
    for (uint32_t i = 0; i < ch->next->num_pools; i++)
        for (uint32_t j = 0; j < e->num_pools; j++)
            if (strcmp(ch->next->pools[i].pool.name, e->pools[j].config.name) == 0)
                e->pools[j].config.tenant_blocks_max = ch->next->pools[i].pool.tenant_blocks_max;
}

/* Keeps a list of what can't be changed, as far as it fits. */
static void note(char *list, size_t bytes, bool differs, const char *what, const char *name)
{
    size_t used = strlen(list);
    if (differs)
        snprintf(list + used, bytes - used, "%s%s%s", used == 0 ? "" : ", ", what, name);
}

static const ts_config_pool *find(const ts_config *c, const char *name)
{
    for (uint32_t i = 0; i < c->num_pools; i++)
        if (strcmp(c->pools[i].pool.name, name) == 0)
            return &c->pools[i];
    return NULL;
}

static bool pools_differ(const ts_config_pool *a, const ts_config_pool *b)
{
    const ts_geometry *x = &a->pool.geometry, *y = &b->pool.geometry;
    return x->layers != y->layers || x->kv_heads != y->kv_heads || x->head_dim != y->head_dim ||
           x->block_tokens != y->block_tokens || x->dtype != y->dtype || x->layout != y->layout ||
           a->pool.num_blocks != b->pool.num_blocks || a->pool.slab_blocks != b->pool.slab_blocks ||
           a->pool.sequences_max != b->pool.sequences_max ||
           a->pool.sequence_tokens_max != b->pool.sequence_tokens_max ||
           a->pool.client_write != b->pool.client_write || a->pool.kernel != b->pool.kernel ||
           a->provider != b->provider || strcmp(a->pool.device, b->pool.device) != 0;
}

void ts_reload(ts_service *s, ts_config *running, const ts_config *next)
{
    char list[256] = "";
    const size_t n = sizeof list;
    note(list, n, strcmp(running->socket, next->socket) != 0, "socket", "");
    note(list, n, running->socket_mode != next->socket_mode, "socket_mode", "");
    note(list, n, running->threads != next->threads, "threads", "");
    note(list, n, running->kernel != next->kernel, "kernel", "");
    note(list, n, running->tenant_connections != next->tenant_connections, "tenant_connections",
         "");
    note(list, n, running->idle_ms != next->idle_ms, "idle_seconds", "");
    note(list, n, running->submit_ms != next->submit_ms, "submit_seconds", "");
    note(list, n, running->spin_us != next->spin_us, "spin_us", "");
    note(list, n, strcmp(running->metrics, next->metrics) != 0, "metrics", "");
    note(list, n, running->message_bytes != next->message_bytes, "message_max", "");
    note(list, n, running->limits.sessions != next->limits.sessions, "sessions", "");
    for (uint32_t i = 0; i < running->num_pools; i++) {
        const ts_config_pool *was = &running->pools[i], *is = find(next, was->pool.name);
        note(list, n, is == NULL || pools_differ(was, is), "pool ", was->pool.name);
    }
    for (uint32_t i = 0; i < next->num_pools; i++)
        note(list, n, find(running, next->pools[i].pool.name) == NULL, "pool ",
             next->pools[i].pool.name);

    running->log_level = next->log_level;
    ts_log_show(next->log_level);
    change ch = {.work.run = apply, .running = running, .next = next};
    ts_queue_put(&s->queue, &ch.work);
    ts_queue_flush(&s->queue);
    ts_log(TS_LOG_INFO, "the configuration was read again: log_level and quotas are as it says");
    if (list[0] != '\0')
        ts_log(TS_LOG_WARNING, "to change %s, the daemon must be started again", list);
}
