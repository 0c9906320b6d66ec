/*
 * What outliving the daemon costs: commands with the books (daemon/restart/) beside the same
 * without, by turns, in one thread and without a daemon; how long a daemon takes to take over what
 * many sequences left, checked against what there was; and what workers see of it
 * (restart_workers.c).
 */
#define _GNU_SOURCE
#include "tsbench.h"

#include "books.h"
#include "engine.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STEPS 20000u /* in a turn */
#define TURNS 21
#define SEQUENCES 100000u
#define TOKENS 1024u
#define BATCH 1000u

/* Descriptors that this process keeps itself. */
typedef struct shelf {
    struct {
        char name[32];
        int fd;
    } kept[8];
    uint32_t count;
} shelf;

static int take(void *arg, const char *name)
{
    const shelf *s = arg;
    for (uint32_t i = 0; i < s->count; i++)
        if (strcmp(s->kept[i].name, name) == 0)
            return fcntl(s->kept[i].fd, F_DUPFD_CLOEXEC, 0);
    return -1;
}

static ts_status keep(void *arg, const char *name, int fd, char *why, size_t why_bytes)
{
    shelf *s = arg;
    if (s->count == sizeof s->kept / sizeof *s->kept) {
        snprintf(why, why_bytes, "no room for '%s'", name);
        return TS_ENOSPC;
    }
    snprintf(s->kept[s->count].name, sizeof s->kept[s->count].name, "%s", name);
    s->kept[s->count++].fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return TS_OK;
}

static void forget(void *arg, const char *name)
{
    (void)arg;
    (void)name;
}

typedef struct stage {
    shelf shelf;
    ts_books *books; /* NULL: none */
    ts_engine *e;
    uint64_t session;
} stage;

static bool apply_one(stage *s, ts_command *c, ts_answer *answer)
{
    c->session = s->session;
    ts_books_begin(s->books, c);
    ts_engine_apply(s->e, c, answer);
    ts_books_note(s->books, s->e, c, answer);
    return answer->status == TS_OK;
}

static bool apply(stage *s, ts_command c, ts_answer *answer)
{
    while (!apply_one(s, &c, answer) && answer->status == TS_NEED_SLABS) {
        ts_answer granted;
        ts_command grant = {.op = TS_OP_SLAB_GRANT,
                            .pool = answer->need.pool,
                            .slab_grant = {.slab = ts_engine_next_slab(s->e, answer->need.pool,
                                                                       answer->need.tenant),
                                           .tenant = answer->need.tenant}};
        (void)apply_one(s, &grant, &granted);
    }
    if (answer->status != TS_OK)
        fprintf(stderr, "tsbench: %s: %s\n", ts_status_name(answer->status), answer->message);
    return answer->status == TS_OK;
}

/* Books from what the shelf has, and their engine. */
static bool open_books(stage *s, ts_books_start *start)
{
    ts_engine_limits limits;
    char why[256];
    ts_engine_default_limits(&limits);
    const ts_books_options options = {.keeper = {&s->shelf, take, keep, forget}, .limits = &limits};
    if (ts_books_open(&options, &s->books, &s->e, start, why, sizeof why) == TS_OK)
        return true;
    fprintf(stderr, "tsbench: %s\n", why);
    return false;
}

static bool set_up(stage *s, bool with_books, uint32_t block_tokens, uint32_t blocks)
{
    ts_books_start start;
    ts_engine_limits limits;
    ts_answer answer;
    ts_engine_default_limits(&limits);
    if (with_books ? !open_books(s, &start) : (s->e = ts_engine_new(&limits)) == NULL)
        return false;
    ts_pool_config config = {
        .name = "bench",
        .geometry = {.layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = block_tokens},
        .num_blocks = blocks,
        .slab_blocks = 1u << 12,
        .sequences_max = 1u << 24,
        .sequence_tokens_max = 1u << 20,
        .tenant_blocks_max = UINT64_MAX,
        .client_write = TS_CLIENT_WRITE_ALL,
    };
    if (!apply(s, (ts_command){.op = TS_OP_POOL_ADD, .pool_add.config = &config}, &answer) ||
        !apply(s, (ts_command){.op = TS_OP_SESSION_OPEN, .session_open = {.program = "tsbench"}},
               &answer))
        return false;
    s->session = answer.session;
    return apply(
        s, (ts_command){.op = TS_OP_POOL_OPEN, .pool_open = {.name = "bench", .writable = true}},
        &answer);
}

