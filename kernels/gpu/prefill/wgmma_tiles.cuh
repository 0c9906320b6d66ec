/*
 * What the groups of wgmma.cuh that multiply do with the tiles of one piece of work: scores,
 * weights, sums. Elements of a product lie as mma's do: of a group's 64 rows, warp w has 16 w to
 * 16 w + 15. Weights are rounded to the type that tiles are multiplied in, as mma's are: the
 * cache's, or fp16 beside fp8.
 *
 * A group asks for a tile's scores and for the weighted sum of the tile before, waits for the
 * scores alone, and has its softmax while the sum is under way. Groups take turns at asking.
 */
#ifndef TS_GPU_WGMMA_TILES_CUH
#define TS_GPU_WGMMA_TILES_CUH

#include "mma.cuh"
#include "tile_ring.cuh"

namespace wgmma
{

using namespace chunks;
using namespace tensor;

/* VARIED: scores may be capped or sloped. That takes so many instructions that they would crowd out
 * the others where a processor keeps them. */
template <typename T, int DIM, bool VARIED, bool FEW> struct tile_work {
    typedef typename multiplied<T>::type M; /* of the tiles' elements, and of weights */
    typedef tile_ring<T, DIM, FEW> ring;
    static const uint32_t GROUPS = FEW ? 1 : DIM <= 64 ? 3 : 2; /* wgmma_rows' */
    static const uint32_t GROUP_ROWS = 64, ROWS = GROUPS * GROUP_ROWS;
    static const uint32_t WORKERS = GROUPS * 128; /* threads */
    static const uint32_t TOKENS = ring::TOKENS, PLANE = ring::PLANE;
    static const uint32_t COLUMNS = TOKENS / 8, PIECES = ring::PIECES;
    static const uint32_t Q_SLAB = ROWS * 128; /* bytes */
    /* Named barriers; 0 is __syncthreads'. */
    static const uint32_t TOGETHER = 1, TURN = 2,
                          OWN = TURN + GROUPS; /* TURN + g and OWN + g are group g's */
    static const uint32_t TURN_THREADS = 256;  /* who gives a turn, and who gets it */
    static const bool TURNS = GROUPS > 1;      /* one group alone has no need of any */
    /* A piece's first tile has code of its own, without the product that there is nothing for. With
     * three groups there are no registers for it. */
    static const bool FIRST_APART = GROUPS < 3;
    /* A group that has none of a piece's rows multiplies nothing, where who widens the tiles is
     * waited for. Elsewhere copies are, and the code for it costs more than it spares. */
    static const bool SKIPS = scaled<T>::value;

    typedef mma::rows_kernel<T, DIM, 4, 1, 2, false> plain; /* has what a warp does by itself */
    static const uint32_t PART = plain::ABREAST;            /* tokens that it works on at once */

    struct q_rows {
        __device__ static uint32_t place(uint32_t row, uint32_t piece)
        {
            return piece / 8 * Q_SLAB + row * 128 + (piece % 8 ^ (row & 7)) * 16;
        }
    };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

    typedef typename ring::barriers barriers;

    struct rows_state {
        typename plain::lane_rows l;
        float max[2], base[2], sum[2]; /* base: what scores are measured from; finite */
    };

    /* The highest of this lane's scores in each of its rows. */
    __device__ static void find_highest(const float (*s)[4], float unit, float *x)
    {
        const uint32_t CHAINS = 4; /* each waits for itself alone */
        float y[CHAINS][2];
#pragma unroll
        for (uint32_t n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float pair = fmaxf(s[n][e * 2], s[n][e * 2 + 1]);
                y[n % CHAINS][e] = n < CHAINS ? pair : fmaxf(y[n % CHAINS][e], pair);
            }
#pragma unroll
        for (int e = 0; e < 2; e++)
            x[e] = fmaxf(fmaxf(y[0][e], y[1][e]), fmaxf(y[2][e], y[3][e])) * unit;
    }

    /* Scores are measured from a row's highest one from now on, where it is so much higher than
     * that of the tiles before. x: this lane's highest. `factor` becomes what the sums so far are
     * to be multiplied by. */
    __device__ static void raise_base(float *x, rows_state &r, float *factor)
    {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2)
#pragma unroll
            for (int e = 0; e < 2; e++)
                x[e] = fmaxf(x[e], __shfl_xor_sync(~0u, x[e], lanes));
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float higher = x[e] > r.max[e] + SLACK ? x[e] : r.max[e];
            r.base[e] = higher == -CUDART_INF_F ? 0 : higher;
            factor[e] = power(r.max[e] - r.base[e]);
            r.max[e] = higher;
            r.sum[e] *= factor[e];
        }
    }

    /* Scores of columns FROM to TO become weights. */
    template <uint32_t FROM, uint32_t TO>
    __device__ static void weigh(float (*s)[4], float unit, rows_state &r)
    {
#pragma unroll
        for (uint32_t n = FROM; n < TO; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = power(fmaf(s[n][e], unit, -r.base[e / 2]));
                r.sum[e / 2] += s[n][e];
            }
    }

    __device__ static uint64_t keys_at(uint32_t k)
    {
        return matrix(k, 16, ring::EIGHT);
    }
    __device__ static uint64_t values_at(uint32_t v)
    {
        return matrix(v, ring::ATOM, ring::EIGHT);
    }

    /* What these groups know of their work. */
    struct worker {
        uint32_t group, first_row; /* of GROUPS; of this warp's 16 */
        uint32_t bars, q_used;     /* in shared memory: barriers */
        typename ring::k_place k;  /* of the next tile */
        typename ring::v_place v;  /* tile n - 1's until tile n's products are asked for */
        uint32_t says; /* the tile after whose scores q is used up; ~0: store_apart says it */
        bool ready;    /* the next tile of K and the last one of V are there */
        bool varied;
        float unit; /* scores are scaled in the exponent, unless something happens to them before */

        __device__ void init(uint32_t tiles)
        {
            const uint32_t BAR = sizeof(uint64_t), LAST = ring::STAGES - 1;
            k = {bars, (uint32_t)keys_at(tiles), 0};
            v = {bars + LAST * BAR, (uint32_t)values_at(tiles + LAST * PLANE), 1};
        }
        __device__ void used_q() const
        {
            arrive(q_used);
        }
        __device__ static void arrive(uint32_t barrier)
        {
            if (threadIdx.x % 32 == 0)
                barrier_arrive(barrier);
        }
    };

    /* Says whether the tokens of a tile of V that some row doesn't see have an infinity or NaN: a
     * weight of 0 wouldn't hide either. What a box brought of its block from behind the end, which
     * is of no sequence's, becomes 0. All groups do this, and find the same; where they write, none
     * goes on before all have written. */
    __device__ static bool has_nonfinite(const job &j, const worker &w, uint32_t tile, uint32_t v)
    {
        const uint32_t ROW = ring::EIGHT / 16; /* of eight tokens: 16-byte pieces */
        const uint32_t ABREAST = 4;
        const uint32_t end = j.end, seen_from = j.clear_begin, seen_to = j.clear_end;
        uint32_t nonfinite[ABREAST] = {}; /* not 0: there is one */
        uint32_t from = tile < seen_from || seen_to <= tile ? 0 : seen_to - tile;
        /* Boxes have a power of 2 of tokens. */
        uint32_t to = min(TOKENS, (end - tile + j.box_tokens - 1) & (0 - j.box_tokens));
        to = (to + 7) / 8; /* eights of tokens */
        bool clears = tile + to * 8 > end;
#pragma unroll 1
        for (uint32_t i = from / 8 * ROW + threadIdx.x % 128; i < to * ROW; i += 128 * ABREAST) {
            uint32_t x[ABREAST][4];
#pragma unroll
            for (uint32_t a = 0; a < ABREAST; a++) {
                uint32_t at = i + a * 128, token = tile + ring::token_at(at);
                bool seen = token >= seen_from && token < seen_to;
                load_16_bytes(x[a], v + at * 16, at < to * ROW && token < end && !seen);
            }
#pragma unroll
            for (uint32_t a = 0; a < ABREAST; a++) {
                uint32_t at = i + a * 128;
#pragma unroll
                for (int n = 0; n < 4; n++)
                    nonfinite[a] = add_times_zero<M>(x[a][n], nonfinite[a]);
                if (at < to * ROW && tile + ring::token_at(at) >= end)
                    clear_16_bytes(v + at * 16);
            }
        }
        const uint32_t all = nonfinite[0] | nonfinite[1] | nonfinite[2] | nonfinite[3];
        const bool any = (all & 0x7fff7fffu) != 0;
        if (clears)
            fence_for_products();
        return clears ? named_any(TOGETHER, WORKERS, any) : named_any(OWN + w.group, 128, any);
    }

    /* Adds such a tile to the sums, by the instructions of a warp alone, and makes it 0, so that it
     * adds nothing more. Weights and sums are in memory here: this is rare, and is to be short. */
    __device__ static void add_nonfinite(const gpu_call &c, const job &j, const rows_state &r,
                                         uint32_t first_row, uint32_t tile, const uint32_t (*p)[4],
                                         uint32_t v, float (*o)[4])
    {
        uint32_t lane = threadIdx.x % 32, weights[SUM_STEPS][4];
        float sums[DIM / 8][4];
#pragma unroll
        for (int i = 0; i < SUM_STEPS * 4; i++)
            weights[i / 4][i % 4] = p[i / 4][i % 4];
#pragma unroll
        for (int i = 0; i < DIM / 2; i++)
            sums[i / 4][i % 4] = o[i / 4][i % 4];
#pragma unroll 1
        for (uint32_t i = 0; i < TOKENS / 16 * (DIM / 16); i++) {
            uint32_t t = i / (DIM / 16), d = i % (DIM / 16), b[4];
            load_transposed(b, v + ring::place(t * 16 + lane % 16, d * 2 + lane / 16));
#pragma unroll 1
            for (uint32_t e = 0; e < 2; e++)
                plain::add_apart(c, j, r.l, first_row, tile + t * 16, weights[t], weights[t],
                                 e == 0 ? b[0] : b[2], e == 0 ? b[1] : b[3], sums[d * 2 + e]);
        }
#pragma unroll
        for (int i = 0; i < DIM / 2; i++)
            o[i / 4][i % 4] = sums[i / 4][i % 4];
        named_sync(TOGETHER, WORKERS);
        for (uint32_t i = threadIdx.x; i < PLANE / 16; i += WORKERS)
            clear_16_bytes(v + i * 16);
        fence_for_products();
        named_sync(TOGETHER, WORKERS);
    }

    /* After a tile's scores, before the sums with it. */
    __device__ static void mind_nonfinite(const gpu_call &c, const job &j, const worker &w,
                                          const rows_state &r, uint32_t tile,
                                          const uint32_t (*p)[4], float (*o)[4])
    {
        if (is_seen(j, tile))
            return;
        w.v.await(); /* a weight of 0 doesn't hide all there is of V */
        if (has_nonfinite(j, w, tile, w.v.tile()))
            add_nonfinite(c, j, r, w.first_row, tile, p, w.v.tile(), o);
    }

    /* One of the instructions for scores of the tile of K at `k`, where `a` is the group's rows of
     * q, or for the sums with the tile of V at `v`. */
    __device__ static void ask_for_scores(uint64_t a, uint64_t k, int d, float (*s)[4])
    {
        add_scores<M, TOKENS>(s, further(a, d / 4 * Q_SLAB + d % 4 * 32),
                              further(k, d / 4 * ring::ATOM + d % 4 * 32), d > 0);
    }
    __device__ static void ask_for_sums(const uint32_t (*p)[4], uint64_t v, int t, float (*o)[4])
    {
#pragma unroll
        for (int d = 0; d < DIM; d += 128)
            add_sums < M,
                DIM<128 ? DIM : 128>(o + d / 8, p[t],
                                     further(v, t * 2 * ring::EIGHT + d / 64 * ring::ATOM));
    }
    __device__ static uint64_t queries_at(uint32_t q)
    {
        return matrix(uniform(q), 16, 1024);
    }
    static const int SCORE_STEPS = DIM / 16, SUM_STEPS = (int)TOKENS / 16;

    __device__ static void hide_scores(const gpu_call &c, uint32_t tile, const rows_state &r,
                                       float (*s)[4])
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int first = (int)(tile + threadIdx.x % 4 * 2); /* this lane's token */
            int least = (int)first_key(c, r.l.position[e]) - first;
            int most = (int)r.l.position[e] - first;
