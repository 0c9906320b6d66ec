/*
 * An fp8 cache's tiles on their way to the groups that multiply them (wgmma.cuh). They come to a
 * place of their own; warps that do nothing else make fp16 of them, which has all that e4m3 has,
 * and store that where tile_ring.cuh has a 16-bit cache's tiles. So the products are an fp16
 * cache's.
 *
 * Each warp has a part of every tile's tokens for itself, a portion: it asks for it, widens it, and
 * waits for no other warp. Where blocks allow it the copy engine brings portions in boxes; else
 * each thread copies what it widens.
 */
#ifndef TS_GPU_FP8_TILES_CUH
#define TS_GPU_FP8_TILES_CUH

#include "tensor.cuh"
#include "tile_ring.cuh"

namespace wgmma
{

/* What those warps share: their number, and the barriers of portions' places. */
template <int DIM> struct fp8_portions {
    typedef tile_ring<__nv_fp8_e4m3, DIM> ring;
    static const uint32_t WARPS = ring::COPIERS / 32, TOKENS = ring::EACH; /* of a portion */
    static const uint32_t BYTES = TOKENS * DIM;                            /* of a portion */
    static const uint32_t PLACES =
        DIM > 128 ? 2 : 3; /* for a warp's portions; more don't fit at 256 */
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

/* One of those warps. BY_BOXES: its portions come in boxes. */
template <int DIM, bool BY_BOXES> struct fp8_widener {
    typedef tile_ring<__nv_fp8_e4m3, DIM> ring;
    typedef fp8_portions<DIM> portions;
    static const uint32_t SLABS = ring::SLABS, PLACES = portions::PLACES;
    static const uint32_t TOKENS = portions::TOKENS, PORTION = portions::BYTES;
    static const uint32_t PIECES = PORTION / 512; /* a portion's 16 bytes that a lane has */
    static const uint32_t BOX = WGMMA_FP8_BOX(DIM), BOXES = TOKENS / BOX, BAR = sizeof(uint64_t);
    static const uint32_t ALIGNED = 1024; /* bytes: places, and the ring's tiles */
    static_assert(PORTION % ALIGNED == 0 && PIECES % 2 == 0 &&
                      8 * (DIM < 128 ? DIM : 128) <= ALIGNED,
                  "first_of");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

    const gpu_call &c;
    const box_map &m;
    const CUtensorMap *map;
    uint32_t first_units; /* from block 0 to where the map begins */
    uint32_t bars;        /* in shared memory: the ring's barriers */
    uint32_t tiles[2];    /* ... where this lane's even and odd pieces belong in the first tile */
    uint32_t place, came; /* ... this lane's first piece of the next portion; its barrier */
    uint32_t parity;      /* the barrier's */
    uint32_t places;      /* `place` of the first one */
    uint32_t base;        /* the number of the piece's first tile in the ring */
    /* Of the piece: */
    uint32_t first, count;     /* this warp's first token; tiles of K, and of V */
    uint32_t end, unit;        /* unit: of its K in block 0, in the map */
    const uint32_t *blocks;    /* its table */
    const unsigned char *rows; /* its K in block 0 */
    uint32_t k_block, v_block; /* of this lane's token of the next tile of K, and of V */

    /* ring_tiles and what follows are in shared memory. */
    __device__ fp8_widener(const gpu_call &c, const wgmma_call &wc, uint32_t ring_tiles,
                           uint32_t all_places, const typename ring::barriers *ring_bars,
                           const portions *p)
        : c(c), m(wc.boxes), parity(0), base(0), count(0)
    {
        const box_blocks *among = blocks_of_boxes(wc);
        map = &among->map;
        first_units = among->first_units;
        bars = keep(shared_address(ring_bars->there));
        for (uint32_t i = 0; i < 2; i++)
            tiles[i] = keep(ring_tiles + (warp() * PIECES + slab_of(i)) * ring::ATOM +
                            ring::place(threadIdx.x % 32 / 4, threadIdx.x % 4 * 2));
        places = place = keep(all_places + warp() * PLACES * PORTION + staged(0));
        came = keep(shared_address(p->came[warp()]));
    }

    __device__ static uint32_t warp()
    {
        return threadIdx.x % ring::COPIERS / 32;
    }

    __device__ void next_place()
    {
        place += PORTION;
        came += BAR;
        if (place == places + PLACES * PORTION) {
            place -= PLACES * PORTION;
            came -= PLACES * BAR;
            parity ^= 1;
        }
    }

    /* A piece begins: its first PLACES portions are asked for, in the order of their use. Tiles are
     * used in this order: K's first, then K's next and V's by turns, and V's last. */
    __device__ void begin(const job &j)
    {
        typename ring::walk w = ring::walk_of(j);
        base += count;
        count = w.count;
        first = w.first + warp() * TOKENS;
        end = j.end;
        blocks = j.s.blocks;
        unit = j.s.layer * 2 * m.plane_units + j.kv_head * m.head_units - first_units;
        rows = c.base + j.s.layer * 2 * c.plane_bytes + j.kv_head * c.head_stride;
        if (count > 0)
            k_block = v_block = blocks[divide(token_of(0), c.block_tokens)];
        uint32_t place_before = place, came_before = came, parity_before = parity;
        ask(false, 0, count > 0);
        next_place();
        if (count > 1) {
            ask(false, 1, true);
            if (PLACES > 2) {
                next_place();
                ask(true, 0, true);
            }
        } else {
            ask(true, 0, count > 0);
            if (PLACES > 2)
                ask(true, 0, false);
        }
        place = place_before; /* the first of them is widened first */
        came = came_before;
        parity = parity_before;
    }

    /* Of tile n: the token whose block this lane looks up, or the last one again. For boxes it is
     * the first of a box. */
    __device__ uint32_t token_of(uint32_t n) const
    {
        uint32_t t = BY_BOXES ? threadIdx.x % BOXES * BOX : threadIdx.x % TOKENS;
        return min(first + n * ring::TOKENS + t, end - 1);
    }

    /* Which block tile n has. It isn't waited for. */
    __device__ void look_up(uint32_t n, bool wanted, uint32_t &block) const
    {
        const uint32_t *at = blocks + divide(token_of(n), c.block_tokens);
        asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.nc.u32 %0, [%1];\n}"
                     : "+r"(block)
                     : "l"(at), "r"((uint32_t)wanted));
    }

