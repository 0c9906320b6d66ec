/*
 * What the operator asks about a pool: occupancy, sharing, fragmentation, whose each block is. It
 * takes a walk over all sequences and blocks, which is made bit by bit: what changes meanwhile is
 * seen or not.
 *
 * Thread: the engine's.
 */
#ifndef TS_POOL_STATS_H
#define TS_POOL_STATS_H

#include "engine.h"

#define TS_HISTOGRAM_BINS 32

/* Whose things somebody may see: everybody's, or one tenant's (TS_NONE: nobody's). Totals are for
 * all. */
typedef struct ts_view {
    bool all;
    uint32_t tenant;
} ts_view;

static inline bool ts_view_sees(ts_view view, uint32_t tenant)
{
    return view.all || (tenant != TS_NONE && tenant == view.tenant);
}

/* Lengths of sequences. */
typedef struct ts_pool_stats_lengths {
    uint32_t longest;
    uint64_t bins[TS_HISTOGRAM_BINS]; /* bin i: [2^i, 2^(i+1)); bin 0 has length 0 too */
} ts_pool_stats_lengths;

/* Whose a block is, as PoolMapReply (tinyserve.proto) counts owners: who has it in a sequence's
 * table or in an open step's. */
enum { TS_OWNER_NONE = 0, TS_OWNER_KEPT = 1, TS_OWNER_SEVERAL = 2, TS_OWNER_SESSIONS = 3 };

/* Some blocks that follow one another. */
typedef struct ts_pool_stats_cell {
    uint32_t used, shared; /* blocks */
    uint32_t cached;       /* blocks, none of them used */
    uint32_t owner;        /* of all of them */
    uint32_t tenant;       /* whose they are; TS_NONE: several tenants' or nobody's */
    uint64_t tokens;       /* stored in them */
} ts_pool_stats_cell;

#define TS_POOL_STATS_CELLS_MAX 65536u

/* Where a walk is. */
typedef struct ts_pool_stats_place {
    enum {
        TS_POOL_STATS_SEQUENCES,
        TS_POOL_STATS_STEPS,
        TS_POOL_STATS_BLOCKS,
        TS_POOL_STATS_DONE
    } part;
    uint32_t index; /* of the sequence, the step or the block */
    uint32_t entry; /* of its table */
} ts_pool_stats_place;

typedef struct ts_pool_stats {
    uint64_t stored_tokens;                /* each token in memory once */
    uint64_t seen_tokens;                  /* sum of the lengths */
    uint64_t used_slots;                   /* slots in used blocks */
    uint64_t reserved_slots;               /* slots in blocks that only open steps hold */
    uint64_t table_blocks;                 /* sum of the block tables */
    uint64_t free_runs[TS_HISTOGRAM_BINS]; /* runs of free and cached blocks, by length */
    ts_pool_stats_lengths *lengths;        /* by tenant */
    uint32_t num_tenants, num_blocks;
    ts_pool_stats_cell *cells; /* of cell_blocks blocks each, the last one of fewer */
    uint32_t num_cells, cell_blocks;
    /* the walk */
    uint16_t *fill;   /* tokens stored in each block; until it is done */
    uint32_t *owners; /* of each block; the same */
    uint32_t pool, run;
    ts_pool_stats_place at;
} ts_pool_stats;

/* A walk that has not begun. NULL: out of memory. */
ts_pool_stats *ts_pool_stats_new(const ts_engine *engine, uint32_t pool);
void ts_pool_stats_free(ts_pool_stats *stats);

/* About how many table entries and blocks a walk over the pool looks at. */
uint64_t ts_pool_stats_cost(const ts_engine *engine, uint32_t pool);

/* Looks at up to `entries` more table entries and blocks. True: it is done. */
bool ts_pool_stats_go_on(ts_pool_stats *stats, const ts_engine *engine, uint32_t entries);

/* The lengths of the sequences that may be seen. */
ts_pool_stats_lengths ts_pool_stats_lengths_of(const ts_pool_stats *stats, ts_view view);

/* The owner of what belongs to both. */
static inline uint32_t ts_owner_of_both(uint32_t a, uint32_t b)
{
    return a == b || b == TS_OWNER_NONE ? a : a == TS_OWNER_NONE ? b : (uint32_t)TS_OWNER_SEVERAL;
}

#endif
