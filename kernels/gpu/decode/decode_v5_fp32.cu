/*
 * v5 for fp32 caches, which the tensor cores can't multiply exactly: a row of K or V is spread over
 * as many lanes as it has 16-byte pieces, as in v4, but comes from the ring in shared memory, and
 * every read of it serves all rows of the tile.
 */
#include "chunk_sums.cuh"
#include "decode.cuh"

namespace
{

using namespace chunks;

template <int DIM, int ROWS> struct lane_kernel {
    static const int PITCH = DIM * 4, STAGES = 3;
    static const uint32_t TOKENS = DIM > 128 ? 8 : 16;
    typedef ring<PITCH, TOKENS, STAGES, true, true> tokens; /* later it is 0.6 % slower */
    static const int LANES =
        tokens::rows::PIECES < 32 ? tokens::rows::PIECES : 32; /* that share a row */
    static const int EACH = tokens::rows::PIECES / LANES, GROUPS = 32 / LANES;
    static const uint32_t RING_BYTES = WARPS * tokens::BYTES;
    static const uint32_t SUM_PITCH = DIM + 4;
    static const uint32_t SUM_BYTES = WARPS * ROWS * SUM_PITCH * sizeof(float);
    static const uint32_t BYTES = RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES;

    __device__ static float4 load(uint32_t at)
    {
        float4 x;
        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                     : "r"(at)
                     : "memory");
        return x;
    }

    __device__ static void run(const gpu_call &c, uint32_t block, unsigned char *shared)
    {
        job j;
        find_job(c, block, ROWS, j);
        append<float>(c, j, THREADS);
        __shared__ row_state states[WARPS][ROWS], total[ROWS];
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % LANES;
        uint32_t group = threadIdx.x % 32 / LANES;
        tokens tiles;
        tiles.start(c, j, shared);

        float4 q[ROWS][EACH], acc[ROWS][EACH];
        float max[ROWS], sum[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            uint32_t row = j.first + min(r, j.rows - 1);
            uint32_t query = query_of(c, row);
            size_t from = row_index(c, query, head_of(c, j, row));
            max[r] = -CUDART_INF_F;
            sum[r] = 0;
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                uint32_t d = (lane + e * LANES) * 4;
                acc[r][e] = q[r][e] = make_float4(0, 0, 0, 0);
                if (d >= c.head_dim)
                    continue;
                float x[4];
                load_turned<float, 4>(c, j.s.q, from, d, j.past + query, x);
                q[r][e] = make_float4(x[0] * c.scale_log2, x[1] * c.scale_log2, x[2] * c.scale_log2,
                                      x[3] * c.scale_log2);
            }
        }
        bool varied = is_varied(c, j.s.alibi);

