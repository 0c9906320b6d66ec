/* What tsbench takes as a shape, and what it refuses. */
#include "test_util.h"

#include "shape.h"

#include <stdio.h>
#include <string.h>

static char why[256];

static void a_shape_says_how_many_sequences_heads_and_new_tokens(void **state)
{
    (void)state;
    bench_shape s;
    assert_true(bench_shape_parse("512 x 64-512 + 8 x 32768, 64/8/128 bf16", &s, why, sizeof why));
    assert_int_equal(s.num_groups, 2);
    assert_int_equal(s.groups[0].count, 512);
    assert_int_equal(s.groups[0].least, 64);
    assert_int_equal(s.groups[0].most, 512);
    assert_int_equal(s.groups[1].most, 32768);
    assert_int_equal(s.heads, 64);
    assert_int_equal(s.kv_heads, 8);
    assert_int_equal(s.head_dim, 128);
    assert_int_equal(s.dtype, TS_DTYPE_BF16);
    assert_int_equal(s.layout, TS_LAYOUT_NHD);
    assert_int_equal(s.new_tokens, 1);
    assert_true(
        bench_shape_parse("1 x 9216, 8192 shared, 8/8/96 fp8 hnd , all new", &s, why, sizeof why));
    assert_int_equal(s.shared, 8192);
    assert_int_equal(s.new_tokens, 0);
    assert_int_equal(s.dtype, TS_DTYPE_FP8_E4M3);
    assert_int_equal(s.layout, TS_LAYOUT_HND);
}

static void lengths_of_a_group_are_spread_from_the_least_to_the_most(void **state)
{
    (void)state;
    const bench_group g = {.count = 5, .least = 100, .most = 500};
    uint32_t seen = 0;
    for (uint32_t i = 0; i < g.count; i++)
        seen |= 1u << bench_group_tokens(&g, i) / 100;
    assert_int_equal(seen, 2 + 4 + 8 + 16 + 32);
    assert_int_equal(bench_group_tokens(&(bench_group){1, 7, 9}, 0), 7);
}

static void what_is_no_shape_is_told_where_it_goes_wrong(void **state)
{
    (void)state;
    static const char *const wrong[][2] = {
        {"0 x 77, 4/2/64 bf16", "0 sequences; 1 to 65536 are possible"},
        {"3 x 0, 4/2/64 bf16", "0 tokens; 1 to 1073741824 are possible"},
        {"3 x 9-8, 4/2/64 bf16", "9-8 tokens: the first is the least"},
        {"3 by 77, 4/2/64 bf16", "'by 77, 4/2/64 bf16' where 'x TOKENS' is expected"},
        {"3 x 77, 5/2/64 bf16", "5 query heads aren't a multiple of 2 KV heads"},
        {"3 x 77, 4/5/64 bf16", "5 KV heads; 1 to 4 are possible"},
        {"3 x 77, 4/2/257 bf16", "257 elements a head; 1 to 256 are possible"},
        {"3 x 77, 4/2/64 int8", "'int8' where fp32, fp16, bf16 or fp8 is expected"},
        {"3 x 77, 4/2/64 bf16, 78 new", "78 new tokens of 77"},
        {"3 x 77, 4/2/64 bf16, 78 shared", "78 shared tokens of 77"},
        {"3 x 77, 4/2/64 bf16, 78 old", "'old' where 'new' or 'shared' is expected"},
        {"3 x 77", "HEADS/KV_HEADS/HEAD_DIM DTYPE is missing"},
        {"3 x 77, 4/2/64 bf16 and more", "'and more' is too much"},
        {"1 x 1 + 1 x 1 + 1 x 1 + 1 x 1 + 1 x 1, 1/1/64 fp32", "more than 4 groups"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        bench_shape s;
        char expected[256];
        assert_false(bench_shape_parse(wrong[i][0], &s, why, sizeof why));
        snprintf(expected, sizeof expected, "shape '%s': %s", wrong[i][0], wrong[i][1]);
        assert_string_equal(why, expected);
    }
    assert_false(bench_shape_is("hnd"));
    assert_true(bench_shape_is(wrong[0][0]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_shape_says_how_many_sequences_heads_and_new_tokens),
        cmocka_unit_test(lengths_of_a_group_are_spread_from_the_least_to_the_most),
        cmocka_unit_test(what_is_no_shape_is_told_where_it_goes_wrong),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
