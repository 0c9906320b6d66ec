/*
 * Attention on the tensor cores for 16-bit caches where a sequence has many rows (query token x
 * head of the group): what decode does with more than 8 of them ("wide", of v5), and prefill
 * ("mma").
 *
 * A block's warps have 16 rows each and go together over tiles of tokens, which lie in shared
 * memory twice: while one is worked on, the next comes in. (With fewer rows, SPLIT warps have the
 * same rows and a part of every tile's tokens each.) Scores are q (16 rows x dimensions) times K
 * (dimensions x tokens); they stay in registers, become weights there, and are the left side of the
 * second product, with V. Blocks of many rows take the context in one piece; else it is cut into
 * chunks (chunks.cuh).
 *
 * EXACT: weights are multiplied as the sum of two 16-bit numbers, and q in fp32 as two or three.
 * Memory is what decode waits for, so that is free there. Prefill waits for the tensor cores: it
 * rounds both to the cache's type, as is usual (relative error 2.3e-3 with bf16 outputs, of which
 * rounding the output alone is 1.7e-3).
 */
#ifndef TS_GPU_MMA_CUH
#define TS_GPU_MMA_CUH

#include "tensor.cuh"

namespace mma
{

using namespace chunks;
using namespace tensor;

template <typename T, int DIM, int NUM_WARPS, int SPLIT, bool EXACT> struct rows_kernel {
    static const uint32_t ROWS = NUM_WARPS / SPLIT * 16, THREADS = NUM_WARPS * 32;
    static const uint32_t TOKENS = DIM > 128 ? 32 : 64; /* of a tile */
    static const int PITCH = DIM * 2, STEPS = DIM / 16, COLUMNS = TOKENS / SPLIT / 8;
    static const uint32_t EACH = TOKENS / NUM_WARPS; /* tokens that a warp copies */
    typedef loader<PITCH, EACH> rows;
    static const uint32_t PLANE = TOKENS * PITCH, TILE = 2 * PLANE, Q_BYTES = ROWS * PITCH;
    static const uint32_t SUM_PITCH = DIM + 4; /* floats */
    static const uint32_t SUM_BYTES = SPLIT * ROWS * SUM_PITCH * sizeof(float);
    static const uint32_t WORK_BYTES = 2 * TILE > SUM_BYTES ? 2 * TILE : SUM_BYTES;

    static_assert(ROWS * (EXACT ? V5_CHUNKS : MMA_CHUNKS) * sizeof(float) <= WORK_BYTES,
                  "a float for each row and chunk takes its place");

    static uint32_t planes(const gpu_call &c)
    {
        return EXACT ? q_planes<T>(c.io_fp32) : 1;
    }
    static uint32_t bytes(const gpu_call &c)
    {
        return planes(c) * Q_BYTES + WORK_BYTES;
    }

    struct lane_rows { /* the two rows that a lane has: lane / 4 of the warp's, and 8 further */
        uint32_t position[2], from[2];
        float slope[2];
    };

    __device__ static void score(uint32_t q, uint32_t k, float (*s)[4])
    {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t a[4];
            load_matrices(a, rows::turn(q, step * 2));
#pragma unroll
            for (int n = 0; n < COLUMNS; n += 2) {
                uint32_t b[4];
                load_matrices(b, rows::turn(k + n * 8 * PITCH, step * 2));
                multiply<T>(s[n], a, b[0], b[1]);
                multiply<T>(s[n + 1], a, b[2], b[3]);
            }
        }
    }

    /* A tile of which some rows don't see all tokens: a weight of 0 must hide even NaN. So each
     * query token's rows are multiplied by V without the tokens that it doesn't see. */
    __device__ static void weigh_apart(const gpu_call &c, const job &j, const lane_rows &l,
                                       uint32_t first_row, uint32_t tile, const uint32_t *a,
                                       const uint32_t *rest, uint32_t b0, uint32_t b1, float *acc)
    {
        uint32_t lane = threadIdx.x % 32;
        uint32_t last = query_of(c, j.first + min(first_row + 15, j.rows - 1));
        for (uint32_t q = query_of(c, j.first + first_row); q <= last; q++) {
            uint32_t position = j.past + q, seen = first_key(c, position), b[2] = {b0, b1};
            for (int e = 0; e < 2; e++) {
                uint32_t t = tile + lane % 4 * 2 + e * 8;
                b[e] &= (t >= seen && t <= position ? 0xffffu : 0) |
                        (t + 1 >= seen && t + 1 <= position ? 0xffff0000u : 0);
            }
            float sum[4] = {};
            multiply<T>(sum, a, b[0], b[1]);
            if (EXACT)
                multiply<T>(sum, rest, b[0], b[1]);
            for (int e = 0; e < 4; e++)
                acc[e] += l.position[e / 2] == position ? sum[e] : 0;
        }
    }

