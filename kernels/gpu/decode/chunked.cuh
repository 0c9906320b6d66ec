/*
 * The walk that v2 and v3 share; they differ in how 128 threads find a maximum and a sum.
 *
 * 128 threads serve one (query token, head) and go over the context in chunks of 512 tokens. First
 * they are spread over tokens: each computes the scores of some. The chunk's maximum and sum are
 * reduced, and then they are spread over dimensions to add up V, whose loads are coalesced; where
 * the head has fewer dimensions than there are threads, several groups of threads take turns at the
 * tokens and are added up at the end.
 */
#ifndef TS_GPU_CHUNKED_CUH
#define TS_GPU_CHUNKED_CUH

#include "common.cuh"

#define CHUNKED_THREADS 128u
#define CHUNK_TOKENS 512u

/* Reduce::max and Reduce::sum return the result to every thread; scratch has a float for each. */
template <typename T, typename Reduce>
__global__ void __launch_bounds__(CHUNKED_THREADS) chunked(const __grid_constant__ gpu_call c)
{
    __shared__ float q[TS_HEAD_DIM_MAX], weights[CHUNK_TOKENS], scratch[TS_HEAD_DIM_MAX];
    uint32_t head = blockIdx.y, kv_head = head / c.group, query;
    const gpu_seq s = find_item(c, blockIdx.x, &query);
    uint32_t keys = s.kv_tokens - s.q_tokens + query + 1;
    size_t row = row_index(c, query, head);
    float scale = c.scale_log2 * key_scale<T>(s, kv_head);
    for (uint32_t d = threadIdx.x; d < c.head_dim; d += CHUNKED_THREADS)
        q[d] = turned<T>(c, s.q, row, d, keys - 1) * scale;
    __syncthreads();

    uint32_t groups = c.head_dim <= 32 ? 4 : c.head_dim <= 64 ? 2 : 1;
    uint32_t lanes = CHUNKED_THREADS / groups;
    uint32_t group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    float max = LEAST_MAX, sum = 0, acc[2] = {0, 0}; /* of dimensions lane, lane + lanes */
    float slope = slope_of(s, head);
    for (uint32_t first = first_key(c, keys - 1); first < keys; first += CHUNK_TOKENS) {
        uint32_t count = min(CHUNK_TOKENS, keys - first);
        float higher = -CUDART_INF_F;
        for (uint32_t i = threadIdx.x; i < count; i += CHUNKED_THREADS) {
            const T *k = (const T *)key_of(c, s, first + i, kv_head);
            float score = 0;
#pragma unroll 8
            for (uint32_t d = 0; d < c.head_dim; d++)
                score += q[d] * to_float(k[d]);
            score = modify_score(c, score, slope, first + i, keys - 1);
            weights[i] = score;
            higher = fmaxf(higher, score);
        }
        higher = fmaxf(max, Reduce::max(higher, scratch));
        float part = 0;
        for (uint32_t i = threadIdx.x; i < count; i += CHUNKED_THREADS) {
            weights[i] = exp2f(weights[i] - higher);
            part += weights[i];
        }
        float factor = rescale(max, higher);
        sum = sum * factor + Reduce::sum(part, scratch);
        max = higher;
        acc[0] *= factor;
        acc[1] *= factor;
#pragma unroll 4
        for (uint32_t i = group; i < count; i += groups) {
            const T *v = (const T *)(key_of(c, s, first + i, kv_head) + c.plane_bytes);
            if (lane < c.head_dim)
                acc[0] += weights[i] * to_float(v[lane]);
            if (lane + lanes < c.head_dim)
                acc[1] += weights[i] * to_float(v[lane + lanes]);
        }
        __syncthreads();
    }
    for (uint32_t g = 1; g < groups; g++) {
        if (group == g)
            scratch[lane] = acc[0];
        __syncthreads();
        if (group == 0)
            acc[0] += scratch[lane];
        __syncthreads();
    }
    if (group != 0)
        return;
    float factor = finish_row(c, s, query, head, max, sum); /* every thread writes the same */
    factor *= value_scale<T>(c, s, kv_head);
    if (lane < c.head_dim)
        io_store<T>(c, s.out, row + lane, acc[0] * factor);
    if (lane + lanes < c.head_dim)
        io_store<T>(c, s.out, row + lane + lanes, acc[1] * factor);
}

TS_KNOWS_DTYPES(4);
template <typename Reduce>
cudaError_t launch_chunked(const gpu_call &c, ts_dtype dtype, cudaStream_t stream)
{
    dim3 grid(c.num_items, c.heads);
    return start(dtype == TS_DTYPE_FP32       ? chunked<float, Reduce>
                 : dtype == TS_DTYPE_FP16     ? chunked<__half, Reduce>
                 : dtype == TS_DTYPE_FP8_E4M3 ? chunked<__nv_fp8_e4m3, Reduce>
                                              : chunked<__nv_bfloat16, Reduce>,
                 c, grid, CHUNKED_THREADS, stream);
}

#endif
