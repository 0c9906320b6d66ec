/* v5 for bf16 caches: few rows for each KV head in decode_v5.cuh, of several
 * sequences too in decode_v5_shared.cuh; more in mma.cuh. */
#include "decode.cuh"
#include "decode_v5_shared.cuh"
#include "mma.cuh"

ts_gpu_kernel v5_bf16(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    return kind == 0          ? v5::kernel_of<__nv_bfloat16>(head_dim, io)
           : kind == 1        ? mma::medium<__nv_bfloat16>(head_dim, io)
           : kind == 2        ? mma::wide<__nv_bfloat16>(head_dim, io)
           : kind == V5_CLOSE ? v5::close_of<__nv_bfloat16>(head_dim, io)
                              : v5::shared_of<__nv_bfloat16>(head_dim, io);
}
