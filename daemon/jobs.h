/*
 * A step's work for the kernels: what is handed to the batches, and what is told to the engine and
 * to the asker when it is done.
 *
 * Thread: the engine's owner of the moment (queue.h).
 */
#ifndef TS_JOBS_H
#define TS_JOBS_H

#include "service.h"

/* What the engine doesn't know of a run: whether the exchange can be used with the pool, and the
 * order on a GPU. False, and the answer refuses. */
bool ts_jobs_check_run(ts_service *service, ts_connection *c, const Tspb__StepRun *run,
                       ts_answer *answer);

/* Hands the run that the engine has accepted to the kernels. Unless it is ordered they have the
 * request now and will answer it. False: out of memory, nothing was done. */
bool ts_jobs_run(ts_service *service, ts_connection *c, ts_request *request,
                 const ts_command *command, const ts_step *step);

/* Hands the copies of a step that was begun to the kernels, which will answer with this reply.
 * False: out of memory, nothing was done. */
bool ts_jobs_copy(ts_service *service, ts_connection *c, ts_request *request,
                  const ts_answer *begun, const Tspb__Reply *reply);

/* Gives up what is kept for steps. No job is under way. */
void ts_jobs_fini(ts_service *service);

#endif
