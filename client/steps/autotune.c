/*
 * TS_EXEC_AUTO: a session's first steps go both ways, and their runs are timed. The first run of
 * all isn't counted: it maps memory and loads kernels.
 */
#include "autotune.h"

#include "clock.h"
#include "error.h"
#include "gpu_context.h"

#include <string.h>

ts_status ts_autotune_run(ts_client *c, ts_autotune *t, const ts_autotune_runs *runs, void *arg)
{
    uint64_t start = ts_now_ns();
    ts_status status = runs->local(arg);
    uint64_t middle = ts_now_ns();
    if (status == TS_OK)
        status = runs->daemon(arg); /* the same bits again */
    if (status == TS_OK && c->tried) {
        t->local_ns += middle - start;
        t->daemon_ns += ts_now_ns() - middle;
    }
    c->tried = c->tried || status == TS_OK;
    return status;
}

ts_status ts_autotune_run_on_stream(ts_client *c, ts_cuda *cuda, ts_autotune *t, void *stream,
                                    const ts_autotune_runs *runs, void *arg)
{
    bool timed = c->tried && t->num_marks < TS_AUTOTUNE_RUNS;
    void **marks = t->marks[t->num_marks < TS_AUTOTUNE_RUNS ? t->num_marks : 0];
    ts_status status = TS_OK;
    if (timed) {
        t->cuda = cuda;
        t->num_marks++; /* what was made of them is dropped with the others */
        status = ts_cuda_mark(c, cuda, stream, &marks[0]);
    }
    if (status == TS_OK)
        status = runs->local(arg);
    if (status == TS_OK && timed)
        status = ts_cuda_mark(c, cuda, stream, &marks[1]);
    if (status == TS_OK)
        status = runs->daemon(arg);
    if (status == TS_OK && timed)
        status = ts_cuda_mark(c, cuda, stream, &marks[2]);
    c->tried = c->tried || status == TS_OK;
    return status;
}

void ts_autotune_settle(ts_client *c, ts_autotune *t)
{
    const ts_last_error last = c->error;
    for (uint32_t i = 0; i < t->num_marks; i++) {
        uint64_t local = 0, daemon = 0;
        if (t->marks[i][2] == NULL || /* the run failed */
            ts_cuda_between(c, t->cuda, t->marks[i][0], t->marks[i][1], &local) != TS_OK ||
            ts_cuda_between(c, t->cuda, t->marks[i][1], t->marks[i][2], &daemon) != TS_OK) {
            c->error = last; /* it isn't timed, and that is all */
            continue;
        }
        t->local_ns += local;
        t->daemon_ns += daemon;
    }
    if (t->daemon_ns > 0)
        c->exec = t->local_ns <= t->daemon_ns ? TS_EXEC_LOCAL : TS_EXEC_DAEMON;
}

void ts_autotune_drop(ts_autotune *t)
{
    for (uint32_t i = 0; i < t->num_marks; i++)
        for (int m = 0; m < 3; m++)
            ts_cuda_unmark(t->cuda, t->marks[i][m]);
    memset(t, 0, sizeof *t);
}
