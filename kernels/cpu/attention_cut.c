#include "attention_cut.h"

#include "attention_item.h"

#include <stdatomic.h>
#include <stdlib.h>

#define ITEMS_PER_THREAD 4u
#define PREFILL_ROWS 32u         /* query rows of one KV head that share each read of K and V */
#define TOGETHER_TOKENS 8u       /* query tokens up to which an item takes several KV heads */
#define THREAD_WORK (1u << 17)   /* multiplications for which it is worth waking one thread more */
#define THREAD_FLOATS (1u << 15) /* to write, to copy, or to merge, likewise */
#define APPEND_TOKENS 256u       /* new tokens that are written as one piece */
#define WINDOW_ITEMS 64u         /* of a thread, of the most work each: the work of a window */

bool ts_buffer_reserve(ts_buffer *b, size_t count, size_t bytes)
{
    if (count <= b->capacity)
        return true;
    void *grown = aligned_alloc(64, (count * bytes + 63) / 64 * 64);
    if (grown == NULL)
        return false;
    free(b->memory);
    *b = (ts_buffer){.memory = grown, .capacity = count};
    return true;
}

/* Threads for work of which each wants `share` at least, to be worth its waking. */
static uint32_t team_for(uint64_t work, uint64_t share, uint32_t threads)
{
    uint64_t team = work / share;
    return team < 1 ? 1 : team < threads ? (uint32_t)team : threads;
}

uint32_t ts_cut_team_for_floats(uint64_t floats, uint32_t threads)
{
    return team_for(floats, THREAD_FLOATS, threads);
}

/* How the query tokens and KV heads of one sequence are cut. */
typedef struct row_split {
    uint32_t q_count;    /* query tokens of an item */
    uint32_t head_count; /* KV heads of an item, at most */
} row_split;

static row_split split_rows(const ts_attention_call *call, const ts_attention_seq *seq)
{
    const ts_geometry *g = &call->geometry;
    uint32_t group = call->heads / g->kv_heads;
    uint32_t per_state = TS_STATE_FLOATS / ts_attention_padded(g->head_dim);
    uint32_t q = PREFILL_ROWS / group > 0 ? PREFILL_ROWS / group : 1;
    bool together = seq->q_tokens <= TOGETHER_TOKENS;
    if (together)
        q = per_state / group < 1 ? 1 : per_state / group;
    if (q > seq->q_tokens)
        q = seq->q_tokens;
    uint32_t heads = together ? per_state / (q * group) : 1;
    if (heads < 1)
        heads = 1;
    if (heads > g->kv_heads)
        heads = g->kv_heads;
    return (row_split){.q_count = q, .head_count = heads};
}

typedef struct list {
    size_t items, merges, partial_floats;
    uint64_t work; /* tokens * KV heads * query tokens */
} list;

/*
 * Lists the items of `c.q_count` query tokens from `q` on; with fill false only counts them. An
 * item has the parts that its rows see something of. One whose share of the work would pass the
 * budget is cut along the context into whole parts, then by KV heads.
 */
