#include "public_structs.h"

#include <string.h>

#define OPTIONS(type, init)                                                                        \
    {                                                                                              \
#type, #init, sizeof(type), 0                                                              \
    }
#define RESULT(type, init, first_bytes)                                                            \
    {                                                                                              \
#type, init, sizeof(type), first_bytes                                                     \
    }

const ts_public_struct_info ts_public_structs[] = {
    [TS_STRUCT_OPTIONS] = OPTIONS(ts_options, TS_OPTIONS_INIT),
    [TS_STRUCT_STEP_OPTIONS] = OPTIONS(ts_step_options, TS_STEP_OPTIONS_INIT),
    [TS_STRUCT_RUN_OPTIONS] = OPTIONS(ts_run_options, TS_RUN_OPTIONS_INIT),
    [TS_STRUCT_FRAME_OPTIONS] = OPTIONS(ts_frame_options, TS_FRAME_OPTIONS_INIT),
    [TS_STRUCT_SEQ_OPTIONS] = OPTIONS(ts_seq_options, TS_SEQ_OPTIONS_INIT),
    [TS_STRUCT_KEEP_OPTIONS] = OPTIONS(ts_keep_options, TS_KEEP_OPTIONS_INIT),
    [TS_STRUCT_KEPT] = RESULT(ts_kept, NULL, 152),
    [TS_STRUCT_POOL_INFO] = RESULT(ts_pool_info, NULL, 124),
    [TS_STRUCT_ERROR_INFO] = RESULT(ts_error_info, "TS_ERROR_INFO_INIT", 64),
    [TS_STRUCT_POOL_ROOM] = RESULT(ts_pool_room, "TS_POOL_ROOM_INIT", 96),
    {"ts_geometry", NULL, sizeof(ts_geometry), 0},
    {"ts_kv", NULL, sizeof(ts_kv), 0},
};

const char *ts_version(void)
{
    return TS_VERSION;
}

size_t ts_struct_bytes(const char *name)
{
    for (size_t i = 0; i < sizeof ts_public_structs / sizeof *ts_public_structs; i++)
        if (strcmp(ts_public_structs[i].name, name) == 0)
            return ts_public_structs[i].bytes;
    return 0;
}

bool ts_result_fits(ts_public_struct which, size_t bytes)
{
    return bytes >= ts_public_structs[which].first_bytes && bytes <= TS_STRUCT_BYTES_MAX;
}

void ts_result_put(ts_public_struct which, void *to, size_t bytes, const void *from)
{
    const size_t all = ts_public_structs[which].bytes, known = all < bytes ? all : bytes;
    memcpy(to, from, known);
    memset((unsigned char *)to + known, 0, bytes - known);
}
