/*
 * Sequences that begin with the same blocks, whose chunks are common pieces of work: each has the
 * bits that it has alone, whoever the others are. Needs a GPU; exits with 77 where there is none.
 */
#include "device_problem.h"

#include "plan.h"

#define SEQS 14u

/* Of SEQS sequences: tokens, and how many of which earlier one's it begins with, in whole blocks.
 * They share much and little, with one another and with the first; some are cut into other chunks,
 * one shares less than a chunk, one has a table of its own. */
typedef struct relation {
    uint32_t tokens, with, shared;
} relation;
static const relation family[SEQS] = {
    {1540, 0, 0},    {1300, 0, 1024}, {1301, 0, 1024}, {1100, 0, 1024}, {1030, 0, 1024},
    {2500, 0, 1024}, {1600, 0, 256},  {1700, 6, 1280}, {1299, 6, 1280}, {700, 0, 640},
    {4200, 0, 1024}, {4500, 0, 1024}, {300, 0, 240},   {900, 0, 0},
};

/* Tables become the family's, and blocks that no sequence has any more NaN. */
static void share_blocks(problem *p)
{
    const size_t bytes = ts_geometry_block_bytes(&p->call.geometry);
    const uint32_t block_tokens = p->call.geometry.block_tokens;
    bool *used = calloc(p->cache_bytes / bytes, sizeof *used);
    for (uint32_t i = 0; i < SEQS; i++) {
        memcpy(p->tables[i], p->tables[family[i].with],
               family[i].shared / block_tokens * sizeof(uint32_t));
        for (uint32_t b = 0; b * block_tokens < p->seqs[i].kv_tokens; b++)
            used[p->tables[i][b]] = true;
    }
    for (size_t b = 0; b < p->cache_bytes / bytes; b++)
        if (!used[b])
            memset(p->cache + b * bytes, 0xff, bytes);
    free(used);
}

/* One sequence's q times a factor. */
static void scale_q(problem *p, uint32_t i, float factor)
{
    const size_t row = (size_t)p->call.heads * p->call.geometry.head_dim;
    for (size_t e = 0; e < p->seqs[i].q_tokens * row; e++) {
        unsigned char *q = (unsigned char *)(uintptr_t)p->seqs[i].q;
        put(q, p->call.io_dtype, e, factor * get(q, p->call.io_dtype, e));
    }
}

/* Every second one's scores are so far apart that what weights are measured from moves often. */
static void family_new(device_problem *d, shape s, variety v, uint32_t q_tokens)
{
    uint32_t lengths[SEQS][2];
    rng r = {s.head_dim + q_tokens};
    for (uint32_t i = 0; i < SEQS; i++) {
        lengths[i][0] = family[i].tokens;
        lengths[i][1] = q_tokens;
    }
    problem_new(&d->p, s, (const uint32_t(*)[2])lengths, SEQS, &r);
    share_blocks(&d->p);
    for (uint32_t i = 0; i < SEQS; i += 2)
        scale_q(&d->p, i, 8);
    problem_vary(&d->p, v, &r);
    device_problem_upload(d, s, v);
}

static void run_some(device_problem *d, uint32_t first, uint32_t count)
{
    ts_attention_call call = d->call;
    call.seqs = d->seqs + first;
    call.num_seqs = count;
    poison_device(d);
    run(d, &call, TS_KERNEL_AUTO);
}

/* How many members the teams of these sequences have. */
static uint32_t members_of(const device_problem *d, uint32_t first, uint32_t count)
{
    uint32_t members = 0;
    ts_gpu_plan *plan;
    OK(ts_gpu_plan_new(gpu, &d->call.geometry, d->call.heads, d->call.io_dtype, TS_KERNEL_AUTO,
                       d->seqs + first, count, &plan, why, sizeof why));
    for (uint32_t i = 0; plan->shared != NULL && i < count; i++)
        members += plan->shared[i] > 0;
    ts_gpu_plan_free(plan);
    return members;
}

