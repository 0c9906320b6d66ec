/*
 * A copy of the engine that follows the journal: read from the last snapshot, then each published
 * entry is applied to it. A restart serves with one; the books' follower writes snapshots of one.
 *
 * Thread: one owns a replica. It reads the journal as the journal's reader.
 */
#ifndef TS_REPLICA_H
#define TS_REPLICA_H

#include "answers.h"
#include "journal.h"

typedef struct ts_replica {
    ts_engine *engine;
    ts_answers answers;
    uint64_t position; /* in the journal */
} ts_replica;

/* The last snapshot's engine and answers; `areas` are the files of snapshots. On an error *why is a
 * sentence. Free the replica also after an error. */
ts_status ts_replica_read(ts_replica *replica, const ts_journal *journal, const int areas[TS_AREAS],
                          char *why, size_t why_bytes);

/* Applies what is published to the replica; *entries counts. TS_EPROTO, with a sentence: the
 * outcome of an entry isn't what it was before. */
ts_status ts_replica_follow(ts_replica *replica, const ts_journal *journal, uint64_t *entries,
                            char *why, size_t why_bytes);

/* Frees what it has; it is empty then. */
void ts_replica_free(ts_replica *replica);

#endif
