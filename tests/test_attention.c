/* The host attention kernels against the float64 reference, and against themselves bit for bit. */
#include "attention_amx.h"
#include "attention_util.h"

#ifdef ONLY_ISA
static const ts_isa isas[] = {ONLY_ISA};
#else
static const ts_isa isas[] = {TS_ISA_PORTABLE, TS_ISA_AVX2, TS_ISA_AVX512, TS_ISA_AMX, TS_ISA_NEON};
#endif

/* Whether ONLY_ISA's code for a cache's type is other code than what test_attention runs for it. */
static bool has_own_code(ts_dtype dtype)
{
#ifdef ONLY_ISA
    return ONLY_ISA == TS_ISA_NEON || dtype == TS_DTYPE_FP8_E4M3 ||
           (ONLY_ISA == TS_ISA_AMX && dtype == TS_DTYPE_BF16);
#else
    (void)dtype;
    return true;
#endif
}

/* AddressSanitizer looks at addresses, and an emulator is slow. There, cases are left out that
 * differ from others in numbers alone, or that cut the same work for fewer threads. */
#if defined(__SANITIZE_ADDRESS__) || defined(TS_EMULATED)
static const bool all_cases = false;
#else
static const bool all_cases = true;
#endif

#include "attention_bits.h" /* uses what is above */

static void check_variety(shape s, variety v, const uint32_t (*lengths)[2], uint32_t num_seqs,
                          double limit)
{
    if (!has_own_code(s.dtype))
        return;
    rng r = {s.head_dim * 1000003u + s.heads};
    problem p;
    problem_new(&p, s, lengths, num_seqs, &r);
    problem_vary(&p, v, &r);
    double **refs = calloc(num_seqs, sizeof *refs);
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (ts_isa_resolve(isas[i]) != isas[i])
            continue;
        poison(&p);
        ts_attention *a = ts_attention_new(3, isas[i]);
        assert_non_null(a);
        assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
        for (uint32_t j = 0; j < num_seqs; j++) {
            if (refs[j] == NULL) /* the first run has written the new K and V */
                refs[j] = reference_of(&p, &p.seqs[j]);
            double error = relative_error(&p, &p.seqs[j], refs[j]);
            double lse = lse_error(&p, &p.seqs[j], refs[j]);
            double key = key_error(&p, &p.seqs[j], p.cache);
            if (!(key <= key_limit(s.dtype)))
                fail_msg("%s: a stored key differs by %g", ts_isa_name(isas[i]), key);
            if (!(error <= limit) || !(lse <= 1e-5)) /* NaN fails too */
                fail_msg("%s, %s cache, %u/%u heads of %u, blocks of %u, sequence of %u (%u new), "
                         "window %u, cap %g: relative error %g > %g, or of the log-sum-exp %g",
                         ts_isa_name(isas[i]), ts_dtype_name(s.dtype), s.heads, s.kv_heads,
                         s.head_dim, s.block_tokens, lengths[j][0], lengths[j][1], v.window,
                         (double)v.soft_cap, error, limit, lse);
        }
        ts_attention_free(a);
    }
    for (uint32_t j = 0; j < num_seqs; j++)
        free(refs[j]);
    free(refs);
    problem_free(&p);
}

static void check_against_reference(shape s, const uint32_t (*lengths)[2], uint32_t num_seqs,
                                    double limit)
{
    check_variety(s, (variety){0}, lengths, num_seqs, limit);
}

static void varieties_try_every_number(void **state)
{
    (void)state;
#define NUMBER(type, name, place, most, what)                                                      \
    {                                                                                              \
        bool tried = false;                                                                        \
        for (size_t i = 0; i < VARIETIES; i++)                                                     \
            tried |= varieties[i].name != 0;                                                       \
        if (!tried)                                                                                \
            fail_msg("no variety of attention_util.h has a %s", #name);                            \
    }
    TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
}

static void every_variant_matches_the_reference(void **state)
{
    (void)state;
    for (size_t i = 0; i < VARIETIES; i++)
        for (size_t which = 0; which < 3; which++)
            if (all_cases || which == i % 3)
                check_variety(variety_shape(i, which), varieties[i], mixed, MIXED, 1e-5);
}

static void check_hidden(shape s, variety v)
{
    if (!has_own_code(s.dtype))
        return;
    rng r = {s.head_dim * 1000003u + s.heads};
    problem p;
    problem_new(&p, s, with_hidden, WITH_HIDDEN, &r);
    problem_vary(&p, v, &r);
    for (uint32_t j = 0; j < WITH_HIDDEN; j++)
        hide_keys(&p, &p.seqs[j], hidden[j]);
    double *refs[WITH_HIDDEN] = {NULL};
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (ts_isa_resolve(isas[i]) != isas[i])
            continue;
        poison(&p);
        ts_attention *a = ts_attention_new(2, isas[i]);
        assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
        for (uint32_t j = 0; j < WITH_HIDDEN; j++) {
            if (refs[j] == NULL) /* the first run has written the new K and V */
                refs[j] = reference_of(&p, &p.seqs[j]);
            double lse, error = largest_error(&p, &p.seqs[j], refs[j], &lse);
            if (!(error <= 2e-5) || !(lse <= 2e-5)) /* NaN fails too */
                fail_msg("%s, %s cache, %u/%u heads of %u, sequence of %u (%u new), the first %u "
                         "hidden: error %g, of the log-sum-exp %g",
                         ts_isa_name(isas[i]), ts_dtype_name(s.dtype), s.heads, s.kv_heads,
                         s.head_dim, with_hidden[j][0], with_hidden[j][1], hidden[j], error, lse);
        }
        ts_attention_free(a);
    }
    for (uint32_t j = 0; j < WITH_HIDDEN; j++)
        free(refs[j]);
    problem_free(&p);
}

