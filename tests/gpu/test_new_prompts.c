/*
 * Prompts that are all new: the kernel that attends to them stores them, and what is stored equals,
 * bit for bit, what a launch of its own stores. Needs a GPU; exits with 77 where there is none.
 */
#include "device_problem.h"

/* Sequences that are all new beside others: wgmma reads the run's own k and v and stores them,
 * where these are aligned to 16 bytes. Where they aren't, a launch before it stores them. */
static void check_all_new(shape s, variety v, bool nonfinite)
{
    enum { SEQS = 9 };
    static const uint32_t lengths[SEQS][2] = {{300, 300}, {700, 200}, {128, 128},
                                              {129, 129}, {500, 1},   {1000, 1000},
                                              {77, 77},   {255, 255}, {20, 20}};
    const size_t e = ts_dtype_bytes(s.io), row = (size_t)s.kv_heads * s.head_dim * e;
    rng r = {s.head_dim + s.heads};
    device_problem d;
    device_problem_vary(&d, s, v, lengths, SEQS, &r);
    const size_t lse_bytes = d.p.lse_elements * sizeof *d.p.lse;
    const size_t out_bytes = d.q_bytes + lse_bytes, bytes = out_bytes + d.p.cache_bytes;
    unsigned char *results[2], *before = malloc(d.p.cache_bytes), *k, *values;
    for (uint32_t i = 0; i < SEQS; i++)
        d.seqs[i].layer = 1; /* one run */
    if (nonfinite) /* in V of the last token of some, and of one that all later ones see */
        for (uint32_t i = 0; i < SEQS; i += 2) {
            static const uint16_t nan = 0x7fff, infinity_of_bf16 = 0x7f80;
            unsigned char *of_seq = d.v + ((const unsigned char *)d.seqs[i].v - d.v);
            to_device(of_seq + (lengths[i][1] - 1) * row, &nan, sizeof nan);
            to_device(of_seq + lengths[i][1] / 2 * row, &infinity_of_bf16, sizeof nan);
        }
    CUDA_OK(cudaMalloc((void **)&k, d.kv_bytes + e));
    CUDA_OK(cudaMalloc((void **)&values, d.kv_bytes + e));
    CUDA_OK(cudaMemcpy(k + e, d.k, d.kv_bytes, cudaMemcpyDeviceToDevice));
    CUDA_OK(cudaMemcpy(values + e, d.v, d.kv_bytes, cudaMemcpyDeviceToDevice));
    CUDA_OK(cudaMemcpy(before, d.memory->base, d.p.cache_bytes, cudaMemcpyDeviceToHost));
    const size_t l2_bytes = gpu->info.l2_bytes;
    for (int apart = 0; apart < 2; apart++) {
        gpu->info.l2_bytes = apart ? 1 : l2_bytes; /* 1: one head after the other */
        to_device(d.memory->base, before, d.p.cache_bytes);
        poison_device(&d);
        for (uint32_t i = 0; apart && i < SEQS; i++) {
            d.seqs[i].k = k + e + ((const unsigned char *)d.seqs[i].k - d.k);
            d.seqs[i].v = values + e + ((const unsigned char *)d.seqs[i].v - d.v);
        }
        run(&d, &d.call, TS_KERNEL_AUTO);
        unsigned char *to = results[apart] = malloc(bytes);
        memcpy(to, d.p.out, d.q_bytes);
        memcpy(to + d.q_bytes, d.p.lse, lse_bytes);
        CUDA_OK(
            cudaMemcpy(to + out_bytes, d.memory->base, d.p.cache_bytes, cudaMemcpyDeviceToHost));
    }
    gpu->info.l2_bytes = l2_bytes;
    assert_memory_equal(results[0], results[1], out_bytes);
    assert_memory_equal(results[0] + out_bytes, results[1] + out_bytes, d.p.cache_bytes);
    assert_memory_not_equal(results[0] + out_bytes, before, d.p.cache_bytes);
    free(results[0]);
    free(results[1]);
    free(before);
    CUDA_OK(cudaFree(k));
    CUDA_OK(cudaFree(values));
    device_problem_free(&d);
}

static void sequences_that_are_all_new_are_stored_as_by_an_append(void **state)
{
    (void)state;
    static const uint32_t dims[] = {128, 64, 256, 192};
    static const uint32_t heads[][2] = {{8, 2}, {14, 2}, {3, 3}, {32, 1}};
    static const uint32_t blocks[] = {16, 32, 48, 128, 256};
    for (uint32_t i = 0; i < 40; i++) {
        const ts_dtype dtype = i / 4 % 2 ? TS_DTYPE_FP16 : TS_DTYPE_BF16;
        const shape s = {.dtype = dtype,
                         .io = dtype,
                         .layout = (ts_layout)(i / 2 % 2),
                         .heads = heads[i / 5 % 4][0],
                         .kv_heads = heads[i / 5 % 4][1],
                         .head_dim = dims[i % 4],
                         .block_tokens = blocks[i % 5],
                         .layers = 2};
        check_all_new(s, hidden_varieties[i / 2 % 5], dtype == TS_DTYPE_BF16 && i % 3 == 0);
    }
}

/* Blocks of threads take all-new prompts and others by turns, again and again: nobody brings a tile
 * to where another's is still stored from. */
static void what_is_stored_is_read_before_its_place_is_taken(void **state)
{
    (void)state;
    enum { SEQS = 48, TIMES = 60 };
    static const uint32_t blocks[] = {16, 32, 48};
    uint32_t lengths[SEQS][2];
    rng r = {53};
    for (uint32_t i = 0; i < SEQS; i++) {
        lengths[i][1] = i % 2 ? 33 : 65 + rng_below(&r, 63);
        lengths[i][0] = lengths[i][1] + (i % 2 ? 200 + rng_below(&r, 400) : 0);
    }
    for (uint32_t b = 0; b < 3; b++) {
        const shape s = {.dtype = TS_DTYPE_BF16,
                         .io = TS_DTYPE_BF16,
                         .heads = 32,
                         .kv_heads = 8,
                         .head_dim = 128,
                         .block_tokens = blocks[b],
                         .layers = 1};
        device_problem d;
        device_problem_new(&d, s, (const uint32_t(*)[2])lengths, SEQS, &r);
        ts_attention *host = ts_attention_new(0, TS_ISA_AUTO);
        unsigned char *before = malloc(d.p.cache_bytes), *stored = malloc(d.p.cache_bytes);
        CUDA_OK(cudaMemcpy(before, d.memory->base, d.p.cache_bytes, cudaMemcpyDeviceToHost));
        assert_int_equal(ts_attention_run(host, &d.p.call), TS_OK); /* which stores, too */
        ts_attention_free(host);
        for (int n = 0; n < TIMES; n++) {
            to_device(d.memory->base, before, d.p.cache_bytes);
            run(&d, &d.call, TS_KERNEL_AUTO);
            CUDA_OK(cudaMemcpy(stored, d.memory->base, d.p.cache_bytes, cudaMemcpyDeviceToHost));
            assert_memory_equal(stored, d.p.cache, d.p.cache_bytes);
        }
        free(before);
        free(stored);
        device_problem_free(&d);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sequences_that_are_all_new_are_stored_as_by_an_append),
        cmocka_unit_test(what_is_stored_is_read_before_its_place_is_taken),
    };
    return run_gpu_tests(tests, sizeof tests / sizeof *tests);
}
