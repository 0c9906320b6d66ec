/*
 * What moves K and V: reshape_and_cache scatters a step's new rows, token-major in the exchange,
 * into their slots (the strides are the pool's). So does copy_and_cache by whole vectors, as they
 * are or rounded to fp8. copy_blocks copies whole blocks for copy-on-write.
 * All are bound by memory and small beside attention.
 */
#include "cache.cuh"

namespace
{

template <typename T> __global__ void reshape_and_cache(const __grid_constant__ gpu_call c)
{
    uint32_t query;
    if (blockIdx.x >= items_of(c))
        return;
    const gpu_seq s = find_item(c, blockIdx.x, &query);
    if (s.k == NULL)
        return;
    unsigned char *at = (unsigned char *)key_of(c, s, s.kv_tokens - s.q_tokens + query, 0);
    uint32_t elements = c.kv_heads * c.head_dim;
    size_t row = (size_t)query * elements;
    uint32_t position = s.kv_tokens - s.q_tokens + query;
    for (uint32_t i = threadIdx.x; i < elements; i += blockDim.x) {
        uint32_t head = i / c.head_dim, d = i % c.head_dim;
        T *k = (T *)(at + head * c.head_stride) + d;
        *k = to_cache<T>(turned<T>(c, s.k, row + i - d, d, position), key_scale<T>(s, head));
        *(T *)((unsigned char *)k + c.plane_bytes) =
            to_cache<T>(io_load<T>(c, s.v, row + i), value_scale<T>(c, s, head));
    }
}

const uint32_t APPEND_THREADS = 256, APPEND_WARPS = APPEND_THREADS / 32;

/* How a 16-byte vector of new elements lies in the cache. As it is: */
struct as_it_is {
    static __device__ uint32_t vectors(const gpu_call &c) /* of a head's row */
    {
        return c.head_dim * c.cache_bytes / BYTES;
    }
    static const uint32_t BYTES = 16; /* in the cache */
    static const bool SCALED = false;
    static __device__ uint4 put(uint4 x, float)
    {
        return x;
    }
};

/* Two numbers as e4m3, the first in the lower byte, rounded as from_float does it. */
__device__ inline uint32_t fp8_pair(float x, float y)
{
    return __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, __NV_E4M3);
}

/* Rounded to fp8: */
template <typename IO> struct as_fp8 {
    static __device__ uint32_t vectors(const gpu_call &c)
    {
        return c.head_dim / BYTES;
    }
    static const uint32_t BYTES = 8;
    static const bool SCALED = true;
    static __device__ uint2 put(uint4 x, float scale)
    {
        const IO *from = (const IO *)&x;
        float y[BYTES];
        uint32_t packed[2];
#pragma unroll
        for (uint32_t e = 0; e < BYTES; e++)
            y[e] = to_float(from[e]);
        if (scale != 1) /* dividing takes longer than all else */
#pragma unroll
            for (uint32_t e = 0; e < BYTES; e++)
                y[e] /= scale;
#pragma unroll
        for (uint32_t e = 0; e < BYTES; e += 4)
            packed[e / 4] = fp8_pair(y[e], y[e + 1]) | fp8_pair(y[e + 2], y[e + 3]) << 16;
        return make_uint2(packed[0], packed[1]);
    }
};

/* The same by whole vectors: a warp for each token, which asks for many before it writes one. */
template <typename AS>
__global__ void __launch_bounds__(APPEND_THREADS) copy_and_cache(const __grid_constant__ gpu_call c)
{
    typedef decltype(AS::put(uint4{}, 0.0f)) vector;
    const uint32_t ABREAST = 4;
    uint32_t item = blockIdx.x * APPEND_WARPS + threadIdx.x / 32, query;
    if (item >= items_of(c))
        return;
    const gpu_seq s = find_item(c, item, &query);
    if (s.k == NULL)
        return;
    uint32_t lane = threadIdx.x % 32, row_vectors = AS::vectors(c);
    unsigned char *to = (unsigned char *)key_of(c, s, s.kv_tokens - s.q_tokens + query, 0);
    uint32_t count = c.kv_heads * row_vectors;
    const uint4 *k = (const uint4 *)s.k + (size_t)query * count;
    const uint4 *v = (const uint4 *)s.v + (size_t)query * count;
    for (uint32_t first = lane; first < count; first += 32 * ABREAST) {
        uint4 x[ABREAST], y[ABREAST];
#pragma unroll
        for (uint32_t i = 0; i < ABREAST; i++) {
            uint32_t n = min(first + i * 32, count - 1); /* the last again */
            x[i] = __ldcs(k + n);
            y[i] = __ldcs(v + n);
        }
#pragma unroll
        for (uint32_t i = 0; i < ABREAST; i++) {
            uint32_t n = min(first + i * 32, count - 1), head = n / row_vectors;
            unsigned char *row = to + head * c.head_stride + (n - head * row_vectors) * AS::BYTES;
            float key = AS::SCALED ? key_scale<__nv_fp8_e4m3>(s, head) : 1;
            *(vector *)row = AS::put(x[i], key);
            float value = AS::SCALED ? value_scale<__nv_fp8_e4m3>(c, s, head) : 1;
            *(vector *)(row + c.plane_bytes) = AS::put(y[i], value);
        }
    }
}

