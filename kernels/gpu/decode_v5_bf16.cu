/* v5 for bf16 caches: few rows for each KV head in decode_v5.cuh, more in mma.cuh. */
#include "decode_v5.cuh"
#include "mma.cuh"

cudaError_t launch_v5_bf16(const gpu_call &c, uint32_t kind, cudaStream_t stream)
{
    return kind == 0   ? v5::launch<__nv_bfloat16>(c, stream)
           : kind == 1 ? mma::launch_medium<__nv_bfloat16>(c, stream)
                       : mma::launch_wide<__nv_bfloat16>(c, stream);
}