/* Each alone, which is held against the reference; then in company, but for `but`: SEQS, or one
 * whose q isn't what it was. */
static void check_company(device_problem *d, unsigned char **alone, uint32_t but, const char *what)
{
    static const uint32_t some[][2] = {{0, SEQS}, {0, 2}, {1, 5}, {6, 3}, {2, 11}};
    unsigned char *ours = malloc(d->q_bytes + d->p.lse_elements * sizeof(float));
    for (size_t n = 0; n < sizeof some / sizeof *some; n++) {
        assert_true(members_of(d, some[n][0], some[n][1]) >= 2);
        run_some(d, some[n][0], some[n][1]);
        for (uint32_t i = some[n][0]; i < some[n][0] + some[n][1]; i++) {
            const size_t bytes = result_of(d, i, ours);
            if (i != but && memcmp(ours, alone[i], bytes) != 0)
                fail_msg("%s cache, %u/%u heads of %u, %u new: %s: sequence %u has other bits "
                         "beside %u from %u on",
                         ts_dtype_name(d->call.geometry.dtype), d->call.heads,
                         d->call.geometry.kv_heads, d->call.geometry.head_dim, d->seqs[i].q_tokens,
                         what, i, some[n][1], some[n][0]);
        }
    }
    free(ours);
}

static void check_family(shape s, variety v, uint32_t q_tokens)
{
    unsigned char *alone[SEQS];
    device_problem d;
    family_new(&d, s, v, q_tokens);
    ts_attention *host = ts_attention_new(0, TS_ISA_AUTO);
    assert_int_equal(ts_attention_run(host, &d.p.call), TS_OK); /* writes the new K and V */
    ts_attention_free(host);
    for (uint32_t i = 0; i < SEQS; i++) {
        run_some(&d, i, 1);
        double *ref = reference_of(&d.p, &d.p.seqs[i]);
        double error = relative_error(&d.p, &d.p.seqs[i], ref);
        if (!(error <= (s.io == TS_DTYPE_FP16 ? 1e-3 : 8e-3)))
            fail_msg("%s cache, sequence %u: relative error %g", ts_dtype_name(s.dtype), i, error);
        free(ref);
        alone[i] = malloc(d.q_bytes + d.p.lse_elements * sizeof(float));
        (void)result_of(&d, i, alone[i]);
    }
    check_company(&d, alone, SEQS, "as they are");
    /* One of them has NaN and infinities for q. */
    scale_q(&d.p, 3, INFINITY);
    to_device(d.q, d.p.q, d.q_bytes);
    check_company(&d, alone, 3, "one's q isn't finite");
    for (uint32_t i = 0; i < SEQS; i++)
        free(alone[i]);
    device_problem_free(&d);
}

static const variety shared_varieties[] = {
    {0},
    {.alibi = true, .sinks = true},
    {.soft_cap = 20, .rope_theta = 10000},
    {.window = 700},
    {.soft_cap = 5, .alibi = true, .window = 1030},
};
#define SHARED_VARIETIES (sizeof shared_varieties / sizeof *shared_varieties)

static void a_sequence_has_the_bits_that_it_has_alone_whoever_shares_its_prefix(void **state)
{
    (void)state;
    static const uint32_t heads[][3] = {{4, 1, 128}, {8, 2, 64}, {5, 1, 72}, {2, 2, 128}};
    static const ts_dtype dtypes[] = {TS_DTYPE_BF16, TS_DTYPE_FP16, TS_DTYPE_FP8_E4M3};
    for (size_t i = 0; i < 12; i++) {
        const uint32_t *h = heads[i / 3];
        const ts_dtype dtype = dtypes[i % 3];
        const shape s = {.dtype = dtype,
                         .io = dtype == TS_DTYPE_FP16 ? TS_DTYPE_FP16 : TS_DTYPE_BF16,
                         .layout = (ts_layout)(i % 2),
                         .heads = h[0],
                         .kv_heads = h[1],
                         .head_dim = dtype == TS_DTYPE_FP8_E4M3 && h[2] == 72 ? 80 : h[2],
                         .block_tokens = 16,
                         .layers = 1};
        for (size_t v = 0; v < SHARED_VARIETIES; v++)
            if (v == 0 || v == 1 + i % 4)
                check_family(s, shared_varieties[v], i % 2 + 1 == 2 && h[0] / h[1] <= 4 ? 2 : 1);
    }
}

