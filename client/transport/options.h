/*
 * Options that callers give, and sizes of what they want filled in (public_structs.h).
 *
 * Thread: the client's.
 */
#ifndef TS_OPTIONS_H
#define TS_OPTIONS_H

#include "client.h"
#include "public_structs.h"

/* Copies a caller's options, of whichever size its header gave them, into a struct of this
 * library's; NULL: all are 0. */
ts_status ts_options_read(ts_client *client, ts_public_struct which, const void *options,
                          void *out);

/* TS_EINVAL: no header's result has so many bytes. */
ts_status ts_result_check(ts_client *client, ts_public_struct which, size_t bytes);

#endif
