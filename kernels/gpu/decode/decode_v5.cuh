/*
 * v5 for caches of 16-bit and 8-bit elements and few rows. What changes against v4: the context is
 * cut into chunks, so that one long sequence fills the device as well as many do (chunks.cuh); all
 * query heads of a group, and all query tokens, share one read of K and V; copies are asynchronous,
 * so that how much is under way doesn't depend on registers; and the tensor cores multiply.
 *
 * A tile has 16 tokens. Scores are K (16 tokens x dimensions) times q (dimensions x 8 rows), the
 * output is V transposed (dimensions x 16 tokens) times the weights (16 tokens x 8 rows): the rows
 * are the narrow side, since there are few of them. Weights are multiplied as the sum of two 16-bit
 * numbers, and so is q where it comes in fp32: results are as exact as fp32 arithmetic's.
 */
#ifndef TS_GPU_DECODE_V5_CUH
#define TS_GPU_DECODE_V5_CUH

#include "chunk_sums.cuh"
#include "tensor.cuh"

extern "C" {
#include "waves.h"
}

namespace v5
{

using namespace chunks;
using namespace tensor;

/* MORE: tiles under way. CLOSE: in less shared memory, so that four blocks share a processor. */
template <typename T, int DIM, int MORE = 0, bool CLOSE = false> struct narrow_kernel {
    typedef typename multiplied<T>::type M;
    static const int PITCH = DIM * sizeof(T), STEPS = DIM / 16;
    static const uint32_t ROWS = 8, TOKENS = 16, STAGES = (PITCH > 128 ? 2 : 3) + MORE;
    typedef typename std::conditional<CLOSE, plane_ring<PITCH, TOKENS>,
                                      ring<PITCH, TOKENS, STAGES>>::type tiles;
    typedef typename tiles::rows rows;
    typedef loader<DIM * 2, TOKENS> q_rows;
    static const uint32_t Q_BYTES = ROWS * DIM * 2, RING_BYTES = WARPS * tiles::BYTES;
    static const uint32_t SUM_PITCH = DIM + 4; /* floats */
    static_assert(TOKENS == WHOLE_TILE, "in_block, of a plain call");
    static_assert(RING_BYTES >= WARPS * ROWS * SUM_PITCH * sizeof(float), "sums take its place");
    static_assert(RING_BYTES >= ROWS * V5_CHUNKS * sizeof(float), "so do the chunks' factors");

    static uint32_t bytes(ts_dtype io)
    {
        return q_planes<T>(io) * Q_BYTES + RING_BYTES;
    }

    template <typename C> __device__ static uint32_t planes_of(const C &c)
    {
        return C::PLAIN ? 1 : q_planes<T>(c.io);
    }

    /* q as the multiplications take it: of each 16 dimensions. */
    __device__ static void fetch_q(uint32_t at, uint32_t (*b)[2])
    {
        uint32_t lane = threadIdx.x % 32, first = at + q_rows::place(lane % 8, lane / 8);
#pragma unroll
        for (int step = 0; step < STEPS; step += 2) {
            uint32_t x[4];
            load_matrices(x, turn(first, step * 2));
            b[step][0] = x[0];
            b[step][1] = x[1];
            b[step + 1][0] = x[2];
            b[step + 1][1] = x[3];
        }
    }

    /* A tile of which some rows don't see all tokens: a weight of 0 must hide even NaN. So each
     * query token's rows are multiplied by V without the tokens that it doesn't see. */
    __device__ static void add_apart(const gpu_call &c, const job &j, uint32_t tile,
                                     const uint32_t *a, const uint32_t *p, float *acc)
    {
        uint32_t lane = threadIdx.x % 32, query[2]; /* of this lane's two rows */
        for (uint32_t e = 0; e < 2; e++)
            query[e] = query_of(c, j.first + min(lane % 4 * 2 + e, j.rows - 1));
        uint32_t last = query_of(c, j.first + j.rows - 1);
        for (uint32_t q = query_of(c, j.first); q <= last; q++) {
            uint32_t position = j.past + q, seen = first_key(c, position), masked[4];
            for (int e = 0; e < 4; e++) {
                uint32_t t = tile + lane % 4 * 2 + e / 2 * 8;
                masked[e] = a[e] & ((t >= seen && t <= position ? 0xffffu : 0) |
                                    (t + 1 >= seen && t + 1 <= position ? 0xffff0000u : 0));
            }
            float sum[4] = {};
            multiply<M>(sum, masked, p[0], p[1]);
            multiply<M>(sum, masked, p[2], p[3]);
            for (int e = 0; e < 4; e++)
                acc[e] += query[e % 2] == q ? sum[e] : 0;
        }
    }

    /* Scores of a tile with q's first plane alone; false: that isn't finite. */
    __device__ static bool score_first(uint32_t k, uint32_t (*q)[2], float *s)
    {
        bool finite = true;
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++) {
            uint32_t a[2][4];
            operands<T>::template load<false>(a, k, pair, true);
            multiply<M>(s, a[0], q[pair * 2][0], q[pair * 2][1]);
            multiply<M>(s, a[1], q[pair * 2 + 1][0], q[pair * 2 + 1][1]);
            const uint32_t both[4] = {q[pair * 2][0], q[pair * 2][1], q[pair * 2 + 1][0],
                                      q[pair * 2 + 1][1]};
            finite = finite && !any_not_finite<M>(both);
        }
        return __all_sync(~0u, finite);
    }

