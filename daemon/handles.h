/*
 * The handle socket: a Unix socket beside NNG's that passes file descriptors. One thread takes the
 * requests, one after another a connection, and has the engine decide them.
 *
 * Thread: started and stopped by main.
 */
#ifndef TS_HANDLES_H
#define TS_HANDLES_H

#include "service.h"
#include "transport.h"

typedef struct ts_handles ts_handles;

/* Listens at service->handle_path with this file mode. A sentence in `why` if that can't be done.
 */
ts_status ts_handles_start(ts_service *service, ts_transport *transport, uint32_t mode,
                           ts_handles **out, char *why, size_t why_bytes);

/* Stops listening and removes the socket. While the service still answers. */
void ts_handles_stop(ts_handles *handles);

#endif
