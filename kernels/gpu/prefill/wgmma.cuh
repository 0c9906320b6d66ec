/*
 * Prefill on Hopper's warp-group products ("wgmma"), for 16-bit and 8-bit caches: what mma does, by
 * instructions that take both sides from shared memory, or the left one from registers, and are
 * waited for, not executed in turn.
 *
 * There is a block on each processor, of three groups of four warps, four where rows are short, or
 * two where a sequence has few rows (FEW). All but the last have 64 rows (query token x head of the
 * group) each and multiply (wgmma_tiles.cuh); the last brings tiles of K and V, each of which
 * serves all of them (tile_ring.cuh), and q. Blocks take one piece of work after the other, and the
 * last group is ahead of the others: when they end a piece, the next one's first tiles are there.
 * For an fp8 cache there are two such groups where rows are longer than 64, for they make fp16 of
 * all tiles (fp8_tiles.cuh).
 */
#ifndef TS_GPU_WGMMA_CUH
#define TS_GPU_WGMMA_CUH

#include "fp8_tiles.cuh"
#include "wgmma_ends.cuh"
#include "wgmma_tiles.cuh"

namespace wgmma
{

/* FEW: for pieces of at most 64 rows of a 16-bit cache, which is waited for. There is one group
 * that multiplies; a third place for K, and one for half of what chunks before have come to, in the
 * room that others' q would take; and registers for all. */
template <typename T, int DIM, bool VARIED, bool FEW> struct rows_kernel {
    typedef tile_work<T, DIM, VARIED, FEW> tiles_of;
    typedef typename tiles_of::ring ring;
    typedef typename tiles_of::q_rows q_rows;
    typedef piece_ends<T, DIM, VARIED, FEW> ends_of;
    typedef fp8_portions<DIM> portions; /* for an fp8 cache */
    static const uint32_t ROWS = tiles_of::ROWS, PIECES = ring::PIECES;
    static const uint32_t WORKERS = tiles_of::WORKERS, THREADS = WORKERS + ring::COPIERS;
    static const uint32_t Q_BYTES = tiles_of::Q_SLAB * ring::SLABS;
    static const uint32_t TOGETHER = tiles_of::TOGETHER, OWN = tiles_of::OWN;
    static const uint32_t SUM_PITCH = DIM + 4; /* floats */
    static const uint32_t SUM_BYTES = ROWS * SUM_PITCH * sizeof(float);
    /* Sums lie in the tiles' place, and begin in q's where that is too small. */
    static const uint32_t SUMS_IN_Q = SUM_BYTES > ring::BYTES ? SUM_BYTES - ring::BYTES : 0;
    static const uint32_t ALIGN = 1024; /* of what is swizzled */
    static const uint32_t PORTION_BYTES = scaled<T>::value ? portions::ALL_BYTES : 0;
    static const uint32_t BYTES = Q_BYTES + ring::BYTES + PORTION_BYTES + ends_of::BYTES + ALIGN;
    static_assert(ROWS * MMA_CHUNKS * sizeof(float) <= SUM_BYTES,
                  "a float for each row and chunk takes the sums' place");
    static const bool WIDENS = scaled<T>::value;
    /* All have 168 at first; 128, if they are four groups. Who widens needs more. */
    static const bool FOUR = THREADS > 384, THREE_MULTIPLY = tiles_of::GROUPS > 2;
    static const int COPIER_REGISTERS = THREE_MULTIPLY ? 32 : FOUR ? 48 : DIM > 128 ? 40 : 56;
    static const int WORKER_REGISTERS = THREE_MULTIPLY ? 160 : FOUR ? 208 : DIM > 128 ? 232 : 224;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

    typedef typename ring::barriers barriers;
    typedef typename tiles_of::worker worker;
    typedef typename tiles_of::rows_state rows_state;

    /* What the last group tells of a piece, in a ring: piece k lies at k % TOLD. */
    static const uint32_t TOLD = 3;
    struct told_piece {
        job j;
        bool there; /* else no piece is left */
    };
    struct pieces {
        told_piece piece[TOLD];
        uint64_t told[TOLD], done[TOLD]; /* barriers */
        uint64_t q_there, q_used;
        uint64_t landed[ring::FEEDERS]; /* for box_feed */
    };

    /* By one thread. */
    __device__ static void init(pieces *p)
    {
        for (uint32_t i = 0; i < TOLD; i++) {
            barrier_init(shared_address(&p->told[i]), 1);
            barrier_init(shared_address(&p->done[i]), THREADS / 32);
        }
        barrier_init(shared_address(&p->q_there), ring::COPIERS);
        barrier_init(shared_address(&p->q_used), WORKERS / 32);
        for (uint32_t i = 0; i < ring::FEEDERS; i++)
            barrier_init(shared_address(&p->landed[i]), 1);
    }

    /* The block's k-th piece, by one thread. The first is the block's own; others go to whoever
     * comes first. One of several chunks is told as that many, one after the other, which
     * `job.chunks` says. item: the last told piece's; chunk: its next chunk, 0 if it has none. */
    __device__ static void tell(const gpu_call &c, const wgmma_call &wc, pieces *p, uint32_t k,
                                uint32_t &item, uint32_t &chunk)
    {
        uint32_t *tickets = wc.tickets;
        if (chunk == 0)
            item = k == 0 ? blockIdx.x : gridDim.x + atomicAdd(tickets, 1);
        told_piece &to = p->piece[k % TOLD];
        if (k >= TOLD)
            barrier_await(shared_address(&p->done[k % TOLD]), ~(k / TOLD) & 1);
        to.there = item < items_of(c) * c.kv_heads;
        if (to.there) {
            const uint32_t items = items_of(c);
            const bool by_heads = !FEW && wc.by_heads;
            uint32_t index = by_heads ? item % items : item / c.kv_heads;
            const uint32_t kv_head = by_heads ? item / items : item % c.kv_heads;
            const gpu_run &run = run_of(c, &index);
            plan_piece piece = ((const plan_piece *)run.items)[index];
            piece.chunk += chunk;
            make_job<true>(c, run, piece, kv_head, ROWS, to.j);
            to.j.chunks = chunks_of(piece);
            to.j.all_new = wc.stores && to.j.past == 0 && to.j.p.num_chunks == to.j.chunks;
            to.j.box_tokens = to.j.all_new ? 8 : max(wc.boxes.tokens, 1);
            chunk = chunk + 1 < chunks_of(piece) ? chunk + 1 : 0;
        } else if (atomicAdd(tickets + 1, 1) == gridDim.x - 1) { /* nobody takes any more */
            tickets[0] = 0;
            tickets[1] = 0;
        }
        barrier_arrive(shared_address(&p->told[k % TOLD]));
    }

    /* The k-th piece, until `done`; NULL: there is none. */
    __device__ static const job *hear(pieces *p, uint32_t k)
    {
        barrier_await(shared_address(&p->told[k % TOLD]), k / TOLD & 1);
        return p->piece[k % TOLD].there ? &p->piece[k % TOLD].j : NULL;
    }
    __device__ static void done(pieces *p, uint32_t k)
    {
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            barrier_arrive(shared_address(&p->done[k % TOLD]));
    }

    /* q is copied by the last group as it is, or else read by those who multiply. */
    __device__ static bool copies_q(const gpu_call &c)
    {
        return c.io != TS_DTYPE_FP32 && c.rope.theta == 0;
    }

    /* By the last group's threads. */
    __device__ static void copy_q(const gpu_call &c, const job &j, uint32_t q)
    {
        /* What a copy might change, as far as the compiler knows, is read once. */
        const uint32_t first = j.first, rows = j.rows, group = c.group, heads = c.heads;
        const uint32_t head = j.kv_head * group;
        const uint16_t *from = (const uint16_t *)j.s.q;
#pragma unroll 4
        for (uint32_t i = threadIdx.x % ring::COPIERS; i < ROWS * PIECES; i += ring::COPIERS) {
            uint32_t row = i / PIECES, piece = i % PIECES;
            bool there = row < rows && piece * 8 < c.head_dim;
            uint32_t query = divide(first + row, c.groups);
            uint32_t place = query * heads + head + first + row - query * group; /* place_of */
            size_t at = there ? place * (size_t)c.head_dim + piece * 8 : 0;
            cache_hints::copy_async(q + q_rows::place(row, piece), from + at, there ? 16 : 0,
                                    false);
        }
    }
    /* Does so, and tells those who multiply; or tells them that they may read it. */
    __device__ static void bring_q(const gpu_call &c, const job &j, uint32_t q, pieces *p)
    {
        uint32_t there = shared_address(&p->q_there);
        if (copies_q(c)) {
            copy_q(c, j, q);
            barrier_arrive_copied(there);
        } else {
            barrier_arrive(there); /* the wait for `used` is over */
        }
    }
    /* Whether sums go through shared memory at the end, in the tiles' place and q's: other chunks
     * are to be merged with them, or the output is fp32. */
    __device__ static bool is_apart(const gpu_call &c, const job &j)
    {
        return j.p.num_chunks > j.chunks || c.io == TS_DTYPE_FP32;
    }

    /* The last group's part, for an fp8 cache: half of its warps widen K's tiles, half V's, and all
     * copy q. A thread of K's takes pieces when K's places are full. */
    template <bool BY_BOXES>
    __device__ static void run_wideners(const gpu_call &c, const wgmma_call &wc, uint32_t q,
                                        uint32_t tiles, barriers *bars, pieces *p, portions *come)
    {
        uint32_t item = 0, chunk = 0, used = shared_address(&p->q_used);
        bool tells = threadIdx.x == WORKERS, apart = false;
        fp8_widener<DIM, BY_BOXES> from(c, wc, tiles, tiles + ring::BYTES, bars, come,
                                        uniform((threadIdx.x - WORKERS) / 32));
        if (tells)
            tell(c, wc, p, 0, item, chunk);
        __syncwarp();
#pragma unroll 1
        for (uint32_t k = 0;; k++) {
            const job *told = hear(p, k);
            if (told == NULL)
                return;
            const job &j = *told;
            from.begin(j);
            if (apart) /* the piece before has its sums in the tiles' place and q's */
                barrier_await(used, (k - 1) & 1);
            /* Tiles behind q, which comes behind K's first one. */
            uint32_t last = uniform(ring::walk_of(j).count), n = 0;
            if (from.values == 0 && last > 0) {
                n = ~0u;
                last--;
            }
#pragma unroll 1
            for (;; n++) {
                if (n == 0) {
                    if (k > 0) /* a phase is awaited by its parity: nobody may be two behind */
                        barrier_await(used, (k - 1) & 1);
                    bring_q(c, j, q, p);
                    from.look_up(); /* anew, so that it needn't be kept in between */
                }
                if (n == min(1, last))
                    break;
                from.widen_tile();
            }
            if (tells)
                tell(c, wc, p, k + 1, item, chunk);
            __syncwarp();
            from.look_up(); /* likewise */
#pragma unroll 1
            for (; n < last; n++)
                from.widen_tile();
            apart = is_apart(c, j);
            done(p, k);
        }
    }

    /* The last group's part. Of its warps two ask for boxes of K and two for boxes of V; the last
     * one takes pieces; all copy q, and what doesn't come in boxes. */
    __device__ static void run_copiers(const gpu_call &c, const wgmma_call &wc, uint32_t q,
                                       uint32_t tiles, barriers *bars, pieces *p)
    {
        uint32_t base = 0, item = 0, chunk = 0;
        bool by_boxes = wc.boxes.tokens > 0, tells = threadIdx.x == THREADS - 32, apart = false;
        typename ring::box_feed feed(wc, tiles, shared_address(bars->there),
                                     shared_address(p->landed),
                                     uniform(threadIdx.x / 32 - WORKERS / 32));
        if (tells)
            tell(c, wc, p, 0, item, chunk);
        __syncwarp();
#pragma unroll 1
        for (uint32_t k = 0;; k++) {
            const job *told = hear(p, k);
            if (told == NULL) {
                await_boxes_stored();
                return;
            }
            const job &j = *told;
            uint32_t used = shared_address(&p->q_used), before = (k - 1) & 1;
            if (apart) /* the piece before has its sums in the tiles' place and q's */
                barrier_await(used, before);
            if (by_boxes)
                feed.begin(c, j);
#pragma unroll 1
            for (uint32_t n = 0; n < 2; n++) { /* the first tile before q, the others after it */
                if (by_boxes)
                    feed.ask_for(c, j, n, n == 0 ? 1 : ~0u);
                if (n > 0)
                    break;
                if (k > 0) /* a phase is awaited by its parity, so nobody may be two behind */
                    barrier_await(used, before);
                bring_q(c, j, q, p);
                if (tells)
                    tell(c, wc, p, k + 1, item, chunk);
                __syncwarp();
            }
            if (by_boxes)
                feed.settle(c, j);
            else
                ring::copy_tiles(c, j, base, tiles, bars);
            base += ring::walk_of(j).count;
            apart = is_apart(c, j);
            done(p, k);
        }
    }

    /* The output, or records, by way of the tiles' place, and q's. */
    __device__ static void store_apart(const gpu_call &c, const job &j, const worker &w,
                                       const rows_state &r, const float (*o)[4],
                                       unsigned char *tiles)
    {
        typedef row_state all_rows[ROWS];
        static_assert(2 * sizeof(all_rows) + SUMS_IN_Q <= Q_BYTES, "q's place");
        all_rows *states = (all_rows *)(tiles - Q_BYTES);
        row_state *total = states[1];
        float *sums = (float *)(tiles - SUMS_IN_Q);
        uint32_t lane = threadIdx.x % 32;
        named_sync(TOGETHER, WORKERS); /* the tiles and q are used up */
#pragma unroll
        for (uint32_t e = 0; e < 2; e++) {
            uint32_t row = w.first_row + lane / 4 + e * 8;
            if (lane % 4 == 0)
                states[0][row] = row_state{r.max[e], r.sum[e]};
#pragma unroll
            for (int d = 0; d < DIM / 8; d++)
                *(float2 *)(sums + row * SUM_PITCH + d * 8 + lane % 4 * 2) =
                    make_float2(o[d][e * 2], o[d][e * 2 + 1]);
        }
        finish<T, DIM, ROWS, 1, false, true>(c, j, WORKERS, states, sums, SUM_PITCH, sums, total);
        named_sync(TOGETHER, WORKERS);
        if (c.head_dim < DIM)
            clear_tiles(shared_address(tiles), WORKERS);
        fence_for_products();
        __syncwarp();
        w.used_q();
    }

    /* q's numbers become fp16 from bf16: each group does so with its own rows. */
    __device__ static void halve_q(uint32_t q)
    {
        const uint32_t ROW = PIECES, group = threadIdx.x / 128 * tiles_of::GROUP_ROWS;
        const uint32_t ABREAST = 4; /* loads under way */
        static_assert(tiles_of::GROUP_ROWS * PIECES % (128 * ABREAST) == 0, "whole rounds");
#pragma unroll 1
        for (uint32_t i = threadIdx.x % 128; i < tiles_of::GROUP_ROWS * ROW; i += 128 * ABREAST) {
            uint32_t at[ABREAST], x[ABREAST][4];
#pragma unroll
            for (uint32_t a = 0; a < ABREAST; a++) {
                uint32_t piece = i + a * 128;
                at[a] = q + q_rows::place(group + piece / ROW, piece % ROW);
                load_16_bytes(x[a], at[a], true);
            }
#pragma unroll
            for (uint32_t a = 0; a < ABREAST; a++)
                store_16_bytes(at[a], half_pair(x[a][0]), half_pair(x[a][1]), half_pair(x[a][2]),
                               half_pair(x[a][3]));
        }
    }

    /* Two bf16 numbers as fp16. */
    __device__ static uint32_t half_pair(uint32_t x)
    {
        return tensor::pack<__half>(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    }

    /* What lies behind shorter rows is to be 0; boxes make it so. */
    __device__ static void clear_tiles(uint32_t tiles, uint32_t threads)
    {
        for (uint32_t i = threadIdx.x; i < ring::BYTES / 16; i += threads)
            clear_16_bytes(tiles + i * 16);
    }

    /* The other groups' part. */
    __device__ static void run_workers(const gpu_call &c, const wgmma_call &wc, unsigned char *q,
                                       unsigned char *tiles, barriers *bars, pieces *p)
    {
        worker w;
        w.group = uniform(threadIdx.x / 128); /* the compiler can't know */
        w.first_row = threadIdx.x / 32 * 16;
        w.bars = keep(shared_address(bars->there));
        w.q_used = keep(shared_address(&p->q_used));
        w.init(shared_address(tiles));
        tiles_of::begin_turns(w);
#pragma unroll 1
        for (uint32_t k = 0;; k++) {
            const job *told = hear(p, k);
            if (told == NULL)
                return;
            const job &j = *told;
            barrier_await(shared_address(&p->q_there), k & 1);
            if (copies_q(c)) {
                if (WIDENS && c.io != TS_DTYPE_FP16)
                    halve_q(shared_address(q));
                fence_for_products();
                if (WIDENS) {
                    __syncwarp();
                    named_sync(OWN + w.group, 128);
                }
            } else {
                named_sync(TOGETHER, WORKERS); /* nobody uses the last piece's */
                load_q<T, q_rows, PIECES, ROWS, WORKERS, false>(c, j, 1, q);
                fence_for_products();
                named_sync(TOGETHER, WORKERS);
            }
            w.varied = IS_VARIED(c, j.s.alibi) || !(c.scale_log2 > 0);
            w.unit = w.varied ? 1 : score_scale<T>(c, j);
            rows_state r;
            float o[DIM / 8][4];
            bool apart = is_apart(c, j);
            uint32_t count = ring::walk_of(j).count;
            w.says = apart ? ~0u : count - 1;
            if (!apart && count == 0)
                w.used_q();
            typename ends_of::rows rows;
            typename ends_of::folds folds;
            tiles_of::work(c, j, shared_address(q), w, r, o, [&] {
                ends_of::find(c, j, w.first_row, r, apart, rows);
                ends_of::ask_for_folds(wc, j, w.first_row, folds);
            });
            if (j.chunks > 1 && w.first_row < j.rows)
                ends_of::fold_chunk(wc, j, r, o, folds, tiles + ring::BYTES);
            if (apart)
                store_apart(c, j, w, r, o, tiles);
            else if (j.chunk + 1 >= j.chunks)
                ends_of::store(c, j, w.first_row, r, rows, o);
            done(p, k);
        }
    }

    __device__ static void run(const gpu_call &c, const wgmma_call &wc, unsigned char *shared)
    {
        __shared__ barriers bars;
        __shared__ pieces p;
        shared += (ALIGN - shared_address(shared) % ALIGN) % ALIGN;
        unsigned char *tiles = shared + Q_BYTES;
        __shared__ portions come;
        if (threadIdx.x == 0) {
            init(&p);
            if (WIDENS)
                come.init();
            uint32_t bringers = WIDENS                ? portions::EACH
                                : wc.boxes.tokens > 0 ? ring::FEEDERS
                                                      : ring::COPIERS;
            ring::init(&bars, bringers, WORKERS / 32);
        }
        if (c.head_dim < DIM)
            clear_tiles(shared_address(tiles), THREADS);
        fence_for_products();
        __syncthreads();
        if (threadIdx.x >= WORKERS) {
            if (!FEW)
                give_registers<COPIER_REGISTERS>();
            const uint32_t q = shared_address(shared), at = shared_address(tiles);
            if constexpr (!WIDENS)
                run_copiers(c, wc, q, at, &bars, &p);
            else if (wc.boxes.tokens > 0)
                run_wideners<true>(c, wc, q, at, &bars, &p, &come);
            else
                run_wideners<false>(c, wc, q, at, &bars, &p, &come);
        } else {
            if (!FEW)
                take_registers<WORKER_REGISTERS>();
            run_workers(c, wc, shared, tiles, &bars, &p);
        }
    }

#endif
};

/* Built for other architectures too, where it does nothing and isn't launched (plan.cu). */
template <typename T, int DIM, bool VARIED, bool FEW>
__global__ void __launch_bounds__(rows_kernel<T, DIM, VARIED, FEW>::THREADS, 1)
    attend_wgmma(const __grid_constant__ gpu_call c, const __grid_constant__ wgmma_call wc)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) unsigned char shared[];
    rows_kernel<T, DIM, VARIED, FEW>::run(c, wc, shared);
#endif
}

template <typename T, int DIM, bool VARIED, bool FEW> ts_gpu_kernel kernel_dim()
{
    typedef rows_kernel<T, DIM, VARIED, FEW> kernel;
    return ts_gpu_kernel{(const void *)attend_wgmma<T, DIM, VARIED, FEW>, kernel::THREADS,
                         kernel::BYTES, 0};
}

template <typename T, bool VARIED> ts_gpu_kernel kernel_for(uint32_t head_dim)
{
    return head_dim <= 64    ? kernel_dim<T, 64, VARIED, false>()
           : head_dim <= 128 ? kernel_dim<T, 128, VARIED, false>()
                             : kernel_dim<T, 256, VARIED, false>();
}

template <typename T> ts_gpu_kernel prefill(uint32_t head_dim, wgmma_kind kind)
{
    if (kind == WGMMA_VARIED)
        return kernel_for<T, true>(head_dim);
    if (kind == WGMMA_MANY)
        return kernel_for<T, false>(head_dim);
    if constexpr (scaled<T>::value)
        return ts_gpu_kernel{};
    else
        return head_dim <= 64 || head_dim > 128 ? ts_gpu_kernel{}
                                                : kernel_dim<T, 128, false, true>();
}

} // namespace wgmma

#endif
