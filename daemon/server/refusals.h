/*
 * Which requests were refused: counted by operation, pool and status, and told in the log where a
 * pool is full, with who holds it. There are as many counts as there are operations, pools and
 * statuses, whatever clients ask for.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_REFUSALS_H
#define TS_REFUSALS_H

#include "server.h"

/* A request is answered with this status; TS_OK is no refusal. */
void ts_refused(ts_service *service, const Tspb__Request *request, ts_status status);

/* The same of an operation, named by its request's body; `pool` TS_NONE: of none. */
void ts_refused_in(ts_service *service, Tspb__Request__BodyCase operation, uint32_t pool,
                   ts_status status);

/* The same of a step's operation. */
void ts_refused_step(ts_service *service, Tspb__Request__BodyCase operation, uint64_t step,
                     ts_status status);

/* A pool is gone: what was refused in it counts as refused in no pool. */
void ts_refusals_forget_pool(ts_service *service, uint32_t pool);

/* Calls `tell` with each count that isn't 0; `pool` is empty where it is of none. */
void ts_refusals_each(const ts_service *service,
                      void (*tell)(void *arg, const char *operation, const char *pool,
                                   const char *status, uint64_t count),
                      void *arg);

#endif
