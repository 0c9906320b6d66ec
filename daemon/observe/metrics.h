/*
 * The service's figures as OpenMetrics text, for Prometheus: names and units by its conventions.
 * The figures are report.h's; how long requests take is counted here.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_METRICS_H
#define TS_METRICS_H

#include "server.h"

/* A request was answered that came so long ago. */
void ts_metrics_answered(ts_request_times *times, uint64_t nanoseconds);

/* The text, to be freed; NULL: no memory. */
char *ts_metrics_text(ts_service *service);

#endif
