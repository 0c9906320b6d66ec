/*
 * An fp8 cache's tiles on their way to the groups that multiply them (wgmma.cuh). They come to a
 * place of their own; warps that do nothing else make fp16 of them, which has all that e4m3 has,
 * and store that where tile_ring.cuh has a 16-bit cache's tiles. So the products are an fp16
 * cache's.
 *
 * Half of the warps have K and half have V. Each has a part of every tile's tokens for itself, in
 * portions: it asks for one, widens it, and waits for no other warp. Where blocks allow it the copy
 * engine brings portions in boxes; else each thread copies what it widens.
 */
#ifndef TS_GPU_FP8_TILES_CUH
#define TS_GPU_FP8_TILES_CUH

#include "tensor.cuh"
#include "tile_ring.cuh"

namespace wgmma
{

/* What those warps share: their number, and the barriers of portions' places, of which there are
 * as many as shared memory has room for. */
template <int DIM> struct fp8_portions {
    typedef tile_ring<__nv_fp8_e4m3, DIM> ring;
    static const uint32_t WARPS = ring::COPIERS / 32, EACH = WARPS / 2; /* EACH: for K, and for V */
    static const uint32_t PARTS = DIM == 64 ? 2 : 1;   /* of a tile; a warp has a portion of each */
    static const uint32_t PART = ring::TOKENS / PARTS; /* tokens */
    static const uint32_t TOKENS = PART / EACH;        /* of a portion */
    static const uint32_t BYTES = TOKENS * DIM;        /* of a portion */
    static const uint32_t PLACES = DIM == 64 ? 4 : DIM > 128 ? 1 : 2; /* for a warp's portions */
    static const uint32_t ALL_BYTES = WARPS * PLACES * BYTES;

    /* For boxes: a barrier for each place. */
    uint64_t came[WARPS][PLACES];

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __device__ void init() /* by one thread */
    {
        for (uint32_t i = 0; i < WARPS * PLACES; i++)
            barrier_init(shared_address(&came[0][0] + i), 1);
    }
#endif
};

/* One of those warps, which brings K or V. BY_BOXES: its portions come in boxes. */
template <int DIM, bool BY_BOXES> struct fp8_widener {
    typedef tile_ring<__nv_fp8_e4m3, DIM> ring;
    typedef fp8_portions<DIM> portions;
    static const uint32_t SLABS = ring::SLABS, PLACES = portions::PLACES, PARTS = portions::PARTS;
    static const uint32_t TOKENS = portions::TOKENS, PORTION = portions::BYTES;
    static const uint32_t PIECES = PORTION / 512; /* a portion's 16 bytes that a lane has */
    static const uint32_t BOX = WGMMA_FP8_BOX, BOXES = TOKENS / BOX, BAR = sizeof(uint64_t);
    static const uint32_t ALIGNED = 1024; /* bytes: places, and the ring's tiles */
    static_assert(PORTION % ALIGNED == 0 && PIECES % 2 == 0 &&
                      8 * (DIM < 128 ? DIM : 128) <= ALIGNED,
                  "first_of");
    static_assert(TOKENS <= 32, "a lane for each");
    static_assert(ring::K_STAGES == 2 && ring::V_STAGES == 2, "stage");
    static_assert(PLACES == PARTS || PLACES == 2 * PARTS, "place_of");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

    const gpu_call &c;
    const box_map &m;
    const CUtensorMap *map;
    uint32_t first_units;  /* from block 0 to where the map begins */
    uint32_t values, warp; /* 1: V; of portions::EACH */
    uint32_t tiles;        /* in shared memory: where this lane's first piece belongs in the ring's
                              first tile of K or V */
    uint32_t there;        /* ... that tile's barrier */
    uint32_t places, came; /* ... this lane's first piece in the first place; its barrier */
    uint32_t count;        /* of tiles so far, all pieces' */
    /* Of the piece: */
    uint32_t next, end, unit;  /* the first token of what is asked for next; unit: of its K or V in
                                  block 0, in the map */
    const uint32_t *blocks;    /* its table */
    const unsigned char *rows; /* its K or V in block 0 */
    uint32_t block, in_block;  /* of this lane's token of `next`, and its place there */

    /* ring_tiles and what follows are in shared memory. number: of all these warps. */
    __device__ fp8_widener(const gpu_call &c, const wgmma_call &wc, uint32_t ring_tiles,
                           uint32_t all_places, const typename ring::barriers *bars,
                           const portions *p, uint32_t number)
        : c(c), m(wc.boxes), values(number / portions::EACH), warp(number % portions::EACH),
          count(0)
    {
        const box_blocks *among = blocks_of_boxes(wc);
        map = &among->map;
        first_units = among->first_units;
        there = shared_address(bars->there) + values * ring::K_STAGES * BAR;
        tiles = keep(ring_tiles + values * ring::K_STAGES * ring::PLANE +
                     (warp * PIECES + slab_of(0)) * ring::ATOM +
                     ring::place(threadIdx.x % 32 / 4, threadIdx.x % 4 * 2));
        places = keep(all_places + number * PLACES * PORTION + staged(0));
        came = shared_address(p->came[number]);
    }

    /* The next tile's place in the ring, and the places of its portions and their barriers' phase:
     * they follow from its number alone, which takes one register. */
    __device__ uint32_t stage() const
    {
        return count % 2;
    }
    __device__ uint32_t place_of(uint32_t part) const
    {
        return (PLACES > PARTS ? stage() * PARTS : 0) + part;
    }
    __device__ uint32_t came_parity() const
    {
        return PLACES > PARTS ? count / 2 % 2 : stage();
    }

    /* A piece begins: its first portions are asked for. */
    __device__ void begin(const job &j)
    {
        next = ring::walk_of(j).first + warp * TOKENS;
        end = j.end;
        blocks = j.s.blocks;
        unit = (j.s.layer * 2 + values) * m.plane_units + j.kv_head * m.head_units - first_units;
        rows = c.base + (j.s.layer * 2 + values) * c.plane_bytes + j.kv_head * c.head_stride;
        look_up();
#pragma unroll
        for (uint32_t i = 0; i < PLACES / PARTS; i++, count++)
#pragma unroll
            for (uint32_t part = 0; part < PARTS; part++)
                ask(place_of(part));
        count -= PLACES / PARTS;
    }

    /* Whether what is asked for next is of the piece. */
    __device__ bool is_wanted() const
    {
        return next / ring::TOKENS * ring::TOKENS < end;
    }

    /* Finds where this lane's token of the next portion is, or the piece's last one. For boxes it
     * is the first of a box; behind the end, of no block's. It isn't waited for. */
    __device__ void look_up()
    {
        uint32_t t = next + (BY_BOXES ? threadIdx.x % BOXES * BOX : threadIdx.x % TOKENS);
        uint32_t its = min(t, end - 1), entry = divide(its, c.block_tokens);
        in_block = its - entry * c.block_tokens.d;
        if (BY_BOXES && t >= end)
            in_block = c.block_tokens.d;
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n"
                     "@p ld.global.nc.u32 %0, [%1];\n}"
                     : "=r"(block)
                     : "l"(blocks + entry), "r"((uint32_t)is_wanted()));
    }

