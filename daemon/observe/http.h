/*
 * What the daemon tells over HTTP, through libmicrohttpd: /metrics (metrics.h), /healthz, which
 * answers if the engine does its work, /stats.json (stats.h), and a page at / that draws it.
 * Read-only, and only to who asks for it by an address or a name that is allowed (http_address.h).
 *
 * Anybody who can connect may do so, so there are at most TS_HTTP_CONNECTIONS at a time, and each
 * has TS_HTTP_REQUEST_MS from its beginning to its end: one request.
 *
 * Thread: started and stopped by main; works on a thread of its own, and asks the engine's owner.
 */
#ifndef TS_HTTP_H
#define TS_HTTP_H

#include "server.h"

#define TS_HTTP_CONNECTIONS 64u
#define TS_HTTP_REQUEST_MS 5000u
#define TS_HTTP_ENGINE_MS 4000u /* of these, that the engine has: then the answer is 503 */

typedef struct ts_http ts_http;

/* Listens at an address (config.h); `hosts` are the names that are allowed. TS_ECONN with a
 * sentence: it can't. */
ts_status ts_http_start(ts_service *service, const char *address, const char *hosts, ts_http **out,
                        char *why, size_t why_bytes);

/* Listens no more. The engine must still run: it finishes what was asked. NULL is fine. */
void ts_http_stop(ts_http *http);

#endif
