/*
 * Cuts a call into items of about equal work, lets the threads take them, and merges what was cut
 * along the context. How a call is cut depends on its size and on the number of threads; the result
 * does not (attention.h).
 */
#include "attention.h"

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
#define PREFILL_ROWS 32u   /* query rows of one KV head that share each read of K and V */
#define TOGETHER_TOKENS 8u /* up to so many query tokens an item takes several KV heads */
#define INLINE_WORK 65536u /* rows * tokens * ... under which waking the threads costs more */

struct ts_attention {
    ts_threads *threads;
    ts_threads *alone; /* just the caller */
    ts_isa isa;
    const ts_attention_isa_ops *ops;
    ts_attention_scratch *scratch; /* one per thread */
    float **scratch_memory;        /* what to free */
    size_t scratch_floats;         /* of each */
    ts_attention_item *items;
    size_t items_capacity;
    uint32_t *merges; /* indices of the first item of each cut row set */
    size_t merges_capacity;
    float *partials;
    size_t partials_capacity;
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

ts_status ts_attention_variant_check(const ts_attention_variant *v, uint32_t head_dim, char *why,
                                     size_t why_bytes)
{
    const ts_rope *rope = &v->rope;
    if (!isfinite(v->scale) || v->scale < 0)
        snprintf(why, why_bytes, "a scale of %g; it must be finite and not negative",
                 (double)v->scale);
    else if (!(v->soft_cap >= 0 && v->soft_cap <= TS_SOFT_CAP_MAX))
        snprintf(why, why_bytes, "a soft cap of %g; it must be finite and not negative, at most %g",
                 (double)v->soft_cap, (double)TS_SOFT_CAP_MAX);
    else if (!isfinite(rope->theta) || rope->theta < 0)
        snprintf(why, why_bytes, "a rope theta of %g; it must be finite and not negative",
                 (double)rope->theta);
    else if (rope->theta != 0 && (rope->dims % 2 != 0 || rope->dims > head_dim))
        snprintf(why, why_bytes, "rope over %u dimensions; it must be even and at most head_dim %u",
                 rope->dims, head_dim);
    else if (rope->theta != 0 && rope->dims == 0 && head_dim % 2 != 0)
        snprintf(why, why_bytes, "rope over all of head_dim %u, which is odd", head_dim);
    else
        return TS_OK;
    return TS_EINVAL;
}

ts_attention *ts_attention_new(uint32_t threads, ts_isa isa)
{
    ts_attention *a = calloc(1, sizeof *a);
    if (a == NULL)
        return NULL;
    a->isa = ts_isa_resolve(isa);
    a->ops = isa_ops(a->isa);
    a->threads = ts_threads_new(threads);
    a->alone = ts_threads_new(1);
    if (a->threads != NULL) {
        a->scratch = calloc(ts_threads_count(a->threads), sizeof *a->scratch);
        a->scratch_memory = calloc(ts_threads_count(a->threads), sizeof *a->scratch_memory);
    }
    if (a->alone == NULL || a->scratch == NULL || a->scratch_memory == NULL) {
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
    free(a->items);
    free(a->merges);
    free(a->partials);
    ts_threads_free(a->alone);
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

/* Makes *memory hold at least `count` things of `bytes`; the old contents are not kept. */
static bool reserve(void **memory, size_t *capacity, size_t count, size_t bytes)
{
    if (count <= *capacity)
        return true;
    void *grown = aligned_alloc(64, (count * bytes + 63) / 64 * 64);
    if (grown == NULL)
        return false;
    free(*memory);
    *memory = grown;
    *capacity = count;
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
        size_t capacity = grow ? 0 : a->scratch_floats;
        if (!reserve((void **)&a->scratch_memory[i], &capacity, floats, sizeof(float)))
            return false;
        float *p = a->scratch_memory[i];
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
typedef struct cut {
    uint32_t q_count;    /* query tokens of an item */
    uint32_t head_count; /* KV heads of an item, at most */
} cut;

static cut cut_rows(const ts_attention_call *call, const ts_attention_seq *seq)
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
    return (cut){.q_count = q, .head_count = heads};
}

static uint32_t ceil_div(uint64_t a, uint64_t b)
{
    return (uint32_t)((a + b - 1) / b);
}

typedef struct list {
    size_t items, merges, partial_floats;
} list;

/* The first token that query tokens `q` and later of a sequence see. */
static uint32_t first_token(const ts_attention_call *call, const ts_attention_seq *seq, uint32_t q)
{
    return ts_attention_first_key(&call->variant, seq->kv_tokens - seq->q_tokens + q);
}

/*
 * Lists the items of one sequence; with a == NULL only counts them. An item has the parts that its
 * rows see something of. One whose share of the work would pass `budget` (tokens * KV heads * query
 * tokens) is cut along the context into whole parts, then by KV heads.
 */
static void list_seq(ts_attention *a, const ts_attention_call *call, const ts_attention_seq *seq,
                     uint64_t budget, list *l)
{
    const ts_geometry *g = &call->geometry;
    uint32_t group = call->heads / g->kv_heads;
    if (seq->q_tokens == 0)
        return;
    cut c = cut_rows(call, seq);
    for (uint32_t q = 0; q < seq->q_tokens; q += c.q_count) {
        uint32_t q_count = seq->q_tokens - q < c.q_count ? seq->q_tokens - q : c.q_count;
        uint32_t end = seq->kv_tokens - seq->q_tokens + q + q_count;
        uint32_t first = first_token(call, seq, q), first_seen = first / TS_PART;
        uint32_t parts = ceil_div(end, TS_PART) - first_seen;
        uint64_t work = (uint64_t)(end - first) * c.head_count * q_count;
        uint32_t pieces = ceil_div(work, budget);
        uint32_t part_pieces = pieces < parts ? pieces : parts;
        uint32_t step = ceil_div(parts, part_pieces);
        part_pieces = ceil_div(parts, step);
        uint32_t heads = ceil_div(c.head_count, ceil_div(pieces, part_pieces));
        for (uint32_t h = 0; h < g->kv_heads; h += heads) {
            uint32_t head_count = g->kv_heads - h < heads ? g->kv_heads - h : heads;
            size_t floats = part_pieces == 1
                                ? 0
                                : parts * ts_attention_partial_floats(head_count * q_count * group,
                                                                      g->head_dim);
            if (a != NULL) {
                if (part_pieces > 1)
                    a->merges[l->merges] = (uint32_t)l->items;
                for (uint32_t p = 0; p < part_pieces; p++)
                    a->items[l->items + p] = (ts_attention_item){
                        .call = call,
                        .seq = seq,
                        .q_first = q,
                        .q_count = q_count,
                        .head_first = h,
                        .head_count = head_count,
                        .part_first = first_seen + p * step,
                        .part_end =
                            first_seen + (p * step + step < parts ? p * step + step : parts),
                        .first_seen = first_seen,
                        .partials = part_pieces > 1 ? a->partials + l->partial_floats : NULL,
                    };
            }
            l->items += part_pieces;
            l->merges += part_pieces > 1;
            l->partial_floats += floats;
        }
    }
}

static void run_one(void *arg, uint32_t item, uint32_t thread)
{
    ts_attention *a = arg;
    if (!atomic_load_explicit(&a->cancelled, memory_order_relaxed))
        a->ops->item(&a->items[item], &a->scratch[thread]);
}

static void merge_one(void *arg, uint32_t merge, uint32_t thread)
{
    ts_attention *a = arg;
    if (atomic_load_explicit(&a->cancelled, memory_order_relaxed))
        return;
    ts_attention_item whole = a->items[a->merges[merge]];
    uint32_t end = whole.seq->kv_tokens - whole.seq->q_tokens + whole.q_first + whole.q_count;
    whole.part_first = whole.first_seen;
    whole.part_end = ceil_div(end, TS_PART);
    a->ops->merge(&whole, &a->scratch[thread]);
}

/* Writes a row of K or V: of the cache's type, divided by `scale`. table: K's angles; NULL: it
 * isn't turned. */
static void write_row(const ts_attention_call *call, unsigned char *to, const void *from,
                      size_t first, float scale, const float *table)
{
    ts_dtype to_type = call->geometry.dtype;
    uint32_t count = call->geometry.head_dim;
    if (to_type == call->io_dtype && table == NULL) {
        size_t bytes = ts_dtype_bytes(to_type);
        memcpy(to, (const unsigned char *)from + first * bytes, count * bytes);
        return;
    }
    float row[TS_HEAD_DIM_MAX];
    ts_load_elements(from, call->io_dtype, first, count, row);
    if (table != NULL)
        ts_rope_turn(&call->variant.rope, table, row);
    for (uint32_t i = 0; i < count && scale != 1; i++)
        row[i] /= scale;
    ts_store_elements(to, to_type, 0, count, row);
}

/* Writes one sequence's new K and V into their slots. */
static void append_one(void *arg, uint32_t index, uint32_t thread)
{
    (void)thread;
    const ts_attention_call *call = arg;
    const ts_attention_seq *seq = &call->seqs[index];
    const ts_geometry *g = &call->geometry;
    if (seq->k == NULL)
        return;
    size_t plane = ts_geometry_plane_bytes(g);
    const ts_rope *rope = &call->variant.rope;
    float table[TS_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < seq->q_tokens; i++) {
        uint32_t token = seq->kv_tokens - seq->q_tokens + i;
        if (rope->theta != 0)
            ts_rope_table(rope, token, table);
        unsigned char *row =
            call->base + seq->blocks[token / g->block_tokens] * ts_geometry_block_bytes(g) +
            (size_t)seq->layer * 2 * plane + token % g->block_tokens * ts_geometry_token_stride(g);
        for (uint32_t h = 0; h < g->kv_heads; h++) {
            size_t from = ((size_t)i * g->kv_heads + h) * g->head_dim;
            unsigned char *to = row + h * ts_geometry_head_stride(g);
            const float *scales = seq->scales;
            write_row(call, to, seq->k, from, scales == NULL ? 1 : scales[h],
                      rope->theta != 0 ? table : NULL);
            write_row(call, to + plane, seq->v, from, scales == NULL ? 1 : scales[g->kv_heads + h],
                      NULL);
        }
    }
}

ts_status ts_attention_run(ts_attention *a, const ts_attention_call *call)
{
    const ts_geometry *g = &call->geometry;
    uint32_t group = call->heads / g->kv_heads;
    uint64_t work = 0;
    size_t rows = 0, head_rows = 0;
    for (uint32_t i = 0; i < call->num_seqs; i++) {
        const ts_attention_seq *seq = &call->seqs[i];
        if (seq->q_tokens == 0)
            continue;
        cut c = cut_rows(call, seq);
        work +=
            (uint64_t)(seq->kv_tokens - first_token(call, seq, 0)) * g->kv_heads * seq->q_tokens;
        if ((size_t)c.q_count * group > head_rows)
            head_rows = (size_t)c.q_count * group;
        if ((size_t)c.q_count * group * c.head_count > rows)
            rows = (size_t)c.q_count * group * c.head_count;
    }
    bool small = work * group * g->head_dim <= INLINE_WORK * 16ull;
    ts_threads *threads = small ? a->alone : a->threads;
    uint64_t budget = work / (ts_threads_count(threads) * ITEMS_PER_THREAD) + 1;
    if (ts_threads_count(threads) == 1)
        budget = UINT64_MAX / 2;

    list l = {0};
    for (uint32_t i = 0; i < call->num_seqs; i++)
        list_seq(NULL, call, &call->seqs[i], budget, &l);
    size_t merges_capacity = a->merges_capacity;
    if (!reserve((void **)&a->items, &a->items_capacity, l.items, sizeof *a->items) ||
        !reserve((void **)&a->merges, &merges_capacity, l.merges, sizeof *a->merges) ||
        !reserve((void **)&a->partials, &a->partials_capacity, l.partial_floats, sizeof(float)) ||
        !reserve_scratch(a, g, call->heads, rows, head_rows))
        return TS_ENOMEM;
    a->merges_capacity = merges_capacity;
    l = (list){0};
    for (uint32_t i = 0; i < call->num_seqs; i++)
        list_seq(a, call, &call->seqs[i], budget, &l);

    ts_threads_run(threads, call->num_seqs, append_one, (void *)call);
    ts_threads_run(threads, (uint32_t)l.items, run_one, a);
    ts_threads_run(threads, (uint32_t)l.merges, merge_one, a);
    return atomic_load_explicit(&a->cancelled, memory_order_relaxed) ? TS_ECONN : TS_OK;
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
    bool small = block_bytes * num_copies <= 65536;
    ts_threads_run(small ? a->alone : a->threads, num_copies, copy_one, &job);
}
