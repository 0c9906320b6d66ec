/*
 * The tensor cores' instructions on 16-bit types, and numbers packed for them. Of a 16 x 8 result,
 * lane l has rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next.
 */
#ifndef TS_GPU_TENSOR_CUH
#define TS_GPU_TENSOR_CUH

#include "chunks.cuh"

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

/* Elements of an fp8 cache are multiplied as fp16, which has them all. */
template <typename T> struct multiplied {
    typedef T type;
};
template <> struct multiplied<__nv_fp8_e4m3> {
    typedef __half type;
};

/*
 * Operands from a cache's tile in shared memory: of two steps of 16 dimensions, four registers
 * each, as the matrix loads of 16-bit elements give them. `at` is the place of the 16-byte piece
 * that the lane's load starts at; `pair` is which 32 dimensions.
 *
 * fp8: a row of the matrix that the hardware loads is 16 dimensions, and a lane gets four of them,
 * 4 l to 4 l + 3 of lane l % 4, where a product's operand has dimensions 2 l, 2 l + 1, 2 l + 8 and
 * 2 l + 9. The sum over dimensions doesn't mind their order, so q is laid out in the order that K
 * comes in (load_q). Transposed, a lane gets dimensions 2 l and 2 l + 1 of two tokens: the even
 * dimensions become one operand (or half of one), the odd ones the next, and who writes the sums
 * knows it.
 */
template <typename T> struct operands {
    /* by_rows: the lanes' addresses ask for matrices of 8 tokens, 8 more, then those of the next
     * piece; else of one piece, the next piece, then those of 8 more tokens. */
    template <bool TRANSPOSED>
    __device__ static void load(uint32_t (*x)[4], uint32_t at, int pair, bool by_rows)
    {
        (void)by_rows;
        for (int step = 0; step < 2; step++)
            if (TRANSPOSED)
                load_transposed(x[step], chunks::turn(at, pair * 4 + step * 2));
            else
                load_matrices(x[step], chunks::turn(at, pair * 4 + step * 2));
    }
};

template <> struct operands<__nv_fp8_e4m3> {
    template <bool TRANSPOSED>
    __device__ static void load(uint32_t (*x)[4], uint32_t at, int pair, bool by_rows)
    {
        uint32_t y[4];
        if (TRANSPOSED)
            load_transposed(y, chunks::turn(at, pair * 2));
        else
            load_matrices(y, chunks::turn(at, pair * 2));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            /* Transposed: dimension 2 l of both tokens, then 2 l + 1. */
            uint32_t z = TRANSPOSED ? __byte_perm(y[i], 0, 0x3120) : y[i];
            int step = by_rows ? i / 2 : i % 2, part = by_rows ? i % 2 : i / 2;
            x[step][by_rows ? part : part * 2] = widen(z & 0xffffu);
            x[step][by_rows ? part + 2 : part * 2 + 1] = widen(z >> 16);
        }
    }
};

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

/* The higher of two numbers. NANS: NaN, if one is; else the other one. */
template <bool NANS> __device__ inline float higher_of(float a, float b)
{
    if (!NANS)
        return fmaxf(a, b);
    float x;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
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

/* A pair's numbers times 0, added to a pair: NaN stays in it where one was infinite or NaN, and
 * else it stays 0. Takes one instruction, where any_not_finite takes four. */
template <typename T> __device__ inline uint32_t add_times_zero(uint32_t pair, uint32_t to)
{
    uint32_t sum;
    if (std::is_same<T, __half>::value)
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(pair), "r"(0), "r"(to));
    else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(pair), "r"(0), "r"(to));
    return sum;
}

/* Where element e of eight that lie together in q's row comes from: `piece` is which eight. Beside
 * an fp8 cache in the order that K's operands come in. */
template <typename T> __host__ __device__ inline uint32_t q_source(uint32_t piece, uint32_t e)
{
    return !scaled<T>::value ? piece * 8 + e : piece / 2 * 16 + piece % 2 * 2 + e / 2 * 4 + e % 2;
}

/* load_q where q is as the cache has it. */
template <typename T, typename rows, uint32_t PIECES, int ROWS, int THREADS, typename C>
__device__ inline void copy_q(const C &c, const chunks::job &j, unsigned char *q)
{
    const uint32_t ALL = ROWS * PIECES;
    const uint32_t ABREAST = ALL / THREADS < 1 ? 1 : ALL / THREADS < 8 ? ALL / THREADS : 8;
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
}

/* q of a tile of ROWS rows, of PIECES 16-byte pieces each, into `planes` planes of shared memory:
 * rounded, what that leaves, what rounding that leaves. Rows past the last are 0. Laid out as
 * `rows` says; by the block's first THREADS threads. SORTED: elements in q_source's order.
 */
template <typename T, typename rows, uint32_t PIECES, int ROWS, int THREADS,
          bool SORTED = scaled<T>::value, typename C>
__device__ void load_q(const C &c, const chunks::job &j, uint32_t planes, unsigned char *q)
{
    typedef typename multiplied<T>::type M;
    const int TOGETHER = SORTED ? 2 : 8; /* elements that lie together in q */
    const uint32_t ALL = ROWS * PIECES;
    if (!scaled<T>::value && !takes_fp32(c) && !turns_rows(c)) { /* one plane */
        copy_q<T, rows, PIECES, ROWS, THREADS>(c, j, q);
        return;
    }
    for (uint32_t i = threadIdx.x; i < ALL; i += THREADS) {
        uint32_t r = i / PIECES, piece = i % PIECES;
        float x[8] = {};
        if (r < j.rows && piece * 8 < c.head_dim) {
            size_t row = chunks::place_of(c, j, r) * (size_t)c.head_dim;
            uint32_t position = j.past + chunks::query_of(c, j.first + r);
#pragma unroll
            for (int e = 0; e < 8; e += TOGETHER)
                load_turned<T, TOGETHER>(
                    c, j.s.q, row, SORTED ? q_source<T>(piece, e) : piece * 8 + e, position, x + e);
        }
        for (uint32_t plane = 0; plane < planes; plane++) {
            uint4 pairs;
            uint32_t *p = (uint32_t *)&pairs;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                p[e] = pack<M>(x[2 * e], x[2 * e + 1]);
                take_away<M>(p[e], &x[2 * e], &x[2 * e + 1]);
            }
            *(uint4 *)(q + plane * ALL * 16 + rows::place(r, piece)) = pairs;
        }
    }
}

/* Planes that q takes: one where it is of a 16-bit type; from fp32, errors of a score grow with it,
 * so bf16 takes three. */
template <typename T> __host__ __device__ inline uint32_t q_planes(uint32_t io)
{
    return io != TS_DTYPE_FP32 ? 1 : std::is_same<T, __nv_bfloat16>::value ? 3 : 2;
}

} // namespace tensor

#endif
