/*
 * The kernels for few new tokens. The call is checked. A launcher that is given no items loads the
 * kernel.
 */
#ifndef TS_GPU_DECODE_CUH
#define TS_GPU_DECODE_CUH

#include "common.cuh"

cudaError_t launch_v1(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_v2(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_v3(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);
cudaError_t launch_v4(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);

/* Kinds of v5's kernels for few rows, which not every cache has: */
#define V5_TEAMS 3u       /* for teams' pieces as well */
#define V5_PLAIN 4u       /* for plain calls alone (common.cuh) */
#define V5_PLAIN_TEAMS 5u /* likewise, for teams' pieces as well */
#define V5_CLOSE 6u       /* likewise, of V5_CLOSE_BLOCKS blocks on a processor */

/* They take more shared memory than every device has. kind: v5_rows', or one of these. */
ts_gpu_kernel v5_fp32(uint32_t head_dim, uint32_t kind);
ts_gpu_kernel v5_fp16(uint32_t head_dim, ts_dtype io, uint32_t kind);
ts_gpu_kernel v5_bf16(uint32_t head_dim, ts_dtype io, uint32_t kind);
ts_gpu_kernel v5_fp8(uint32_t head_dim, ts_dtype io, uint32_t kind);

#endif
