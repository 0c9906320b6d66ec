/*
 * Prefill on Hopper's warp-group products ("wgmma"), for 16-bit caches: what mma does, by
 * instructions that take both sides from shared memory, or the left one from registers, and are
 * waited for, not executed in turn.
 *
 * A block has three groups of four warps. Two have 64 rows (query token x head of the group) each
 * and multiply; the third copies tiles of K and V, each of which serves both, into rings of two and
 * three places. Barriers in shared memory say when a tile is there and when both have used it. A
 * group asks for a tile's scores and for the weighted sum of the tile before, and waits for both;
 * the two groups take turns at asking, so that one multiplies while the other has a softmax.
 *
 * Tiles lie in planes of 64 dimensions, rows of 128 bytes, swizzled as the hardware's 128-byte mode
 * has it (PTX ISA, "Asynchronous warpgroup-level matrix instructions", matrix descriptors). Weights
 * are rounded to the cache's type, as mma's are. Elements of a product lie as mma's do: of a
 * group's 64 rows, warp w has 16 w to 16 w + 15.
 */
#ifndef TS_GPU_WGMMA_CUH
#define TS_GPU_WGMMA_CUH

#include "mma.cuh"
#include "warp_group.cuh"

namespace wgmma
{

using namespace chunks;
using namespace tensor;

template <typename T, int DIM> struct rows_kernel {
    static const uint32_t GROUP_ROWS = 64, ROWS = WGMMA_ROWS;
    static const uint32_t WORKERS = 256, COPIERS = 128, THREADS = WORKERS + COPIERS;
    static const uint32_t TOKENS = DIM > 128 ? 64 : WGMMA_TOKENS; /* of a tile */
    static const uint32_t COLUMNS = TOKENS / 8, SLABS = DIM / 64, PIECES = DIM / 8;
    static const uint32_t SLAB = TOKENS * 128, PLANE = SLAB * SLABS; /* bytes */
    static const uint32_t K_STAGES = 2, V_STAGES = DIM > 128 ? 2 : 3, STAGES = K_STAGES + V_STAGES;
    static const uint32_t Q_SLAB = ROWS * 128, Q_BYTES = Q_SLAB * SLABS;
    static const uint32_t SUM_PITCH = DIM + 4; /* floats */
    static const uint32_t TILES_BYTES = STAGES * PLANE;
    static const uint32_t SUM_BYTES = ROWS * SUM_PITCH * sizeof(float);
    static const uint32_t WORK_BYTES = TILES_BYTES > SUM_BYTES ? TILES_BYTES : SUM_BYTES;
    static const uint32_t ALIGN = 1024; /* of what is swizzled */
    static const uint32_t BYTES = Q_BYTES + WORK_BYTES + ALIGN;
    static_assert(ROWS * MMA_CHUNKS * sizeof(float) <= WORK_BYTES,
                  "a float for each row and chunk takes the tiles' place");
    /* Named barriers; 0 is __syncthreads'. */
    static const uint32_t TOGETHER = 1, TURN = 2; /* and 3 */

    typedef mma::rows_kernel<T, DIM, 4, 1, 2, false> plain; /* has what a warp does by itself */
    static const uint32_t PART = plain::ABREAST;            /* tokens that it works on at once */

    /* Where a 16-byte piece of a row lies in rows of SLABS slabs of ROWS_OF rows. */
    template <uint32_t ROWS_OF> struct slabs {
        __device__ static uint32_t place(uint32_t row, uint32_t piece)
        {
            return piece / 8 * ROWS_OF * 128 + row * 128 + (piece % 8 ^ (row & 7)) * 16;
        }
    };
    typedef slabs<TOKENS> tile_rows;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

    /* The ring's places: K's, then V's. */
    struct barriers {
        uint64_t there[STAGES], used[STAGES];
    };
    __device__ static uint32_t place_of_tile(uint32_t n, uint32_t v)
    {
        return v == 0 ? n % K_STAGES : K_STAGES + n % V_STAGES;
    }
    __device__ static uint32_t turns_before(uint32_t n, uint32_t v) /* in the same place */
    {
        return n / (v == 0 ? K_STAGES : V_STAGES);
    }

    /* Tiles of the piece of work. */
    struct walk {
        uint32_t first, count;
    };
    __device__ static walk walk_of(const job &j)
    {
        uint32_t first = j.begin / TOKENS * TOKENS;
        return walk{first, j.end <= first ? 0 : (j.end - first + TOKENS - 1) / TOKENS};
    }

    /* ---- the third group ---- */

    static const uint32_t EACH = TOKENS / 4; /* tokens of a tile that a warp copies */

    /* Where the row of this lane's token of a tile starts behind `base`. */
    __device__ static size_t look_up(const gpu_call &c, const job &j, uint32_t tile)
    {
        uint32_t t = tile + threadIdx.x % COPIERS / 32 * EACH + threadIdx.x % 32 % EACH;
        t = min(t, j.end - 1); /* the last again */
        uint32_t entry = divide(t, c.block_tokens);
        return j.s.blocks[entry] * c.block_bytes + (t - entry * c.block_tokens.d) * c.token_stride;
    }

    /* Copies this warp's rows. What lies past the end is of no sequence's: of V, whose weights of 0
     * wouldn't hide all, it is made 0. */
    template <bool ONCE>
    __device__ static void copy_rows(const gpu_call &c, const unsigned char *base, size_t row,
                                     uint32_t to, uint32_t wanted)
    {
        const uint32_t ABREAST = 32 / PIECES, LOADS = EACH / ABREAST;
        uint32_t lane = threadIdx.x % 32, warp = threadIdx.x % COPIERS / 32;
        uint32_t piece = lane % PIECES;
        bool mine = piece * 16 < c.head_dim * sizeof(T);
#pragma unroll 8
        for (uint32_t i = 0; i < LOADS; i++) {
            uint32_t token = i * ABREAST + lane / PIECES;
            const unsigned char *from = base + __shfl_sync(~0u, row, (int)token) + piece * 16;
            token += warp * EACH;
            if (mine)
                cache_hints::copy_async(to + tile_rows::place(token, piece), from,
                                        token < wanted ? 16 : 0, ONCE);
        }
    }

    /* Tile n of K or V into the ring, once its place is free. */
    template <bool ONCE>
    __device__ static void copy_tile(const gpu_call &c, const job &j, const walk &w,
                                     const unsigned char *base, size_t row, uint32_t n, uint32_t v,
                                     uint32_t tiles, barriers *bars)
    {
        uint32_t place = place_of_tile(n, v);
        barrier_await(shared_address(&bars->used[place]), ~turns_before(n, v) & 1);
        copy_rows<ONCE>(c, base, row, tiles + place * PLANE,
                        v == 0 ? TOKENS : j.end - w.first - n * TOKENS);
        barrier_arrive_copied(shared_address(&bars->there[place]));
    }

    /* ONCE: no other block reads these K and V. */
    template <bool ONCE>
    __device__ static void copy_tiles(const gpu_call &c, const job &j, uint32_t tiles,
                                      barriers *bars)
    {
        walk w = walk_of(j);
        if (w.count == 0)
            return;
        const unsigned char *k = c.base + j.s.layer * 2 * c.plane_bytes + j.kv_head * c.head_stride;
        size_t row = look_up(c, j, w.first), next = 0;
        copy_tile<ONCE>(c, j, w, k, row, 0, 0, tiles, bars);
        for (uint32_t n = 0; n < w.count; n++, row = next) { /* in the order of their use */
            if (n + 1 < w.count) {
                next = look_up(c, j, w.first + (n + 1) * TOKENS);
                copy_tile<ONCE>(c, j, w, k, next, n + 1, 0, tiles, bars);
            }
            copy_tile<ONCE>(c, j, w, k + c.plane_bytes, row, n, 1, tiles, bars);
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
    }

    /* ---- the other two ---- */

    struct rows_state {
        typename plain::lane_rows l;
        float max[2], sum[2];
    };

    /* Weights of a tile: scores become them; returns what the sums so far are to be multiplied
     * by. */
    __device__ static void softmax_tile(float (*s)[4], float unit, rows_state &r, float *factor)
    {
        float base[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float x = -CUDART_INF_F;
#pragma unroll
            for (uint32_t n = 0; n < COLUMNS; n++)
                x = fmaxf(x, fmaxf(s[n][e * 2], s[n][e * 2 + 1]));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
            x *= unit;
            x = x > r.max[e] + SLACK ? x : r.max[e];
            base[e] = x == -CUDART_INF_F ? 0 : x;
            factor[e] = power(r.max[e] - base[e]);
            r.max[e] = x;
            r.sum[e] *= factor[e];
        }
#pragma unroll
        for (uint32_t n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = power(fmaf(s[n][e], unit, -base[e / 2]));
                r.sum[e / 2] += s[n][e];
            }
    }

    /* Whether a tile of V has an infinity or NaN, which a weight of 0 wouldn't hide. */
    __device__ static bool has_nonfinite(uint32_t v)
    {
        bool nonfinite = false;
#pragma unroll 4
        for (uint32_t i = threadIdx.x; i < PLANE / 16; i += WORKERS) {
            uint32_t x[4];
            asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                         : "r"(v + i * 16));
            nonfinite |= any_not_finite<T>(x);
        }
        return named_any(TOGETHER, WORKERS, nonfinite);
    }

    /* Adds such a tile to the sums, by the instructions of a warp alone, and makes it 0, so that it
     * adds nothing more. */
    __device__ static void add_nonfinite(const gpu_call &c, const job &j, const rows_state &r,
                                         uint32_t first_row, uint32_t tile, const uint32_t (*p)[4],
                                         uint32_t v, float (*o)[4])
    {
        uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t t = 0; t < TOKENS / 16; t++)
#pragma unroll
            for (uint32_t d = 0; d < DIM / 16; d++) {
                uint32_t b[4];
                load_transposed(b, v + tile_rows::place(t * 16 + lane % 16, d * 2 + lane / 16));
                for (int e = 0; e < 2; e++)
                    plain::add_apart(c, j, r.l, first_row, tile + t * 16, p[t], p[t], b[e * 2],
                                     b[e * 2 + 1], o[d * 2 + e]);
            }
        named_sync(TOGETHER, WORKERS);
        loader<128, 8>::clear_rows(v, 0, PLANE / 128, threadIdx.x, WORKERS);
        fence_for_products();
        named_sync(TOGETHER, WORKERS);
    }

