/* Storms of appends, forks and frees through ts_engine_apply, in one thread, without a daemon. */
#include "tsbench.h"

#include "engine.h"
#include "invariants.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEQS 1024u
#define ROUNDS 64u /* of one block each, per sequence */
#define REPEATS 15

typedef struct storm {
    ts_engine *e;
    uint64_t session;
    uint64_t seqs[SEQS];
    uint32_t tokens[SEQS];
    bool wrong;
} storm;

static void on_problem(void *arg, const char *sentence)
{
    storm *s = arg;
    s->wrong = true;
    fprintf(stderr, "tsbench: %s\n", sentence);
}

static bool apply(storm *s, ts_command c, ts_answer *answer)
{
    c.session = s->session;
    for (;;) {
        ts_engine_apply(s->e, &c, answer);
        if (answer->status != TS_NEED_SLABS)
            break;
        ts_answer granted;
        ts_command grant = {.op = TS_OP_SLAB_GRANT,
                            .pool = answer->need.pool,
                            .slab_grant = {.slab = ts_engine_next_slab(s->e, answer->need.pool,
                                                                       answer->need.tenant),
                                           .tenant = answer->need.tenant}};
        ts_engine_apply(s->e, &grant, &granted);
    }
    if (answer->status != TS_OK)
        fprintf(stderr, "tsbench: %s: %s\n", ts_status_name(answer->status), answer->message);
    return answer->status == TS_OK;
}

static bool start(storm *s)
{
    ts_answer answer;
    ts_engine_limits limits;
    ts_engine_default_limits(&limits);
    s->e = ts_engine_new(&limits);
    ts_pool_config config = {
        .name = "bench",
        .geometry = {.layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = 16},
        .num_blocks = 1u << 20,
        .slab_blocks = 1u << 12,
        .sequences_max = 1u << 20,
        .sequence_tokens_max = 1u << 20,
        .tenant_blocks_max = UINT64_MAX,
        .client_write = TS_CLIENT_WRITE_ALL,
    };
    if (s->e == NULL ||
        !apply(s, (ts_command){.op = TS_OP_POOL_ADD, .pool_add.config = &config}, &answer))
        return false;
    if (!apply(s, (ts_command){.op = TS_OP_SESSION_OPEN, .session_open = {.program = "tsbench"}},
               &answer))
        return false;
    s->session = answer.session;
    return apply(
        s, (ts_command){.op = TS_OP_POOL_OPEN, .pool_open = {.name = "bench", .writable = true}},
        &answer);
}

/* One storm; seconds of each kind of command, and whether the counts came out. */
static bool blow(storm *s, double *append, double *fork, double *release)
{
    ts_answer answer;
    ts_pool_books *books = &s->e->pools[0].books;
    if (!apply(s, (ts_command){.op = TS_OP_SEQ_CREATE, .seq_create = {.count = SEQS}}, &answer))
        return false;
    memcpy(s->seqs, answer.seqs.seqs, sizeof s->seqs);
    for (uint32_t i = 0; i < SEQS; i++)
        s->tokens[i] = 16;
    ts_command add = {
        .op = TS_OP_STEP_BEGIN,
        .step_begin = {.seqs = s->seqs, .new_tokens = s->tokens, .count = SEQS, .append = true}};
    double t = bench_now();
    for (uint32_t i = 0; i < ROUNDS; i++)
        if (!apply(s, add, &answer))
            return false;
    *append = bench_now() - t;
    if (books->used != SEQS * ROUNDS)
        return false;
    ts_command branch = {.op = TS_OP_SEQ_FORK, .seq_fork = {.parent = s->seqs[0], .count = SEQS}};
    t = bench_now();
    if (!apply(s, branch, &answer))
        return false;
    *fork = bench_now() - t;
    uint64_t *forks = malloc(SEQS * sizeof *forks);
    if (forks == NULL || books->used != SEQS * ROUNDS || books->shared != ROUNDS)
        return false;
    memcpy(forks, answer.seqs.seqs, SEQS * sizeof *forks);
    ts_command drop = {.op = TS_OP_SEQ_FREE, .seq_batch = {.seqs = forks, .count = SEQS}};
    bool ok = apply(s, drop, &answer);
    free(forks);
    drop.seq_batch.seqs = s->seqs;
    t = bench_now();
    ok = ok && apply(s, drop, &answer);
    *release = bench_now() - t;
    return ok && books->used == 0;
}

int bench_alloc(const bench_options *o, json_t *rows)
{
    static const char *const names[] = {"append (blocks taken)", "fork (blocks shared)",
                                        "free (blocks given back)"};
    double took[3][REPEATS];
    storm s = {0};
    bool ok = start(&s);
    for (int i = 0; ok && i < REPEATS; i++) {
        ok = blow(&s, &took[0][i], &took[1][i], &took[2][i]);
        ts_invariants_check(s.e, on_problem, &s);
        ok = ok && !s.wrong;
    }
    ts_engine_free(s.e);
    if (!ok) {
        fprintf(stderr, "tsbench: the counts are wrong: nothing was measured\n");
        return 1;
    }
    if (!o->json)
        printf("%-26s %14s %14s\n", "inside the engine", "p50 blocks/s", "slowest");
    for (int k = 0; k < 3; k++) {
        double blocks = (double)SEQS * ROUNDS;
        double p50 = blocks / bench_percentile(took[k], REPEATS, 50);
        double slow = blocks / took[k][REPEATS - 1];
        if (!o->json)
            printf("%-26s %12.1f M %12.1f M\n", names[k], p50 * 1e-6, slow * 1e-6);
        json_array_append_new(rows, json_pack("{s:s, s:f, s:f}", "what", names[k],
                                              "blocks_per_second_p50", p50,
                                              "blocks_per_second_slowest", slow));
    }
    return 0;
}
