/*
 * The public structs' sizes: what a program and the library that it loads agree on. A caller's
 * struct may be of an older or a newer header than this library.
 *
 * Thread: any.
 */
#ifndef TS_PUBLIC_STRUCTS_H
#define TS_PUBLIC_STRUCTS_H

#include "tinyserve.h"

#define TS_STRUCT_BYTES_MAX 4096u /* no header's struct has more: a size beyond was never set */

typedef enum ts_public_struct {
    TS_STRUCT_OPTIONS, /* options, which calls read */
    TS_STRUCT_STEP_OPTIONS,
    TS_STRUCT_RUN_OPTIONS,
    TS_STRUCT_FRAME_OPTIONS,
    TS_STRUCT_SEQ_OPTIONS,
    TS_STRUCT_KEEP_OPTIONS,
    TS_STRUCT_KEPT, /* results, which calls fill in */
    TS_STRUCT_POOL_INFO,
    TS_STRUCT_ERROR_INFO,
    TS_STRUCT_POOL_ROOM
} ts_public_struct;

typedef struct ts_public_struct_info {
    const char *name, *init; /* its initialiser */
    size_t bytes;
    size_t first_bytes; /* a result's, in the first header that had it: it stays when others grow */
} ts_public_struct_info;

extern const ts_public_struct_info ts_public_structs[];

/* Whether some header's result has so many bytes. */
bool ts_result_fits(ts_public_struct which, size_t bytes);

/* Fills in a caller's result of such a size; what this library doesn't know is 0. */
void ts_result_put(ts_public_struct which, void *to, size_t bytes, const void *from);

#endif
