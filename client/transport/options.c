/* The public structs' sizes, and the version: what a program and the library it loads agree on. */
#include "options.h"

#include "error.h"
#include "tinyserve_version.h"

#include <string.h>

#define OPTIONS_BYTES_MAX 4096u /* no header's struct has more: a size beyond was never set */

typedef struct public_struct {
    const char *name, *init; /* the initialiser of options */
    size_t bytes;
} public_struct;

static const public_struct structs[] = {
    [TS_STRUCT_OPTIONS] = {"ts_options", "TS_OPTIONS_INIT", sizeof(ts_options)},
    [TS_STRUCT_STEP_OPTIONS] = {"ts_step_options", "TS_STEP_OPTIONS_INIT", sizeof(ts_step_options)},
    [TS_STRUCT_RUN_OPTIONS] = {"ts_run_options", "TS_RUN_OPTIONS_INIT", sizeof(ts_run_options)},
    [TS_STRUCT_FRAME_OPTIONS] = {"ts_frame_options", "TS_FRAME_OPTIONS_INIT",
                                 sizeof(ts_frame_options)},
    [TS_STRUCT_SEQ_OPTIONS] = {"ts_seq_options", "TS_SEQ_OPTIONS_INIT", sizeof(ts_seq_options)},
    [TS_STRUCT_KEEP_OPTIONS] = {"ts_keep_options", "TS_KEEP_OPTIONS_INIT", sizeof(ts_keep_options)},
    {"ts_geometry", NULL, sizeof(ts_geometry)},
    {"ts_kv", NULL, sizeof(ts_kv)},
    {"ts_kept", NULL, sizeof(ts_kept)},
    {"ts_error_info", NULL, sizeof(ts_error_info)},
    {"ts_pool_room", NULL, sizeof(ts_pool_room)},
    {"ts_pool_info", NULL, sizeof(ts_pool_info)},
};

const char *ts_version(void)
{
    return TS_VERSION;
}

size_t ts_struct_bytes(const char *name)
{
    for (size_t i = 0; i < sizeof structs / sizeof *structs; i++)
        if (strcmp(structs[i].name, name) == 0)
            return structs[i].bytes;
    return 0;
}

ts_status ts_options_read(ts_client *c, ts_options_struct which, const void *options, void *out)
{
    const public_struct *known = &structs[which];
    const unsigned char *bytes = options;
    size_t size;
    memset(out, 0, known->bytes);
    if (options == NULL)
        return TS_OK;
    memcpy(&size, options, sizeof size);
    if (size < sizeof size || size > OPTIONS_BYTES_MAX)
        return ts_fail(c, TS_EINVAL, "%s has a size of %zu: initialise it with %s", known->name,
                       size, known->init);
    for (size_t i = known->bytes; i < size; i++)
        if (bytes[i] != 0)
            return ts_fail(c, TS_EINVAL,
                           "%s has %zu bytes, of which libtinyserve " TS_VERSION
                           " knows %zu, and byte %zu isn't 0: it asks for what a later version has",
                           known->name, size, known->bytes, i);
    memcpy(out, options, size < known->bytes ? size : known->bytes);
    return TS_OK;
}

ts_status ts_elements_check(ts_client *c, const char *name, size_t bytes, size_t known)
{
    if (bytes >= known && bytes <= OPTIONS_BYTES_MAX)
        return TS_OK;
    return ts_fail(c, TS_EINVAL, "elements of %zu bytes; a %s has %zu", bytes, name, known);
}

void ts_element_put(void *array, size_t bytes, size_t i, const void *element, size_t known)
{
    unsigned char *to = (unsigned char *)array + i * bytes;
    memcpy(to, element, known);
    memset(to + known, 0, bytes - known);
}
