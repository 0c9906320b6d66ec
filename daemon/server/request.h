/*
 * Requests: looking up who asks, answering repeated ones from memory, having the engine and the
 * kernels do what they ask for, sending the answers.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_REQUEST_H
#define TS_REQUEST_H

#include "server.h"

/* Makes the queue, the engine and the tables of a service that is all 0. False: out of memory;
 * ts_service_fini frees what was made. */
bool ts_service_init(ts_service *service, const ts_engine_limits *limits);

/* The same with an engine that exists, which becomes the service's; NULL: false. */
bool ts_service_init_with(ts_service *service, ts_engine *engine);

/* The `run` of a ts_request. */
void ts_service_request(ts_work *work, void *service);

#endif