    /* The place that this lane's first piece is of: pieces before it are fewer than its alignment.
     */
    __device__ static uint32_t first_of(uint32_t place)
    {
        return place / ALIGNED * ALIGNED;
    }

    /* Asks for the portion of K's or V's tile n at `place`, if it is wanted. */
    __device__ void ask(bool v, uint32_t n, bool wanted)
    {
        if (wanted) {
            uint32_t block = v ? v_block : k_block, token = first + n * ring::TOKENS;
            if (BY_BOXES)
                ask_for_boxes(token, block, unit + (v ? m.plane_units : 0));
            else
                copy_portion(token, block, rows + (v ? c.plane_bytes : 0));
            if (v)
                look_up(n + 1, n + 1 < count, v_block);
            else
                look_up(n + 1, n + 1 < count, k_block);
        }
        if (!BY_BOXES)
            commit_copies(); /* wanted or not: the number of groups is what waits count */
    }

    /* token: the portion's first; block: of this lane's box. */
    __device__ void ask_for_boxes(uint32_t token, uint32_t block, uint32_t first_unit)
    {
        uint32_t its = token + threadIdx.x % BOXES * BOX;
        uint32_t in_block = its - divide(its, c.block_tokens) * c.block_tokens.d;
        uint32_t eight = (its < end ? in_block : c.block_tokens.d) / 8; /* no block's: 0 */
        uint32_t at = block * m.block_units + first_unit;
        if (is_elected())
            barrier_expect(came, PORTION);
#pragma unroll
        for (uint32_t i = 0; i < BOXES; i++) {
            uint32_t e = BOXES > 1 ? __shfl_sync(~0u, eight, (int)i) : eight;
            uint32_t u = BOXES > 1 ? __shfl_sync(~0u, at, (int)i) : at;
            if (is_elected())
                copy_box(first_of(place) + i * BOX * DIM, map, e, u, came, false);
        }
    }

