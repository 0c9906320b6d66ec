#define _GNU_SOURCE
#include "reload.h"

#include "config_keys.h"
#include "unconst.h"

#include <stdio.h>
#include <string.h>

/* Quotas belong to the engine's owner. */
typedef struct change {
    ts_work work;
    ts_config *running;
    const ts_config *next;
} change;

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

static const ts_config_pool *find(const ts_config *c, const char *name)
{
    for (uint32_t i = 0; i < c->num_pools; i++)
        if (strcmp(c->pools[i].pool.name, name) == 0)
            return &c->pools[i];
    return NULL;
}

/* ---- what a key that reloads changes ----
 *
 * A key in the engine's limits, or in its pools' configurations, is copied into what the engine is
 * given. The others are in these tables. */

static void take_operators(ts_service *s, const ts_config *next)
{
    pthread_mutex_lock(&s->operators_lock);
    s->operators = next->operators;
    pthread_mutex_unlock(&s->operators_lock);
}

static void take_log_level(ts_service *s, const ts_config *next)
{
    (void)s;
    ts_log_show(next->log_level);
}

static void take_metrics_show(ts_service *s, const ts_config *next)
{
    s->http_shows_all = next->metrics_show == TS_METRICS_ALL;
}

static void take_tenant_exchange(ts_service *s, const ts_config *next)
{
    s->exec.tenant_exchange_bytes = next->tenant_exchange_bytes;
}

static const struct daemon_change {
    const char *key;
    void (*take)(ts_service *service, const ts_config *next);
} daemon_changes[] = {
    {"operators", take_operators},
    {"log_level", take_log_level},
    {"metrics_show", take_metrics_show},
    {"tenant_exchange", take_tenant_exchange},
};

/* Of tenant_memory and tenant_pinned: by the blocks that the pool has. */
static void take_quotas(ts_pool_config *config, const ts_config_pool *next)
{
    ts_config_set_quotas(next, config);
}

static void take_cache(ts_pool_config *config, const ts_config_pool *next)
{
    config->cache = next->pool.cache;
}

static const struct pool_change {
    const char *key;
    void (*take)(ts_pool_config *config, const ts_config_pool *next);
} pool_changes[] = {
    {"tenant_memory", take_quotas},
    {"tenant_pinned", take_quotas},
    {"cache", take_cache},
};

static const struct daemon_change *daemon_change_of(const ts_config_key *key)
{
    for (size_t i = 0; i < sizeof daemon_changes / sizeof *daemon_changes; i++)
        if (strcmp(daemon_changes[i].key, key->name) == 0)
            return &daemon_changes[i];
    return NULL;
}

static const struct pool_change *pool_change_of(const ts_config_key *key)
{
    for (size_t i = 0; i < sizeof pool_changes / sizeof *pool_changes; i++)
        if (strcmp(pool_changes[i].key, key->name) == 0)
            return &pool_changes[i];
    return NULL;
}

static bool lies_in(const ts_config_key *key, size_t offset, size_t bytes)
{
    return key->offset >= offset && key->offset + key->bytes <= offset + bytes;
}

bool ts_reload_takes(const ts_config_section *section, const ts_config_key *key)
{
    if (section == &ts_config_daemon)
        return daemon_change_of(key) != NULL ||
               lies_in(key, offsetof(ts_config, limits), sizeof(ts_engine_limits));
    return pool_change_of(key) != NULL ||
           lies_in(key, offsetof(ts_config_pool, pool), sizeof(ts_pool_config));
}

/* The key's field, in a struct whose fields begin at `offset` of the section's. */
static void copy_field(const ts_config_key *key, size_t offset, void *to, const void *from)
{
    memcpy((char *)to + (key->offset - offset), (const char *)from + key->offset, key->bytes);
}

static void change_daemon(ts_service *s, ts_config *running, const ts_config *next)
{
    ts_engine_limits limits = s->exec.engine->limits;
    ts_answer answer;
    for (uint32_t i = 0; i < ts_config_daemon.num_keys; i++) {
        const ts_config_key *key = &ts_config_daemon.keys[i];
        if (!key->reloads)
            continue;
        const struct daemon_change *change = daemon_change_of(key);
        if (change != NULL)
            change->take(s, next);
        else
            copy_field(key, offsetof(ts_config, limits), &limits, next);
        copy_field(key, 0, running, next);
    }
    ts_config_set_sessions(next, &limits);
    ts_exec_apply(&s->exec, &(ts_command){.op = TS_OP_LIMITS, .limits.limits = &limits}, &answer);
}

