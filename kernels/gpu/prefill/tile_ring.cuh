/*
 * Tiles of K and V on their way to the groups that multiply them (wgmma.cuh): where they lie in
 * shared memory, the barriers that say when, and who brings them there.
 *
 * Tiles lie in slabs of 64 dimensions, rows of 128 bytes, swizzled as the hardware's 128-byte mode
 * has it (PTX ISA, "Asynchronous warpgroup-level matrix instructions", matrix descriptors), in
 * rings of places for K and for V. `there` of a place tells that a tile is there, `used` that every
 * warp that multiplies has used it.
 *
 * Where blocks allow it four warps ask the copy engine for boxes of some tokens' rows, through a
 * map that the launch comes with (box_map.h); else 128 threads copy 16 bytes at a time.
 */
#ifndef TS_GPU_TILE_RING_CUH
#define TS_GPU_TILE_RING_CUH

#include "chunks.cuh"
#include "warp_group.cuh"

namespace wgmma
{

using namespace chunks;

/* FEW: for pieces that take one group's rows. */
template <typename T, int DIM, bool FEW = false> struct tile_ring {
    static const uint32_t TOKENS = DIM > 128 ? 64 : WGMMA_TOKENS; /* of a tile */
    static const uint32_t SLABS = DIM / 64, PIECES = DIM / 8;     /* PIECES: 16 bytes of a row */
    static const uint32_t PLANE = TOKENS * 128 * SLABS;           /* bytes */
    static const uint32_t K_STAGES = FEW ? 3 : 2, V_STAGES = DIM > 128 || scaled<T>::value ? 2 : 3,
                          STAGES = K_STAGES + V_STAGES;
    static const uint32_t BYTES = STAGES * PLANE;

    /* Threads that bring tiles: for an fp8 cache twice as many, where registers allow. */
    static const uint32_t COPIERS = scaled<T>::value && DIM > 64 ? 256 : 128;
    static const uint32_t EACH = TOKENS / (COPIERS / 32); /* tokens of a tile: a warp's part */

    /* Eight tokens' slabs lie one behind the other, then those of the next eight. */
    static const uint32_t ATOM = 8 * 128, EIGHT = ATOM * SLABS; /* bytes */

    /* Where a 16-byte piece of a token's row lies in a tile. */
    __device__ static uint32_t place(uint32_t token, uint32_t piece)
    {
        return token / 8 * EIGHT + piece / 8 * ATOM + token % 8 * 128 +
               (piece % 8 ^ (token & 7)) * 16;
    }
    /* The token whose row has 16-byte piece i of a tile. */
    __device__ static uint32_t token_at(uint32_t i)
    {
        return i / (EIGHT / 16) * 8 + i / 8 % 8;
    }

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

    /* Where the next tile of K or V, or the last one of V, lies: kept, since to find it from the
     * tile's number takes long. FIRST: of COUNT places. */
    template <uint32_t FIRST, uint32_t COUNT> struct tile_place {
        uint32_t there;  /* in shared memory: the barrier */
        uint32_t matrix; /* the low word of what a product is told */
        uint32_t parity; /* of the barrier's phase */

        /* The ring's first place. */
        __device__ void init(uint32_t tiles, uint32_t bars, uint32_t first_parity)
        {
            there = bars + FIRST * (uint32_t)sizeof(uint64_t);
            matrix = (tiles & 0x3ffff) >> 4;
            parity = first_parity;
        }
        __device__ void await() const
        {
            barrier_await(there, parity);
        }
        __device__ bool is_there() const
        {
            return barrier_is_past(there, parity);
        }
        __device__ uint32_t used() const /* the barrier */
        {
            return there + STAGES * (uint32_t)sizeof(uint64_t);
        }
        __device__ uint32_t tile() const /* in shared memory */
        {
            return (matrix & 0x3fff) << 4;
        }
        __device__ void advance(uint32_t bars)
        {
            const uint32_t BAR = sizeof(uint64_t), LAST = FIRST + COUNT - 1;
            bool wraps = there == bars + LAST * BAR;
            there += wraps ? 0 - (COUNT - 1) * BAR : BAR;
            matrix += wraps ? 0 - (COUNT - 1) * (PLANE / 16) : PLANE / 16;
            parity ^= wraps;
        }
    };
    typedef tile_place<0, K_STAGES> k_place;
    typedef tile_place<K_STAGES, V_STAGES> v_place;

    /* By one thread; bringers, users: how many arrive for each tile. */
    __device__ static void init(barriers *bars, uint32_t bringers, uint32_t users)
    {
        for (uint32_t i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&bars->there[i]), bringers);
            barrier_init(shared_address(&bars->used[i]), users);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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

    /* Waits for the place of tile n of K or V; returns it. */
    __device__ static uint32_t await_place(barriers *bars, uint32_t n, uint32_t v)
    {
        uint32_t place = place_of_tile(n, v);
        barrier_await(shared_address(&bars->used[place]), ~turns_before(n, v) & 1);
        return place;
    }

    /* Whether the block that has piece j stores the tile: it has the last row of the last token. */
    __device__ static bool is_stored(const gpu_call &c, const job &j, uint32_t tile)
    {
        return j.all_new && min(tile + TOKENS, j.s.kv_tokens) * c.group - 1 - j.first < j.rows;
    }

    /* ---- by boxes: two warps for K and two for V, whose lanes find a box each ---- */

    static const uint32_t FEEDERS = 2; /* warps for K, and for V */

    /* A warp's way through pieces' tiles of K or of V. Its part of a tile is the same tokens
     * always, of any sequence: nobody else writes to where it stores from, for who multiplies K may
     * have used a tile before it is stored. */
    struct box_feed {
        const wgmma_call &wc;
        const box_map &m;
        const CUtensorMap *map;
        uint32_t values;       /* 1: V */
        uint32_t warp;         /* of FEEDERS */
        uint32_t plane;        /* K's or V's in block 0, in the map */
        uint32_t boxes;        /* of a tile, this warp's */
        uint32_t place, there; /* in shared memory: where the next tile belongs; its barrier */
        uint32_t parity, last; /* of the barrier's phase; the last place's barrier */
        walk w;
        uint32_t unit;  /* of the piece's K or V in block 0, in the map */
        uint32_t block; /* of this lane's box of the next tile, or tiles: looked up early */
        /* FEW looks up BATCH tiles' boxes at once: lane l has box l % MOST of tile l / MOST. The
         * numbers of the blocks of the next BATCH are on their way meanwhile, in `block`. */
        static const uint32_t MOST = 4, BATCH = 32 / MOST;
        static_assert(!FEW || TOKENS / BOX_TOKENS_LEAST <= MOST * FEEDERS, "a lane for each box");
        uint32_t eights, units; /* of this lane's box of those that are asked for now */
        /* Of sequences that are all new: */
        uint32_t asked; /* the tile that `place` gets, until that is settled; or NONE */
        bool stores;    /* that tile */
        uint32_t landed, landed_parity; /* a barrier of this warp's: V is there that it stores */
        static const uint32_t NONE = ~0u;

        /* tiles: of this ring. number: of the group's warps. */
        __device__ box_feed(const wgmma_call &wc, uint32_t tiles, uint32_t bars, uint32_t landed,
                            uint32_t number)
            : wc(wc), m(wc.boxes), values(number % 2), warp(number / 2), boxes(0), parity(1),
              asked(NONE), stores(false), landed(landed + number / 2 * (uint32_t)sizeof(uint64_t)),
              landed_parity(0)
        {
            const uint32_t BAR = sizeof(uint64_t);
            const box_blocks *among = blocks_of_boxes(wc);
            map = &among->map;
            plane = values * m.plane_units - among->first_units;
            if (m.tokens > 0)
                boxes = (TOKENS / m.tokens + FEEDERS - 1 - warp) / FEEDERS;
            place = tiles + values * K_STAGES * PLANE;
            there = bars + values * K_STAGES * BAR;
            last = there + (places() - 1) * BAR;
        }
        __device__ uint32_t places() const
        {
            return values ? V_STAGES : K_STAGES;
        }
        __device__ void advance()
        {
            const uint32_t BAR = sizeof(uint64_t);
            bool wraps = there == last;
            there += wraps ? 0 - (places() - 1) * BAR : BAR;
            place += wraps ? 0 - (places() - 1) * PLANE : PLANE;
            parity ^= wraps;
        }
        /* Waits until nobody uses the tile any more that was in the next one's place. */
        __device__ void await_used() const
        {
            barrier_await(there + STAGES * (uint32_t)sizeof(uint64_t), parity);
        }

        /* Of a tile: this warp's tokens, one behind the other. */
        __device__ uint32_t own_tokens() const
        {
            return boxes * m.tokens;
        }
        __device__ uint32_t token_of(uint32_t tile) const /* this lane's box's first */
        {
            return tile + warp * own_tokens() + threadIdx.x % 32 * m.tokens;
        }
        __device__ uint32_t block_of(const gpu_call &c, const job &j, uint32_t tile) const
        {
            uint32_t t = token_of(tile);
            return t < min(tile + TOKENS, j.end) ? j.s.blocks[divide(t, c.block_tokens)] : 0;
        }

        /* Asks for a tile: the lanes from `lane` on know where its boxes lie. */
        __device__ void ask(uint32_t eight, uint32_t unit, bool once, uint32_t lane = 0)
        {
            uint32_t bytes = m.tokens / 8 * EIGHT, to = place + warp * boxes * bytes;
            await_used();
            if (is_elected())
                barrier_expect(there, boxes * bytes);
#pragma unroll 1
            for (uint32_t i = 0; i < boxes; i++, to += bytes) {
                uint32_t e = __shfl_sync(~0u, eight, lane + i);
                uint32_t u = __shfl_sync(~0u, unit, lane + i);
                if (is_elected())
                    copy_box(to, map, e, u, there, once);
            }
            advance();
        }

        /* FEW: the first token of this lane's box of BATCH tiles, from that tile on. */
        __device__ uint32_t batch_token(uint32_t tile) const
        {
            const uint32_t lane = threadIdx.x % 32;
            return tile + lane / MOST * TOKENS + warp * own_tokens() + lane % MOST * m.tokens;
        }
        __device__ void look_up_batch(const gpu_call &c, const job &j, uint32_t tile)
        {
            const uint32_t t = batch_token(tile);
            const bool wanted = threadIdx.x % MOST < boxes && t < j.end;
            block = wanted ? j.s.blocks[divide(t, c.block_tokens)] : 0;
        }
        /* Where those boxes lie; the next ones are looked up. */
        __device__ void take_batch(const gpu_call &c, const job &j, uint32_t tile)
        {
            const uint32_t t = batch_token(tile);
            const uint32_t token = t - divide(t, c.block_tokens) * c.block_tokens.d;
            eights = (t < j.end ? token : c.block_tokens.d) / 8;
            units = block * m.block_units + unit;
            look_up_batch(c, j, tile + BATCH * TOKENS);
        }

        /* A piece begins. */
        __device__ void begin(const gpu_call &c, const job &j)
        {
            w = walk_of(j);
            unit = j.s.layer * 2 * m.plane_units + j.kv_head * m.head_units + plane;
            if (FEW)
                look_up_batch(c, j, w.first);
            else
                block = block_of(c, j, w.first);
        }
        /* Its tiles from n to before `to`, as their places become free. Behind the end boxes are
         * asked for that no block has, which are 0. */
        __device__ void ask_for(const gpu_call &c, const job &j, uint32_t n, uint32_t to)
        {
            if (FEW) {
#pragma unroll 1
                for (to = min(to, w.count); n < to; n++) {
                    if (n % BATCH == 0)
                        take_batch(c, j, w.first + n * TOKENS);
                    ask(eights, units, j.once, n % BATCH * MOST);
                }
                return;
            }
            if (j.all_new) {
                ask_for_rows(c, j, n, to);
                return;
            }
#pragma unroll 1
            for (to = min(to, w.count); n < to; n++) {
                uint32_t tile = w.first + n * TOKENS, t = token_of(tile), now = block;
                uint32_t token = t - divide(t, c.block_tokens) * c.block_tokens.d;
                block = block_of(c, j, tile + TOKENS);
                ask((t < j.end ? token : c.block_tokens.d) / 8, now * m.block_units + unit, j.once);
            }
        }

        /* The same of a sequence that is all new, by rows of the run's own k or v: all of a warp's
         * at once, or eights of them. Behind the end rows are asked for that the run doesn't have,
         * which are 0. */
        __device__ void ask_for_rows(const gpu_call &c, const job &j, uint32_t n, uint32_t to)
        {
#pragma unroll 1
            for (to = min(to, w.count); n < to; n++) {
                settle(c, j);
                asked = w.first + n * TOKENS;
                stores = is_stored(c, j, asked);
                uint32_t bar = values && stores ? landed : there, tokens = own_tokens();
                uint32_t t = asked + warp * tokens, row = j.p.first_row + t;
                uint32_t at = place + warp * tokens / 8 * EIGHT;
                await_used();
                if (is_elected()) {
                    barrier_expect(bar, tokens / 8 * EIGHT);
                    if (wc.wide && tokens > 0 && t + tokens <= j.end)
                        copy_rows_at(at, &wc.many[values], row, j.kv_head * SLABS, bar);
                    else
#pragma unroll 1
                        for (uint32_t e = 0; e < tokens; e += 8, at += EIGHT)
                            copy_eight(at, &wc.eight[values], t + e < j.end ? row + e : 0 - 8u,
                                       j.kv_head, bar);
                }
                __syncwarp();
            }
        }

        /* Stores the tile that was asked for last, if this block does that, and goes on to the next
         * place. V is told to be there when that has been read, for who multiplies may write to it
         * (wgmma_tiles.cuh: has_nonfinite). */
        __device__ void settle(const gpu_call &c, const job &j)
        {
            if (FEW || asked == NONE)
                return;
            if (stores) {
                if (values)
                    barrier_await(landed, landed_parity);
                else
                    barrier_await(there, parity ^ 1);
                store(c, j);
                if (values) {
                    landed_parity ^= 1;
                    fence_for_products();
                    if (threadIdx.x % 32 == 0)
                        barrier_arrive(there);
                }
            }
            asked = NONE;
            advance();
        }

        /* Whole boxes by the copy engine, and of one that the sequence's end lies in its rows. */
        __device__ void store(const gpu_call &c, const job &j)
        {
            const uint32_t end = j.s.kv_tokens, lane = threadIdx.x % 32;
            const uint32_t bytes = m.tokens / 8 * EIGHT;
            uint32_t from = place + warp * boxes * bytes;
            uint32_t t = token_of(asked);
            uint32_t entry = divide(t, c.block_tokens), in_block = t - entry * c.block_tokens.d;
            uint32_t its = t < min(asked + TOKENS, end) ? j.s.blocks[entry] : 0;
#pragma unroll 1
            for (uint32_t i = 0; i < boxes; i++, from += bytes) {
                uint32_t b = __shfl_sync(~0u, its, i), token = __shfl_sync(~0u, t, i);
                uint32_t first = __shfl_sync(~0u, in_block, i);
                if (token + m.tokens <= end) {
                    if (lane == 0)
                        store_box(map, first / 8, b * m.block_units + unit, from);
                    continue;
                }
                unsigned char *to = c.base + b * c.block_bytes + first * c.token_stride +
                                    (j.s.layer * 2 + values) * c.plane_bytes +
                                    j.kv_head * c.head_stride;
#pragma unroll 1
                for (uint32_t n = lane; token + n / PIECES < end; n += 32) {
                    uint32_t x[4], row = n / PIECES, piece = n % PIECES;
                    load_16_bytes(x, from + tile_ring::place(row, piece), true);
                    if (piece * 8 < c.head_dim)
                        *(uint4 *)(to + row * c.token_stride + piece * 16) =
                            make_uint4(x[0], x[1], x[2], x[3]);
                }
            }
            if (lane == 0)
                await_boxes_read();
            __syncwarp();
        }
    };

    /* ---- by 16 bytes: COPIERS threads ---- */

    /* Where the row of this lane's token of a tile starts behind `base`. */
    __device__ static size_t look_up(const gpu_call &c, const job &j, uint32_t tile)
    {
        uint32_t t = tile + threadIdx.x % COPIERS / 32 * EACH + threadIdx.x % 32 % EACH;
        t = min(t, j.end - 1); /* the last again */
        uint32_t entry = divide(t, c.block_tokens);
        return j.s.blocks[entry] * c.block_bytes + (t - entry * c.block_tokens.d) * c.token_stride;
    }

    /* Copies this warp's rows; what lies past the end, of no sequence's, is made 0. */
    __device__ static void copy_rows(const gpu_call &c, const unsigned char *base, size_t row,
                                     uint32_t to, uint32_t wanted, bool once)
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
                cache_hints::copy_async(to + place(token, piece), from, token < wanted ? 16 : 0,
                                        once);
        }
    }

    /* Says that tile n of K or V is there, when this thread's copies are all there but for those of
     * the LATER groups. */
    template <int LATER> __device__ static void arrive_there(uint32_t n, uint32_t v, barriers *bars)
    {
        await_copies<LATER>();
        fence_for_products();
        barrier_arrive(shared_address(&bars->there[place_of_tile(n, v)]));
    }

    __device__ static void copy_tile(const gpu_call &c, const job &j, const unsigned char *base,
                                     size_t row, uint32_t n, uint32_t v, uint32_t wanted,
                                     uint32_t tiles, barriers *bars)
    {
        uint32_t place = await_place(bars, n, v);
        copy_rows(c, base + v * c.plane_bytes, row, tiles + place * PLANE, wanted, j.once);
        commit_copies();
    }

    /* Each tile is said to be there after the next one was asked for. */
    __device__ static void copy_tiles(const gpu_call &c, const job &j, uint32_t base,
                                      uint32_t tiles, barriers *bars)
    {
        walk w = walk_of(j);
        if (w.count == 0)
            return;
        const unsigned char *k = c.base + j.s.layer * 2 * c.plane_bytes + j.kv_head * c.head_stride;
        size_t row = look_up(c, j, w.first), next = row;
        copy_tile(c, j, k, row, base, 0, j.end - w.first, tiles, bars);
#pragma unroll 1
        for (uint32_t n = 0; n < w.count; n++, row = next) { /* in the order of their use */
            if (n + 1 < w.count) {
                next = look_up(c, j, w.first + (n + 1) * TOKENS);
                copy_tile(c, j, k, next, base + n + 1, 0, j.end - w.first - (n + 1) * TOKENS, tiles,
                          bars);
                if (n == 0)
                    arrive_there<1>(base, 0, bars);
                else
                    arrive_there<1>(base + n - 1, 1, bars);
            }
            copy_tile(c, j, k, row, base + n, 1, j.end - w.first - n * TOKENS, tiles, bars);
            if (n + 1 < w.count)
                arrive_there<1>(base + n + 1, 0, bars);
        }
        if (w.count == 1)
            arrive_there<1>(base, 0, bars);
        else
            arrive_there<1>(base + w.count - 2, 1, bars);
        arrive_there<0>(base + w.count - 1, 1, bars);
    }

#endif
};

} // namespace wgmma

#endif
