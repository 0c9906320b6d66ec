/*
 * Cuts a call into items of about equal work, lets the threads take them, and merges what was cut
 * along the context. How a call is cut depends on its size and on the number of threads; the result
 * does not (attention.h).
 */
#include "attention.h"

#include "append.h"
#include "attention_amx.h"
#include "attention_item.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include "tile_unit.h"
#endif

#define ITEMS_PER_THREAD 4u
#define PREFILL_ROWS 32u         /* query rows of one KV head that share each read of K and V */
#define TOGETHER_TOKENS 8u       /* query tokens up to which an item takes several KV heads */
#define THREAD_WORK (1u << 17)   /* multiplications for which it is worth waking one thread more */
#define THREAD_FLOATS (1u << 15) /* new ones to write, or partial results to merge, likewise */
#define APPEND_TOKENS 256u       /* new tokens that are written as one piece */
#define WINDOW_ITEMS 64u         /* of a thread, of TS_ITEM_WORK each: the work of a window */

#define MERGED (1u << 30) /* among a sequence's items left: it has to be merged, too */

/* Memory that grows as it is needed. */
typedef struct buffer {
    void *memory;
    size_t capacity; /* things */
} buffer;

/* A place in a call: query tokens from `q` on of sequence `seq`. */
typedef struct place {
    uint32_t seq, q;
} place;

/* A call under way: it is cut into windows, one after another, so that the list of items and the
 * partial results stay small however long the call is. */
struct ts_attention_task {
    ts_attention *attention;
    ts_attention_call call;
    uint32_t team;          /* threads that attend, */
    uint32_t append_team;   /* and that write new tokens */
    uint32_t merge_team;    /* of the window */
    uint64_t budget;        /* of an item: tokens * KV heads * query tokens */
    size_t rows, head_rows; /* of the largest item: all, and of one KV head */
    size_t pieces_count; /* of new tokens to write; `pieces` is empty where it is a sequence each */
    place next;          /* where the next window begins */
    uint32_t num_items, num_merges;
    uint32_t appended, attended,
        merged; /* how far it has come: pieces, items, merges of the window */
    buffer pieces, items, merges,
        partials; /* merges: indices of the first item of each cut row set */
    /* Where somebody is told of sequences, and the call is one window: */
    bool tells;
    buffer lefts;  /* atomic_uint of each sequence: items that aren't done */
    uint32_t told; /* sequences that were looked at, and told of if they were done */
};

struct ts_attention {
    ts_threads *threads;
    ts_isa isa;
    const ts_attention_isa_ops *ops;
    ts_attention_scratch *scratch; /* one per thread */
    float **scratch_memory;        /* what to free */
    size_t scratch_floats;         /* of each */
    ts_attention_task whole;       /* of calls that are run in one go */
    atomic_bool cancelled;
};

const char *ts_isa_name(ts_isa isa)
{
    switch (isa) {
    case TS_ISA_AUTO:
        return "auto";
    case TS_ISA_PORTABLE:
        return "portable";
    case TS_ISA_AVX2:
        return "avx2";
    case TS_ISA_AVX512:
        return "avx512";
    case TS_ISA_AMX:
        return "amx";
    }
    return "unknown";
}

ts_isa ts_isa_resolve(ts_isa isa)
{
#if defined(__x86_64__)
    /* Every processor with AVX2 converts fp16 too (F16C is older). */
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (isa == TS_ISA_AUTO || isa == TS_ISA_AMX) &&
        __builtin_cpu_supports("avx512vbmi") && ts_tile_unit_usable())
        return TS_ISA_AMX;
    if (avx512 && isa != TS_ISA_PORTABLE && isa != TS_ISA_AVX2)
        return TS_ISA_AVX512;
    if (avx2 && isa != TS_ISA_PORTABLE)
        return TS_ISA_AVX2;
#else
    (void)isa;
#endif
    return TS_ISA_PORTABLE;
}

