/*
 * The cache: what a match costs, what token ids cost a step, how quickly cached blocks make room.
 * K and V are written by nobody: steps run no layer, in a pool that may be written.
 */
#define _GNU_SOURCE
#include "tsbench.h"

#include "tinyserve.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define PROMPT 10240u
#define BLOCK 16u
#define SEQS 256u
#define STEPS 16u
#define ROUNDS 200u
#define BLOCKS 262144u
#define POOL                                                                                       \
    "bench:layers=1,kv_heads=1,head_dim=32,dtype=fp16,blocks=262144,slab=64M,client_write=all,"    \
    "device=host"

typedef struct rig {
    ts_client *client;
    ts_pool *pool;
} rig;

static const ts_seq_options space = {.size = sizeof space, .space = "bench", .space_bytes = 5};

static bool good(const rig *r, ts_status status)
{
    if (status != TS_OK)
        fprintf(stderr, "tsbench: %s\n", ts_error(r->client));
    return status == TS_OK;
}

/* Adds new_tokens[i] tokens to each sequence, with ids or without; *seconds: begin and commit. */
static bool add(const rig *r, const ts_seq *seqs, const uint32_t *new_tokens, uint32_t count,
                const uint32_t *ids, double *seconds)
{
    const ts_step_options options = {.size = sizeof options, .no_run = true, .tokens = ids};
    ts_step *step;
    double t = bench_now();
    bool ok = good(r, ts_step_begin(r->pool, seqs, new_tokens, count, &options, &step)) &&
              good(r, ts_step_commit(step, NULL));
    *seconds += bench_now() - t;
    return ok;
}

static void report(const bench_options *o, json_t *rows, const char *what, double value,
                   const char *unit)
{
    if (!o->json)
        printf("%-62s %10.2f %s\n", what, value, unit);
    json_array_append_new(rows,
                          json_pack("{s:s, s:f, s:s}", "what", what, "value", value, "unit", unit));
}

/* The median of matching the prompt, in µs; *matched: what was found. < 0: it failed. */
static double match_p50(const rig *r, const uint32_t *prompt, uint32_t *matched)
{
    static double times[ROUNDS];
    const uint32_t count = PROMPT;
    for (uint32_t i = 0; i < ROUNDS; i++) {
        ts_seq seq;
        double t = bench_now();
        if (!good(r, ts_seq_match(r->pool, prompt, &count, 1, &space, &seq, matched)))
            return -1;
        times[i] = (bench_now() - t) * 1e6;
        if (!good(r, ts_seq_free(r->pool, &seq, 1)))
            return -1;
    }
    return bench_percentile(times, ROUNDS, 50);
}

static bool matches(const rig *r, const bench_options *o, json_t *rows)
{
    uint32_t *prompt = malloc(2 * PROMPT * sizeof *prompt), count = PROMPT, matched;
    double unused = 0, lengths[ROUNDS];
    ts_seq seq;
    if (prompt == NULL)
        return false;
    for (uint32_t i = 0; i < 2 * PROMPT; i++)
        prompt[i] = i * 2654435761u >> 12;
    bool ok = good(r, ts_seq_create_with(r->pool, 1, &space, &seq)) &&
              add(r, &seq, &count, 1, prompt, &unused);
    for (uint32_t i = 0; ok && i < ROUNDS; i++) {
        double t = bench_now();
        ok = good(r, ts_seq_lengths(r->pool, &seq, 1, &matched));
        lengths[i] = (bench_now() - t) * 1e6;
    }
    double there = ok ? match_p50(r, prompt, &matched) : -1;
    ok = there > 0 && matched == PROMPT - 1;
    double absent = ok ? match_p50(r, prompt + PROMPT, &matched) : -1;
    ok = absent > 0 && matched == 0 && good(r, ts_seq_free(r->pool, &seq, 1));
    if (ok) {
        report(o, rows, "the smallest message", bench_percentile(lengths, ROUNDS, 50), "µs");
        report(o, rows, "match of a stored prompt of 10240 tokens, by ring", there, "µs");
        report(o, rows, "match of one that isn't stored, by ring", absent, "µs");
    }
    free(prompt);
    return ok;
}

