/*
 * Steps: transactions that add tokens to a batch of sequences.
 *
 * Beginning one takes every block that the new tokens need, or none: entries behind each sequence's
 * table, and a private copy for each tail block that is shared (the table entry becomes the copy;
 * the step remembers the original). A block of the prefix index that others may still find counts
 * as shared. Committing turns them into part of the sequence and gives the excess back; aborting
 * restores every sequence as it was. While a step is open its sequences can't be changed otherwise,
 * so the plan that kernels read stays valid.
 *
 * Locking: none; the engine's owner (work_queue.h) owns the steps. The kernels read plan and tables
 * while the step has runs in flight, during which nothing here changes them.
 */
#ifndef TS_STEP_H
#define TS_STEP_H

#include "gpu.h"
#include "layer_run.h"
#include "sequence.h"

typedef struct ts_step_seq {
    uint32_t seq;          /* index */
    uint32_t start;        /* tokens before the step */
    uint32_t new_tokens;   /* 0: it is left as it is */
    uint32_t reserved;     /* blocks taken behind the table */
    uint32_t original;     /* the shared tail that was replaced by a copy, or TS_NONE */
    uint32_t known;        /* new tokens, from the first on, whose ids are known */
    const uint32_t *table; /* the sequence's, reserved blocks included */
} ts_step_seq;

typedef struct ts_step {
    uint64_t id;
    uint64_t call;          /* that began it, by the client's count; 0: it has none */
    uint32_t session, pool; /* indices */
    uint32_t prev, next;    /* of the same session; next also links free entries */
    uint32_t in_flight;     /* runs and copies that are with the kernels */
    bool live, append;
    uint8_t crashes; /* of the daemon, one after another, at which a run of it was under way */
    bool copying;    /* one of those is the copies that it was begun with */
    uint32_t heads;
    ts_dtype io_dtype;
    float scale;
    ts_kernel kernel;
    uint8_t class;       /* of what is cached of it */
    bool by_worker;      /* its worker's own kernels write into its blocks */
    bool quarantined;    /* ... and may do so yet, though its session has ended */
    bool aborted;        /* ends when nothing is in flight any more */
    uint32_t tokens;     /* new tokens of all sequences */
    ts_layer_set layers; /* that were run */
    ts_status failed;    /* TS_OK, or what came of a run: such a step keeps no tokens */
    uint32_t failed_layer;
    uint32_t num_seqs;
    ts_step_seq *seqs;
    /* Runs on a stream that are in flight, in the order of their numbers: the next daemon does them
     * again. Room for a power of two. */
    uint32_t num_stream_runs;
    ts_layer_run *stream_runs;
} ts_step;

/* Blocks that adding new_tokens to the sequence takes, a copy of a shared tail included. */
uint32_t ts_step_blocks(const ts_sequences *seqs, const ts_pool_books *pool, const ts_sequence *seq,
                        uint32_t new_tokens);

/* Takes the blocks of one sequence, which must have room in its table, for this session. The tenant
 * must have them. `ids` are those of its new tokens; TS_TOKEN_UNKNOWN, or NULL: not known from
 * there on. */
void ts_step_take(ts_sequences *seqs, ts_pool_books *pool, ts_step_seq *part, uint32_t step,
                  uint32_t session, const uint32_t *ids);

/* Keeps the first `accepted` of the new tokens, in this class of what is cached (block_pool.h), and
 * gives the other blocks back; 0 restores the sequence as it was. */
void ts_step_settle(ts_sequences *seqs, ts_pool_books *pool, const ts_step_seq *part,
                    uint32_t accepted, uint8_t class);

#endif
