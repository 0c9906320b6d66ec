/*
 * The tensor cores' instructions on 16-bit types, and numbers packed for them. Of a 16 x 8 result,
 * lane l has rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next.
 */
#ifndef TS_GPU_TENSOR_CUH
#define TS_GPU_TENSOR_CUH

#include "chunks.cuh"

#include <type_traits>

namespace tensor
{

/* Four 8 x 8 matrices; lanes 8 i to 8 i + 7 give the addresses of matrix i's rows. */
__device__ inline void load_matrices(uint32_t *a, uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(at));
}
__device__ inline void load_transposed(uint32_t *a, uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(at));
}
__device__ inline uint32_t transpose(uint32_t x)
{
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* d += a (16 x 16) * b (16 x 8) */
template <typename T>
__device__ inline void multiply(float *d, const uint32_t *a, uint32_t b0, uint32_t b1)
{
    if (std::is_same<T, __half>::value)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
            "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
            "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two numbers as 16-bit ones; the first in the lower half. */
template <typename T> __device__ inline uint32_t pack(float x, float y)
{
    uint32_t pair;
    if (std::is_same<T, __half>::value)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}

/* What rounding them so leaves of the two. */
template <typename T> __device__ inline void take_away(uint32_t pair, float *x, float *y)
{
    if (std::is_same<T, __half>::value) {
        *x -= __low2float(*(const __half2 *)&pair);
        *y -= __high2float(*(const __half2 *)&pair);
    } else {
        *x -= __uint_as_float(pair << 16);
        *y -= __uint_as_float(pair & 0xffff0000u);
    }
}

/* Whether one of eight numbers is infinite or NaN. */
template <typename T> __device__ inline bool any_not_finite(const uint32_t *x)
{
    const uint32_t e = std::is_same<T, __half>::value ? 0x7c00u : 0x7f80u;
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; i++)
        any |= (x[i] & e) == e || (x[i] & e << 16) == e << 16;
    return any;
}

/* q of a tile of ROWS rows into `planes` planes of shared memory: rounded, what that leaves, what
 * rounding that leaves. Rows past the last are 0. Laid out as loader does. */
template <typename T, int PITCH, int ROWS, int THREADS>
__device__ void load_q(const gpu_call &c, const chunks::job &j, uint32_t planes, unsigned char *q)
{
    typedef chunks::loader<PITCH, 16> rows;
    const uint32_t PIECES = PITCH / 16, ALL = ROWS * PIECES;
    const uint32_t ABREAST = ALL / THREADS < 1 ? 1 : ALL / THREADS < 8 ? ALL / THREADS : 8;
    if (!c.io_fp32 && c.rope.theta == 0) { /* as it is: there is one plane */
        for (uint32_t i = threadIdx.x; i < ALL; i += THREADS * ABREAST) {
            uint4 x[ABREAST];
#pragma unroll
            for (uint32_t a = 0; a < ABREAST; a++) {
                uint32_t r = (i + a * THREADS) / PIECES, piece = (i + a * THREADS) % PIECES;
                x[a] = make_uint4(0, 0, 0, 0);
                if (r >= j.rows || piece * 8 >= c.head_dim)
                    continue;
                size_t at = chunks::place_of(c, j, r) * (size_t)c.head_dim + piece * 8;
                x[a] = *(const uint4 *)((const T *)j.s.q + at);
            }
#pragma unroll
            for (uint32_t a = 0; a < ABREAST; a++) {
                uint32_t r = (i + a * THREADS) / PIECES, piece = (i + a * THREADS) % PIECES;
                *(uint4 *)(q + rows::place(r, piece)) = x[a];
            }
        }
        return;
    }
    for (uint32_t i = threadIdx.x; i < ALL; i += THREADS) {
        uint32_t r = i / PIECES, piece = i % PIECES;
        float x[8] = {};
        if (r < j.rows && piece * 8 < c.head_dim)
            load_turned<T, 8>(c, j.s.q, chunks::place_of(c, j, r) * (size_t)c.head_dim, piece * 8,
                              j.past + chunks::query_of(c, j.first + r), x);
        for (uint32_t plane = 0; plane < planes; plane++) {
            uint4 pairs;
            uint32_t *p = (uint32_t *)&pairs;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                p[e] = pack<T>(x[2 * e], x[2 * e + 1]);
                take_away<T>(p[e], &x[2 * e], &x[2 * e + 1]);
            }
            *(uint4 *)(q + plane * ROWS * PITCH + rows::place(r, piece)) = pairs;
        }
    }
}

/* Planes that q takes: one where it is of the cache's type; from fp32, errors of a score grow with
 * it, so bf16 takes three. */
template <typename T> __host__ __device__ inline uint32_t q_planes(bool io_fp32)
{
    return !io_fp32 ? 1 : std::is_same<T, __half>::value ? 2 : 3;
}

} // namespace tensor

#endif