    /* What a lane has of its two rows, the columns lane % 4 * 2 and the next: of each 16 dimensions
     * two, see lay_out; what weights are measured from; and this lane's part of their sum. */
    struct lane_sums {
        float acc[STEPS][4], max[2], sum[2];

        __device__ void begin()
        {
#pragma unroll
            for (int d = 0; d < STEPS; d++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[d][e] = 0;
            max[0] = max[1] = -CUDART_INF_F;
            sum[0] = sum[1] = 0;
        }

        /* What weights are measured from is raised where a row's scores have gone beyond it: each
         * row's by its own scores, whoever is in the tile. */
        __device__ void raise(const float *s)
        {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float highest = fmaxf(s[e], s[e + 2]);
#pragma unroll
                for (int step = 4; step < 32; step *= 2)
                    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
                bool moves = highest > max[e] + SLACK;
                float factor = moves ? rescale(max[e], highest) : 1;
                max[e] = moves ? highest : max[e];
                sum[e] = __fmul_rn(sum[e], factor);
#pragma unroll
                for (int d = 0; d < STEPS; d++) {
                    acc[d][e] = __fmul_rn(acc[d][e], factor);
                    acc[d][e + 2] = __fmul_rn(acc[d][e + 2], factor);
                }
            }
        }

        /* Scores become weights, as the second product takes them: rounded, and what that leaves.
         */
        __device__ void weigh(float *s, uint32_t *p)
        {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[e] = power(__fsub_rn(s[e], max[e % 2] == -CUDART_INF_F ? 0 : max[e % 2]));
                sum[e % 2] += s[e];
            }
            uint32_t low = pack<M>(s[0], s[1]), high = pack<M>(s[2], s[3]);
            take_away<M>(low, &s[0], &s[1]);
            take_away<M>(high, &s[2], &s[3]);
            p[0] = transpose(low);
            p[1] = transpose(high);
            p[2] = transpose(pack<M>(s[0], s[1]));
            p[3] = transpose(pack<M>(s[2], s[3]));
        }

