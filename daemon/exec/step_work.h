/*
 * A step's work for the kernels: what is handed to the batches, and what is told to the engine and
 * to the asker when it is done.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_STEP_WORK_H
#define TS_STEP_WORK_H

#include "server.h"

/* What the engine doesn't know of a run: whether the exchange can be used with the pool, and the
 * order on a GPU. False, and the answer refuses. */
bool ts_jobs_check_run(ts_service *service, ts_connection *c, const ts_command *run,
                       ts_answer *answer);

/* Who waits for a job: a request, or an entry of the connection's rings. */
typedef struct ts_asker {
    ts_request *request; /* NULL: the rings */
    uint32_t tag;
    uint64_t taken_ns; /* of the rings: when the entry was taken */
} ts_asker;

/* Hands the run that the engine has accepted to the kernels. Unless it is ordered they will answer
 * the asker. False: out of memory, nothing was done. */
bool ts_jobs_run(ts_service *service, ts_connection *c, ts_asker asker, const ts_command *command,
                 const ts_step *step);

/* Hands the copies of a step that was begun to the kernels, which will answer: a request with this
 * reply. False: out of memory, nothing was done. */
bool ts_jobs_copy(ts_service *service, ts_connection *c, ts_asker asker, const ts_answer *begun,
                  const Tspb__Reply *reply);

/* Undoes what the engine was told of a run or of a begin with copies that no kernel gets. */
void ts_jobs_undo(ts_service *service, const ts_command *command, uint64_t step);

/* The results of the step's, or the connection's, jobs aren't wanted any more: those on the
 * processor end soon, those on a GPU as ever. */
void ts_jobs_drop_step(ts_service *service, uint64_t step);
void ts_jobs_drop_connection(ts_service *service, const ts_connection *c);

/* A connection ends: its plan may go. NULL is fine. */
void ts_jobs_release_plan(ts_step_plan *plan);

/* Gives up what is kept for steps. No job is under way. */
void ts_jobs_fini(ts_service *service);

#endif
