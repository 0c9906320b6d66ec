/*
 * Descriptors that are asked for at the handle socket (proto/handle_wire.h).
 *
 * Thread: the client's.
 */
#ifndef TS_FD_CLIENT_H
#define TS_FD_CLIENT_H

#include "client.h"

/* A descriptor from the handle socket; the caller's. pool and slab for TS_HANDLE_SLAB. After an
 * error reply->status is TS_OK, unless the daemon has refused it: it may have done its part, or may
 * do it yet. */
ts_status ts_handle_get(ts_client *client, enum ts_handle_kind kind, uint32_t pool, uint32_t slab,
                        bool writable, ts_handle_reply *reply, int *fd);

/* Memory of the daemon's making that this process must fill; the caller's. */
ts_status ts_handle_new(ts_client *client, enum ts_handle_kind kind, uint64_t bytes, int *fd);

/* A request whose reply brings no descriptor. */
ts_status ts_handle_tell(ts_client *client, enum ts_handle_kind kind);
void ts_handles_close(ts_client *client);

#endif
