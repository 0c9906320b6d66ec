/* mma for bf16 caches: mma.cuh. */
#include "mma.cuh"
#include "prefill.cuh"

ts_gpu_kernel mma_bf16(uint32_t head_dim, ts_dtype io)
{
    return mma::prefill<__nv_bfloat16>(head_dim, io);
}