    /* The place that this lane's first piece is of: pieces before it are fewer than its alignment.
     */
    __device__ static uint32_t first_of(uint32_t place)
    {
        return place / ALIGNED * ALIGNED;
    }

    /* Asks for the next portion, if it is the piece's. */
    __device__ void ask(uint32_t place)
    {
        if (is_wanted()) {
            if (BY_BOXES)
                ask_for_boxes(places + place * PORTION, came + place * BAR);
            else
                copy_portion(places + place * PORTION);
            next += portions::PART;
            look_up();
        }
        if (!BY_BOXES)
            commit_copies(); /* any or not: the number of groups is what waits count */
    }

    __device__ void ask_for_boxes(uint32_t place, uint32_t bar)
    {
        uint32_t eight = in_block / 8, at = block * m.block_units + unit, e[BOXES], u[BOXES];
#pragma unroll
        for (uint32_t i = 0; i < BOXES; i++) {
            e[i] = BOXES > 1 ? __shfl_sync(~0u, eight, (int)i) : eight;
            u[i] = BOXES > 1 ? __shfl_sync(~0u, at, (int)i) : at;
        }
        if (is_elected()) {
            barrier_expect(bar, PORTION);
#pragma unroll
            for (uint32_t i = 0; i < BOXES; i++)
                copy_box(first_of(place) + i * BOX * DIM, map, e[i], u[i], bar, false);
        }
    }