static void list_rows(ts_attention_cut *cut, const ts_attention_seq *seq, row_split c, uint32_t q,
                      bool fill, list *l)
{
    const ts_attention_call *call = &cut->call;
    const ts_geometry *g = &call->geometry;
    uint32_t group = call->heads / g->kv_heads;
    uint32_t q_count = seq->q_tokens - q < c.q_count ? seq->q_tokens - q : c.q_count;
    uint32_t end = seq->kv_tokens - seq->q_tokens + q + q_count;
    uint32_t first = ts_first_token(call, seq, q), first_seen = first / TS_PART;
    uint32_t parts = ts_ceil_div(end, TS_PART) - first_seen;
    uint64_t work = (uint64_t)(end - first) * c.head_count * q_count;
    uint32_t pieces = ts_ceil_div(work, cut->budget);
    uint32_t part_pieces = pieces < parts ? pieces : parts;
    uint32_t step = ts_ceil_div(parts, part_pieces);
    part_pieces = ts_ceil_div(parts, step);
    uint32_t heads = ts_ceil_div(c.head_count, ts_ceil_div(pieces, part_pieces));
    ts_attention_item *items = cut->items.memory;
    uint32_t *merges = cut->merges.memory;
    for (uint32_t h = 0; h < g->kv_heads; h += heads) {
        uint32_t head_count = g->kv_heads - h < heads ? g->kv_heads - h : heads;
        size_t floats =
            part_pieces == 1
                ? 0
                : parts * ts_attention_partial_floats(head_count * q_count * group, g->head_dim);
        if (fill) {
            if (part_pieces > 1)
                merges[l->merges] = (uint32_t)l->items;
            for (uint32_t p = 0; p < part_pieces; p++)
                items[l->items + p] = (ts_attention_item){
                    .call = call,
                    .seq = seq,
                    .q_first = q,
                    .q_count = q_count,
                    .head_first = h,
                    .head_count = head_count,
                    .part_first = first_seen + p * step,
                    .part_end = first_seen + (p * step + step < parts ? p * step + step : parts),
                    .first_seen = first_seen,
                    .partials =
                        part_pieces > 1 ? (float *)cut->partials.memory + l->partial_floats : NULL,
                };
        }
        l->items += part_pieces;
        l->merges += part_pieces > 1;
        l->partial_floats += floats;
    }
    l->work += (uint64_t)(end - first) * g->kv_heads * q_count;
}

/* Counts the items of the window that begins at *at, which becomes the next one's beginning. */
static list count_window(ts_attention_cut *cut, ts_call_place *at)
{
    uint64_t most = cut->budget * WINDOW_ITEMS * cut->team;
    list l = {0};
    for (; at->seq < cut->call.num_seqs && l.work < most; *at = (ts_call_place){at->seq + 1, 0}) {
        const ts_attention_seq *seq = &cut->call.seqs[at->seq];
        if (seq->q_tokens == 0 || ts_seq_is_dropped(seq))
            continue;
        row_split c = split_rows(&cut->call, seq);
        for (; at->q < seq->q_tokens && l.work < most; at->q += c.q_count)
            list_rows(cut, seq, c, at->q, false, &l);
        if (at->q < seq->q_tokens)
            break;
    }
    return l;
}

/* Lists the items between two places, those of sequences that were dropped meanwhile aside. */
static list fill_window(ts_attention_cut *cut, ts_call_place at, ts_call_place end)
{
    list l = {0};
    for (; at.seq < cut->call.num_seqs && at.seq <= end.seq; at = (ts_call_place){at.seq + 1, 0}) {
        const ts_attention_seq *seq = &cut->call.seqs[at.seq];
        uint32_t until = at.seq < end.seq ? seq->q_tokens : end.q;
        if (seq->q_tokens == 0 || ts_seq_is_dropped(seq))
            continue;
        row_split c = split_rows(&cut->call, seq);
        for (; at.q < until; at.q += c.q_count)
            list_rows(cut, seq, c, at.q, true, &l);
    }
    return l;
}

/* Counts each sequence's items, if the window has all of them and somebody is to be told. */
static void count_lefts(ts_attention_cut *cut, bool whole)
{
    cut->tells = whole && cut->call.seq_done != NULL &&
                 ts_buffer_reserve(&cut->lefts, cut->call.num_seqs, sizeof(atomic_uint));
    if (!cut->tells)
        return;
    atomic_uint *lefts = cut->lefts.memory;
    const ts_attention_item *items = cut->items.memory;
    for (uint32_t i = 0; i < cut->call.num_seqs; i++)
        atomic_init(&lefts[i], 0);
    for (uint32_t i = 0; i < cut->num_items; i++) {
        atomic_uint *left = &lefts[items[i].seq - cut->call.seqs];
        const bool merged = items[i].partials != NULL && atomic_load(left) < TS_CUT_MERGED;
        atomic_fetch_add(left, merged ? TS_CUT_MERGED + 1 : 1);
    }
}

