/*
 * Which of a plan's kernels a launch takes. Kernels for plain calls have the same bits as those for
 * all calls (test_kernels.c), so no other test sees a wrong choice that is only slower. Needs no
 * GPU: a launch of a kernel is noted here, and nothing runs.
 */
#include "no_device.h"

#define SEQS 4u
#define LONGEST 1500u /* tokens */
#define HEADS 8u
#define KV_HEADS 2u

static const void *launched[8];
static uint32_t num_launched;

cudaError_t __wrap_cudaLaunchKernel(const void *function, dim3 blocks, dim3 threads,
                                    void **arguments, size_t bytes, cudaStream_t stream);
cudaError_t __wrap_cudaLaunchKernel(const void *function, dim3 blocks, dim3 threads,
                                    void **arguments, size_t bytes, cudaStream_t stream)
{
    (void)blocks, (void)threads, (void)arguments, (void)bytes, (void)stream;
    assert_in_range(num_launched, 0, sizeof launched / sizeof *launched - 1);
    launched[num_launched++] = function;
    return cudaSuccess;
}

/* Without a device it is an error, which isn't any launch's. */
cudaError_t __wrap_cudaGetLastError(void);
cudaError_t __wrap_cudaGetLastError(void)
{
    return cudaSuccess;
}

ts_status ts_gpu_load_begin(ts_gpu *g, char *w, size_t bytes)
{
    (void)g, (void)w, (void)bytes;
    return TS_OK;
}

void ts_gpu_load_end(ts_gpu *g)
{
    (void)g;
}

ts_status ts_gpu_launch_reserve(ts_gpu_launch *l, size_t bytes)
{
    (void)l, (void)bytes;
    return TS_OK;
}

ts_status ts_gpu_launch_scratch(ts_gpu_launch *l, size_t bytes, size_t counters)
{
    (void)l, (void)bytes, (void)counters;
    return TS_OK;
}

ts_status ts_gpu_launch_fail(ts_gpu_launch *l, cudaError_t error)
{
    (void)l;
    return error == cudaSuccess ? TS_OK : TS_EDEVICE;
}

ts_status ts_gpu_launch_words(ts_gpu_launch *l, const ts_gpu_signal *signals, uint32_t count,
                              const ts_gpu_signal *end)
{
    (void)l, (void)signals, (void)count, (void)end;
    return TS_OK;
}

ts_status ts_gpu_launch_signal(ts_gpu_launch *l, const ts_gpu_signal *signals, uint32_t count)
{
    (void)l, (void)signals, (void)count;
    return TS_OK;
}

/* Those of one list that a launch chooses among. */
typedef enum chosen { GENERAL, TEAMS, PLAIN, PLAIN_TEAMS, CLOSE, CHOICES } chosen;

static const char *const names[] = {"general", "teams", "plain", "plain, teams", "close"};

/* Caches and types of rows that choices are made for. */
typedef enum kind { BF16, FP16, FP8, ROWS_FP32, DIMS_64, DIMS_256, BLOCKS_48, BLOCKS_24 } kind;

static const struct {
    ts_dtype dtype, io;
    uint32_t head_dim, block_tokens;
} kinds[] = {
    [BF16] = {TS_DTYPE_BF16, TS_DTYPE_BF16, 128, 16},
    [FP16] = {TS_DTYPE_FP16, TS_DTYPE_FP16, 128, 16},
    [FP8] = {TS_DTYPE_FP8_E4M3, TS_DTYPE_BF16, 128, 16},
    [ROWS_FP32] = {TS_DTYPE_BF16, TS_DTYPE_FP32, 128, 16},
    [DIMS_64] = {TS_DTYPE_BF16, TS_DTYPE_BF16, 64, 16},
    [DIMS_256] = {TS_DTYPE_BF16, TS_DTYPE_BF16, 256, 16},
    [BLOCKS_48] = {TS_DTYPE_BF16, TS_DTYPE_BF16, 128, 48},
    [BLOCKS_24] = {TS_DTYPE_BF16, TS_DTYPE_BF16, 128, 24},
};

/* Runs of a launch, and what it is to take. */
typedef struct choice {
    const char *what;
    chosen expected;
    kind kind;
    uint32_t tokens[2]; /* of each sequence of a run; of the second run 0: there is one */
    bool shares[2];     /* whether a run's sequences have all but their last block in common */
    bool slopes[2];     /* whether a run's scores have ALiBi's */
    uint32_t processors;
    ts_attention_variant variant;
} choice;

