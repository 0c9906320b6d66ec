#include "options.h"

#include "error.h"
#include "tinyserve_version.h"

#include <string.h>

ts_status ts_options_read(ts_client *c, ts_public_struct which, const void *options, void *out)
{
    const ts_public_struct_info *known = &ts_public_structs[which];
    const unsigned char *bytes = options;
    size_t size;
    memset(out, 0, known->bytes);
    if (options == NULL)
        return TS_OK;
    memcpy(&size, options, sizeof size);
    if (size < sizeof size || size > TS_STRUCT_BYTES_MAX)
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

ts_status ts_result_check(ts_client *c, ts_public_struct which, size_t bytes)
{
    const ts_public_struct_info *known = &ts_public_structs[which];
    if (ts_result_fits(which, bytes))
        return TS_OK;
    if (known->init != NULL)
        return ts_fail(c, TS_EINVAL, "%s has a size of %zu: initialise it with %s", known->name,
                       bytes, known->init);
    return ts_fail(c, TS_EINVAL, "elements of %zu bytes; a %s has %zu", bytes, known->name,
                   known->bytes);
}
