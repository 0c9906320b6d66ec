/* mma for fp16 caches: mma.cuh. */
#include "mma.cuh"

cudaError_t launch_mma_fp16(const gpu_call &c, cudaStream_t stream)
{
    return mma::launch_prefill<__half>(c, stream);
}
