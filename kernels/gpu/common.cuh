/*
 * What the kernels share: the call as they see it, where a token's K and V lie, and element types.
 *
 * Work is a list of items, one for each (sequence, query token) or, for prefill, each (sequence,
 * first query token of a tile). A query token sees its sequence's tokens up to and including
 * itself. Softmax runs in units of log2: scores are multiplied by scale * log2(e) once, and exp2f
 * is used.
 */
#ifndef TS_GPU_COMMON_CUH
#define TS_GPU_COMMON_CUH

extern "C" {
#include "attention.h"
}

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

/* One sequence of a call; all pointers can be read by the device. */
struct gpu_seq {
    const uint32_t *blocks;
    const void *q, *k, *v; /* k NULL: the new tokens are in the cache already */
    void *out;
    const float *sinks, *alibi; /* [heads]; NULL: none */
    float *lse;                 /* [q_tokens][heads]; NULL: isn't wanted */
    uint32_t kv_tokens, q_tokens, layer;
};

/* n / d for n < 2^31 as a multiplication: (n * mul) >> shift. */
struct divisor {
    uint32_t d, mul, shift;
};

struct gpu_call {
    unsigned char *base; /* of block 0 */
    size_t block_bytes, plane_bytes, token_stride, head_stride;
    const gpu_seq *seqs;
    const uint2 *items; /* x: sequence; y: query token */
    uint32_t num_items;
    uint32_t heads, kv_heads, group, head_dim;
    divisor block_tokens;
    bool io_fp32; /* q, k, v and out are fp32; else of the cache's type */
    float scale_log2;
    float cap_log2;  /* soft cap * log2(e); 0: none */
    uint32_t window; /* 0: all */
};

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

/* What becomes of a scaled score (attention.h: ts_attention_variant), hiding aside. */
__device__ inline float vary(const gpu_call &c, float score, float slope, uint32_t key,
                             uint32_t position)
{
    if (c.cap_log2 > 0)
        score = c.cap_log2 * tanhf(score / c.cap_log2);
    return score + slope * ((float)key - (float)position);
}

/* What the weighted sum of values is to be multiplied by: 1 / sum, or less where there is a sink.
 */
__device__ inline float finish_row(const gpu_call &c, const gpu_seq &s, uint32_t query,
                                   uint32_t head, float max, float sum)
{
    if (s.lse != NULL)
        s.lse[(size_t)query * c.heads + head] = (max + log2f(sum)) * 0.6931471805599453f;
    if (s.sinks == NULL)
        return 1 / sum;
    float sink = s.sinks[head] * 1.4426950408889634f, higher = fmaxf(max, sink);
    float shrink = exp2f(max - higher);
    return shrink / (sum * shrink + exp2f(sink - higher));
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

/* Element i of q, k, v or out. */
template <typename T> __device__ inline float io_load(const void *p, size_t i, bool io_fp32)
{
    return io_fp32 ? ((const float *)p)[i] : to_float(((const T *)p)[i]);
}
template <typename T> __device__ inline void io_store(void *p, size_t i, bool io_fp32, float x)
{
    if (io_fp32)
        ((float *)p)[i] = x;
    else
        ((T *)p)[i] = from_float<T>(x);
}

/* Index of the first element of a query token's row for one head, in q and out. */
__device__ inline size_t row_index(const gpu_call &c, uint32_t query, uint32_t head)
{
    return ((size_t)query * c.heads + head) * c.head_dim;
}

/* exp2 of a - b where both may be -inf: then nothing has been seen, and the factor is 0. */
__device__ inline float rescale(float a, float b)
{
    return a == -CUDART_INF_F ? 0.0f : exp2f(a - b);
}

/* The kernels' launchers: the call is checked and num_items > 0. */
cudaError_t launch_v1(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_v2(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_v3(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_v4(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_tile(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_append(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_copies(unsigned char *base, size_t block_bytes, const ts_block_copy *copies,
                          uint32_t num_copies, cudaStream_t stream);

#define TILE_ROWS 32u /* query rows (query token x head of the group) of one prefill tile */

/* Whether v4 can load this geometry's rows: whole, aligned 16-byte vectors. */
static inline bool v4_fits(const ts_geometry *g)
{
    return (size_t)g->head_dim * ts_dtype_bytes(g->dtype) % 16 == 0;
}

#endif
