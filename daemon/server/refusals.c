#include "refusals.h"

#include "clock.h"
#include "log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FULL_EVERY_MS 10000u /* between two log lines about a full pool, at least */
#define HOLDERS 3u           /* that are named */

enum { STATUSES = TS_EINTERNAL + 1 };

struct ts_refusals {
    uint64_t full_ms[TS_POOLS_MAX]; /* when it was told last; 0: never */
    uint32_t operations;            /* that there are; 0: a message without a known body */
    uint64_t counts[][TS_POOLS_MAX + 1][STATUSES]; /* pool TS_POOLS_MAX: none */
};

static ts_refusals *new_refusals(void)
{
    const ProtobufCMessageDescriptor *d = &tspb__request__descriptor; /* in the order of numbers */
    const uint32_t operations = d->fields[d->n_fields - 1].id + 1;
    ts_refusals *r = calloc(1, sizeof *r + operations * sizeof *r->counts);
    if (r != NULL)
        r->operations = operations;
    return r;
}

/* Who holds most of the pool, and says so. */
static void tell_full(const ts_service *s, uint32_t pool)
{
    const ts_engine *e = s->exec.engine;
    const ts_pool_books *books = &e->pools[pool].books;
    const char *name = e->pools[pool].config.name;
    char holders[256] = "";
    uint32_t told[HOLDERS], num_told = 0;
    while (num_told < HOLDERS) {
        uint32_t most = TS_NONE;
        for (uint32_t t = 0; t < e->num_tenants; t++) {
            bool seen = false;
            for (uint32_t i = 0; i < num_told; i++)
                seen = seen || told[i] == t;
            if (!seen && books->tenants[t].slabs > 0 &&
                (most == TS_NONE || books->tenants[t].used > books->tenants[most].used))
                most = t;
        }
        if (most == TS_NONE)
            break;
        size_t used = strlen(holders);
        snprintf(holders + used, sizeof holders - used, "%suid %u holds %llu in %u slabs",
                 num_told == 0 ? ": " : ", ", e->tenants[most],
                 (unsigned long long)books->tenants[most].used, books->tenants[most].slabs);
        told[num_told++] = most;
    }
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.pool = name},
              "pool '%s' is full: %u of %u blocks are used and %u cached, %u of %u slabs belong to "
              "tenants%s",
              name, books->used, books->num_blocks, books->cached, books->ungranted,
              books->num_slabs, holders);
}

void ts_refused_in(ts_service *s, Tspb__Request__BodyCase operation, uint32_t pool,
                   ts_status status)
{
    /* A worker that goes closes its pools, whatever it has in them. */
    if (status == TS_OK || (operation == TSPB__REQUEST__BODY_POOL_CLOSE && status == TS_EBUSY))
        return;
    s->refused++;
    if (s->refusals == NULL)
        s->refusals = new_refusals();
    if (s->refusals == NULL || (uint32_t)operation >= s->refusals->operations ||
        (uint32_t)status >= STATUSES)
        return;
    bool known = ts_engine_has_pool(s->exec.engine, pool);
    s->refusals->counts[operation][known ? pool : TS_POOLS_MAX][status]++;
    uint64_t now = ts_now_ms();
    /* Where nothing is in use, the request alone was larger than the pool. */
    if (status == TS_ENOSPC && known && s->exec.engine->pools[pool].books.used > 0 &&
        (s->refusals->full_ms[pool] == 0 || now - s->refusals->full_ms[pool] >= FULL_EVERY_MS)) {
        s->refusals->full_ms[pool] = now;
        tell_full(s, pool);
    }
}

void ts_refused_step(ts_service *s, Tspb__Request__BodyCase operation, uint64_t id,
                     ts_status status)
{
    const ts_step *step = status == TS_OK ? NULL : ts_engine_find_step(s->exec.engine, id);
    ts_refused_in(s, operation, step == NULL ? TS_NONE : step->pool, status);
}

void ts_refused(ts_service *s, const Tspb__Request *request, ts_status status)
{
    if (status == TS_OK)
        return;
    if (request == NULL || request->body_case == TSPB__REQUEST__BODY__NOT_SET)
        return ts_refused_in(s, TSPB__REQUEST__BODY__NOT_SET, TS_NONE, status);
    /* Each body says in a field of this name which pool it is about, or which step. */
    const ProtobufCMessage *body = (const ProtobufCMessage *)request->session_open;
    const ProtobufCFieldDescriptor *pool =
        protobuf_c_message_descriptor_get_field_by_name(body->descriptor, "pool");
    if (pool == NULL && request->body_case == TSPB__REQUEST__BODY_POOL_OPEN)
        pool = protobuf_c_message_descriptor_get_field_by_name(body->descriptor, "name");
    const ProtobufCFieldDescriptor *step =
        protobuf_c_message_descriptor_get_field_by_name(body->descriptor, "step");
    const char *base = (const char *)body;
    uint32_t index = TS_NONE;
    ts_answer ignored;
    if (step != NULL)
        return ts_refused_step(s, request->body_case, *(const uint64_t *)(base + step->offset),
                               status);
    if (request->body_case == TSPB__REQUEST__BODY_EXCHANGE_OPEN)
        pool = NULL; /* the session's, whatever device it is shared with */
    if (pool != NULL && pool->type == PROTOBUF_C_TYPE_UINT32)
        index = *(const uint32_t *)(base + pool->offset);
    else if (pool != NULL)
        index =
            ts_engine_pool_named(s->exec.engine, *(char *const *)(base + pool->offset), &ignored);
    ts_refused_in(s, request->body_case, index, status);
}

void ts_refusals_forget_pool(ts_service *s, uint32_t pool)
{
    if (s->refusals == NULL)
        return;
    s->refusals->full_ms[pool] = 0;
    for (uint32_t o = 0; o < s->refusals->operations; o++)
        for (uint32_t i = 0; i < STATUSES; i++) {
            s->refusals->counts[o][TS_POOLS_MAX][i] += s->refusals->counts[o][pool][i];
            s->refusals->counts[o][pool][i] = 0;
        }
}

void ts_refusals_each(const ts_service *s,
                      void (*tell)(void *arg, const char *operation, const char *pool,
                                   const char *status, uint64_t count),
                      void *arg)
{
    for (uint32_t o = 0; s->refusals != NULL && o < s->refusals->operations; o++) {
        const ProtobufCFieldDescriptor *field =
            protobuf_c_message_descriptor_get_field(&tspb__request__descriptor, o);
        for (uint32_t p = 0; p <= TS_POOLS_MAX; p++)
            for (uint32_t i = 0; i < STATUSES; i++)
                if (s->refusals->counts[o][p][i] > 0)
                    tell(arg, field == NULL ? "unknown" : field->name,
                         p == TS_POOLS_MAX ? "" : s->exec.engine->pools[p].config.name,
                         ts_status_name((ts_status)i), s->refusals->counts[o][p][i]);
    }
}
