/* mma for fp8 caches: mma.cuh. */
#include "mma.cuh"
#include "prefill.cuh"

ts_gpu_kernel mma_fp8(uint32_t head_dim, ts_dtype io)
{
    return mma::prefill<__nv_fp8_e4m3>(head_dim, io);
}
