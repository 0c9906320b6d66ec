/*
 * Plans from one step to the next. Persistent ones: one CUDA graph, captured once, serves batch
 * after batch with the bits that a launch of each batch by itself has. Those that are renewed, the
 * same. Needs a GPU; exits with 77 where there is none.
 */
#include "device_problem.h"

#include "plan.h"

#define SEQS 8u

/* Of q_tokens new tokens each: cut into chunks and not, at a block's border and beside it. */
static const uint32_t totals[SEQS] = {5000, 17, 1408, 1409, 64, 300, 12000, 33};

typedef struct captured {
    ts_gpu_plan *plan;
    ts_gpu_launch *launch;
    cudaGraphExec_t graph;
} captured;

static ts_gpu_run run_over(const device_problem *d, const ts_gpu_plan *plan)
{
    return (ts_gpu_run){.plan = plan,
                        .layer = d->seqs[0].layer,
                        .q = d->q,
                        .k = d->k,
                        .v = d->v,
                        .out = d->out,
                        .scales = d->seqs[0].scales,
                        .lse = d->lse};
}

/* Captures one run over a plan for the limits, which has no sequences yet. */
static void capture(captured *x, const device_problem *d, const ts_gpu_plan_limits *limits)
{
    cudaGraph_t graph;
    OK(ts_gpu_plan_new_persistent(gpu, &d->call.geometry, d->call.heads, d->call.io_dtype,
                                  TS_KERNEL_AUTO, limits, &x->plan, why, sizeof why));
    x->launch = ts_gpu_launch_take(gpu, NULL);
    assert_non_null(x->launch);
    OK(ts_gpu_launch_prepare(x->launch, x->plan));
    cudaStream_t stream = ts_gpu_launch_stream(x->launch);
    const ts_gpu_run run = run_over(d, x->plan);
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    if (ts_gpu_launch_attend(x->launch, d->call.base, &d->call.variant, &run, 1) != TS_OK)
        fail_msg("%s", ts_gpu_launch_why(x->launch));
    CUDA_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_OK(cudaGraphInstantiate(&x->graph, graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
}

static void replay(captured *x)
{
    CUDA_OK(cudaGraphLaunch(x->graph, ts_gpu_launch_stream(x->launch)));
    CUDA_OK(cudaStreamSynchronize(ts_gpu_launch_stream(x->launch)));
}

static void graph_free(captured *x)
{
    CUDA_OK(cudaGraphExecDestroy(x->graph));
    OK(ts_gpu_launch_finish(x->launch, NULL, NULL));
    ts_gpu_plan_free(x->plan);
}

static void read_out(const device_problem *d, unsigned char *out)
{
    CUDA_OK(cudaMemcpy(out, d->out, d->q_bytes, cudaMemcpyDeviceToHost));
    CUDA_OK(cudaMemcpy(out + d->q_bytes, d->lse, d->p.lse_elements * sizeof(float),
                       cudaMemcpyDeviceToHost));
}

static void check_nothing_is_written(captured *x, device_problem *d, unsigned char *out,
                                     size_t bytes)
{
    poison_device(d);
    replay(x);
    read_out(d, out);
    for (size_t i = 0; i < bytes; i++)
        assert_int_equal(out[i], 0xff);
}

/* Batches of sequences first..first+count-1, whose rows are the exchange's first. */
static void check_batches(shape s, uint32_t q_tokens)
{
    static const uint32_t batches[][2] = {{0, SEQS}, {3, 2}, {6, 1}, {0, 1}, {1, 7}, {0, SEQS}};
    uint32_t lengths[SEQS][2];
    rng r = {s.head_dim + q_tokens};
    device_problem d;
    captured x;
    uint64_t all = 0;
    for (uint32_t i = 0; i < SEQS; i++) {
        lengths[i][0] = totals[i];
        lengths[i][1] = q_tokens;
        all += totals[i];
    }
    device_problem_new(&d, s, (const uint32_t(*)[2])lengths, SEQS, &r);
    size_t bytes = d.q_bytes + d.p.lse_elements * sizeof(float);
    unsigned char *alone = malloc(bytes), *ours = malloc(bytes);
    capture(&x, &d, &(ts_gpu_plan_limits){SEQS, q_tokens, all, d.call.base});
    check_nothing_is_written(&x, &d, ours, bytes);
    for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
        ts_attention_call call = d.call;
        ts_attention_seq seqs[SEQS];
        call.num_seqs = batches[b][1];
        call.seqs = seqs;
        memcpy(seqs, d.seqs + batches[b][0], call.num_seqs * sizeof *seqs);
        seqs[0].q = d.q;
        seqs[0].k = d.k;
        seqs[0].v = d.v;
        seqs[0].out = d.out;
        seqs[0].lse = d.lse;
        poison_device(&d);
        attend(&call, TS_KERNEL_AUTO);
        read_out(&d, alone);
        OK(ts_gpu_plan_set(x.plan, seqs, call.num_seqs, why, sizeof why));
        for (int again = 0; again < 2; again++) { /* counters are 0 again */
            poison_device(&d);
            replay(&x);
            read_out(&d, ours);
            if (memcmp(ours, alone, bytes) != 0)
                fail_msg("%s, %u new tokens, batch %zu: other bits", ts_dtype_name(s.dtype),
                         q_tokens, b);
        }
    }
    OK(ts_gpu_plan_clear(x.plan, why, sizeof why));
    CUDA_OK(cudaDeviceSynchronize());
    check_nothing_is_written(&x, &d, ours, bytes);
    graph_free(&x);
    free(alone);
    free(ours);
    device_problem_free(&d);
}

/* Each of v5's kernels and wgmma, with fewer blocks of threads than pieces and with more. */
static void a_graph_serves_batch_after_batch_with_the_bits_of_each_alone(void **state)
{
    (void)state;
    uint32_t processors = gpu->info.processors;
    assert_in_range(processors, 1, 10000);
    for (int dtype = TS_DTYPE_FP32; dtype < TS_DTYPE_COUNT; dtype++)
        for (uint32_t q_tokens = 1; q_tokens <= 8; q_tokens += q_tokens == 1 ? 3 : 4)
            for (int few = 0; few < 2; few++) {
                gpu->info.processors = few != 0 ? 1 : processors;
                check_batches(
                    (shape){.dtype = (ts_dtype)dtype,
                            .io = dtype == TS_DTYPE_FP8_E4M3 ? TS_DTYPE_BF16 : (ts_dtype)dtype,
                            .heads = 16,
                            .kv_heads = 2,
                            .head_dim = 128,
                            .block_tokens = 16,
                            .layers = 1},
                    q_tokens);
            }
    gpu->info.processors = processors;
}

static void what_a_persistent_plan_has_no_room_for_is_refused_and_changes_nothing(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{70, 1}, {300, 1}, {40, 2}};
    rng r = {7};
    device_problem d;
    captured x;
    device_problem_new(&d,
                       (shape){.dtype = TS_DTYPE_BF16,
                               .io = TS_DTYPE_BF16,
                               .heads = 8,
                               .kv_heads = 2,
                               .head_dim = 64,
                               .block_tokens = 16,
                               .layers = 1},
                       lengths, 3, &r);
    size_t bytes = d.q_bytes + d.p.lse_elements * sizeof(float);
    unsigned char *before = malloc(bytes), *after = malloc(bytes);
    capture(&x, &d, &(ts_gpu_plan_limits){2, 1, 369, NULL});
    OK(ts_gpu_plan_set(x.plan, d.seqs, 1, why, sizeof why));
    poison_device(&d);
    replay(&x);
    read_out(&d, before);
    assert_int_equal(ts_gpu_plan_set(x.plan, d.seqs, 2, why, sizeof why), TS_EINVAL);
    assert_string_equal(why, "2 sequences of 370 tokens; the limits are 2 of 369, with 1 new ones "
                             "each");
    assert_int_equal(ts_gpu_plan_set(x.plan, d.seqs + 2, 1, why, sizeof why), TS_EINVAL);
    assert_int_equal(ts_gpu_plan_set(x.plan, d.seqs, 3, why, sizeof why), TS_EINVAL);
    poison_device(&d);
    replay(&x);
    read_out(&d, after);
    assert_memory_equal(before, after, bytes);
    graph_free(&x);

    ts_gpu_plan *plan = x.plan;
    assert_int_equal(ts_gpu_plan_new_persistent(
                         gpu, &d.call.geometry, 8, TS_DTYPE_BF16, TS_KERNEL_AUTO,
                         &(ts_gpu_plan_limits){2, 100, 1000, NULL}, &plan, why, sizeof why),
                     TS_EINVAL);
    assert_null(plan);
    assert_string_equal(why, "100 query tokens of a bf16 cache, head_dim 64: a persistent plan "
                             "is for what kernels v5 and wgmma decode");
    assert_int_equal(
        ts_gpu_plan_new_persistent(gpu, &d.call.geometry, 8, TS_DTYPE_BF16, TS_KERNEL_V3,
                                   &(ts_gpu_plan_limits){2, 1, 1000, NULL}, &plan, why, sizeof why),
        TS_EINVAL);
    free(before);
    free(after);
    device_problem_free(&d);
}

