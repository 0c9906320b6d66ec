/*
 * What workers see of a daemon that outlives its death, in a host pool of many sequences, while
 * they make one decode step after the other. The daemon is killed under a supervisor: how long
 * after the kill the first step ends that the next daemon serves, and how long the longest step of
 * any worker takes. And how long steps take while the books' snapshots are written again and again,
 * beside a daemon that has no books.
 */
#define _GNU_SOURCE
#include "tsbench.h"

#include "tinyserve.h"
#include "unconst.h"

#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SEQUENCES 100000u
#define TOKENS 1024u
#define BATCH 1000u
#define KILLS 7
#define WARM 2000u
#define ROUND 256u   /* steps, after which a sequence is cut again */
#define SLOW 0.005   /* seconds: steps that take longer are told of */
#define AFTER 1.0    /* seconds: before the first kill, and between a restart and the next one */
#define WAIT 60.0    /* seconds that a worker has to come back */
#define ALLOWED 0.05 /* seconds that the longest step of a restart may take over the first */
#define DIM 32u
#define WORKERS_MAX 4u
#define STEPS_SECONDS 6.0 /* that steps are timed, with books and without, */
#define STEPS_ROUNDS 2u   /* rounds of each, by turns */
#define STEPS_MOST (1u << 22)

/* A step that was slow, or the first over a restart. */
typedef struct slow_step {
    double began, ended;
    uint32_t worker, restarts;
    bool warm; /* its WARMth, however long it took */
} slow_step;

static bool good(ts_client *c, ts_status status)
{
    if (status != TS_OK)
        fprintf(stderr, "tsbench: %s\n", ts_error(c));
    return status == TS_OK;
}

static bool open_pool(const char *socket, uint32_t flags, ts_client **c, ts_pool **p)
{
    const ts_options options = {.size = sizeof options, .url = socket, .wait_ms = 10000};
    *c = NULL;
    return good(*c, ts_connect(&options, c)) && good(*c, ts_pool_open(*c, "bench", flags, p));
}

/* ---- a worker ---- */

/* Every value of v is 2, so every output must be. */
static bool one_step(ts_client *c, ts_pool *p, const ts_seq *seq, uint32_t number)
{
    ts_step *s = NULL;
    const ts_step_options options = {.size = sizeof options, .heads = 1};
    if (number % ROUND == 0 && !good(c, ts_seq_truncate(p, seq, &(uint32_t){0}, 1)))
        return false;
    if (!good(c, ts_step_begin(p, seq, &(uint32_t){1}, 1, &options, &s)))
        return false;
    float *q = ts_step_q(s), *k = ts_step_k(s), *v = ts_step_v(s);
    for (uint32_t i = 0; i < DIM; i++) {
        q[i] = (float)(i % 7) - 3;
        k[i] = (float)(i % 5) - 2;
        v[i] = 2;
    }
    if (!good(c, ts_step_run(s, 0)))
        return false;
    const float *out = ts_step_out(s);
    for (uint32_t i = 0; i < DIM; i++)
        if (fabsf(out[i] - 2) > 1e-5f) {
            fprintf(stderr, "tsbench: an output is %g in place of 2\n", (double)out[i]);
            return false;
        }
    return good(c, ts_step_commit(s, NULL));
}

/* Arguments: restart-client SOCKET NUMBER. Writes slow steps to stdout until it is killed. */
int restart_client(int argc, char **argv)
{
    ts_client *c;
    ts_pool *p;
    ts_seq seq;
    slow_step told = {.worker = argc == 4 ? (uint32_t)atoi(argv[3]) : 0};
    if (argc != 4 || !open_pool(argv[2], 0, &c, &p) || !good(c, ts_seq_create(p, 1, &seq)))
        return 1;
    for (uint32_t i = 0;; i++) {
        const double began = bench_now();
        if (!one_step(c, p, &seq, i))
            return 1;
        const double ended = bench_now();
        const uint32_t restarts = ts_client_restarts(c);
        if (restarts == told.restarts && ended - began < SLOW && i != WARM)
            continue;
        told.began = began;
        told.ended = ended;
        told.restarts = restarts;
        told.warm = i == WARM;
        if (i >= WARM && write(STDOUT_FILENO, &told, sizeof told) != sizeof told)
            return 1;
    }
}

