/* v5 for bf16 caches: few rows for each KV head in decode_v5.cuh, more in mma.cuh. */
#include "decode_v5.cuh"
#include "mma.cuh"

ts_gpu_kernel v5_bf16(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    return kind == 0   ? v5::kernel_of<__nv_bfloat16>(head_dim, io)
           : kind == 1 ? mma::medium<__nv_bfloat16>(head_dim, io)
                       : mma::wide<__nv_bfloat16>(head_dim, io);
}
