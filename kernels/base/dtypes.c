#include "dtypes.h"

#include <stdio.h>
#include <string.h>

#define BIT(dtype) (1u << (dtype))

TS_KNOWS_DTYPES(4); /* and in ts_dtype_bytes, of the public header */
static const ts_dtype_facts facts[TS_DTYPE_COUNT] = {
    [TS_DTYPE_FP32] = {"fp32", .io = BIT(TS_DTYPE_FP32)},
    [TS_DTYPE_FP16] = {"fp16", .io = BIT(TS_DTYPE_FP32) | BIT(TS_DTYPE_FP16)},
    [TS_DTYPE_BF16] = {"bf16", .io = BIT(TS_DTYPE_FP32) | BIT(TS_DTYPE_BF16)},
    [TS_DTYPE_FP8_E4M3] = {"fp8_e4m3",
                           .io = BIT(TS_DTYPE_FP32) | BIT(TS_DTYPE_FP16) | BIT(TS_DTYPE_BF16),
                           .is_scaled = true},
};

const ts_dtype_facts *ts_dtype_find(ts_dtype dtype)
{
    return (uint32_t)dtype < TS_DTYPE_COUNT ? &facts[dtype] : NULL;
}

const char *ts_dtype_name(ts_dtype dtype)
{
    const ts_dtype_facts *f = ts_dtype_find(dtype);
    return f != NULL ? f->name : NULL;
}

int ts_dtype_is_io(ts_dtype io, ts_dtype cache)
{
    const ts_dtype_facts *f = ts_dtype_find(cache);
    return f != NULL && ts_dtype_find(io) != NULL && (f->io & BIT(io)) != 0;
}

/* The names of the types in the set: "fp32, fp16 or bf16". */
static const char *list_names(uint32_t set, char *text, size_t bytes)
{
    text[0] = '\0';
    for (uint32_t i = 0; i < TS_DTYPE_COUNT; i++) {
        size_t used = strlen(text);
        const char *between = used == 0 ? "" : set >> (i + 1) == 0 ? " or " : ", ";
        if (set & BIT(i))
            snprintf(text + used, bytes - used, "%s%s", between, facts[i].name);
    }
    return text;
}

/* A type's name, or what an unknown one's number is. */
static const char *name_or_number(uint32_t dtype, char *text, size_t bytes)
{
    const char *name = ts_dtype_name((ts_dtype)dtype);
    if (name == NULL)
        snprintf(text, bytes, "%u", dtype);
    return name != NULL ? name : text;
}

ts_status ts_dtype_check(uint32_t dtype, char *why, size_t why_bytes)
{
    char known[64];
    if (ts_dtype_find((ts_dtype)dtype) != NULL)
        return TS_OK;
    snprintf(why, why_bytes, "dtype is %u; it must be %s", dtype,
             list_names(BIT(TS_DTYPE_COUNT) - 1, known, sizeof known));
    return TS_EINVAL;
}

ts_status ts_dtype_io_check(uint32_t io, ts_dtype cache, char *why, size_t why_bytes)
{
    char allowed[64], number[16], other[16];
    const ts_dtype_facts *f = ts_dtype_find(cache);
    if (ts_dtype_is_io((ts_dtype)io, cache))
        return TS_OK;
    snprintf(why, why_bytes, "io_dtype %s; beside a pool of %s it must be %s",
             name_or_number(io, number, sizeof number), name_or_number(cache, other, sizeof other),
             list_names(f != NULL ? f->io : 0, allowed, sizeof allowed));
    return TS_EINVAL;
}

ts_status ts_dtype_scales_check(ts_dtype cache, char *why, size_t why_bytes)
{
    char scaled[64], number[16];
    const ts_dtype_facts *f = ts_dtype_find(cache);
    uint32_t set = 0;
    if (f != NULL && f->is_scaled)
        return TS_OK;
    for (uint32_t i = 0; i < TS_DTYPE_COUNT; i++)
        set |= facts[i].is_scaled ? BIT(i) : 0;
    snprintf(why, why_bytes, "scales, but the pool is of %s; they are for %s",
             name_or_number(cache, number, sizeof number), list_names(set, scaled, sizeof scaled));
    return TS_EINVAL;
}
