/*
 * v5's kernels for a cache of type T, by kind: decode_v5.cuh's for few rows of each KV head,
 * decode_v5_shared.cuh's for several sequences' rows as well, mma.cuh's for more rows.
 */
#ifndef TS_GPU_DECODE_V5_KINDS_CUH
#define TS_GPU_DECODE_V5_KINDS_CUH

#include "decode.cuh"
#include "decode_v5_shared.cuh"
#include "mma.cuh"

namespace v5
{

template <typename T> ts_gpu_kernel kernel_of_kind(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    switch (kind) {
    case 0:
        return kernel_of<T>(head_dim, io);
    case 1:
        return mma::medium<T>(head_dim, io);
    case 2:
        return mma::wide<T>(head_dim, io);
    case V5_TEAMS:
        return shared_of<T, gpu_call>(head_dim, io);
    case V5_PLAIN:
        return plain_of<T>(head_dim, io);
    case V5_PLAIN_TEAMS:
        return shared_of<T, plain_call>(head_dim, io);
    default:
        return close_of<T>(head_dim, io);
    }
}

} // namespace v5

#endif
