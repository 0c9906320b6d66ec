/*
 * The device's kernels against the float64 reference, and the stored K and V bit for bit against
 * the host's. Needs a GPU; exits with 77 where there is none.
 */
#include "device_problem.h"

#include "plan.h"
#include "waves.h"

static double worst; /* over a test, to be printed */

static void check_variety(shape s, variety v, const uint32_t (*lengths)[2], uint32_t num_seqs,
                          double limit)
{
    rng r = {s.head_dim * 1000003u + s.heads};
    device_problem d;
    device_problem_vary(&d, s, v, lengths, num_seqs, &r);
    /* The host writes the new K and V into its cache: what the device's must equal. */
    ts_attention *host = ts_attention_new(0, TS_ISA_AUTO);
    assert_int_equal(ts_attention_run(host, &d.p.call), TS_OK);
    ts_attention_free(host);
    double **refs = calloc(num_seqs, sizeof *refs);
    for (uint32_t j = 0; j < num_seqs; j++)
        refs[j] = reference_of(&d.p, &d.p.seqs[j]);
    unsigned char *stored = malloc(d.p.cache_bytes), *before = malloc(d.p.cache_bytes);
    CUDA_OK(cudaMemcpy(before, d.memory->base, d.p.cache_bytes, cudaMemcpyDeviceToHost));
    for (int kernel = TS_KERNEL_AUTO; kernel < TS_KERNEL_COUNT; kernel++) {
        if (ts_kernel_check((ts_kernel)kernel, &d.call.geometry, warp_groups(), why, sizeof why) !=
            TS_OK)
            continue;
        to_device(d.memory->base, before, d.p.cache_bytes);
        poison_device(&d);
        run(&d, &d.call, (ts_kernel)kernel);
        for (uint32_t j = 0; j < num_seqs; j++) {
            double error = relative_error(&d.p, &d.p.seqs[j], refs[j]);
            double lse = lse_error(&d.p, &d.p.seqs[j], refs[j]);
            /* mma rounds q and weights to the cache's type, of fp8 to fp16. */
            double rounded = s.dtype == TS_DTYPE_BF16 ? 8e-3 : 1e-3;
            rounded = rounded > limit ? rounded : limit;
            bool rounds = kernel == TS_KERNEL_MMA || kernel == TS_KERNEL_WGMMA;
            worst = !rounds && error > worst ? error : worst;
            if (!(error <= (rounds ? rounded : limit)) ||
                !(lse <= (rounds ? 4 * rounded : 2e-5))) /* v1 adds 131072 weights one by one */
                fail_msg("%s, %s cache, %u/%u heads of %u, blocks of %u, sequence of %u (%u new), "
                         "window %u, cap %g: relative error %g > %g, or of the log-sum-exp %g",
                         ts_kernel_name((ts_kernel)kernel), ts_dtype_name(s.dtype), s.heads,
                         s.kv_heads, s.head_dim, s.block_tokens, lengths[j][0], lengths[j][1],
                         v.window, (double)v.soft_cap, error, limit, lse);
        }
        CUDA_OK(cudaMemcpy(stored, d.memory->base, d.p.cache_bytes, cudaMemcpyDeviceToHost));
        if (v.rope_theta == 0) /* else the last bits may differ: of cosine and sine */
            assert_memory_equal(stored, d.p.cache, d.p.cache_bytes);
        for (uint32_t j = 0; j < num_seqs; j++) {
            double key = key_error(&d.p, &d.p.seqs[j], stored);
            if (!(key <= key_limit(s.dtype)))
                fail_msg("%s: a stored key differs by %g", ts_kernel_name((ts_kernel)kernel), key);
        }
    }
    free(stored);
    free(before);
    for (uint32_t j = 0; j < num_seqs; j++)
        free(refs[j]);
    free(refs);
    device_problem_free(&d);
}

static void check_against_reference(shape s, const uint32_t (*lengths)[2], uint32_t num_seqs,
                                    double limit)
{
    check_variety(s, (variety){0}, lengths, num_seqs, limit);
}