        for (uint32_t tile = j.begin / TOKENS * TOKENS + warp * TOKENS; tile < j.end;
             tile += WARPS * TOKENS) {
            uint32_t k = tiles.take_k(c, j), v = k + tokens::PLANE;
            bool clear = tile >= j.clear_begin && tile + TOKENS <= j.clear_end;
            const int TURNS = TOKENS / GROUPS; /* of a group of lanes, each with its tokens */
#pragma unroll
            for (int first = 0; first < TURNS; first += 4) {
                const int N = TURNS < 4 ? TURNS : 4;
                float s[N][ROWS];
#pragma unroll
                for (int u = 0; u < N; u++) {
                    uint32_t t = (first + u) * GROUPS + group;
                    float4 x[EACH];
#pragma unroll
                    for (int e = 0; e < EACH; e++)
                        x[e] = load(k + tokens::rows::place(t, lane + e * LANES));
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        float y = 0;
#pragma unroll
                        for (int e = 0; e < EACH; e++)
                            y += q[r][e].x * x[e].x + q[r][e].y * x[e].y + q[r][e].z * x[e].z +
                                 q[r][e].w * x[e].w;
                        s[u][r] = y;
                    }
                }
#pragma unroll
                for (int u = 0; u < N; u++)
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
#pragma unroll
                        for (int step = LANES / 2; step > 0; step /= 2)
                            s[u][r] += __shfl_xor_sync(~0u, s[u][r], step);
                if (varied || !clear) {
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        uint32_t row = j.first + min(r, j.rows - 1);
                        uint32_t position = j.past + query_of(c, row),
                                 seen = first_key(c, position);
                        float slope = slope_of(j.s, head_of(c, j, row));
#pragma unroll
                        for (int u = 0; u < N; u++) {
                            uint32_t t = tile + (first + u) * GROUPS + group;
                            s[u][r] = t > position || t < seen
                                          ? -CUDART_INF_F
                                          : modify_score(c, s[u][r], slope, t, position);
                        }
                    }
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float higher = max[r];
#pragma unroll
                    for (int u = 0; u < N; u++)
                        higher = fmaxf(higher, s[u][r]);
                    float base = higher == -CUDART_INF_F ? 0 : higher;
                    float factor = power(max[r] - base);
                    max[r] = higher;
                    sum[r] *= factor;
#pragma unroll
                    for (int e = 0; e < EACH; e++) {
                        acc[r][e].x *= factor;
                        acc[r][e].y *= factor;
                        acc[r][e].z *= factor;
                        acc[r][e].w *= factor;
                    }
#pragma unroll
                    for (int u = 0; u < N; u++) {
                        s[u][r] = power(s[u][r] - base);
                        sum[r] += s[u][r];
                    }
                }
#pragma unroll
                for (int u = 0; u < N; u++) {
                    uint32_t t = (first + u) * GROUPS + group;
#pragma unroll
                    for (int e = 0; e < EACH; e++) {
                        float4 x = load(v + tokens::rows::place(t, lane + e * LANES));
#pragma unroll
                        for (int r = 0; r < ROWS; r++) {
                            float weight = s[u][r];
                            if (!clear && weight == 0) /* hides even NaN */
                                continue;
                            acc[r][e].x += weight * x.x;
                            acc[r][e].y += weight * x.y;
                            acc[r][e].z += weight * x.z;
                            acc[r][e].w += weight * x.w;
                        }
                    }
                }
            }
        }
        /* The groups of the warp. */
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int step = LANES; step < 32; step *= 2) {
                float other = __shfl_xor_sync(~0u, max[r], step), higher = fmaxf(max[r], other);
                float mine = rescale(max[r], higher), its = rescale(other, higher);
                max[r] = higher;
                sum[r] = sum[r] * mine + __shfl_xor_sync(~0u, sum[r], step) * its;
#pragma unroll
                for (int e = 0; e < EACH; e++) {
                    float4 &a = acc[r][e];
                    a.x = a.x * mine + __shfl_xor_sync(~0u, a.x, step) * its;
                    a.y = a.y * mine + __shfl_xor_sync(~0u, a.y, step) * its;
                    a.z = a.z * mine + __shfl_xor_sync(~0u, a.z, step) * its;
                    a.w = a.w * mine + __shfl_xor_sync(~0u, a.w, step) * its;
                }
            }
        await_copies<0>();
        __syncthreads(); /* the rings are used up */
        float *sums = (float *)shared;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (threadIdx.x % 32 == 0)
                states[warp][r] = row_state{max[r], sum[r]};
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (group == 0)
                    *(float4 *)(sums + (size_t)(warp * ROWS + r) * SUM_PITCH +
                                (lane + e * LANES) * 4) = acc[r][e];
        }
        finish<float, DIM, ROWS, WARPS>(c, j, THREADS, states, sums, SUM_PITCH, sums, total);
    }
};

template <int DIM, int ROWS>
__global__ void __launch_bounds__(THREADS) decode_v5_fp32(const __grid_constant__ gpu_call c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    run_blocks<lane_kernel<DIM, ROWS>>(c, shared);
}

template <int DIM, int ROWS> ts_gpu_kernel kernel_of()
{
    return ts_gpu_kernel{(const void *)decode_v5_fp32<DIM, ROWS>, THREADS,
                         lane_kernel<DIM, ROWS>::BYTES, 0};
}

template <int ROWS> ts_gpu_kernel kernel_of(uint32_t head_dim)
{
    return head_dim <= 64    ? kernel_of<64, ROWS>()
           : head_dim <= 128 ? kernel_of<128, ROWS>()
                             : kernel_of<256, ROWS>();
}

} // namespace

ts_gpu_kernel v5_fp32(uint32_t head_dim, uint32_t kind)
{
    return kind >= V5_TEAMS ? ts_gpu_kernel{}
           : kind == 0      ? kernel_of<1>(head_dim)
                            : kernel_of<8>(head_dim);
}