static void keys_whose_scores_are_minus_infinity_get_no_weight(void **state)
{
    (void)state;
    static const uint32_t heads[][3] = {{4, 4, 64}, {8, 2, 128}, {3, 1, 40}};
    const size_t count = sizeof hidden_varieties / sizeof *hidden_varieties;
    for (int dtype = TS_DTYPE_FP32; dtype <= TS_DTYPE_BF16; dtype++)
        for (size_t h = 0; h < sizeof heads / sizeof *heads; h++)
            for (size_t v = 0; v < count; v++)
                if (all_cases || v == (h * 3 + (size_t)dtype) % count)
                    check_hidden((shape){.dtype = (ts_dtype)dtype,
                                         .io = TS_DTYPE_FP32,
                                         .layout = (ts_layout)(h == 0),
                                         .heads = heads[h][0],
                                         .kv_heads = heads[h][1],
                                         .head_dim = heads[h][2],
                                         .block_tokens = 16,
                                         .layers = 1},
                                 hidden_varieties[v]);
}

/* One key: the log-sum-exp is the capped score. */
static void a_capped_score_is_within_4_ulp_whatever_the_cap(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (ts_isa_resolve(isas[i]) != isas[i])
            continue;
        ts_attention *a = ts_attention_new(1, isas[i]);
        for (size_t c = 0; c < sizeof caps / sizeof *caps; c++) {
            problem p;
            problem_of_scores(&p, caps[c]);
            assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
            double x, error = worst_ulp(&p, &x);
            if (!(error <= 4)) /* NaN fails too */
                fail_msg("%s: a score of %g capped at %g differs by %g ulp", ts_isa_name(isas[i]),
                         x, (double)caps[c], error);
            problem_free(&p);
        }
        ts_attention_free(a);
    }
}

static void a_cap_beyond_what_is_exact_is_refused(void **state)
{
    (void)state;
    char why[128] = "";
    ts_attention_variant v = {.scale = 1, .soft_cap = 1e38f};
    assert_int_equal(ts_attention_variant_check(&v, 64, why, sizeof why), TS_OK);
    v.soft_cap = 3.4e38f;
    assert_int_equal(ts_attention_variant_check(&v, 64, why, sizeof why), TS_EINVAL);
    assert_string_equal(why,
                        "a soft cap of 3.4e+38; it must be finite and not negative, at most 1e+38");
    v.soft_cap = NAN;
    assert_int_equal(ts_attention_variant_check(&v, 64, why, sizeof why), TS_EINVAL);
}

static void alibi_is_as_exact_at_far_positions_as_at_near_ones(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (ts_isa_resolve(isas[i]) != isas[i])
            continue;
        ts_attention *a = ts_attention_new(1, isas[i]);
        for (int dtype = TS_DTYPE_FP32; dtype < TS_DTYPE_COUNT; dtype++) {
            if (!has_own_code((ts_dtype)dtype))
                continue;
            problem p;
            uint32_t *table;
            far_problem_new(&p, (ts_dtype)dtype, &table);
            assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
            double *ref = reference_of(&p, &p.seqs[0]), lse;
            double error = largest_error(&p, &p.seqs[0], ref, &lse);
            if (!(error <= 1e-5) || !(lse <= 1e-5))
                fail_msg("%s, %s: error %g, of the log-sum-exp %g", ts_isa_name(isas[i]),
                         ts_dtype_name((ts_dtype)dtype), error, lse);
            free(ref);
            free(table);
            problem_free(&p);
        }
        ts_attention_free(a);
    }
}

