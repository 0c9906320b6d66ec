/* v5 for fp16 caches: few rows for each KV head in decode_v5.cuh, more in mma.cuh. */
#include "decode_v5.cuh"
#include "mma.cuh"

ts_gpu_kernel v5_fp16(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    return kind == 0   ? v5::kernel_of<__half>(head_dim, io)
           : kind == 1 ? mma::medium<__half>(head_dim, io)
                       : mma::wide<__half>(head_dim, io);
}