    /* One of the instructions for scores of the tile of K at `k`, where `a` is the group's rows of
     * q, or for the sums with the tile of V at `v`. */
    __device__ static void ask_for_scores(uint64_t a, uint64_t k, int d, float (*s)[4])
    {
        add_scores<T, TOKENS>(s, further(a, d / 4 * Q_SLAB + d % 4 * 32),
                              further(k, d / 4 * SLAB + d % 4 * 32), d > 0);
    }
    __device__ static void ask_for_sums(const uint32_t (*p)[4], uint64_t v, int t, float (*o)[4])
    {
#pragma unroll
        for (int d = 0; d < DIM; d += 128)
            add_sums < T,
                DIM<128 ? DIM : 128>(o + d / 8, p[t], further(v, d / 64 * SLAB + t * 2048));
    }
    __device__ static uint64_t keys_at(uint32_t k)
    {
        return matrix(k, 16, 1024);
    }
    __device__ static uint64_t values_at(uint32_t v)
    {
        return matrix(v, SLAB, 1024);
    }
    static const int SCORE_STEPS = DIM / 16, SUM_STEPS = (int)TOKENS / 16;

    /* What the two groups know of their work. */
    struct worker {
        uint32_t group, tiles, first_row; /* 0 or 1; in shared memory; of this warp's 16 */
        barriers *bars;
        uint32_t clear_from, clear_to; /* the tokens that every row of this group sees */
        bool varied;
        float unit; /* scores are scaled in the exponent, unless something happens to them before */