        /* Adds weights times V: of 32 dimensions, whose operands are a. */
        __device__ void add(int pair, const uint32_t (*a)[4], const uint32_t *p)
        {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                multiply<M>(acc[pair * 2 + i], a[i], p[0], p[1]);
                multiply<M>(acc[pair * 2 + i], a[i], p[2], p[3]);
            }
        }

        /* This lane's part of a row's weights becomes the row's sum of them. */
        __device__ void add_up_weights()
        {
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int step = 4; step < 32; step *= 2)
                    sum[e] += __shfl_xor_sync(~0u, sum[e], step);
        }

        /* To where the rows' states lie, and their sums in the order of dimensions. */
        __device__ void lay_out(row_state *states, float *sums) const
        {
            uint32_t lane = threadIdx.x % 32;
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                uint32_t r = lane % 4 * 2 + e;
                if (lane / 4 == 0)
                    states[r] = row_state{max[e], sum[e]};
                /* A product's rows g and g + 8 are these dimensions of the 16. */
                const uint32_t NEXT = scaled<T>::value ? 1 : 8;
                float *to = sums + r * SUM_PITCH + lane / 4 * (scaled<T>::value ? 2 : 1);
#pragma unroll
                for (int d = 0; d < STEPS; d++) {
                    to[d * 16] = acc[d][e];
                    to[d * 16 + NEXT] = acc[d][e + 2];
                }
            }
        }
    };

    /* Where a lane's loads of a tile's K and V start, from the tile's place. */
    __device__ static uint32_t k_place()
    {
        uint32_t lane = threadIdx.x % 32;
        return rows::place(lane % 16, lane / 16);
    }
    __device__ static uint32_t v_place()
    {
        uint32_t lane = threadIdx.x % 32;
        return rows::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }

    /* Adds a tile's scores with one plane of q to two sums: neither waits for the other. */
    __device__ static void score(uint32_t k, uint32_t (*q)[2], float *s, float *odd)
    {
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++) {
            uint32_t a[2][4];
            operands<T>::template load<false>(a, k, pair, true);
            multiply<M>(s, a[0], q[pair * 2][0], q[pair * 2][1]);
            multiply<M>(odd, a[1], q[pair * 2 + 1][0], q[pair * 2 + 1][1]);
        }
    }

    /* The same with the first plane, whose operands are at q: fewer registers. */
    __device__ static void score_there(uint32_t k, uint32_t q, float *s, float *odd)
    {
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++) {
            uint32_t a[2][4], b[4];
            operands<T>::template load<false>(a, k, pair, true);
            load_matrices(b, turn(q, pair * 4));
            multiply<M>(s, a[0], b[0], b[1]);
            multiply<M>(odd, a[1], b[2], b[3]);
        }
    }

    /* What a warp's tiles have in common: where a lane's loads start, and what becomes of its
     * scores. A lane has tokens lane / 4 and 8 more of a tile, and two rows. */
    struct lane_view {
        uint32_t to_k, to_v, to_q, q_at;
        float scale, slope[2];
        uint32_t position[2], from[2];
        bool varied;

        template <typename C> __device__ lane_view(const C &c, const job &j, uint32_t q)
        {
            uint32_t lane = threadIdx.x % 32;
            to_k = k_place();
            to_v = v_place();
            to_q = q + q_rows::place(lane % 8, lane / 8);
            q_at = q;
            scale = score_scale<T>(c, j);
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                uint32_t row = j.first + min(lane % 4 * 2 + e, j.rows - 1);
                slope[e] = slope_of(j.s, head_of(c, j, row));
                position[e] = j.past + query_of(c, row);
                from[e] = first_key(c, position[e]);
            }
            varied = is_varied(c, j.s.alibi);
        }
    };

    /* The next tile. HIDES: some rows may not see all of its tokens. */
    template <bool HIDES, typename C>
    __device__ static void add_tile(const C &c, const job &j, tiles &ring, const lane_view &w,
                                    uint32_t (*q)[2], uint32_t tile, lane_sums &l)
    {
        uint32_t lane = threadIdx.x % 32, k = ring.take_k(c, j);
        float s[4] = {}, odd[4] = {};
        if (CLOSE)
            score_there(k + w.to_k, w.to_q, s, odd);
        else
            score(k + w.to_k, q, s, odd);
        if (takes_fp32(c))
            for (uint32_t plane = 1; plane < planes_of(c); plane++) {
                uint32_t rest[STEPS][2];
                fetch_q(w.q_at + plane * Q_BYTES, rest);
                score(k + w.to_k, rest, s, odd);
            }
        bool clear = !HIDES || (tile >= j.clear_begin && tile + TOKENS <= j.clear_end);
        bool passes = false;
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[e] = __fmul_rn(s[e] + odd[e], w.scale);
        if (w.varied || !clear) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint32_t t = tile + lane / 4 + e / 2 * 8;
                s[e] = t > w.position[e % 2] || t < w.from[e % 2]
                           ? -CUDART_INF_F
                           : modify_score(c, s[e], w.slope[e % 2], t, w.position[e % 2]);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            passes |= !(s[e] <= l.max[e % 2] + SLACK); /* NaN too */
        if (__any_sync(~0u, passes)) {                 /* seldom: the first tile, as a rule */
            /* An infinite element of K times the parts of q may be NaN: the first part decides, if
             * it is infinite. */
            bool nan = s[0] != s[0] || s[1] != s[1] || s[2] != s[2] || s[3] != s[3];
            float first[4] = {};
            if (planes_of(c) > 1 && !scaled<T>::value && __any_sync(~0u, nan) &&
                score_first(k + w.to_k, q, first))
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (s[e] != s[e] && isinf(first[e]))
                        s[e] = modify_score(c, first[e] * w.scale, w.slope[e % 2],
                                            tile + lane / 4 + e / 2 * 8, w.position[e % 2]);
            l.raise(s);
        }
        uint32_t p[4];
        l.weigh(s, p);
        uint32_t v = ring.take_v(c, j, k);
        if (HIDES && tile + TOKENS > j.end) { /* the last */
            rows::clear_rows(v, j.end - tile, TOKENS, lane, 32);
            __syncwarp();
        }
        bool nonfinite = false;
        if (!clear) {
#pragma unroll
            for (int pair = 0; pair < STEPS / 2; pair++) {
                uint32_t a[2][4];
                operands<T>::template load<true>(a, v + w.to_v, pair, false);
                nonfinite = nonfinite || any_not_finite<M>(a[0]) || any_not_finite<M>(a[1]);
            }
            nonfinite = __any_sync(~0u, nonfinite);
        }
        if (nonfinite) {
#pragma unroll
            for (int pair = 0; pair < STEPS / 2; pair++) {
                uint32_t a[2][4];
                operands<T>::template load<true>(a, v + w.to_v, pair, false);
                add_apart(c, j, tile, a[0], p, l.acc[pair * 2]);
                add_apart(c, j, tile, a[1], p, l.acc[pair * 2 + 1]);
            }
            return;
        }
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++) {
            uint32_t a[2][4];
            operands<T>::template load<true>(a, v + w.to_v, pair, false);
            l.add(pair, a, p);
        }
    }

    template <typename C>
    __device__ static void work(const C &c, const job &j, unsigned char *shared)
    {
        append<T>(c, j, THREADS);
        __shared__ row_state states[WARPS][ROWS], total[ROWS];
        uint32_t warp = threadIdx.x / 32;
        uint32_t planes = planes_of(c);
        unsigned char *rings = shared + planes * Q_BYTES;
        tiles ring;
        ring.start(c, j, rings);
        load_q<T, q_rows, DIM / 8, ROWS, THREADS>(c, j, planes, shared);
        __syncthreads();
        uint32_t q_at = shared_address(shared);
        uint32_t q[STEPS][2]; /* CLOSE: it has no registers for it */
        if (!CLOSE)
            fetch_q(q_at, q);
        lane_sums l;
        l.begin();
        const lane_view view(c, j, q_at);
        uint32_t tile = j.begin / TOKENS * TOKENS + warp * TOKENS;
        if (C::PLAIN) /* by far the most, in a loop with little code */
            for (; tile + TOKENS <= min(j.end, j.clear_end); tile += WARPS * TOKENS)
                add_tile<false>(c, j, ring, view, q, tile, l);
        for (; tile < j.end; tile += WARPS * TOKENS)
            add_tile<true>(c, j, ring, view, q, tile, l);
        await_copies<0>();
        __syncthreads(); /* the rings are used up */
        float *sums = (float *)rings;
        l.add_up_weights();
        l.lay_out(states[warp], sums + warp * ROWS * SUM_PITCH);
        finish<T, DIM, ROWS, WARPS>(c, j, THREADS, states, sums, SUM_PITCH, sums, total);
    }

    template <typename C>
    __device__ static void run(const C &c, uint32_t block, unsigned char *shared)
    {
        job j;
        find_job(c, block, ROWS, j);
        work(c, j, shared);
    }
};

