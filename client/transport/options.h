/*
 * The caller's structs of options, which may be of an older or a newer header than this library.
 */
#ifndef TS_OPTIONS_H
#define TS_OPTIONS_H

#include "client.h"

/* Which struct of options. */
typedef enum ts_options_struct {
    TS_STRUCT_OPTIONS,
    TS_STRUCT_STEP_OPTIONS,
    TS_STRUCT_RUN_OPTIONS,
    TS_STRUCT_FRAME_OPTIONS,
    TS_STRUCT_SEQ_OPTIONS,
    TS_STRUCT_KEEP_OPTIONS
} ts_options_struct;

/* Copies a caller's options, of whichever size its header gave them, into a struct of this
 * library's; NULL: all are 0. */
ts_status ts_options_read(ts_client *client, ts_options_struct which, const void *options,
                          void *out);

/* Elements that a call fills in may be of another header's size, too: `bytes` of each, of which
 * this library knows `known`. TS_EINVAL: that is no such size. */
ts_status ts_elements_check(ts_client *client, const char *name, size_t bytes, size_t known);

/* Stores element i of an array of such; what this library doesn't know is 0. */
void ts_element_put(void *array, size_t bytes, size_t i, const void *element, size_t known);

#endif
