/*
 * The operator's questions, answered from the engine and the service: status, a pool's statistics
 * and map, listings, the invariant check. The one place where these figures are made.
 *
 * Thread: the engine's.
 */
#ifndef TS_REPORT_H
#define TS_REPORT_H

#include "service.h"

/* Fills in `reply` if `request` is such a question (true). What the reply points to is allocated
 * and freed with ts_report_free. */
bool ts_report(ts_service *service, const ts_connection *connection, const Tspb__Request *request,
               Tspb__Reply *reply);
void ts_report_free(Tspb__Reply *reply);

/* The same as root would get it. False: there is nothing to free; no memory, or no such question.
 */
bool ts_report_all(ts_service *service, const Tspb__Request *request, Tspb__Reply *reply);

#endif
