/* Cases of test_attention.c that hold the kernels against themselves, bit for bit, and against what
 * must not show: other sequences, later tokens, unused slots. */
#ifndef TS_ATTENTION_BITS_H
#define TS_ATTENTION_BITS_H

#include "attention_util.h"

/* One row of out for each query token alone. */
static void attend_token_by_token(ts_attention *a, const problem *p, uint32_t seq)
{
    const size_t row_bytes = (size_t)p->call.heads * p->call.geometry.head_dim * sizeof(float);
    for (uint32_t t = 0; t < p->seqs[seq].q_tokens; t++) {
        ts_attention_seq token = p->seqs[seq];
        token.kv_tokens -= token.q_tokens - 1 - t;
        token.q_tokens = 1;
        token.k = token.v = NULL;
        token.q = (const unsigned char *)token.q + row_bytes * t;
        token.out = (unsigned char *)token.out + row_bytes * t;
        if (token.lse != NULL)
            token.lse += p->call.heads * t;
        ts_attention_call one = p->call;
        one.seqs = &token;
        one.num_seqs = 1;
        assert_int_equal(ts_attention_run(a, &one), TS_OK);
    }
}

/* The same batch together, one by one, and prefilled token by token, on 1, 2 and 5 threads. */
static void check_splits(shape s, const variety *variety, ts_isa isa)
{
    if (!has_own_code(s.dtype))
        return;
    static const uint32_t lengths[][2] = {{1, 1},    {700, 300}, {64, 1},   {1025, 7},
                                          {5000, 1}, {90, 90},   {2048, 8}, {3000, 33}};
    const uint32_t n = sizeof lengths / sizeof *lengths;
    rng r = {7};
    problem p;
    problem_new(&p, s, lengths, n, &r);
    if (variety != NULL)
        problem_vary(&p, *variety, &r);
    size_t bytes = p.q_elements * sizeof(float);
    unsigned char *first = malloc(bytes);
    ts_attention *a = ts_attention_new(1, isa);
    poison(&p);
    assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
    memcpy(first, p.out, bytes);
    ts_attention_free(a);
    for (uint32_t threads = 1; threads <= 5; threads += threads == 2 ? 3 : 1) {
        if (threads < 5 && !all_cases)
            continue;
        a = ts_attention_new(threads, isa);
        poison(&p);
        assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
        assert_memory_equal(p.out, first, bytes);
        poison(&p);
        for (uint32_t j = 0; j < n; j++) {
            ts_attention_call one = p.call;
            one.seqs = &p.seqs[j];
            one.num_seqs = 1;
            assert_int_equal(ts_attention_run(a, &one), TS_OK);
        }
        assert_memory_equal(p.out, first, bytes);
        poison(&p);
        for (uint32_t j = 0; j < n; j++)
            attend_token_by_token(a, &p, j);
        assert_memory_equal(p.out, first, bytes);
        ts_attention_free(a);
    }
    free(first);
    problem_free(&p);
}

static void sequences_without_query_tokens_change_no_bit(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{0, 0}, {700, 3}, {300, 0}, {1100, 90}, {5, 0}};
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (ts_isa_resolve(isas[i]) != isas[i])
            continue;
        rng r = {41};
        problem p;
        problem_new(&p, variety_shape(0, 1), lengths, 5, &r);
        p.seqs[0].blocks = p.seqs[2].blocks = p.seqs[4].blocks = NULL;
        const size_t bytes = p.q_elements * sizeof(float);
        unsigned char *first = malloc(bytes);
        ts_attention *a = ts_attention_new(2, isas[i]);
        poison(&p);
        assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
        memcpy(first, p.out, bytes);
        poison(&p);
        const ts_attention_seq some[] = {p.seqs[1], p.seqs[3]};
        ts_attention_call without = p.call;
        without.seqs = some;
        without.num_seqs = 2;
        assert_int_equal(ts_attention_run(a, &without), TS_OK);
        assert_memory_equal(p.out, first, bytes);
        ts_attention_free(a);
        free(first);
        problem_free(&p);
    }
}

