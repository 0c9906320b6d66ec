/* mma for fp16 caches: mma.cuh. */
#include "mma.cuh"
#include "prefill.cuh"

ts_gpu_kernel mma_fp16(uint32_t head_dim, ts_dtype io)
{
    return mma::prefill<__half>(head_dim, io);
}
