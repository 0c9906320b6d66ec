/*
 * What becomes of a row's scores before the softmax, for attention_kernel.inc.h: soft cap and
 * ALiBi.
 */
/* tanh, within 2 ulp: below 0.625 by a polynomial (that of Cephes' tanhf), for 1 - e loses what is
 * small; NaN of NaN. */
INLINE vf hyperbolic_tangent(vf x)
{
    vf zero = {0};
    vf size = choose(x < zero, -x, x), square = x * x;
    vf p = broadcast(-5.70498872745e-3f);
    p = FMA(p, square, broadcast(2.06390887954e-2f));
    p = FMA(p, square, broadcast(-5.37397155531e-2f));
    p = FMA(p, square, broadcast(1.33314422036e-1f));
    p = FMA(p, square, broadcast(-3.33332819422e-1f));
    vf near_zero = FMA(p * square, x, x);
    vi large = size >= 0.625f;
    if (!any(large)) /* as a rule: a cap is far from most scores */
        return near_zero;
    vf e = exp2_negative(size * broadcast(-2.0f * LOG2E));
    vf t = (1.0f - e) / (1.0f + e);
    return choose(large, choose(x < zero, -t, t), near_zero);
}

/* What becomes of a row's scores of this tile (in units of log2): soft cap, then ALiBi. */
static void apply_score_mods(const ts_attention_item *item, float *s, uint32_t tokens,
                             uint32_t head, uint32_t tile, uint32_t position)
{
    const float cap = item->call->variant.soft_cap * LOG2E;
    if (cap > 0)
        for (uint32_t t = 0; t < TS_TILE; t += VL)
            store(s + t, cap * hyperbolic_tangent(load(s + t) / cap));
    if (item->seq->alibi != NULL) {
        const float slope = item->seq->alibi[head] * LOG2E;
        for (uint32_t t = 0; t < tokens; t++)
            s[t] += slope * (float)(int32_t)(tile + t - position);
    }
}
