/*
 * What the kernels share: the call as they see it, where a token's K and V lie, and element types.
 *
 * A call is one or more runs, each with a plan of its own (gpu.h). A plan has lists of work items:
 * (sequence, query token), or (sequence, first query token of a tile), or (sequence, tile of rows,
 * chunk of its context). An index into all of a call's items finds the run, the item and the
 * sequence. A query token sees its sequence's tokens up to and including itself. Softmax runs in
 * units of log2: scores are multiplied by scale * log2(e) once, and exp2f is used.
 */
#ifndef TS_GPU_COMMON_CUH
#define TS_GPU_COMMON_CUH

extern "C" {
#include "attention_call.h"
#include "device.h"
#include "dtypes.h"
#include "pieces.h"
}

#include <cfloat>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <math_constants.h>
#include <type_traits>

#include "cache_hints.cuh"
#include "fp8_halves.h"

#define GPU_RUNS 28u /* of one kernel, at most: what its parameters have room for */

/* See plan_piece. */
static inline __host__ __device__ uint32_t chunks_of(const plan_piece &p)
{
    return p.chunks_and_alone / 2;
}
static inline __host__ __device__ bool is_alone(const plan_piece &p)
{
    return p.chunks_and_alone % 2 != 0;
}

/* One run of a call. */
struct gpu_run {
    const void *items; /* plan_piece of v5 and mma; else uint2: x: sequence, y: query token */
    const plan_seq *seqs;
    const uint32_t *tables;
    const void *q, *k, *v; /* k NULL: the new tokens are in the cache already */
    void *out;
    const float *sinks, *alibi; /* [heads]; NULL: none */
    const float *scales;        /* [2][kv_heads]; NULL: all are 1 */
    float *lse;                 /* [q_tokens][heads]; NULL: isn't wanted */
    float *partials;            /* what chunks come to, until they are merged */
    uint32_t *counters;         /* all 0 between launches */
    uint32_t layer;
    uint32_t end;       /* items of this run and those before it */
    uint32_t *words[2]; /* which get `number` when the launch is over (gpu_call.arrived) */
    uint32_t number;
};

/* One sequence of a run; all pointers can be read by the device. */
struct gpu_seq {
    const uint32_t *blocks;
    const void *q, *k, *v;
    void *out;
    const float *sinks, *alibi, *scales;
    float *lse;
    uint32_t kv_tokens, q_tokens, layer;
};

/* n / d for n < 2^31 as a multiplication: (n * mul) >> shift. */
struct divisor {
    uint32_t d, mul, shift;
};

struct gpu_call {
    static constexpr bool PLAIN = false; /* see plain_call */
    unsigned char *base;                 /* of block 0 */
    size_t block_bytes, plane_bytes, token_stride, head_stride;
    uint32_t num_items;
    const uint32_t *items_there; /* of a persistent plan: how many it has now; NULL: num_items */
    uint32_t heads, kv_heads, group, head_dim;
    divisor block_tokens, groups;   /* of `group` heads */
    uint32_t io;                    /* ts_dtype of q, k, v and out */
    uint32_t io_bytes, cache_bytes; /* of an element */
    float scale_log2;
    float cap_log2;  /* soft cap * log2(e); 0: none */
    uint32_t window; /* 0: all */
    ts_rope rope;
    double rope_log2; /* of theta */
    bool alone; /* what it reads of K and V may leave the cache first, where a piece says so */
    bool keeps_partials, keeps_out; /* in the cache, for the next launch to write anew */
    /* Where the kernel's last block tells the end: how many have come to theirs, 0 between
     * launches; how many runs have words; and a word that gets end_value behind theirs. Else NULL.
     */
    uint32_t *arrived;
    uint32_t num_told, end_value;
    uint32_t *end_word;
    uint32_t num_runs, least_items; /* that each of them has */
    gpu_run runs[GPU_RUNS];
};
static_assert(sizeof(gpu_call) <= 4096, "what a kernel's parameters may have");

/*
 * A call that has nothing beside what most have: q, k, v and out are of 16 bits, scores are only
 * scaled, there is no rotary embedding and no window, and each tile lies in one block. Its kernels
 * have no code for the rest, and a fifth of the code in their loop: where several processes share a
 * processor, its cache of instructions has a copy for each (doc/notebook.md).
 */