static void splitting_a_batch_changes_no_bit(void **state)
{
    (void)state;
    shape s = {.dtype = TS_DTYPE_BF16,
               .io = TS_DTYPE_FP32,
               .layout = TS_LAYOUT_NHD,
               .heads = 4,
               .kv_heads = 1,
               .head_dim = 72,
               .block_tokens = 24,
               .layers = 1};
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (ts_isa_resolve(isas[i]) != isas[i])
            continue;
        static const struct {
            ts_dtype dtype;
            uint32_t head_dim; /* the tile unit takes 64 and 128 */
        } caches[] = {{TS_DTYPE_BF16, 72}, {TS_DTYPE_BF16, 128}, {TS_DTYPE_FP8_E4M3, 64}};
        for (size_t c = 0; c < sizeof caches / sizeof *caches; c++) {
            s.dtype = caches[c].dtype;
            s.head_dim = caches[c].head_dim;
            s.layout = TS_LAYOUT_NHD;
            s.kv_heads = 1;
            check_splits(s, NULL, isas[i]);
            s.layout = TS_LAYOUT_HND;
            s.kv_heads = 4;
            check_splits(s, &varieties[VARIETIES - 1], isas[i]);
        }
    }
}

/* The last token's K of head 0 and one element of its V of head 1 are NaN: the last row of head 0
 * shows it, and that element of head 1's, and nothing else. */
static void check_leaks(ts_dtype dtype, uint32_t dim, uint32_t tokens, ts_isa isa)
{
    if (!has_own_code(dtype))
        return;
    enum { HEADS = 2 };
    const uint32_t lengths[][2] = {{tokens, tokens}};
    rng r = {11};
    problem p;
    problem_new(&p,
                (shape){.dtype = dtype,
                        .io = TS_DTYPE_FP32,
                        .layout = TS_LAYOUT_NHD,
                        .heads = HEADS,
                        .kv_heads = HEADS,
                        .head_dim = dim,
                        .block_tokens = 16,
                        .layers = 1},
                lengths, 1, &r);
    ts_attention *a = ts_attention_new(1, isa);
    float *last_k = (float *)(void *)p.k + (tokens - 1) * HEADS * dim;
    float *last_v = (float *)(void *)p.v + (tokens - 1) * HEADS * dim;
    const float *out = (float *)(void *)p.out;
    memset(&last_k[dim / 3], 0xff, sizeof(float)); /* a NaN whose every bit is set */
    last_v[dim + dim / 2] = NAN;
    poison(&p);
    assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t i = 0; i < HEADS * dim; i++) {
            bool shows = t == tokens - 1 && (i < dim || i == dim + dim / 2);
            if ((isnan(out[t * HEADS * dim + i]) != 0) != shows)
                fail_msg("%s, head_dim %u, %s: token %u of %u, element %u is %g",
                         ts_dtype_name(dtype), dim, ts_isa_name(ts_attention_isa(a)), t, tokens, i,
                         (double)out[t * HEADS * dim + i]);
        }
    ts_attention_free(a);
    problem_free(&p);
}