static void tear_down(stage *s)
{
    ts_books_close(s->books);
    ts_engine_free(s->e);
    for (uint32_t i = 0; i < s->shelf.count; i++)
        close(s->shelf.kept[i].fd);
    *s = (stage){0};
}

/* Begins steps of one sequence and token, makes `runs` runs in each and aborts it; seconds of each.
 * < 0: it failed. */
static double steps(stage *s, uint64_t seq, uint32_t runs)
{
    ts_answer answer;
    const double began = bench_now();
    for (uint32_t i = 0; i < STEPS; i++) {
        ts_command c = {
            .op = TS_OP_STEP_BEGIN,
            .step_begin = {
                .seqs = &seq, .new_tokens = &(uint32_t){1}, .count = 1, .heads = runs > 0}};
        if (!apply(s, c, &answer))
            return -1;
        const uint64_t step = answer.begun.step->id;
        for (uint32_t r = 0; r < runs; r++) {
            ts_command run = {
                .op = TS_OP_STEP_RUN,
                .step_run = {.step = step, .run = {.k = 1024, .v = 2048, .out = 3072}}};
            ts_command done = {.op = TS_OP_STEP_DONE, .step_done = {.step = step}};
            if (!apply(s, run, &answer) || !apply(s, done, &answer))
                return -1;
        }
        if (!apply(s, (ts_command){.op = TS_OP_STEP_ABORT, .step_end = {.step = step}}, &answer))
            return -1;
    }
    return (bench_now() - began) / STEPS;
}

/* Median seconds of a step with `runs` runs, without and with the journal. False: it failed. */
static bool compare(uint32_t runs, double *without, double *with)
{
    stage plain = {0}, kept = {0};
    double took[2][TURNS];
    ts_answer answer;
    bool ok = set_up(&plain, false, 16, 1u << 16) && set_up(&kept, true, 16, 1u << 16);
    stage *const both[] = {&plain, &kept};
    uint64_t seqs[2];
    for (int k = 0; k < 2 && ok; k++) {
        ok =
            apply(both[k], (ts_command){.op = TS_OP_EXCHANGE_OPEN, .exchange_open.bytes = 1u << 20},
                  &answer) &&
            apply(both[k], (ts_command){.op = TS_OP_SEQ_CREATE, .seq_create.count = 1}, &answer);
        seqs[k] = ok ? answer.seqs.seqs[0] : 0;
    }
    for (int t = 0; t < TURNS && ok; t++)
        for (int k = 0; k < 2; k++)
            ok = (took[k][t] = steps(both[k], seqs[k], runs)) > 0 && ok;
    if (ok) {
        *without = bench_percentile(took[0], TURNS, 50);
        *with = bench_percentile(took[1], TURNS, 50);
    }
    tear_down(&plain);
    tear_down(&kept);
    return ok;
}

static bool fill(stage *s)
{
    ts_answer answer;
    uint64_t *seqs = malloc(BATCH * sizeof *seqs);
    uint32_t *tokens = malloc(BATCH * sizeof *tokens);
    bool ok = seqs != NULL && tokens != NULL;
    for (uint32_t i = 0; i < BATCH && ok; i++)
        tokens[i] = TOKENS;
    for (uint32_t i = 0; i < SEQUENCES && ok; i += BATCH) {
        ok = apply(s, (ts_command){.op = TS_OP_SEQ_CREATE, .seq_create.count = BATCH}, &answer);
        if (ok)
            memcpy(seqs, answer.seqs.seqs, BATCH * sizeof *seqs);
        ok = ok && apply(s,
                         (ts_command){.op = TS_OP_STEP_BEGIN,
                                      .step_begin = {.seqs = seqs,
                                                     .new_tokens = tokens,
                                                     .count = BATCH,
                                                     .append = true}},
                         &answer);
    }
    free(seqs);
    free(tokens);
    return ok;
}

