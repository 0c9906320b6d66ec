/*
 * What the daemon tells over HTTP, by NNG's own server: /metrics (metrics.h), /healthz, which
 * answers if the engine does its work, /stats.json (stats.h), and a page at / that draws it.
 * Read-only, on a loopback address, and only to who asks for it by that address: a page elsewhere
 * can't have a browser read it.
 */
#ifndef TS_HTTP_H
#define TS_HTTP_H

#include "service.h"

typedef struct ts_http ts_http;

/* Listens at a loopback address (config.h). TS_ECONN with a sentence: it can't. */
ts_status ts_http_start(ts_service *service, const char *address, ts_http **out, char *why,
                        size_t why_bytes);

/* Listens no more. The engine must still run: it finishes what was asked. NULL is fine. */
void ts_http_stop(ts_http *http);

#endif