static void every_variant_matches_the_reference(void **state)
{
    (void)state;
    worst = 0;
    for (size_t i = 0; i < VARIETIES; i++)
        for (size_t which = 0; which < 3; which++)
            check_variety(variety_shape(i, which), varieties[i], mixed, MIXED, 1e-5);
    print_message("worst relative error %.1e\n", worst);
}

/* Whether the kernel rounds q and weights to the cache's type. */
static bool rounds(ts_kernel kernel, const ts_attention_call *call)
{
    return kernel == TS_KERNEL_MMA || kernel == TS_KERNEL_WGMMA ||
           (kernel == TS_KERNEL_AUTO && call->io_dtype != TS_DTYPE_FP32);
}

/* Runs every kernel that takes the problem and holds each sequence against the reference; those
 * that round are given `loose`. */
static void check_every_kernel(device_problem *d, double limit, double loose, const char *what)
{
    ts_attention *host = ts_attention_new(0, TS_ISA_AUTO);
    assert_int_equal(ts_attention_run(host, &d->p.call), TS_OK); /* writes the new K and V */
    ts_attention_free(host);
    for (uint32_t j = 0; j < d->p.num_seqs; j++) {
        double *ref = reference_of(&d->p, &d->p.seqs[j]);
        ts_attention_call one = d->call;
        one.seqs = &d->seqs[j];
        one.num_seqs = 1;
        for (int k = TS_KERNEL_AUTO; k < TS_KERNEL_COUNT; k++) {
            const ts_kernel kernel = (ts_kernel)k;
            if (ts_kernel_check(kernel, &d->call.geometry, warp_groups(), why, sizeof why) != TS_OK)
                continue;
            poison_device(d);
            run(d, &one, kernel);
            double allowed = rounds(kernel, &d->call) ? loose : limit, lse;
            double error = largest_error(&d->p, &d->p.seqs[j], ref, &lse);
            if (!(error <= allowed) || !(lse <= allowed)) /* NaN fails too */
                fail_msg("%s, %s cache, %u/%u heads of %u, sequence of %u (%u new), %s: error %g, "
                         "of the log-sum-exp %g",
                         ts_kernel_name(kernel), ts_dtype_name(d->call.geometry.dtype),
                         d->call.heads, d->call.geometry.kv_heads, d->call.geometry.head_dim,
                         d->seqs[j].kv_tokens, d->seqs[j].q_tokens, what, error, lse);
        }
        free(ref);
    }
}

static void keys_whose_scores_are_minus_infinity_get_no_weight(void **state)
{
    (void)state;
    static const uint32_t heads[][3] = {{4, 4, 64}, {8, 2, 128}, {40, 1, 64}, {24, 1, 256}};
    for (int i = 0; i < 12; i++)
        for (size_t v = 0; v < sizeof hidden_varieties / sizeof *hidden_varieties; v++) {
            if (v > 0 && (size_t)i % 5 != v) /* the reference takes seconds for each */
                continue;
            const uint32_t *h = heads[i / 3];
            const ts_dtype dtype = (ts_dtype)(i % 3);
            shape s = {.dtype = dtype,
                       .io = (i / 3 + i) % 2 ? dtype : TS_DTYPE_FP32,
                       .layout = (ts_layout)(i % 2),
                       .heads = h[0],
                       .kv_heads = h[1],
                       .head_dim = h[2],
                       .block_tokens = 16,
                       .layers = 1};
            rng r = {37};
            device_problem d;
            problem_new(&d.p, s, with_hidden, WITH_HIDDEN, &r);
            problem_vary(&d.p, hidden_varieties[v], &r);
            for (uint32_t j = 0; j < WITH_HIDDEN; j++)
                hide_keys(&d.p, &d.p.seqs[j], hidden[j]);
            device_problem_upload(&d, s, hidden_varieties[v]);
            check_every_kernel(&d, s.io == TS_DTYPE_FP32 ? 3e-5 : 0.03, 0.06, "some keys hidden");
            device_problem_free(&d);
        }
}