    /* The weights of 16 tokens as the second product takes them, and what rounding them leaves. */
    __device__ static void weights_of(const float (*s)[4], int t, uint32_t *a, uint32_t *rest)
    {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float x = s[t * 2 + e / 2][e % 2 * 2], y = s[t * 2 + e / 2][e % 2 * 2 + 1];
            a[e] = pack<T>(x, y);
            if (EXACT) {
                take_away<T>(a[e], &x, &y);
                rest[e] = pack<T>(x, y);
            }
        }
    }

    __device__ static void run(const gpu_call &c, unsigned char *shared)
    {
        job j;
        find_job(c, ROWS, j);
        if (EXACT)
            append<T>(c, j, THREADS);
        __shared__ row_state states[SPLIT][ROWS], total[ROWS];
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        uint32_t part = warp % SPLIT, first_row = warp / SPLIT * 16; /* of the tile's tokens */
        uint32_t num_planes = EXACT ? q_planes<T>(c.io_fp32) : 1;
        unsigned char *work = shared + num_planes * Q_BYTES;
        uint32_t work_at = shared_address(work);

        /* The tiles: this warp copies EACH tokens of every one. */
        rows r;
        r.start(c, j);
        r.clear(work, 2 * TILE, threadIdx.x, THREADS);
        load_q<T, PITCH>(c, j, ROWS, num_planes, shared, THREADS);
        __syncthreads();
        uint32_t tile = j.begin / TOKENS * TOKENS, stage = 0;
        uint32_t copied = work_at + warp * EACH * PITCH; /* where, in stage 0 */
        uint32_t next = tile + warp * EACH;
        if (next < j.end) {
            r.look_up(c, j, next, j.end);
            r.issue(c, copied, PLANE);
        }
        commit_copies();
        next += TOKENS;
        if (next < j.end)
            r.look_up(c, j, next, j.end);

        float acc[DIM / 8][4] = {}, max[2] = {-CUDART_INF_F, -CUDART_INF_F}, sum[2] = {};
        lane_rows l;
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            uint32_t row = j.first + min(first_row + lane / 4 + e * 8, j.rows - 1);
            l.slope[e] = slope_of(j.s, head_of(c, j, row));
            l.position[e] = j.past + query_of(c, row);
            l.from[e] = first_key(c, l.position[e]);
        }
        /* The tokens that some row, and that every row, of this warp sees. */
        bool works = first_row < j.rows;
        uint32_t low = j.past + query_of(c, j.first + min(first_row, j.rows - 1));
        uint32_t high = j.past + query_of(c, j.first + min(first_row + 15, j.rows - 1));
        uint32_t seen_from = first_key(c, low), clear_from = first_key(c, high);
        bool varied = c.cap_log2 > 0 || j.s.alibi != NULL;
        uint32_t q_at = shared_address(shared) + rows::place(first_row + lane % 16, lane / 16);
        const uint32_t OURS = TOKENS / SPLIT; /* tokens of a tile that this warp works on */
        uint32_t k_place = rows::place(part * OURS + lane % 8 + lane / 16 * 8, lane / 8 % 2);
        uint32_t v_place = PLANE + rows::place(part * OURS + lane % 16, lane / 16);

        for (; tile < j.end; tile += TOKENS, stage ^= 1) {
            await_copies<0>();
            __syncthreads(); /* the tile is there, and nobody reads the one before it */
            if (next < j.end)
                r.issue(c, copied + (stage ^ 1) * TILE, PLANE);
            commit_copies();
            next += TOKENS;
            if (next < j.end)
                r.look_up(c, j, next, j.end);
            uint32_t first = tile + part * OURS;
            if (!works || first > high || first + OURS <= seen_from)
                continue;
            uint32_t at = work_at + stage * TILE;
            float s[COLUMNS][4] = {};
            score(q_at, at + k_place, s);
            if (EXACT && c.io_fp32)
                for (uint32_t plane = 1; plane < num_planes; plane++)
                    score(q_at + plane * Q_BYTES, at + k_place, s);
            bool clear = first >= clear_from && first + OURS <= low + 1;
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[n][e] *= c.scale_log2;
            if (varied || !clear) {
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        uint32_t t = first + n * 8 + lane % 4 * 2 + e % 2;
                        if (varied)
                            s[n][e] = vary(c, s[n][e], l.slope[e / 2], t, l.position[e / 2]);
                        if (t > l.position[e / 2] || t < l.from[e / 2])
                            s[n][e] = -CUDART_INF_F;
                    }
            }
            float higher[2], base[2];
            bool moves = false;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float x = max[e];
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
                    x = fmaxf(x, fmaxf(s[n][e * 2], s[n][e * 2 + 1]));
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                higher[e] = x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                base[e] = x == -CUDART_INF_F ? 0 : x;
                moves |= x > max[e];
            }
            if (__any_sync(~0u, moves)) { /* soon that becomes rare */
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float factor = power(max[e] - base[e]);
                    max[e] = higher[e];
                    sum[e] *= factor;
#pragma unroll
                    for (int d = 0; d < DIM / 8; d++) {
                        acc[d][e * 2] *= factor;
                        acc[d][e * 2 + 1] *= factor;
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[n][e] = power(s[n][e] - base[e / 2]);
                    sum[e / 2] += s[n][e];
                }
            bool strange = false;
            if (!clear) {
#pragma unroll 1
                for (uint32_t i = 0; i < OURS / 16 * (DIM / 16); i++) {
                    uint32_t b[4];
                    load_transposed(b, rows::turn(at + v_place + i / (DIM / 16) * 16 * PITCH,
                                                  i % (DIM / 16) * 2));
                    strange = strange || any_not_finite<T>(b);
                }
                strange = __any_sync(~0u, strange);
            }
#pragma unroll
            for (int t = 0; t < COLUMNS / 2; t++) {
                if (!strange)
                    break;
                uint32_t a[4], rest[4];
                weights_of(s, t, a, rest);
#pragma unroll
                for (int d = 0; d < DIM / 8; d += 2) {
                    uint32_t b[4];
                    load_transposed(b, rows::turn(at + v_place + t * 16 * PITCH, d));
                    for (int e = 0; e < 2; e++)
                        weigh_apart(c, j, l, first_row, first + t * 16, a, rest, b[e * 2],
                                    b[e * 2 + 1], acc[d + e]);
                }
            }
            if (strange)
                continue;
#pragma unroll
            for (int t = 0; t < COLUMNS / 2; t++) { /* 16 tokens */
                uint32_t a[4], rest[4];
                weights_of(s, t, a, rest);
#pragma unroll
                for (int d = 0; d < DIM / 8; d += 2) {
                    uint32_t b[4];
                    load_transposed(b, rows::turn(at + v_place + t * 16 * PITCH, d));
                    multiply<T>(acc[d], a, b[0], b[1]);
                    multiply<T>(acc[d + 1], a, b[2], b[3]);
                    if (EXACT) {
                        multiply<T>(acc[d], rest, b[0], b[1]);
                        multiply<T>(acc[d + 1], rest, b[2], b[3]);
                    }
                }
            }
        }
        await_copies<0>();
        __syncthreads(); /* the tiles are used up */
        float *sums = (float *)work;
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            uint32_t row = first_row + lane / 4 + e * 8;
            sum[e] += __shfl_xor_sync(~0u, sum[e], 1);
            sum[e] += __shfl_xor_sync(~0u, sum[e], 2);
            if (lane % 4 == 0)
                states[part][row] = row_state{max[e], sum[e]};
            float *to = sums + (part * ROWS + row) * SUM_PITCH + lane % 4 * 2;
