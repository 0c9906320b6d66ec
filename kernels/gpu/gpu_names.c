#include "gpu.h"

#include <stdio.h>
#include <string.h>

static const char *const names[] = {"auto", "v1", "v2", "v3", "v4", "v5", "tile", "mma", "wgmma"};

_Static_assert(sizeof names / sizeof *names == TS_KERNEL_COUNT, "a name for each kernel");

const char *ts_kernel_name(ts_kernel kernel)
{
    return (size_t)kernel < TS_KERNEL_COUNT ? names[kernel] : NULL;
}

ts_kernel ts_kernel_find(const char *name)
{
    size_t i = 0;
    while (i < TS_KERNEL_COUNT && strcmp(names[i], name) != 0)
        i++;
    return (ts_kernel)i;
}

ts_status ts_kernel_check(ts_kernel kernel, const ts_geometry *g, bool warp_groups, char *why,
                          size_t why_bytes)
{
    size_t row = g->head_dim * ts_dtype_bytes(g->dtype);
    if ((kernel == TS_KERNEL_MMA || kernel == TS_KERNEL_WGMMA) && g->dtype == TS_DTYPE_FP32) {
        snprintf(why, why_bytes,
                 "kernel %s multiplies on the tensor cores, which have no fp32; the cache is %s",
                 names[kernel], ts_dtype_name(g->dtype));
        return TS_EINVAL;
    }
    if (kernel == TS_KERNEL_WGMMA && !warp_groups) {
        snprintf(why, why_bytes,
                 "kernel wgmma needs compute capability 9.0 and a build for it (90a)");
        return TS_EINVAL;
    }
    bool vectors = kernel == TS_KERNEL_V4 || kernel == TS_KERNEL_V5 || kernel == TS_KERNEL_MMA ||
                   kernel == TS_KERNEL_WGMMA;
    if (!vectors || row % 16 == 0)
        return TS_OK;
    snprintf(why, why_bytes,
             "kernel %s loads rows of K and V as 16-byte vectors; a row of head_dim %u in %s has "
             "%zu bytes",
             names[kernel], g->head_dim, ts_dtype_name(g->dtype), row);
    return TS_EINVAL;
}