/* ---- all of them ---- */

static bool fill(ts_client *c, ts_pool *p, ts_seq *one)
{
    static ts_seq seqs[BATCH];
    static uint32_t tokens[BATCH];
    for (uint32_t i = 0; i < BATCH; i++)
        tokens[i] = TOKENS;
    for (uint32_t i = 0; i < SEQUENCES; i += BATCH)
        if (!good(c, ts_seq_create(p, BATCH, seqs)) ||
            !good(c, ts_seq_append(p, seqs, tokens, BATCH, NULL)))
            return false;
    *one = seqs[0];
    return true;
}

/* The supervisor's child; 0: it has none. */
static pid_t daemon_of(pid_t supervisor)
{
    char path[64], text[32] = "";
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)supervisor, (int)supervisor);
    FILE *f = fopen(path, "r");
    if (f != NULL) {
        (void)!fgets(text, sizeof text, f);
        (void)fclose(f);
    }
    return (pid_t)atoi(text);
}

/* The next step that a worker tells of; false: none does until then, or its process has ended. */
static bool next_step(int from, double until, slow_step *step)
{
    struct pollfd ready = {from, POLLIN, 0};
    const double left = until - bench_now();
    return left > 0 && poll(&ready, 1, (int)(left * 1e3) + 1) == 1 &&
           read(from, step, sizeof *step) == sizeof *step;
}

/* One restart, the number-th that the workers see; false: one hasn't come back, or there is no
 * daemon. */
static bool kill_once(pid_t supervisor, int from, uint32_t workers, uint32_t number, double *first,
                      double *longest)
{
    slow_step step;
    uint32_t back = 0; /* bit i: worker i is */
    const pid_t pid = daemon_of(supervisor);
    const double killed = bench_now();
    if (pid == 0 || kill(pid, SIGKILL) != 0)
        return false;
    *first = *longest = 0;
    const uint32_t all = (1u << workers) - 1;
    double until = killed + WAIT;
    while (next_step(from, until, &step)) {
        if (step.ended < killed)
            continue;
        const double took = step.ended - step.began, after = step.ended - killed;
        *longest = fmax(*longest, took);
        if (step.restarts != number)
            continue;
        *first = back == 0 ? after : fmin(*first, after);
        back |= 1u << step.worker;
        if (back == all && until == killed + WAIT)
            until = bench_now() + AFTER;
    }
    return back == all;
}

static void report(const bench_options *o, json_t *rows, uint32_t workers, uint32_t block_tokens,
                   double *first, double *longest, double before)
{
    double more = -1;
    uint32_t late = 0;
    for (uint32_t i = 0; i < KILLS; i++) {
        more = fmax(more, longest[i] - first[i]);
        late += longest[i] - first[i] > ALLOWED;
    }
    const double first_p50 = bench_percentile(first, KILLS, 50), first_most = first[KILLS - 1];
    const double longest_p50 = bench_percentile(longest, KILLS, 50);
    if (!o->json)
        printf(
            "%u workers, blocks of %3u: from the kill to the first step's end %.3f s, %.3f at "
            "most;\n  the longest step %.3f s, %.3f at most: %+.1f ms over the first of the same "
            "restart at most,\n  more than %.0f in %u of %d restarts; without a kill a step took "
            "%.1f ms at most\n",
            workers, block_tokens, first_p50, first_most, longest_p50, longest[KILLS - 1],
            more * 1e3, ALLOWED * 1e3, late, KILLS, before * 1e3);
    (void)fflush(stdout);
    json_array_append_new(
        rows,
        json_pack("{s:s, s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:i, s:f}", "what", "workers",
                  "workers", (int)workers, "block_tokens", (int)block_tokens, "kills", KILLS,
                  "first_step_s", first_p50, "first_step_most_s", first_most, "longest_step_s",
                  longest_p50, "longest_step_most_s", longest[KILLS - 1], "longest_over_first_ms",
                  more * 1e3, "late", (int)late, "longest_without_ms", before * 1e3));
}

