#include "attention_call.h"

#include <math.h>
#include <stdio.h>

ts_status ts_attention_variant_check(const ts_attention_variant *v, uint32_t head_dim, char *why,
                                     size_t why_bytes)
{
    const ts_rope *rope = &v->rope;
    if (!isfinite(v->scale) || v->scale < 0)
        snprintf(why, why_bytes, "a scale of %g; it must be finite and not negative",
                 (double)v->scale);
    else if (!(v->soft_cap >= 0 && v->soft_cap <= TS_SOFT_CAP_MAX))
        snprintf(why, why_bytes, "a soft cap of %g; it must be finite and not negative, at most %g",
                 (double)v->soft_cap, (double)TS_SOFT_CAP_MAX);
    else if (!isfinite(rope->theta) || rope->theta < 0)
        snprintf(why, why_bytes, "a rope theta of %g; it must be finite and not negative",
                 (double)rope->theta);
    else if (rope->theta != 0 && (rope->dims % 2 != 0 || rope->dims > head_dim))
        snprintf(why, why_bytes, "rope over %u dimensions; it must be even and at most head_dim %u",
                 rope->dims, head_dim);
    else if (rope->theta != 0 && rope->dims == 0 && head_dim % 2 != 0)
        snprintf(why, why_bytes, "rope over all of head_dim %u, which is odd", head_dim);
    else
        return TS_OK;
    return TS_EINVAL;
}
