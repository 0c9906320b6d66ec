/* v5 for fp8 caches: few rows for each KV head in decode_v5.cuh, of several
 * sequences too in decode_v5_shared.cuh; more in mma.cuh. */
#include "decode.cuh"
#include "decode_v5_shared.cuh"
#include "mma.cuh"

ts_gpu_kernel v5_fp8(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    return kind == 0          ? v5::kernel_of<__nv_fp8_e4m3>(head_dim, io)
           : kind == 1        ? mma::medium<__nv_fp8_e4m3>(head_dim, io)
           : kind == 2        ? mma::wide<__nv_fp8_e4m3>(head_dim, io)
           : kind == V5_CLOSE ? ts_gpu_kernel{}
                              : v5::shared_of<__nv_fp8_e4m3>(head_dim, io);
}