/* A run has four sequences with two KV heads: 8 blocks of threads are one wave on 132 processors.
 * On two processors they are two waves of 6, or one of 8 of the kernel that leaves more room; two
 * runs' blocks on four are as many. */
static const choice choices[] = {
    {"a plain call", PLAIN, BF16, {300}, {0}, {0}, 132, {.scale = 1}},
    {"fp16", PLAIN, FP16, {300}, {0}, {0}, 132, {.scale = 1}},
    {"fp8", PLAIN, FP8, {300}, {0}, {0}, 132, {.scale = 1}},
    {"64 dimensions", PLAIN, DIMS_64, {300}, {0}, {0}, 132, {.scale = 1}},
    {"blocks of 48", PLAIN, BLOCKS_48, {300}, {0}, {0}, 132, {.scale = 1}},
    {"a scale below 0", PLAIN, BF16, {300}, {0}, {0}, 132, {.scale = -1}},
    {"two plain runs", PLAIN, BF16, {300, 200}, {0}, {0}, 132, {.scale = 1}},
    {"a wave to spare", CLOSE, BF16, {300}, {0}, {0}, 2, {.scale = 1}},
    {"a wave of fp16", CLOSE, FP16, {300}, {0}, {0}, 2, {.scale = 1}},
    {"a wave of fp8", PLAIN, FP8, {300}, {0}, {0}, 2, {.scale = 1}},
    {"a wave of 64 dimensions", PLAIN, DIMS_64, {300}, {0}, {0}, 2, {.scale = 1}},
    {"a wave of two runs", CLOSE, BF16, {300, 150}, {0}, {0}, 4, {.scale = 1}},
    {"a second run that fills in", PLAIN, BF16, {300, 149}, {0}, {0}, 4, {.scale = 1}},
    {"a first run that fills in", PLAIN, BF16, {149, 300}, {0}, {0}, 4, {.scale = 1}},
    {"sharers", PLAIN_TEAMS, BF16, {1500}, {true}, {0}, 132, {.scale = 1}},
    {"sharers of fp8", PLAIN_TEAMS, FP8, {1500}, {true}, {0}, 132, {.scale = 1}},
    {"sharers in the second run", PLAIN_TEAMS, BF16, {300, 1500}, {0, 1}, {0}, 132, {.scale = 1}},
    {"fp32 rows", GENERAL, ROWS_FP32, {300}, {0}, {0}, 132, {.scale = 1}},
    {"256 dimensions", GENERAL, DIMS_256, {300}, {0}, {0}, 132, {.scale = 1}},
    {"blocks of 24", GENERAL, BLOCKS_24, {300}, {0}, {0}, 132, {.scale = 1}},
    {"a window", GENERAL, BF16, {300}, {0}, {0}, 132, {.scale = 1, .window = 1u << 20}},
    {"a window, and a wave", GENERAL, BF16, {300}, {0}, {0}, 2, {.scale = 1, .window = 64}},
    {"a soft cap", GENERAL, BF16, {300}, {0}, {0}, 132, {.scale = 1, .soft_cap = 30}},
    {"a rotation", GENERAL, BF16, {300}, {0}, {0}, 132, {.scale = 1, .rope = {.theta = 10000}}},
    {"slopes", GENERAL, BF16, {300}, {0}, {true}, 132, {.scale = 1}},
    {"slopes in the second run", GENERAL, BF16, {300, 200}, {0}, {0, 1}, 132, {.scale = 1}},
    {"sharers, a window", TEAMS, BF16, {1500}, {true}, {0}, 132, {.scale = 1, .window = 9999}},
    {"sharers, slopes", TEAMS, BF16, {1500}, {true}, {true}, 132, {.scale = 1}},
    {"sharers beside slopes", TEAMS, BF16, {1500, 300}, {true}, {0, 1}, 132, {.scale = 1}},
};

/* A plan of SEQS sequences of so many new tokens each. */
static ts_gpu_plan *plan_of(const ts_geometry *geometry, ts_dtype io, ts_kernel kernel,
                            uint32_t q_tokens, uint32_t tokens, bool shares)
{
    static uint32_t tables[SEQS][LONGEST];
    ts_attention_seq seqs[SEQS];
    const uint32_t last = (tokens - 1) / geometry->block_tokens;
    ts_gpu_plan *plan;
    for (uint32_t i = 0; i < SEQS; i++) {
        for (uint32_t n = 0; n <= last; n++)
            tables[i][n] = n + (shares && n < last ? 0 : i * LONGEST);
        seqs[i] =
            (ts_attention_seq){.q_tokens = q_tokens, .kv_tokens = tokens, .blocks = tables[i]};
    }
    if (ts_gpu_plan_new(&gpu, geometry, HEADS, io, kernel, seqs, SEQS, &plan, why, sizeof why) !=
        TS_OK)
        fail_msg("%s", why);
    return plan;
}

