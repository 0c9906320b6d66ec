/*
 * Attention on the tensor cores for 16-bit and 8-bit caches where a sequence has many rows (query
 * token x head of the group): what decode does with more than 8 of them ("wide", of v5), and
 * prefill
 * ("mma").
 *
 * A block's warps have FACES times 16 rows each (what is loaded of K and V serves them all) and go
 * together over tiles of tokens, which lie in shared memory twice: while one is worked on, the next
 * comes in. (With fewer rows, SPLIT warps have the same rows and a part of every tile's tokens
 * each.) Scores are q (16 rows x dimensions) times K
 * (dimensions x tokens); they stay in registers, become weights there, and are the left side of the
 * second product, with V. Blocks of many rows take the context in one piece; else it is cut into
 * chunks (chunks.cuh).
 *
 * EXACT: weights are multiplied as the sum of two 16-bit numbers, and q in fp32 as two or three.
 * Memory is what decode waits for, so that is free there. Prefill waits for the tensor cores: it
 * rounds both to the cache's type (of fp8 to fp16), as is usual (relative error 2.3e-3 with bf16
 * outputs, of which rounding the output alone is 1.7e-3).
 */
#ifndef TS_GPU_MMA_CUH
#define TS_GPU_MMA_CUH

#include "row_folds.cuh"

namespace mma
{

using namespace chunks;
using namespace tensor;

template <typename T, int DIM, int NUM_WARPS, int SPLIT, int FACES, bool EXACT> struct rows_kernel {
    static const uint32_t WARP_ROWS = FACES * 16, ROWS = NUM_WARPS / SPLIT * WARP_ROWS;
    static const uint32_t THREADS = NUM_WARPS * 32;
    static const uint32_t TOKENS = DIM > 128 ? 32 : 64; /* of a tile */
    /* Blocks that share a processor, as far as registers go. */
    static const int BLOCKS = FACES > 1 ? 2 : EXACT && (SPLIT > 1 && DIM == 64) ? 3 : 1;
    typedef typename multiplied<T>::type M;
    static const int PITCH = DIM * sizeof(T), Q_PITCH = DIM * 2, STEPS = DIM / 16;
    static const uint32_t EACH = TOKENS / NUM_WARPS;       /* tokens that a warp copies */
    static const uint32_t OURS = TOKENS / SPLIT;           /* ... and works on, */
    static const uint32_t ABREAST = FACES > 1 ? 32 : OURS; /* ... at once */
    static const int COLUMNS = ABREAST / 8;
    typedef loader<PITCH, EACH> rows;
    typedef loader<Q_PITCH, 16> q_rows;
    static const uint32_t PLANE = TOKENS * PITCH, TILE = 2 * PLANE, Q_BYTES = ROWS * Q_PITCH;
    static const uint32_t SUM_PITCH = DIM + 4; /* floats */
    static const uint32_t SUM_BYTES = SPLIT * ROWS * SUM_PITCH * sizeof(float);
    static const uint32_t STATE_BYTES = SPLIT * ROWS * sizeof(row_state); /* behind the sums */
    static const uint32_t END_BYTES = SUM_BYTES + STATE_BYTES;
    static const uint32_t WORK_BYTES = 2 * TILE > END_BYTES ? 2 * TILE : END_BYTES;
    typedef row_folds<T, DIM, ROWS, SPLIT, THREADS> fold;
    /* With rows as long as 256 it would be one block on a processor, not two. */
    static const uint32_t FOLD_BYTES = EXACT && DIM <= 128 ? fold::BYTES : 0;

    static_assert(ROWS * (EXACT ? V5_CHUNKS : MMA_CHUNKS) * sizeof(float) <= WORK_BYTES,
                  "a float for each row and chunk takes its place");

    __host__ __device__ static uint32_t planes(uint32_t io)
    {
        return EXACT ? q_planes<T>(io) : 1;
    }
    static uint32_t bytes(ts_dtype io)
    {
        return planes(io) * Q_BYTES + WORK_BYTES;
    }

    struct lane_rows { /* the two rows that a lane has: lane / 4 of 16, and 8 further */
        uint32_t position[2];
    };

    /* What happens to scores before the softmax beside scaling: variants, and hiding what a row
     * doesn't see. The slopes are looked up anew: registers are what is short. */
    __device__ static void apply_score_mods(const gpu_call &c, const job &j, const lane_rows &l,
                                            uint32_t row, uint32_t first, bool varied,
                                            float (*s)[4])
    {
        uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t position = l.position[e], from = first_key(c, position);
            float slope = 0;
            if (j.s.alibi != NULL)
                slope =
                    slope_of(j.s, head_of(c, j, j.first + min(row + lane / 4 + e * 8, j.rows - 1)));
#pragma unroll
            for (int i = 0; i < COLUMNS * 2; i++) {
                uint32_t t = first + i / 2 * 8 + lane % 4 * 2 + i % 2;
                float &x = s[i / 2][e * 2 + i % 2];
                if (varied)
                    x = modify_score(c, x * score_scale<T>(c, j), slope, t, position);
                if (t > position || t < from)
                    x = -CUDART_INF_F;
            }
        }
    }

