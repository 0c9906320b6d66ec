/*
 * TS_EXEC_AUTO: the runs of a step go both ways, and the session takes the quicker one.
 *
 * Thread: the client's.
 */
#ifndef TS_AUTOTUNE_H
#define TS_AUTOTUNE_H

#include "client.h"

#define TS_AUTOTUNE_RUNS 32u /* of a step, that are timed on a GPU's stream */

/* How long the runs of a step took that went both ways. All 0 to start with. */
typedef struct ts_autotune {
    uint64_t local_ns, daemon_ns;
    ts_cuda *cuda;
    void *marks[TS_AUTOTUNE_RUNS][3]; /* in the stream: before, between and after the two */
    uint32_t num_marks;
} ts_autotune;

typedef struct ts_autotune_runs {
    ts_status (*local)(void *arg);
    ts_status (*daemon)(void *arg);
} ts_autotune_runs;

/* Runs locally, then by the daemon, each waited for; or both queued on the stream. */
ts_status ts_autotune_run(ts_client *client, ts_autotune *autotune, const ts_autotune_runs *runs,
                          void *arg);
ts_status ts_autotune_run_on_stream(ts_client *client, ts_cuda *cuda, ts_autotune *autotune,
                                    void *stream, const ts_autotune_runs *runs, void *arg);

/* All runs are over: from now on the session takes the quicker way, if any was timed. */
void ts_autotune_settle(ts_client *client, ts_autotune *autotune);
void ts_autotune_drop(ts_autotune *autotune);

#endif
