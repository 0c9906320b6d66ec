/*
 * Block tables of sequences as steps' begins told of them, so that a begin need only tell what is
 * new.
 *
 * Thread: the client's.
 */
#ifndef TS_BLOCK_TABLE_CACHE_H
#define TS_BLOCK_TABLE_CACHE_H

#include "client.h"

/* A sequence's block table as a step's begin told of it. */
typedef struct ts_table {
    ts_seq seq;
    uint64_t known_step; /* the step that told of it last; 0: nothing is known */
    uint32_t *blocks;
    uint32_t count, room;
} ts_table;

/* What this process learns of one sequence's block table: `count` entries from `first` on. Those
 * from `touched` on get new tokens. */
typedef struct ts_table_delta {
    ts_seq seq;
    uint32_t first, count, touched;
    const uint32_t *blocks;
} ts_table_delta;

/* Which step's begin told of each sequence's table last, for the daemon to tell what is new. */
void ts_tables_known_steps(const ts_pool *pool, const ts_seq *seqs, uint32_t count,
                           uint64_t *steps);

/* Notes what the step's begin tells, and maps those blocks. *blocks: the whole table, until the
 * next begin with the sequence. */
ts_status ts_tables_update(ts_pool *pool, uint64_t step, const ts_table_delta *delta,
                           const uint32_t **blocks);

/* These sequences are freed. */
void ts_tables_forget(ts_pool *pool, const ts_seq *seqs, uint32_t count);
void ts_tables_fini(ts_pool *pool);

#endif