bool ts_cut_next_window(ts_attention_cut *cut)
{
    ts_call_place end = cut->next;
    const bool first = end.seq == 0 && end.q == 0;
    list l = count_window(cut, &end);
    if (!ts_buffer_reserve(&cut->items, l.items, sizeof(ts_attention_item)) ||
        !ts_buffer_reserve(&cut->merges, l.merges, sizeof(uint32_t)) ||
        !ts_buffer_reserve(&cut->partials, l.partial_floats, sizeof(float)))
        return false;
    l = fill_window(cut, cut->next, end);
    cut->next = end;
    cut->num_items = (uint32_t)l.items;
    cut->num_merges = (uint32_t)l.merges;
    cut->merge_team = ts_cut_team_for_floats(l.partial_floats, cut->threads);
    count_lefts(cut, first && end.seq == cut->call.num_seqs);
    return true;
}

/* Cuts the new tokens into pieces, where a sequence has more than one has. */
static bool list_pieces(ts_attention_cut *cut)
{
    size_t count = 0, n = 0;
    for (uint32_t i = 0; i < cut->call.num_seqs; i++)
        count += ts_ceil_div(cut->call.seqs[i].q_tokens, APPEND_TOKENS);
    cut->pieces_count = 0;
    if (count <= cut->call.num_seqs)
        return true;
    if (!ts_buffer_reserve(&cut->pieces, count, sizeof(ts_append_piece)))
        return false;
    ts_append_piece *pieces = cut->pieces.memory;
    for (uint32_t i = 0; i < cut->call.num_seqs; i++)
        for (uint32_t q = 0, all = cut->call.seqs[i].q_tokens; q < all; q += APPEND_TOKENS)
            pieces[n++] =
                (ts_append_piece){i, q, all - q < APPEND_TOKENS ? all - q : APPEND_TOKENS};
    cut->pieces_count = count;
    return true;
}

bool ts_cut_begin(ts_attention_cut *cut, const ts_attention_call *call, uint32_t threads,
                  uint64_t item_work)
{
    const ts_geometry *g = &call->geometry;
    uint32_t group = call->heads / g->kv_heads;
    uint64_t work = 0, new_tokens = 0;
    cut->call = *call;
    cut->threads = threads;
    cut->rows = cut->head_rows = 0;
    cut->next = (ts_call_place){0, 0};
    cut->num_items = cut->num_merges = 0;
    cut->tells = false;
    for (uint32_t i = 0; i < call->num_seqs; i++) {
        const ts_attention_seq *seq = &call->seqs[i];
        if (seq->q_tokens == 0)
            continue;
        row_split c = split_rows(call, seq);
        new_tokens += seq->q_tokens;
        work +=
            (uint64_t)(seq->kv_tokens - ts_first_token(call, seq, 0)) * g->kv_heads * seq->q_tokens;
        if ((size_t)c.q_count * group > cut->head_rows)
            cut->head_rows = (size_t)c.q_count * group;
        if ((size_t)c.q_count * group * c.head_count > cut->rows)
            cut->rows = (size_t)c.q_count * group * c.head_count;
    }
    cut->team = team_for(work * group * g->head_dim * 2, THREAD_WORK, threads);
    cut->append_team = ts_cut_team_for_floats(new_tokens * g->kv_heads * g->head_dim * 2, threads);
    cut->budget = work / ((uint64_t)cut->team * ITEMS_PER_THREAD) + 1;
    uint64_t least = THREAD_WORK / 2 / ((uint64_t)group * g->head_dim * 2);
    if (cut->budget < least)
        cut->budget = least;
    uint64_t most = item_work / ((uint64_t)group * g->head_dim * 2);
    if (cut->budget > most || cut->team == 1)
        cut->budget = most > 0 ? most : 1;
    return list_pieces(cut);
}

void ts_cut_fini(ts_attention_cut *cut)
{
    free(cut->pieces.memory);
    free(cut->items.memory);
    free(cut->merges.memory);
    free(cut->partials.memory);
    free(cut->lefts.memory);
}
