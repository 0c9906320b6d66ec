/*
 * The operator's questions, answered from the engine and the service: status, a pool's statistics
 * and map, listings, the invariant check. The one place where these figures are made.
 *
 * Thread: the engine's.
 */
#ifndef TS_REPORT_H
#define TS_REPORT_H

#include "pool_stats_cache.h"
#include "server.h"

/*
 * Whose things the connection's peer may see, which is decided here alone: operators see all, other
 * tenants their own. Everybody sees totals: counts of a whole pool or of the whole daemon, and
 * which of a pool's blocks are in use. What belongs to somebody: sessions (with programs, pids and
 * uids), sequences (with ids, names, lengths), how full a block is, and what a tenant uses.
 */
ts_view ts_report_view(const ts_service *service, const ts_connection *connection);

/* The same of who asks over HTTP: all or nobody's, as metrics_show in the configuration says. */
ts_view ts_report_view_http(const ts_service *service);

/* What a question came to. */
typedef enum ts_report_state {
    TS_REPORT_NONE,   /* it is no such question */
    TS_REPORT_ANSWER, /* the reply is filled in */
    TS_REPORT_LATER   /* ask again when the waiter is told */
} ts_report_state;

/* Fills in `reply` if `request` is such a question. What the reply points to is allocated and freed
 * with ts_report_free. */
ts_report_state ts_report(ts_service *service, ts_view view, const Tspb__Request *request,
                          ts_pool_stats_waiter *waiter, Tspb__Reply *reply);
void ts_report_free(Tspb__Reply *reply);

/* Whether all pools' figures are there for ts_report_http; else the waiter is told when some are.
 */
bool ts_report_http_ready(ts_service *service, ts_pool_stats_waiter *waiter);

/* The same for who asks over HTTP, in the same turn. False: there is nothing to free; no memory, or
 * no such question. */
bool ts_report_http(ts_service *service, const Tspb__Request *request, Tspb__Reply *reply);

#endif
