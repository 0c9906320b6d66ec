/*
 * What a lane of attend_rows (mma.cuh) has of its two rows, and how a piece of several chunks adds
 * them up: for pieces that nobody else has a part of, so that nothing of them is written to memory.
 * The bits are those of chunks that are pieces of their own and are merged by `finish`
 * (chunk_sums.cuh).
 */
#ifndef TS_GPU_ROW_FOLDS_CUH
#define TS_GPU_ROW_FOLDS_CUH

#include "chunk_sums.cuh"
#include "tensor.cuh"

namespace mma
{

using namespace chunks;

/* SPLIT warps have the same rows, and a part of the tokens each. */
template <typename T, int DIM, int ROWS, int SPLIT, int THREADS> struct row_folds {
    static_assert(SPLIT <= 2, "a row is one warp's, or two's");
    static const uint32_t OWNERS = THREADS / SPLIT, SHARE = DIM / 8 / SPLIT;
    static const uint32_t SUM_PITCH = DIM + 4; /* floats */
    /* Of each lane that has rows of its own; and what it gets from another warp. */
    static const uint32_t BYTES = OWNERS * (DIM / 8) * 16 * SPLIT;

    /* Nothing has been added up of a lane's rows. */
    __device__ static void begin_rows(float (*acc)[4], float *max, float *sum)
    {
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[d][e] = 0;
        max[0] = max[1] = -CUDART_INF_F;
        sum[0] = sum[1] = 0;
    }

    /* This lane's part of a row's sum becomes the row's. */
    __device__ static float sum_of_row(float x)
    {
        x += __shfl_xor_sync(~0u, x, 1);
        return x + __shfl_xor_sync(~0u, x, 2);
    }

    /*
     * A chunk of a piece of several ends: what the warps have of it comes together as `finish` has
     * it, and is added to what lies in `so_far`, and `total`, as `finish` adds up the chunks'
     * records (RUNNING). Each of the warps that share rows does so for its SHARE of the dimensions,
     * and gets the other's part of it behind what there is so far. Then nothing has been added up.
     */
    __device__ static void fold_chunk(uint32_t chunk, uint32_t first_row, unsigned char *so_far,
                                      row_state *total, float (*acc)[4], float *max, float *sum)
    {
        __shared__ row_state states[SPLIT][ROWS];
        uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % SPLIT;
        uint32_t row = first_row + lane / 4, owner = warp / SPLIT * 32 + lane;
        float4 *sums = (float4 *)so_far + part * SHARE * OWNERS + owner;
        float4 *others = (float4 *)so_far + DIM / 8 * OWNERS + owner;
        row_state before[2], all[2];
        float factor[2], factors[SPLIT][2];
        if (SPLIT > 1)
            __syncthreads(); /* nobody reads another chunk's */
#pragma unroll
        for (int e = 0; e < 2; e++) {
            before[e] = chunk > 0 ? total[row + e * 8] : row_state{-CUDART_INF_F, 0};
            all[e] = row_state{max[e], sum_of_row(sum[e])};
            if (SPLIT > 1 && lane % 4 == 0)
                states[part][row + e * 8] = all[e];
        }
#pragma unroll
        for (int d = 0; SPLIT > 1 && d < DIM / 8; d++)
            if (d / SHARE != part)
                others[d * OWNERS] = make_float4(acc[d][0], acc[d][1], acc[d][2], acc[d][3]);
        if (SPLIT > 1)
            __syncthreads();
        else
            __syncwarp(); /* the quad's lanes have read `total` */
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float highest = -CUDART_INF_F, weights = 0;
#pragma unroll
            for (int w = 0; w < SPLIT; w++)
                highest = fmaxf(highest, SPLIT > 1 ? states[w][row + e * 8].max : all[e].max);
#pragma unroll
            for (int w = 0; w < SPLIT; w++) {
                row_state s = SPLIT > 1 ? states[w][row + e * 8] : all[e];
                factors[w][e] = rescale(s.max, highest);
                weights = __fmaf_rn(s.sum, factors[w][e], weights);
            }
            factor[e] = fold_factor(before[e].max, highest);
            if (part == 0 && lane % 4 == 0)
                total[row + e * 8] = row_state{fmaxf(before[e].max, highest),
                                               fold(before[e].sum, weights, factor[e])};
        }
#pragma unroll
        for (uint32_t i = 0; i < SHARE; i++) {
            float4 y = make_float4(0, 0, 0, 0), x = y;
            if (SPLIT > 1)
                y = others[(part * SHARE + i) * OWNERS];
            if (chunk > 0)
                x = sums[i * OWNERS];
            const float theirs[4] = {y.x, y.y, y.z, y.w}, so_far_of[4] = {x.x, x.y, x.z, x.w};
            float to[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float ours = part == 0 ? acc[i][e] : acc[SHARE * (SPLIT - 1) + i][e];
                float both = __fmaf_rn(part == 0 ? ours : theirs[e], factors[0][e / 2], 0);
                if (SPLIT > 1)
                    both = __fmaf_rn(part == 0 ? theirs[e] : ours, factors[SPLIT - 1][e / 2], both);
                to[e] = fold(so_far_of[e], both, factor[e / 2]);
            }
            sums[i * OWNERS] = make_float4(to[0], to[1], to[2], to[3]);
        }
        __syncwarp();
        begin_rows(acc, max, sum);
    }

    /* A lane's sums of one of its rows, eight dimensions COUNT times, to where the row's lie in the
     * order of its dimensions. */
    template <int COUNT> __device__ static void lay_out(const float (*acc)[4], int e, float *to)
    {
        uint32_t lane = threadIdx.x % 32;
        if (!scaled<T>::value) {
#pragma unroll
            for (int d = 0; d < COUNT; d++)
                *(float2 *)(to + d * 8 + lane % 4 * 2) =
                    make_float2(acc[d][e * 2], acc[d][e * 2 + 1]);
        } else { /* two products have 16 dimensions, the even and the odd ones */
#pragma unroll
            for (int d = 0; d < COUNT; d += 2)
                *(float4 *)(to + d * 8 + lane % 4 * 4) = make_float4(
                    acc[d][e * 2], acc[d + 1][e * 2], acc[d][e * 2 + 1], acc[d + 1][e * 2 + 1]);
        }
    }

    /* Rows whose sums over all chunks are there become output, by way of `sums`. */
    __device__ static void store_folded(const gpu_call &c, const job &j, uint32_t first_row,
                                        const unsigned char *so_far, float *sums,
                                        const row_state *total)
    {
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % SPLIT;
        const float4 *ours =
            (const float4 *)so_far + part * SHARE * OWNERS + warp / SPLIT * 32 + lane;
        float acc[SHARE][4];
#pragma unroll
        for (uint32_t i = 0; i < SHARE; i++) {
            float4 x = ours[i * OWNERS];
            acc[i][0] = x.x;
            acc[i][1] = x.y;
            acc[i][2] = x.z;
            acc[i][3] = x.w;
        }
#pragma unroll
        for (int e = 0; e < 2; e++)
            lay_out<SHARE>(acc, e,
                           sums + (first_row + lane / 4 + e * 8) * SUM_PITCH + part * SHARE * 8);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < j.rows * (DIM / 4); i += THREADS) {
            uint32_t r = i / (DIM / 4), d = i % (DIM / 4) * 4;
            if (d >= c.head_dim)
                continue;
            float4 y = *(const float4 *)(sums + r * SUM_PITCH + d);
            float x[4] = {y.x, y.y, y.z, y.w};
            store_sums<T>(c, j, place_of(c, j, r), d, total[r], x);
        }
    }
};

} // namespace mma

#endif
