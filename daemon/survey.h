/*
 * What the operator asks about the engine's state: occupancy, sharing, fragmentation, and whether
 * the books agree. Reads, changes nothing; costs time in proportion to the pool's sequences and
 * blocks.
 *
 * Thread: the engine's.
 */
#ifndef TS_SURVEY_H
#define TS_SURVEY_H

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

typedef struct ts_survey {
    uint64_t stored_tokens;  /* each token in memory once */
    uint64_t seen_tokens;    /* sum of the lengths */
    uint64_t used_slots;     /* slots in used blocks */
    uint64_t reserved_slots; /* slots in blocks that only open steps hold */
    uint64_t table_blocks;   /* sum of the block tables */
    /* Of the sequences that may be seen. */
    uint32_t longest;
    uint64_t lengths[TS_HISTOGRAM_BINS]; /* bin i: [2^i, 2^(i+1)); bin 0 has length 0 too */
    /* Of all. */
    uint64_t free_runs[TS_HISTOGRAM_BINS]; /* runs of free blocks, by length */
    uint16_t *fill;                        /* tokens stored in each block; the caller frees it */
} ts_survey;

ts_status ts_survey_pool(const ts_engine *engine, uint32_t pool, ts_view view, ts_survey *out);

/* Whose each block is, as PoolMapReply (tinyserve.proto) counts owners: who has it in a sequence's
 * table or in an open step's. owners has a number for every block of the pool. */
enum { TS_OWNER_NONE = 0, TS_OWNER_KEPT = 1, TS_OWNER_SEVERAL = 2, TS_OWNER_SESSIONS = 3 };
void ts_survey_owners(const ts_engine *engine, uint32_t pool, uint32_t *owners);

/* The owner of what belongs to both. */
static inline uint32_t ts_owner_of_both(uint32_t a, uint32_t b)
{
    return a == b || b == TS_OWNER_NONE ? a : a == TS_OWNER_NONE ? b : (uint32_t)TS_OWNER_SEVERAL;
}

/* Calls `problem` with a sentence for each contradiction found; returns how many objects were
 * looked at, 0 if there was no memory to look. */
uint64_t ts_survey_check(const ts_engine *engine, void (*problem)(void *arg, const char *sentence),
                         void *arg);

#endif