static void a_capped_score_is_within_4_ulp_whatever_the_cap(void **state)
{
    (void)state;
    for (size_t c = 0; c < sizeof caps / sizeof *caps; c++) {
        device_problem d;
        shape s = problem_of_scores(&d.p, caps[c]);
        device_problem_upload(&d, s, (variety){.soft_cap = caps[c]});
        for (int k = TS_KERNEL_AUTO; k < TS_KERNEL_COUNT; k++) {
            if (ts_kernel_check((ts_kernel)k, &d.call.geometry, warp_groups(), why, sizeof why) !=
                TS_OK)
                continue;
            poison_device(&d);
            run(&d, &d.call, (ts_kernel)k);
            double x, error = worst_ulp(&d.p, &x);
            if (!(error <= 4))
                fail_msg("%s: a score of %g capped at %g differs by %g ulp",
                         ts_kernel_name((ts_kernel)k), x, (double)caps[c], error);
        }
        device_problem_free(&d);
    }
}

static void alibi_is_as_exact_at_far_positions_as_at_near_ones(void **state)
{
    (void)state;
    for (int dtype = TS_DTYPE_FP32; dtype < TS_DTYPE_COUNT; dtype++) {
        device_problem d;
        uint32_t *table;
        shape s = far_problem_new(&d.p, (ts_dtype)dtype, &table);
        device_problem_upload(&d, s, (variety){.window = 16, .alibi = true});
        check_every_kernel(&d, 1e-5, 0.05, "far from the first token");
        free(table);
        device_problem_free(&d);
    }
}

static void every_kernel_dtype_and_head_sharing_matches_the_float64_reference(void **state)
{
    (void)state;
    static const uint32_t heads[][2] = {{4, 4}, {6, 2}, {8, 1}, {5, 5}, {40, 1}};
    worst = 0;
    for (int dtype = TS_DTYPE_FP32; dtype < TS_DTYPE_COUNT; dtype++)
        for (size_t h = 0; h < sizeof heads / sizeof *heads; h++)
            for (int layout = TS_LAYOUT_NHD; layout <= TS_LAYOUT_HND; layout++)
                check_against_reference((shape){.dtype = (ts_dtype)dtype,
                                                .io = TS_DTYPE_FP32,
                                                .layout = (ts_layout)layout,
                                                .heads = heads[h][0],
                                                .kv_heads = heads[h][1],
                                                .head_dim = 64,
                                                .block_tokens = 16,
                                                .layers = 2},
                                        mixed, MIXED, 1e-5);
    print_message("worst relative error %.1e\n", worst);
}

static void every_head_dim_and_block_size_matches_the_reference(void **state)
{
    (void)state;
    static const uint32_t dims[] = {32, 33, 40, 72, 80, 96, 100, 112, 127, 128, 160, 192, 255, 256};
    static const uint32_t blocks[] = {1, 2, 3, 7, 8, 32, 48, 64, 100, 128, 255, 256};
    worst = 0;
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        for (int dtype = TS_DTYPE_FP32; dtype < TS_DTYPE_COUNT; dtype++)
            check_against_reference((shape){.dtype = (ts_dtype)dtype,
                                            .io = TS_DTYPE_FP32,
                                            .layout = (ts_layout)(i % 2),
                                            .heads = 4,
                                            .kv_heads = 2,
                                            .head_dim = dims[i],
                                            .block_tokens = blocks[i % 12],
                                            .layers = 1},
                                    mixed, MIXED, 1e-5);
    print_message("worst relative error %.1e\n", worst);
}

/* Many rows and many tiles of tokens, cut into chunks and not, with a window and without. */
static void a_long_prefill_matches_the_reference(void **state)
{
    (void)state;
    static const uint32_t dims[] = {64, 128, 256};
    static const uint32_t lengths[][2] = {{500, 200}, {4200, 40}, {2300, 70}};
    for (size_t i = 0; i < 12; i++)
        check_variety((shape){.dtype = i / 3 % 2 ? TS_DTYPE_FP16 : TS_DTYPE_BF16,
                              .io = TS_DTYPE_FP32,
                              .layout = (ts_layout)(i / 3 % 2),
                              .heads = 8,
                              .kv_heads = i % 2 ? 8 : 2,
                              .head_dim = dims[i % 3],
                              .block_tokens = 16,
                              .layers = 1},
                      (variety){.window = i < 6 ? 0 : 333}, lengths, 3, 1e-5);
}