    __device__ static void score(uint32_t q, uint32_t k, float (*s)[COLUMNS][4])
    {
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++) {
            uint32_t a[FACES][2][4];
#pragma unroll
            for (int f = 0; f < FACES; f++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    load_matrices(a[f][i], turn(q + f * 16 * Q_PITCH, pair * 4 + i * 2));
#pragma unroll
            for (int n = 0; n < COLUMNS; n += 2) {
                uint32_t b[2][4];
                operands<T>::template load<false>(b, k + n * 8 * PITCH, pair, false);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int f = 0; f < FACES; f++) {
                        multiply<M>(s[f][n], a[f][i], b[i][0], b[i][1]);
                        multiply<M>(s[f][n + 1], a[f][i], b[i][2], b[i][3]);
                    }
            }
        }
    }

    /*
     * An infinite element of K times the parts of q may be NaN, where q itself gives an infinity:
     * the first part decides, if it is finite and its product is infinite. A bit for each score.
     */
    struct infinities {
        uint32_t above, below;
        static_assert(!EXACT || (FACES == 1 && COLUMNS <= 8), "32 scores");

        __device__ void note(uint32_t q, const float (*s)[4])
        {
            bool finite = true;
            above = below = 0;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                uint32_t a[4];
                load_matrices(a, turn(q, step * 2));
                finite = finite && !any_not_finite<M>(a);
            }
            if (!__all_sync(~0u, finite))
                return;
#pragma unroll
            for (int i = 0; i < COLUMNS * 4; i++) {
                above |= (s[i / 4][i % 4] == CUDART_INF_F ? 1u : 0) << i;
                below |= (s[i / 4][i % 4] == -CUDART_INF_F ? 1u : 0) << i;
            }
        }

        __device__ void mend(float (*s)[4]) const
        {
#pragma unroll
            for (int i = 0; i < COLUMNS * 4; i++) {
                float &x = s[i / 4][i % 4];
                if (x != x && (above | below) >> i & 1)
                    x = above >> i & 1 ? CUDART_INF_F : -CUDART_INF_F;
            }
        }
    };

    /* Scores with their infinities, varied as they were. */
    __device__ static void score_again(const gpu_call &c, const job &j, const lane_rows &l,
                                       uint32_t row, uint32_t first, bool varied, bool clear,
                                       uint32_t q, uint32_t k, float (*s)[COLUMNS][4])
    {
        infinities found;
#pragma unroll
        for (int i = 0; i < COLUMNS * 4; i++)
            s[0][i / 4][i % 4] = 0;
        score(q, k, s);
        found.note(q, s[0]);
        for (uint32_t plane = 1; plane < planes(c.io); plane++)
            score(q + plane * Q_BYTES, k, s);
        found.mend(s[0]);
        if (varied || !clear)
            apply_score_mods(c, j, l, row, first, varied, s[0]);
    }

    /* The highest of a row's scores, of the lanes that have them. NANS: NaN, if one is. */
    template <bool NANS> __device__ static float highest(const float (*s)[4], int e)
    {
        float x = -CUDART_INF_F;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
            x = higher_of<NANS>(x, higher_of<NANS>(s[n][e * 2], s[n][e * 2 + 1]));
        x = higher_of<NANS>(x, __shfl_xor_sync(~0u, x, 1));
        return higher_of<NANS>(x, __shfl_xor_sync(~0u, x, 2));
    }

    /* A tile of which some rows don't see all tokens: a weight of 0 must hide even NaN. So each
     * query token's rows are multiplied by V without the tokens that it doesn't see. */
    __device__ static void add_apart(const gpu_call &c, const job &j, const lane_rows &l,
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
            multiply<M>(sum, a, b[0], b[1]);
            if (EXACT)
                multiply<M>(sum, rest, b[0], b[1]);
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
            a[e] = pack<M>(x, y);
            if (EXACT) {
                take_away<M>(a[e], &x, &y);
                rest[e] = pack<M>(x, y);
            }
        }
    }

    __device__ static void run(const gpu_call &c, uint32_t block, unsigned char *shared)
    {
        job j;
        find_job<(FOLD_BYTES > 0)>(c, block, ROWS, j);
        if (EXACT)
            append<T>(c, j, THREADS);
        __shared__ row_state total[ROWS];
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        uint32_t part = warp % SPLIT, first_row = warp / SPLIT * WARP_ROWS; /* of the tile's */
        uint32_t num_planes = planes(c.io);
        unsigned char *work = shared + num_planes * Q_BYTES;
        uint32_t work_at = shared_address(work);

        /* The tiles: this warp copies EACH tokens of every one. */
        rows r;
        r.start(c, j);
        if (r.clear(work, 2 * TILE, threadIdx.x, THREADS))
            __syncthreads();
        uint32_t tile = j.begin / TOKENS * TOKENS, stage = 0;
        uint32_t copied = work_at + warp * EACH * PITCH; /* where, in stage 0 */
        uint32_t next = tile + warp * EACH;
        if (next < j.end) {
            r.look_up(c, j, next, j.end);
            r.template issue<EXACT>(c, j, copied, PLANE);
        }
        commit_copies();
        next += TOKENS;
        if (next < j.end)
            r.look_up(c, j, next, j.end);
        load_q<T, q_rows, Q_PITCH / 16, ROWS, THREADS>(c, j, num_planes, shared);

        float acc[FACES][DIM / 8][4], max[FACES][2], sum[FACES][2];
#pragma unroll
        for (int f = 0; f < FACES; f++)
            fold::begin_rows(acc[f], max[f], sum[f]);
        lane_rows l[FACES];
#pragma unroll
        for (uint32_t i = 0; i < FACES * 2; i++) {
            uint32_t f = i / 2, e = i % 2;
            uint32_t row = j.first + min(first_row + f * 16 + lane / 4 + e * 8, j.rows - 1);
            l[f].position[e] = j.past + query_of(c, row);
        }
        /* The tokens that some row, and that every row, of this warp sees. */
        bool works = first_row < j.rows;
        uint32_t low = j.past + query_of(c, j.first + min(first_row, j.rows - 1));
        uint32_t high = j.past + query_of(c, j.first + min(first_row + WARP_ROWS, j.rows) - 1);
        uint32_t seen_from = first_key(c, low), clear_from = first_key(c, high);
        /* Scores are scaled in the exponent, unless something else happens to them before. */
        bool varied = is_varied(c, j.s.alibi) || !(c.scale_log2 > 0);
        float unit = varied ? 1 : score_scale<T>(c, j);
        uint32_t q_at = shared_address(shared) + q_rows::place(first_row + lane % 16, lane / 16);
        uint32_t k_place = rows::place(part * OURS + lane % 8 + lane / 16 * 8, lane / 8 % 2);
        uint32_t v_place = PLANE + rows::place(part * OURS + lane % 16, lane / 16);

        unsigned char *folded = work + WORK_BYTES;
        const uint32_t folds = FOLD_BYTES > 0 && j.chunks > 1 ? j.chunks : 0;
        uint32_t chunk = 0;
        for (; tile < j.end; tile += TOKENS, stage ^= 1) {
            await_copies<0>();
            __syncthreads(); /* the tile is there, and nobody reads the one before it */
            if (next < j.end)
                r.template issue<EXACT>(c, j, copied + (stage ^ 1) * TILE, PLANE);
            commit_copies();
            next += TOKENS;
            if (next < j.end)
                r.look_up(c, j, next, j.end);
            if constexpr (FOLD_BYTES > 0) /* while the next tile comes */
                for (; chunk < folds && tile >= (chunk + 1) * j.p.chunk_tokens; chunk++)
                    fold::fold_chunk(chunk, first_row, folded, total, acc[0], max[0], sum[0]);
            if (tile + TOKENS > j.end) { /* the last */
                rows::clear_rows(work_at + stage * TILE + PLANE, j.end - tile, TOKENS, threadIdx.x,
                                 THREADS);
                __syncthreads();
            }
            uint32_t at = work_at + stage * TILE, first = tile + part * OURS;
#pragma unroll 1
            for (uint32_t i = 0; i < OURS / ABREAST; i++, first += ABREAST, at += ABREAST * PITCH) {
                if (!works || first > high || first + ABREAST <= seen_from)
                    continue;
                float s[FACES][COLUMNS][4] = {};
                score(q_at, at + k_place, s);
                if (EXACT && c.io == TS_DTYPE_FP32)
                    for (uint32_t plane = 1; plane < num_planes; plane++)
                        score(q_at + plane * Q_BYTES, at + k_place, s);
                bool clear = first >= clear_from && first + ABREAST <= low + 1;
                if (varied || !clear)
#pragma unroll
                    for (int f = 0; f < FACES; f++)
                        apply_score_mods(c, j, l[f], first_row + f * 16, first, varied, s[f]);
                float higher[FACES][2], base[FACES][2];
                bool moves = false;
#pragma unroll
                for (int i = 0; i < FACES * 2; i++) {
                    int f = i / 2, e = i % 2;
                    float x = highest<EXACT>(s[f], e) * unit;
                    bool stays = x <= max[f][e] + SLACK; /* not NaN */
                    higher[f][e] = x = stays ? max[f][e] : x;
                    base[f][e] = x == -CUDART_INF_F ? 0 : x;
                    moves |= !stays;
                }
                if (__any_sync(~0u, moves)) { /* soon that becomes rare */
                    bool nan = EXACT && (base[0][0] != base[0][0] || base[0][1] != base[0][1]);
                    if (EXACT && __any_sync(~0u, nan)) {
                        if (!scaled<T>::value && num_planes > 1)
                            score_again(c, j, l[0], first_row, first, varied, clear, q_at,
                                        at + k_place, s);
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float x = highest<false>(s[0], e) * unit;
                            higher[0][e] = x = x > max[0][e] + SLACK ? x : max[0][e];
                            base[0][e] = x == -CUDART_INF_F ? 0 : x;
                        }
                    }
#pragma unroll
                    for (int i = 0; i < FACES * 2; i++) {
                        int f = i / 2, e = i % 2;
                        float factor = power(max[f][e] - base[f][e]);
                        max[f][e] = higher[f][e];
                        sum[f][e] *= factor;
#pragma unroll
                        for (int d = 0; d < DIM / 8; d++) {
                            acc[f][d][e * 2] *= factor;
                            acc[f][d][e * 2 + 1] *= factor;
                        }
                    }
                }
#pragma unroll
                for (int f = 0; f < FACES; f++)
#pragma unroll
                    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            s[f][n][e] = power(fmaf(s[f][n][e], unit, -base[f][e / 2]));
                            sum[f][e / 2] += s[f][n][e];
                        }
                bool nonfinite = false;
                if (!clear) {
#pragma unroll 1
                    for (uint32_t i = 0; i < ABREAST / 16 * (DIM / 32); i++) {
                        uint32_t b[2][4];
                        operands<T>::template load<true>(
                            b, at + v_place + i / (DIM / 32) * 16 * PITCH, i % (DIM / 32), true);
                        nonfinite = nonfinite || any_not_finite<M>(b[0]) || any_not_finite<M>(b[1]);
                    }
                    nonfinite = __any_sync(~0u, nonfinite);
                }
#pragma unroll
                for (int i = 0; i < FACES * COLUMNS / 2; i++) {
                    if (!nonfinite)
                        break;
                    const int f = i % FACES, t = i / FACES;
                    uint32_t a[4], rest[4];
                    weights_of(s[f], t, a, rest);
#pragma unroll
                    for (int d = 0; d < DIM / 8; d += 4) {
                        uint32_t b[2][4];
                        operands<T>::template load<true>(b, at + v_place + t * 16 * PITCH, d / 4,
                                                         true);
                        for (int e = 0; e < 4; e++)
                            add_apart(c, j, l[f], first_row + f * 16, first + t * 16, a, rest,
                                      b[e / 2][e % 2 * 2], b[e / 2][e % 2 * 2 + 1], acc[f][d + e]);
                    }
                }
                if (nonfinite)
                    continue;
#pragma unroll
                for (int t = 0; t < COLUMNS / 2; t++) { /* 16 tokens */
                    uint32_t a[FACES][4], rest[FACES][4];
#pragma unroll
                    for (int f = 0; f < FACES; f++)
                        weights_of(s[f], t, a[f], rest[f]);
#pragma unroll
                    for (int d = 0; d < DIM / 8; d += 4) {
                        uint32_t b[2][4];
                        operands<T>::template load<true>(b, at + v_place + t * 16 * PITCH, d / 4,
                                                         true);
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const uint32_t *x = b[e / 2] + e % 2 * 2;
#pragma unroll
                            for (int f = 0; f < FACES; f++) {
                                multiply<M>(acc[f][d + e], a[f], x[0], x[1]);
                                if (EXACT)
                                    multiply<M>(acc[f][d + e], rest[f], x[0], x[1]);
                            }
                        }
                    }
                }
            }
        }
        float *sums = (float *)work;
        await_copies<0>();
        __syncthreads(); /* the tiles are used up */
        if (folds > 0) {
            if constexpr (FOLD_BYTES > 0)
                for (; chunk < folds; chunk++)
                    fold::fold_chunk(chunk, first_row, folded, total, acc[0], max[0], sum[0]);
            fold::store_folded(c, j, first_row, folded, sums, total);
            return;
        }
        row_state(*states)[ROWS] = (row_state(*)[ROWS])(work + SUM_BYTES);
