/* v5 for bf16 caches: few rows for each KV head in decode_v5.cuh, of several
 * sequences too in decode_v5_shared.cuh; more in mma.cuh. */
#include "decode.cuh"
#include "decode_v5_shared.cuh"
#include "mma.cuh"

ts_gpu_kernel v5_bf16(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    switch (kind) {
    case 0:
        return v5::kernel_of<__nv_bfloat16>(head_dim, io);
    case 1:
        return mma::medium<__nv_bfloat16>(head_dim, io);
    case 2:
        return mma::wide<__nv_bfloat16>(head_dim, io);
    case V5_TEAMS:
        return v5::shared_of<__nv_bfloat16, gpu_call>(head_dim, io);
    case V5_PLAIN:
        return v5::plain_of<__nv_bfloat16>(head_dim, io);
    case V5_PLAIN_TEAMS:
        return v5::shared_of<__nv_bfloat16, plain_call>(head_dim, io);
    default:
        return v5::close_of<__nv_bfloat16>(head_dim, io);
    }
}