        __device__ bool is_clear(uint32_t tile) const /* nothing but scaling happens to scores */
        {
            return !varied && tile >= clear_from && tile + TOKENS <= clear_to;
        }
        __device__ uint32_t plane(uint32_t n, uint32_t v) const /* of tile n */
        {
            return tiles + place_of_tile(n, v) * PLANE;
        }
        __device__ void await(uint32_t n, uint32_t v) const
        {
            barrier_await(shared_address(&bars->there[place_of_tile(n, v)]),
                          turns_before(n, v) & 1);
        }
        __device__ void used(uint32_t n, uint32_t v) const
        {
            if (threadIdx.x % 32 == 0)
                barrier_arrive(shared_address(&bars->used[place_of_tile(n, v)]));
        }
    };

    /* Waits for V of tile n, and looks at it. Later, what was waited for is there for the products.
     */
    __device__ static void await_values(const gpu_call &c, const job &j, const worker &w,
                                        const rows_state &r, uint32_t n, uint32_t tile,
                                        const uint32_t (*p)[4], float (*o)[4])
    {
        w.await(n, 1);
        fence_for_products();
        if ((tile < j.clear_begin || tile + TOKENS > j.clear_end) && has_nonfinite(w.plane(n, 1)))
            add_nonfinite(c, j, r, w.first_row, tile, p, w.plane(n, 1), o);
    }

