/* wgmma for fp8 caches: wgmma.cuh. */
#include "prefill.cuh"
#include "wgmma.cuh"

ts_gpu_kernel wgmma_fp8(uint32_t head_dim, wgmma_kind kind)
{
    return wgmma::prefill<__nv_fp8_e4m3>(head_dim, kind);
}
