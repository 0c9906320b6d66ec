/*
 * Host memory that is mapped into this process: what it makes to be given to the daemon, and who
 * holds what.
 */
#ifndef TS_HOST_MEMORY_H
#define TS_HOST_MEMORY_H

#include "client.h"

/* Makes memory to be given to the daemon: a memfd of whole pages, all of them there and charged to
 * this process, mapped and all 0. The daemon seals it. Both *fd and *base are the caller's. */
ts_status ts_memory_make(ts_client *client, const char *what, size_t bytes, int *fd, void **base);

/* Memory that was mapped, with one holder; the last one's release unmaps it. NULL: no memory. */
ts_memory *ts_memory_new(void *base, size_t bytes);

#endif