/* Starts `workers` workers beside the parent's sequences, and kills the daemon KILLS times. */
static bool kill_beside(const bench_options *o, json_t *rows, const char *socket, pid_t supervisor,
                        uint32_t workers, uint32_t block_tokens, uint32_t *restarts)
{
    double first[KILLS], longest[KILLS];
    pid_t pids[WORKERS_MAX];
    int out[2];
    double before = 0;
    slow_step step;
    if (pipe(out) != 0)
        return false;
    for (uint32_t i = 0; i < workers; i++) {
        char number[12];
        snprintf(number, sizeof number, "%u", i);
        char *argv[] = {(char *)"/proc/self/exe", (char *)"restart-client", ts_unconst(socket),
                        number, NULL};
        pids[i] = bench_start(argv, -1, out[1]);
    }
    close(out[1]);
    bool ok = true;
    for (uint32_t warm = 0; ok && warm < workers;) { /* each tells of one step when it is */
        ok = next_step(out[0], bench_now() + WAIT, &step);
        warm += ok && step.warm;
    }
    const double quiet = bench_now() + AFTER;
    while (ok && next_step(out[0], quiet, &step))
        before = fmax(before, step.ended - step.began);
    for (uint32_t i = 0; ok && i < KILLS; i++) {
        ok = kill_once(supervisor, out[0], workers, i + 1, &first[i], &longest[i]);
        *restarts += ok;
    }
    for (uint32_t i = 0; i < workers; i++)
        bench_end(pids[i], SIGKILL);
    close(out[0]);
    if (ok)
        report(o, rows, workers, block_tokens, first, longest, before);
    return ok;
}

/* Starts a daemon with the pool. supervised: it has books. */
static pid_t start_daemon(const bench_options *o, const char *socket, uint32_t block_tokens,
                          bool supervised)
{
    char pool[192];
    snprintf(
        pool, sizeof pool,
        "bench:layers=1,kv_heads=1,head_dim=%u,dtype=fp8_e4m3,block_tokens=%u,memory=8G,slab=64M,"
        "sequences=200000,tenant_sequences=200000,device=host,client_write=all",
        DIM, block_tokens);
    char *argv[] = {ts_unconst(o->daemon),
                    supervised ? (char *)"--supervise" : ts_unconst(o->daemon),
                    (char *)"--socket",
                    ts_unconst(socket),
                    (char *)"--set",
                    (char *)"log_level=error",
                    (char *)"--pool",
                    pool,
                    NULL};
    return bench_start(supervised ? argv : argv + 1, -1, -1);
}

static bool measure(const bench_options *o, json_t *rows, const char *socket, uint32_t block_tokens)
{
    static const uint32_t workers[] = {1, WORKERS_MAX};
    ts_client *c = NULL;
    ts_pool *p;
    ts_seq one;
    uint32_t restarts = 0, length = 0;
    const pid_t supervisor = start_daemon(o, socket, block_tokens, true);
    bool ok = supervisor > 0 && open_pool(socket, TS_POOL_WRITABLE, &c, &p) && fill(c, p, &one);
    for (uint32_t i = 0; ok && i < sizeof workers / sizeof *workers; i++)
        ok = kill_beside(o, rows, socket, supervisor, workers[i], block_tokens, &restarts);
    ok = ok && good(c, ts_seq_lengths(p, &one, 1, &length)) && length == TOKENS;
    if (!ok)
        fprintf(stderr, "tsbench: after %u kills of the daemon something is lost\n", restarts);
    ts_disconnect(c);
    bench_end(supervisor, SIGTERM);
    return ok;
}

