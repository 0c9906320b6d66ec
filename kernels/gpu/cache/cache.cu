/*
 * What moves K and V: reshape_and_cache scatters a step's new rows, token-major in the exchange,
 * into their slots (the strides are the pool's); copy_blocks copies whole blocks for copy-on-write.
 * Both are bound by memory and small beside attention.
 */
#include "common.cuh"

namespace
{

template <typename T> __global__ void reshape_and_cache(const __grid_constant__ gpu_call c)
{
    uint32_t query;
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

cudaError_t launch_append(const gpu_call &c, ts_dtype dtype, cudaStream_t stream)
{
    if (dtype == TS_DTYPE_FP32)
        reshape_and_cache<float><<<c.num_items, 256, 0, stream>>>(c);
    else if (dtype == TS_DTYPE_FP16)
        reshape_and_cache<__half><<<c.num_items, 256, 0, stream>>>(c);
    else if (dtype == TS_DTYPE_FP8_E4M3)
        reshape_and_cache<__nv_fp8_e4m3><<<c.num_items, 256, 0, stream>>>(c);
    else
        reshape_and_cache<__nv_bfloat16><<<c.num_items, 256, 0, stream>>>(c);
    return cudaGetLastError();
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
