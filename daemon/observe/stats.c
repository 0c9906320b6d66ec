#include "stats.h"

#include "report.h"
#include "report_json.h"

#include <stdlib.h>

#define MAP_CELLS 1024u
#define LIST_MOST 200u /* sessions, and sequences of a pool */

static json_t *status(ts_service *s)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply reply;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    if (!ts_report_http(s, &request, &reply))
        return NULL;
    json_t *value = json_status(reply.status_reply);
    ts_report_free(&reply);
    return value;
}

static json_t *sessions(ts_service *s)
{
    Tspb__ListSessions body = TSPB__LIST_SESSIONS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply reply;
    body.limit = LIST_MOST;
    request.body_case = TSPB__REQUEST__BODY_LIST_SESSIONS;
    request.list_sessions = &body;
    if (!ts_report_http(s, &request, &reply))
        return NULL;
    json_t *list = json_array();
    json_sessions(list, reply.session_list);
    ts_report_free(&reply);
    return list;
}

static json_t *frag(ts_service *s, char *pool)
{
    Tspb__PoolStats body = TSPB__POOL_STATS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply reply;
    body.pool = pool;
    request.body_case = TSPB__REQUEST__BODY_POOL_STATS;
    request.pool_stats = &body;
    if (!ts_report_http(s, &request, &reply))
        return NULL;
    json_t *value = json_frag(reply.pool_stats_reply);
    ts_report_free(&reply);
    return value;
}

static json_t *map(ts_service *s, char *pool)
{
    Tspb__PoolMap body = TSPB__POOL_MAP__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply reply;
    body.pool = pool;
    body.cells = MAP_CELLS;
    request.body_case = TSPB__REQUEST__BODY_POOL_MAP;
    request.pool_map = &body;
    if (!ts_report_http(s, &request, &reply))
        return NULL;
    json_t *value = json_map(reply.pool_map_reply);
    ts_report_free(&reply);
    return value;
}

static json_t *seqs(ts_service *s, char *pool, bool *more)
{
    Tspb__ListSeqs body = TSPB__LIST_SEQS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply reply;
    size_t i;
    json_t *seq;
    body.pool = pool;
    body.limit = LIST_MOST;
    request.body_case = TSPB__REQUEST__BODY_LIST_SEQS;
    request.list_seqs = &body;
    if (!ts_report_http(s, &request, &reply))
        return NULL;
    json_t *list = json_array();
    json_seqs(list, reply.seq_list);
    json_array_foreach(list, i, seq) json_object_del(seq, "name");
    *more = reply.seq_list->next != 0;
    ts_report_free(&reply);
    return list;
}

char *ts_stats_json(ts_service *s)
{
    json_t *pools = json_array();
    for (uint32_t i = 0; i < s->exec.engine->num_pools; i++) {
        if (!ts_engine_has_pool(s->exec.engine, i))
            continue;
        char *name = s->exec.engine->pools[i].config.name;
        bool more = false;
        json_t *list = seqs(s, name, &more);
        json_t *pool = json_pack("{s:o, s:o, s:o, s:b}", "frag", frag(s, name), "map", map(s, name),
                                 "seqs", list, "more_seqs", more);
        if (json_array_append_new(pools, pool) != 0) { /* no memory */
            json_decref(pools);
            return NULL;
        }
    }
    json_t *all = json_pack("{s:s, s:o, s:o, s:o}", "shows", s->http_shows_all ? "all" : "totals",
                            "status", status(s), "sessions", sessions(s), "pools", pools);
    char *text = all == NULL ? NULL : json_dumps(all, JSON_COMPACT);
    json_decref(all);
    return text;
}
