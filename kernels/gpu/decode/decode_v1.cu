/*
 * v1: one thread for each (query token, head). The plainest paged attention there is: a thread
 * walks its sequence's tokens one by one, keeps a running maximum and sum (online softmax) and its
 * output row in registers. It is bound by latency: few threads, each waiting for one scattered row
 * after the other, and neighbouring threads read different rows, so no load is coalesced.
 * Measured: 16.1 ms, 0.06 of the read rate (kernels/doc/).
 */
#include "decode.cuh"

namespace
{

const int AHEAD = 16; /* elements that are asked for before the first of them is used */

/* Elements first... of a row; 0 past its end. */
template <typename T>
__device__ inline void load_some(const T *row, int first, uint32_t head_dim, float *x)
{
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        x[i] = first + i < head_dim ? to_float(row[first + i]) : 0;
}

/* Where q lies: in registers, or where they would not be enough in shared memory. (In local memory
 * it would be more of that than a context begins with: what grows it at the first launch waits for
 * every stream, and one may be waiting for a worker.) It comes, and results leave, through shared
 * memory, so that what is done for each element is compiled once and not DIM times. */
template <int DIM> struct v1_layout {
    static const bool SHARED = DIM > 128;
    static const uint32_t THREADS = SHARED ? 32 : 64;
};

template <typename T, int DIM, bool CAPPED>
__global__ void __launch_bounds__(v1_layout<DIM>::THREADS)
    decode_v1(const __grid_constant__ gpu_call c)
{
    const bool SHARED = v1_layout<DIM>::SHARED;
    __shared__ float rows[DIM][v1_layout<DIM>::THREADS]; /* q comes, and results leave, this way */
    float own_q[SHARED ? 1 : DIM];
    auto q = [&](int d) -> float & {
        return SHARED ? rows[d][threadIdx.x] : own_q[SHARED ? 0 : d];
    };
    uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= c.num_items * c.heads)
        return;
    uint32_t head = index % c.heads, query;
    const gpu_seq s = find_item(c, index / c.heads, &query);
    uint32_t keys = s.kv_tokens - s.q_tokens + query + 1;
    size_t row = row_index(c, query, head);

    float acc[DIM], scale = c.scale_log2 * key_scale<T>(s, head / c.group);
#pragma unroll 1
    for (uint32_t d = 0; d < DIM; d++)
        rows[d][threadIdx.x] = d < c.head_dim ? turned<T>(c, s.q, row, d, keys - 1) * scale : 0;
#pragma unroll
    for (int d = 0; d < DIM; d++) {
        q(d) = rows[d][threadIdx.x];
        acc[d] = 0;
    }
    float max = LEAST_MAX, sum = 0, slope = slope_of(s, head);
    for (uint32_t t = first_key(c, keys - 1); t < keys; t++) {
        const T *k = (const T *)key_of(c, s, t, head / c.group);
        const T *v = (const T *)((const unsigned char *)k + c.plane_bytes);
        float score = 0, x[AHEAD];
#pragma unroll(SHARED ? 1 : DIM / AHEAD)
        for (int first = 0; first < DIM; first += AHEAD) {
            load_some(k, first, c.head_dim, x);
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                score += q(first + i) * x[i];
        }
        score = modify_score<CAPPED>(c, score, slope, t, keys - 1);
        float higher = fmaxf(max, score);
        float factor = rescale(max, higher), weight = exp2f(score - higher);
        sum = sum * factor + weight;
        max = higher;
#pragma unroll
        for (int first = 0; first < DIM; first += AHEAD) {
            load_some(v, first, c.head_dim, x);
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                acc[first + i] = acc[first + i] * factor + weight * x[i];
        }
    }
    float factor = finish_row(c, s, query, head, max, sum) * value_scale<T>(c, s, head / c.group);
#pragma unroll
    for (int d = 0; d < DIM; d++)
        rows[d][threadIdx.x] = acc[d] * factor;
#pragma unroll 1
    for (uint32_t d = 0; d < c.head_dim; d++)
        io_store<T>(c, s.out, row + d, rows[d][threadIdx.x]);
}

template <typename T, int DIM, bool CAPPED>
cudaError_t launch_dim(const gpu_call &c, cudaStream_t stream)
{
    const uint32_t threads = v1_layout<DIM>::THREADS;
    uint32_t grid = (uint32_t)(((uint64_t)c.num_items * c.heads + threads - 1) / threads);
    return start(decode_v1<T, DIM, CAPPED>, c, grid, threads, stream);
}

template <typename T, bool CAPPED> cudaError_t launch(const gpu_call &c, cudaStream_t stream)
{
    return c.head_dim <= 64    ? launch_dim<T, 64, CAPPED>(c, stream)
           : c.head_dim <= 128 ? launch_dim<T, 128, CAPPED>(c, stream)
                               : launch_dim<T, 256, CAPPED>(c, stream);
}

template <typename T> cudaError_t launch(const gpu_call &c, cudaStream_t stream)
{
    return c.cap_log2 > 0 ? launch<T, true>(c, stream) : launch<T, false>(c, stream);
}

} // namespace

TS_KNOWS_DTYPES(4);
cudaError_t launch_v1(const gpu_call &c, ts_dtype dtype, cudaStream_t stream)
{
    return dtype == TS_DTYPE_FP32   ? launch<float>(c, stream)
           : dtype == TS_DTYPE_FP16 ? launch<__half>(c, stream)
           : dtype == TS_DTYPE_BF16 ? launch<__nv_bfloat16>(c, stream)
                                    : launch<__nv_fp8_e4m3>(c, stream);
}
