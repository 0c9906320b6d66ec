/*
 * Random batches of prompts and of sequences with a few new tokens, all with q in 16 bits: each
 * sequence has the bits that it has alone, whoever the others are, whether its chunks are pieces of
 * their own or one, and whatever lies in slots that no sequence has. Needs a GPU; exits with 77
 * where there is none.
 */
#include "device_problem.h"

#define SEQS 10u
#define SLOPED 6u /* of a problem with slopes: from this one on; they are runs of their own */
#define BATCHES 60u

static const uint32_t head_dims[] = {128, 64, 128, 256, 128, 96, 128, 80, 192};
static const uint32_t head_counts[][2] = {{8, 2},  {4, 1}, {28, 4}, {32, 8},
                                          {16, 1}, {4, 4}, {12, 3}};
static const uint32_t block_sizes[] = {16, 32, 16, 48, 128, 24, 256, 64, 5, 16};
static const variety random_varieties[] = {
    {.window = 0},   {.window = 130},
    {.sinks = true}, {.alibi = true},
    {.window = 0},   {.soft_cap = 5, .window = 1030, .sinks = true},
    {.window = 7},   {.alibi = true, .window = 300, .sinks = true}};

static uint32_t one_of(rng *r, const uint32_t *numbers, size_t count)
{
    return numbers[rng_below(r, (uint32_t)count)];
}
#define ONE_OF(r, numbers) one_of(r, numbers, sizeof(numbers) / sizeof *(numbers))

static shape random_shape(uint32_t batch, rng *r)
{
    static const ts_dtype caches[] = {TS_DTYPE_BF16, TS_DTYPE_FP16, TS_DTYPE_FP8_E4M3};
    const ts_dtype dtype = caches[batch % 3];
    const uint32_t *heads = head_counts[rng_below(r, sizeof head_counts / sizeof *head_counts)];
    return (shape){.dtype = dtype,
                   .io = dtype != TS_DTYPE_FP8_E4M3 ? dtype
                         : batch / 3 % 2            ? TS_DTYPE_FP16
                                                    : TS_DTYPE_BF16,
                   .layout = (ts_layout)rng_below(r, 2),
                   .heads = heads[0],
                   .kv_heads = heads[1],
                   .head_dim = ONE_OF(r, head_dims),
                   .block_tokens = ONE_OF(r, block_sizes),
                   .layers = 1};
}

/* Tokens, and new ones. With few KV heads contexts are long enough to have many chunks. */
static void random_lengths(shape s, rng *r, uint32_t (*lengths)[2])
{
    static const uint32_t news[] = {0, 1, 2, 3, 4, 5, 8, 8, 12, 16, 16, 16, 33, 64, 100, 300};
    for (uint32_t i = 0; i < SEQS; i++) {
        const uint32_t most[] = {1, 40, 600, s.kv_heads > 2 ? 1500 : 7000};
        lengths[i][1] = ONE_OF(r, news);
        lengths[i][0] = lengths[i][1] + rng_below(r, ONE_OF(r, most));
    }
}

/* Every second one's scores are so far apart that what weights are measured from moves often. */
static void spread_scores(problem *p)
{
    const size_t row = (size_t)p->call.heads * p->call.geometry.head_dim;
    for (uint32_t i = 0; i < SEQS; i += 2)
        for (size_t e = 0; e < p->seqs[i].q_tokens * row; e++) {
            unsigned char *q = (unsigned char *)(uintptr_t)p->seqs[i].q;
            put(q, p->call.io_dtype, e, 6 * get(q, p->call.io_dtype, e));
        }
}

typedef struct random_batch {
    device_problem d;
    shape s;
    unsigned char *alone[SEQS]; /* what each came to */
    bool sloped;
} random_batch;

static void batch_new(random_batch *b, uint32_t number)
{
    uint32_t lengths[SEQS][2];
    rng r = {number * 7919u + 1};
    const variety v = random_varieties[number % (sizeof random_varieties / sizeof(variety))];
    memset(b, 0, sizeof *b);
    b->s = random_shape(number, &r);
    b->sloped = v.alibi;
    random_lengths(b->s, &r, lengths);
    lengths[0][1] = lengths[0][0] = 3; /* there is a query token */
    problem_new(&b->d.p, b->s, (const uint32_t(*)[2])lengths, SEQS, &r);
    spread_scores(&b->d.p);
    problem_vary(&b->d.p, v, &r);
    for (uint32_t i = 0; v.alibi && i < SLOPED; i++)
        b->d.p.seqs[i].alibi = NULL;
    device_problem_upload(&b->d, b->s, v);
    for (uint32_t i = 0; v.alibi && i < SLOPED; i++)
        b->d.seqs[i].alibi = NULL;
}

static void batch_free(random_batch *b)
{
    for (uint32_t i = 0; i < SEQS; i++)
        free(b->alone[i]);
    device_problem_free(&b->d);
}

/* Sequences `from` to `to` - 1 in one launch; those with slopes, and those without, are a run. */
static void run_some(random_batch *b, uint32_t from, uint32_t to)
{
    const uint32_t middle = !b->sloped || SLOPED <= from || SLOPED >= to ? to : SLOPED;
    const uint32_t firsts[] = {from, middle, to}, num_runs = middle < to ? 2 : 1;
    ts_gpu_plan *plans[2];
    ts_gpu_run runs[2];
    for (uint32_t i = 0; i < num_runs; i++) {
        const ts_attention_seq *s = &b->d.seqs[firsts[i]];
        OK(ts_gpu_plan_new(gpu, &b->d.call.geometry, b->s.heads, b->s.io, TS_KERNEL_AUTO, s,
                           firsts[i + 1] - firsts[i], &plans[i], why, sizeof why));
        runs[i] = ts_gpu_run_over(plans[i], s);
    }
    launch_runs(&b->d, runs, num_runs);
    for (uint32_t i = 0; i < num_runs; i++)
        ts_gpu_plan_free(plans[i]);
}

