/*
 * What the page at / shows, as JSON: report.h's figures. Everybody who can connect can read it,
 * so it has totals, unless metrics_show says all (ts_report_view_http), and no sequence's name. It
 * costs time in proportion to the pools' sequences and blocks, as `tsctl map` does.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_STATS_H
#define TS_STATS_H

#include "server.h"

/* {"shows", "status", "sessions", "pools": [{"frag", "map", "seqs", "more_seqs"}]}, to be freed;
 * NULL: no memory. */
char *ts_stats_json(ts_service *service);

#endif