/* Blocks that share a processor: while one starts or ends, the others keep memory busy. A row of
 * fp8 takes as many instructions as one of twice the bytes, so it takes more warps to keep it so.
 */
template <typename T, int DIM> struct abreast {
    static const int BLOCKS = DIM > 128 ? 1 : scaled<T>::value || DIM <= 64 ? 4 : V5_BLOCKS;
};

template <typename T, int DIM, typename C>
__global__ void __launch_bounds__(THREADS, abreast<T, DIM>::BLOCKS)
    decode_v5(const __grid_constant__ C c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    run_blocks<narrow_kernel<T, DIM>>(c, shared);
}

/* The least of the lengths of rows that kernels are compiled for. Those of an fp8 cache are laid
 * out as rows of 128 dimensions at least: a row has 8 pieces then. */
template <typename T> struct least {
    static const int DIM = scaled<T>::value ? 128 : 64;
};

template <typename T, int DIM, typename C> ts_gpu_kernel kernel_dim(ts_dtype io)
{
    return ts_gpu_kernel{(const void *)decode_v5<T, DIM, C>, THREADS,
                         narrow_kernel<T, DIM>::bytes(io), 0};
}

template <typename T> ts_gpu_kernel kernel_of(uint32_t head_dim, ts_dtype io)
{
    return head_dim <= least<T>::DIM ? kernel_dim<T, least<T>::DIM, gpu_call>(io)
           : head_dim <= 128         ? kernel_dim<T, 128, gpu_call>(io)
                                     : kernel_dim<T, 256, gpu_call>(io);
}