static const ts_attention_isa_ops *isa_ops(ts_isa isa)
{
#if defined(__x86_64__)
    if (isa == TS_ISA_AMX)
        return &ts_attention_amx;
    if (isa == TS_ISA_AVX512 && __builtin_cpu_supports("avx512vbmi"))
        return &ts_attention_vbmi;
    if (isa == TS_ISA_AVX512)
        return &ts_attention_avx512;
    if (isa == TS_ISA_AVX2)
        return &ts_attention_avx2;
#else
    (void)isa;
#endif
    return &ts_attention_portable;
}

ts_attention *ts_attention_new(uint32_t threads, ts_isa isa)
{
    ts_attention *a = calloc(1, sizeof *a);
    if (a == NULL)
        return NULL;
    a->isa = ts_isa_resolve(isa);
    a->ops = isa_ops(a->isa);
    a->threads = ts_threads_new(threads);
    if (a->threads != NULL) {
        a->scratch = calloc(ts_threads_count(a->threads), sizeof *a->scratch);
        a->scratch_memory = calloc(ts_threads_count(a->threads), sizeof *a->scratch_memory);
    }
    if (a->scratch == NULL || a->scratch_memory == NULL) {
        ts_attention_free(a);
        return NULL;
    }
    return a;
}

static void task_fini(ts_attention_task *t)
{
    free(t->pieces.memory);
    free(t->items.memory);
    free(t->merges.memory);
    free(t->partials.memory);
    free(t->lefts.memory);
}

void ts_attention_free(ts_attention *a)
{
    if (a == NULL)
        return;
    if (a->scratch_memory != NULL)
        for (uint32_t i = 0; i < ts_threads_count(a->threads); i++)
            free(a->scratch_memory[i]);
    free(a->scratch_memory);
    free(a->scratch);
    task_fini(&a->whole);
    ts_threads_free(a->threads);
    free(a);
}

uint32_t ts_attention_threads(const ts_attention *a)
{
    return ts_threads_count(a->threads);
}

void ts_attention_cancel(ts_attention *a)
{
    atomic_store_explicit(&a->cancelled, true, memory_order_relaxed);
}

ts_isa ts_attention_isa(const ts_attention *a)
{
    return a->isa;
}

/* Makes the buffer hold at least `count` things of `bytes`; the old contents are not kept. */
static bool reserve(buffer *b, size_t count, size_t bytes)
{
    if (count <= b->capacity)
        return true;
    void *grown = aligned_alloc(64, (count * bytes + 63) / 64 * 64);
    if (grown == NULL)
        return false;
    free(b->memory);
    *b = (buffer){.memory = grown, .capacity = count};
    return true;
}

