/*
 * tile: attention for many query tokens. 128 threads serve a tile of 32 rows (query token x query
 * head of one KV head's group) and go over the context in tiles of 32 tokens, which are read once
 * into shared memory and used by all rows. fp32 arithmetic; bound by shared-memory reads. With 4 or
 * more query tokens it replaces one decode kernel's pass over K and V for each of them.
 */
#include "prefill.cuh"
#include "tile_shapes.cuh"

namespace
{

const uint32_t THREADS = 128, TOKENS = 32, ROWS = TILE_ROWS;

template <int DIM> struct layout { /* of dynamic shared memory, in floats */
    static const uint32_t Q = ROWS * DIM;
    static const uint32_t K = TOKENS * (DIM + 1); /* padded: lanes read a column each */
    static const uint32_t V = TOKENS * DIM;
    static const uint32_t WEIGHTS = ROWS * TOKENS;
    static const uint32_t BYTES = (Q + K + V + WEIGHTS + ROWS) * sizeof(float);
};

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS) prefill_tile(const __grid_constant__ gpu_call c)
{
    extern __shared__ float shared[];
    float *q = shared, *k = q + layout<DIM>::Q, *v = k + layout<DIM>::K;
    float *weights = v + layout<DIM>::V, *factors = weights + layout<DIM>::WEIGHTS;
    uint32_t kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, query;
    const gpu_seq s = find_item(c, blockIdx.x, &query);
    /* A tile has whole query tokens where the group is no larger than a tile; else grid.z cuts it.
     */
    uint32_t per_token = min(c.group, ROWS), first_head = blockIdx.z * ROWS;
    if (c.group > ROWS)
        per_token = min(c.group - first_head, ROWS);
    uint32_t tokens = min(ROWS / min(c.group, ROWS), s.q_tokens - query);
    uint32_t rows = tokens * per_token;
    uint32_t past = s.kv_tokens - s.q_tokens + query; /* tokens before the tile's first query */
    uint32_t keys = past + tokens;

    float scale = c.scale_log2 * key_scale<T>(s, kv_head);
    for (uint32_t i = threadIdx.x; i < ROWS * DIM; i += THREADS) {
        uint32_t r = i / DIM, d = i % DIM;
        float x = 0;
        if (r < rows && d < c.head_dim) {
            uint32_t head = kv_head * c.group + first_head + r % per_token;
            x = turned<T>(c, s.q, row_index(c, query + r / per_token, head), d,
                          past + r / per_token);
        }
        q[i] = x * scale;
    }
    const int WIDE = DIM < (int)THREADS ? DIM : THREADS; /* threads abreast over dimensions */
    const int EACH = DIM / WIDE;                         /* dimensions of a thread */
    const int SPLIT = THREADS / WIDE;                    /* groups that share out the rows */
    const int MINE = ROWS / SPLIT;                       /* rows of a thread */
    float acc[MINE][EACH] = {}, max[ROWS / 4],
          sum[ROWS / 4]; /* softmax: a warp has every 4th row */
#pragma unroll
    for (int i = 0; i < ROWS / 4; i++) {
        max[i] = -CUDART_INF_F;
        sum[i] = 0;
    }
    uint32_t dim = threadIdx.x % WIDE, part = threadIdx.x / WIDE;

    uint32_t start = first_key(c, past) / TOKENS * TOKENS;
    for (uint32_t first = start; first < keys; first += TOKENS) {
        __syncthreads(); /* the last tile is used up */
        for (uint32_t t = warp; t < TOKENS; t += 4) {
            uint32_t token = min(first + t, keys - 1);
            const unsigned char *at = key_of(c, s, token, kv_head);
            const T *from_k = (const T *)at, *from_v = (const T *)(at + c.plane_bytes);
#pragma unroll
            for (uint32_t d = lane; d < DIM; d += 32) {
                bool there = d < c.head_dim;
                k[t * (DIM + 1) + d] = there ? to_float(from_k[d]) : 0;
                v[t * DIM + d] = there ? to_float(from_v[d]) : 0;
            }
        }
        __syncthreads();
        float score[ROWS / 4] = {};
#pragma unroll 8
        for (uint32_t d = 0; d < DIM; d++) {
            float x = k[lane * (DIM + 1) + d];
#pragma unroll
            for (int i = 0; i < ROWS / 4; i++)
                score[i] += q[(warp + i * 4) * DIM + d] * x;
        }
#pragma unroll
        for (int i = 0; i < ROWS / 4; i++) {
            uint32_t r = warp + i * 4;
            uint32_t key = first + lane, position = past + r / per_token;
            float x = -CUDART_INF_F;
            if (r < rows && key <= position && key >= first_key(c, position)) {
                uint32_t head = kv_head * c.group + first_head + r % per_token;
                x = modify_score(c, score[i], slope_of(s, head), key, position);
            }
            float higher = x;
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, step));
            higher = fmaxf(higher, max[i]);
            float weight = x == -CUDART_INF_F ? 0 : exp2f(x - higher), all = weight;
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                all += __shfl_xor_sync(~0u, all, step);
            float factor = rescale(max[i], higher);
            sum[i] = sum[i] * factor + all;
            max[i] = higher;
            weights[r * TOKENS + lane] = weight;
            if (lane == 0)
                factors[r] = factor;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MINE; i++)
