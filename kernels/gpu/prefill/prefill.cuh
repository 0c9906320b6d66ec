/*
 * The kernels for many new tokens. The call is checked. The launcher loads the kernel if it is
 * given no items.
 */
#ifndef TS_GPU_PREFILL_CUH
#define TS_GPU_PREFILL_CUH

#include "common.cuh"

/* wgmma's kernels: for any rows, for scores that are capped or sloped, and for sequences of few
 * rows, which varied scores' kernel takes as well. */
typedef enum wgmma_kind { WGMMA_MANY, WGMMA_VARIED, WGMMA_FEW } wgmma_kind;

/* They take more shared memory than every device has. Without a function: there is none. */
ts_gpu_kernel mma_fp16(uint32_t head_dim, ts_dtype io);
ts_gpu_kernel mma_bf16(uint32_t head_dim, ts_dtype io);
ts_gpu_kernel mma_fp8(uint32_t head_dim, ts_dtype io);
ts_gpu_kernel wgmma_fp16(uint32_t head_dim, wgmma_kind kind);
ts_gpu_kernel wgmma_bf16(uint32_t head_dim, wgmma_kind kind);
ts_gpu_kernel wgmma_fp8(uint32_t head_dim, wgmma_kind kind);
ts_gpu_kernel tile_kernel(uint32_t head_dim, ts_dtype dtype);

cudaError_t launch_tile(const gpu_call &c, const ts_gpu_kernel &kernel, cudaStream_t stream);

#endif
