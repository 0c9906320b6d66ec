/*
 * What is known of each element type, in one table, and what follows from it for the types of q, k,
 * v and out and for scales. How elements are converted is convert.h's.
 */
#ifndef TS_DTYPES_H
#define TS_DTYPES_H

#include "tinyserve_types.h"

#include <stdbool.h>

#define TS_DTYPE_COUNT 4

/* Stands where types are told apart in a way in which the compiler misses none: a new type doesn't
 * compile before it is told apart there, too. */
#ifdef __cplusplus
#define TS_KNOWS_DTYPES(count) static_assert((count) == TS_DTYPE_COUNT, "a dtype is missing here")
#else
#define TS_KNOWS_DTYPES(count) _Static_assert((count) == TS_DTYPE_COUNT, "a dtype is missing here")
#endif

typedef struct ts_dtype_facts {
    const char *name;
    uint32_t io;    /* bit n: q, k, v and out may be of type n beside a cache of this type */
    bool is_scaled; /* a run may pass scales for a cache of this type */
} ts_dtype_facts;

/* NULL: there is no such type. */
const ts_dtype_facts *ts_dtype_find(ts_dtype dtype);

/* Whether there is such a type: TS_EINVAL with a sentence that names those that there are. */
TS_WARN_UNUSED ts_status ts_dtype_check(uint32_t dtype, char *why, size_t why_bytes);

/* Whether q, k, v and out may be of type `io` beside the cache, and whether a run may pass scales
 * for it: TS_EINVAL with a sentence that names the types for which they may. */
TS_WARN_UNUSED ts_status ts_dtype_io_check(uint32_t io, ts_dtype cache, char *why,
                                           size_t why_bytes);
TS_WARN_UNUSED ts_status ts_dtype_scales_check(ts_dtype cache, char *why, size_t why_bytes);

#endif
