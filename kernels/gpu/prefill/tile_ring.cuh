/*
 * Tiles of K and V on their way to the groups that multiply them (wgmma.cuh): where they lie in
 * shared memory, the barriers that say when, and who brings them there.
 *
 * Tiles lie in slabs of 64 dimensions, rows of 128 bytes, swizzled as the hardware's 128-byte mode
 * has it (PTX ISA, "Asynchronous warpgroup-level matrix instructions", matrix descriptors), in
 * rings of places for K and for V. `there` of a place tells that a tile is there, `used` that every
 * warp that multiplies has used it.
 *
 * Where blocks allow it one warp asks the copy engine for boxes of some tokens and 64 dimensions,
 * through a map that the launch comes with; else 128 threads copy 16 bytes at a time.
 */
#ifndef TS_GPU_TILE_RING_CUH
#define TS_GPU_TILE_RING_CUH

#include "box_map.cuh"
#include "chunks.cuh"
#include "warp_group.cuh"

namespace wgmma
{

using namespace chunks;

template <typename T, int DIM> struct tile_ring {
    static const uint32_t TOKENS = DIM > 128 ? 64 : WGMMA_TOKENS; /* of a tile */
    static const uint32_t SLABS = DIM / 64, PIECES = DIM / 8;     /* PIECES: 16 bytes of a row */
    static const uint32_t PLANE = TOKENS * 128 * SLABS;           /* bytes */
    static const uint32_t K_STAGES = 2, V_STAGES = DIM > 128 ? 2 : 3, STAGES = K_STAGES + V_STAGES;
    static const uint32_t BYTES = STAGES * PLANE;
    static const uint32_t COPIERS = 128; /* threads */

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

    /* By one thread; users: warps. */
    __device__ static void init(barriers *bars, bool by_boxes, uint32_t users)
    {
        for (uint32_t i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&bars->there[i]), by_boxes ? WARPS : COPIERS);
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

    /* ---- by boxes: a thread of each warp, which has every WARPS-th box of a tile ---- */

    static const uint32_t WARPS = COPIERS / 32;

    /* Where this warp's boxes of a tile lie: tokens' eights of a block, and K's place. Behind the
     * end those are asked for that no block has, which are 0. */
    static const int MOST = TOKENS / BOX_TOKENS_LEAST / WARPS;
    struct boxes {
        uint32_t count, eight[MOST], unit[MOST];
    };

    /* The blocks of this warp's boxes of a tile. */
    struct box_blocks {
        uint32_t id[MOST];
    };
    __device__ static void look_up_blocks(const gpu_call &c, const box_map &m, const job &j,
                                          uint32_t tile, box_blocks &b)
    {
        uint32_t warp = threadIdx.x % COPIERS / 32;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            uint32_t t = tile + (i * WARPS + warp) * m.tokens;
            b.id[i] = t < j.end ? j.s.blocks[divide(t, c.block_tokens)] : 0;
        }
    }

    __device__ static void find_boxes(const gpu_call &c, const box_map &m, const job &j,
                                      uint32_t tile, const box_blocks &blocks, boxes &b)
    {
        uint32_t warp = threadIdx.x % COPIERS / 32, all = TOKENS / m.tokens;
        b.count = all > warp ? (all - warp + WARPS - 1) / WARPS : 0;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            uint32_t t = tile + (i * WARPS + warp) * m.tokens;
            uint32_t token = t - divide(t, c.block_tokens) * c.block_tokens.d;
            b.unit[i] = blocks.id[i] * m.block_units + j.s.layer * 2 * m.plane_units +
                        j.kv_head * m.head_units;
            b.eight[i] = (t < j.end ? token : c.block_tokens.d) / 8;
        }
    }

    /* Asks for this warp's part of tile n of K or V. */
    __device__ static void ask_for_boxes(const box_map &m, const boxes &b, uint32_t n, uint32_t v,
                                         uint32_t tiles, bool once, barriers *bars)
    {
        uint32_t place = await_place(bars, n, v), there = shared_address(&bars->there[place]);
        uint32_t bytes = m.tokens / 8 * EIGHT, warp = threadIdx.x % COPIERS / 32;
        barrier_expect(there, b.count * bytes);
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if ((uint32_t)i < b.count)
                copy_box(tiles + place * PLANE + (i * WARPS + warp) * bytes, &m, b.eight[i],
                         b.unit[i] + v * m.plane_units, there, once);
    }

    /* A thread's way through a piece's tiles, in the order of their use. n counts tiles since the
     * block began: `base` came before this piece's. */
    struct box_feed {
        const box_map &m;
        walk w;
        uint32_t base, tiles;
        barriers *bars;
        bool once;
        boxes next;       /* the next tile's */
        box_blocks ahead; /* of the one behind it: looked up early */

        __device__ box_feed(const box_map &map, const job &j, uint32_t base, uint32_t tiles,
                            barriers *bars)
            : m(map), w(walk_of(j)), base(base), tiles(tiles), bars(bars), once(j.once)
        {
        }
        __device__ void begin(const gpu_call &c, const job &j)
        {
            if (w.count == 0)
                return;
            box_blocks now;
            look_up_blocks(c, m, j, w.first, now);
            look_up_blocks(c, m, j, w.first + TOKENS, ahead);
            find_boxes(c, m, j, w.first, now, next);
            ask_for_boxes(m, next, base, 0, tiles, once, bars);
        }
        __device__ void step(const gpu_call &c, const job &j, uint32_t n)
        {
            if (n >= w.count)
                return;
            boxes now = next;
            if (n + 1 < w.count) {
                find_boxes(c, m, j, w.first + (n + 1) * TOKENS, ahead, next);
                look_up_blocks(c, m, j, w.first + (n + 2) * TOKENS, ahead);
                ask_for_boxes(m, next, base + n + 1, 0, tiles, once, bars);
            }
            ask_for_boxes(m, now, base + n, 1, tiles, once, bars);
        }
    };

    /* ---- by 16 bytes: COPIERS threads ---- */

    static const uint32_t EACH = TOKENS / 4; /* tokens of a tile that a warp copies */

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
