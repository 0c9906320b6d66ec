/*
 * Sequences: an ordered block table and a length each, in one table a pool. Forks share blocks by
 * reference. A sequence that is in an open step has, behind its own num_blocks entries, the blocks
 * that the step reserved; if its tail was shared, the tail entry is already the step's private copy
 * (see step.h).
 *
 * An id is generation << 32 | index: the id of a freed sequence never comes back. Generations begin
 * somewhere else in each daemon and each pool, so an id from before a restart that lost all, or of
 * a pool that was deleted, names nothing.
 *
 * Cost: 88 bytes a sequence, and a block table of 4 bytes an entry (a power of two of them, from
 * 4). One whose time ends costs 32 bytes more, one that is kept or on a ticket about 100 more.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_SEQUENCE_H
#define TS_SEQUENCE_H

#include "block_pool.h"
#include "blocks.h"
#include "kept_names.h"
#include "name_order.h"

#define TS_TICKET_CHARS (2 * TS_TICKET_BYTES) /* of a ticket in hexadecimal */

typedef struct ts_sequence {
    uint32_t *blocks;    /* block table */
    const char *name;    /* kept under this name; NULL: it dies with its session */
    uint32_t num_blocks; /* ceil(length / block_tokens) */
    uint32_t capacity;   /* of blocks */
    uint32_t length;     /* tokens */
    uint32_t generation;
    uint32_t tenant;           /* TS_NONE: not live */
    uint32_t owner;            /* session index; TS_NONE if kept or on a ticket */
    uint32_t step;             /* index of the open step it is in, TS_NONE, MARKED or DYING */
    uint32_t prev, next;       /* of the same owner; next also links the free ones */
    uint32_t unchanged_prefix; /* entries that are as they were when the table was told of last */
    uint64_t known_step;       /* the step whose begin told of it; 0: none */
    uint32_t space;            /* its namespace in the pool's index; TS_NONE: it has none */
    uint32_t known;            /* tokens from the start whose ids are known */
    uint32_t claim;            /* of its next tokens (claims.h); TS_NONE: it has none */
    uint32_t life;             /* its place among those whose time ends; TS_NONE: it has no end */
    bool forgets;              /* freed, it leaves nothing cached that it alone uses */
    bool borrowed_tail; /* it uses a part of its last block, which the index knew before it did */
} ts_sequence;

#define TS_SEQUENCE_MARKED (TS_NONE - 1) /* seen already in the batch that is being checked */
#define TS_SEQUENCE_DYING (TS_NONE - 2)  /* its blocks are given back bit by bit */
/* Marked, and if the step begins, new tokens are written into its last block in place of a copy. */
#define TS_SEQUENCE_IN_PLACE (TS_NONE - 3)

/* When a sequence's time ends: one that is kept with a time to live, or that is on a ticket. */
typedef struct ts_life {
    uint64_t end_ms;    /* of the engine's time; UINT64_MAX while it is in an open step */
    uint64_t ttl_ms;    /* what each use lengthens it to */
    const char *ticket; /* in hexadecimal, the table's; NULL: it is kept */
    uint32_t seq;
} ts_life;

typedef struct ts_sequences {
    ts_sequence *all;
    uint32_t count;    /* entries of `all` that were ever live */
    uint32_t capacity; /* of `all` */
    uint32_t max;
    uint32_t live, kept;
    uint32_t free_head;
    uint32_t first_generation; /* ids begin behind it */
    uint32_t dying;            /* the first of those that are freed bit by bit; TS_NONE: none */
    uint32_t block_tokens;
    ts_names names;
    ts_name_order order; /* of the names */
    ts_names tickets;
    ts_life *lives; /* a heap: the first ends first */
    uint32_t num_lives, lives_capacity;
} ts_sequences;

/* first_generation: less than 2^31. */
void ts_sequences_init(ts_sequences *seqs, uint32_t max, uint32_t block_tokens,
                       uint32_t first_generation);
void ts_sequences_fini(ts_sequences *seqs);

/* Makes sure that the next `count` calls of ts_sequence_new succeed. TS_EQUOTA past the maximum. */
ts_status ts_sequences_reserve(ts_sequences *seqs, uint32_t count);

/* An empty sequence of the tenant's, at the head of the owner's list *owned. Needs room reserved.
 * `space` is its namespace, which has one user more; TS_NONE: none. */
uint32_t ts_sequence_new(ts_sequences *seqs, ts_pool_books *pool, uint32_t tenant, uint32_t owner,
                         uint32_t space, uint32_t *owned);

/* The live sequence with this id, or NULL. */
static inline ts_sequence *ts_sequence_find(const ts_sequences *seqs, uint64_t id)
{
    const uint32_t index = (uint32_t)id;
    if (index >= seqs->count)
        return NULL;
    ts_sequence *seq = &seqs->all[index];
    const bool lives = seq->tenant != TS_NONE && seq->step != TS_SEQUENCE_DYING;
    return lives && seq->generation == (uint32_t)(id >> 32) ? seq : NULL;
}

uint64_t ts_sequence_id(const ts_sequences *seqs, uint32_t index);
uint32_t ts_sequence_index(const ts_sequences *seqs, const ts_sequence *seq);

/* The entries from `entry` on aren't what they were. */
static inline void ts_sequence_changed(ts_sequence *seq, uint32_t entry)
{
    seq->unchanged_prefix = seq->unchanged_prefix < entry ? seq->unchanged_prefix : entry;
}

/* The step's begin tells of the first `entries`, reserved blocks included. */
static inline void ts_sequence_tell(ts_sequence *seq, uint64_t step, uint32_t entries)
{
    seq->known_step = step;
    seq->unchanged_prefix = entries;
}

