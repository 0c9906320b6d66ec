/*
 * Sessions that a restarted daemon has and whose clients have yet to come back. Each goes on when
 * its process connects anew and proves that it is the session's, and ends with its process. One
 * whose process can't be seen (it lies in another namespace of pids) ends when it hasn't come back
 * for TS_RESUME_MS.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_RESUME_H
#define TS_RESUME_H

#include "server.h"

#define TS_RESUME_MS 60000u

/* When the process began, by /proc (in ticks since the boot): with the pid it tells a process from
 * all others. 0: it can't be seen. */
uint64_t ts_process_started(uint32_t pid);

/* After a restart: ends the sessions whose processes are gone, and waits for the others. From now
 * on the service's tick looks whether one of these processes has gone, or its time is over. */
void ts_resume_start(ts_service *service);

/* Has the runs on streams of the sessions that were taken over done again, by the engine's owner:
 * the first work in the queue. False: out of memory. */
bool ts_resume_runs(ts_service *service);

/* Gives the session to this connection, which has none; the session's exchange is what it was. */
void ts_resume_attach(ts_service *service, ts_connection *connection, uint64_t session);

/* Carries out the request. On success the connection has the session. */
void ts_resume(ts_service *service, ts_connection *connection, const Tspb__SessionResume *resume,
               ts_answer *answer);

/* The session of this connection's process that was opened with the nonce, and has no connection;
 * 0: there is none. */
uint64_t ts_resume_opened(const ts_service *service, const ts_connection *connection,
                          const ProtobufCBinaryData *nonce);

/* Ends the session, as the operator `by` orders, if it has yet to come back; else false. */
bool ts_resume_end(ts_service *service, uint64_t session, const char *why, const ts_caller *by);

/* Whether the session has yet to come back. */
bool ts_resume_awaits(const ts_service *service, uint64_t session);

/* How many sessions have yet to come back. */
uint32_t ts_resume_absent(const ts_service *service);

#endif
