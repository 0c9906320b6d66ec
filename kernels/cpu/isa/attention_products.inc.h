/*
 * A tile's two products, q·K and p·V, and how the next tile is fetched meanwhile. Included by
 * attention_kernel.inc.h, which says how rows and tokens are grouped.
 */
/*
 * A tile of K and V of one head that will be read soon. It is fetched while another is worked on,
 * which hides the memory's latency where rows are shorter than the hardware's prefetcher needs. It
 * goes into the second-level cache, line by line between the products: a core can have only a few
 * lines under way at once, and stalls when it asks for more.
 */
typedef struct fetch {
    const unsigned char *const *rows; /* NULL: there is nothing to fetch */
    size_t k_offset, v_offset;
} fetch;

#define FETCH_AHEAD ((size_t)8 << 10) /* bytes between what is fetched and what is worked on */

/* Fetches the lines that begin in bytes from..to - 1 of `count` rows. */
INLINE void fetch_lines(const unsigned char *const *rows, size_t offset, int count, size_t from,
                        size_t to)
{
    for (size_t b = (from + 63) / 64 * 64; b < to; b += 64)
        _Pragma("GCC unroll 16") for (int t = 0; t < count; t++)
            __builtin_prefetch(rows[t] + offset + b, 0, 2);
}

/* Scores of NR rows of q (padded rows) with VL / NR tokens; s has rows of TS_TILE. `first`: the
 * first of the tokens, in the tile. */
INLINE void score_block(ts_dtype dtype, int NR, uint32_t head_dim, const float *q, uint32_t padded,
                        const unsigned char *const *k, size_t k_offset, float *s, uint32_t first,
                        const fetch *next)
{
    const int NK = VL / NR;
    vf sums[VL] = {0};
    uint32_t d = 0;
    if (is_fp8_quads(dtype))
        for (; d < head_dim; d += 4 * VL) {
            if (next->rows != NULL)
                fetch_lines(next->rows + first, next->k_offset, NK, d, d + 4 * VL);
            fp8_quads kv[VL];
            _Pragma("GCC unroll 16") for (int t = 0; t < NK; t++) kv[t] =
                begin_fp8_quads(k[t] + k_offset + d);
            _Pragma("GCC unroll 4") for (uint32_t i = 0; i < 4; i++)
            {
                vf rows[4];
                _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++) rows[r] =
                    load(q + r * padded + d + i * VL);
                _Pragma("GCC unroll 16") for (int t = 0; t < NK; t++)
                {
                    vf v = vector_of(kv[t], i);
                    _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++) sums[r * NK + t] =
                        FMA(rows[r], v, sums[r * NK + t]);
                }
            }
        }
    else
        for (; d + VL <= head_dim; d += VL) {
            vf rows[4];
            if (next->rows != NULL)
                fetch_lines(next->rows + first, next->k_offset, NK, d * element_bytes(dtype),
                            (d + VL) * element_bytes(dtype));
            _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++) rows[r] = load(q + r * padded + d);
            _Pragma("GCC unroll 16") for (int t = 0; t < NK; t++)
            {
                vf kv = load_cache(dtype, k[t] + k_offset, d);
                _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++) sums[r * NK + t] =
                    FMA(rows[r], kv, sums[r * NK + t]);
            }
        }
    if (has_tails(dtype) && d < head_dim) {
        if (next->rows != NULL)
            fetch_lines(next->rows + first, next->k_offset, NK, d * element_bytes(dtype),
                        head_dim * element_bytes(dtype));
        _Pragma("GCC unroll 16") for (int t = 0; t < NK; t++)
        {
            vf kv = load_cache_tail(dtype, k[t] + k_offset, d, head_dim - d);
            _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++) sums[r * NK + t] =
                FMA(load(q + r * padded + d), kv, sums[r * NK + t]);
        }
    }
    vf result = reduce(sums);
    _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++)
        memcpy(s + r * TS_TILE, (const float *)&result + r * NK, (size_t)NK * sizeof(float));
}