/* ---- steps while snapshots are written ---- */

/* Percentiles of the seconds that steps of one sequence take. */
typedef struct step_times {
    double p50, p99;
} step_times;

static bool time_steps(ts_client *c, ts_pool *p, double *took, step_times *times)
{
    ts_seq seq;
    uint32_t count = 0;
    if (!good(c, ts_seq_create(p, 1, &seq)))
        return false;
    for (uint32_t i = 0; i < WARM; i++)
        if (!one_step(c, p, &seq, i))
            return false;
    double began = bench_now();
    const double end = began + STEPS_SECONDS;
    for (; count < STEPS_MOST && began < end; count++) {
        if (!one_step(c, p, &seq, count))
            return false;
        const double ended = bench_now();
        took[count] = ended - began;
        began = ended;
    }
    times->p50 = bench_percentile(took, count, 50);
    times->p99 = bench_percentile(took, count, 99);
    return true;
}

static bool time_daemon(const bench_options *o, const char *socket, bool supervised, double *took,
                        step_times *times)
{
    ts_client *c = NULL;
    ts_pool *p;
    ts_seq one;
    const pid_t daemon = start_daemon(o, socket, 16, supervised);
    const bool ok = daemon > 0 && open_pool(socket, TS_POOL_WRITABLE, &c, &p) && fill(c, p, &one) &&
                    time_steps(c, p, took, times);
    ts_disconnect(c);
    bench_end(daemon, SIGTERM);
    return ok;
}

static bool compare_steps(const bench_options *o, json_t *rows, const char *socket)
{
    double *took = malloc(STEPS_MOST * sizeof *took);
    double p50[2][STEPS_ROUNDS], p99[2][STEPS_ROUNDS];
    bool ok = took != NULL;
    for (uint32_t i = 0; ok && i < STEPS_ROUNDS * 2; i++) {
        step_times times = {0};
        ok = time_daemon(o, socket, i % 2 != 0, took, &times);
        p50[i % 2][i / 2] = times.p50;
        p99[i % 2][i / 2] = times.p99;
    }
    free(took);
    if (!ok)
        return false;
    double medians[2][2];
    for (uint32_t k = 0; k < 2; k++) {
        medians[k][0] = bench_percentile(p50[k], STEPS_ROUNDS, 50) * 1e6;
        medians[k][1] = bench_percentile(p99[k], STEPS_ROUNDS, 50) * 1e6;
    }
    if (!o->json)
        printf("a step beside %u sequences, blocks of 16: p50 %.1f us, p99 %.1f; while snapshots "
               "are\n  written again and again %.1f and %.1f: p99 %.2f times\n",
               SEQUENCES, medians[0][0], medians[0][1], medians[1][0], medians[1][1],
               medians[1][1] / medians[0][1]);
    (void)fflush(stdout);
    json_array_append_new(rows,
                          json_pack("{s:s, s:f, s:f, s:f, s:f}", "what", "snapshots", "p50_us",
                                    medians[0][0], "p99_us", medians[0][1], "p50_with_us",
                                    medians[1][0], "p99_with_us", medians[1][1]));
    return true;
}

bool bench_restart_workers(const bench_options *o, json_t *rows)
{
    static const uint32_t block_tokens[] = {16, 256};
    char folder[] = "/tmp/tsbench.XXXXXX", socket[64];
    if (mkdtemp(folder) == NULL)
        return false;
    snprintf(socket, sizeof socket, "%s/s", folder);
    bool ok = true;
    for (size_t i = 0; ok && i < sizeof block_tokens / sizeof *block_tokens; i++)
        ok = measure(o, rows, socket, block_tokens[i]);
    ok = ok && compare_steps(o, rows, socket);
    (void)rmdir(folder);
    return ok;
}