#define GROWN 40u /* tokens that sequences get */

/* The batch when t of them are there. */
static void at_time(const device_problem *d, uint32_t count, uint32_t t, ts_attention_seq *seqs)
{
    for (uint32_t i = 0; i < count; i++) {
        seqs[i] = d->seqs[i];
        seqs[i].kv_tokens -= GROWN - t;
    }
}

/* Sequences that grow, one of them past the end of a chunk. */
static void check_growth(shape s, uint32_t q_tokens)
{
    uint32_t lengths[][2] = {{5000, 0}, {80, 0}, {1408 + GROWN / 2, 0}, {64, 0}, {300, 0}};
    enum { COUNT = sizeof lengths / sizeof *lengths };
    uint64_t all = 0, remade = 0;
    rng r = {s.head_dim + q_tokens};
    device_problem d;
    captured x;
    for (uint32_t i = 0; i < COUNT; i++) {
        lengths[i][1] = q_tokens;
        all += lengths[i][0];
    }
    device_problem_new(&d, s, (const uint32_t(*)[2])lengths, COUNT, &r);
    size_t bytes = d.q_bytes + d.p.lse_elements * sizeof(float);
    unsigned char *alone = malloc(bytes), *ours = malloc(bytes), *before = malloc(bytes);
    uint32_t *swapped = malloc(lengths[0][0] * sizeof *swapped);
    ts_attention_seq seqs[COUNT];
    ts_attention_call call = d.call;
    call.seqs = seqs;
    ts_gpu_plan *plan = NULL;
    capture(&x, &d, &(ts_gpu_plan_limits){COUNT, q_tokens, all, d.call.base});
    for (uint32_t t = 0; t <= GROWN; t++) {
        at_time(&d, COUNT, t, seqs);
        if (t == 30) { /* nothing but two blocks of one table change places */
            seqs[0].kv_tokens--;
            memcpy(swapped, d.seqs[0].blocks,
                   (lengths[0][0] / s.block_tokens + 1) * sizeof *swapped);
            swapped[3] = d.seqs[0].blocks[200];
            swapped[200] = d.seqs[0].blocks[3];
        }
        if (t >= 30)
            seqs[0].blocks = swapped;
        poison_device(&d);
        attend(&call, TS_KERNEL_AUTO);
        read_out(&d, alone);
        assert_memory_not_equal(alone, before, bytes);
        memcpy(before, alone, bytes);

        OK(ts_gpu_plan_renew(gpu, &d.call.geometry, d.call.heads, d.call.io_dtype, TS_KERNEL_AUTO,
                             seqs, COUNT, &plan, why, sizeof why));
        remade += plan->renewals == 0;
        poison_device(&d);
        const ts_gpu_run run = run_over(&d, plan);
        OK(ts_gpu_launch_attend(x.launch, d.call.base, &d.call.variant, &run, 1));
        CUDA_OK(cudaStreamSynchronize(ts_gpu_launch_stream(x.launch)));
        read_out(&d, ours);
        if (memcmp(ours, alone, bytes) != 0)
            fail_msg("%s, %u new tokens, %u tokens later: other bits from a plan that was renewed",
                     ts_dtype_name(s.dtype), q_tokens, t);

        OK(ts_gpu_plan_set(x.plan, seqs, COUNT, why, sizeof why));
        assert_int_equal(x.plan->renewals, plan->renewals);
        poison_device(&d);
        replay(&x);
        read_out(&d, ours);
        if (memcmp(ours, alone, bytes) != 0)
            fail_msg("%s, %u new tokens, %u tokens later: other bits from a persistent plan",
                     ts_dtype_name(s.dtype), q_tokens, t);
    }
    /* At first, and where what is cut in one piece becomes two. */
    assert_int_equal(remade, s.dtype == TS_DTYPE_FP8_E4M3 ? 1 : 2);
    ts_gpu_plan_free(plan);
    graph_free(&x);
    free(alone);
    free(ours);
    free(before);
    free(swapped);
    device_problem_free(&d);
}

static void a_plan_that_is_renewed_gives_the_bits_of_a_new_one(void **state)
{
    (void)state;
    for (int dtype = TS_DTYPE_FP32; dtype < TS_DTYPE_COUNT; dtype++)
        for (uint32_t q_tokens = 1; q_tokens <= 4; q_tokens += 3)
            check_growth((shape){.dtype = (ts_dtype)dtype,
                                 .io = dtype == TS_DTYPE_FP8_E4M3 ? TS_DTYPE_BF16 : (ts_dtype)dtype,
                                 .heads = 16,
                                 .kv_heads = 8,
                                 .head_dim = 64,
                                 .block_tokens = 16,
                                 .layers = 1},
                         q_tokens);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_plan_that_is_renewed_gives_the_bits_of_a_new_one),
        cmocka_unit_test(a_graph_serves_batch_after_batch_with_the_bits_of_each_alone),
        cmocka_unit_test(what_a_persistent_plan_has_no_room_for_is_refused_and_changes_nothing),
    };
    return run_gpu_tests(tests, sizeof tests / sizeof *tests);
}