#pragma unroll
            for (int i = 0; i < (int)COLUMNS * 2; i++) {
                const int t = i / 2 * 8 + i % 2;
                float &x = s[i / 2][e * 2 + i % 2];
                x = t > most || t < least ? -CUDART_INF_F : x;
            }
        }
    }

    /* Whether all rows of the block see all of the tile. */
    __device__ static bool is_seen(const job &j, uint32_t tile)
    {
        return tile >= j.clear_begin && tile + TOKENS <= j.clear_end;
    }

    /* What happens to a tile's scores before the softmax, beside scaling: HIDDEN, some row of the
     * block doesn't see all of it. */
    template <bool HIDDEN, bool FIRST>
    __device__ static void modify_scores(const gpu_call &c, const job &j, const worker &w,
                                         uint32_t tile, const rows_state &r, float (*s)[4])
    {
        if (VARIED)
#pragma unroll
            for (uint32_t t = 0; t < TOKENS; t += PART)
                plain::apply_score_mods(c, j, r.l, w.first_row, tile + t, w.varied, s + t / 8);
        else if (HIDDEN && !(FIRST && is_seen(j, tile))) /* nothing is under way if FIRST */
            hide_scores(c, tile, r, s);
    }

    /* Sums so far are multiplied by a factor; they are 0 before the first tile. */
    __device__ static void rescale_sums(const float *factor, bool first, float (*o)[4])
    {
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[d][e] = first ? 0 : o[d][e] * factor[e / 2];
    }

    /* Weights as the left side of the product with V. */
    __device__ static void round_weights(const float (*s)[4], uint32_t (*p)[4])
    {
        uint32_t rest[4];
#pragma unroll
        for (int t = 0; t < SUM_STEPS; t++)
            plain::weights_of(s, t, p[t], rest);
    }

    /* Tile n's scores, and the sums with tile n - 1, whose weights p are, and become tile n's.
     * FIRST: there is no tile before. Where !FIRST_APART, tile 0 is like others: weights and V are
     * what the piece before has left, and the sums are thrown away.
     *
     * Products are asked for and waited for where all of a group's warps come by: in what only some
     * of them do, as where the base is raised, neither may be done (PTX ISA, "wgmma.wait_group"). A
     * branch there that touches registers of products under way would make the compiler wait for
     * each of these, so sums are multiplied by their factor at the end. */
    template <bool HIDDEN, bool FIRST>
    __device__ static void next_tile(const gpu_call &c, const job &j, worker &w, uint32_t n,
                                     uint32_t tile, uint64_t a, rows_state &r, float (*s)[4],
                                     uint32_t (*p)[4], float (*o)[4])
    {
        const bool before = FIRST ? false : HIDDEN && !FIRST_APART ? n > 0 : true; /* a tile is */
        float highest[2], factor[2] = {1, 1};
        uint64_t k = with_high_word(uniform(w.k.matrix), keys_at(0));
        uint64_t v = with_high_word(uniform(w.v.matrix), values_at(0));
        if (!w.ready) {
            w.k.await();
            if (before)
                w.v.await();
        }
        if (TURNS)
            named_sync(TURN + w.group, TURN_THREADS);
        pin<COLUMNS>(s);
        if (!FIRST)
            pin<DIM / 8>(o);
        products_begin();
#pragma unroll
        for (int d = 0; d < SCORE_STEPS; d++)
            ask_for_scores(a, k, d, s);
        products_commit();
        if (!FIRST) {
#pragma unroll
            for (int t = 0; t < SUM_STEPS; t++)
                ask_for_sums(p, v, t, o);
            products_commit();
        }
        if (TURNS)
            named_arrive(TURN + (w.group + 1 < GROUPS ? w.group + 1 : 0), TURN_THREADS);
        uint32_t k_used = w.k.used(), v_used = w.v.used();
        w.k.advance(w.bars);
        w.v.advance(w.bars);
        products_await<VARIED || FIRST ? 0 : 1>();
        pin<COLUMNS>(s);
        w.arrive(k_used);
        if (n == w.says)
            w.used_q();
        modify_scores<HIDDEN, FIRST>(c, j, w, tile, r, s);
        find_highest(s, w.unit, highest);
        bool raised = highest[0] > r.max[0] + SLACK || highest[1] > r.max[1] + SLACK;
        const bool raises = FIRST || !before || __any_sync(~0u, raised); /* soon that is rare */
        if (raises)
            raise_base(highest, r, factor);
        weigh<0, COLUMNS / 2>(s, w.unit, r);
        finish_before(r.sum[0] + r.sum[1], w.bars);
        if (!FIRST) {
            products_await<0>();
            pin<DIM / 8>(o);
            if (before)
                w.arrive(v_used);
        }
        bool k_ready = w.k.is_there(),
             v_ready = w.v.is_there(); /* asked early: an answer takes long */
        weigh<COLUMNS / 2, COLUMNS>(s, w.unit, r);
        w.ready = k_ready && v_ready;
        round_weights(s, p);
        if (!FIRST && raises)
            rescale_sums(factor, !before, o);
    }

    /* A tile's way through a group that has none of the piece's rows: it does what others wait for.
     * It waits for tiles all the same: else what it says might count for the tile before in the
     * same place. K is said to be used before `mind_nonfinite`, which may wait for a tile that
     * needs K's place. What its own weights and sums are doesn't matter. */
    __device__ static void skip_tile(worker &w, uint32_t n)
    {
        w.k.await();
        if (n > 0)
            w.v.await();
        __syncwarp();
        named_sync(TURN + w.group, TURN_THREADS);
        named_arrive(TURN + (w.group + 1 < GROUPS ? w.group + 1 : 0), TURN_THREADS);
        w.arrive(w.k.used());
        if (n > 0)
            w.arrive(w.v.used());
        if (n == w.says)
            w.used_q();
        w.k.advance(w.bars);
        w.v.advance(w.bars);
    }

    /* Before the first piece: group 0 is the first to have a turn, and others' turns come from the
     * one before. What the last group gives at a piece's end is group 0's in the next. Nobody gives
     * a turn twice: who gives one has had one since, which all of the next group had passed. */
    __device__ static void begin_turns(const worker &w)
    {
        if (TURNS && w.group == GROUPS - 1)
            named_arrive(TURN, TURN_THREADS);
    }

    /* The last tile's sums, and meanwhile something without branches. */
    template <typename MEANWHILE>
    __device__ static void last_sums(const worker &w, const uint32_t (*p)[4], float (*o)[4],
                                     const MEANWHILE &meanwhile)
    {
        w.v.await();
        uint64_t v = with_high_word(uniform(w.v.matrix), values_at(0));
        pin<DIM / 8>(o);
        products_begin();
#pragma unroll
        for (int t = 0; t < SUM_STEPS; t++)
            ask_for_sums(p, v, t, o);
        products_commit();
        meanwhile();
        products_await<0>();
        pin<DIM / 8>(o);
        w.arrive(w.v.used());
    }

    /* The piece's tiles. meanwhile: done when all weights have been found. */
    template <typename MEANWHILE>
    __device__ static void work(const gpu_call &c, const job &j, uint32_t q, worker &w,
                                rows_state &r, float (*o)[4], const MEANWHILE &meanwhile)
    {
        uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            uint32_t row = j.first + min(w.first_row + lane / 4 + e * 8, j.rows - 1);
            r.l.position[e] = j.past + query_of<true>(c, row);
            r.max[e] = -CUDART_INF_F;
            r.base[e] = r.sum[e] = 0;
        }
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[d][e] = 0;
        typename ring::walk way = ring::walk_of(j);
        uint32_t first = way.first, count = uniform(way.count);
        if (count == 0) {
            meanwhile();
            return;
        }
        uint64_t a = queries_at(q + w.group * GROUP_ROWS * 128);
        float s[COLUMNS][4];
        uint32_t p[SUM_STEPS][4];
        /* Tiles `from` to `to` - 1: every row of the block sees all of them. */
        uint32_t from = first >= j.clear_begin ? 0 : (j.clear_begin - first - 1) / TOKENS + 1;
        uint32_t to = j.clear_end <= first ? 0 : (j.clear_end - first) / TOKENS;
        from = uniform(max(from, 1));
        to = uniform(VARIED ? 0 : min(to, count));
        w.ready = false;
        const bool skips = SKIPS && uniform(w.group * GROUP_ROWS >= j.rows);
        if (skips)
            from = count;
        uint32_t n = 0;
#pragma unroll 1
        while (n < count) {
            uint32_t tile = first + n * TOKENS;
            if (skips)
                skip_tile(w, n);
            else if (FIRST_APART && n == 0)
                next_tile<true, true>(c, j, w, n, tile, a, r, s, p, o);
            else
                next_tile<true, false>(c, j, w, n, tile, a, r, s, p, o);
            mind_nonfinite(c, j, w, r, tile, p, o);
            n++;
            if (!VARIED && n >= from)
#pragma unroll 1
                for (; n < to; n++)
                    next_tile<false, false>(c, j, w, n, first + n * TOKENS, a, r, s, p, o);
        }
        if (!skips) {
            last_sums(w, p, o, meanwhile);
        } else {
            meanwhile();
            w.v.await();
            __syncwarp();
            w.arrive(w.v.used());
        }
    }

#endif
};

} // namespace wgmma

#endif