#pragma unroll
        for (uint32_t i = 0; i < FACES * 2; i++) {
            uint32_t f = i / 2, e = i % 2, row = first_row + f * 16 + lane / 4 + e * 8;
            float all = fold::sum_of_row(sum[f][e]);
            if (lane % 4 == 0)
                states[part][row] = row_state{max[f][e], all};
            fold::template lay_out<DIM / 8>(acc[f], e, sums + (part * ROWS + row) * SUM_PITCH);
        }
        finish<T, DIM, ROWS, SPLIT, true, EXACT>(c, j, THREADS, states, sums, SUM_PITCH, sums,
                                                 total);
    }
};

template <typename T, int DIM, int NUM_WARPS, int SPLIT, int FACES, bool EXACT>
__global__ void __launch_bounds__(NUM_WARPS * 32,
                                  rows_kernel<T, DIM, NUM_WARPS, SPLIT, FACES, EXACT>::BLOCKS)
    attend_rows(const __grid_constant__ gpu_call c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    typedef rows_kernel<T, DIM, NUM_WARPS, SPLIT, FACES, EXACT> kernel;
    if constexpr (EXACT)
        run_blocks<kernel>(c, shared);
    else
        kernel::run(c, blockIdx.x, shared);
}

template <typename T, int DIM, int NUM_WARPS, int SPLIT, int FACES, bool EXACT>
ts_gpu_kernel kernel_dim(ts_dtype io)
{
    typedef rows_kernel<T, DIM, NUM_WARPS, SPLIT, FACES, EXACT> kernel;
    uint32_t fold_bytes =
        kernel::planes(io) == 1 ? kernel::FOLD_BYTES : 0; /* else few blocks fit */
    return ts_gpu_kernel{(const void *)attend_rows<T, DIM, NUM_WARPS, SPLIT, FACES, EXACT>,
                         NUM_WARPS * 32, kernel::bytes(io), fold_bytes};
}

