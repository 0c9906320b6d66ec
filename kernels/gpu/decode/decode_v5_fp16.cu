/* v5 for fp16 caches: few rows for each KV head in decode_v5.cuh, of several
 * sequences too in decode_v5_shared.cuh; more in mma.cuh. */
#include "decode.cuh"
#include "decode_v5_shared.cuh"
#include "mma.cuh"

ts_gpu_kernel v5_fp16(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    switch (kind) {
    case 0:
        return v5::kernel_of<__half>(head_dim, io);
    case 1:
        return mma::medium<__half>(head_dim, io);
    case 2:
        return mma::wide<__half>(head_dim, io);
    case V5_TEAMS:
        return v5::shared_of<__half, gpu_call>(head_dim, io);
    case V5_PLAIN:
        return v5::plain_of<__half>(head_dim, io);
    case V5_PLAIN_TEAMS:
        return v5::shared_of<__half, plain_call>(head_dim, io);
    default:
        return v5::close_of<__half>(head_dim, io);
    }
}
