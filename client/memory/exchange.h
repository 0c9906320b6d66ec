/*
 * The exchange, where q, k, v and out of the session's steps lie: host or device memory that the
 * daemon has too, in regions, one for each step.
 *
 * Thread: the client's.
 */
#ifndef TS_EXCHANGE_H
#define TS_EXCHANGE_H

#include "client.h"

/* Makes an exchange of host memory, in place of the one there is; or of a GPU's. */
ts_status ts_exchange_host(ts_client *client, size_t bytes);
void ts_exchange_close(ts_client *client);

/* Takes `region->bytes` of the exchange, growing it if need be, and links the region. */
ts_status ts_exchange_take(ts_client *client, ts_region *region);
void ts_exchange_give(ts_client *client, ts_region *region);

#endif