/* Begin and commit of 256 sequences by one token each, on average over 16 steps; < 0: it failed. */
static double step_us(const rig *r, bool with_ids)
{
    static ts_seq seqs[SEQS];
    static uint32_t ones[SEQS], ids[SEQS], number;
    double best = 0;
    for (uint32_t round = 0; round < 20; round++) {
        double seconds = 0;
        bool ok = good(r, ts_seq_create_with(r->pool, SEQS, &space, seqs));
        for (uint32_t s = 0; ok && s < STEPS; s++) {
            for (uint32_t i = 0; i < SEQS; i++) {
                ones[i] = 1;
                ids[i] = number++;
            }
            ok = add(r, seqs, ones, SEQS, with_ids ? ids : NULL, &seconds);
        }
        if (!ok || !good(r, ts_seq_free(r->pool, seqs, SEQS)))
            return -1;
        seconds *= 1e6 / STEPS;
        best = round == 0 || seconds < best ? seconds : best;
    }
    return best;
}

/* Takes all blocks of the pool, with ids or without, and frees them; blocks a second. */
static double fill_rate(const rig *r, bool with_ids, uint32_t salt)
{
    const uint32_t each = 65536, count = BLOCKS / each, tokens = each * BLOCK;
    uint32_t *ids = malloc(tokens * sizeof *ids);
    ts_seq seqs[BLOCKS / 65536];
    double seconds = 0;
    bool ok = ids != NULL && good(r, ts_seq_create_with(r->pool, count, &space, seqs));
    for (uint32_t i = 0; ok && i < count; i++) {
        for (uint32_t t = 0; t < tokens; t++)
            ids[t] = (i * tokens + t) ^ salt;
        ok = add(r, &seqs[i], &tokens, 1, with_ids ? ids : NULL, &seconds);
    }
    ok = ok && good(r, ts_seq_free(r->pool, seqs, count));
    free(ids);
    return ok ? BLOCKS / seconds : -1;
}

int bench_cache(const bench_options *o, json_t *rows)
{
    char folder[] = "/tmp/tsbench.XXXXXX", socket[64];
    rig r;
    if (mkdtemp(folder) == NULL) {
        perror("tsbench");
        return 1;
    }
    snprintf(socket, sizeof socket, "%s/daemon", folder);
    pid_t daemon = bench_daemon(o, socket, POOL, "spin_us=1000");
    const ts_options options = {.size = sizeof options, .url = socket, .spin_us = 1000};
    bool ok = daemon > 0 && ts_connect(&options, &r.client) == TS_OK &&
              good(&r, ts_pool_open(r.client, "bench", TS_POOL_WRITABLE, &r.pool));
    ok = ok && matches(&r, o, rows);
    double without = ok ? step_us(&r, false) : -1, with = ok ? step_us(&r, true) : -1;
    ok = without > 0 && with > 0;
    if (ok) {
        report(o, rows, "begin and commit of 256 sequences, without token ids", without, "µs");
        report(o, rows, "the same with token ids", with, "µs");
        (void)fill_rate(&r, false, 0); /* touches the books */
        double empty = fill_rate(&r, false, 0), first = fill_rate(&r, true, 1u << 31);
        double full = fill_rate(&r, false, 0);
        ok = empty > 0 && first > 0 && full > 0;
        report(o, rows, "blocks taken, a million a second", empty * 1e-6, "M/s");
        report(o, rows, "the same, and put into the index", first * 1e-6, "M/s");
        report(o, rows, "the same, from a pool that is full of cached blocks", full * 1e-6, "M/s");
    }
    if (daemon > 0 && r.client != NULL)
        ts_disconnect(r.client);
    bench_end(daemon, SIGTERM);
    rmdir(folder);
    ok = ok && bench_cache_crowd(o, rows);
    if (!ok)
        fprintf(stderr, "tsbench: something failed: the figures are not complete\n");
    return ok ? 0 : 1;
}
