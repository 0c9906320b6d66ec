/*
 * The last answer of each session, found by its call's number: a client that hasn't got the
 * answer asks again, with the same number, and gets it without the command being applied again.
 *
 * Kept by whoever replays a journal. A client has one call under way, so one answer a session is
 * enough; it is bounded by what one command may ask for. Operators' orders are calls of their
 * sessions, too.
 *
 * Thread: one at a time.
 */
#ifndef TS_ANSWERS_H
#define TS_ANSWERS_H

#include "records.h"

typedef struct ts_answers {
    struct ts_kept_answer *all; /* by a session's index */
    uint32_t max;
} ts_answers;

/* Makes room for the answers of `sessions` sessions. False: out of memory. */
bool ts_answers_init(ts_answers *answers, uint32_t sessions);
void ts_answers_fini(ts_answers *answers);

/* Keeps the answer that the command was given, if it is one that is kept: in place of the session's
 * last. False: out of memory. */
bool ts_answers_note(ts_answers *answers, const ts_command *command, const ts_answer *answer);

/* Whether the command repeats the session's last call. Then *answer is as it was, and points into
 * the table; a ticket is put into the command. */
bool ts_answers_find(const ts_answers *answers, const ts_engine *engine, ts_command *command,
                     ts_answer *answer);

/* The *count new sequences that the session's last call made, if it was this one, and their pool;
 * NULL: none. */
const uint64_t *ts_answers_find_made(const ts_answers *answers, uint64_t session, uint64_t call,
                                     uint32_t *pool, uint32_t *count);

/* Whether the caller's last call was this order, and was carried out. Then *answer is as it was. */
bool ts_answers_find_order(const ts_answers *answers, const ts_caller *by, ts_op op,
                           ts_answer *answer);

void ts_answers_write(const ts_answers *answers, ts_record_writer *writer);
bool ts_answers_read(ts_answers *answers, ts_record_reader *reader);

#endif
