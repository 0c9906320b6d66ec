/* v5 for fp16 caches: few rows for each KV head in decode_v5.cuh, of several
 * sequences too in decode_v5_shared.cuh; more in mma.cuh. */
#include "decode.cuh"
#include "decode_v5_shared.cuh"
#include "mma.cuh"

ts_gpu_kernel v5_fp16(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    return kind == 0          ? v5::kernel_of<__half>(head_dim, io)
           : kind == 1        ? mma::medium<__half>(head_dim, io)
           : kind == 2        ? mma::wide<__half>(head_dim, io)
           : kind == V5_CLOSE ? v5::close_of<__half>(head_dim, io)
                              : v5::shared_of<__half>(head_dim, io);
}
