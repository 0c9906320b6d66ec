/*
 * Inside kernels/gpu: which sequences of a batch have blocks in common, and with whom each goes
 * through common pieces of work. Plain C without a device; the planner fills in what it knows of
 * the sequences, and owns the result.
 *
 * Sequences that begin with the same blocks (a prefix, a fork) have the same K and V there. Those
 * whose contexts are cut into chunks alike may be a team: a chunk that all members have in common
 * is one piece of work. Who is in a team changes how often K and V are read, and no bit of any
 * result. So teams may be found by any rule, but what they are said to share they must share:
 * tables are compared, entry by entry.
 */
#ifndef TS_GPU_SHARING_H
#define TS_GPU_SHARING_H

#include <stdbool.h>
#include <stdint.h>

/* One sequence of a batch. */
typedef struct ts_sharer {
    const uint32_t *blocks; /* its table; not read if it has none */
    uint32_t num_blocks;
    uint32_t alike; /* found: blocks that another one begins with too, as far as is known */
    uint32_t chunk_tokens, chunks; /* the first ones, that others may have in common with it; 0: it
                                      wants no team */
    uint32_t rows;                 /* that it takes of a team's */
    uint32_t shared;               /* found: chunks that its team has in common; 0: it is in none */
    uint32_t key;                  /* private */
} ts_sharer;

typedef struct ts_team {
    uint32_t first, count; /* among all teams' members */
    uint32_t chunks;       /* that they have in common: at least 1 */
} ts_team;

typedef struct ts_sharing {
    ts_sharer *seqs;
    uint32_t num_seqs;
    ts_team *teams;
    uint32_t num_teams;
    uint32_t *members; /* numbers of sequences, team by team */
    uint32_t num_members;
    uint64_t pieces; /* of all teams: a chunk of each */
    uint64_t spared; /* tokens whose K and V aren't read, since another member reads them */
    void *memory;    /* private, as what follows */
    uint32_t *found, places, *next, *line, *common, *size, *saved;
} ts_sharing;

/* Makes room for `num_seqs` sequences, all fields 0; ts_sharing_fini frees it. -1: no memory. */
int ts_sharing_init(ts_sharing *s, uint32_t num_seqs);

/* Of the sequences' tables alone: finds `alike`, by comparing each with the first that begins with
 * the same block. False: no two begin so, and there is nothing to share. */
bool ts_sharing_compare(ts_sharing *s);

/* Then, of those that begin alike, chunks and rows known: finds teams of `rows` rows at most, in
 * blocks of block_tokens. What it costs grows with the number of sequences and with the blocks that
 * they share. */
void ts_sharing_find(ts_sharing *s, uint32_t block_tokens, uint32_t rows);

/* There are to be no teams: they spare too little. */
void ts_sharing_drop(ts_sharing *s);

void ts_sharing_fini(ts_sharing *s);

#endif
