/*
 * How a piece of work ends in the groups of wgmma.cuh that multiply, where its sums go from their
 * registers to the output: what a row's are to be multiplied by, chunks that come together, the
 * stores. (Sums that others are to be merged with go another way: wgmma.cuh, store_apart.)
 *
 * What can be found before the last sums are there is found while their products are under way.
 * There a branch would make the assembler wait for them, so it is done without any.
 */
#ifndef TS_GPU_WGMMA_ENDS_CUH
#define TS_GPU_WGMMA_ENDS_CUH

#include "wgmma_tiles.cuh"

namespace wgmma
{

template <typename T, int DIM, bool VARIED, bool FEW> struct piece_ends {
    typedef tile_work<T, DIM, VARIED, FEW> tiles_of;
    static const uint32_t WORKERS = tiles_of::WORKERS;

    /* What a thread has of a piece of several chunks so far: a vector for each eight dimensions,
     * and its rows' states. FEW has room for the first NEAR of them in shared memory, BYTES of it.
     * The others lie in memory, or rather in the second-level cache, for a block writes there again
     * and again. */
    static const int VECTORS = DIM / 8, NEAR = FEW ? VECTORS / 2 : 0;
    static const uint32_t BYTES = NEAR * WORKERS * sizeof(float4);
    static_assert(VECTORS + 1 == WGMMA_FOLD(DIM), "and the states");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

    typedef typename tiles_of::rows_state rows_state;

    /* Of this lane's two rows: what their sums are to be multiplied by, and their places in the
     * output. */
    struct rows {
        float factor[2];
        uint32_t place[2];
        bool found; /* the factors; else finish_place is to find them */
    };

    /* 1 / x as a division gives it, of a normal number; of 0 it is 0. A row that sees any token has
     * a weight of about 1. */
    __device__ static float reciprocal(float x)
    {
        float y;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        y = __fmaf_rn(y, -__fmaf_rn(x, y, -1), y);
        return x == 0 ? 0 : y;
    }

    /* V's scale: value_scale. */
    __device__ static float load_scale(const gpu_call &c, const job &j)
    {
        float scale = 1;
        if (scaled<T>::value)
            asm volatile("{\n.reg .pred p;\nsetp.ne.u64 p, %1, 0;\n@p ld.global.f32 %0, [%2];\n}"
                         : "+f"(scale)
                         : "l"(j.s.scales), "l"(j.s.scales + c.kv_heads + j.kv_head)
                         : "memory");
        return scale;
    }

    __device__ static void store_if(bool wanted, float *to, float x)
    {
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p st.global.f32 [%0], %1;\n}"
                     :
                     : "l"(to), "f"(x), "r"((uint32_t)wanted)
                     : "memory");
    }

    /* Adds up what the lanes of a row have of its weights, and finds `rows`: all that finish_place
     * would, where that is to be multiplied by nothing else. apart: others are merged with it. */
    __device__ static void find(const gpu_call &c, const job &j, uint32_t first_row, rows_state &r,
                                bool apart, rows &x)
    {
        const uint32_t row = first_row + threadIdx.x % 32 / 4;
        const float scale = load_scale(c, j);
        x.found = !apart && j.chunks == 1 && j.s.sinks == NULL;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            r.sum[e] += __shfl_xor_sync(~0u, r.sum[e], 1);
            r.sum[e] += __shfl_xor_sync(~0u, r.sum[e], 2);
            x.place[e] = place_of<true>(c, j, row + e * 8);
            x.factor[e] = reciprocal(r.sum[e]) * scale;
            store_if(x.found && row + e * 8 < j.rows && j.s.lse != NULL, j.s.lse + x.place[e],
                     (r.max[e] + log2f(r.sum[e])) * 0.6931471805599453f);
        }
    }

    /* The 16-byte pieces of four columns' pairs, which a quad's lanes have a pair each of, so that
     * each lane has one column's whole. */
    __device__ static void turn_quad(uint32_t *x)
    {
        uint32_t lane = threadIdx.x;
        bool odd = lane & 1, high = lane & 2;
        uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
        uint32_t b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
        x[0] = odd ? a : x[0];
        x[1] = odd ? x[1] : a;
        x[2] = odd ? b : x[2];
        x[3] = odd ? x[3] : b;
        a = __shfl_xor_sync(~0u, high ? x[0] : x[2], 2);
        b = __shfl_xor_sync(~0u, high ? x[1] : x[3], 2);
        x[0] = high ? a : x[0];
        x[1] = high ? b : x[1];
        x[2] = high ? x[2] : a;
        x[3] = high ? x[3] : b;
    }

    /* Two numbers as the output has them, which is 16-bit. */
    __device__ static uint32_t pack_out(const gpu_call &c, float x, float y)
    {
        if (!scaled<T>::value)
            return pack<typename multiplied<T>::type>(x, y);
        return c.io == TS_DTYPE_FP16 ? pack<__half>(x, y) : pack<__nv_bfloat16>(x, y);
    }

    /* This lane's part of the output. */
    __device__ static void store(const gpu_call &c, const job &j, uint32_t first_row,
                                 const rows_state &r, const rows &x, const float (*o)[4])
    {
        uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const bool there = first_row + lane / 4 + e * 8 < j.rows;
            float factor = x.factor[e];
            if (!x.found && there)
                factor = finish_place(c, j.s, x.place[e], r.max[e], r.sum[e]) *
                         value_scale<T>(c, j.s, j.kv_head);
            uint16_t *to = (uint16_t *)j.s.out + x.place[e] * (size_t)c.head_dim;
#pragma unroll
            for (uint32_t d = 0; d < DIM / 8; d += 4) {
                uint32_t y[4];
#pragma unroll
                for (uint32_t i = 0; i < 4; i++)
                    y[i] = pack_out(c, o[d + i][e * 2] * factor, o[d + i][e * 2 + 1] * factor);
                turn_quad(y);
                uint32_t column = (d + lane % 4) * 8;
                if (there && column < c.head_dim)
                    cache_hints::store(to + column, make_uint4(y[0], y[1], y[2], y[3]),
                                       FEW && c.keeps_out);
            }
        }
    }

    /* ---- chunks of one piece ---- */

    /* FEW has registers for all that doesn't lie near, the states last. Others load it where it is
     * wanted. */
    static const int FAR = FEW ? VECTORS - NEAR + 1 : 0;
    struct folds {
        float4 far[FAR > 0 ? FAR : 1];
    };

    /* Where this thread's vectors and, behind them, states lie in memory. */
    __device__ static float4 *folds_of(const wgmma_call &wc)
    {
        return wc.folds + blockIdx.x * (size_t)(WORKERS * WGMMA_FOLD(DIM)) + threadIdx.x;
    }

    __device__ static void ask_for_folds(const wgmma_call &wc, const job &j, uint32_t first_row,
                                         folds &x)
    {
        const float4 *from = folds_of(wc) + NEAR * WORKERS;
        const uint32_t wanted = j.chunks > 1 && j.chunk > 0 && first_row < j.rows;
#pragma unroll
        for (int i = 0; i < FAR; i++) {
            float4 &y = x.far[i];
            y = make_float4(0, 0, 0, 0);
            asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
                         "@p ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];\n}"
                         : "+f"(y.x), "+f"(y.y), "+f"(y.z), "+f"(y.w)
                         : "l"(from + i * WORKERS), "r"(wanted)
                         : "memory");
        }
    }

    /* A chunk of a piece of several ends: what this thread has of it is added to what there is so
     * far, as the merge of chunks does it (chunk_sums.cuh: finish). near: in shared memory. */
    __device__ static void fold_chunk(const wgmma_call &wc, const job &j, rows_state &r,
                                      float (*o)[4], const folds &asked, unsigned char *near)
    {
        const uint32_t chunk = j.chunk;
        const bool more = chunk + 1 < j.chunks;
        float4 *so_far = folds_of(wc), *nearer = (float4 *)near + threadIdx.x;
        float4 state = make_float4(-CUDART_INF_F, 0, -CUDART_INF_F, 0);
        if (chunk > 0)
            state = FEW ? asked.far[FAR - 1] : __ldcg(so_far + VECTORS * WORKERS);
        float ours[2], factor[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            row_state before = {e == 0 ? state.x : state.z, e == 0 ? state.y : state.w};
            ours[e] = rescale(r.max[e], r.max[e]);
            factor[e] = fold_factor(before.max, r.max[e]);
            r.sum[e] = fold(before.sum, __fmaf_rn(r.sum[e], ours[e], 0), factor[e]);
            r.max[e] = fmaxf(before.max, r.max[e]);
        }
        state = make_float4(r.max[0], r.sum[0], r.max[1], r.sum[1]);
        if (more)
            cache_hints::store((float *)(so_far + VECTORS * WORKERS), state, true);
#pragma unroll
        for (int d = 0; d < VECTORS; d++) {
            float4 x = make_float4(0, 0, 0, 0);
            if (!FEW && d % 4 == 0)
                asm volatile("" ::: "memory"); /* only 4 loads at once, for lack of registers */
            if (FEW && d >= NEAR)
                x = asked.far[d - NEAR];
            else if (chunk > 0)
                x = FEW ? nearer[d * WORKERS] : __ldcg(so_far + d * WORKERS);
            const float before[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[d][e] = fold(before[e], __fmaf_rn(o[d][e], ours[e / 2], 0), factor[e / 2]);
        }
        if (!more)
            return;
#pragma unroll
        for (int d = 0; d < VECTORS; d++) {
            float4 x = make_float4(o[d][0], o[d][1], o[d][2], o[d][3]);
            if (d < NEAR)
                nearer[d * WORKERS] = x;
            else
                cache_hints::store((float *)(so_far + d * WORKERS), x, true);
        }
    }

#endif
};

} // namespace wgmma

#endif
