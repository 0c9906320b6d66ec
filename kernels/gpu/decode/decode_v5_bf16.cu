/* v5 for bf16 caches. */
#include "decode_v5_kinds.cuh"

ts_gpu_kernel v5_bf16(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    return v5::kernel_of_kind<__nv_bfloat16>(head_dim, io, kind);
}