struct plain_call : gpu_call {
    static constexpr bool PLAIN = true;
};
static_assert(sizeof(plain_call) == sizeof(gpu_call), "a launch passes either");

/* Whether q, k, v and out are fp32, and whether new rows are turned. */
template <typename C> __host__ __device__ inline bool takes_fp32(const C &c)
{
    return !C::PLAIN && c.io == TS_DTYPE_FP32;
}
template <typename C> __host__ __device__ inline bool turns_rows(const C &c)
{
    return !C::PLAIN && c.rope.theta != 0;
}

/* The run that has this item; *index becomes the item's among the run's. */
__device__ inline const gpu_run &run_of(const gpu_call &c, uint32_t *index)
{
    uint32_t r = 0;
    while (*index >= c.runs[r].end)
        r++;
    *index -= r == 0 ? 0 : c.runs[r - 1].end;
    return c.runs[r];
}

__device__ inline gpu_seq seq_of(const gpu_call &c, const gpu_run &r, const plan_seq &p)
{
    size_t q_row = (size_t)p.first_row * c.heads * c.head_dim * c.io_bytes;
    size_t k_row = (size_t)p.first_row * c.kv_heads * c.head_dim * c.io_bytes;
    gpu_seq s;
    s.blocks = r.tables + p.table;
    s.q = (const unsigned char *)r.q + q_row;
    s.k = r.k == NULL ? NULL : (const unsigned char *)r.k + k_row;
    s.v = (const unsigned char *)r.v + k_row;
    s.out = (unsigned char *)r.out + q_row;
    s.sinks = r.sinks;
    s.alibi = r.alibi;
    s.scales = r.scales;
    s.lse = r.lse == NULL ? NULL : r.lse + (size_t)p.first_row * c.heads;
    s.kv_tokens = p.kv_tokens;
    s.q_tokens = p.q_tokens;
    s.layer = r.layer;
    return s;
}

/* Items of the launch. */
__device__ inline uint32_t items_of(const gpu_call &c)
{
    return c.items_there == NULL ? c.num_items : *c.items_there;
}

/* The sequence of item number `index`, and in *query what the item says beside it. */
__device__ inline gpu_seq find_item(const gpu_call &c, uint32_t index, uint32_t *query)
{
    const gpu_run &r = run_of(c, &index);
    uint2 item = ((const uint2 *)r.items)[index];
    *query = item.y;
    return seq_of(c, r, r.seqs[item.x]);
}

/* The first key that a query at this position sees. */
__device__ inline uint32_t first_key(const gpu_call &c, uint32_t position)
{
    return c.window == 0 || position < c.window ? 0 : position + 1 - c.window;
}

/* A head's ALiBi slope, in units of log2. */
__device__ inline float slope_of(const gpu_seq &s, uint32_t head)
{
    return s.alibi == NULL ? 0 : s.alibi[head] * 1.4426950408889634f;
}

/* Whether modify_score does anything. A macro for wgmma.cuh alone: with a call of the function its
 * code comes out differently. */
#define IS_VARIED(c, alibi) ((c).cap_log2 > 0 || (alibi) != NULL)

template <typename C>
__host__ __device__ inline bool is_varied(const C &c, const float *const &alibi)
{
    return !C::PLAIN && IS_VARIED(c, alibi);
}

/* What becomes of a scaled score (attention.h: ts_attention_variant), hiding aside. CAPPED false:
 * there is no soft cap, for a kernel that waits for each load: none is started ahead of a branch.
 */
template <bool CAPPED = true, typename C>
__device__ inline float modify_score(const C &c, float score, float slope, uint32_t key,
                                     uint32_t position)
{
    if (C::PLAIN)
        return score;
    if (CAPPED && c.cap_log2 > 0)
        score = __fmul_rn(c.cap_log2, tanhf(score / c.cap_log2));
    return __fmaf_rn(slope, (float)(int32_t)(key - position), score);
}

/* What the weighted sum of values is to be multiplied by: 1 / sum, or less where there is a sink; 0
 * where the sum is 0, as every score is -infinity. place: query token * heads + head. */
__device__ inline float finish_place(const gpu_call &c, const gpu_seq &s, uint32_t place, float max,
                                     float sum)
{
    if (s.lse != NULL)
        s.lse[place] = (max + log2f(sum)) * 0.6931471805599453f;
    if (sum == 0)
        return 0;
    if (s.sinks == NULL)
        return 1 / sum;
    float sink = s.sinks[place % c.heads] * 1.4426950408889634f, higher = fmaxf(max, sink);
    float shrink = exp2f(max - higher);
    return shrink / (sum * shrink + exp2f(sink - higher));
}