static void check_some(random_batch *b, uint32_t number, uint32_t from, uint32_t to,
                       const char *what)
{
    unsigned char *ours = malloc(b->d.q_bytes + b->d.p.lse_elements * sizeof(float) + 1);
    run_some(b, from, to);
    for (uint32_t i = from; i < to; i++)
        if (memcmp(ours, b->alone[i], result_of(&b->d, i, ours)) != 0)
            fail_msg("batch %u, %s cache, %u/%u heads of %u, blocks of %u: %s: the sequence of %u "
                     "tokens, %u new, has other bits",
                     number, ts_dtype_name(b->s.dtype), b->s.heads, b->s.kv_heads, b->s.head_dim,
                     b->s.block_tokens, what, b->d.seqs[i].kv_tokens, b->d.seqs[i].q_tokens);
    free(ours);
}

/* Each row beside the processor's. */
static void check_rows(const random_batch *b, uint32_t number, const float *host, uint32_t i)
{
    const ts_attention_seq *s = &b->d.p.seqs[i];
    const size_t first = (size_t)((unsigned char *)s->out - b->d.p.out) / ts_dtype_bytes(b->s.io);
    for (size_t row = 0; row < (size_t)s->q_tokens * b->s.heads; row++) {
        double diff = 0, norm = 0;
        for (uint32_t d = 0; d < b->s.head_dim; d++) {
            double x = get(s->out, b->s.io, row * b->s.head_dim + d);
            double y = host[first + row * b->s.head_dim + d];
            diff += (x - y) * (x - y);
            norm += y * y;
        }
        if (!(sqrt(diff) <= 0.03 * sqrt(norm) + 1e-6))
            fail_msg("batch %u, %s cache, %u/%u heads of %u, blocks of %u: row %zu of the sequence "
                     "of %u tokens, %u new, differs by %g of %g",
                     number, ts_dtype_name(b->s.dtype), b->s.heads, b->s.kv_heads, b->s.head_dim,
                     b->s.block_tokens, row, s->kv_tokens, s->q_tokens, sqrt(diff), sqrt(norm));
    }
}

/* The processor's results; it writes the new K and V into its own cache. */
static float *attend_on_host(const random_batch *b)
{
    float *out = malloc(b->d.p.q_elements * sizeof *out);
    ts_attention *host = ts_attention_new(0, TS_ISA_AUTO);
    for (uint32_t from = 0; from < SEQS; from += SLOPED) {
        ts_attention_call some = b->d.p.call;
        some.seqs = b->d.p.seqs + from;
        some.num_seqs = from == 0 ? SLOPED : SEQS - SLOPED;
        assert_int_equal(ts_attention_run(host, &some), TS_OK);
    }
    ts_attention_free(host);
    for (size_t e = 0; e < b->d.p.q_elements; e++)
        out[e] = get(b->d.p.out, b->s.io, e);
    return out;
}

/* What no sequence has is NaN, every bit of it set, which no number is. */
static void clear_unused(random_batch *b)
{
    unsigned char *cache = malloc(b->d.p.cache_bytes);
    const uint32_t bytes = ts_dtype_bytes(b->s.dtype) == 1 ? 1 : 2;
    CUDA_OK(cudaMemcpy(cache, b->d.memory->base, b->d.p.cache_bytes, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < b->d.p.cache_bytes; i += bytes)
        if (cache[i] == 0xff && cache[i + bytes - 1] == 0xff)
            memset(cache + i, 0, bytes);
    to_device(b->d.memory->base, cache, b->d.p.cache_bytes);
    free(cache);
}

static void check_batch(uint32_t number)
{
    random_batch b;
    const uint32_t processors = gpu->info.processors;
    batch_new(&b, number);
    float *host = attend_on_host(&b);
    for (uint32_t i = 0; i < SEQS; i++) {
        run_some(&b, i, i + 1);
        b.alone[i] = malloc(b.d.q_bytes + b.d.p.lse_elements * sizeof(float) + 1);
        (void)result_of(&b.d, i, b.alone[i]);
        check_rows(&b, number, host, i);
    }
    check_some(&b, number, 0, SEQS, "all together");
    check_some(&b, number, 1, 5, "some together");
    gpu->info.processors = 1; /* chunks are one piece */
    check_some(&b, number, 0, SEQS, "all together, by one block of threads");
    check_some(&b, number, 3, 7, "some together, by one block of threads");
    gpu->info.processors = 3;
    check_some(&b, number, 0, SEQS, "all together, by three blocks of threads");
    gpu->info.processors = processors;
    clear_unused(&b);
    check_some(&b, number, 0, SEQS, "unused slots are 0");
    free(host);
    batch_free(&b);
}

static void company_changes_no_bit(void **state)
{
    (void)state;
    const uint32_t processors = gpu->info.processors;
    const char *one = getenv("TS_TEST_BATCH");
    for (uint32_t i = 0; i < BATCHES; i++)
        if (one == NULL || i == (uint32_t)atoi(one))
            check_batch(i);
    gpu->info.processors = processors;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(company_changes_no_bit)};
    return run_gpu_tests(tests, sizeof tests / sizeof *tests);
}
