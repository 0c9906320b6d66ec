/*
 * The engine's state, and the answers beside it, as bytes: a point in time, from which a journal
 * goes on.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_SNAPSHOT_H
#define TS_SNAPSHOT_H

#include "answers.h"

/* Writes them; with writer->at NULL only counts. False: out of memory. */
bool ts_snapshot_write(const ts_engine *engine, const ts_answers *answers,
                       ts_record_writer *writer);

/* The engine and the answers (which this initialises) of a snapshot. Else *engine is NULL, with a
 * sentence in `why`: TS_EPROTO, it can't be read; TS_ENOMEM. */
ts_status ts_snapshot_read(const void *bytes, uint64_t count, ts_engine **engine,
                           ts_answers *answers, char *why, size_t why_bytes);

#endif
