/* wgmma for bf16 caches: wgmma.cuh. */
#include "prefill.cuh"
#include "wgmma.cuh"

ts_gpu_kernel wgmma_bf16(uint32_t head_dim, wgmma_kind kind)
{
    return wgmma::prefill<__nv_bfloat16>(head_dim, kind);
}