static void every_dtype_and_head_sharing_matches_the_float64_reference(void **state)
{
    (void)state;
    static const uint32_t heads[][2] = {{4, 4}, {6, 2}, {8, 1}, {5, 5}};
    for (int dtype = TS_DTYPE_FP32; dtype < TS_DTYPE_COUNT; dtype++)
        for (size_t h = 0; h < sizeof heads / sizeof *heads; h++)
            for (int layout = TS_LAYOUT_NHD; layout <= TS_LAYOUT_HND; layout++)
                if (all_cases || layout == (dtype + (int)h) % 2)
                    check_against_reference((shape){.dtype = (ts_dtype)dtype,
                                                    .io = TS_DTYPE_FP32,
                                                    .layout = (ts_layout)layout,
                                                    .heads = heads[h][0],
                                                    .kv_heads = heads[h][1],
                                                    .head_dim = 64,
                                                    .block_tokens = 16,
                                                    .layers = 2},
                                            mixed, MIXED, 1e-5);
}

static void every_head_dim_and_block_size_matches_the_reference(void **state)
{
    (void)state;
    static const uint32_t dims[] = {32, 33, 40, 72, 80, 96, 100, 112, 127, 128, 160, 192, 255, 256};
    static const uint32_t blocks[] = {1, 2, 3, 7, 8, 32, 48, 64, 100, 128, 255, 256};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        check_against_reference((shape){.dtype = (ts_dtype)(i % TS_DTYPE_COUNT),
                                        .io = TS_DTYPE_FP32,
                                        .layout = (ts_layout)(i % 2),
                                        .heads = 4,
                                        .kv_heads = 2,
                                        .head_dim = dims[i],
                                        .block_tokens = blocks[i % 12],
                                        .layers = 1},
                                mixed, MIXED, 1e-5);
}

/* Blocks don't lie at distances that a GPU's memory is slow at, and cost little for it. */
static void blocks_lie_at_distances_that_memory_is_fast_at(void **state)
{
    (void)state;
    static const uint32_t known[][3] = {/* layers, KV heads, KiB */
                                        {32, 8, 2048}, {40, 8, 2624}, {80, 8, 5248}, {80, 1, 656},
                                        {47, 8, 3072}, {48, 8, 3072}, {3, 8, 192},   {60, 2, 976}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        ts_geometry g = {.layers = known[i][0],
                         .kv_heads = known[i][1],
                         .head_dim = 128,
                         .block_tokens = 16,
                         .dtype = TS_DTYPE_BF16};
        assert_int_equal(ts_geometry_block_bytes(&g), known[i][2] * 1024);
    }
    for (uint32_t layers = 1; layers <= TS_LAYERS_MAX; layers++)
        for (uint32_t heads = 1; heads <= 64; heads++) {
            ts_geometry g = {.layers = layers,
                             .kv_heads = heads,
                             .head_dim = 64,
                             .block_tokens = 16,
                             .dtype = TS_DTYPE_FP32};
            size_t least = ts_geometry_plane_bytes(&g) * 2 * layers;
            size_t bytes = ts_geometry_block_bytes(&g);
            bool slow = least % (80 << 10) == 0 || least % (376 << 10) == 0;
            assert_true(bytes % (80 << 10) != 0 && bytes % (376 << 10) != 0);
            assert_true(slow ? bytes > least && bytes <= least + least / 16 : bytes == least);
            assert_int_equal(bytes % 256, 0);
        }
    check_against_reference((shape){.dtype = TS_DTYPE_FP32,
                                    .io = TS_DTYPE_FP32,
                                    .layout = TS_LAYOUT_NHD,
                                    .heads = 4,
                                    .kv_heads = 2,
                                    .head_dim = 64,
                                    .block_tokens = 16,
                                    .layers = 5},
                            mixed, MIXED, 1e-5);
}

static void an_exchange_of_the_caches_own_type_is_read_and_rounded_once(void **state)
{
    (void)state;
    /* The output is rounded to the type: half a unit in the last place. */
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
    check_against_reference(s, mixed, MIXED, 5e-4);
}

static void a_context_of_131072_tokens_matches_the_reference(void **state)
{
    (void)state;
    static const uint32_t length[][2] = {{131072, 2}};
    check_against_reference((shape){.dtype = TS_DTYPE_BF16,
                                    .io = TS_DTYPE_FP32,
                                    .layout = TS_LAYOUT_NHD,
                                    .heads = 2,
                                    .kv_heads = 1,
                                    .head_dim = 64,
                                    .block_tokens = 16,
                                    .layers = 1},
                            length, 1, 1e-5);
}

