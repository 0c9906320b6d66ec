/*
 * What a pool's prefix cache does, and for whom: the answer to CacheStats. It looks at a bounded
 * part of the table of namespaces; the caller asks for the rest, page by page.
 *
 * Thread: the engine's.
 */
#ifndef TS_CACHE_REPORT_H
#define TS_CACHE_REPORT_H

#include "pool_stats.h"
#include "server.h"

void ts_report_cache(const ts_service *service, ts_view view, const Tspb__CacheStats *request,
                     Tspb__Reply *reply);

#endif
