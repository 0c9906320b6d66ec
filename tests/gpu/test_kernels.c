/*
 * The device's kernels against the float64 reference, the stored K and V bit for bit against the
 * host's, and both memory providers. Needs a GPU; exits with 77 where there is none.
 */
#include "attention_util.h"

#include "gpu/device.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CUDA_OK(call) assert_int_equal((call), cudaSuccess)

static ts_gpu *gpu;
static char why[256];

#define OK(call)                                                                                   \
    do {                                                                                           \
        if ((call) != TS_OK)                                                                       \
            fail_msg("%s: %s", #call, why);                                                        \
    } while (0)

/* A problem whose cache, q, k, v and out are on the device as well. */
typedef struct device_problem {
    problem p;
    ts_memory *memory;
    unsigned char *q, *k, *v, *out;
    float *heads, *scales, *lse; /* heads: sinks, then slopes; lse: log-sum-exps */
    ts_attention_seq *seqs;
    ts_attention_call call;
    size_t q_bytes, kv_bytes;
} device_problem;

static void device_problem_vary(device_problem *d, shape s, variety v, const uint32_t (*lengths)[2],
                                uint32_t num_seqs, rng *r)
{
    problem_new(&d->p, s, lengths, num_seqs, r);
    problem_vary(&d->p, v, r);
    CUDA_OK(cudaMalloc((void **)&d->lse, d->p.lse_elements * sizeof(float)));
    CUDA_OK(cudaMalloc((void **)&d->heads, 2 * s.heads * sizeof(float)));
    if (v.sinks)
        CUDA_OK(cudaMemcpy(d->heads, d->p.sinks, s.heads * sizeof(float), cudaMemcpyHostToDevice));
    if (v.alibi)
        CUDA_OK(cudaMemcpy(d->heads + s.heads, d->p.alibi, s.heads * sizeof(float),
                           cudaMemcpyHostToDevice));
    CUDA_OK(cudaMalloc((void **)&d->scales, 2 * s.kv_heads * sizeof(float)));
    if (d->p.scales != NULL)
        CUDA_OK(cudaMemcpy(d->scales, d->p.scales, 2 * s.kv_heads * sizeof(float),
                           cudaMemcpyHostToDevice));
    size_t e = ts_dtype_bytes(s.io);
    d->q_bytes = d->p.q_elements * e;
    d->kv_bytes = d->p.kv_elements * e;
    OK(ts_memory_cuda_vmm_new(gpu, 1, d->p.cache_bytes, &d->memory, why, sizeof why));
    OK(ts_memory_renew(d->memory, 0, false, why, sizeof why));
    CUDA_OK(cudaMemcpy(d->memory->base, d->p.cache, d->p.cache_bytes, cudaMemcpyHostToDevice));
    unsigned char **to[] = {&d->q, &d->k, &d->v, &d->out};
    unsigned char *from[] = {d->p.q, d->p.k, d->p.v, NULL};
    for (int i = 0; i < 4; i++) {
        size_t bytes = i == 0 || i == 3 ? d->q_bytes : d->kv_bytes;
        CUDA_OK(cudaMalloc((void **)to[i], bytes));
        if (from[i] != NULL)
            CUDA_OK(cudaMemcpy(*to[i], from[i], bytes, cudaMemcpyHostToDevice));
    }
    d->seqs = malloc(num_seqs * sizeof *d->seqs);
    for (uint32_t i = 0; i < num_seqs; i++) {
        d->seqs[i] = d->p.seqs[i];
        d->seqs[i].q = d->q + ((const unsigned char *)d->p.seqs[i].q - d->p.q);
        d->seqs[i].k = d->k + ((const unsigned char *)d->p.seqs[i].k - d->p.k);
        d->seqs[i].v = d->v + ((const unsigned char *)d->p.seqs[i].v - d->p.v);
        d->seqs[i].out = d->out + ((unsigned char *)d->p.seqs[i].out - d->p.out);
        d->seqs[i].sinks = v.sinks ? d->heads : NULL;
        d->seqs[i].scales = d->p.scales != NULL ? d->scales : NULL;
        d->seqs[i].alibi = v.alibi ? d->heads + s.heads : NULL;
        d->seqs[i].lse = d->lse + (d->p.seqs[i].lse - d->p.lse);
    }
    d->call = d->p.call;
    d->call.base = d->memory->base;
    d->call.seqs = d->seqs;
}

static void device_problem_new(device_problem *d, shape s, const uint32_t (*lengths)[2],
                               uint32_t num_seqs, rng *r)
{
    device_problem_vary(d, s, (variety){0}, lengths, num_seqs, r);
}

static void device_problem_free(device_problem *d)
{
    CUDA_OK(cudaFree(d->heads));
    CUDA_OK(cudaFree(d->scales));
    CUDA_OK(cudaFree(d->lse));
    CUDA_OK(cudaFree(d->q));
    CUDA_OK(cudaFree(d->k));
    CUDA_OK(cudaFree(d->v));
    CUDA_OK(cudaFree(d->out));
    ts_memory_free(d->memory);
    free(d->seqs);
    problem_free(&d->p);
}

static void post(void *arg, ts_status status, const char *why_not)
{
    if (status != TS_OK)
        fail_msg("%s", why_not);
    sem_post(arg);
}

/* Runs the call and waits for it. */
static void attend(const ts_attention_call *call, ts_kernel kernel)
{
    sem_t done;
    sem_init(&done, 0, 0);
    ts_gpu_launch *l = ts_gpu_launch_take(gpu);
    assert_non_null(l);
    /* A run has one layer: sequences of different ones are runs of their own. */
    bool together = true;
    for (uint32_t i = 1; i < call->num_seqs; i++)
        together = together && call->seqs[i].layer == call->seqs[0].layer;
    uint32_t num_runs = together ? 1 : call->num_seqs;
    ts_gpu_run *runs = calloc(num_runs, sizeof *runs);
    ts_gpu_plan **plans = calloc(num_runs, sizeof *plans);
    for (uint32_t i = 0; i < num_runs; i++) {
        const ts_attention_seq *s = &call->seqs[i];
        OK(ts_gpu_plan_new(gpu, &call->geometry, call->heads, call->io_dtype, kernel, s,
                           together ? call->num_seqs : 1, &plans[i], why, sizeof why));
        runs[i] = (ts_gpu_run){.plan = plans[i],
                               .layer = s->layer,
                               .q = s->q,
                               .k = s->k,
                               .v = s->v,
                               .out = s->out,
                               .sinks = s->sinks,
                               .scales = s->scales,
                               .alibi = s->alibi,
                               .lse = s->lse};
    }
    if (ts_gpu_launch_attend(l, call->base, &call->variant, runs, num_runs) != TS_OK)
        fail_msg("%s", ts_gpu_launch_why(l));
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    while (sem_wait(&done) != 0)
        ;
    for (uint32_t i = 0; i < num_runs; i++)
        ts_gpu_plan_free(plans[i]);
    free(plans);
    free(runs);
}

/* ... and the outputs come back into the host problem's. */
static void run(device_problem *d, const ts_attention_call *call, ts_kernel kernel)
{
    attend(call, kernel);
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaMemcpy(d->p.out, d->out, d->q_bytes, cudaMemcpyDeviceToHost));
    CUDA_OK(
        cudaMemcpy(d->p.lse, d->lse, d->p.lse_elements * sizeof(float), cudaMemcpyDeviceToHost));
}

