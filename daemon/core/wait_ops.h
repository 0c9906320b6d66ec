/* What the engine does with sessions that wait (waits.h).
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_WAIT_OPS_H
#define TS_WAIT_OPS_H

#include "engine.h"

/* Appends the session, which is in no such list, or takes it out. */
void ts_waits_add(ts_engine *engine, ts_wait_list *list, uint32_t session);
void ts_waits_remove(ts_engine *engine, ts_wait_list *list, uint32_t session);

/* The event has come: the session is woken, if it isn't yet. */
void ts_waits_wake(ts_engine *engine, uint32_t session);

/* Its command is applied again: it is no longer woken. */
void ts_waits_answered(ts_engine *engine, ts_session *session);

/* The session waits no more. */
void ts_waits_end(ts_engine *engine, ts_session *session);

/* The session waits until the pool has `blocks` blocks for it; if it waits for room already, it
 * keeps its place. */
void ts_waits_for_room(ts_engine *engine, ts_session *session, uint32_t pool, uint32_t blocks);

/* How many of the pool's blocks a step of this session, which needs `blocks`, may not have, since
 * others wait for them. */
uint64_t ts_waits_withheld(const ts_engine *engine, const ts_session *session, uint32_t pool,
                           uint64_t blocks, bool is_small);

/* The pool or a limit of its tenants has changed: wakes all that wait for room in it, for some may
 * never get it now. */
void ts_waits_look_again(ts_engine *engine, uint32_t pool);

/* Wakes the heads of queues for which there is room. */
void ts_waits_look_for_room(ts_engine *engine);

#endif
