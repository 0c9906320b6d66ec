/*
 * Host memory that is mapped into this process: what it fills for the daemon, and who holds
 * what.
 */
#ifndef TS_HOST_MEMORY_H
#define TS_HOST_MEMORY_H

#include "client.h"

/* Has the daemon make memory of whole pages (TS_HANDLE_NEW_...), allocates all of it, so that this
 * process is charged with it, and maps it. *base is the caller's. */
ts_status ts_memory_fill(ts_client *client, enum ts_handle_kind kind, const char *what,
                         size_t bytes, void **base);

/* Memory that was mapped, with one holder; the last one's release unmaps it. NULL: no memory. */
ts_memory *ts_memory_new(void *base, size_t bytes);

#endif
