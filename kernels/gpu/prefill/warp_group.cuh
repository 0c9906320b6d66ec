/*
 * Hopper's instructions for groups of warps (PTX ISA, "Asynchronous warpgroup-level matrix
 * instructions", "mbarrier", "barrier", "setmaxnreg"), which compute capability 9.0 alone has:
 * built for anything else, this file is empty.
 */
#ifndef TS_GPU_WARP_GROUP_CUH
#define TS_GPU_WARP_GROUP_CUH

#include "cache_hints.cuh"

extern "C" {
#include "box_map.h"
}

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <type_traits>

namespace wgmma
{

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* ---- barriers in shared memory ---- */

__device__ inline void barrier_init(uint32_t at, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(uint32_t at)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
/* Arrives, and has the barrier wait for `bytes` bytes of copies besides. */
__device__ inline void barrier_expect(uint32_t at, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
}
/* Arrives when what this thread has copied before is there. */
__device__ inline void barrier_arrive_copied(uint32_t at)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
__device__ inline void barrier_await(uint32_t at, uint32_t parity)
{
    uint32_t done;
    do
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(at), "r"(parity)
                     : "memory");
    while (done == 0);
}
/* Whether there is nothing to await. */
__device__ inline bool barrier_is_past(uint32_t at, uint32_t parity)
{
    uint32_t past;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(past)
                 : "r"(at), "r"(parity)
                 : "memory");
    return past != 0;
}

/* What threads wrote to shared memory, and what copies did, is there for the products. */
__device__ inline void fence_for_products()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* One lane of a warp, all of which are here: the compiler knows that it is alone. */
__device__ inline bool is_elected()
{
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(elected));
    return elected != 0;
}

/* The blocks that a launch's boxes lie in. Where the host has written them to memory since the last
 * launch, this thread's copies see that (PTX ISA, "fence.proxy.tensormap"). */
__device__ inline const box_blocks *blocks_of_boxes(const wgmma_call &wc)
{
    if (wc.among == NULL)
        return &wc.boxes.among;
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(&wc.among->map)
                 : "memory");
    return wc.among;
}

/* A box into shared memory, by the copy engine; the barrier gets its bytes. once: it may leave the
 * second-level cache first. (To name the usual priority is slower than to name none.) */
__device__ inline void copy_box(uint32_t to, const CUtensorMap *map, uint32_t eight, uint32_t unit,
                                uint32_t barrier, bool once)
{
    if (once)
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::"
                     "bytes.L2::cache_hint [%0], [%1, {%2, %2, %2, %3, %4}], [%5], %6;" ::"r"(to),
                     "l"(map), "r"(0), "r"(eight), "r"(unit), "r"(barrier),
                     "l"(cache_hints::leaves_first())
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::"
                     "bytes [%0], [%1, {%2, %2, %2, %3, %4}], [%5];" ::"r"(to),
                     "l"(map), "r"(0), "r"(eight), "r"(unit), "r"(barrier)
                     : "memory");
}

/* Eight rows of a head's k or v, from `row` on, likewise. */
__device__ inline void copy_eight(uint32_t to, const CUtensorMap *map, uint32_t row, uint32_t head,
                                  uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::"
                 "bytes [%0], [%1, {%2, %3, %2, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(0), "r"(row), "r"(head), "r"(barrier)
                 : "memory");
}

/* As many as the map's boxes have; slab: the first of the head's. */
__device__ inline void copy_rows_at(uint32_t to, const CUtensorMap *map, uint32_t row,
                                    uint32_t slab, uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::"
                 "bytes [%0], [%1, {%2, %2, %3, %2, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(0), "r"(slab), "r"(row), "r"(barrier)
                 : "memory");
}

/* A box from shared memory, by the copy engine: this thread waits for all that it has asked for,
 * until they have been read there or, at the end, are written. */