/* Entries that whoever was told of by that step's begin knows still; 0 if another told since. */
static inline uint32_t ts_sequence_known(const ts_sequence *seq, uint64_t step)
{
    return step != 0 && seq->known_step == step ? seq->unchanged_prefix : 0;
}

/* Makes room for `blocks` table entries. */
ts_status ts_sequence_reserve(ts_sequence *seq, uint32_t blocks);

/* The child (empty, with room) gets the parent's first `length` tokens: shared blocks. `tail` is
 * the parent's own tail block, where an open step replaced it in the table, or TS_NONE. */
void ts_sequence_share(const ts_sequences *seqs, ts_pool_books *pool, const ts_sequence *parent,
                       uint32_t length, uint32_t tail, ts_sequence *child);

/* The sequence, empty with room, gets `length` tokens whose K and V lie in these blocks, which the
 * index found; their ids are known. */
void ts_sequence_take_match(const ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq,
                            const uint32_t *blocks, uint32_t length);

/* Adds the full blocks of the sequence's known tokens to the index, from entry `first` on. Where
 * the index has such a block already, the sequence refers to that one instead. They, and what they
 * hang from, are of this class at least. */
void ts_sequence_index_blocks(const ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq,
                              uint32_t first, uint8_t class);

/* Drops the tokens from `length` on. */
void ts_sequence_truncate(const ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq,
                          uint32_t length);

/* Frees the sequence: blocks, name or ticket, and id. *owned is its owner's list, NULL if it has
 * none. */
void ts_sequence_free(ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq, uint32_t *owned);

/*
 * The same bit by bit: the id and the name are gone at once, the blocks as ts_sequences_sweep finds
 * them, which unrefers up to `entries` blocks and returns how many of those it has left over.
 */
void ts_sequence_doom(ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq, uint32_t *owned);
uint32_t ts_sequences_sweep(ts_sequences *seqs, ts_pool_books *pool, uint32_t entries);

/* Frees some block tables of a pool that is gone, and returns how many of `count` are left over. */
uint32_t ts_sequences_free_some(ts_sequences *seqs, uint32_t count);

/* Blocks that keeping the sequence would pin beside those that are pinned already. */
uint32_t ts_sequence_unpinned(const ts_pool_books *pool, const ts_sequence *seq);

/* Keeps the sequence under a name (its owner loses it), or gives a kept one to an owner. `tail`:
 * the sequence's own tail block, where an open step replaced it in the table, or TS_NONE. */
ts_status ts_sequence_keep(ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq, uint32_t tail,
                           const char *name, uint32_t *owned);
void ts_sequence_own(ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq, uint32_t tail,
                     uint32_t owner, uint32_t *owned);

/* Keeps the sequence under the name of `old`, a kept one, which is left without name and owner, to
 * be freed. */
void ts_sequence_replace(ts_sequences *seqs, ts_pool_books *pool, ts_sequence *old,
                         ts_sequence *seq, uint32_t tail, uint32_t *owned);

/* Pins what the kept sequence refers to, or unpins it. `tail`: see ts_sequence_keep. */
void ts_sequence_pin(ts_pool_books *pool, const ts_sequence *seq, uint32_t tail, bool pin);

/* ---- ends of lives (sequence_lives.c) ---- */

/* Makes sure that the next ts_sequence_set_life succeeds. TS_ENOMEM. */
ts_status ts_sequences_reserve_life(ts_sequences *seqs);

/* The sequence's time ends ttl_ms from now; if it is in an open step, from the step's end. Needs
 * room reserved. */
void ts_sequence_set_life(ts_sequences *seqs, ts_sequence *seq, uint64_t ttl_ms, uint64_t now_ms);

/* The sequence is used, or its step begins or ends: if its time has an end, it begins anew. */
void ts_sequence_renew_life(ts_sequences *seqs, const ts_sequence *seq, uint64_t now_ms);
static inline void ts_sequence_refresh_life(ts_sequences *seqs, const ts_sequence *seq,
                                            uint64_t now_ms)
{
    if (seq->life != TS_NONE)
        ts_sequence_renew_life(seqs, seq, now_ms);
}

/* The sequence's time has no end any more. If it was on a ticket, that is gone. */
void ts_sequence_end_life(ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq);

/* Whether the sequence's time has ended; it is as good as freed then. */
static inline bool ts_sequence_is_over(const ts_sequences *seqs, const ts_sequence *seq,
                                       uint64_t now_ms)
{
    return seq->life != TS_NONE && seqs->lives[seq->life].end_ms <= now_ms;
}

/* Milliseconds that are left; 0: its time has no end, or an end at ts_sequence_is_over. */
uint64_t ts_sequence_left_ms(const ts_sequences *seqs, const ts_sequence *seq, uint64_t now_ms);

/* A sequence whose time has ended, or NULL. */
ts_sequence *ts_sequences_first_over(const ts_sequences *seqs, uint64_t now_ms);

/*
 * Takes the sequence from its owner and puts it on a ticket, for which it has a life. Its id leads
 * nowhere from now on. TS_EEXIST: the tenant has such a ticket. TS_ENOMEM.
 */
ts_status ts_sequence_put_on_ticket(ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq,
                                    const char *ticket, uint32_t *owned);

static inline bool ts_sequence_has_ticket(const ts_sequences *seqs, const ts_sequence *seq)
{
    return seq->life != TS_NONE && seqs->lives[seq->life].ticket != NULL;
}

/* Gives a sequence that is on a ticket to an owner. The ticket is gone. */
void ts_sequence_take_off_ticket(ts_sequences *seqs, ts_pool_books *pool, ts_sequence *seq,
                                 uint32_t owner, uint32_t *owned);

#endif