static void the_prototypes_scenario_of_two_sequences_and_32_heads_matches(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{37, 1}, {120, 1}};
    check_against_reference((shape){.dtype = TS_DTYPE_FP32,
                                    .io = TS_DTYPE_FP32,
                                    .layout = TS_LAYOUT_NHD,
                                    .heads = 32,
                                    .kv_heads = 32,
                                    .head_dim = 64,
                                    .block_tokens = 16,
                                    .layers = 1},
                            lengths, 2, 1e-5);
}

static bool has_tile_unit(void)
{
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
        if (isas[i] == TS_ISA_AMX)
            return ts_isa_resolve(TS_ISA_AMX) == TS_ISA_AMX;
    return false;
}

/* How many tokens the tile unit takes at once depends on how many KV heads there are. */
static void few_and_many_heads_on_the_tile_unit_match_the_reference(void **state)
{
    (void)state;
    if (!has_tile_unit()) /* test_attention_tiles emulates one */
        skip();
    static const uint32_t kv_heads[] = {1, 4, 8, 16};
    static const uint32_t lengths[][2] = {{255, 1}, {256, 1}, {321, 5}, {1100, 2}, {530, 530}};
    for (size_t i = 0; i < sizeof kv_heads / sizeof *kv_heads; i++)
        for (int which = 0; which < 4; which++) {
            const shape s = {.dtype = which < 2 ? TS_DTYPE_FP8_E4M3 : TS_DTYPE_BF16,
                             .io = TS_DTYPE_FP32,
                             .layout = (ts_layout)(which % 2),
                             .heads = 16,
                             .kv_heads = kv_heads[i],
                             .head_dim = 128,
                             .block_tokens = 16,
                             .layers = 1};
            const ts_geometry g = {.layers = s.layers,
                                   .kv_heads = s.kv_heads,
                                   .head_dim = s.head_dim,
                                   .block_tokens = s.block_tokens,
                                   .dtype = s.dtype,
                                   .layout = s.layout};
            if (ts_amx_takes(&g, s.heads))
                check_against_reference(s, lengths, sizeof lengths / sizeof *lengths, 1e-5);
        }
}

static void copying_blocks_moves_every_byte_and_no_other(void **state)
{
    (void)state;
    unsigned char memory[6 * 40], before[6 * 40];
    for (size_t i = 0; i < sizeof memory; i++)
        memory[i] = before[i] = (unsigned char)(i * 7);
    ts_attention *a = ts_attention_new(2, TS_ISA_AUTO);
    ts_block_copy copies[] = {{.src = 4, .dst = 1}, {.src = 0, .dst = 5}};
    ts_attention_copy_blocks(a, memory, 40, copies, 2);
    memcpy(before + 40, before + 160, 40);
    memcpy(before + 200, before, 40);
    assert_memory_equal(memory, before, sizeof memory);
    ts_attention_free(a);
}

/* test_attention [PATTERN]: those alone whose name is like it. */
int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_dtype_and_head_sharing_matches_the_float64_reference),
        cmocka_unit_test(varieties_try_every_number),
        cmocka_unit_test(every_variant_matches_the_reference),
        cmocka_unit_test(keys_whose_scores_are_minus_infinity_get_no_weight),
        cmocka_unit_test(a_capped_score_is_within_4_ulp_whatever_the_cap),
        cmocka_unit_test(a_cap_beyond_what_is_exact_is_refused),
        cmocka_unit_test(alibi_is_as_exact_at_far_positions_as_at_near_ones),
        cmocka_unit_test(every_head_dim_and_block_size_matches_the_reference),
        cmocka_unit_test(blocks_lie_at_distances_that_memory_is_fast_at),
        cmocka_unit_test(an_exchange_of_the_caches_own_type_is_read_and_rounded_once),
        cmocka_unit_test(a_context_of_131072_tokens_matches_the_reference),
        cmocka_unit_test(the_prototypes_scenario_of_two_sequences_and_32_heads_matches),
        cmocka_unit_test(few_and_many_heads_on_the_tile_unit_match_the_reference),
        cmocka_unit_test(sequences_without_query_tokens_change_no_bit),
        cmocka_unit_test(splitting_a_batch_changes_no_bit),
        cmocka_unit_test(later_tokens_never_leak_into_earlier_ones),
        cmocka_unit_test(an_infinite_value_shows_where_it_is_seen),
        cmocka_unit_test(every_fp8_number_is_multiplied_exactly),
        cmocka_unit_test(copying_blocks_moves_every_byte_and_no_other),
    };
#ifdef ONLY_ISA
    if (ts_isa_resolve(ONLY_ISA) != ONLY_ISA) {
        puts("skipped: this processor hasn't the instructions");
        return 77;
    }
#endif
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