__device__ inline void store_box(const CUtensorMap *map, uint32_t eight, uint32_t unit,
                                 uint32_t from)
{
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group "
                 "[%0, {%1, %1, %1, %2, %3}], [%4];" ::"l"(map),
                 "r"(0), "r"(eight), "r"(unit), "r"(from)
                 : "memory");
}
__device__ inline void await_boxes_read()
{
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ inline void await_boxes_stored()
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/* Barriers of some of the block's threads, by number. */
__device__ inline void named_sync(uint32_t id, uint32_t threads)
{
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_arrive(uint32_t id, uint32_t threads)
{
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline bool named_any(uint32_t id, uint32_t threads, bool x)
{
    uint32_t any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\n"
                 "barrier.cta.red.or.pred.aligned q, %2, %3, p;\nselp.u32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"((uint32_t)x), "r"(id), "r"(threads)
                 : "memory");
    return any != 0;
}

template <int REGISTERS> __device__ inline void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ inline void give_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* 0, where they aren't wanted. */
__device__ inline void load_16_bytes(uint32_t *x, uint32_t at, bool wanted)
{
    x[0] = x[1] = x[2] = x[3] = 0;
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
                 "@p ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                 : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
                 : "r"(at), "r"((uint32_t)wanted)
                 : "memory");
}
__device__ inline void store_16_bytes(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
__device__ inline void clear_16_bytes(uint32_t at)
{
    store_16_bytes(at, 0, 0, 0, 0);
}

/* ---- products ---- */

/* What lies in shared memory, for the hardware: 128-byte swizzle; `leading` and `stride` are bytes
 * between its atoms of 8 rows of 128 bytes. */
__device__ inline uint64_t matrix(uint32_t at, uint32_t leading, uint32_t stride)
{
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 |
           (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}
/* The same, `bytes` further. */
__device__ inline uint64_t further(uint64_t m, uint32_t bytes)
{
    return (m & ~(uint64_t)0xffffffff) | ((uint32_t)m + (bytes >> 4));
}
/* The high word of the same, which is alike for all tiles of a ring. */
__device__ inline uint64_t with_high_word(uint32_t low, uint64_t matrix)
{
    return (matrix & ~(uint64_t)0xffffffff) | low;
}
/* An address that the compiler keeps, and doesn't find anew each time. */
__device__ inline uint32_t keep(uint32_t x)
{
    asm volatile("" : "+r"(x));
    return x;
}
/* A number that all lanes have alike, so that the compiler knows it. What tells a product where its
 * sides lie is in registers of the whole warp; to be moved there before each product would hold it
 * up. */
__device__ inline uint32_t uniform(uint32_t x)
{
    return __shfl_sync(~0u, x, 0);
}

__device__ inline void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* For all but the LATER ones that were committed last. */
template <int LATER> __device__ inline void products_await()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
}
/* The compiler is not to move what it does with these registers past here. */
template <int N> __device__ inline void pin(float (*d)[4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+f"(d[i][e])::"memory");
}

/* Neither is the assembler to leave what `x` comes from, a number that is never negative, until
 * after what follows: it would be stored if it were. */
__device__ inline void finish_before(float x, uint32_t shared)
{
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n"
                 "@p st.shared.f32 [%1], %0;\n}" ::"f"(x),
                 "r"(shared)
                 : "memory");
}

#define PRODUCT_FOUR(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PRODUCT_16(d, i)                                                                           \
    PRODUCT_FOUR(d, i), PRODUCT_FOUR(d, i + 1), PRODUCT_FOUR(d, i + 2), PRODUCT_FOUR(d, i + 3)
#define PRODUCT_32(d) PRODUCT_16(d, 0), PRODUCT_16(d, 4)
#define PRODUCT_64(d) PRODUCT_32(d), PRODUCT_16(d, 8), PRODUCT_16(d, 12)
#define PRODUCT_NAMES_32                                                                           \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31"
#define PRODUCT_NAMES_64                                                                           \
    PRODUCT_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"   \
                     "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
/* Rows of b are the tokens of K: both sides lie with the dimensions that are summed together. */
#define PRODUCT_SCORES(N, TYPE, NAMES, A, B, KEEP, REGISTERS)                                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " KEEP ", 0;\n"                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " NAMES "}, " A \
                 ", " B ", p, 1, 1, 0, 0;\n}"                                                      \
                 : REGISTERS                                                                       \
                 : "l"(a), "l"(b), "r"((uint32_t)keep))
/* Rows of b are the tokens of V, which are summed: it lies transposed. */
#define PRODUCT_SUMS(N, TYPE, NAMES, A, B, REGISTERS)                                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " NAMES         \
                 "}, {" A "}, " B ", 1, 1, 1, 1;"                                                  \
                 : REGISTERS                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

/* d (64 rows x N tokens) = or += a (64 x 16 dimensions) times b (N tokens x 16 dimensions) */
template <typename T, int N>
__device__ inline void add_scores(float (*d)[4], uint64_t a, uint64_t b, bool keep)
{
    const bool half = std::is_same<T, __half>::value;
    static_assert(N == 64 || N == 128, "one of these");
    if (N == 64 && half)
        PRODUCT_SCORES(64, "f16", PRODUCT_NAMES_32, "%32", "%33", "%34", PRODUCT_32(d));
    else if (N == 64)
        PRODUCT_SCORES(64, "bf16", PRODUCT_NAMES_32, "%32", "%33", "%34", PRODUCT_32(d));
    else if (half)
        PRODUCT_SCORES(128, "f16", PRODUCT_NAMES_64, "%64", "%65", "%66", PRODUCT_64(d));
    else
        PRODUCT_SCORES(128, "bf16", PRODUCT_NAMES_64, "%64", "%65", "%66", PRODUCT_64(d));
}

/* d (64 rows x N dimensions) += a (64 x 16 tokens), from registers, times b (16 tokens x N) */
template <typename T, int N>
__device__ inline void add_sums(float (*d)[4], const uint32_t *a, uint64_t b)
{
    const bool half = std::is_same<T, __half>::value;
    if (N == 64 && half)
        PRODUCT_SUMS(64, "f16", PRODUCT_NAMES_32, "%32,%33,%34,%35", "%36", PRODUCT_32(d));
    else if (N == 64)
        PRODUCT_SUMS(64, "bf16", PRODUCT_NAMES_32, "%32,%33,%34,%35", "%36", PRODUCT_32(d));
    else if (half)
        PRODUCT_SUMS(128, "f16", PRODUCT_NAMES_64, "%64,%65,%66,%67", "%68", PRODUCT_64(d));
    else
        PRODUCT_SUMS(128, "bf16", PRODUCT_NAMES_64, "%64,%65,%66,%67", "%68", PRODUCT_64(d));
}

#endif

} // namespace wgmma

#endif
