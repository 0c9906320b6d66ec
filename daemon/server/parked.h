/*
 * Requests and rings' entries that wait (core/waits.h): parked until the engine wakes their session
 * or their time is over, and then carried out again.
 *
 * A session has one at most. Those of one user hold TS_PARKED_BYTES at most, a part of what its
 * requests in progress may hold together, so that what they wait for can still come in.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_PARKED_H
#define TS_PARKED_H

#include "server.h"

#define TS_PARKED_BYTES (16u << 20)
#define TS_WAIT_MS_MAX 3600000u

/* Before a command that may wait for wait_ms is carried out: sets whether it was tried before, and
 * whether it may still wait. False, and the answer says why: it may not wait at all. */
bool ts_parked_prepare(const ts_service *service, const ts_connection *connection,
                       const ts_parked *parked, uint32_t wait_ms, ts_command *command,
                       ts_answer *answer);

/* Parks it: it waits. Its go_on and drop are set. */
void ts_parked_add(ts_service *service, ts_connection *connection, ts_parked *parked,
                   uint32_t wait_ms);

/* How long the request that has waited longest has waited; 0: none waits. */
uint64_t ts_parked_longest_ms(const ts_service *service);

/* Carries out again those whose sessions were woken. */
void ts_parked_wake(ts_service *service);

/* The `run` of the service's alarm: whoever's time is over goes on. */
void ts_parked_alarm(ts_work *work, void *service);

/* Carries all out again, as if their time were over. */
void ts_parked_hurry_all(ts_service *service);

#endif