static void an_exchange_of_the_caches_own_type_is_read_and_rounded_once(void **state)
{
    (void)state;
    shape s = {.dtype = TS_DTYPE_FP16,
               .io = TS_DTYPE_FP16,
               .layout = TS_LAYOUT_NHD,
               .heads = 8,
               .kv_heads = 2,
               .head_dim = 64,
               .block_tokens = 16,
               .layers = 1};
    check_against_reference(s, mixed, MIXED, 5e-4);
    s.dtype = s.io = TS_DTYPE_BF16;
    check_against_reference(s, mixed, MIXED, 4e-3);
    s.dtype = TS_DTYPE_FP8_E4M3;
    check_against_reference(s, mixed, MIXED, 4e-3);
    s.io = TS_DTYPE_FP16;
    check_against_reference(s, mixed, MIXED, 6e-4);
}

static void a_context_of_131072_tokens_matches_the_reference(void **state)
{
    (void)state;
    static const uint32_t length[][2] = {{131072, 2}};
    worst = 0;
    check_against_reference((shape){.dtype = TS_DTYPE_BF16,
                                    .io = TS_DTYPE_FP32,
                                    .layout = TS_LAYOUT_NHD,
                                    .heads = 2,
                                    .kv_heads = 1,
                                    .head_dim = 64,
                                    .block_tokens = 16,
                                    .layers = 1},
                            length, 1, 1e-5);
    print_message("worst relative error %.1e\n", worst);
}

/* Together and one by one. */
static void splitting_a_batch_changes_no_bit(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{1, 1},    {700, 300}, {64, 1},   {1025, 7},
                                          {5000, 1}, {90, 90},   {2048, 8}, {3000, 33}};
    const uint32_t n = sizeof lengths / sizeof *lengths;
    rng r = {7};
    device_problem d;
    device_problem_new(&d,
                       (shape){.dtype = TS_DTYPE_BF16,
                               .io = TS_DTYPE_FP32,
                               .layout = TS_LAYOUT_NHD,
                               .heads = 8,
                               .kv_heads = 2,
                               .head_dim = 72,
                               .block_tokens = 24,
                               .layers = 1},
                       lengths, n, &r);
    unsigned char *first = malloc(d.q_bytes);
    for (int kernel = TS_KERNEL_AUTO; kernel < TS_KERNEL_COUNT; kernel++) {
        poison_device(&d);
        run(&d, &d.call, (ts_kernel)kernel);
        memcpy(first, d.p.out, d.q_bytes);
        poison_device(&d);
        for (uint32_t j = 0; j < n; j++) {
            ts_attention_call one = d.call;
            one.seqs = &d.seqs[j];
            one.num_seqs = 1;
            run(&d, &one, (ts_kernel)kernel);
        }
        assert_memory_equal(d.p.out, first, d.q_bytes);
    }
    free(first);
    device_problem_free(&d);
}

/* Each chunk of a sequence is a piece of its own where a GPU has many processors; all are one piece
 * where it has one. */
