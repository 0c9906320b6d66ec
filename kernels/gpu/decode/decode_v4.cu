/*
 * v4: 16-byte loads. What changes against v3: a row of K (or V) is read by as many neighbouring
 * lanes as it has 16-byte vectors, each lane keeping its piece of q and of the output in registers,
 * so that every load of a warp is whole and coalesced and K and V are walked in one pass: four
 * tokens' K and V are in flight for each group of lanes. Every group has a softmax of its own over
 * its tokens; they are merged at the end, inside the warp by shuffles and between the four warps
 * through shared memory. Scores never go through shared memory, and nobody waits inside the walk.
 * Bought: 2.48 -> 0.98 ms, 0.91 of the read rate.
 */
#include "decode.cuh"

namespace
{

const uint32_t WARPS = 4, FLIGHT = 4; /* tokens in flight for each group of lanes */

/* 16 bytes of a row as floats. */
template <typename T> struct vec {
    static const int N = 16 / sizeof(T);
    static __device__ void unpack(const uint4 &raw, float *x)
    {
        const T *e = (const T *)&raw;
#pragma unroll
        for (int i = 0; i < N; i++)
            x[i] = to_float(e[i]);
    }
};

/* VECTORS: 16-byte vectors of a row, rounded up to a power of two. */
template <typename T, int VECTORS>
__global__ void __launch_bounds__(WARPS * 32) decode_v4(const __grid_constant__ gpu_call c)
{
    const int N = vec<T>::N;
    const int LANES = VECTORS < 32 ? VECTORS : 32; /* that share a row */
    const int EACH = VECTORS / LANES;              /* vectors of the row that a lane has */
    const int GROUPS = 32 / LANES;                 /* of lanes in a warp */
    uint32_t head = blockIdx.y, kv_head = head / c.group, query;
    const gpu_seq s = find_item(c, blockIdx.x, &query);
    uint32_t keys = s.kv_tokens - s.q_tokens + query + 1;
    size_t row = row_index(c, query, head);
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % LANES;
    uint32_t group = threadIdx.x % 32 / LANES;

    float q[EACH * N], acc[EACH * N];
    float score_scale = c.scale_log2 * key_scale<T>(s, kv_head);
    bool mine[EACH]; /* the row may have fewer vectors than VECTORS */
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        uint32_t first = (lane + e * LANES) * N;
        mine[e] = first < c.head_dim;
        float x[N] = {};
        if (mine[e])
            load_turned<T, N>(c, s.q, row, first, keys - 1, x);
#pragma unroll
        for (int i = 0; i < N; i++) {
            q[e * N + i] = x[i] * score_scale;
            acc[e * N + i] = 0;
        }
    }
    float max = LEAST_MAX, sum = 0, slope = slope_of(s, head);
    const uint32_t STRIDE = WARPS * GROUPS * FLIGHT;
    /* The loop is the same for all lanes of a warp: shuffles need them all. */
    for (uint32_t first = first_key(c, keys - 1) + warp * GROUPS * FLIGHT; first < keys;
         first += STRIDE) {
        uint4 k[FLIGHT][EACH], v[FLIGHT][EACH];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            /* Past the end the last token is read again and given no weight. */
            uint32_t t = min(first + u * GROUPS + group, keys - 1);
            const unsigned char *p = key_of(c, s, t, kv_head);
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                k[u][e] = v[u][e] = make_uint4(0, 0, 0, 0);
                if (mine[e]) { /* aligned: head_dim and strides are multiples of 16 bytes */
                    k[u][e] = *(const uint4 *)(p + (lane + e * LANES) * 16);
                    v[u][e] = *(const uint4 *)(p + c.plane_bytes + (lane + e * LANES) * 16);
                }
            }
        }
        float score[FLIGHT], higher = max;
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            score[u] = 0;
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                float x[N];
                vec<T>::unpack(k[u][e], x);
#pragma unroll
                for (int i = 0; i < N; i++)
                    score[u] += q[e * N + i] * x[i];
            }
#pragma unroll
            for (int step = LANES / 2; step > 0; step /= 2)
                score[u] += __shfl_xor_sync(~0u, score[u], step);
            uint32_t t = first + u * GROUPS + group;
            score[u] = t < keys ? modify_score(c, score[u], slope, t, keys - 1) : -CUDART_INF_F;
            higher = fmaxf(higher, score[u]);
        }
        if (first + group >= keys)
            continue; /* all its tokens are past the end; no shuffle follows in the loop */
        float factor = exp2f(max - higher);
        max = higher;
        sum *= factor;
#pragma unroll
        for (int i = 0; i < EACH * N; i++)
            acc[i] *= factor;
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            float weight = exp2f(score[u] - max);
            sum += weight;
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                float x[N];
                vec<T>::unpack(v[u][e], x);
#pragma unroll
                for (int i = 0; i < N; i++)
                    acc[e * N + i] += weight * x[i];
            }
        }
    }

    /* The groups of the warp. */
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
        float other = __shfl_xor_sync(~0u, max, step), higher = fmaxf(max, other);
        float factor = rescale(max, higher), other_factor = rescale(other, higher);
        sum = sum * factor + __shfl_xor_sync(~0u, sum, step) * other_factor;
#pragma unroll
        for (int i = 0; i < EACH * N; i++)
            acc[i] = acc[i] * factor + __shfl_xor_sync(~0u, acc[i], step) * other_factor;
        max = higher;
    }
    /* The warps: warp 0 adds up. */
    __shared__ float maxes[WARPS], sums[WARPS], rows[WARPS][VECTORS * N];
    if (group == 0) {
        maxes[warp] = max;
        sums[warp] = sum;
#pragma unroll
        for (int e = 0; e < EACH; e++)
#pragma unroll
            for (int i = 0; i < N; i++)
                rows[warp][(lane + e * LANES) * N + i] = acc[e * N + i];
    }
    __syncthreads();
    float highest = -CUDART_INF_F, total = 0, factor[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        highest = fmaxf(highest, maxes[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        factor[w] = rescale(maxes[w], highest);
        total += sums[w] * factor[w];
    }
    float scale = finish_row(c, s, query, head, highest, total); /* all write the same */
    scale *= value_scale<T>(c, s, kv_head);
    for (uint32_t d = threadIdx.x; d < c.head_dim; d += WARPS * 32) {
        float x = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            x += rows[w][d] * factor[w];
        io_store<T>(c, s.out, row + d, x * scale);
    }
}

template <typename T> cudaError_t launch(const gpu_call &c, cudaStream_t stream)
{
    dim3 grid(c.num_items, c.heads);
    uint32_t vectors = (uint32_t)(c.head_dim * sizeof(T) / 16);
    return start(vectors <= 4    ? decode_v4<T, 4>
                 : vectors <= 8  ? decode_v4<T, 8>
                 : vectors <= 16 ? decode_v4<T, 16>
                 : vectors <= 32 ? decode_v4<T, 32>
                                 : decode_v4<T, 64>,
                 c, grid, WARPS * 32, stream);
}

} // namespace

TS_KNOWS_DTYPES(4);
cudaError_t launch_v4(const gpu_call &c, ts_dtype dtype, cudaStream_t stream)
{
    return dtype == TS_DTYPE_FP32   ? launch<float>(c, stream)
           : dtype == TS_DTYPE_FP16 ? launch<__half>(c, stream)
           : dtype == TS_DTYPE_BF16 ? launch<__nv_bfloat16>(c, stream)
                                    : launch<__nv_fp8_e4m3>(c, stream);
}