/* Scratch for items of up to `rows` rows, of which head_rows belong to one KV head. */
static bool reserve_scratch(ts_attention *a, const ts_geometry *g, uint32_t heads, size_t rows,
                            size_t head_rows)
{
    size_t padded = ts_attention_padded(g->head_dim), tiles = 0;
    if (a->isa == TS_ISA_AMX && ts_amx_takes(g, heads)) /* a chunk has a row at least */
        tiles = sizeof(ts_amx_work) + head_rows * (TS_AMX_CHUNK_SCORES + TS_AMX_CHUNK_WEIGHTS) +
                rows * ts_amx_chunk_bytes(g->head_dim);
    size_t state = rows * (padded + 2);
    size_t floats =
        rows * (padded + TS_ROW_PAD) + 2 * state + head_rows * TS_TILE + tiles / sizeof(float);
    bool grow = floats > a->scratch_floats;
    for (uint32_t i = 0; i < ts_threads_count(a->threads); i++) {
        buffer b = {a->scratch_memory[i], grow ? 0 : a->scratch_floats};
        if (!reserve(&b, floats, sizeof(float)))
            return false;
        float *p = a->scratch_memory[i] = b.memory;
        ts_attention_scratch *s = &a->scratch[i];
        s->tiles = (char *)p;
        p += tiles / sizeof(float);
        s->q = p;
        p += rows * padded;
        s->part = (ts_attention_state){
            .acc = p, .max = p + rows * padded, .sum = p + rows * padded + rows};
        p += state;
        s->all = (ts_attention_state){
            .acc = p, .max = p + rows * padded, .sum = p + rows * padded + rows};
        p += state;
        s->sums = p;
        p += rows * TS_ROW_PAD;
        s->scores = p;
    }
    if (grow)
        a->scratch_floats = floats;
    return true;
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

static uint32_t ceil_div(uint64_t a, uint64_t b)
{
    return (uint32_t)((a + b - 1) / b);
}

typedef struct list {
    size_t items, merges, partial_floats;
    uint64_t work; /* tokens * KV heads * query tokens */
} list;

/* The first token that query tokens `q` and later of a sequence see. */
static uint32_t first_token(const ts_attention_call *call, const ts_attention_seq *seq, uint32_t q)
{
    return ts_attention_first_key(&call->variant, seq->kv_tokens - seq->q_tokens + q);
}

static bool is_dropped(const ts_attention_seq *seq)
{
    return seq->dropped != NULL && __atomic_load_n(seq->dropped, __ATOMIC_RELAXED);
}

/*
 * Lists the items of `c.q_count` query tokens from `q` on; with fill false only counts them. An
 * item has the parts that its rows see something of. One whose share of the work would pass the
 * budget is cut along the context into whole parts, then by KV heads.
 */
static void list_rows(ts_attention_task *t, const ts_attention_seq *seq, row_split c, uint32_t q,
                      bool fill, list *l)
{
    const ts_attention_call *call = &t->call;
    const ts_geometry *g = &call->geometry;
    uint32_t group = call->heads / g->kv_heads;
    uint32_t q_count = seq->q_tokens - q < c.q_count ? seq->q_tokens - q : c.q_count;
    uint32_t end = seq->kv_tokens - seq->q_tokens + q + q_count;
    uint32_t first = first_token(call, seq, q), first_seen = first / TS_PART;
    uint32_t parts = ceil_div(end, TS_PART) - first_seen;
    uint64_t work = (uint64_t)(end - first) * c.head_count * q_count;
    uint32_t pieces = ceil_div(work, t->budget);
    uint32_t part_pieces = pieces < parts ? pieces : parts;
    uint32_t step = ceil_div(parts, part_pieces);
    part_pieces = ceil_div(parts, step);
    uint32_t heads = ceil_div(c.head_count, ceil_div(pieces, part_pieces));
    ts_attention_item *items = t->items.memory;
    uint32_t *merges = t->merges.memory;
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
                        part_pieces > 1 ? (float *)t->partials.memory + l->partial_floats : NULL,
                };
        }
        l->items += part_pieces;
        l->merges += part_pieces > 1;
        l->partial_floats += floats;
    }
    l->work += (uint64_t)(end - first) * g->kv_heads * q_count;
}

/* Counts the items of the window that begins at *at, which becomes the next one's beginning. */
static list count_window(ts_attention_task *t, place *at)
{
    uint64_t most = t->budget * WINDOW_ITEMS * t->team;
    list l = {0};
    for (; at->seq < t->call.num_seqs && l.work < most; *at = (place){at->seq + 1, 0}) {
        const ts_attention_seq *seq = &t->call.seqs[at->seq];
        if (seq->q_tokens == 0 || is_dropped(seq))
            continue;
        row_split c = split_rows(&t->call, seq);
        for (; at->q < seq->q_tokens && l.work < most; at->q += c.q_count)
            list_rows(t, seq, c, at->q, false, &l);
        if (at->q < seq->q_tokens)
            break;
    }
    return l;
}