#pragma unroll
            for (int e = 0; e < EACH; e++)
                acc[i][e] *= factors[part * MINE + i];
        /* Where some rows don't see some tokens, a weight of 0 must hide even NaN. */
        bool hides = first + TOKENS > past + 1 || first < first_key(c, keys - 1);
#pragma unroll 4
        for (uint32_t t = 0; t < TOKENS; t++)
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                float x = v[t * DIM + dim + e * WIDE];
#pragma unroll
                for (int i = 0; i < MINE; i++) {
                    float weight = weights[(part * MINE + i) * TOKENS + t];
                    acc[i][e] += hides && weight == 0 ? 0 : weight * x;
                }
            }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS / 4; i++) {
        uint32_t r = warp + i * 4;
        if (lane == 0 && r < rows)
            factors[r] =
                finish_row(c, s, query + r / per_token,
                           kv_head * c.group + first_head + r % per_token, max[i], sum[i]) *
                value_scale<T>(c, s, kv_head);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        uint32_t r = part * MINE + i;
        if (r >= rows)
            continue;
        uint32_t head = kv_head * c.group + first_head + r % per_token;
        size_t row = row_index(c, query + r / per_token, head);
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (dim + e * WIDE < c.head_dim)
                io_store<T>(c, s.out, row + dim + e * WIDE, acc[i][e] * factors[r]);
    }
}

template <typename T> ts_gpu_kernel kernel_of(uint32_t head_dim)
{
    return head_dim <= 64
               ? ts_gpu_kernel{(const void *)prefill_tile<T, 64>, THREADS, layout<64>::BYTES, 0}
           : head_dim <= 128
               ? ts_gpu_kernel{(const void *)prefill_tile<T, 128>, THREADS, layout<128>::BYTES, 0}
               : ts_gpu_kernel{(const void *)prefill_tile<T, 256>, THREADS, layout<256>::BYTES, 0};
}

} // namespace

TS_KNOWS_DTYPES(4);
ts_gpu_kernel tile_kernel(uint32_t head_dim, ts_dtype dtype)
{
    return dtype == TS_DTYPE_FP32   ? kernel_of<float>(head_dim)
           : dtype == TS_DTYPE_FP16 ? kernel_of<__half>(head_dim)
           : dtype == TS_DTYPE_BF16 ? kernel_of<__nv_bfloat16>(head_dim)
                                    : kernel_of<__nv_fp8_e4m3>(head_dim);
}

cudaError_t launch_tile(const gpu_call &c, const ts_gpu_kernel &kernel, cudaStream_t stream)
{
    dim3 grid(c.num_items, c.kv_heads, (c.group + ROWS - 1) / ROWS);
    void *arguments[] = {(void *)&c};
    return cudaLaunchKernel(kernel.function, grid, dim3(kernel.threads), arguments, kernel.bytes,
                            stream);
}