static void chunks_that_are_one_piece_change_no_bit(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{1000, 4},  {900, 8}, {400, 3}, {3000, 16},
                                          {3100, 12}, {770, 3}, {500, 5}};
    static const uint32_t dims[] = {64, 80, 128}, n = sizeof lengths / sizeof *lengths;
    static const ts_dtype dtypes[] = {TS_DTYPE_BF16, TS_DTYPE_FP16, TS_DTYPE_FP8_E4M3};
    const uint32_t processors = gpu->info.processors;
    for (int i = 0; i < 27; i++) {
        bool both = i < 18 && i % 9 >= 6 && warp_groups(); /* kernels */
        const ts_kernel kernel = both ? TS_KERNEL_AUTO : TS_KERNEL_V5;
        const shape s = {.dtype = dtypes[i / 9],
                         .io = i / 9 == 1 ? TS_DTYPE_FP16 : TS_DTYPE_BF16,
                         .heads = both || i % 2 ? 8 : 10,
                         .kv_heads = 2,
                         .head_dim = dims[i % 3],
                         .block_tokens = 16,
                         .layers = 1};
        rng r = {29};
        device_problem d;
        device_problem_vary(&d, s, hidden_varieties[i % 5], lengths, n, &r);
        const size_t lse_bytes = d.p.lse_elements * sizeof *d.p.lse;
        unsigned char *first = malloc(d.q_bytes + lse_bytes);
        for (int one = 0; one < 2; one++) {
            ts_gpu_plan *plan;
            gpu->info.processors = one ? 1 : 100000;
            OK(ts_gpu_plan_new(gpu, &d.call.geometry, d.call.heads, d.call.io_dtype, kernel, d.seqs,
                               n, &plan, why, sizeof why));
            assert_int_equal(plan->records == 0, one);
            ts_gpu_plan_free(plan);
            poison_device(&d);
            run(&d, &d.call, kernel);
            gpu->info.processors = processors;
            if (one) {
                assert_memory_equal(d.p.out, first, d.q_bytes);
                assert_memory_equal(d.p.lse, first + d.q_bytes, lse_bytes);
            }
            memcpy(first, d.p.out, d.q_bytes);
            memcpy(first + d.q_bytes, d.p.lse, lse_bytes);
        }
        free(first);
        device_problem_free(&d);
    }
}

/* Runs the problem by v5 on a GPU that has so many processors; to: its outputs and lse. */
static void run_with(device_problem *d, uint32_t processors, uint32_t window, unsigned char *to)
{
    const uint32_t its = gpu->info.processors;
    ts_attention_call call = d->call;
    call.variant.window = window;
    gpu->info.processors = processors;
    poison_device(d);
    run(d, &call, TS_KERNEL_V5);
    gpu->info.processors = its;
    memcpy(to, d->p.out, d->q_bytes);
    memcpy(to + d->q_bytes, d->p.lse, d->p.lse_elements * sizeof *d->p.lse);
}

/* The kernel for plain calls, that of which one more block shares a processor, which a launch takes
 * whose blocks are a wave and a little more, as they are where a GPU has three processors; and, for
 * a window that is longer than all sequences, the one that can do everything. */
static void kernels_for_plain_calls_have_the_same_bits(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{352, 1}, {352, 2}, {353, 2}, {704, 2}, {300, 1}};
    static const uint32_t blocks[] = {16, 32, 128}, dims[] = {64, 128, 96, 48};
    const uint32_t n = sizeof lengths / sizeof *lengths;
    for (int i = 0; i < 24; i++) {
        const ts_dtype dtype = i % 3 == 0   ? TS_DTYPE_BF16
                               : i % 3 == 1 ? TS_DTYPE_FP16
                                            : TS_DTYPE_FP8_E4M3;
        const ts_dtype io = i % 3 < 2 ? dtype : i % 2 ? TS_DTYPE_FP16 : TS_DTYPE_BF16;
        const shape s = {.dtype = dtype,
                         .io = io,
                         .layout = (ts_layout)(i / 3 % 2),
                         .heads = 8,
                         .kv_heads = 2,
                         .head_dim = dims[i / 3 % 4],
                         .block_tokens = blocks[i % 7 % 3],
                         .layers = 1};
        rng r = {31};
        device_problem d;
        device_problem_vary(&d, s, (variety){.sinks = i / 12 > 0}, lengths, n, &r);
        /* The last token of the second sequence is NaN: its row before the last doesn't show it. */
        const size_t row = s.kv_heads * s.head_dim * ts_dtype_bytes(io);
        CUDA_OK(cudaMemset(d.v + 2 * row, 0xff, row));
        const size_t bytes = d.q_bytes + d.p.lse_elements * sizeof *d.p.lse;
        unsigned char *general = malloc(bytes), *its = malloc(bytes);
        ts_gpu_plan *plan;
        OK(ts_gpu_plan_new(gpu, &d.call.geometry, d.call.heads, io, TS_KERNEL_V5, d.seqs, n, &plan,
                           why, sizeof why));
        const bool has_close = plan->close_kernel.function != NULL;
        assert_true(plan->plain_kernel.function != NULL);
        assert_int_equal(has_close, s.head_dim > 64 && dtype != TS_DTYPE_FP8_E4M3);
        if (has_close)
            assert_true(is_close_faster(plan->count[LIST_NARROW] * s.kv_heads, 3,
                                        plan->shortest_piece, plan->longest_piece));
        ts_gpu_plan_free(plan);
        run_with(&d, 100000, 1u << 20, general);
        run_with(&d, 100000, 0, its);
        assert_memory_equal(its, general, bytes);
        run_with(&d, 3, 0, its);
        assert_memory_equal(its, general, bytes);
        assert_true(isnan(get(general, io, (2 * 8 + 7) * (size_t)s.head_dim)));
        assert_false(isnan(get(general, io, (1 * 8 + 7) * (size_t)s.head_dim)));
        free(general);
        free(its);
        device_problem_free(&d);
    }
}