/* Lists the items between two places, those of sequences that were dropped meanwhile aside. */
static list fill_window(ts_attention_task *t, place at, place end)
{
    list l = {0};
    for (; at.seq < t->call.num_seqs && at.seq <= end.seq; at = (place){at.seq + 1, 0}) {
        const ts_attention_seq *seq = &t->call.seqs[at.seq];
        uint32_t until = at.seq < end.seq ? seq->q_tokens : end.q;
        if (seq->q_tokens == 0 || is_dropped(seq))
            continue;
        row_split c = split_rows(&t->call, seq);
        for (; at.q < until; at.q += c.q_count)
            list_rows(t, seq, c, at.q, true, &l);
    }
    return l;
}

/* Tells of the sequences that are done, up to the first that isn't. */
static void tell_done(ts_attention_task *t)
{
    const atomic_uint *lefts = t->lefts.memory;
    for (; t->told < t->call.num_seqs; t->told++) {
        uint32_t left = atomic_load_explicit(&lefts[t->told], memory_order_acquire);
        if (left == 0)
            t->call.seq_done(t->call.seq_done_arg, t->told);
        else if (left < MERGED)
            return;
    }
}

static void run_one(void *arg, uint32_t item, uint32_t thread)
{
    ts_attention_task *t = arg;
    const ts_attention_item *i = (ts_attention_item *)t->items.memory + item;
    if (atomic_load_explicit(&t->attention->cancelled, memory_order_relaxed))
        return;
    atomic_uint *left = t->tells ? (atomic_uint *)t->lefts.memory + (i->seq - t->call.seqs) : NULL;
    if (!is_dropped(i->seq))
        t->attention->ops->item(i, &t->attention->scratch[thread]);
    if (left != NULL)
        atomic_fetch_sub_explicit(left, 1, memory_order_release);
    if (left != NULL && thread == 0)
        tell_done(t);
}

static void merge_one(void *arg, uint32_t merge, uint32_t thread)
{
    ts_attention_task *t = arg;
    const uint32_t *merges = t->merges.memory;
    ts_attention_item whole = ((ts_attention_item *)t->items.memory)[merges[merge]];
    if (atomic_load_explicit(&t->attention->cancelled, memory_order_relaxed) ||
        is_dropped(whole.seq))
        return;
    uint32_t end = whole.seq->kv_tokens - whole.seq->q_tokens + whole.q_first + whole.q_count;
    whole.part_first = whole.first_seen;
    whole.part_end = ceil_div(end, TS_PART);
    t->attention->ops->merge(&whole, &t->attention->scratch[thread]);
}

/* New tokens of a sequence that are written together. */
typedef struct piece {
    uint32_t seq, first, count;
} piece;

/* Writes new K and V of a piece into their slots. */
static void append_one(void *arg, uint32_t index, uint32_t thread)
{
    (void)thread;
    const ts_attention_task *t = arg;
    piece p = {.seq = index};
    if (t->pieces_count > 0)
        p = ((const piece *)t->pieces.memory)[index];
    const ts_attention_seq *seq = &t->call.seqs[p.seq];
    if (t->pieces_count == 0)
        p.count = seq->q_tokens;
    if (seq->k != NULL && !is_dropped(seq))
        ts_append_tokens(&t->call, seq, p.first, p.count);
}

/* Cuts the new tokens into pieces, where a sequence has more than one has. */
static bool list_pieces(ts_attention_task *t)
{
    size_t count = 0, n = 0;
    for (uint32_t i = 0; i < t->call.num_seqs; i++)
        count += ceil_div(t->call.seqs[i].q_tokens, APPEND_TOKENS);
    t->pieces_count = 0;
    if (count <= t->call.num_seqs)
        return true;
    if (!reserve(&t->pieces, count, sizeof(piece)))
        return false;
    piece *pieces = t->pieces.memory;
    for (uint32_t i = 0; i < t->call.num_seqs; i++)
        for (uint32_t q = 0, all = t->call.seqs[i].q_tokens; q < all; q += APPEND_TOKENS)
            pieces[n++] = (piece){i, q, all - q < APPEND_TOKENS ? all - q : APPEND_TOKENS};
    t->pieces_count = count;
    return true;
}

