/*
 * The rings: memory that one session and the daemon share, through which steps are begun, run and
 * ended in microseconds. What an entry asks for is what the message of the same name in
 * tinyserve.proto asks for, with the same answer; the client takes either way.
 *
 * One producer and one consumer each: the client submits, the daemon completes, in any order, one
 * completion for each submission. `tail` counts what was put in and `head` what was taken out,
 * modulo 2^32; entry number n lies at n % TS_RING_ENTRIES. Each side keeps its own two counts
 * privately and only publishes them here, so scribbling over this memory leads neither side out of
 * its bounds: the daemon copies an entry before it looks at it, and a count that can't be ends the
 * rings for their session. A client has at most TS_RING_ENTRIES submissions uncompleted.
 *
 * The client fills the memory (TS_HANDLE_NEW_RINGS): it sets the first five fields, the rest is 0.
 * When it asks for the doorbell, the daemon takes the memory and fills in what it has to say.
 *
 * Waking: a side that has nothing to do says so in its `sleeps` word, looks once more, and sleeps;
 * the other looks at the word after it has moved its tail (a full barrier lies between on both
 * sides). The daemon sleeps on a descriptor that it makes for the memory (TS_HANDLE_DOORBELL, an
 * eventfd), the client on the completions' tail as a futex. A client that has let TS_RING_ENTRIES
 * completions lie rings again when it has taken some.
 *
 * What doesn't fit an entry lies in the arrays behind: `batch_*` are the client's until it has
 * submitted a begin, a commit or what is done to sequences, and the daemon's until that is
 * completed; `begun_*` the other way round. So there is one of these at a time.
 */
#ifndef TS_RINGS_H
#define TS_RINGS_H

#include "blocks.h"
#include "handle_wire.h"
#include "layer_run.h"

#include <stddef.h>
#include <stdint.h>

#define TS_RING_MAGIC 0x47525354u
#define TS_RING_ENTRIES 64u
#define TS_RING_BATCH 4096u       /* sequences of a step that is begun here */
#define TS_RING_BLOCKS (1u << 20) /* that its answer tells of, if the client made room for them */
#define TS_RING_SLABS 65536u      /* ... and their slabs */
#define TS_RING_IDS (1u << 20)    /* token ids of a begin, if the client made room for them */

enum ts_ring_op {
    TS_RING_BEGIN = 1,
    TS_RING_RUN,
    TS_RING_COMMIT,
    TS_RING_ABORT,
    TS_RING_SEQ_CREATE, /* the answers to these three lie in batch_seqs */
    TS_RING_SEQ_FORK,
    TS_RING_SEQ_MATCH,
    TS_RING_SEQ_FREE, /* of batch_seqs */
    TS_RING_SEQ_TRUNCATE,
    TS_RING_SEQ_SELECT, /* `length` of batch_seqs; of each new one, batch_words; answer: batch_seqs
                         */
    TS_RING_OPS
};

/*
 * Of a begin: the client attends itself and wants the sequences' block tables; else the answer has
 * only the blocks that the new tokens touch. Of each table it has what the client lacks, and what
 * the new tokens touch in any case: the entries from begun_firsts[i] on. The client says in
 * batch_known_step[i] which step's begin told it of the sequence's table last (0: none has, or it
 * has forgotten), and keeps the entries before.
 */
enum { TS_RING_TABLES = 1 };

/* Of a begin: the ids of all its new tokens lie in ts_rings_ids. */
enum { TS_RING_TOKENS = 2 };

/* Of a fork: it shares the first `length` tokens alone. Of a match: it makes no sequences. Of a
 * free and of a truncate: as in tinyserve.proto. */
enum { TS_RING_HAS_LENGTH = 1, TS_RING_DRY = 2, TS_RING_FORGET = 4, TS_RING_BY_COUNTS = 8 };

/* Fields as in tinyserve.proto. */
typedef struct ts_ring_entry {
    _Alignas(64) uint32_t op; /* whole cache lines, with room for more fields */
    uint32_t tag;             /* the completion has the same tag */
    uint64_t step;            /* not of a begin */
    union {
        struct {
            uint32_t pool, count, heads, io_dtype;
            float scale;
            char kernel[20]; /* NUL-terminated; empty: the pool's */
            uint32_t flags;
            uint32_t wait_ms; /* for room */
            int32_t priority;
        } begin;          /* of sequence batch_seqs[i], batch_words[i] new tokens */
        ts_layer_run run; /* on a stream: completed when it is accepted; signals.h has the rest */
        struct {
            uint32_t count; /* 0: all; else of sequence i, batch_words[i] tokens are accepted */
        } commit;
        struct {
            uint64_t parent; /* of forks */
            uint32_t pool, count, length, flags;
            uint32_t space_bytes; /* of a create or a match */
            uint8_t space[64];
            uint32_t wait_ms; /* of a match */
        } seqs; /* a truncate's lengths, and the tokens of a match's prompts, lie in batch_words;
                   the prompts' ids in ts_rings_ids; what a match found, in tokens, in begun_starts,
                   and what Matched calls twins in begun_counts */
    };
    uint64_t call; /* its number: a session's calls count on, by message or ring */
} ts_ring_entry;