/* For plain calls alone, with the same bits. */
template <typename T> ts_gpu_kernel plain_of(uint32_t head_dim, ts_dtype io)
{
    return io == TS_DTYPE_FP32 || head_dim > 128 ? ts_gpu_kernel{}
           : head_dim <= least<T>::DIM           ? kernel_dim<T, least<T>::DIM, plain_call>(io)
                                                 : kernel_dim<T, 128, plain_call>(io);
}

/* For plain calls too, and in less of a processor, so that V5_CLOSE_BLOCKS share it: a little
 * slower, but not where they spare a launch its last wave. The bits are the same. */
template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, V5_CLOSE_BLOCKS)
    decode_v5_close(const __grid_constant__ plain_call c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    run_blocks<narrow_kernel<T, DIM, 0, true>>(c, shared);
}

/* For 16-bit caches, and rows of which not as many blocks share a processor anyway. */
template <typename T> ts_gpu_kernel close_of(uint32_t head_dim, ts_dtype io)
{
    if constexpr (!scaled<T>::value)
        if (head_dim > 64 && head_dim <= 128 && io != TS_DTYPE_FP32)
            return ts_gpu_kernel{(const void *)decode_v5_close<T, 128>, THREADS,
                                 narrow_kernel<T, 128, 0, true>::bytes(io), 0};
    return ts_gpu_kernel{};
}

} // namespace v5

#endif