static void poison_device(device_problem *d)
{
    CUDA_OK(cudaMemset(d->out, 0xff, d->q_bytes));
    CUDA_OK(cudaMemset(d->lse, 0xff, d->p.lse_elements * sizeof(float)));
}

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
    unsigned char *stored = malloc(d.p.cache_bytes);
    for (int kernel = TS_KERNEL_AUTO; kernel < TS_KERNEL_COUNT; kernel++) {
        if (ts_kernel_check((ts_kernel)kernel, &d.call.geometry, why, sizeof why) != TS_OK)
            continue;
        poison_device(&d);
        run(&d, &d.call, (ts_kernel)kernel);
        for (uint32_t j = 0; j < num_seqs; j++) {
            double error = relative_error(&d.p, &d.p.seqs[j], refs[j]);
            double lse = lse_error(&d.p, &d.p.seqs[j], refs[j]);
            /* mma rounds q and weights to the cache's type, of fp8 to fp16. */
            double rounded = s.dtype == TS_DTYPE_BF16 ? 8e-3 : 1e-3;
            rounded = rounded > limit ? rounded : limit;
            bool rounds = kernel == TS_KERNEL_MMA;
            worst = !rounds && error > worst ? error : worst;
            if (!(error <= (rounds ? rounded : limit)) ||
                !(lse <= (rounds ? 4 * rounded : 1e-5))) /* NaN fails too */
                fail_msg("%s, %s cache, %u/%u heads of %u, blocks of %u, sequence of %u (%u new), "
                         "window %u, cap %g: relative error %g > %g, or of the log-sum-exp %g",
                         ts_kernel_name((ts_kernel)kernel), ts_dtype_name(s.dtype), s.heads,
                         s.kv_heads, s.head_dim, s.block_tokens, lengths[j][0], lengths[j][1],
                         v.window, (double)v.cap, error, limit, lse);
        }
        CUDA_OK(cudaMemcpy(stored, d.memory->base, d.p.cache_bytes, cudaMemcpyDeviceToHost));
        if (v.rope.theta == 0) /* else the last bits may differ: of cosine and sine */
            assert_memory_equal(stored, d.p.cache, d.p.cache_bytes);
        for (uint32_t j = 0; j < num_seqs; j++) {
            double key = key_error(&d.p, &d.p.seqs[j], stored);
            if (!(key <= key_limit(s.dtype)))
                fail_msg("%s: a stored key differs by %g", ts_kernel_name((ts_kernel)kernel), key);
        }
    }
    free(stored);
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

