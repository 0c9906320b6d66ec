/*
 * Vectors of VL floats for attention_kernel.inc.h (GCC's and Clang's vector extensions): loads from
 * a cache of any type, sums and maxima over lanes, exp2. The including file defines VL, FMA(a,b,c)
 * and what the hardware has of LOAD_FP16(p), MAXIMUM(a,b) and SCALE_BY_EXP2(p,n,x): p * 2^n, 0
 * where x < -126.
 */
#include "attention_item.h"

#include "dtypes.h"

#include <math.h>
#include <string.h>

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline, unused))
#define LOG2E 1.4426950408889634f

/* Index lists for the reduction: lane l of the result takes from x, or from y (+VL), the lane
 * itself (KEEP) or its partner across bit s (SWAP). */
#define KEEP(l, s) ((l) & (s) ? VL + (l) : (l))
#define SWAP(l, s) ((l) & (s) ? VL + ((l) ^ (s)) : ((l) ^ (s)))
#define PARTNER(l, s) ((l) ^ (s))
#define LIST4(f, s) f(0, s), f(1, s), f(2, s), f(3, s)
#define LIST8(f, s) LIST4(f, s), f(4, s), f(5, s), f(6, s), f(7, s)
#define LIST16(f, s)                                                                               \
    LIST8(f, s), f(8, s), f(9, s), f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#if VL == 16
#define LIST(f, s) LIST16(f, s)
#elif VL == 8
#define LIST(f, s) LIST8(f, s)
#else
#define LIST(f, s) LIST4(f, s)
#endif