INLINE void score_rows(ts_dtype dtype, int NR, uint32_t head_dim, const float *q, uint32_t padded,
                       const unsigned char *const *k, size_t k_offset, uint32_t tokens, float *s,
                       const fetch *next)
{
    const uint32_t NK = VL / (uint32_t)NR;
    for (uint32_t t = 0; t < tokens; t += NK)
        score_block(dtype, NR, head_dim, q, padded, k + t, k_offset, s + t, t, next);
}

/* acc[r] += p[r][t] * V[t] for NR rows, ND vectors of the row from element d; bytes from..to - 1 of
 * the next rows are fetched meanwhile. */
INLINE void accumulate_block(ts_dtype dtype, int NR, int ND, uint32_t d, uint32_t tail,
                             const float *p, const unsigned char *const *v, size_t v_offset,
                             uint32_t tokens, float *acc, uint32_t padded, const fetch *next,
                             size_t from, size_t to)
{
    vf sums[16];
    _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++)
        _Pragma("GCC unroll 8") for (int i = 0; i < ND; i++) sums[r * ND + i] =
            load(acc + r * padded + d + i * VL);
    for (uint32_t t = 0; t < tokens; t++) {
        vf row[8];
        if (next->rows != NULL)
            fetch_lines(next->rows + t, next->v_offset, 1, from, to);
        if (is_fp8_quads(dtype) && ND % 4 == 0)
            _Pragma("GCC unroll 2") for (uint32_t i = 0; i < (uint32_t)ND; i += 4)
            {
                fp8_quads f = begin_fp8_quads(v[t] + v_offset + d + i * VL);
                _Pragma("GCC unroll 4") for (uint32_t j = 0; j < 4; j++) row[i + j] =
                    vector_of(f, j);
            }
        else
            _Pragma("GCC unroll 8") for (int i = 0; i < ND; i++) row[i] =
                tail ? load_cache_tail(dtype, v[t] + v_offset, d, tail)
                     : load_cache(dtype, v[t] + v_offset, d + (uint32_t)i * VL);
        _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++)
        {
            vf weight = broadcast(p[r * TS_TILE + t]);
            _Pragma("GCC unroll 8") for (int i = 0; i < ND; i++) sums[r * ND + i] =
                FMA(weight, row[i], sums[r * ND + i]);
        }
    }
    _Pragma("GCC unroll 4") for (int r = 0; r < NR; r++)
        _Pragma("GCC unroll 8") for (int i = 0; i < ND; i++)
            store(acc + r * padded + d + i * VL, sums[r * ND + i]);
}

INLINE void accumulate_pv(ts_dtype dtype, int NR, uint32_t head_dim, const float *p,
                          const unsigned char *const *v, size_t v_offset, uint32_t tokens,
                          float *acc, uint32_t padded, const fetch *next)
{
    const int ND = VL == 16 ? (NR == 4 ? 4 : 8) : (NR == 4 ? 2 : 4);
    const size_t e = element_bytes(dtype), bytes = head_dim * e, wide = (size_t)ND * VL * e;
    uint32_t d = 0;
    size_t from = 0; /* what isn't fetched in wide steps is fetched in the next, all of it */
    for (; d + (uint32_t)ND * VL <= head_dim; d += (uint32_t)ND * VL, from += wide)
        accumulate_block(dtype, NR, ND, d, 0, p, v, v_offset, tokens, acc, padded, next, from,
                         from + wide);
    if (is_fp8_quads(dtype) && ND > 4)
        for (; d < head_dim; d += 4 * VL, from = bytes)
            accumulate_block(dtype, NR, 4, d, 0, p, v, v_offset, tokens, acc, padded, next, from,
                             bytes);
    for (; d + VL <= head_dim; d += VL, from = bytes)
        accumulate_block(dtype, NR, 1, d, 0, p, v, v_offset, tokens, acc, padded, next, from,
                         bytes);
    if (has_tails(dtype) && d < head_dim)
        accumulate_block(dtype, NR, 1, d, head_dim - d, p, v, v_offset, tokens, acc, padded, next,
                         from, bytes);
}
