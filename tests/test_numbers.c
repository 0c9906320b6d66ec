/* Conversions between fp32 and the caches' types. */
#include "test_util.h"

#include "attention.h"
#include "convert.h"
#include "dtypes.h"
#include "fp8_halves.h"

#include <math.h>

static void every_half_and_bfloat_survives_a_round_trip(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 65536; i++) {
        float half = ts_fp16_to_fp32((uint16_t)i), brain = ts_bf16_to_fp32((uint16_t)i);
        if (!isnan(half))
            assert_int_equal(ts_fp32_to_fp16(half), i);
        if (!isnan(brain))
            assert_int_equal(ts_fp32_to_bf16(brain), i);
        assert_int_equal(isnan(half) != 0, (i & 0x7fff) > 0x7c00);
    }
    assert_int_equal(ts_fp32_to_fp16(65519.0f), 0x7bff);
    assert_int_equal(ts_fp32_to_fp16(65520.0f), 0x7c00);
    assert_int_equal(ts_fp32_to_fp16(0x1p-25f), 0); /* a tie goes to even */
    assert_int_equal(ts_fp32_to_fp16(0x1.8p-24f), 2);
    assert_int_equal(ts_fp32_to_bf16(1.00390625f), 0x3f80);
}

/* Of all fp8 numbers, the nearest to x: by trying them, ties to the even code. */
static uint8_t nearest_fp8(float x)
{
    uint8_t best = 0;
    for (uint32_t i = 1; i < 0x7f; i++) {
        float a = fabsf(ts_fp8_to_fp32((uint8_t)i) - fabsf(x));
        float b = fabsf(ts_fp8_to_fp32(best) - fabsf(x));
        if (a < b || (a == b && i % 2 == 0))
            best = (uint8_t)i;
    }
    return signbit(x) ? best | 0x80 : best;
}

static void fp8_rounds_to_the_nearest_and_saturates(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 256; i++) {
        float x = ts_fp8_to_fp32((uint8_t)i);
        uint32_t e = i >> 3 & 15, m = i & 7;
        float expected = ldexpf((float)(e == 0 ? m : m + 8), (int)(e == 0 ? 1 : e) - 10);
        assert_int_equal(isnan(x) != 0, (i & 0x7f) == 0x7f);
        if (isnan(x))
            continue;
        assert_true(x == (i & 0x80 ? -expected : expected));
        assert_int_equal(ts_fp32_to_fp8(x), i);
        if ((i & 0x7f) == 0x7e)
            continue;
        /* Between it and the next: the middle, and its neighbours. */
        float next = ts_fp8_to_fp32((uint8_t)(i + 1)), middle = (x + next) / 2;
        assert_int_equal(ts_fp32_to_fp8(middle), nearest_fp8(middle));
        assert_int_equal(ts_fp32_to_fp8(nextafterf(middle, x)), i);
        assert_int_equal(ts_fp32_to_fp8(nextafterf(middle, next)), i + 1);
    }
    assert_int_equal(ts_fp32_to_fp8(448), 0x7e);
    assert_int_equal(ts_fp32_to_fp8(1e30f), 0x7e);
    assert_int_equal(ts_fp32_to_fp8(-INFINITY), 0xfe);
    assert_int_equal(ts_fp32_to_fp8(NAN) & 0x7f, 0x7f);
    assert_int_equal(ts_fp32_to_fp8(1e-30f), 0);
}

/* What a GPU without fp8 conversions does, its product of two halves done here. */
static void pairs_of_fp8_become_halves_in_a_few_operations(void **state)
{
    (void)state;
    for (uint32_t pair = 0; pair < 65536; pair++) {
        uint32_t small = ts_fp8_small_halves(pair), product = 0;
        for (uint32_t shift = 0; shift < 32; shift += 16)
            product |=
                (uint32_t)ts_fp32_to_fp16(ts_fp16_to_fp32((uint16_t)(small >> shift)) * 256.0f)
                << shift;
        uint32_t halves = ts_fp8_halves(small, product);
        for (uint32_t i = 0; i < 2; i++) {
            float x = ts_fp8_to_fp32((uint8_t)(pair >> i * 8));
            uint32_t expected = isnan(x) ? 0x7fffu : ts_fp32_to_fp16(x);
            assert_int_equal(halves >> i * 16 & 0xffffu, expected);
        }
    }
}

static void the_table_says_what_each_dtype_may_be_used_with(void **state)
{
    (void)state;
    static const struct {
        const char *name, *io; /* io: a digit for each io type */
        size_t bytes;
        const char *why_not; /* that q, k, v and out are of type 9 */
    } expected[] = {
        {"fp32", "1000", 4, "io_dtype 9; beside a pool of fp32 it must be fp32"},
        {"fp16", "1100", 2, "io_dtype 9; beside a pool of fp16 it must be fp32 or fp16"},
        {"bf16", "1010", 2, "io_dtype 9; beside a pool of bf16 it must be fp32 or bf16"},
        {"fp8_e4m3", "1110", 1,
         "io_dtype 9; beside a pool of fp8_e4m3 it must be fp32, fp16 or bf16"},
    };
    char why[160];
    assert_int_equal(sizeof expected / sizeof *expected, TS_DTYPE_COUNT);
    for (uint32_t i = 0; i < TS_DTYPE_COUNT; i++) {
        char io[TS_DTYPE_COUNT + 1] = "";
        for (uint32_t j = 0; j < TS_DTYPE_COUNT; j++)
            io[j] = ts_dtype_io_check(j, (ts_dtype)i, why, sizeof why) == TS_OK ? '1' : '0';
        assert_string_equal(io, expected[i].io);
        assert_string_equal(ts_dtype_name((ts_dtype)i), expected[i].name);
        assert_int_equal(ts_dtype_bytes((ts_dtype)i), expected[i].bytes);
        assert_int_equal(ts_dtype_io_check(9, (ts_dtype)i, why, sizeof why), TS_EINVAL);
        assert_string_equal(why, expected[i].why_not);
        bool scaled = ts_dtype_scales_check((ts_dtype)i, why, sizeof why) == TS_OK;
        assert_int_equal(scaled, i == TS_DTYPE_FP8_E4M3);
    }
    assert_int_equal(ts_dtype_scales_check(TS_DTYPE_BF16, why, sizeof why), TS_EINVAL);
    assert_string_equal(why, "scales, but the pool is of bf16; they are for fp8_e4m3");
    /* A number that is no type's comes from outside: it is refused, also beside its like. */
    assert_null(ts_dtype_name((ts_dtype)9));
    assert_false(ts_dtype_is_io((ts_dtype)9, (ts_dtype)9));
    assert_int_equal(ts_dtype_check(9, why, sizeof why), TS_EINVAL);
    assert_string_equal(why, "dtype is 9; it must be fp32, fp16, bf16 or fp8_e4m3");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_half_and_bfloat_survives_a_round_trip),
        cmocka_unit_test(fp8_rounds_to_the_nearest_and_saturates),
        cmocka_unit_test(pairs_of_fp8_become_halves_in_a_few_operations),
        cmocka_unit_test(the_table_says_what_each_dtype_may_be_used_with),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