static void launch(const ts_attention_variant *variant, const ts_gpu_run *runs, uint32_t num_runs)
{
    ts_gpu_stream_slot slot = {0};
    ts_gpu_launch l = {.gpu = &gpu, .slot = &slot};
    num_launched = 0;
    assert_int_equal(ts_gpu_launch_attend(&l, NULL, variant, runs, num_runs), TS_OK);
}

static void a_launch_takes_the_kernel_that_its_calls_allow(void **state)
{
    (void)state;
    static const float slopes[HEADS];
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++) {
        const choice *c = &choices[i];
        const ts_geometry geometry = {.layers = 1,
                                      .kv_heads = KV_HEADS,
                                      .head_dim = kinds[c->kind].head_dim,
                                      .block_tokens = kinds[c->kind].block_tokens,
                                      .dtype = kinds[c->kind].dtype};
        const uint32_t num_runs = c->tokens[1] > 0 ? 2 : 1;
        ts_gpu_plan *plans[2];
        ts_gpu_run runs[2];
        gpu.info.processors = c->processors;
        for (uint32_t r = 0; r < num_runs; r++) {
            plans[r] =
                plan_of(&geometry, kinds[c->kind].io, TS_KERNEL_V5, 1, c->tokens[r], c->shares[r]);
            assert_int_equal(plans[r]->shared != NULL, c->shares[r]);
            runs[r] = (ts_gpu_run){.plan = plans[r], .alibi = c->slopes[r] ? slopes : NULL};
        }
        launch(&c->variant, runs, num_runs);
        const ts_gpu_plan *p = plans[0];
        const void *const kernels[] = {p->kernels[LIST_NARROW].function, p->team_kernel.function,
                                       p->plain_kernel.function, p->plain_team_kernel.function,
                                       p->close_kernel.function};
        assert_int_equal(num_launched, 1);
        for (chosen k = 0; k < CHOICES; k++)
            if ((kernels[k] == launched[0]) != (k == c->expected))
                fail_msg("%s: the launch %s the kernel \"%s\"", c->what,
                         k == c->expected ? "doesn't take" : "takes", names[k]);
        for (uint32_t r = 0; r < num_runs; r++)
            ts_gpu_plan_free(plans[r]);
    }
}

/* wgmma's for many rows and for few: as they are, or the one that varies scores. */
static void wgmma_varies_scores_where_a_call_does(void **state)
{
    (void)state;
    static const float slopes[HEADS];
    static const ts_attention_variant variants[] = {
        {.scale = 0.125f},
        {.scale = 0.125f, .window = 100},
        {.scale = 0.125f, .rope = {.theta = 10000}},
        {.scale = 0.125f},
        {.scale = 0.125f, .soft_cap = 30},
        {.scale = -0.125f},
        {.scale = 0},
    };
    const ts_geometry geometry = {.layers = 1,
                                  .kv_heads = KV_HEADS,
                                  .head_dim = 128,
                                  .block_tokens = 24,
                                  .dtype = TS_DTYPE_BF16};
    gpu.info.warp_groups = true;
    gpu.info.processors = 132;
    for (uint32_t q_tokens = 8; q_tokens <= 200; q_tokens += 192)
        for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
            ts_gpu_plan *plan =
                plan_of(&geometry, TS_DTYPE_BF16, TS_KERNEL_WGMMA, q_tokens, 300, false);
            const ts_gpu_list list = q_tokens == 8 ? LIST_FEW : LIST_WGMMA;
            const ts_gpu_run run = {.plan = plan, .alibi = i == 3 ? slopes : NULL};
            assert_true(plan->count[list] > 0);
            launch(&variants[i], &run, 1);
            assert_in_range(num_launched, 1, 2); /* what appends comes first */
            assert_ptr_not_equal(plan->varied_wgmma.function, plan->kernels[list].function);
            assert_ptr_equal(launched[num_launched - 1],
                             i < 3 ? plan->kernels[list].function : plan->varied_wgmma.function);
            ts_gpu_plan_free(plan);
        }
    gpu.info.warp_groups = false;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_launch_takes_the_kernel_that_its_calls_allow),
        cmocka_unit_test(wgmma_varies_scores_where_a_call_does),
    };
    return cmocka_run_group_tests(tests, make_gpu, NULL);
}