static void every_kernel_dtype_and_head_sharing_matches_the_float64_reference(void **state)
{
    (void)state;
    static const uint32_t heads[][2] = {{4, 4}, {6, 2}, {8, 1}, {5, 5}, {40, 1}};
    worst = 0;
    for (int dtype = TS_DTYPE_FP32; dtype <= TS_DTYPE_FP8_E4M3; dtype++)
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
        for (int dtype = TS_DTYPE_FP32; dtype <= TS_DTYPE_FP8_E4M3; dtype++)
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
            if (ts_kernel_check((ts_kernel)kernel, &d.call.geometry, why, sizeof why) != TS_OK)
                continue;
            CUDA_OK(cudaMemcpy(d.call.base, d.p.cache, d.p.cache_bytes, cudaMemcpyHostToDevice));
            poison_device(&d);
            run(&d, &d.call, (ts_kernel)kernel);
            memcpy(first, d.p.out, d.q_bytes);
            memcpy(cache, d.p.cache, d.p.cache_bytes);
            for (size_t e = 0; e < d.p.cache_bytes / ts_dtype_bytes(dtype); e++)
                if (isnan(get(cache, dtype, e)))
                    put(cache, dtype, e, 0);
            CUDA_OK(cudaMemcpy(d.call.base, cache, d.p.cache_bytes, cudaMemcpyHostToDevice));
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
    CUDA_OK(cudaMemcpy(d.k + last, nan, sizeof nan, cudaMemcpyHostToDevice));
    CUDA_OK(cudaMemcpy(d.v + last, nan, sizeof nan, cudaMemcpyHostToDevice));
    for (int kernel = TS_KERNEL_AUTO; kernel < TS_KERNEL_COUNT; kernel++) {
        if (ts_kernel_check((ts_kernel)kernel, &d.call.geometry, why, sizeof why) != TS_OK)
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

static void copying_blocks_moves_every_byte_and_no_other(void **state)
{
    (void)state;
    static const size_t sizes[] = {36, 48, 66, 4096, 98304};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t bytes = sizes[i];
        unsigned char *host = malloc(6 * bytes), *back = malloc(6 * bytes), *device;
        for (size_t j = 0; j < 6 * bytes; j++)
            host[j] = (unsigned char)(j * 7 + j / 251);
        CUDA_OK(cudaMalloc((void **)&device, 6 * bytes));
        CUDA_OK(cudaMemcpy(device, host, 6 * bytes, cudaMemcpyHostToDevice));
        ts_block_copy copies[] = {{.src = 4, .dst = 1}, {.src = 0, .dst = 5}};
        ts_gpu_launch *l = ts_gpu_launch_take(gpu);
        assert_int_equal(ts_gpu_launch_copies(l, device, bytes, copies, 2), TS_OK);
        assert_int_equal(ts_gpu_launch_finish(l, NULL, NULL), TS_OK);
        CUDA_OK(cudaDeviceSynchronize());
        CUDA_OK(cudaMemcpy(back, device, 6 * bytes, cudaMemcpyDeviceToHost));
        memcpy(host + bytes, host + 4 * bytes, bytes);
        memcpy(host + 5 * bytes, host, bytes);
        assert_memory_equal(back, host, 6 * bytes);
        CUDA_OK(cudaFree(device));
        free(host);
        free(back);
    }
}

static void v4_refuses_rows_that_are_no_whole_vectors_and_names_them(void **state)
{
    (void)state;
    ts_geometry g = {.layers = 1, .kv_heads = 1, .head_dim = 33, .block_tokens = 1};
    assert_int_equal(ts_kernel_check(TS_KERNEL_V4, &g, why, sizeof why), TS_EINVAL);
    assert_string_equal(why, "kernel v4 loads rows of K and V as 16-byte vectors; a row of "
                             "head_dim 33 in fp32 has 132 bytes");
}

/* A device that has less shared memory for a block: what a kernel takes more of isn't chosen, and
 * is refused by name where it is asked for. Results are as good. */
static void what_doesnt_fit_into_shared_memory_isnt_launched(void **state)
{
    (void)state;
    static const uint32_t dims[] = {64, 128, 256};
    static const uint32_t lengths[][2] = {{70, 1}, {300, 30}, {1500, 300}, {90, 90}, {5000, 2}};
    ts_attention *host = ts_attention_new(0, TS_ISA_AUTO);
    for (size_t limit = 16 << 10; limit <= 100 << 10; limit += 28 << 10)
        for (int i = 0; i < 12; i++) {
            ts_dtype dtype = (ts_dtype)(i % 4), io = i % 4 == 3 ? TS_DTYPE_FP16 : dtype;
            rng r = {23};
            device_problem d;
            device_problem_new(&d,
                               (shape){.dtype = dtype,
                                       .io = i / 4 == 1 ? TS_DTYPE_FP32 : io,
                                       .heads = 8,
                                       .kv_heads = 1,
                                       .head_dim = dims[i / 4],
                                       .block_tokens = 16,
                                       .layers = 1},
                               lengths, 5, &r);
            assert_int_equal(ts_attention_run(host, &d.p.call), TS_OK); /* writes the new K and V */
            gpu->info.shared_bytes = limit;
            poison_device(&d);
            run(&d, &d.call, TS_KERNEL_AUTO);
            for (uint32_t j = 0; j < 5; j++) {
                double *ref = reference_of(&d.p, &d.p.seqs[j]);
                double error = relative_error(&d.p, &d.p.seqs[j], ref);
                if (!(error <= (d.call.io_dtype == TS_DTYPE_FP32 ? 1e-5 : 8e-3)))
                    fail_msg("%zu bytes, %s, head_dim %u, sequence %u: relative error %g", limit,
                             ts_dtype_name(dtype), dims[i / 4], j, error);
                free(ref);
            }
            ts_gpu_plan *plan = NULL;
            bool wide = limit == 16 << 10 && dims[i / 4] == 256;
            ts_status status = ts_gpu_plan_new(gpu, &d.call.geometry, d.call.heads, d.call.io_dtype,
                                               TS_KERNEL_TILE, d.seqs, 1, &plan, why, sizeof why);
            if (wide) {
                assert_int_equal(status, TS_EINVAL);
                assert_non_null(strstr(why, "kernel tile takes "));
                assert_non_null(strstr(
                    why, " bytes of shared memory for a head_dim of 256; the device has 16384"));
            }
            ts_gpu_plan_free(plan);
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

/* A launch that waits for a word goes on when the host writes it, and its signal comes after. */
static void a_launch_waits_for_its_word_and_signals(void **state)
{
    (void)state;
    uint32_t *words = NULL, *device;
    assert_int_equal(posix_memalign((void **)&words, 4096, 4096), 0);
    memset(words, 0, 4096);
    OK(ts_gpu_pin(gpu, words, 4096, (void **)&device, why, sizeof why));
    sem_t done;
    sem_init(&done, 0, 0);
    ts_gpu_launch *l = ts_gpu_launch_take(gpu);
    assert_int_equal(ts_gpu_launch_wait(l, &device[0], 5), TS_OK);
    assert_int_equal(ts_gpu_launch_signal(l, &device[16], 9), TS_OK);
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    assert_int_equal(sem_trywait(&done), -1);
    assert_int_equal(__atomic_load_n(&words[16], __ATOMIC_ACQUIRE), 0);
    __atomic_store_n(&words[0], 5, __ATOMIC_RELEASE);
    while (sem_wait(&done) != 0)
        ;
    assert_int_equal(__atomic_load_n(&words[16], __ATOMIC_ACQUIRE), 9);
    CUDA_OK(cudaHostUnregister(words));
    free(words);
}

/* Ends the wait of a launch if that takes too long. */
typedef struct rescue {
    pthread_mutex_t lock;
    pthread_cond_t over;
    bool done, needed;
    uint32_t *word;
} rescue;

static void *rescue_main(void *arg)
{
    rescue *r = arg;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 5;
    pthread_mutex_lock(&r->lock);
    while (!r->done && !r->needed)
        if (pthread_cond_timedwait(&r->over, &r->lock, &until) != 0) {
            r->needed = true;
            __atomic_store_n(r->word, 1, __ATOMIC_RELEASE);
        }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* Whether `work` comes to its end while a launch waits for a worker. */
static bool while_a_launch_waits(const char *what, void (*work)(device_problem *d),
                                 device_problem *d)
{
    uint32_t *words = NULL, *device;
    assert_int_equal(posix_memalign((void **)&words, 4096, 4096), 0);
    memset(words, 0, 4096);
    OK(ts_gpu_pin(gpu, words, 4096, (void **)&device, why, sizeof why));
    sem_t done;
    sem_init(&done, 0, 0);
    ts_gpu_launch *l = ts_gpu_launch_take(gpu);
    assert_int_equal(ts_gpu_launch_wait(l, device, 1), TS_OK);
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    rescue r = {.lock = PTHREAD_MUTEX_INITIALIZER, .over = PTHREAD_COND_INITIALIZER, .word = words};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, rescue_main, &r), 0);
    work(d);
    pthread_mutex_lock(&r.lock);
    r.done = true;
    pthread_cond_signal(&r.over);
    pthread_mutex_unlock(&r.lock);
    pthread_join(thread, NULL);
    if (r.needed)
        print_error("%s waited for the launch that waits\n", what);
    __atomic_store_n(words, 1, __ATOMIC_RELEASE);
    while (sem_wait(&done) != 0)
        ;
    CUDA_OK(cudaHostUnregister(words));
    free(words);
    return !r.needed;
}

static void wait_launch(ts_gpu_launch *l)
{
    sem_t done;
    sem_init(&done, 0, 0);
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    while (sem_wait(&done) != 0)
        ;
}

static void do_attend(device_problem *d)
{
    for (int kernel = TS_KERNEL_AUTO; kernel < TS_KERNEL_COUNT; kernel++)
        if (ts_kernel_check((ts_kernel)kernel, &d->call.geometry, why, sizeof why) == TS_OK)
            attend(&d->call, (ts_kernel)kernel);
}

/* A plan and partial results larger than what is kept for them from the start. */
static void do_attend_much(device_problem *d)
{
    enum { MANY = 300000 };
    uint32_t *blocks = malloc(MANY * sizeof *blocks);
    for (uint32_t i = 0; i < MANY; i++)
        blocks[i] = d->seqs[0].blocks[0];
    ts_attention_seq one = d->seqs[0];
    one.blocks = blocks;
    one.kv_tokens = MANY * d->call.geometry.block_tokens;
    ts_attention_call call = d->call;
    call.seqs = &one;
    call.num_seqs = 1;
    attend(&call, TS_KERNEL_AUTO);
    free(blocks);
}

static void do_copies(device_problem *d)
{
    ts_block_copy copy = {.src = 0, .dst = 1};
    ts_gpu_launch *l = ts_gpu_launch_take(gpu);
    assert_int_equal(ts_gpu_launch_copies(l, d->memory->base, 4096, &copy, 1), TS_OK);
    wait_launch(l);
}

static void do_pin(device_problem *d)
{
    (void)d;
    void *there,
        *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    OK(ts_gpu_pin(gpu, page, 4096, &there, why, sizeof why));
    ts_gpu_unpin_unmap(gpu, page, 4096);
}

static void do_share_vmm(device_problem *d)
{
    (void)d;
    ts_gpu_shared shared;
    OK(ts_gpu_shared_new(gpu, true, 4096, &shared, why, sizeof why));
    ts_gpu_shared_free(&shared);
}

static void do_share_malloc(device_problem *d)
{
    (void)d;
    ts_gpu_shared shared;
    OK(ts_gpu_shared_new(gpu, false, 4096, &shared, why, sizeof why));
    ts_gpu_shared_free(&shared);
}

static void do_renew(device_problem *d)
{
    int fd;
    OK(ts_memory_renew(d->memory, 0, false, why, sizeof why));
    OK(ts_memory_export(d->memory, 0, false, &fd, why, sizeof why));
    close(fd);
}

static void nothing_waits_for_a_launch_that_waits_for_a_worker(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{100, 1}, {50, 50}};
    static const struct {
        const char *what;
        void (*work)(device_problem *d);
    } works[] = {
        {"attending", do_attend},
        {"copying blocks", do_copies},
        {"attending with large tables", do_attend_much},
        {"pinning host memory", do_pin},
        {"sharing VMM memory", do_share_vmm},
        {"sharing cudaMalloc memory", do_share_malloc},
        {"renewing and exporting a slab", do_renew},
    };
    bool all = true;
    rng r = {3};
    device_problem d;
    device_problem_new(&d,
                       (shape){.dtype = TS_DTYPE_FP16,
                               .io = TS_DTYPE_FP32,
                               .heads = 2,
                               .kv_heads = 1,
                               .head_dim = 256,
                               .block_tokens = 16,
                               .layers = 1},
                       lengths, 2, &r);
    for (size_t i = 0; i < sizeof works / sizeof *works; i++)
        all &= while_a_launch_waits(works[i].what, works[i].work, &d);
    assert_true(all);
    device_problem_free(&d);
}

static void launches_run_out_and_come_back(void **state)
{
    (void)state;
    ts_gpu_launch *taken[TS_GPU_LAUNCHES];
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++) {
        taken[i] = ts_gpu_launch_take(gpu);
        assert_non_null(taken[i]);
    }
    assert_null(ts_gpu_launch_take(gpu));
    sem_t done;
    sem_init(&done, 0, 0);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        assert_int_equal(ts_gpu_launch_finish(taken[i], post, &done), TS_OK);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        while (sem_wait(&done) != 0)
            ;
    assert_non_null(taken[0] = ts_gpu_launch_take(gpu));
    assert_int_equal(ts_gpu_launch_finish(taken[0], NULL, NULL), TS_OK);
    CUDA_OK(cudaDeviceSynchronize());
}

