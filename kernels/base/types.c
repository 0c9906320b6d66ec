#include "dtypes.h"

#include <stdio.h>

static size_t gcd(size_t a, size_t b)
{
    while (b != 0) {
        size_t r = a % b;
        a = b;
        b = r;
    }
    return a;
}

uint32_t ts_geometry_slab_blocks(const ts_geometry *g, size_t slab_bytes, size_t granule)
{
    size_t block = ts_geometry_block_bytes(g);
    size_t unit = granule / gcd(block, granule); /* fewest blocks that fill whole granules */
    /* NOLINTNEXTLINE(clang-analyzer-core.DivideZero): a block and a granule have bytes */
    size_t units = slab_bytes / (unit * block), most = UINT32_MAX / unit;
    units = units > most ? most : units;
    return (uint32_t)(unit * (units > 0 ? units : 1));
}

static ts_status check_range(const char *field, uint32_t value, uint32_t min, uint32_t max,
                             char *why, size_t why_bytes)
{
    if (value >= min && value <= max)
        return TS_OK;
    snprintf(why, why_bytes, "%s is %u; the limits are %u..%u", field, value, min, max);
    return TS_EINVAL;
}

ts_status ts_geometry_check(const ts_geometry *g, char *why, size_t why_bytes)
{
    if (check_range("layers", g->layers, 1, TS_LAYERS_MAX, why, why_bytes) ||
        check_range("kv_heads", g->kv_heads, 1, TS_HEADS_MAX, why, why_bytes) ||
        check_range("head_dim", g->head_dim, TS_HEAD_DIM_MIN, TS_HEAD_DIM_MAX, why, why_bytes) ||
        check_range("block_tokens", g->block_tokens, 1, TS_BLOCK_TOKENS_MAX, why, why_bytes))
        return TS_EINVAL;
    if (ts_dtype_check(g->dtype, why, why_bytes))
        return TS_EINVAL;
    if (g->layout != TS_LAYOUT_NHD && g->layout != TS_LAYOUT_HND) {
        snprintf(why, why_bytes, "layout is %d; known are nhd (0) and hnd (1)", (int)g->layout);
        return TS_EINVAL;
    }
    return TS_OK;
}

const char *ts_status_name(ts_status status)
{
    static const char *const names[] = {
        [TS_OK] = "TS_OK",
        [TS_EINVAL] = "TS_EINVAL",
        [TS_ENOENT] = "TS_ENOENT",
        [TS_EEXIST] = "TS_EEXIST",
        [TS_ENOSPC] = "TS_ENOSPC",
        [TS_EQUOTA] = "TS_EQUOTA",
        [TS_EBUSY] = "TS_EBUSY",
        [TS_EPERM] = "TS_EPERM",
        [TS_ESTALE] = "TS_ESTALE",
        [TS_EPROTO] = "TS_EPROTO",
        [TS_ENOMEM] = "TS_ENOMEM",
        [TS_ECONN] = "TS_ECONN",
        [TS_ETIMEOUT] = "TS_ETIMEOUT",
        [TS_EDEVICE] = "TS_EDEVICE",
        [TS_EINTERNAL] = "TS_EINTERNAL",
    };
    size_t i = (size_t)status;
    return i < sizeof names / sizeof names[0] ? names[i] : "unknown status";
}