    __device__ void copy_portion(uint32_t place)
    {
        uint32_t lane = threadIdx.x % 32;
        size_t its = block * c.block_bytes + in_block * c.token_stride;
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i++) {
            uint32_t row = i / SLABS * 8 + lane / 4, d = slab_of(i) * 64 + lane % 4 * 16;
            const unsigned char *piece = rows + __shfl_sync(~0u, its, (int)row) + d;
            cache_hints::copy_async(first_of(place) + staged(i), piece,
                                    next + row < end && d < c.head_dim ? 16 : 0, false);
        }
    }

    /* This lane's i-th piece of a portion is one of row lane / 4 of eight tokens. Which 64
     * dimensions it is of is such that no two lanes use the same banks at once, of the portion's or
     * of the ring's: odd rows have odd slabs where even rows have even ones. */
    __device__ static uint32_t slab_of(uint32_t i)
    {
        return i % SLABS ^ (SLABS > 1 ? threadIdx.x / 4 % 2 : 0);
    }
    static const uint32_t WIDE = DIM < 128 ? DIM : 128; /* bytes of a row that lie together */
    __device__ static uint32_t staged(uint32_t i)
    {
        uint32_t row = threadIdx.x % 32 / 4, slab = slab_of(i);
        return i / SLABS * 8 * DIM + slab / 2 * 8 * WIDE + row * WIDE + slab % 2 * 64 +
               threadIdx.x % 4 * 16;
    }

    /* This lane's i-th piece of a portion. place: of its first. */
    __device__ static uint32_t place_of_piece(uint32_t place, uint32_t i)
    {
        if (SLABS == 1)
            return place + i * 8 * DIM;
        return (i % 2 != 0 ? place ^ 64 : place) + /* as `staged` has it */
               i / SLABS * 8 * DIM + i % SLABS / 2 * 8 * WIDE;
    }
    __device__ static void load_piece(uint4 &x, uint32_t place, uint32_t i)
    {
        load_16_bytes((uint32_t *)&x, place_of_piece(place, i), true);
    }

    /* The next portion becomes fp16 in the ring, as the PART'th of its tile; then one is asked for
     * in its place. */
    template <uint32_t PART> __device__ void widen_portion()
    {
        const uint32_t from = places + place_of(PART) * PORTION, bar = there + stage() * BAR;
        uint4 x[2]; /* a third would be too many registers */
        if (BY_BOXES)
            barrier_await(came + place_of(PART) * BAR, came_parity());
        else
            await_copies<PLACES - 1>();
        load_piece(x[0], from, 0);
        load_piece(x[1], from, 1);
        if (PART == 0)
            barrier_await(bar + ring::STAGES * BAR, ~(count / 2) & 1);
        /* Where the first two pieces belong, and their upper halves. */
        uint32_t to[2], upper[2];
        to[0] = tiles + stage() * ring::PLANE;
        to[1] = to[0] + ring::ATOM; /* slab_of: the other slab */
        if (SLABS > 1)
            to[1] -= (from & 64) / 64 * 2 * ring::ATOM;
#pragma unroll
        for (uint32_t i = 0; i < 2; i++)
            upper[i] = to[i] ^ 16;
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i++) {
            const uint4 &y = x[i % 2];
            const uint32_t at = i / 2 * 2 * ring::ATOM + PART * (portions::PART / 8) * ring::EIGHT;
            store_16_bytes(to[i % 2] + at, widen(y.x & 0xffff), widen(y.x >> 16),
                           widen(y.y & 0xffff), widen(y.y >> 16));
            store_16_bytes(upper[i % 2] + at, widen(y.z & 0xffff), widen(y.z >> 16),
                           widen(y.w & 0xffff), widen(y.w >> 16));
            if (i + 2 < PIECES)
                load_piece(x[i % 2], from, i + 2);
        }
        if (PART + 1 == PARTS)
            fence_for_products();
        __syncwarp(); /* the portion's place is free, too */
        if (PART + 1 == PARTS && is_elected())
            barrier_arrive(bar);
        ask(place_of(PART));
    }

    __device__ void widen_tile()
    {
        widen_portion<0>();
        if (PARTS > 1)
            widen_portion<PARTS - 1>();
        count++;
    }

#endif
};

} // namespace wgmma

#endif