double ts_attention_work(const ts_attention_call *call)
{
    double work = 0;
    for (uint32_t i = 0; i < call->num_seqs; i++) {
        const ts_attention_seq *seq = &call->seqs[i];
        if (seq->q_tokens > 0)
            work += (double)(seq->kv_tokens - first_token(call, seq, 0)) * seq->q_tokens *
                    call->heads * call->geometry.head_dim * 2;
    }
    return work;
}

/* Threads for work of which each wants `share` at least, to be worth its waking. */
static uint32_t team_for(const ts_attention *a, uint64_t work, uint64_t share)
{
    uint32_t all = ts_threads_count(a->threads);
    uint64_t team = work / share;
    return team < 1 ? 1 : team < all ? (uint32_t)team : all;
}

/* Counts each sequence's items, if the window has all of them and somebody is to be told. */
static bool count_lefts(ts_attention_task *t, bool whole)
{
    t->tells = whole && t->call.seq_done != NULL;
    if (!t->tells)
        return true;
    if (!reserve(&t->lefts, t->call.num_seqs, sizeof(atomic_uint)))
        return false;
    atomic_uint *lefts = t->lefts.memory;
    const ts_attention_item *items = t->items.memory;
    for (uint32_t i = 0; i < t->call.num_seqs; i++)
        atomic_init(&lefts[i], 0);
    for (uint32_t i = 0; i < t->num_items; i++) {
        atomic_uint *left = &lefts[items[i].seq - t->call.seqs];
        const bool merged = items[i].partials != NULL && atomic_load(left) < MERGED;
        atomic_fetch_add(left, merged ? MERGED + 1 : 1);
    }
    return true;
}

/* Lists the next window. False: out of memory. */
static bool next_window(ts_attention_task *t)
{
    place end = t->next;
    const bool first = end.seq == 0 && end.q == 0;
    list l = count_window(t, &end);
    if (!reserve(&t->items, l.items, sizeof(ts_attention_item)) ||
        !reserve(&t->merges, l.merges, sizeof(uint32_t)) ||
        !reserve(&t->partials, l.partial_floats, sizeof(float)))
        return false;
    l = fill_window(t, t->next, end);
    t->next = end;
    t->num_items = (uint32_t)l.items;
    t->num_merges = (uint32_t)l.merges;
    t->merge_team = team_for(t->attention, l.partial_floats, THREAD_FLOATS);
    t->attended = t->merged = 0;
    return count_lefts(t, first && end.seq == t->call.num_seqs);
}

/* Begins the call in the task, whose buffers stay. False: out of memory. */
static bool begin(ts_attention *a, const ts_attention_call *call, ts_attention_task *t)
{
    const ts_geometry *g = &call->geometry;
    uint32_t group = call->heads / g->kv_heads;
    uint64_t work = 0, new_tokens = 0;
    t->attention = a;
    t->call = *call;
    t->rows = t->head_rows = 0;
    t->next = (place){0, 0};
    t->num_items = t->num_merges = 0;
    t->appended = t->attended = t->merged = 0;
    t->tells = false;
    t->told = 0;
    for (uint32_t i = 0; i < call->num_seqs; i++) {
        const ts_attention_seq *seq = &call->seqs[i];
        if (seq->q_tokens == 0)
            continue;
        row_split c = split_rows(call, seq);
        new_tokens += seq->q_tokens;
        work +=
            (uint64_t)(seq->kv_tokens - first_token(call, seq, 0)) * g->kv_heads * seq->q_tokens;
        if ((size_t)c.q_count * group > t->head_rows)
            t->head_rows = (size_t)c.q_count * group;
        if ((size_t)c.q_count * group * c.head_count > t->rows)
            t->rows = (size_t)c.q_count * group * c.head_count;
    }
    t->team = team_for(a, work * group * g->head_dim * 2, THREAD_WORK);
    t->append_team = team_for(a, new_tokens * g->kv_heads * g->head_dim * 2, THREAD_FLOATS);
    t->budget = work / ((uint64_t)t->team * ITEMS_PER_THREAD) + 1;
    uint64_t least = THREAD_WORK / 2 / ((uint64_t)group * g->head_dim * 2);
    if (t->budget < least)
        t->budget = least;
    uint64_t most = TS_ITEM_WORK / ((uint64_t)group * g->head_dim * 2);
    if (t->budget > most || t->team == 1)
        t->budget = most > 0 ? most : 1;
    return list_pieces(t);
}

