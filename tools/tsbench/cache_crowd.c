/*
 * The cache with many workers: how long they all take to have one prompt that nobody has computed
 * yet, beside one worker, and what the index costs steps that share nothing.
 */
#define _GNU_SOURCE
#include "tinyserve.h"
#include "tsbench.h"
#include "unconst.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PROMPT 4096u
#define WORKERS 64u
#define ROUNDS 9u
#define PAIRS 20u
#define DECODES 64u /* sequences of a decode step */
#define PREFILL 2048u
#define CONTEXT 128u /* of each sequence of a decode step */
#define GEOMETRY "layers=2,kv_heads=2,head_dim=64,dtype=fp32,blocks=2048,slab=16M,device=host"

static const ts_seq_options space = {
    .size = sizeof space, .space = "bench", .space_bytes = 5, .wait_ms = 60000};

static bool good(const ts_client *c, ts_status status)
{
    if (status != TS_OK)
        fprintf(stderr, "tsbench: %s\n", ts_error(c));
    return status == TS_OK;
}

static void fill(float *values, size_t count)
{
    uint32_t state = 12345;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = (float)(state >> 8) / (1u << 23) - 1;
    }
}

/* Adds `each` tokens to each sequence, in all layers; ids NULL: none are known. */
static bool compute(ts_client *c, ts_pool *p, const ts_seq *seqs, uint32_t count, uint32_t each,
                    const uint32_t *ids)
{
    static uint32_t new_tokens[DECODES];
    const ts_geometry *g = ts_pool_geometry(p, 0);
    const ts_step_options options = {.size = sizeof options, .tokens = ids};
    ts_step *step;
    for (uint32_t i = 0; i < count; i++)
        new_tokens[i] = each;
    if (!good(c, ts_step_begin(p, seqs, new_tokens, count, &options, &step)))
        return false;
    const size_t values = (size_t)count * each * g->kv_heads * g->head_dim;
    fill(ts_step_q(step), values);
    fill(ts_step_k(step), values);
    fill(ts_step_v(step), values);
    bool ok = true;
    for (uint32_t layer = 0; ok && layer < g->layers; layer++)
        ok = good(c, ts_step_run(step, layer));
    return ok && good(c, ts_step_commit(step, NULL));
}

/* A worker: tsbench cache-client SOCKET FILE SALT. Says that it is ready, waits for a byte, and has
 * the prompt at the end; writes when it began, when it had it, and what it computed. */