typedef struct ts_ring_completion {
    uint32_t tag, status; /* ts_status */
    uint64_t step;        /* that was begun */
    uint32_t num_blocks, num_slabs;
    uint64_t needed, free, limit, cached, pinned, others; /* as a Reply's */
    char message[232]; /* NUL-terminated; empty if status is TS_OK */
} ts_ring_completion;

typedef struct ts_ring_slab {
    uint32_t slab, generation;
} ts_ring_slab;

typedef struct ts_ring_counts {
    uint32_t tail;
    uint32_t pad0[15];
    uint32_t head;
    uint32_t pad1[15];
    uint32_t sleeps; /* the consumer: 1: wake it */
    uint32_t pad2[15];
} ts_ring_counts;

/* What the daemon says at the end of a session's rings. */
typedef enum ts_rings_end_reason {
    TS_RINGS_GO_ON = 0,
    TS_RINGS_ENDED = 1, /* nothing is completed any more; the session goes on by message, if it
                           does */
    TS_RINGS_DEVICE_FAILED = 2, /* the daemon ends, since a device of it failed */
} ts_rings_end_reason;

typedef struct ts_rings_memory {
    uint32_t magic, version;                 /* TS_PROTOCOL (handle_wire.h) */
    uint32_t max_blocks, max_slabs, max_ids; /* the room behind this struct */
    uint32_t isa;   /* ts_isa of the daemon's host kernels: the same gives the same bits */
    uint32_t ended; /* ts_rings_end_reason; the daemon writes it */
    uint32_t posts; /* 1: the daemon takes posted runs (signals.h); it writes it */
    uint32_t pad[8];
    ts_ring_counts submissions, completions;
    ts_ring_entry submitted[TS_RING_ENTRIES];
    ts_ring_completion completed[TS_RING_ENTRIES];
    uint64_t batch_seqs[TS_RING_BATCH];
    uint64_t batch_known_step[TS_RING_BATCH];
    uint32_t batch_words[TS_RING_BATCH];
    uint32_t begun_starts[TS_RING_BATCH]; /* tokens of each sequence before the step */
    uint32_t begun_firsts[TS_RING_BATCH]; /* with TS_RING_TABLES */
    uint32_t begun_counts[TS_RING_BATCH]; /* of the begun blocks, each sequence's */
    /* max_slabs begun slabs follow, max_blocks begun blocks, and max_ids token ids of the batch */
} ts_rings_memory;

static inline ts_ring_slab *ts_rings_slabs(ts_rings_memory *m)
{
    return (ts_ring_slab *)(m + 1);
}

static inline uint32_t *ts_rings_blocks(ts_rings_memory *m, uint32_t max_slabs)
{
    return (uint32_t *)(ts_rings_slabs(m) + max_slabs);
}

static inline uint32_t *ts_rings_ids(ts_rings_memory *m, uint32_t max_blocks, uint32_t max_slabs)
{
    return ts_rings_blocks(m, max_slabs) + max_blocks;
}

/* All of it, in whole pages. */
static inline size_t ts_rings_bytes(uint32_t max_blocks, uint32_t max_slabs, uint32_t max_ids)
{
    size_t bytes = sizeof(ts_rings_memory) + max_slabs * sizeof(ts_ring_slab) +
                   ((size_t)max_blocks + max_ids) * sizeof(uint32_t);
    return (bytes + 4095) / 4096 * 4096;
}

_Static_assert((TS_RING_ENTRIES & (TS_RING_ENTRIES - 1)) == 0, "counts wrap around at 2^32");
_Static_assert(sizeof(ts_ring_entry) == 128, "layout is shared by two programs");
_Static_assert(offsetof(ts_ring_entry, run) == 16, "layout is shared by two programs");
_Static_assert(sizeof(ts_ring_completion) == 304, "layout is shared by two programs");
_Static_assert(offsetof(ts_rings_memory, completions) == 256, "layout is shared by two programs");
_Static_assert(offsetof(ts_rings_memory, submitted) == 448, "layout is shared by two programs");
_Static_assert(offsetof(ts_rings_memory, batch_seqs) == 448 + 64 * (128 + 304),
               "shared by two programs");
_Static_assert(sizeof(ts_rings_memory) % 64 == 0, "layout is shared by two programs");

/* Blocks that the new tokens of a begin may touch; both sides add this up over the batch. A begin
 * of more than max_blocks, or in a pool of more than max_slabs slabs, goes as a message. */
static inline uint64_t ts_ring_blocks(uint32_t new_tokens, uint32_t block_tokens)
{
    return ts_whole_blocks(new_tokens, block_tokens) + 2u;
}

#endif
