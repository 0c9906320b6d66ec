/* What is done to the cache beside attention. The call is checked. */
#ifndef TS_GPU_CACHE_CUH
#define TS_GPU_CACHE_CUH

#include "common.cuh"

/* Writes new K and V to their slots; without items, loads the kernel. */
cudaError_t launch_append(const gpu_call &c, ts_dtype dtype, cudaStream_t stream);

cudaError_t load_copies();
cudaError_t launch_copies(unsigned char *base, size_t block_bytes, const ts_block_copy *copies,
                          uint32_t num_copies, cudaStream_t stream);

#endif
