/*
 * Decode steps through a daemon of its own, by ring and by message, beside the bare round trips of
 * two processes: words in shared memory that both poll, and a futex on which both sleep, wherever
 * the system puts them (on one processor a switch is all it takes) and on a processor each.
 */
#define _GNU_SOURCE
#include "tsbench.h"

#include "tinyserve.h"
#include "unconst.h"

#include <linux/futex.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 20000u
#define WARM 500u
#define LAYERS 32u
#define BATCH 256u
#define IDLE 100u
#define IDLE_SECONDS 10u
#define WORKERS 16u
#define POOL                                                                                       \
    "bench:layers=32,kv_heads=2,head_dim=64,dtype=fp32,memory=1G,slab=8M,device=host,"             \
    "client_write=all"

/* ---- bare round trips ---- */

typedef struct words {
    _Alignas(64) atomic_uint there;
    _Alignas(64) atomic_uint back;
} words;

static void await_word(atomic_uint *word, uint32_t value, bool sleeps)
{
    uint32_t seen;
    while ((seen = atomic_load(word)) != value)
        if (sleeps)
            syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static void set_word(atomic_uint *word, uint32_t value, bool sleeps)
{
    atomic_store(word, value);
    if (sleeps)
        syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* The first two processors of `all`; false: it has one. */
static bool two_of(const cpu_set_t *all, cpu_set_t each[2])
{
    int found = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
        if (CPU_ISSET(cpu, all)) {
            CPU_ZERO(&each[found]);
            CPU_SET(cpu, &each[found++]);
        }
    return found == 2;
}

/* The p50 of a round trip between two processes, in seconds; < 0: it can't be measured. apart: on a
 * processor each. */
static double bare_round_trip(bool sleeps, bool apart)
{
    cpu_set_t all, each[2];
    if (apart && (sched_getaffinity(0, sizeof all, &all) != 0 || !two_of(&all, each)))
        return -1;
    words *w = mmap(NULL, sizeof *w, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    double *times = malloc(ROUNDS * sizeof *times);
    pid_t pid = w == MAP_FAILED || times == NULL ? -1 : fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (apart)
            (void)sched_setaffinity(0, sizeof each[1], &each[1]);
        for (uint32_t i = 1; i <= ROUNDS; i++) {
            await_word(&w->there, i, sleeps);
            set_word(&w->back, i, sleeps);
        }
        _exit(0);
    }
    double p50 = -1;
    if (pid > 0) {
        if (apart)
            (void)sched_setaffinity(0, sizeof each[0], &each[0]);
        for (uint32_t i = 1; i <= ROUNDS; i++) {
            double t = bench_now();
            set_word(&w->there, i, sleeps);
            await_word(&w->back, i, sleeps);
            times[i - 1] = bench_now() - t;
        }
        waitpid(pid, NULL, 0);
        if (apart)
            (void)sched_setaffinity(0, sizeof all, &all);
        p50 = bench_percentile(times, ROUNDS, 50);
    }
    free(times);
    if (w != MAP_FAILED)
        munmap(w, sizeof *w);
    return p50;
}

/* ---- steps ---- */

static bool good(ts_client *c, ts_status status)
{
    if (status != TS_OK)
        fprintf(stderr, "tsbench: %s\n", ts_error(c));
    return status == TS_OK;
}

typedef struct rig {
    ts_client *client;
    ts_pool *pool;
} rig;

static bool rig_open(rig *r, const char *socket, ts_transport transport, ts_exec exec,
                     uint32_t spin_us)
{
    *r = (rig){0};
    return good(r->client, ts_connect(&(ts_options){.size = sizeof(ts_options),
                                                    .url = socket,
                                                    .transport = transport,
                                                    .spin_us = spin_us,
                                                    .exec = exec,
                                                    .exchange_bytes = 8u << 20},
                                      &r->client)) &&
           good(r->client, ts_pool_open(r->client, "bench",
                                        exec == TS_EXEC_LOCAL ? TS_POOL_WRITABLE : 0, &r->pool));
}

static void rig_close(rig *r)
{
    /* NOLINTNEXTLINE(clang-analyzer-core.CallAndMessage): rig_open set it */
    ts_pool_close(r->pool);
    ts_disconnect(r->client);
}

static const ts_step_options four_heads = {.size = sizeof(ts_step_options), .heads = 4};

/* Every value of v is `value`, so every output must be, whatever q and k are. */
static bool fill_and_check(ts_step *s, uint32_t layer, float value, bool check)
{
    uint32_t tokens = ts_step_tokens(s);
    float *q = ts_step_q(s), *k = ts_step_k(s), *v = ts_step_v(s);
    for (uint32_t i = 0; i < tokens * 4 * 64; i++)
        q[i] = (float)(i % 7) - 3;
    for (uint32_t i = 0; i < tokens * 2 * 64; i++) {
        k[i] = (float)(i % 5) - 2;
        v[i] = value;
    }
    if (ts_step_run(s, layer) != TS_OK)
        return false;
    const float *out = ts_step_out(s);
    for (uint32_t i = 0; check && i < tokens * 4 * 64; i++)
        if (fabsf(out[i] - value) > 1e-5f * value) {
            fprintf(stderr, "tsbench: an output is %g in place of %g\n", (double)out[i],
                    (double)value);
            return false;
        }
    return true;
}

/* `tokens` tokens for each sequence, checked in every layer. */
static bool prefill(rig *r, const ts_seq *seqs, uint32_t count, uint32_t tokens)
{
    uint32_t *new_tokens = malloc(count * sizeof *new_tokens);
    ts_step *s = NULL;
    for (uint32_t i = 0; new_tokens != NULL && i < count; i++)
        new_tokens[i] = tokens;
    bool ok = new_tokens != NULL &&
              good(r->client, ts_step_begin(r->pool, seqs, new_tokens, count, &four_heads, &s));
    for (uint32_t layer = 0; ok && layer < LAYERS; layer++)
        ok = fill_and_check(s, layer, (float)layer + 1, true);
    ok = ok && good(r->client, ts_step_commit(s, NULL));
    free(new_tokens);
    return ok;
}

/* p50 of one attend of one query token over one token, in a step that is aborted afterwards. */
static double attend_p50(rig *r, uint32_t rounds, bool *ok)
{
    ts_seq seq;
    ts_step *s = NULL;
    double *times = malloc(rounds * sizeof *times), p50 = -1;
    *ok = times != NULL && good(r->client, ts_seq_create(r->pool, 1, &seq)) &&
          good(r->client, ts_step_begin(r->pool, &seq, &(uint32_t){1}, 1, &four_heads, &s)) &&
          fill_and_check(s, 0, 1, true);
    for (uint32_t i = 0; *ok && i < WARM + rounds; i++) {
        double t = bench_now();
        *ok = good(r->client, ts_step_run(s, 0));
        if (i >= WARM)
            times[i - WARM] = bench_now() - t;
    }
    if (*ok)
        p50 = bench_percentile(times, rounds, 50);
    *ok =
        *ok && good(r->client, ts_step_abort(s)) && good(r->client, ts_seq_free(r->pool, &seq, 1));
    free(times);
    return p50;
}

/* p50 of a whole decode step of one sequence of 256 to 271 tokens: begin, LAYERS runs, commit. */
static double step_p50(rig *r, bool *ok)
{
    static double times[256];
    ts_seq seq;
    *ok = good(r->client, ts_seq_create(r->pool, 1, &seq)) && prefill(r, &seq, 1, 256);
    for (uint32_t i = 0; *ok && i < 256; i++) {
        ts_step *s = NULL;
        if (i % 16 == 0)
            *ok = good(r->client, ts_seq_truncate(r->pool, &seq, &(uint32_t){256}, 1));
        double t = bench_now();
        *ok = *ok &&
              good(r->client, ts_step_begin(r->pool, &seq, &(uint32_t){1}, 1, &four_heads, &s));
        for (uint32_t layer = 0; *ok && layer < LAYERS; layer++)
            *ok = good(r->client, ts_step_run(s, layer));
        *ok = *ok && good(r->client, ts_step_commit(s, NULL));
        times[i] = bench_now() - t;
    }
    *ok = *ok && good(r->client, ts_seq_free(r->pool, &seq, 1));
    return *ok ? bench_percentile(times, 256, 50) : -1;
}

/* p50 of beginning a step of BATCH sequences, where none and where each needs a new block. */
static bool begin_p50(rig *r, double *none, double *each)
{
    static ts_seq seqs[BATCH];
    static uint32_t one[BATCH];
    static double times[2][1024];
    uint32_t counts[2] = {0};
    bool ok = good(r->client, ts_seq_create(r->pool, BATCH, seqs));
    for (uint32_t i = 0; i < BATCH; i++)
        one[i] = 1;
    for (uint32_t i = 0; ok && i < 1024; i++) {
        ts_step *s = NULL;
        double t = bench_now();
        ok = good(r->client, ts_step_begin(r->pool, seqs, one, BATCH, &four_heads, &s));
        t = bench_now() - t;
        bool fresh = ok && ts_step_start(s, 0) % 16 == 0;
        if (ok && i >= 32)
            times[fresh][counts[fresh]++] = t;
        for (uint32_t layer = 0; ok && layer < (i < 16 ? LAYERS : 0); layer++)
            ok = fill_and_check(s, layer, (float)layer + 1, true);
        /* Without a layer run nothing may be kept: this batch goes on from token 16 again. */
        ok = ok && good(r->client, i < 16 ? ts_step_commit(s, NULL) : ts_step_abort(s));
        if (ok && i == 16 + 511) /* from a full block to one with room */
            ok = prefill(r, seqs, BATCH, 1);
    }
    if (ok) {
        *each = bench_percentile(times[1], counts[1], 50);
        *none = bench_percentile(times[0], counts[0], 50);
    }
    return ok && good(r->client, ts_seq_free(r->pool, seqs, BATCH));
}

/* p50 of beginning a step of BATCH sequences of 1024 tokens, for whoever attends itself: by block
 * tables. The tokens are shared, and each sequence needs a new block. */
static double begin_with_tables_p50(rig *r, bool *ok)
{
    static ts_seq seqs[BATCH];
    static uint32_t one[BATCH];
    static double times[512];
    *ok = good(r->client, ts_seq_create(r->pool, 1, seqs)) && prefill(r, seqs, 1, 1024) &&
          good(r->client, ts_seq_fork(r->pool, seqs[0], BATCH - 1, seqs + 1));
    for (uint32_t i = 0; i < BATCH; i++)
        one[i] = 1;
    for (uint32_t i = 0; *ok && i < 512; i++) {
        ts_step *s = NULL;
        double t = bench_now();
        *ok = good(r->client, ts_step_begin(r->pool, seqs, one, BATCH, &four_heads, &s));
        times[i] = bench_now() - t;
        *ok = *ok && good(r->client, ts_step_abort(s));
    }
    *ok = *ok && good(r->client, ts_seq_free(r->pool, seqs, BATCH));
    return *ok ? bench_percentile(times, 512, 50) : -1;
}

/* Processor time of the daemon, as a part of one processor's, while IDLE sessions that have begun a
 * step by ring do nothing; < 0: it can't be measured. */
static double idle_share(const char *socket, pid_t daemon)
{
    static rig rigs[IDLE];
    clockid_t clock;
    struct timespec before, after;
    uint32_t count = 0;
    bool ok = clock_getcpuclockid(daemon, &clock) == 0;
    while (ok && count < IDLE) {
        rig *r = &rigs[count++];
        ts_seq seq;
        ts_step *s = NULL;
        ok = rig_open(r, socket, TS_TRANSPORT_RING, TS_EXEC_DAEMON, 0) &&
             good(r->client, ts_seq_create(r->pool, 1, &seq)) &&
             good(r->client, ts_step_begin(r->pool, &seq, &(uint32_t){1}, 1, &four_heads, &s)) &&
             good(r->client, ts_step_abort(s));
    }
    sleep(1); /* until nobody polls any more */
    ok = ok && clock_gettime(clock, &before) == 0;
    double t = bench_now();
    sleep(IDLE_SECONDS);
    ok = ok && clock_gettime(clock, &after) == 0;
    t = bench_now() - t;
    while (count > 0)
        rig_close(&rigs[--count]);
    return ok ? ((double)(after.tv_sec - before.tv_sec) +
                 (double)(after.tv_nsec - before.tv_nsec) * 1e-9) /
                    t
              : -1;
}

/* ---- workers ---- */

/* step-client SOCKET SEQUENCES STEPS: decodes, from a byte on stdin to the end. */
int step_client(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    uint32_t count = (uint32_t)strtoul(argv[3], NULL, 10);
    uint32_t steps = (uint32_t)strtoul(argv[4], NULL, 10);
    ts_seq *seqs = malloc(count * sizeof *seqs);
    uint32_t *one = malloc(count * sizeof *one);
    rig r;
    char byte;
    if (seqs == NULL || one == NULL || !rig_open(&r, argv[2], TS_TRANSPORT_RING, 0, 0) ||
        !good(r.client, ts_seq_create(r.pool, count, seqs)) || !prefill(&r, seqs, count, 256) ||
        write(STDOUT_FILENO, "r", 1) != 1 || read(STDIN_FILENO, &byte, 1) != 1)
        /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the process ends */
        return 1;
    for (uint32_t i = 0; i < count; i++)
        one[i] = 1;
    for (uint32_t i = 0; i < steps; i++) {
        ts_step *s;
        if (!good(r.client, ts_step_begin(r.pool, seqs, one, count, &four_heads, &s)))
            return 1;
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            if (!fill_and_check(s, layer, (float)layer + 1, true))
                return 1;
        if (!good(r.client, ts_step_commit(s, NULL)))
            return 1;
    }
    rig_close(&r);
    free(seqs);
    free(one);
    return 0;
}

/* Tokens per second of `workers` processes with `count` sequences each; < 0: one failed. */
static double workers_rate(const char *socket, uint32_t workers, uint32_t count, uint32_t steps)
{
    char numbers[2][16], *argvs[WORKERS][6];
    snprintf(numbers[0], sizeof *numbers, "%u", count);
    snprintf(numbers[1], sizeof *numbers, "%u", steps);
    char *argv[] = {"/proc/self/exe", "step-client", ts_unconst(socket),
                    numbers[0],       numbers[1],    NULL};
    for (uint32_t i = 0; i < workers; i++)
        memcpy(argvs[i], argv, sizeof argv);
    double t = bench_together(workers, argvs[0], 6);
    return t < 0 ? -1 : (double)workers * count * steps / t;
}

/* ---- the benchmark ---- */

static void row(const bench_options *o, json_t *rows, const char *what, double value,
                const char *unit, const char *beside, double other)
{
    bool per_second = unit[0] == '/';
    double scale = per_second ? 1 : 1e6;
    if (!o->json) {
        printf("%-58s %9.*f %-4s", what, per_second ? 0 : 2, value * scale, unit);
        if (beside != NULL)
            printf("  %.2f x %s", value / other, beside);
        putchar('\n');
    }
    json_t *entry =
        json_pack("{s:s, s:f, s:s}", "what", what, "value", value * scale, "unit", unit);
    if (beside != NULL)
        json_object_set_new(entry, beside, json_real(value / other));
    json_array_append_new(rows, entry);
}

static bool by_both_ways(const bench_options *o, const char *socket, double polled, json_t *rows)
{
    rig ring, messages, local;
    bool fine, ok = rig_open(&ring, socket, TS_TRANSPORT_RING, TS_EXEC_DAEMON, 1000) &&
                    rig_open(&messages, socket, TS_TRANSPORT_MESSAGES, TS_EXEC_DAEMON, 0) &&
                    rig_open(&local, socket, TS_TRANSPORT_RING, TS_EXEC_LOCAL, 1000);
    double none = 0, each = 0;
    if (ok) {
        double a = attend_p50(&ring, ROUNDS, &ok), b = attend_p50(&messages, ROUNDS / 10, &fine);
        ok = ok && fine;
        row(o, rows, "smallest attend by ring, both awake", a, "µs", "bare, polled", polled);
        row(o, rows, "smallest attend by message", b, "µs", "by ring", a);
        a = attend_p50(&local, ROUNDS, &fine);
        ok = ok && fine;
        row(o, rows, "smallest attend by the worker itself", a, "µs", NULL, 0);
    }
    if (ok && (ok = begin_p50(&ring, &none, &each))) {
        row(o, rows, "begin of 256 sequences by ring, no new block", none, "µs", NULL, 0);
        row(o, rows, "begin of 256 sequences by ring, 256 new blocks", each, "µs", NULL, 0);
        double a = begin_with_tables_p50(&local, &ok);
        row(o, rows, "the same, of 1024 tokens each, by the worker", a, "µs", NULL, 0);
    }
    if (ok) {
        double a = step_p50(&ring, &ok), b = step_p50(&messages, &fine);
        ok = ok && fine;
        row(o, rows, "32 layers, one sequence of 256 tokens, by ring", a, "µs", NULL, 0);
        row(o, rows, "32 layers, one sequence of 256 tokens, by message", b, "µs", "by ring", a);
        b = step_p50(&local, &fine);
        ok = ok && fine;
        row(o, rows, "32 layers, one sequence of 256 tokens, by the worker", b, "µs", "by ring", a);
    }
    rig_close(&ring);
    rig_close(&messages);
    rig_close(&local);
    return ok;
}

/* Tokens a second of one worker with `count` sequences, and of as many workers with one each.
 * False: a worker failed. */
static bool crowd_rows(const bench_options *o, const char *socket, uint32_t count, json_t *rows)
{
    char what[64];
    double one = workers_rate(socket, 1, count, 100);
    double many = one > 0 ? workers_rate(socket, count, 1, 100) : -1;
    if (many <= 0)
        return false;
    snprintf(what, sizeof what, "one worker with %u sequences of 256 tokens", count);
    row(o, rows, what, one, "/s", NULL, 0);
    snprintf(what, sizeof what, "%u workers with one each", count);
    row(o, rows, what, many, "/s", "one worker", one);
    return true;
}

int bench_step(const bench_options *o, json_t *rows)
{
    char folder[] = "/tmp/tsbench.XXXXXX", socket[64];
    if (mkdtemp(folder) == NULL) {
        perror("tsbench");
        return 1;
    }
    snprintf(socket, sizeof socket, "%s/daemon", folder);
    double polled = bare_round_trip(false, false), slept = bare_round_trip(true, false);
    double apart = bare_round_trip(true, true);
    bool ok = polled > 0 && slept > 0;
    if (!o->json)
        printf("medians; a step is begin, %u layers, commit\n", LAYERS);
    row(o, rows, "bare round trip, words that both poll", polled, "µs", NULL, 0);
    row(o, rows, "bare round trip, a futex that both sleep on", slept, "µs", NULL, 0);
    if (apart > 0)
        row(o, rows, "the same, on a processor each", apart, "µs", NULL, 0);

    pid_t daemon = ok ? bench_daemon(o, socket, POOL, "spin_us=1000") : -1;
    ok = ok && daemon > 0 && by_both_ways(o, socket, polled, rows);
    bench_end(daemon, SIGTERM);

    daemon = ok ? bench_daemon(o, socket, POOL, "spin_us=0") : -1;
    rig idle;
    ok = ok && daemon > 0 && rig_open(&idle, socket, TS_TRANSPORT_RING, 0, TS_SPIN_NONE);
    if (ok) {
        double a = attend_p50(&idle, ROUNDS / 2, &ok);
        row(o, rows, "smallest attend by ring, both asleep", a, "µs",
            apart > 0 ? "bare, on a processor each" : "bare, slept", apart > 0 ? apart : slept);
        rig_close(&idle);
    }
    bench_end(daemon, SIGTERM);

    daemon = ok ? bench_daemon(o, socket, POOL, NULL) : -1;
    if (ok && daemon > 0) {
        ok = crowd_rows(o, socket, WORKERS / 2, rows) && crowd_rows(o, socket, WORKERS, rows);
        double share = idle_share(socket, daemon);
        ok = ok && share >= 0;
        row(o, rows, "daemon's processor time a second, 100 idle sessions", share, "µs", NULL, 0);
    }
    bench_end(daemon, SIGTERM);
    rmdir(folder);
    if (!ok)
        fprintf(stderr, "tsbench: something failed: the figures are not complete\n");
    return ok ? 0 : 1;
}