#pragma unroll
            for (int d = 0; d < DIM / 8; d++)
                *(float2 *)(to + d * 8) = make_float2(acc[d][e * 2], acc[d][e * 2 + 1]);
        }
        finish<T, DIM, ROWS, SPLIT>(c, j, THREADS, states, sums, SUM_PITCH, sums, total);
    }
};

template <typename T, int DIM, int NUM_WARPS, int SPLIT, bool EXACT>
__global__ void __launch_bounds__(NUM_WARPS * 32) attend_rows(const __grid_constant__ gpu_call c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    rows_kernel<T, DIM, NUM_WARPS, SPLIT, EXACT>::run(c, shared);
}

template <typename T, int DIM, int NUM_WARPS, int SPLIT, bool EXACT>
cudaError_t launch_dim(const gpu_call &c, cudaStream_t stream)
{
    uint32_t bytes = rows_kernel<T, DIM, NUM_WARPS, SPLIT, EXACT>::bytes(c);
    cudaError_t error =
        cudaFuncSetAttribute(attend_rows<T, DIM, NUM_WARPS, SPLIT, EXACT>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess)
        return error;
    attend_rows<T, DIM, NUM_WARPS, SPLIT, EXACT>
        <<<c.num_items * c.kv_heads, NUM_WARPS * 32, bytes, stream>>>(c);
    return cudaGetLastError();
}

/* Rows of a block: v5_rows' and MMA_ROWS. */
template <typename T> cudaError_t launch_medium(const gpu_call &c, cudaStream_t stream)
{
    return c.head_dim <= 64    ? launch_dim<T, 64, 4, 2, true>(c, stream)
           : c.head_dim <= 128 ? launch_dim<T, 128, 4, 2, true>(c, stream)
                               : launch_dim<T, 256, 4, 2, true>(c, stream);
}

template <typename T> cudaError_t launch_wide(const gpu_call &c, cudaStream_t stream)
{
    return c.head_dim <= 64    ? launch_dim<T, 64, 4, 1, true>(c, stream)
           : c.head_dim <= 128 ? launch_dim<T, 128, 4, 1, true>(c, stream)
                               : launch_dim<T, 256, 4, 1, true>(c, stream);
}

template <typename T> cudaError_t launch_prefill(const gpu_call &c, cudaStream_t stream)
{
    return c.head_dim <= 64    ? launch_dim<T, 64, 4, 1, false>(c, stream)
           : c.head_dim <= 128 ? launch_dim<T, 128, 4, 1, false>(c, stream)
                               : launch_dim<T, 256, 4, 1, false>(c, stream);
}

} // namespace mma

#endif
