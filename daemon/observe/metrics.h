/*
 * The service's figures as OpenMetrics text, for Prometheus: names and units by its conventions.
 * The figures are report.h's.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_METRICS_H
#define TS_METRICS_H

#include "server.h"

/* The text, to be freed; NULL: no memory. */
char *ts_metrics_text(ts_service *service);

#endif