__device__ inline float finish_row(const gpu_call &c, const gpu_seq &s, uint32_t query,
                                   uint32_t head, float max, float sum)
{
    return finish_place(c, s, query * c.heads + head, max, sum);
}

__device__ inline uint32_t divide(uint32_t n, const divisor &d)
{
    return (uint32_t)(((uint64_t)n * d.mul) >> d.shift);
}

/* K of a token for one KV head; V lies plane_bytes further. */
__device__ inline const unsigned char *key_of(const gpu_call &c, const gpu_seq &s, uint32_t token,
                                              uint32_t kv_head)
{
    uint32_t entry = divide(token, c.block_tokens);
    return c.base + s.blocks[entry] * c.block_bytes + s.layer * 2 * c.plane_bytes +
           (token - entry * c.block_tokens.d) * c.token_stride + kv_head * c.head_stride;
}

__device__ inline float to_float(float x)
{
    return x;
}
__device__ inline float to_float(__half x)
{
    return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}
/* Two e4m3 numbers, in the lower half of x, as fp16. */
__device__ inline uint32_t widen(uint32_t x)
{
#if __CUDA_ARCH__ >= 890
    __half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)x, __NV_E4M3);
    return h.x | (uint32_t)h.y << 16;
#else /* CUDA's own way takes a branch and a loop for each */
    uint32_t small = ts_fp8_small_halves(x), product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(small), "r"(0x5c005c00u));
    return ts_fp8_halves(small, product);
#endif
}

__device__ inline float to_float(__nv_fp8_e4m3 x)
{
#if __CUDA_ARCH__ >= 890
    return (float)x;
#else
    return __half2float(__ushort_as_half((unsigned short)widen(x.__x)));
#endif
}
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x)
{
    return x;
}
template <> __device__ inline __half from_float<__half>(float x)
{
    return __float2half_rn(x);
}
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x)
{
    return __float2bfloat16_rn(x);
}
template <> __device__ inline __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x)
{
    return __nv_fp8_e4m3(x); /* beyond 448 lies 448 */
}

/* Whether elements of the cache's type are to be multiplied by a scale. */
template <typename T> struct scaled {
    static const bool value = std::is_same<T, __nv_fp8_e4m3>::value;
};
template <typename T> __device__ inline float key_scale(const gpu_seq &s, uint32_t kv_head)
{
    return scaled<T>::value && s.scales != NULL ? s.scales[kv_head] : 1;
}
template <typename T>
__device__ inline float value_scale(const gpu_call &c, const gpu_seq &s, uint32_t kv_head)
{
    return scaled<T>::value && s.scales != NULL ? s.scales[c.kv_heads + kv_head] : 1;
}

/* An element as the cache of type T has it. */
template <typename T> __device__ inline T to_cache(float x, float scale)
{
    return from_float<T>(scaled<T>::value ? x / scale : x);
}

/* Element i of q, k, v or out, which are fp32, of the cache's type T, or beside fp8 of a 16-bit
 * type. */
template <typename T, typename C>
__device__ inline float io_load(const C &c, const void *p, size_t i)
{
    if (takes_fp32(c))
        return ((const float *)p)[i];
    if (!scaled<T>::value)
        return to_float(((const T *)p)[i]);
    return c.io == TS_DTYPE_FP16 ? to_float(((const __half *)p)[i])
                                 : to_float(((const __nv_bfloat16 *)p)[i]);
}
template <typename T> __device__ inline void io_store(const gpu_call &c, void *p, size_t i, float x)
{
    if (c.io == TS_DTYPE_FP32)
        ((float *)p)[i] = x;
    else if (!scaled<T>::value)
        ((T *)p)[i] = from_float<T>(x);
    else if (c.io == TS_DTYPE_FP16)
        ((__half *)p)[i] = from_float<__half>(x);
    else
        ((__nv_bfloat16 *)p)[i] = from_float<__nv_bfloat16>(x);
}

