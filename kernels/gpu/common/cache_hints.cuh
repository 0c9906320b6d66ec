/*
 * What the second-level cache is told of the memory that attention touches. K and V are read once
 * and leave it first; partial results, and outputs if they are few, which the next launch writes to
 * the same places, leave it last: so they are seldom written to memory, which in between reads
 * costs some five times what reading as much does (kernels/doc/).
 */
#ifndef TS_GPU_CACHE_HINTS_CUH
#define TS_GPU_CACHE_HINTS_CUH

#include <stdint.h>

namespace cache_hints
{

typedef uint64_t priority; /* in the cache */

__device__ inline priority leaves_first()
{
    priority p;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
    return p;
}
__device__ inline priority leaves_last()
{
    priority p;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
    return p;
}

/* The first `bytes` of 16 into shared memory, asynchronously; what is left of them becomes 0. */
__device__ inline void copy_async(uint32_t to, const void *from, uint32_t bytes, bool once)
{
    if (once)
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
                     "l"(from), "r"(bytes), "l"(leaves_first())
                     : "memory");
    else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                     "r"(bytes)
                     : "memory");
}
/* All 16 of them. */
__device__ inline void copy_async(uint32_t to, const void *from, bool once)
{
    if (once)
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to),
                     "l"(from), "l"(leaves_first())
                     : "memory");
    else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void store(float *to, float4 x, bool keep)
{
    if (keep)
        asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
                     "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "l"(leaves_last())
                     : "memory");
    else
        __stcg((float4 *)to, x);
}
__device__ inline void store(void *to, uint4 x, bool keep)
{
    if (keep)
        asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
                     "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "l"(leaves_last())
                     : "memory");
    else
        __stcg((uint4 *)to, x);
}
__device__ inline void store(void *to, ushort4 x, bool keep)
{
    if (keep)
        asm volatile("st.global.L2::cache_hint.v4.u16 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
                     "h"(x.x), "h"(x.y), "h"(x.z), "h"(x.w), "l"(leaves_last())
                     : "memory");
    else
        __stcg((ushort4 *)to, x);
}

} // namespace cache_hints

#endif