/* In a plan that is new, and in one that is renewed. */
static void sequences_without_query_tokens_change_no_bit(void **state)
{
    (void)state;
    enum { SEQS = 5 };
    static const uint32_t lengths[][2] = {{0, 0}, {700, 3}, {300, 0}, {5000, 90}, {5, 0}};
    const shape s = {.dtype = TS_DTYPE_BF16,
                     .io = TS_DTYPE_FP32,
                     .heads = 8,
                     .kv_heads = 2,
                     .head_dim = 64,
                     .block_tokens = 16,
                     .layers = 1};
    rng r = {41};
    device_problem d;
    device_problem_new(&d, s, lengths, SEQS, &r);
    d.seqs[0].blocks = d.seqs[2].blocks = d.seqs[4].blocks = NULL;
    unsigned char *first = malloc(d.q_bytes);
    for (int k = TS_KERNEL_AUTO; k < TS_KERNEL_COUNT; k++) {
        const ts_kernel kernel = (ts_kernel)k;
        const ts_attention_seq some[] = {d.seqs[1], d.seqs[3]};
        ts_attention_call without = d.call;
        without.seqs = some;
        without.num_seqs = 2;
        poison_device(&d);
        run(&d, &without, kernel);
        memcpy(first, d.p.out, d.q_bytes);
        poison_device(&d);
        run(&d, &d.call, kernel);
        assert_memory_equal(d.p.out, first, d.q_bytes);

        ts_gpu_plan *plan = NULL;
        for (int renewal = 0; renewal < 2; renewal++) {
            d.seqs[2].kv_tokens += 100; /* which is nobody's business */
            OK(ts_gpu_plan_renew(gpu, &d.call.geometry, d.call.heads, d.call.io_dtype, kernel,
                                 d.seqs, SEQS, &plan, why, sizeof why));
        }
        ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
        const ts_gpu_run one = {
            .plan = plan, .q = d.q, .k = d.k, .v = d.v, .out = d.out, .lse = d.lse};
        poison_device(&d);
        OK(ts_gpu_launch_attend(l, d.call.base, &d.call.variant, &one, 1));
        CUDA_OK(cudaStreamSynchronize(ts_gpu_launch_stream(l)));
        CUDA_OK(cudaMemcpy(d.p.out, d.out, d.q_bytes, cudaMemcpyDeviceToHost));
        assert_memory_equal(d.p.out, first, d.q_bytes);
        sem_t done;
        sem_init(&done, 0, 0);
        assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
        while (sem_wait(&done) != 0)
            ;
        ts_gpu_plan_free(plan);
    }
    free(first);
    device_problem_free(&d);
}