    /* What happens to scores before the softmax, beside scaling. */
    __device__ static void modify_scores(const gpu_call &c, const job &j, const worker &w,
                                         uint32_t tile, const rows_state &r, float (*s)[4])
    {
#pragma unroll
        for (uint32_t t = 0; t < TOKENS; t += PART)
            plain::apply_score_mods(c, j, r.l, w.first_row, tile + t, w.varied, s + t / 8);
    }

    /* Scores become weights. */
    __device__ static void softmax_and_scale(const gpu_call &c, const job &j, const worker &w,
                                             uint32_t tile, rows_state &r, float (*s)[4],
                                             uint32_t (*p)[4], float (*o)[4])
    {
        uint32_t rest[4];
        float factor[2];
        if (!w.is_clear(tile))
            modify_scores(c, j, w, tile, r, s);
        softmax_tile(s, w.unit, r, factor);
        if (__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) /* soon that becomes rare */
#pragma unroll
            for (int d = 0; d < DIM / 8; d++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    o[d][e] *= factor[e / 2];
#pragma unroll
        for (int t = 0; t < SUM_STEPS; t++)
            plain::weights_of(s, t, p[t], rest);
    }

    /* Tile n's scores, and the sums with tile n - 1, whose weights p are, and become tile n's. */
    __device__ static void work_on_tile(const gpu_call &c, const job &j, const worker &w,
                                        uint32_t n, uint32_t tile, uint64_t a, rows_state &r,
                                        float (*s)[4], uint32_t (*p)[4], float (*o)[4])
    {
        w.await(n, 0);
        await_values(c, j, w, r, n - 1, tile - TOKENS, p, o);
        uint64_t k = keys_at(w.plane(n, 0)), v = values_at(w.plane(n - 1, 1));
        named_sync(TURN + w.group, WORKERS);
        pin<COLUMNS>(s);
        pin<DIM / 8>(o);
        products_begin();
#pragma unroll
        for (int i = 0; i < SCORE_STEPS * SUM_STEPS; i++) { /* the two in turn */
            if (i % SUM_STEPS == 0)
                ask_for_scores(a, k, i / SUM_STEPS, s);
            if (i % SCORE_STEPS == 0)
                ask_for_sums(p, v, i / SCORE_STEPS, o);
        }
        products_commit();
        named_arrive(TURN + (w.group ^ 1), WORKERS);
        products_await();
        pin<COLUMNS>(s);
        pin<DIM / 8>(o);
        w.used(n, 0);
        w.used(n - 1, 1);
        softmax_and_scale(c, j, w, tile, r, s, p, o);
    }

    __device__ static void work(const gpu_call &c, const job &j, uint32_t q, const worker &w,
                                rows_state &r, float (*o)[4])
    {
        uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            uint32_t row = j.first + min(w.first_row + lane / 4 + e * 8, j.rows - 1);
            r.l.position[e] = j.past + query_of(c, row);
            r.max[e] = -CUDART_INF_F;
            r.sum[e] = 0;
        }
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[d][e] = 0;
        walk way = walk_of(j);
        if (way.count == 0)
            return;
        uint64_t a = matrix(q + w.group * GROUP_ROWS * 128, 16, 1024);
        float s[COLUMNS][4];
        uint32_t p[SUM_STEPS][4], tile = way.first, last = way.count - 1;
        w.await(0, 0);
        fence_for_products();
        uint64_t k = keys_at(w.plane(0, 0));
        pin<COLUMNS>(s);
        products_begin();
#pragma unroll
        for (int d = 0; d < SCORE_STEPS; d++)
            ask_for_scores(a, k, d, s);
        products_commit();
        products_await();
        pin<COLUMNS>(s);
        w.used(0, 0);
        softmax_and_scale(c, j, w, tile, r, s, p, o);
        if (w.group == 1)
            named_arrive(TURN, WORKERS); /* the other is first */
#pragma unroll 1
        for (uint32_t n = 1; n < way.count; n++) {
            tile += TOKENS;
            work_on_tile(c, j, w, n, tile, a, r, s, p, o);
        }
        if (w.group == 0)
            named_sync(TURN, WORKERS); /* what the other arrived at last */
        await_values(c, j, w, r, last, tile, p, o);
        uint64_t v = values_at(w.plane(last, 1));
        pin<DIM / 8>(o);
        products_begin();
#pragma unroll
        for (int t = 0; t < SUM_STEPS; t++)
            ask_for_sums(p, v, t, o);
        products_commit();
        products_await();
        pin<DIM / 8>(o);
    }

