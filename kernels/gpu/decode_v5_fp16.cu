/* v5 for fp16 caches: few rows for each KV head in decode_v5.cuh, more in mma.cuh. */
#include "decode_v5.cuh"
#include "mma.cuh"

cudaError_t launch_v5_fp16(const gpu_call &c, uint32_t kind, cudaStream_t stream)
{
    return kind == 0   ? v5::launch<__half>(c, stream)
           : kind == 1 ? mma::launch_medium<__half>(c, stream)
                       : mma::launch_wide<__half>(c, stream);
}