/* Blocks whose borders aren't chunks' borders. */
static void blocks_of_any_size_are_shared(void **state)
{
    (void)state;
    static const uint32_t blocks[] = {7, 24, 100};
    for (size_t i = 0; i < 3; i++)
        check_family((shape){.dtype = TS_DTYPE_BF16,
                             .io = TS_DTYPE_BF16,
                             .heads = 4,
                             .kv_heads = 1,
                             .head_dim = 64,
                             .block_tokens = blocks[i],
                             .layers = 1},
                     (variety){0}, 1);
}

static ts_gpu_run run_over(const device_problem *d, const ts_gpu_plan *plan, uint32_t first)
{
    const ts_attention_seq *s = &d->seqs[first];
    return (ts_gpu_run){.plan = plan,
                        .q = s->q,
                        .k = s->k,
                        .v = s->v,
                        .out = s->out,
                        .scales = s->scales,
                        .lse = s->lse};
}

static const shape plain = {.dtype = TS_DTYPE_BF16,
                            .io = TS_DTYPE_BF16,
                            .heads = 4,
                            .kv_heads = 1,
                            .head_dim = 128,
                            .block_tokens = 16,
                            .layers = 1};

/* Bytes of everything that came out, and a copy of them. */
static unsigned char *all_of(const device_problem *d, size_t *bytes)
{
    *bytes = d->q_bytes + d->p.lse_elements * sizeof(float);
    unsigned char *copy = malloc(*bytes);
    memcpy(copy, d->p.out, d->q_bytes);
    memcpy(copy + d->q_bytes, d->p.lse, *bytes - d->q_bytes);
    return copy;
}

static void runs_of_one_launch_each_share_their_own(void **state)
{
    (void)state;
    static const uint32_t firsts[] = {0, 4, 6, 9, SEQS};
    device_problem d;
    ts_gpu_plan *plans[4];
    ts_gpu_run runs[4];
    size_t bytes;
    family_new(&d, plain, (variety){0}, 1);
    run_some(&d, 0, SEQS);
    unsigned char *together = all_of(&d, &bytes);
    for (int i = 0; i < 4; i++) {
        OK(ts_gpu_plan_new(gpu, &d.call.geometry, d.call.heads, d.call.io_dtype, TS_KERNEL_AUTO,
                           d.seqs + firsts[i], firsts[i + 1] - firsts[i], &plans[i], why,
                           sizeof why));
        runs[i] = run_over(&d, plans[i], firsts[i]);
    }
    launch_runs(&d, runs, 4);
    unsigned char *apart = all_of(&d, &bytes);
    assert_memory_equal(together, apart, bytes);
    for (int i = 0; i < 4; i++)
        ts_gpu_plan_free(plans[i]);
    free(together);
    free(apart);
    device_problem_free(&d);
}

/* One plan for batches with sharers and without, which has no teams. */
static void a_persistent_plan_gives_sharers_the_same_bits(void **state)
{
    (void)state;
    static const uint32_t some[][2] = {{0, SEQS}, {12, 2}, {5, 1}, {0, 5}, {0, SEQS}};
    device_problem d;
    ts_gpu_plan *plan;
    size_t bytes;
    family_new(&d, plain, (variety){0}, 1);
    OK(ts_gpu_plan_new_persistent(gpu, &d.call.geometry, d.call.heads, d.call.io_dtype,
                                  TS_KERNEL_AUTO, &(ts_gpu_plan_limits){SEQS, 1, 30000, NULL},
                                  &plan, why, sizeof why));
    for (size_t n = 0; n < sizeof some / sizeof *some; n++) {
        run_some(&d, some[n][0], some[n][1]);
        unsigned char *expected = all_of(&d, &bytes);
        OK(ts_gpu_plan_set(plan, d.seqs + some[n][0], some[n][1], why, sizeof why));
        const ts_gpu_run run = run_over(&d, plan, some[n][0]);
        launch_runs(&d, &run, 1);
        unsigned char *ours = all_of(&d, &bytes);
        assert_memory_equal(ours, expected, bytes);
        free(expected);
        free(ours);
    }
    assert_null(plan->shared);
    ts_gpu_plan_free(plan);
    device_problem_free(&d);
}

