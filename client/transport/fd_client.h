/*
 * Descriptors that are asked for and given at the handle socket (proto/handle_wire.h).
 *
 * Thread: the client's.
 */
#ifndef TS_FD_CLIENT_H
#define TS_FD_CLIENT_H

#include "client.h"

/* A descriptor from the handle socket; the caller's. pool and slab for TS_HANDLE_SLAB. */
ts_status ts_handle_get(ts_client *client, enum ts_handle_kind kind, uint32_t pool, uint32_t slab,
                        bool writable, ts_handle_reply *reply, int *fd);

/* Gives the daemon a descriptor, which stays the caller's too. */
ts_status ts_handle_give(ts_client *client, enum ts_handle_kind kind, int given,
                         ts_handle_reply *reply);
void ts_handles_close(ts_client *client);

#endif