/* Rows of an fp8 cache are laid out as those of 128 dimensions at least: a row has 8 pieces then.
 */
template <typename T, int SPLIT, int FACES, bool EXACT>
ts_gpu_kernel kernel_of(uint32_t head_dim, ts_dtype io)
{
    return head_dim <= 64 && !scaled<T>::value ? kernel_dim < T, scaled<T>::value ? 128 : 64, 4,
           SPLIT, FACES,
           EXACT > (io)
       : head_dim <= 128 ? kernel_dim<T, 128, 4, SPLIT, FACES, EXACT>(io)
                         : kernel_dim<T, 256, 4, SPLIT, 1, EXACT>(io);
}

/* Rows of a block: v5_rows' and mma_rows'. */
template <typename T> ts_gpu_kernel medium(uint32_t head_dim, ts_dtype io)
{
    return kernel_of<T, 2, 1, true>(head_dim, io);
}

template <typename T> ts_gpu_kernel wide(uint32_t head_dim, ts_dtype io)
{
    return kernel_of<T, 1, 1, true>(head_dim, io);
}

template <typename T> ts_gpu_kernel prefill(uint32_t head_dim, ts_dtype io)
{
    return kernel_of<T, 1, 2, false>(head_dim, io);
}

} // namespace mma

#endif
