/* The prefix cache: what it does, and that it is dropped. */
#include "namespace_text.h"
#include "options.h"
#include "unconst.h"

#include "error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LARGEST 20u /* namespaces that are shown */

static int by_blocks(const void *a, const void *b)
{
    const Tspb__SpaceUse *x = *(Tspb__SpaceUse *const *)a, *y = *(Tspb__SpaceUse *const *)b;
    if (x->blocks != y->blocks)
        return x->blocks < y->blocks ? 1 : -1;
    if (x->uid != y->uid)
        return x->uid < y->uid ? -1 : 1;
    const size_t both = x->space.len < y->space.len ? x->space.len : y->space.len;
    const int order = memcmp(x->space.data, y->space.data, both);
    return order != 0 ? order : x->space.len < y->space.len ? -1 : x->space.len > y->space.len;
}

/* Adds what another page has, and leaves the largest. False: no memory. */
static bool add_page(Tspb__CacheStatsReply *all, Tspb__CacheStatsReply *page)
{
    const size_t count = all->n_largest + page->n_largest;
    Tspb__SpaceUse **both = realloc(all->largest, (count + 1) * sizeof(Tspb__SpaceUse *));
    if (both == NULL)
        return false;
    for (size_t i = 0; i < page->n_largest; i++)
        both[all->n_largest + i] = page->largest[i];
    page->n_largest = 0; /* they are the other's */
    all->largest = both;
    all->namespaces += page->namespaces;
    qsort(both, count, sizeof *both, by_blocks);
    for (all->n_largest = count; all->n_largest > LARGEST; all->n_largest--)
        tspb__space_use__free_unpacked(both[all->n_largest - 1], NULL);
    return true;
}

int do_cache(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__CacheStats body = TSPB__CACHE_STATS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *all = NULL, *page;
    body.pool = ts_unconst(o->pool);
    request.body_case = TSPB__REQUEST__BODY_CACHE_STATS;
    request.cache_stats = &body;
    do {
        *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_CACHE_STATS_REPLY, &page);
        if (*ts != TS_OK)
            break;
        body.after = page->cache_stats_reply->next;
        if (all == NULL) {
            all = page;
            continue;
        }
        if (!add_page(all->cache_stats_reply, page->cache_stats_reply))
            *ts = ts_fail(c, TS_ENOMEM, "no memory for the namespaces");
        tspb__reply__free_unpacked(page, NULL);
    } while (*ts == TS_OK && body.after != 0);
    if (*ts == TS_OK && o->json)
        tsctl_print_json(o, json_cache(all->cache_stats_reply));
    else if (*ts == TS_OK)
        text_cache(all->cache_stats_reply, &o->style);
    tspb__reply__free_unpacked(all, NULL);
    return *ts == TS_OK ? EXIT_SUCCESS : EXIT_REFUSED;
}

int do_cache_drop(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__AdminCacheDrop body = TSPB__ADMIN_CACHE_DROP__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    char question[512], tenant[32] = "", space[160] = "", shown[TS_NAMESPACE_TEXT_BYTES];
    if (o->has_tenant)
        snprintf(tenant, sizeof tenant, " of uid %u", o->tenant);
    if (o->space_bytes > 0)
        snprintf(space, sizeof space, " in namespace %s",
                 ts_namespace_show(o->space, o->space_bytes, shown));
    snprintf(question, sizeof question, "Drop the cached prefixes of %s%.64s%s%s?",
             o->pool[0] == '\0' ? "the pool" : "pool ", o->pool, tenant, space);
    if (!tsctl_sure(o, question))
        return EXIT_USAGE;
    body.pool = ts_unconst(o->pool);
    body.has_tenant = o->has_tenant;
    body.tenant = o->tenant;
    body.space.data = ts_unconst(o->space);
    body.space.len = o->space_bytes;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_CACHE_DROP;
    request.admin_cache_drop = &body;
    *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_CACHE_DROPPED, &reply);
    if (*ts != TS_OK)
        return EXIT_REFUSED;
    const unsigned long long blocks = reply->cache_dropped->blocks;
    if (o->json)
        tsctl_print_json(o, json_pack("{s:I}", "dropped_blocks", (json_int_t)blocks));
    else
        printf("dropped: %llu block%s found no more\n", blocks, blocks == 1 ? " is" : "s are");
    tspb__reply__free_unpacked(reply, NULL);
    return EXIT_SUCCESS;
}