static void change_pool(ts_service *s, uint32_t pool, ts_config_pool *running,
                        const ts_config_pool *next)
{
    ts_pool_config config = s->exec.engine->pools[pool].config;
    ts_answer answer;
    for (uint32_t i = 0; i < ts_config_pools.num_keys; i++) {
        const ts_config_key *key = &ts_config_pools.keys[i];
        if (!key->reloads)
            continue;
        const struct pool_change *change = pool_change_of(key);
        if (change != NULL)
            change->take(&config, next);
        else
            copy_field(key, offsetof(ts_config_pool, pool), &config, next);
        if (running != NULL)
            copy_field(key, 0, running, next);
    }
    ts_config_set_quotas(next, &config);
    switch_cache(s, pool, config.cache);
    ts_exec_apply(
        &s->exec,
        &(ts_command){.op = TS_OP_POOL_QUOTAS, .pool = pool, .pool_quotas.config = &config},
        &answer);
}

static void apply(ts_work *work, void *service)
{
    change *ch = (change *)work;
    ts_service *s = service;
    const ts_engine *e = s->exec.engine;
    change_daemon(s, ch->running, ch->next);
    for (uint32_t i = 0; i < e->num_pools; i++) {
        const char *name = e->pools[i].config.name;
        const ts_config_pool *next = find(ch->next, name);
        if (ts_engine_has_pool(e, i) && next != NULL)
            change_pool(s, i, ts_unconst(find(ch->running, name)), next);
    }
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

/* ---- pools that were taken over ---- */

/* Says which keys of the configuration the pool was made with another value of. */
static void compare_pool(const ts_pool_config *has, const ts_config_pool *wanted)
{
    const ts_config_pool made = {.pool = *has};
    list differ = {""};
    if (has->max_blocks != wanted->pool.max_blocks) /* below that an operator resizes it */
        note(&differ, wanted->memory_max != 0 ? "memory_max" : "memory");
    for (uint32_t i = 0; i < ts_config_pools.num_keys; i++) {
        const ts_config_key *key = &ts_config_pools.keys[i];
        const bool any = key->offset == offsetof(ts_config_pool, pool.device) &&
                         strcmp(wanted->pool.device, "auto") == 0;
        if (!key->reloads && !any &&
            lies_in(key, offsetof(ts_config_pool, pool), sizeof(ts_pool_config)) &&
            ts_config_key_differs(key, &made, wanted))
            note(&differ, key->name);
    }
    if (differ.text[0] != '\0')
        ts_log_on(TS_LOG_WARNING, &(ts_log_about){.pool = has->name},
                  "pool '%s' was taken over as it was made: the configuration has another %s; "
                  "tsctl pool delete, and then tsctl restart, makes it anew",
                  has->name, differ.text);
}

static void apply_taken_over(ts_work *work, void *service)
{
    const change *ch = (const change *)work;
    const ts_engine *e = ((ts_service *)service)->exec.engine;
    apply(work, service);
    for (uint32_t i = 0; i < e->num_pools; i++) {
        const ts_pool_config *has = &e->pools[i].config;
        const ts_config_pool *wanted = find(ch->next, has->name);
        if (ts_engine_has_pool(e, i) && wanted != NULL)
            compare_pool(has, wanted);
        else if (ts_engine_has_pool(e, i))
            ts_log_on(TS_LOG_INFO, &(ts_log_about){.pool = has->name},
                      "pool '%s' was taken over; the configuration doesn't have it", has->name);
    }
}

void ts_reload_taken_over(ts_service *s, ts_config *running)
{
    change ch = {.work.run = apply_taken_over, .running = running, .next = running};
    ts_queue_put(&s->exec.queue, &ch.work);
    ts_queue_flush(&s->exec.queue);
}

/* ---- a file that is read again ---- */

void ts_reload(ts_service *s, ts_config *running, const ts_config *next)
{
    list fixed = {""}, stay = {""};
    const bool outlive = s->exec.books != NULL;
    ts_config_compare(running, next, note, &fixed);
    for (uint32_t i = 0; i < running->num_pools; i++) {
        const ts_config_pool *was = &running->pools[i], *is = find(next, was->pool.name);
        if (is == NULL || ts_config_pools_differ(was, is))
            note_pool(outlive ? &stay : &fixed, was);
    }
    for (uint32_t i = 0; i < next->num_pools; i++)
        if (find(running, next->pools[i].pool.name) == NULL)
            note_pool(&fixed, &next->pools[i]);

    change ch = {.work.run = apply, .running = running, .next = next};
    ts_queue_put(&s->exec.queue, &ch.work);
    ts_queue_flush(&s->exec.queue);
    ts_log(TS_LOG_INFO,
           "the configuration was read again: what a running daemon can change is as it says");
    if (fixed.text[0] != '\0')
        ts_log(TS_LOG_WARNING, "to change %s, the daemon must be started again", fixed.text);
    if (stay.text[0] != '\0')
        ts_log(TS_LOG_WARNING,
               "a restart keeps pools as they are: to change %s, tsctl pool delete it, and then "
               "tsctl restart",
               stay.text);
}
