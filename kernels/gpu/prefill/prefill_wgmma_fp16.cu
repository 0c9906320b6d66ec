/* wgmma for fp16 caches: wgmma.cuh. */
#include "prefill.cuh"
#include "wgmma.cuh"

ts_gpu_kernel wgmma_fp16(uint32_t head_dim, wgmma_kind kind)
{
    return wgmma::prefill<__half>(head_dim, kind);
}