/* A sequence falls back into what it shared, which becomes its own there: a block in the middle of
 * its table is another one, and its new tokens lie before what its team had in common. */
static void a_renewed_plan_shares_what_is_still_shared(void **state)
{
    (void)state;
    uint32_t lengths[][2] = {{1540, 2}, {1026, 2}, {1300, 2}, {1026, 2}};
    enum { COUNT = sizeof lengths / sizeof *lengths };
    rng r = {3};
    device_problem d;
    ts_gpu_plan *plan = NULL;
    size_t bytes;
    problem_new(&d.p, plain, (const uint32_t(*)[2])lengths, COUNT, &r);
    uint32_t own[2] = {d.p.tables[1][63], d.p.tables[3][10]};
    for (uint32_t i = 1; i < COUNT; i++)
        memcpy(d.p.tables[i], d.p.tables[0], 64 * sizeof(uint32_t));
    problem_vary(&d.p, (variety){0}, &r);
    device_problem_upload(&d, plain, (variety){0});
    for (int step = 0; step < 4; step++) {
        if (step == 2) { /* a token less: its last but one is written where four chunks end */
            d.seqs[1].kv_tokens--;
            d.p.tables[1][63] = own[0];
        }
        if (step == 3)
            d.p.tables[3][10] = own[1];
        run_some(&d, 0, COUNT);
        unsigned char *expected = all_of(&d, &bytes);
        OK(ts_gpu_plan_renew(gpu, &d.call.geometry, d.call.heads, d.call.io_dtype, TS_KERNEL_AUTO,
                             d.seqs, COUNT, &plan, why, sizeof why));
        assert_int_equal(plan->renewals, step == 1);
        assert_int_equal(plan->shared[1], step < 2 ? 4 : 3);
        assert_int_equal(plan->shared[2] > 0, true);
        const ts_gpu_run run = run_over(&d, plan, 0);
        launch_runs(&d, &run, 1);
        unsigned char *ours = all_of(&d, &bytes);
        assert_memory_equal(ours, expected, bytes);
        free(expected);
        free(ours);
    }
    ts_gpu_plan_free(plan);
    device_problem_free(&d);
}

/* Teams are made however little they spare. */
static int allow_teams(void **state)
{
    (void)state;
    gpu->team_tokens = 0;
    return 0;
}

static void few_sharers_are_no_team(void **state)
{
    (void)state;
    device_problem d;
    family_new(&d, plain, (variety){0}, 1);
    assert_true(members_of(&d, 0, SEQS) >= 2);
    gpu->team_tokens = TS_GPU_TEAM_TOKENS;
    assert_int_equal(members_of(&d, 0, SEQS), 0);
    gpu->team_tokens = 0;
    device_problem_free(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(a_sequence_has_the_bits_that_it_has_alone_whoever_shares_its_prefix,
                               allow_teams),
        cmocka_unit_test_setup(blocks_of_any_size_are_shared, allow_teams),
        cmocka_unit_test_setup(runs_of_one_launch_each_share_their_own, allow_teams),
        cmocka_unit_test_setup(a_persistent_plan_gives_sharers_the_same_bits, allow_teams),
        cmocka_unit_test_setup(a_renewed_plan_shares_what_is_still_shared, allow_teams),
        cmocka_unit_test_setup(few_sharers_are_no_team, allow_teams),
    };
    return run_gpu_tests(tests, sizeof tests / sizeof *tests);
}