/* The slots that no sequence has hold NaN, then 0. */
static void what_lies_in_unused_slots_changes_no_bit(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{1, 1}, {11, 8}, {41, 30}, {100, 3}, {5000, 1}, {90, 90}};
    rng r = {17};
    for (int i = 0; i < 8; i++) {
        device_problem d;
        ts_dtype dtype = (ts_dtype)(i / 2);
        device_problem_new(&d,
                           (shape){.dtype = dtype,
                                   .io = TS_DTYPE_FP32,
                                   .layout = TS_LAYOUT_NHD,
                                   .heads = 4,
                                   .kv_heads = 2,
                                   .head_dim = 64,
                                   .block_tokens = i % 2 ? 16 : 4,
                                   .layers = 2},
                           lengths, sizeof lengths / sizeof *lengths, &r);
        unsigned char *first = malloc(d.q_bytes), *cache = malloc(d.p.cache_bytes);
        for (int kernel = TS_KERNEL_AUTO; kernel < TS_KERNEL_COUNT; kernel++) {
            if (ts_kernel_check((ts_kernel)kernel, &d.call.geometry, warp_groups(), why,
                                sizeof why) != TS_OK)
                continue;
            to_device(d.call.base, d.p.cache, d.p.cache_bytes);
            poison_device(&d);
            run(&d, &d.call, (ts_kernel)kernel);
            memcpy(first, d.p.out, d.q_bytes);
            memcpy(cache, d.p.cache, d.p.cache_bytes);
            for (size_t e = 0; e < d.p.cache_bytes / ts_dtype_bytes(dtype); e++)
                if (isnan(get(cache, dtype, e)))
                    put(cache, dtype, e, 0);
            to_device(d.call.base, cache, d.p.cache_bytes);
            poison_device(&d);
            run(&d, &d.call, (ts_kernel)kernel);
            assert_memory_equal(d.p.out, first, d.q_bytes);
        }
        free(first);
        free(cache);
        device_problem_free(&d);
    }
}

static void check_leaks(ts_dtype dtype, uint32_t new_tokens)
{
    const uint32_t lengths[][2] = {{100, new_tokens}};
    rng r = {11};
    device_problem d;
    device_problem_new(&d,
                       (shape){.dtype = dtype,
                               .io = TS_DTYPE_FP32,
                               .layout = TS_LAYOUT_NHD,
                               .heads = 2,
                               .kv_heads = 2,
                               .head_dim = 32,
                               .block_tokens = 16,
                               .layers = 1},
                       lengths, 1, &r);
    /* The last token's K and V are NaN: only the last row may show it. */
    float nan[64];
    for (uint32_t i = 0; i < 64; i++)
        nan[i] = NAN;
    size_t last = (new_tokens - 1) * sizeof nan;
    to_device(d.k + last, nan, sizeof nan);
    to_device(d.v + last, nan, sizeof nan);
    for (int kernel = TS_KERNEL_AUTO; kernel < TS_KERNEL_COUNT; kernel++) {
        if (ts_kernel_check((ts_kernel)kernel, &d.call.geometry, warp_groups(), why, sizeof why) !=
            TS_OK)
            continue;
        poison_device(&d);
        run(&d, &d.call, (ts_kernel)kernel);
        for (uint32_t i = 0; i < (new_tokens - 1) * 64; i++)
            assert_false(isnan(((float *)(void *)d.p.out)[i]));
        assert_true(isnan(((float *)(void *)d.p.out)[(new_tokens - 1) * 64]));
    }
    device_problem_free(&d);
}

static void later_tokens_never_leak_into_earlier_ones(void **state)
{
    (void)state;
    check_leaks(TS_DTYPE_FP32, 100);
    check_leaks(TS_DTYPE_BF16, 100);
    check_leaks(TS_DTYPE_FP16, 20);
    check_leaks(TS_DTYPE_FP8_E4M3, 100);
    check_leaks(TS_DTYPE_FP8_E4M3, 3);
    check_leaks(TS_DTYPE_BF16, 8);
    check_leaks(TS_DTYPE_FP32, 3);
}

/* A device that has less shared memory for a block: what a kernel takes more of isn't chosen, and
 * is refused by name where it is asked for. Results are as good. */
