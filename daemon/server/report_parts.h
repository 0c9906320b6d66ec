/*
 * What reports (report.h) are made of. Replies are built of malloc'ed parts, so that protobuf-c's
 * own free function fits them.
 *
 * Thread: the engine's.
 */
#ifndef TS_REPORT_PARTS_H
#define TS_REPORT_PARTS_H

#include "server.h"

/* NULL of these: no memory. */
void *ts_report_zalloc(size_t count, size_t bytes);
uint64_t *ts_report_copy(const uint64_t *counts, size_t count);
Tspb__PoolSummary *ts_report_summarise(const ts_service *service, uint32_t pool);

/* The format has one %s, the word's. */
void ts_report_refuse(Tspb__Reply *reply, ts_status status, const char *format, const char *word);
void ts_report_no_memory(Tspb__Reply *reply);

/* The pool's index, or refuses. An empty name means the only pool. */
bool ts_report_find_pool(const ts_service *service, const char *name, uint32_t *index,
                         Tspb__Reply *reply);

#endif
