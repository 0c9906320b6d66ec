#include "attention_call.h"

#include <stdio.h>

/* NaN isn't within. */
static bool is_within(double value, double most, const char *what, char *why, size_t why_bytes)
{
    if (value >= 0 && value <= most)
        return true;
    int used =
        snprintf(why, why_bytes, "a %s of %g; it must be finite and not negative", what, value);
    if (most < (double)FLT_MAX && used > 0 && (size_t)used < why_bytes)
        snprintf(why + used, why_bytes - (size_t)used, ", at most %g", most);
    return false;
}

ts_status ts_attention_variant_check(const ts_attention_variant *v, uint32_t head_dim, char *why,
                                     size_t why_bytes)
{
    const ts_rope *rope = &v->rope;
#define CHECK(type, name, place, most, what)                                                       \
    if (!is_within((double)v->place, (double)(most), what, why, why_bytes))                        \
        return TS_EINVAL;
    TS_RUN_NUMBERS(CHECK)
#undef CHECK
    if (rope->theta != 0 && (rope->dims % 2 != 0 || rope->dims > head_dim))
        snprintf(why, why_bytes, "rope over %u dimensions; it must be even and at most head_dim %u",
                 rope->dims, head_dim);
    else if (rope->theta != 0 && rope->dims == 0 && head_dim % 2 != 0)
        snprintf(why, why_bytes, "rope over all of head_dim %u, which is odd", head_dim);
    else
        return TS_OK;
    return TS_EINVAL;
}
