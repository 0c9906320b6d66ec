/*
 * Descriptors of memory that the daemon shares with a session, asked for at the handle socket: who
 * may have what.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_FD_EXPORT_H
#define TS_FD_EXPORT_H

#include "handle_wire.h"
#include "work_queue.h"

/* Asks for a descriptor; `done` is called by the engine's owner, and *fd is then the caller's. */
typedef struct ts_handle_ask {
    ts_work work;
    ts_handle_request request;
    uint32_t uid; /* of the peer on the handle socket */
    ts_handle_reply reply;
    int fd; /* -1: there is none */
    void (*done)(struct ts_handle_ask *ask);
} ts_handle_ask;

/* The `run` of a ts_handle_ask. */
void ts_fd_export(ts_work *work, void *service);

#endif
