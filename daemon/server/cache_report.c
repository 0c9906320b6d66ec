#include "cache_report.h"

#include "cache_figures.h"
#include "report_parts.h"

#include <stdlib.h>
#include <string.h>

#define LARGEST 20u
#define PLACES (1u << 13) /* of the table of namespaces that one page looks at */

_Static_assert(TS_CACHE_CAUSES == TS_EVICT_CAUSES, "a word for each cause");
_Static_assert(TS_CACHE_AGES + 1 == TS_AGE_BINS, "an age for each bin but the last");

/* The largest so far, in order, and then by place. */
typedef struct ranking {
    uint32_t places[LARGEST];
    uint32_t count;
} ranking;

static void rank(ranking *r, const ts_index_space *spaces, uint32_t place)
{
    uint32_t at = r->count;
    if (at == LARGEST && spaces[place].blocks <= spaces[r->places[LARGEST - 1]].blocks)
        return;
    if (at == LARGEST)
        at--;
    else
        r->count++;
    for (; at > 0 && spaces[r->places[at - 1]].blocks < spaces[place].blocks; at--)
        r->places[at] = r->places[at - 1];
    r->places[at] = place;
}

static Tspb__SpaceUse *describe(const ts_engine *e, const ts_index_space *space)
{
    Tspb__SpaceUse *u = malloc(sizeof *u);
    if (u == NULL)
        return NULL;
    tspb__space_use__init(u);
    u->uid = e->tenants[space->tenant];
    u->blocks = space->blocks;
    u->asked_tokens = space->asked_tokens;
    u->found_tokens = space->found_tokens;
    u->sequences = space->users;
    u->space.data = ts_report_zalloc(TS_NAMESPACE_BYTES_MAX, 1);
    if (u->space.data == NULL) {
        free(u);
        return NULL;
    }
    u->space.len = ts_index_space_name(space, u->space.data);
    return u;
}

void ts_report_cache(const ts_service *s, ts_view view, const Tspb__CacheStats *request,
                     Tspb__Reply *reply)
{
    const ts_engine *e = s->exec.engine;
    uint32_t pool;
    if (!ts_report_find_pool(s, request->pool, &pool, reply))
        return;
    const ts_prefix_index *x = e->pools[pool].books.index;
    Tspb__CacheStatsReply *r = malloc(sizeof *r);
    if (r == NULL)
        return ts_report_no_memory(reply);
    tspb__cache_stats_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_CACHE_STATS_REPLY;
    reply->cache_stats_reply = r;
    r->others_hidden = !view.all;
    r->pool = ts_report_summarise(s, pool);
    r->largest = ts_report_zalloc(LARGEST, sizeof(void *));
    if (r->pool == NULL || r->largest == NULL)
        return ts_report_no_memory(reply);
    ranking largest = {.count = 0};
    uint32_t at = request->after, looked = 0;
    for (; at < x->num_spaces && looked < PLACES; at++, looked++) {
        const ts_index_space *space = &x->spaces[at];
        if (!space->live || space->retired || !ts_view_sees(view, space->tenant))
            continue;
        r->namespaces++;
        rank(&largest, x->spaces, at);
    }
    r->next = at < x->num_spaces ? at : 0;
    for (uint32_t i = 0; i < largest.count; i++) {
        r->largest[i] = describe(e, &x->spaces[largest.places[i]]);
        if (r->largest[i] == NULL)
            return ts_report_no_memory(reply);
        r->n_largest++;
    }
}