static void more_memory_than_there_is_is_refused_with_the_numbers(void **state)
{
    (void)state;
    ts_memory *m;
    const size_t bytes = (size_t)1 << 40;
    assert_int_equal(ts_memory_cuda_ipc_new(gpu, bytes, &m, why, sizeof why), TS_ENOMEM);
    assert_string_equal(
        why, "taking device memory of 1099511627776 bytes failed: cudaErrorMemoryAllocation");
    OK(ts_memory_cuda_vmm_new(gpu, 1, bytes, &m, why, sizeof why)); /* addresses alone */
    assert_int_equal(ts_memory_renew(m, 0, false, why, sizeof why), TS_ENOMEM);
    assert_string_equal(
        why, "taking device memory of 1099511627776 bytes failed: CUDA_ERROR_OUT_OF_MEMORY");
    ts_memory_free(m);
    OK(ts_gpu_health(gpu, why, sizeof why));
}

/* New memory is zero, whatever was in the old. */
static void a_renewed_slab_is_wiped(void **state)
{
    (void)state;
    ts_memory *m;
    const size_t bytes = ts_gpu_get_info(gpu)->granularity;
    unsigned char *host = malloc(bytes), *zero = calloc(1, bytes);
    OK(ts_memory_cuda_vmm_new(gpu, 3, bytes, &m, why, sizeof why));
    for (int round = 0; round < 2; round++) {
        OK(ts_memory_renew(m, 1, false, why, sizeof why));
        CUDA_OK(cudaMemcpy(host, m->base + bytes, bytes, cudaMemcpyDeviceToHost));
        assert_memory_equal(host, zero, bytes);
        CUDA_OK(cudaMemset(m->base + bytes, 0xab, bytes));
    }
    ts_memory_free(m);
    free(host);
    free(zero);
}

