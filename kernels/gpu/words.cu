/*
 * Words that tell who waits that a launch is over, by a kernel behind what was queued: for any
 * number of words, where a stream operation each would take longer.
 */
extern "C" {
#include "device.h"
}

#include <cuda_runtime.h>

namespace
{

#define WORDS 64u /* of one kernel, at most */
struct words_call {
    uint32_t count;
    ts_gpu_signal words[WORDS];
};

/* By one block. The last word is written when the others are: then their memory may go. */
__global__ void write_words(const __grid_constant__ words_call c)
{
    __threadfence_system(); /* what came before is seen by who sees a word */
    for (uint32_t i = threadIdx.x; i + 1 < c.count; i += blockDim.x)
        *(volatile uint32_t *)c.words[i].word = c.words[i].value;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x > 0)
        return;
    __threadfence_system();
    *(volatile uint32_t *)c.words[c.count - 1].word = c.words[c.count - 1].value;
}

} // namespace

extern "C" ts_status ts_gpu_load_words(ts_gpu *gpu, char *why, size_t why_bytes)
{
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaFuncAttributes attributes; /* asking for them loads the kernel */
    cudaError_t error = cudaFuncGetAttributes(&attributes, write_words);
    return error == cudaSuccess ? TS_OK : ts_gpu_fail(error, "loading a kernel", 0, why, why_bytes);
}

extern "C" ts_status ts_gpu_launch_words(ts_gpu_launch *l, const ts_gpu_signal *signals,
                                         uint32_t count, const ts_gpu_signal *end)
{
    words_call c = {};
    const uint32_t all = count + (end->word != NULL);
    ts_status status = ts_gpu_enter(l->gpu, l->why, sizeof l->why);
    for (uint32_t n = 0; n < all && status == TS_OK;) {
        for (c.count = 0; n < all && c.count < WORDS; n++)
            c.words[c.count++] = n < count ? signals[n] : *end;
        write_words<<<1, 64, 0, l->stream>>>(c);
        status = ts_gpu_launch_fail(l, cudaGetLastError());
    }
    return status;
}
