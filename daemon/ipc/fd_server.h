/*
 * The handle socket: a Unix socket beside NNG's that passes file descriptors. One thread takes the
 * requests, one of each connection in turn, and has the engine decide them.
 *
 * What a client may hold here is bounded (peer_limits.h), and a connection that has not been given
 * a descriptor within `idle_ms` is ended.
 *
 * Thread: started and stopped by main.
 */
#ifndef TS_FD_SERVER_H
#define TS_FD_SERVER_H

#include "peer_limits.h"
#include "server.h"

typedef struct ts_fd_server ts_fd_server;

typedef struct ts_fd_server_options {
    const char *path; /* of the socket */
    uint32_t mode;    /* of its file */
    uint32_t connections_max, tenant_connections_max, idle_ms;
} ts_fd_server_options;

/* Listens. A sentence in `why` if that can't be done. */
ts_status ts_fd_server_start(ts_service *service, const ts_fd_server_options *options,
                             ts_fd_server **out, char *why, size_t why_bytes);

/* Stops listening and removes the socket. While the service still answers. */
void ts_fd_server_stop(ts_fd_server *server);

#endif
