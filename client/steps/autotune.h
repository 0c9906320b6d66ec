/*
 * TS_EXEC_AUTO: the runs of a step go both ways, and the session takes the quicker one.
 *
 * Thread: the client's.
 */
#ifndef TS_AUTOTUNE_H
#define TS_AUTOTUNE_H

#include "client.h"

#define TS_TRIAL_RUNS 32u /* of a step, that are timed on a GPU's stream */

/* How long the runs of a step took that went both ways. All 0 to start with. */
typedef struct ts_trial {
    uint64_t here_ns, there_ns;
    ts_cuda *cuda;
    void *marks[TS_TRIAL_RUNS][3]; /* in the stream: before, between and after the two */
    uint32_t num_marks;
} ts_trial;

typedef struct ts_trial_ways {
    ts_status (*here)(void *arg);
    ts_status (*there)(void *arg);
} ts_trial_ways;

/* Runs here, then there, each waited for; or both queued on the stream. */
ts_status ts_trial_run(ts_client *client, ts_trial *trial, const ts_trial_ways *ways, void *arg);
ts_status ts_trial_run_on_stream(ts_client *client, ts_cuda *cuda, ts_trial *trial, void *stream,
                                 const ts_trial_ways *ways, void *arg);

/* All runs are over: from now on the session takes the quicker way, if any was timed. */
void ts_trial_settle(ts_client *client, ts_trial *trial);
void ts_trial_drop(ts_trial *trial);

#endif