/* Seconds to take over SEQUENCES sequences of TOKENS tokens from a snapshot; < 0: it failed. */
static double take_over(uint32_t block_tokens, uint64_t *snapshot_bytes)
{
    stage s = {0};
    ts_books_start start = {0};
    ts_books_figures f = {0};
    ts_answer answer;
    double best = -1;
    bool ok = set_up(&s, true, block_tokens, SEQUENCES * (TOKENS / block_tokens) + (1u << 12)) &&
              fill(&s);
    for (uint32_t i = 0; ok && f.snapshots < 2 && i < 1u << 20; i++) { /* until one has it all */
        ok = apply(&s, (ts_command){.op = TS_OP_DRAIN}, &answer);
        ts_books_get_figures(s.books, &f);
    }
    const uint64_t tokens = s.e == NULL ? 0 : s.e->pools[0].books.used;
    for (int i = 0; i < 3 && ok; i++) {
        ts_books_close(s.books);
        ts_engine_free(s.e);
        s.books = NULL;
        s.e = NULL;
        ok = open_books(&s, &start) && start.restored && s.e->pools[0].seqs.live == SEQUENCES &&
             s.e->pools[0].books.used == tokens;
        best = ok && (best < 0 || start.seconds < best) ? start.seconds : best;
        *snapshot_bytes = start.snapshot_bytes;
    }
    if (!ok)
        fprintf(stderr, "tsbench: what was taken over isn't what there was: %s\n", start.why);
    tear_down(&s);
    return ok ? best : -1;
}

int bench_restart(const bench_options *o, json_t *rows)
{
    double without[2] = {0}, with[2] = {0};
    static const uint32_t runs[] = {0, 8};
    static const uint32_t block_tokens[] = {16, 256};
    for (int k = 0; k < 2; k++)
        if (!compare(runs[k], &without[k], &with[k]))
            return 1;
    const double step = with[0] - without[0];
    const double run = ((with[1] - without[1]) - step) / runs[1];
    if (!o->json) {
        printf("%-58s %7.0f ns, with the journal %.0f more\n",
               "a step's begin and end (1 sequence)", without[0] * 1e9, step * 1e9);
        printf("%-58s %7.0f ns, with the journal %.0f more\n", "a run, asked for and done",
               (without[1] - without[0]) / runs[1] * 1e9, run * 1e9);
    }
    json_array_append_new(rows, json_pack("{s:s, s:f, s:f}", "what", "step", "ns_without",
                                          without[0] * 1e9, "ns_more", step * 1e9));
    json_array_append_new(rows, json_pack("{s:s, s:f, s:f}", "what", "run", "ns_without",
                                          (without[1] - without[0]) / runs[1] * 1e9, "ns_more",
                                          run * 1e9));
    for (size_t i = 0; i < sizeof block_tokens / sizeof *block_tokens; i++) {
        uint64_t bytes = 0;
        const double seconds = take_over(block_tokens[i], &bytes);
        if (seconds < 0)
            return 1;
        if (!o->json)
            printf("%u sequences of %u tokens, blocks of %3u: taken over in %.3f s from %.1f MiB\n",
                   SEQUENCES, TOKENS, block_tokens[i], seconds, (double)bytes / (1 << 20));
        json_array_append_new(rows, json_pack("{s:s, s:i, s:f, s:f}", "what", "take over",
                                              "block_tokens", (int)block_tokens[i], "seconds",
                                              seconds, "MiB", (double)bytes / (1 << 20)));
    }
    return bench_restart_workers(o, rows) ? 0 : 1;
}