    __device__ void copy_portion(uint32_t token, uint32_t block, const unsigned char *first_row)
    {
        uint32_t lane = threadIdx.x % 32, t = min(token + lane % TOKENS, end - 1);
        uint32_t in_block = t - divide(t, c.block_tokens) * c.block_tokens.d;
        size_t its = block * c.block_bytes + in_block * c.token_stride;
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i++) {
            uint32_t row = i / SLABS * 8 + lane / 4, d = slab_of(i) * 64 + lane % 4 * 16;
            const unsigned char *piece = first_row + __shfl_sync(~0u, its, (int)row) + d;
            cache_hints::copy_async(first_of(place) + staged(i), piece,
                                    token + row < end && d < c.head_dim ? 16 : 0, false);
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

    /* This lane's i-th piece of the next portion. */
    __device__ void load_piece(uint4 &x, uint32_t i) const
    {
        uint32_t at = i * 8 * DIM;
        if (SLABS > 1) /* as `staged` has it */
            at = i / SLABS * 8 * DIM + i % SLABS / 2 * 8 * WIDE;
        load_16_bytes((uint32_t *)&x, at + (SLABS > 1 && i % 2 != 0 ? place ^ 64 : place), true);
    }

    /* The next portion, of K's or V's tile n, becomes fp16 in the ring. */
    template <bool V> __device__ void widen_tile(uint32_t n)
    {
        n += base;
        const uint32_t to = ring::place_of_tile(n, V);
        uint4 x[2]; /* a third would be too many registers */
        if (BY_BOXES)
            barrier_await(came, parity);
        else
            await_copies<PLACES - 1>();
        load_piece(x[0], 0);
        load_piece(x[1], 1);
        barrier_await(bars + (ring::STAGES + to) * BAR, ~ring::turns_before(n, V) & 1);
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i++) {
            const uint4 &y = x[i % 2];
            uint32_t at =
                SLABS > 1 ? tiles[i % 2] + i / 2 * 2 * ring::ATOM : tiles[0] + i * ring::ATOM;
            at += to * ring::PLANE;
            store_16_bytes(at, widen(y.x & 0xffff), widen(y.x >> 16), widen(y.y & 0xffff),
                           widen(y.y >> 16));
            store_16_bytes(at ^ 16, widen(y.z & 0xffff), widen(y.z >> 16), widen(y.w & 0xffff),
                           widen(y.w >> 16));
            if (i + 2 < PIECES)
                load_piece(x[i % 2], i + 2);
        }
        fence_for_products();
        __syncwarp(); /* the portion's place is free, too */
        if (is_elected())
            barrier_arrive(bars + to * BAR);
    }

    /* K's tile n is widened, or V's, and what comes PLACES later in the order of their use is asked
     * for: by then its place is free. */
    static_assert(PLACES == 2 || PLACES == 3, "what comes PLACES later");
    __device__ void widen_k(uint32_t n)
    {
        widen_tile<false>(n);
        if (n == 0 && PLACES == 2)
            ask(true, 0, count > 1);
        else if (n == 0 || PLACES == 2)
            ask_for_k(n + PLACES - 1);
        else
            ask(true, n, n + 1 < count);
        next_place();
    }
    __device__ void widen_v(uint32_t n)
    {
        widen_tile<true>(n);
        if (PLACES == 2)
            ask(true, n + 1, n + 2 < count);
        else
            ask_for_k(n + 3);
        next_place();
    }
    /* ... K's tile n, or V's last one, which is what comes behind K's last. */
    __device__ void ask_for_k(uint32_t n)
    {
        bool v = n == count;
        ask(v, v ? n - 1 : n, n <= count);
    }

#endif
};

} // namespace wgmma

#endif