ts_attention_task *ts_attention_task_new(ts_attention *a, const ts_attention_call *call)
{
    ts_attention_task *t = calloc(1, sizeof *t);
    if (t != NULL && !begin(a, call, t)) {
        ts_attention_task_free(t);
        t = NULL;
    }
    return t;
}

void ts_attention_task_free(ts_attention_task *t)
{
    if (t == NULL)
        return;
    task_fini(t);
    free(t);
}

ts_status ts_attention_task_run(ts_attention_task *t, ts_threads_pause_fn pause, void *pause_arg,
                                bool *done)
{
    ts_attention *a = t->attention;
    uint32_t pieces = t->pieces_count > 0 ? (uint32_t)t->pieces_count : t->call.num_seqs;
    *done = false;
    if (!reserve_scratch(a, &t->call.geometry, t->call.heads, t->rows, t->head_rows))
        return TS_ENOMEM;
    const ts_threads_work append = {append_one, t, pieces, t->append_team, pause, pause_arg};
    t->appended = ts_threads_run_from(a->threads, &append, t->appended);
    while (t->appended == pieces) {
        const ts_threads_work attend = {run_one, t, t->num_items, t->team, pause, pause_arg},
                              merge = {merge_one,     t,     t->num_merges,
                                       t->merge_team, pause, pause_arg};
        t->attended = ts_threads_run_from(a->threads, &attend, t->attended);
        if (t->attended < t->num_items)
            break;
        t->merged = ts_threads_run_from(a->threads, &merge, t->merged);
        if (t->merged < t->num_merges)
            break;
        if (t->next.seq == t->call.num_seqs) {
            *done = true;
            break;
        }
        if (!next_window(t))
            return TS_ENOMEM;
    }
    return atomic_load_explicit(&a->cancelled, memory_order_relaxed) ? TS_ECONN : TS_OK;
}

ts_status ts_attention_run(ts_attention *a, const ts_attention_call *call)
{
    bool done;
    if (!begin(a, call, &a->whole))
        return TS_ENOMEM;
    return ts_attention_task_run(&a->whole, NULL, NULL, &done);
}

typedef struct copy_job {
    unsigned char *base;
    size_t block_bytes;
    const ts_block_copy *copies;
} copy_job;

static void copy_one(void *arg, uint32_t index, uint32_t thread)
{
    (void)thread;
    const copy_job *job = arg;
    memcpy(job->base + job->copies[index].dst * job->block_bytes,
           job->base + job->copies[index].src * job->block_bytes, job->block_bytes);
}

void ts_attention_copy_blocks(ts_attention *a, unsigned char *base, size_t block_bytes,
                              const ts_block_copy *copies, uint32_t num_copies)
{
    copy_job job = {.base = base, .block_bytes = block_bytes, .copies = copies};
    const ts_threads_work copy = {
        .fn = copy_one,
        .arg = &job,
        .items = num_copies,
        .at_most = team_for(a, block_bytes * num_copies / sizeof(float), THREAD_FLOATS)};
    (void)ts_threads_run_from(a->threads, &copy, 0);
}