    /* The two groups' part. */
    __device__ static void run_workers(const gpu_call &c, const job &j, unsigned char *q,
                                       unsigned char *tiles, barriers *bars, row_state *states)
    {
        uint32_t lane = threadIdx.x % 32;
        uint32_t group =
            __shfl_sync(~0u, threadIdx.x / 128, 0); /* uniform: the compiler can't know */
        load_q<T, slabs<ROWS>, PIECES, ROWS, WORKERS>(c, j, 1, q);
        fence_for_products();
        named_sync(TOGETHER, WORKERS);
        uint32_t low = j.past + query_of(c, j.first + min(group * GROUP_ROWS, j.rows - 1));
        uint32_t high = j.past + query_of(c, j.first + min((group + 1) * GROUP_ROWS, j.rows) - 1);
        worker w;
        w.group = group;
        w.tiles = shared_address(tiles);
        w.first_row = threadIdx.x / 32 * 16;
        w.bars = bars;
        w.clear_from = first_key(c, high);
        w.clear_to = low + 1;
        w.varied = c.cap_log2 > 0 || j.s.alibi != NULL || !(c.scale_log2 > 0);
        w.unit = w.varied ? 1 : c.scale_log2;
        rows_state r;
        float o[DIM / 8][4];
        work(c, j, shared_address(q), w, r, o);
        named_sync(TOGETHER, WORKERS); /* the tiles are used up */
        float *sums = (float *)tiles + w.first_row * SUM_PITCH;
        float *to = sums + lane / 4 * SUM_PITCH + lane % 4 * 2, factor[2];
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            float all = r.sum[e];
            all += __shfl_xor_sync(~0u, all, 1);
            all += __shfl_xor_sync(~0u, all, 2);
            uint32_t row = w.first_row + lane / 4 + e * 8;
            if (lane % 4 == 0)
                states[row] = row_state{r.max[e], all};
            factor[e] = 0;
            if (j.p.num_chunks == 1 && row < j.rows)
                factor[e] = finish_place(c, j.s, place_of(c, j, row), r.max[e], all);
#pragma unroll
            for (int d = 0; d < DIM / 8; d++)
                *(float2 *)(to + e * 8 * SUM_PITCH + d * 8) =
                    make_float2(o[d][e * 2], o[d][e * 2 + 1]);
        }
        if (j.p.num_chunks == 1)
            store_rows(c, j, w.first_row, factor, sums);
    }

    /* A warp's rows of the output: sums times the factor of lane / 4 and of 8 further. */
    __device__ static void store_rows(const gpu_call &c, const job &j, uint32_t first_row,
                                      const float *factor, const float *sums)
    {
        const uint32_t QUADS = DIM / 4, ABREAST = QUADS < 32 ? 32 / QUADS : 1;
        uint32_t lane = threadIdx.x % 32;
        __syncwarp();
#pragma unroll 4
        for (uint32_t i = 0; i < 16; i += ABREAST) {
            uint32_t row = i + lane / QUADS;
            float low = __shfl_sync(~0u, factor[0], row % 8 * 4);
            float high = __shfl_sync(~0u, factor[1], row % 8 * 4);
            float by = row < 8 ? low : high;
            if (first_row + row >= j.rows)
                continue;
            size_t at = place_of(c, j, first_row + row) * (size_t)c.head_dim;
            for (uint32_t d = lane % QUADS * 4; d < c.head_dim; d += 128) {
                float4 y = *(const float4 *)&sums[row * SUM_PITCH + d];
                float x[4] = {y.x * by, y.y * by, y.z * by, y.w * by};
                io_store_four<T>(c, j.s.out, at + d, x, false);
            }
        }
    }

    __device__ static void run(const gpu_call &c, unsigned char *shared)
    {
        __shared__ row_state states[1][ROWS], total[ROWS];
        __shared__ barriers bars;
        job j;
        find_job(c, blockIdx.x, ROWS, j);
        shared += (ALIGN - shared_address(shared) % ALIGN) % ALIGN;
        unsigned char *work_area = shared + Q_BYTES;
        uint32_t tiles = shared_address(work_area);
        if (threadIdx.x == 0) {
            for (uint32_t i = 0; i < STAGES; i++) {
                barrier_init(shared_address(&bars.there[i]), COPIERS);
                barrier_init(shared_address(&bars.used[i]), WORKERS / 32);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        if (c.head_dim < DIM) /* what lies behind shorter rows is to be 0 */
            for (uint32_t i = threadIdx.x; i < TILES_BYTES / 16; i += THREADS)
                *(uint4 *)(work_area + i * 16) = make_uint4(0, 0, 0, 0);
        __syncthreads();
        if (threadIdx.x >= WORKERS) {
            give_registers<40>();
            if (j.once)
                copy_tiles<true>(c, j, tiles, &bars);
            else
                copy_tiles<false>(c, j, tiles, &bars);
            return; /* the other threads' __syncthreads don't wait for threads that have ended */
        }
        take_registers<232>();
        run_workers(c, j, shared, work_area, &bars, states[0]);
        if (j.p.num_chunks > 1)
            finish<T, DIM, ROWS, 1>(c, j, WORKERS, states, (float *)work_area, SUM_PITCH,
                                    (float *)work_area, total);
    }

#endif
};

/* Built for other architectures too, where it does nothing and isn't launched (plan.cu). */
template <typename T, int DIM>
__global__ void __launch_bounds__(384, 1) attend_wgmma(const __grid_constant__ gpu_call c)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) unsigned char shared[];
    rows_kernel<T, DIM>::run(c, shared);
#endif
}

template <typename T, int DIM> ts_gpu_kernel kernel_dim()
{
    return ts_gpu_kernel{(const void *)attend_wgmma<T, DIM>, rows_kernel<T, DIM>::THREADS,
                         rows_kernel<T, DIM>::BYTES};
}

template <typename T> ts_gpu_kernel prefill(uint32_t head_dim)
{
    return head_dim <= 64    ? kernel_dim<T, 64>()
           : head_dim <= 128 ? kernel_dim<T, 128>()
                             : kernel_dim<T, 256>();
}

} // namespace wgmma

#endif
