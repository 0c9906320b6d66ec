/* v5 for fp8 caches: few rows for each KV head in decode_v5.cuh, of several
 * sequences too in decode_v5_shared.cuh; more in mma.cuh. */
#include "decode.cuh"
#include "decode_v5_shared.cuh"
#include "mma.cuh"

ts_gpu_kernel v5_fp8(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    switch (kind) {
    case 0:
        return v5::kernel_of<__nv_fp8_e4m3>(head_dim, io);
    case 1:
        return mma::medium<__nv_fp8_e4m3>(head_dim, io);
    case 2:
        return mma::wide<__nv_fp8_e4m3>(head_dim, io);
    case V5_TEAMS:
        return v5::shared_of<__nv_fp8_e4m3, gpu_call>(head_dim, io);
    case V5_PLAIN:
        return v5::plain_of<__nv_fp8_e4m3>(head_dim, io);
    case V5_PLAIN_TEAMS:
        return v5::shared_of<__nv_fp8_e4m3, plain_call>(head_dim, io);
    default:
        return ts_gpu_kernel{};
    }
}