/* Four elements from element i on, a multiple of 4, of memory that is aligned to 16 bytes. */
template <typename H> __device__ inline void store_four_halves(H *to, const float *x, bool keep)
{
    H a = from_float<H>(x[0]), b = from_float<H>(x[1]);
    H e = from_float<H>(x[2]), f = from_float<H>(x[3]);
    cache_hints::store(to,
                       make_ushort4(*(const unsigned short *)&a, *(const unsigned short *)&b,
                                    *(const unsigned short *)&e, *(const unsigned short *)&f),
                       keep);
}
template <typename T, typename C>
__device__ inline void io_store_four(const C &c, void *to, size_t i, const float *x, bool keep)
{
    if (takes_fp32(c) || sizeof(T) == sizeof(float))
        cache_hints::store((float *)to + i, make_float4(x[0], x[1], x[2], x[3]), keep);
    else if (sizeof(T) == 2)
        store_four_halves((T *)to + i, x, keep);
    else if (c.io == TS_DTYPE_FP16)
        store_four_halves((__half *)to + i, x, keep);
    else
        store_four_halves((__nv_bfloat16 *)to + i, x, keep);
}

/* Element d of a row of q or k that starts at element `row` and is x there, turned as rope.h says.
 * Without contraction, as on the processor. A function of its own: it is long, and seldom called.
 */
template <typename T>
__device__ __noinline__ float turn_element(const gpu_call &c, const void *p, size_t row, uint32_t d,
                                           uint32_t position, float x)
{
    if (d >= c.rope.dims)
        return x;
    uint32_t half = c.rope.dims / 2;
    bool second = c.rope.interleaved ? d & 1 : d >= half;
    uint32_t pair = c.rope.interleaved ? d / 2 : second ? d - half : d;
    uint32_t other = second ? ts_rope_first(&c.rope, pair) : ts_rope_second(&c.rope, pair);
    float y = io_load<T>(c, p, row + other);
    double sine, cosine;
    sincospi(position * exp2(-2.0 * pair / c.rope.dims * c.rope_log2) * 0.31830988618379067, &sine,
             &cosine);
    float left = __fmul_rn(x, (float)cosine), right = __fmul_rn(y, (float)sine);
    return second ? __fadd_rn(right, left) : __fsub_rn(left, right);
}

/* The N elements from d on of a row of q or k that starts at element `row`, turned if the run asks
 * for it. */
template <typename T, int N, typename C>
__device__ inline void load_turned(const C &c, const void *p, size_t row, uint32_t d,
                                   uint32_t position, float *x)
{
#pragma unroll
    for (int e = 0; e < N; e++)
        x[e] = io_load<T>(c, p, row + d + e);
    if (!turns_rows(c))
        return;
#pragma unroll
    for (int e = 0; e < N; e++)
        x[e] = turn_element<T>(c, p, row, d + e, position, x[e]);
}

/* Element d alone. */
template <typename T, typename C>
__device__ inline float turned(const C &c, const void *p, size_t row, uint32_t d, uint32_t position)
{
    float x;
    load_turned<T, 1>(c, p, row, d, position, &x);
    return x;
}

/* Index of the first element of a query token's row for one head, in q and out. */
__device__ inline size_t row_index(const gpu_call &c, uint32_t query, uint32_t head)
{
    return ((size_t)query * c.heads + head) * c.head_dim;
}

/* A running maximum before any score, where it is finite: a score of -infinity less it is
 * -infinity, whose weight is 0, and not NaN. */
#define LEAST_MAX (-FLT_MAX)

/* exp2 of a - b where both may be -inf: then nothing has been seen, and the factor is 0. */
__device__ inline float rescale(float a, float b)
{
    return a == -CUDART_INF_F ? 0.0f : exp2f(a - b);
}

/*
 * How far scores may go beyond what they are measured from, in units of log2, before that is moved
 * to the highest of them. Weights are up to 2^SLACK then, in which no type that they are multiplied
 * in loses anything, and sums are seldom multiplied by a factor.
 */
#define SLACK 8.0f

/* Loads the kernel, for ts_gpu_load. */
template <typename... Parameters> inline cudaError_t load(void (*kernel)(Parameters...))
{
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, kernel);
}

/* Launches the kernel, or loads it where the call has no items. */
inline cudaError_t start(void (*kernel)(gpu_call), const gpu_call &c, dim3 grid, uint32_t threads,
                         cudaStream_t stream)
{
    if (c.num_items == 0)
        return load(kernel);
    kernel<<<grid, threads, 0, stream>>>(c);
    return cudaGetLastError();
}

#endif
