/* mma for bf16 caches: mma.cuh. */
#include "mma.cuh"

cudaError_t launch_mma_bf16(const gpu_call &c, cudaStream_t stream)
{
    return mma::launch_prefill<__nv_bfloat16>(c, stream);
}
