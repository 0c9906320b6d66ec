/*
 * Writes a call's new tokens, lets the threads take its items (attention_cut.h), and merges what
 * was cut along the context.
 */
#include "attention.h"

#include "append.h"
#include "attention_amx.h"
#include "attention_cut.h"
#include "attention_item.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include "tile_unit.h"
#endif

/* A call under way. */
struct ts_attention_task {
    ts_attention *attention;
    ts_attention_cut cut;
    /* How far it has come: pieces, and items and merges of the window. */
    uint32_t appended, attended, merged;
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
    case TS_ISA_NEON:
        return "neon";
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
#elif defined(__aarch64__) /* every one has it */
    if (isa != TS_ISA_PORTABLE)
        return TS_ISA_NEON;
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
#elif defined(__aarch64__)
    if (isa == TS_ISA_NEON)
        return &ts_attention_neon;
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

void ts_attention_free(ts_attention *a)
{
    if (a == NULL)
        return;
    if (a->scratch_memory != NULL)
        for (uint32_t i = 0; i < ts_threads_count(a->threads); i++)
            free(a->scratch_memory[i]);
    free(a->scratch_memory);
    free(a->scratch);
    ts_cut_fini(&a->whole.cut);
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
        ts_buffer b = {a->scratch_memory[i], grow ? 0 : a->scratch_floats};
        if (!ts_buffer_reserve(&b, floats, sizeof(float)))
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

/* Tells of the sequences that are done, up to the first that isn't. */
static void tell_done(ts_attention_task *t)
{
    const atomic_uint *lefts = t->cut.lefts.memory;
    for (; t->told < t->cut.call.num_seqs; t->told++) {
        uint32_t left = atomic_load_explicit(&lefts[t->told], memory_order_acquire);
        if (left == 0)
            t->cut.call.seq_done(t->cut.call.seq_done_arg, t->told);
        else if (left < TS_CUT_MERGED)
            return;
    }
}

static void run_one(void *arg, uint32_t item, uint32_t thread)
{
    ts_attention_task *t = arg;
    const ts_attention_item *i = (ts_attention_item *)t->cut.items.memory + item;
    if (atomic_load_explicit(&t->attention->cancelled, memory_order_relaxed))
        return;
    atomic_uint *left =
        t->cut.tells ? (atomic_uint *)t->cut.lefts.memory + (i->seq - t->cut.call.seqs) : NULL;
    if (!ts_seq_is_dropped(i->seq))
        t->attention->ops->item(i, &t->attention->scratch[thread]);
    if (left != NULL)
        atomic_fetch_sub_explicit(left, 1, memory_order_release);
    if (left != NULL && thread == 0)
        tell_done(t);
}

static void merge_one(void *arg, uint32_t merge, uint32_t thread)
{
    ts_attention_task *t = arg;
    const uint32_t *merges = t->cut.merges.memory;
    ts_attention_item whole = ((ts_attention_item *)t->cut.items.memory)[merges[merge]];
    if (atomic_load_explicit(&t->attention->cancelled, memory_order_relaxed) ||
        ts_seq_is_dropped(whole.seq))
        return;
    uint32_t end = whole.seq->kv_tokens - whole.seq->q_tokens + whole.q_first + whole.q_count;
    whole.part_first = whole.first_seen;
    whole.part_end = ts_ceil_div(end, TS_PART);
    t->attention->ops->merge(&whole, &t->attention->scratch[thread]);
}

/* Writes new K and V of a piece into their slots. */
static void append_one(void *arg, uint32_t index, uint32_t thread)
{
    (void)thread;
    const ts_attention_task *t = arg;
    ts_append_piece p = {.seq = index};
    if (t->cut.pieces_count > 0)
        p = ((const ts_append_piece *)t->cut.pieces.memory)[index];
    const ts_attention_seq *seq = &t->cut.call.seqs[p.seq];
    if (t->cut.pieces_count == 0)
        p.count = seq->q_tokens;
    if (seq->k != NULL && !ts_seq_is_dropped(seq))
        ts_append_tokens(&t->cut.call, seq, p.first, p.count);
}

/* Begins the call in the task, whose buffers stay. False: out of memory. */
static bool begin(ts_attention *a, const ts_attention_call *call, ts_attention_task *t)
{
    t->attention = a;
    t->appended = t->attended = t->merged = t->told = 0;
    return ts_cut_begin(&t->cut, call, ts_threads_count(a->threads), TS_ITEM_WORK);
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
    ts_cut_fini(&t->cut);
    free(t);
}

ts_status ts_attention_task_run(ts_attention_task *t, ts_threads_pause_fn pause, void *pause_arg,
                                bool *done)
{
    ts_attention *a = t->attention;
    uint32_t pieces =
        t->cut.pieces_count > 0 ? (uint32_t)t->cut.pieces_count : t->cut.call.num_seqs;
    *done = false;
    if (!reserve_scratch(a, &t->cut.call.geometry, t->cut.call.heads, t->cut.rows,
                         t->cut.head_rows))
        return TS_ENOMEM;
    const ts_threads_work append = {.fn = append_one,
                                    .arg = t,
                                    .items = pieces,
                                    .at_most = t->cut.append_team,
                                    .pause = pause,
                                    .pause_arg = pause_arg};
    t->appended = ts_threads_run_from(a->threads, &append, t->appended);
    while (t->appended == pieces) {
        ts_threads_work attend = append, merge = append;
        attend.fn = run_one;
        attend.items = t->cut.num_items;
        attend.at_most = t->cut.team;
        merge.fn = merge_one;
        merge.items = t->cut.num_merges;
        merge.at_most = t->cut.merge_team;
        t->attended = ts_threads_run_from(a->threads, &attend, t->attended);
        if (t->attended < t->cut.num_items)
            break;
        t->merged = ts_threads_run_from(a->threads, &merge, t->merged);
        if (t->merged < t->cut.num_merges)
            break;
        if (t->cut.next.seq == t->cut.call.num_seqs) {
            *done = true;
            break;
        }
        if (!ts_cut_next_window(&t->cut))
            return TS_ENOMEM;
        t->attended = t->merged = 0;
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

double ts_attention_work(const ts_attention_call *call)
{
    double work = 0;
    for (uint32_t i = 0; i < call->num_seqs; i++) {
        const ts_attention_seq *seq = &call->seqs[i];
        if (seq->q_tokens > 0)
            work += (double)(seq->kv_tokens - ts_first_token(call, seq, 0)) * seq->q_tokens *
                    call->heads * call->geometry.head_dim * 2;
    }
    return work;
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
        .at_most = ts_cut_team_for_floats(block_bytes * num_copies / sizeof(float),
                                          ts_threads_count(a->threads))};
    (void)ts_threads_run_from(a->threads, &copy, 0);
}