static void what_doesnt_fit_into_shared_memory_isnt_launched(void **state)
{
    (void)state;
    static const uint32_t dims[] = {64, 128, 256};
    static const uint32_t lengths[][2] = {{70, 1}, {300, 30}, {500, 90}, {40, 40}, {2500, 2}};
    ts_attention *host = ts_attention_new(0, TS_ISA_AUTO);
    for (int i = 0; i < 3 * TS_DTYPE_COUNT; i++) {
        uint32_t dim = dims[i / TS_DTYPE_COUNT];
        ts_dtype dtype = (ts_dtype)(i % TS_DTYPE_COUNT);
        ts_dtype io = dtype == TS_DTYPE_FP8_E4M3 ? TS_DTYPE_FP16 : dtype;
        double *refs[5];
        rng r = {23};
        device_problem d;
        device_problem_new(&d,
                           (shape){.dtype = dtype,
                                   .io = i / TS_DTYPE_COUNT == 1 ? TS_DTYPE_FP32 : io,
                                   .heads = 8,
                                   .kv_heads = 1,
                                   .head_dim = dim,
                                   .block_tokens = 16,
                                   .layers = 1},
                           lengths, 5, &r);
        assert_int_equal(ts_attention_run(host, &d.p.call), TS_OK); /* writes the new K and V */
        for (uint32_t j = 0; j < 5; j++)
            refs[j] = reference_of(&d.p, &d.p.seqs[j]);
        for (size_t limit = 16 << 10; limit <= 100 << 10; limit += 28 << 10) {
            gpu->info.shared_bytes = limit;
            poison_device(&d);
            run(&d, &d.call, TS_KERNEL_AUTO);
            for (uint32_t j = 0; j < 5; j++) {
                double error = relative_error(&d.p, &d.p.seqs[j], refs[j]);
                if (!(error <= (d.call.io_dtype == TS_DTYPE_FP32 ? 1e-5 : 8e-3)))
                    fail_msg("%zu bytes, %s, head_dim %u, sequence %u: relative error %g", limit,
                             ts_dtype_name(dtype), dim, j, error);
            }
        }
        gpu->info.shared_bytes = 16 << 10;
        ts_gpu_plan *plan = NULL;
        if (dim == 256) {
            assert_int_equal(ts_gpu_plan_new(gpu, &d.call.geometry, d.call.heads, d.call.io_dtype,
                                             TS_KERNEL_TILE, d.seqs, 1, &plan, why, sizeof why),
                             TS_EINVAL);
            assert_non_null(strstr(why, "kernel tile takes "));
            assert_non_null(
                strstr(why, " bytes of shared memory for a head_dim of 256; the device has 16384"));
        }
        for (uint32_t j = 0; j < 5; j++)
            free(refs[j]);
        device_problem_free(&d);
    }
    ts_attention_free(host);
}

static size_t shared_bytes; /* that the device has */

static int note_shared_bytes(void **state)
{
    (void)state;
    shared_bytes = gpu->info.shared_bytes;
    return 0;
}

static int restore_shared_bytes(void **state)
{
    (void)state;
    gpu->info.shared_bytes = shared_bytes;
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_kernel_dtype_and_head_sharing_matches_the_float64_reference),
        cmocka_unit_test(every_variant_matches_the_reference),
        cmocka_unit_test(keys_whose_scores_are_minus_infinity_get_no_weight),
        cmocka_unit_test(a_capped_score_is_within_4_ulp_whatever_the_cap),
        cmocka_unit_test(alibi_is_as_exact_at_far_positions_as_at_near_ones),
        cmocka_unit_test(every_head_dim_and_block_size_matches_the_reference),
        cmocka_unit_test(a_long_prefill_matches_the_reference),
        cmocka_unit_test(an_exchange_of_the_caches_own_type_is_read_and_rounded_once),
        cmocka_unit_test(a_context_of_131072_tokens_matches_the_reference),
        cmocka_unit_test(splitting_a_batch_changes_no_bit),
        cmocka_unit_test(chunks_that_are_one_piece_change_no_bit),
        cmocka_unit_test(kernels_for_plain_calls_have_the_same_bits),
        cmocka_unit_test(sequences_without_query_tokens_change_no_bit),
        cmocka_unit_test(what_lies_in_unused_slots_changes_no_bit),
        cmocka_unit_test(later_tokens_never_leak_into_earlier_ones),
        cmocka_unit_test_setup_teardown(what_doesnt_fit_into_shared_memory_isnt_launched,
                                        note_shared_bytes, restore_shared_bytes),
    };
    return run_gpu_tests(tests, sizeof tests / sizeof *tests);
}