template <typename W>
__global__ void copy_blocks(unsigned char *base, size_t words, const ts_block_copy *copies)
{
    ts_block_copy copy = copies[blockIdx.y];
    const W *from = (const W *)base + copy.src * words;
    W *to = (W *)base + copy.dst * words;
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += stride)
        to[i] = from[i];
}

} // namespace

/* Whether new rows are read by whole 16-byte vectors, as they are. */
static bool reads_vectors(const gpu_call &c)
{
    uintptr_t all = c.head_dim * c.io_bytes;
    for (uint32_t r = 0; r == 0 || c.runs[r - 1].end < c.num_items; r++)
        all |= (uintptr_t)c.runs[r].k | (uintptr_t)c.runs[r].v;
    return c.rope.theta == 0 && all % 16 == 0;
}

/* Those kernels: of a launch without items, all are loaded. */
static cudaError_t start_vectors(const gpu_call &c, ts_dtype dtype, cudaStream_t stream)
{
    const uint32_t grid = (c.num_items + APPEND_WARPS - 1) / APPEND_WARPS;
    if (dtype != TS_DTYPE_FP8_E4M3)
        return start(copy_and_cache<as_it_is>, c, grid, APPEND_THREADS, stream);
    cudaError_t error = cudaSuccess;
    if (c.num_items == 0 || c.io == TS_DTYPE_BF16)
        error = start(copy_and_cache<as_fp8<__nv_bfloat16>>, c, grid, APPEND_THREADS, stream);
    if (error == cudaSuccess && (c.num_items == 0 || c.io == TS_DTYPE_FP16))
        error = start(copy_and_cache<as_fp8<__half>>, c, grid, APPEND_THREADS, stream);
    return error;
}

TS_KNOWS_DTYPES(4);
cudaError_t launch_append(const gpu_call &c, ts_dtype dtype, cudaStream_t stream)
{
    const bool loads = c.num_items == 0;
    const bool alike =
        c.io == (uint32_t)dtype || (dtype == TS_DTYPE_FP8_E4M3 && c.io != TS_DTYPE_FP32);
    if (loads || (alike && reads_vectors(c))) {
        cudaError_t error = start_vectors(c, dtype, stream);
        if (!loads || error != cudaSuccess)
            return error;
    }
    return start(dtype == TS_DTYPE_FP32       ? reshape_and_cache<float>
                 : dtype == TS_DTYPE_FP16     ? reshape_and_cache<__half>
                 : dtype == TS_DTYPE_FP8_E4M3 ? reshape_and_cache<__nv_fp8_e4m3>
                                              : reshape_and_cache<__nv_bfloat16>,
                 c, c.num_items, 256, stream);
}

cudaError_t load_copies()
{
    cudaError_t error = load(copy_blocks<uint4>);
    if (error == cudaSuccess)
        error = load(copy_blocks<uint32_t>);
    return error == cudaSuccess ? load(copy_blocks<uint16_t>) : error;
}

cudaError_t launch_copies(unsigned char *base, size_t block_bytes, const ts_block_copy *copies,
                          uint32_t num_copies, cudaStream_t stream)
{
    /* A block has 2 * layers planes: always a multiple of 2 bytes. */
    for (uint32_t first = 0; first < num_copies; first += 65535) {
        uint32_t count = num_copies - first < 65535 ? num_copies - first : 65535;
        uint32_t across = (uint32_t)((block_bytes / 16 + 255) / 256);
        dim3 grid(across < 1 ? 1 : across > 64 ? 64 : across, count);
        if (block_bytes % 16 == 0)
            copy_blocks<uint4><<<grid, 256, 0, stream>>>(base, block_bytes / 16, copies + first);
        else if (block_bytes % 4 != 0)
            copy_blocks<uint16_t><<<grid, 256, 0, stream>>>(base, block_bytes / 2, copies + first);
        else
            copy_blocks<uint32_t><<<grid, 256, 0, stream>>>(base, block_bytes / 4, copies + first);
        cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess)
            return error;
    }
    return cudaSuccess;
}
