/*
 * How a call is cut: into items of about equal work, which threads take one after another; new
 * tokens into pieces that are written one by one; and both into windows, one after another, so that
 * the list of items and the partial results stay small however long the call is. It depends on the
 * call's size and on the number of threads; the result does not (attention.h).
 *
 * Thread: the caller's, one at a time.
 */
#ifndef TS_ATTENTION_CUT_H
#define TS_ATTENTION_CUT_H

#include "attention_call.h"

#include <stddef.h>

/* Memory that grows as it is needed. */
typedef struct ts_buffer {
    void *memory;
    size_t capacity; /* things */
} ts_buffer;

/* Makes the buffer hold at least `count` things of `bytes`; the old contents are not kept. False:
 * out of memory, nothing has changed. */
bool ts_buffer_reserve(ts_buffer *buffer, size_t count, size_t bytes);

/* A place in a call: query tokens from `q` on of sequence `seq`. */
typedef struct ts_call_place {
    uint32_t seq, q;
} ts_call_place;

/* New tokens of a sequence that are written together. */
typedef struct ts_append_piece {
    uint32_t seq, first, count;
} ts_append_piece;

#define TS_CUT_MERGED (1u << 30) /* among a sequence's items left: it has to be merged, too */

typedef struct ts_attention_cut {
    ts_attention_call call;
    uint32_t threads;       /* that there are */
    uint32_t team;          /* that attend, */
    uint32_t append_team;   /* that write new tokens, */
    uint32_t merge_team;    /* and that merge the window's partial results */
    uint64_t budget;        /* of an item: tokens * KV heads * query tokens */
    size_t rows, head_rows; /* of the largest item: all, and of one KV head */
    size_t pieces_count; /* of new tokens to write; `pieces` is empty where it is a sequence each */
    ts_buffer pieces;    /* ts_append_piece */
    ts_call_place next;  /* where the next window begins */
    /* Of the window: */
    uint32_t num_items, num_merges;
    ts_buffer items;    /* ts_attention_item */
    ts_buffer merges;   /* uint32_t: indices of the first item of each cut row set */
    ts_buffer partials; /* float */
    /* Where somebody is told of sequences, and the call is one window: */
    bool tells;
    ts_buffer lefts; /* atomic_uint of each sequence: items that aren't done */
} ts_attention_cut;

/* Begins with a call, for so many threads; the buffers stay. An item has at most item_work
 * multiplications, where its sequence's parts allow it. False: out of memory. */
bool ts_cut_begin(ts_attention_cut *cut, const ts_attention_call *call, uint32_t threads,
                  uint64_t item_work);

/* Lists the next window. False: out of memory. */
bool ts_cut_next_window(ts_attention_cut *cut);

void ts_cut_fini(ts_attention_cut *cut);

/* Threads to write, copy or merge so many floats, of `threads`. */
uint32_t ts_cut_team_for_floats(uint64_t floats, uint32_t threads);

static inline uint32_t ts_ceil_div(uint64_t a, uint64_t b)
{
    return (uint32_t)((a + b - 1) / b);
}

/* The first token that query tokens `q` and later of a sequence see. */
static inline uint32_t ts_first_token(const ts_attention_call *call, const ts_attention_seq *seq,
                                      uint32_t q)
{
    return ts_attention_first_key(&call->variant, seq->kv_tokens - seq->q_tokens + q);
}

static inline bool ts_seq_is_dropped(const ts_attention_seq *seq)
{
    return seq->dropped != NULL && __atomic_load_n(seq->dropped, __ATOMIC_RELAXED);
}

#endif