static void later_tokens_never_leak_into_earlier_ones(void **state)
{
    (void)state;
    static const uint32_t dims[] = {32, 40, 64, 128}, lengths[] = {100, 128, 256};
    for (int dtype = TS_DTYPE_FP32; dtype < TS_DTYPE_COUNT; dtype++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
            for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
                for (size_t t = 0; t < sizeof lengths / sizeof *lengths; t++)
                    if (ts_isa_resolve(isas[i]) == isas[i])
                        check_leaks((ts_dtype)dtype, dims[d], lengths[t], isas[i]);
}

/* One element of V is infinite: that element of the rows that see it is, and nothing else. */
static void an_infinite_value_shows_where_it_is_seen(void **state)
{
    (void)state;
    enum { TOKENS = 300, SEEN = 40, DIM = 128, ELEMENT = 77 };
    static const uint32_t lengths[][2] = {{TOKENS, 1}};
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
        for (int dtype = TS_DTYPE_FP32; dtype <= TS_DTYPE_BF16; dtype++) {
            if (ts_isa_resolve(isas[i]) != isas[i])
                continue;
            rng r = {43};
            problem p;
            problem_new(&p,
                        (shape){.dtype = (ts_dtype)dtype,
                                .heads = 8,
                                .kv_heads = 2,
                                .head_dim = DIM,
                                .block_tokens = 16,
                                .layers = 1},
                        lengths, 1, &r);
            unsigned char *v =
                key_in_cache(&p, &p.seqs[0], SEEN, 1) + ts_geometry_plane_bytes(&p.call.geometry);
            put(v, (ts_dtype)dtype, ELEMENT, -INFINITY);
            ts_attention *a = ts_attention_new(1, isas[i]);
            assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
            for (uint32_t d = 0; d < 8 * DIM; d++) {
                float x = get(p.out, TS_DTYPE_FP32, d);
                if (d / DIM >= 4 && d % DIM == ELEMENT ? x != -INFINITY : !isfinite(x))
                    fail_msg("%s, %s: element %u is %g", ts_isa_name(isas[i]),
                             ts_dtype_name((ts_dtype)dtype), d, (double)x);
            }
            ts_attention_free(a);
            problem_free(&p);
        }
}

/* All 64 tokens have K = (code, 0, ...), and of V's dimension d token d % 64 alone has code d. */
static void check_codes(ts_isa isa)
{
    enum { TOKENS = 64, DIM = 256 };
    static const uint32_t lengths[][2] = {{TOKENS, 1}};
    rng r = {3};
    problem p;
    problem_new(&p,
                (shape){.dtype = TS_DTYPE_FP8_E4M3,
                        .io = TS_DTYPE_FP32,
                        .layout = TS_LAYOUT_NHD,
                        .heads = 1,
                        .kv_heads = 1,
                        .head_dim = DIM,
                        .block_tokens = TOKENS,
                        .layers = 1},
                lengths, 1, &r);
    float lse;
    p.seqs[0].k = p.seqs[0].v = NULL; /* all is in the cache */
    p.seqs[0].scales = NULL;
    p.seqs[0].lse = &lse;
    p.call.variant.scale = 1;
    for (uint32_t d = 0; d < DIM; d++)
        put(p.q, TS_DTYPE_FP32, d, d == 0);
    ts_attention *a = ts_attention_new(1, isa);
    for (uint32_t code = 0; code < 256; code++) {
        unsigned char *k = p.cache + p.tables[0][0] * ts_geometry_block_bytes(&p.call.geometry);
        memset(k, 0, (size_t)2 * TOKENS * DIM);
        for (uint32_t t = 0; t < TOKENS; t++)
            k[t * DIM] = (unsigned char)code;
        for (uint32_t d = 0; d < DIM; d++)
            k[(TOKENS + d % TOKENS) * DIM + d] = (unsigned char)(d % 128 == 127 ? 0 : d);
        assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
        float key = ts_fp8_to_fp32((uint8_t)code);
        if (code % 128 == 127) {
            assert_true(isnan(key) && isnan(lse));
            continue;
        }
        if (!(fabsf(lse - (key + logf(TOKENS))) <= 1e-6f * (4 + fabsf(key))))
            fail_msg("%s: K of code %u, %g: the log-sum-exp is %g", ts_isa_name(isa), code,
                     (double)key, (double)lse);
        for (uint32_t d = 0; d < DIM; d++) {
            float value = d % 128 == 127 ? 0 : ts_fp8_to_fp32((uint8_t)d) / TOKENS;
            if (get(p.out, TS_DTYPE_FP32, d) != value)
                fail_msg("%s: V of code %u is %g, not %g", ts_isa_name(isa), d,
                         (double)get(p.out, TS_DTYPE_FP32, d), (double)value);
        }
    }
    ts_attention_free(a);
    problem_free(&p);
}

static void every_fp8_number_is_multiplied_exactly(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
        if (ts_isa_resolve(isas[i]) == isas[i])
            check_codes(isas[i]);
}

#endif
