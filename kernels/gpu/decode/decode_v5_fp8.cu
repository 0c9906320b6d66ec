/* v5 for fp8 caches. */
#include "decode_v5_kinds.cuh"

ts_gpu_kernel v5_fp8(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    return v5::kernel_of_kind<__nv_fp8_e4m3>(head_dim, io, kind);
}