INLINE vf load(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

INLINE vf broadcast(float x)
{
    return x - (vf){0}; /* exact, so it is a plain broadcast */
}

INLINE vf choose(vi mask, vf yes, vf no)
{
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

#ifndef MAXIMUM
#define MAXIMUM(a, b) choose((a) > (b), a, b)
#endif

/* b if either is NaN. */
INLINE vf maximum(vf a, vf b)
{
    return MAXIMUM(a, b);
}

#ifndef LOAD_UINT16
INLINE vu load_uint16(const void *p)
{
    vh h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vu);
}
#define LOAD_UINT16(p) load_uint16(p)
#endif

#ifndef LOAD_FP16
INLINE vf load_fp16(const void *p)
{
    vu bits = LOAD_UINT16(p);
    vu sign = (bits & 0x8000u) << 16, u = (bits & 0x7fffu) << 13;
    vf subnormal = (vf)(u + 0x38800000u) - 6.103515625e-05f;
    vu finite = (vu)choose((vi)(u < 0x00800000u), subnormal, (vf)(u + 0x38000000u));
    return (vf)(sign | (vu)choose((vi)(u >= 0x0f800000u), (vf)(u + 0x70000000u), (vf)finite));
}
#define LOAD_FP16(p) load_fp16(p)
#endif

/*
 * bf16 rows that are whole pairs of vectors are not widened lane by lane: of 2 * VL elements the
 * even ones make the first vector (a shift) and the odd ones the second (a mask), one instruction
 * each. q and acc rows are kept in that order too (place_of), so no sum ever notices.
 */
#define BF16_PAIRS ((ts_dtype)100)

/*
 * So are fp8 rows of whole fours of vectors: of each 16 bits the lower element is in one of the
 * first two vectors, the upper in one of the last two. As fp16 whose exponent is 8 too low an
 * element takes a shift and a mask, and the 2^8 are multiplied once, at the ends (FP8_UNIT). NaN
 * isn't one there; a tile that has any, which is looked for once, is widened to fp32 first.
 */
#define FP8_QUADS ((ts_dtype)101)
#define FP8_UNIT 256.0f
/* FP8_QUADS and BF16_PAIRS, 64 tokens and more at once on the tile unit (attention_tiles.inc.h). */
#define FP8_TILES ((ts_dtype)102)
#define BF16_TILES ((ts_dtype)103)

INLINE bool is_pairs(ts_dtype dtype)
{
    return dtype == BF16_PAIRS || dtype == BF16_TILES;
}

INLINE bool is_fp8_quads(ts_dtype dtype)
{
    return dtype == FP8_QUADS || dtype == FP8_TILES;
}

/* Whether a row may have fewer elements left than a vector has. */
INLINE bool has_tails(ts_dtype dtype)
{
    return !is_pairs(dtype) && !is_fp8_quads(dtype);
}

/* Bytes of an element in the cache. */
INLINE size_t element_bytes(ts_dtype dtype)
{
    return is_pairs(dtype) ? 2 : is_fp8_quads(dtype) ? 1 : ts_dtype_bytes(dtype);
}

static uint32_t place_of(ts_dtype dtype, uint32_t d)
{
    if (is_pairs(dtype))
        return d / (2 * VL) * (2 * VL) + d % 2 * VL + d % (2 * VL) / 2;
    if (is_fp8_quads(dtype))
        return d / (4 * VL) * (4 * VL) + d % 2 * (2 * VL) + d % (4 * VL) / 2;
    return d;
}

/* e4m3 as fp16 whose exponent is 8 too low, which the conversion from fp16 makes right, subnormals
 * included: 2^8 is multiplied after it. */
INLINE vf load_fp8(const unsigned char *p)
{
    typedef uint8_t vb __attribute__((vector_size(VL)));
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    vh bits = __builtin_convertvector(bytes, vh);
    vh halves = (bits & 0x80) << 8 | (bits & 0x7f) << 7;
    vu wide = __builtin_convertvector(bits, vu);
    vf finite = LOAD_FP16(&halves) * 256.0f;
    return (vf)((vu)finite | (vu)((wide & 0x7fu) == 0x7fu)); /* all ones is NaN */
}

/* VL elements from place d of a row in quads, over FP8_UNIT, as fp16. */
INLINE vh quads_at(const unsigned char *row, uint32_t d)
{
    typedef int16_t vs __attribute__((vector_size(VL * 2)));
    const bool upper = d % (4 * VL) >= 2 * VL;
    vh x;
    memcpy(&x, row + d / (4 * VL) * (4 * VL) + d % (2 * VL) / VL * (2 * VL), sizeof x);
    return (vh)((vs)(upper ? x : x << 8) >> 1 & (int16_t)0xbf80);
}

INLINE vf load_fp8_quads(const unsigned char *row, uint32_t d)
{
    vh halves = quads_at(row, d);
    return LOAD_FP16(&halves);
}

INLINE vf load_quads_with_nan(const unsigned char *row, uint32_t d)
{
    vu wide = __builtin_convertvector(quads_at(row, d), vu) & 0x3f80u;
    return (vf)((vu)load_fp8_quads(row, d) | (vu)(wide == 0x3f80u)); /* all ones is NaN */
}

/*
 * Four vectors of a row in quads at once, the first of them at a place that is a multiple of 4 *
 * VL: what they share is done first.
 */
#ifdef LOOK_UP_FP8
typedef struct fp8_quads {
    __m512i first, second; /* pairs of bf16, of which the lower is an even element */
} fp8_quads;

INLINE fp8_quads begin_fp8_quads(const unsigned char *row)
{
    /* Eights of bytes, so that what is unpacked comes to lie in place. */
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    fp8_quads f;
    ts_fp8_widen(ts_fp8_load_tables(), _mm512_permutexvar_epi64(order, _mm512_loadu_si512(row)),
                 &f.first, &f.second);
    return f;
}

INLINE vf vector_of(fp8_quads f, uint32_t i)
{
    vu pairs = (vu)(i % 2 == 0 ? f.first : f.second);
    return (vf)(i < 2 ? pairs << 16 : pairs & 0xffff0000u);
}
#else
typedef const unsigned char *fp8_quads;

INLINE fp8_quads begin_fp8_quads(const unsigned char *row)
{
    return row;
}

INLINE vf vector_of(fp8_quads f, uint32_t i)
{
    return load_fp8_quads(f, i * VL);
}
#endif

/* Whether a row of `bytes`, a multiple of 4 * VL, has a NaN; its magnitude is 0x7f, and no other's
 * sum with 1 reaches the sign. */
INLINE vu nans_of(const unsigned char *row, uint32_t bytes)
{
    typedef uint8_t vb __attribute__((vector_size(VL * 4)));
    vb found = {0};
    for (uint32_t b = 0; b < bytes; b += 4 * VL) {
        vb x;
        memcpy(&x, row + b, sizeof x);
        found |= (x & 0x7f) + 1;
    }
    return (vu)(found & 0x80);
}

TS_KNOWS_DTYPES(4);
/* VL elements from place d of a cache row, as floats. */
INLINE vf load_cache(ts_dtype dtype, const unsigned char *row, uint32_t d)
{
    if (is_pairs(dtype)) {
        vu pairs;
        memcpy(&pairs, row + 2 * (size_t)(d / (2 * VL) * (2 * VL)), sizeof pairs);
        return (vf)(d % (2 * VL) == 0 ? pairs << 16 : pairs & 0xffff0000u);
    }
    if (is_fp8_quads(dtype))
        return load_fp8_quads(row, d);
    if (dtype == TS_DTYPE_FP32)
        return load((const float *)(const void *)row + d);
    if (dtype == TS_DTYPE_FP16)
        return LOAD_FP16(row + 2 * (size_t)d);
    if (dtype == TS_DTYPE_FP8_E4M3)
        return load_fp8(row + d);
    return (vf)(LOAD_UINT16(row + 2 * (size_t)d) << 16);
}

/* The same for the last n < VL elements of a row, then zeros: nothing behind the row is read. */
NOINLINE vf load_cache_tail(ts_dtype dtype, const unsigned char *row, uint32_t d, uint32_t n)
{
    size_t bytes = ts_dtype_bytes(dtype);
    unsigned char buffer[VL * 4] = {0};
    memcpy(buffer, row + d * bytes, n * bytes);
    return load_cache(dtype, buffer, 0);
}

/* Lane l of the result is the sum of sums[l]'s lanes. Each sum is the same tree of additions. */
INLINE vf reduce(vf *sums)
{
#define STAGE(s)                                                                                   \
    _Pragma("GCC unroll 16") for (int i = 0; i < (s); i++)                                         \
    {                                                                                              \
        vf x = sums[i], y = sums[i + (s)];                                                         \
        sums[i] = __builtin_shufflevector(x, y, LIST(KEEP, s)) +                                   \
                  __builtin_shufflevector(x, y, LIST(SWAP, s));                                    \
    }
#if VL >= 16
    STAGE(8)
#endif
#if VL >= 8
    STAGE(4)
#endif
    STAGE(2)
    STAGE(1)
#undef STAGE
    return sums[0];
}

INLINE float reduce_max(vf v)
{
#if VL >= 16
    v = maximum(v, __builtin_shufflevector(v, v, LIST(PARTNER, 8)));
#endif
#if VL >= 8
    v = maximum(v, __builtin_shufflevector(v, v, LIST(PARTNER, 4)));
#endif
    v = maximum(v, __builtin_shufflevector(v, v, LIST(PARTNER, 2)));
    v = maximum(v, __builtin_shufflevector(v, v, LIST(PARTNER, 1)));
    return v[0];
}

INLINE float reduce_sum(vf v)
{
#if VL >= 16
    v += __builtin_shufflevector(v, v, LIST(PARTNER, 8));
#endif
#if VL >= 8
    v += __builtin_shufflevector(v, v, LIST(PARTNER, 4));
#endif
    v += __builtin_shufflevector(v, v, LIST(PARTNER, 2));
    v += __builtin_shufflevector(v, v, LIST(PARTNER, 1));
    return v[0];
}

/* 2^x for x <= 0, within 2 ulp; 0 below -126, NaN of NaN. */
INLINE vf exp2_negative(vf x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
#ifndef SCALE_BY_EXP2
    vi zero = x < -126.0f;
    x = choose(zero, (vf){0}, x);
#endif
    vf shifted = x + magic;
    vf f = x - (shifted - magic);
    vf p = broadcast(1.5252733804059838e-05f);
    p = FMA(p, f, broadcast(1.5403530393381608e-04f));
    p = FMA(p, f, broadcast(1.3333558146428443e-03f));
    p = FMA(p, f, broadcast(9.6181291076284770e-03f));
    p = FMA(p, f, broadcast(5.5504108664821580e-02f));
    p = FMA(p, f, broadcast(2.4022650695910070e-01f));
    p = FMA(p, f, broadcast(6.9314718055994530e-01f));
    p = FMA(p, f, broadcast(1.0f));
#ifdef SCALE_BY_EXP2
    return SCALE_BY_EXP2(p, shifted - magic, x);
#else
    vf scaled = (vf)((vu)p + ((vu)shifted << 23));
    return choose(x == x, (vf)(~zero & (vi)scaled), x); /* the sum of bits may be no NaN */
#endif
}

static float exp2_scalar(float x)
{
    return exp2_negative(broadcast(x))[0];
}