int main(void)
{
    if (ts_gpu_count(why, sizeof why) == 0) {
        printf("skipped: %s\n", why);
        return 77;
    }
    if (ts_gpu_open(0, &gpu, why, sizeof why) != TS_OK) {
        fprintf(stderr, "%s\n", why);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_kernel_dtype_and_head_sharing_matches_the_float64_reference),
        cmocka_unit_test(every_variant_matches_the_reference),
        cmocka_unit_test(every_head_dim_and_block_size_matches_the_reference),
        cmocka_unit_test(an_exchange_of_the_caches_own_type_is_read_and_rounded_once),
        cmocka_unit_test(a_context_of_131072_tokens_matches_the_reference),
        cmocka_unit_test(splitting_a_batch_changes_no_bit),
        cmocka_unit_test(what_lies_in_unused_slots_changes_no_bit),
        cmocka_unit_test(later_tokens_never_leak_into_earlier_ones),
        cmocka_unit_test(copying_blocks_moves_every_byte_and_no_other),
        cmocka_unit_test_setup_teardown(what_doesnt_fit_into_shared_memory_isnt_launched,
                                        note_shared_bytes, restore_shared_bytes),
        cmocka_unit_test(v4_refuses_rows_that_are_no_whole_vectors_and_names_them),
        cmocka_unit_test(a_launch_waits_for_its_word_and_signals),
        cmocka_unit_test(nothing_waits_for_a_launch_that_waits_for_a_worker),
        cmocka_unit_test(launches_run_out_and_come_back),
        cmocka_unit_test(more_memory_than_there_is_is_refused_with_the_numbers),
        cmocka_unit_test(a_renewed_slab_is_wiped),
    };
    if (getenv("TS_TEST_FILTER") != NULL) /* for tools that make everything slow */
        cmocka_set_test_filter(getenv("TS_TEST_FILTER"));
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    ts_gpu_close(gpu);
    return failed;
}
