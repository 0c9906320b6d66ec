/*
 * How a daemon leaves what it has to the next one (takeover.h): whoever holds its descriptors has
 * what was stored, and the process ends without undoing any of it.
 *
 * Thread: main's; ts_handover_note any.
 */
#ifndef TS_HANDOVER_H
#define TS_HANDOVER_H

#include "config.h"
#include "server.h"

/* From now on a crash is noted in the books, if there are any, before the process dies of it. */
void ts_handover_note_crashes(ts_books *books);

/* Notes a signal there that stands for why the daemon ends, as if it had crashed. */
void ts_handover_note(int signal);

/* Ends as a kill does, when the holder has what was stored; only the sockets' paths go. */
void ts_handover_leave(const ts_config *config, ts_store *store, int code)
    __attribute__((noreturn));

/* The same in the engine's turn, so that no command comes any more: a snapshot has all of them, and
 * the next daemon, which may be of another version, has none to apply. */
void ts_handover_leave_in_turn(ts_service *service, const ts_config *config, ts_store *store,
                               int code) __attribute__((noreturn));

#endif
