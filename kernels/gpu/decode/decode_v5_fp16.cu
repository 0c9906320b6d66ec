/* v5 for fp16 caches. */
#include "decode_v5_kinds.cuh"

ts_gpu_kernel v5_fp16(uint32_t head_dim, ts_dtype io, uint32_t kind)
{
    return v5::kernel_of_kind<__half>(head_dim, io, kind);
}