int cache_client(int argc, char **argv)
{
    static uint32_t prompt[PROMPT];
    const uint32_t count = PROMPT;
    ts_client *c;
    ts_pool *p;
    ts_seq seq;
    uint32_t matched;
    char byte = 'r', line[100];
    if (argc != 5)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const ts_options options = {.size = sizeof options, .url = argv[2]};
    int out = open(argv[3], O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (out < 0 || ts_connect(&options, &c) != TS_OK || !good(c, ts_pool_open(c, "bench", 0, &p)))
        return 1;
    /* Rings with room for the ids are opened before. */
    if (!good(c, ts_seq_match(p, prompt, &count, 1, &space, NULL, &matched)))
        return 1;
    for (uint32_t i = 0; i < PROMPT; i++)
        prompt[i] = i ^ (uint32_t)strtoul(argv[4], NULL, 10) << 16;
    if (write(STDOUT_FILENO, &byte, 1) != 1 || read(STDIN_FILENO, &byte, 1) != 1)
        return 1;
    const double start = bench_now();
    bool ok = good(c, ts_seq_match(p, prompt, &count, 1, &space, &seq, &matched));
    const uint32_t rest = PROMPT - matched;
    if (ok && rest > 1) /* of a prompt that is there the last token alone is computed */
        ok = compute(c, p, &seq, 1, rest, prompt + matched);
    int bytes =
        snprintf(line, sizeof line, "%.9f %.9f %u\n", start, bench_now(), rest > 1 ? rest : 0);
    ok = ok && write(out, line, (size_t)bytes) == bytes;
    usleep(200000); /* its end isn't to hold up the others */
    ts_disconnect(c);
    return ok ? 0 : 1;
}

/* Starts `workers` workers with one new prompt: seconds until the last has it, and *computed, the
 * tokens that were computed. < 0: one failed. */
static double crowd(const char *socket, const char *file, uint32_t workers, uint32_t salt,
                    uint32_t *computed)
{
    char number[16], *argvs[WORKERS][6];
    double start, end, first = 1e300, last = 0;
    uint32_t tokens, lines = 0;
    snprintf(number, sizeof number, "%u", salt);
    for (uint32_t i = 0; i < workers; i++) {
        char *argv[6] = {ts_unconst("/proc/self/exe"),
                         ts_unconst("cache-client"),
                         ts_unconst(socket),
                         ts_unconst(file),
                         number,
                         NULL};
        memcpy(argvs[i], argv, sizeof argv);
    }
    unlink(file);
    if (bench_together(workers, argvs[0], 6) < 0)
        return -1;
    FILE *in = fopen(file, "r");
    *computed = 0;
    while (in != NULL && fscanf(in, "%lf %lf %u", &start, &end, &tokens) == 3) {
        first = start < first ? start : first;
        last = end > last ? end : last;
        *computed += tokens;
        lines++;
    }
    if (in != NULL)
        fclose(in);
    unlink(file);
    return lines == workers ? last - first : -1;
}

static void report(const bench_options *o, json_t *rows, const char *what, double value,
                   const char *unit)
{
    if (!o->json)
        printf("%-62s %10.2f %s\n", what, value, unit);
    json_array_append_new(rows,
                          json_pack("{s:s, s:f, s:s}", "what", what, "value", value, "unit", unit));
}

static bool crowds(const bench_options *o, const char *socket, const char *file, json_t *rows)
{
    double one[ROUNDS], all[ROUNDS], ratios[ROUNDS];
    uint32_t most = 0;
    for (uint32_t i = 0; i < ROUNDS; i++) {
        uint32_t computed = 0;
        one[i] = crowd(socket, file, 1, 2 * i + 1, &computed);
        if (one[i] < 0 || computed != PROMPT)
            return false;
        all[i] = crowd(socket, file, WORKERS, 2 * i + 2, &computed);
        if (all[i] < 0)
            return false;
        ratios[i] = all[i] / one[i];
        most = computed > most ? computed : most;
    }
    report(o, rows, "one worker computes a prompt of 4096 tokens",
           bench_percentile(one, ROUNDS, 50) * 1e3, "ms");
    report(o, rows, "64 processes with one prompt, until the last has it",
           bench_percentile(all, ROUNDS, 50) * 1e3, "ms");
    report(o, rows, "... of one's time, by turns", bench_percentile(ratios, ROUNDS, 50), "x");
    report(o, rows, "... tokens that were computed, at most", most, "tokens");
    return true;
}

/* Seconds of 32 decode steps, or of a prefill, of new sequences in the pool; < 0: it failed. */
static double work(ts_client *c, ts_pool *p, bool decode, uint32_t salt)
{
    static uint32_t ids[DECODES * CONTEXT];
    ts_seq seqs[DECODES];
    const uint32_t count = decode ? DECODES : 1, each = decode ? 1 : PREFILL;
    bool ok = good(c, ts_seq_create_with(p, count, &space, seqs));
    for (uint32_t i = 0; i < DECODES * CONTEXT; i++)
        ids[i] = (salt << 16) + i;
    ok = ok && (!decode || compute(c, p, seqs, DECODES, CONTEXT, ids));
    double t = bench_now();
    for (uint32_t s = 0; ok && s < (decode ? 32 : 1); s++) {
        for (uint32_t i = 0; i < count * each; i++)
            ids[i] = (salt << 16) + (s << 12) + i;
        ok = compute(c, p, seqs, count, each, ids);
    }
    t = bench_now() - t;
    return ok && good(c, ts_seq_free(p, seqs, count)) ? t : -1;
}

static bool pairs(const bench_options *o, const char *on, const char *off, json_t *rows)
{
    const ts_options options[2] = {{.size = sizeof *options, .url = on, .spin_us = 1000},
                                   {.size = sizeof *options, .url = off, .spin_us = 1000}};
    ts_client *c[2] = {NULL, NULL};
    ts_pool *pools[2];
    bool ok = true;
    for (int i = 0; ok && i < 2; i++)
        ok = ts_connect(&options[i], &c[i]) == TS_OK &&
             good(c[i], ts_pool_open(c[i], "bench", 0, &pools[i]));
    /* Until all of their memory was used: what is new costs more than an index. */
    for (uint32_t i = 0; ok && i < 2048 * 16 / PREFILL; i++)
        for (uint32_t k = 0; ok && k < 2; k++)
            ok = work(c[k], pools[k], false, 1000 + i) > 0;
    for (int decode = 0; ok && decode < 2; decode++) {
        double least[2] = {1e300, 1e300}; /* others' work on this machine only adds to it */
        for (uint32_t i = 0; ok && i < PAIRS; i++) {
            const uint32_t first = i % 2;
            for (uint32_t k = 0; ok && k < 2; k++) {
                const uint32_t which = (first + k) % 2;
                const double t = work(c[which], pools[which], decode, 2 * i + k);
                ok = t > 0;
                least[which] = t < least[which] ? t : least[which];
            }
        }
        if (ok)
            report(o, rows,
                   decode ? "32 decode steps of 64 sequences: with the index, of without"
                          : "a prefill of 2048 tokens: with the index, of without",
                   least[0] / least[1], "x");
    }
    for (int i = 0; i < 2; i++)
        if (c[i] != NULL)
            ts_disconnect(c[i]);
    return ok;
}

bool bench_cache_crowd(const bench_options *o, json_t *rows)
{
    char folder[] = "/tmp/tsbench.XXXXXX", on[64], off[64], file[64];
    if (mkdtemp(folder) == NULL) {
        perror("tsbench");
        return false;
    }
    snprintf(on, sizeof on, "%s/on", folder);
    snprintf(off, sizeof off, "%s/off", folder);
    snprintf(file, sizeof file, "%s/times", folder);
    pid_t with = bench_daemon(o, on, "bench:" GEOMETRY, "spin_us=1000");
    pid_t without = bench_daemon(o, off, "bench:cache=off," GEOMETRY, "spin_us=1000");
    bool ok = with > 0 && without > 0 && crowds(o, on, file, rows) && pairs(o, on, off, rows);
    bench_end(with, SIGTERM);
    bench_end(without, SIGTERM);
    rmdir(folder);
    return ok;
}
