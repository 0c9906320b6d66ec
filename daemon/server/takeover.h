/*
 * What a daemon takes over from one before it: the books, the pools' memory, the sessions. Where
 * nobody holds descriptors (store/store.h), or what was left can't be used, it begins with nothing.
 *
 * Thread: main's, before the engine runs.
 */
#ifndef TS_TAKEOVER_H
#define TS_TAKEOVER_H

#include "config.h"
#include "server.h"

/* The service's engine and, if the store holds anything, its books. False, logged: neither can be
 * had. */
bool ts_takeover_begin(ts_service *service, ts_store *store, const ts_config *config);

/* Takes over the pools and the sessions, drops what is stored and belongs to nothing, and adds the
 * pools that only the configuration has. Not TS_OK: it is logged. */
ts_status ts_takeover_pools(ts_service *service, const ts_config *config);

#endif
