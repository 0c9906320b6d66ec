/*
 * Plans: they are made, and made anew or in part for the next step. What they are written from is
 * in batch.cuh; which kernel a sequence gets, and how its work is split, in work_split.cuh.
 */
#include "batch.cuh"
#include "cache.cuh"
#include "decode.cuh"
#include "prefill.cuh"

extern "C" {
#include "waves.h"
}

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace
{

TS_KNOWS_DTYPES(4);
ts_gpu_kernel wgmma_kernel(const ts_gpu_plan *p, wgmma_kind kind)
{
    uint32_t head_dim = p->geometry.head_dim;
    ts_dtype dtype = p->geometry.dtype;
    return !p->gpu->info.warp_groups ? ts_gpu_kernel{}
           : dtype == TS_DTYPE_FP16  ? wgmma_fp16(head_dim, kind)
           : dtype == TS_DTYPE_BF16  ? wgmma_bf16(head_dim, kind)
                                     : wgmma_fp8(head_dim, kind);
}

ts_gpu_kernel v5_kernel(const ts_gpu_plan *p, uint32_t kind)
{
    uint32_t head_dim = p->geometry.head_dim;
    ts_dtype dtype = p->geometry.dtype, io = p->io_dtype;
    return dtype == TS_DTYPE_FP32   ? v5_fp32(head_dim, kind)
           : dtype == TS_DTYPE_FP16 ? v5_fp16(head_dim, io, kind)
           : dtype == TS_DTYPE_BF16 ? v5_bf16(head_dim, io, kind)
                                    : v5_fp8(head_dim, io, kind);
}

ts_gpu_kernel kernel_of(const ts_gpu_plan *p, uint32_t list)
{
    uint32_t head_dim = p->geometry.head_dim;
    ts_dtype dtype = p->geometry.dtype, io = p->io_dtype;
    if (list == LIST_TILE)
        return tile_kernel(head_dim, dtype);
    if (!loads_vectors(&p->geometry) || (has_many_rows(list) && dtype == TS_DTYPE_FP32))
        return ts_gpu_kernel{};
    if (is_wgmma(list))
        return wgmma_kernel(p, list == LIST_FEW ? WGMMA_FEW : WGMMA_MANY);
    if (list == LIST_MMA)
        return dtype == TS_DTYPE_FP16   ? mma_fp16(head_dim, io)
               : dtype == TS_DTYPE_BF16 ? mma_bf16(head_dim, io)
                                        : mma_fp8(head_dim, io);
    return v5_kernel(p, list - LIST_NARROW);
}

#define OWN_BYTES 1024u /* that the device adds to each block's shared memory */

/* Finds another of v5's kernels for few rows, if there is one of which so many blocks' shared
 * memory fits on a processor. */
ts_status find_narrow(const ts_gpu_plan *p, uint32_t kind, uint32_t blocks, ts_gpu_kernel *to,
                      char *why, size_t why_bytes)
{
    ts_gpu_kernel kernel = v5_kernel(p, kind);
    size_t bytes = 0;
    if (kernel.function == NULL)
        return TS_OK;
    ts_status status = ts_gpu_function_find(p->gpu, &kernel, &bytes, why, why_bytes);
    if (status == TS_OK && blocks * (bytes + OWN_BYTES) <= p->gpu->info.shared_bytes + OWN_BYTES)
        *to = kernel;
    return status;
}

ts_status find_plain(ts_gpu_plan *p, char *why, size_t why_bytes)
{
    ts_status status = find_narrow(p, V5_PLAIN, 1, &p->plain_kernel, why, why_bytes);
    if (status == TS_OK)
        status = find_narrow(p, V5_PLAIN_TEAMS, 1, &p->plain_team_kernel, why, why_bytes);
    if (status == TS_OK)
        status = find_narrow(p, V5_CLOSE, V5_CLOSE_BLOCKS, &p->close_kernel, why, why_bytes);
    return status;
}

/* Finds the kernels that the device can launch. TS_EINVAL: the one that was asked for isn't among
 * them. */
ts_status find_kernels(ts_gpu_plan *p, char *why, size_t why_bytes)
{
    size_t least = SIZE_MAX; /* that a kernel which was asked for takes */
    bool wanted = false, found = false;
    for (uint32_t list = LIST_TILE; list < LIST_COUNT; list++) {
        ts_gpu_kernel kernel = kernel_of(p, list);
        size_t bytes = 0;
        if (kernel.function == NULL)
            continue;
        kernel.bytes += kernel.fold_bytes;
        ts_status status = ts_gpu_function_find(p->gpu, &kernel, &bytes, why, why_bytes);
        if (status != TS_OK)
            return status;
        bool fits = bytes <= p->gpu->info.shared_bytes;
        if (!fits && kernel.fold_bytes > 0) { /* then each chunk is a piece of its own */
            kernel.bytes -= kernel.fold_bytes;
            kernel.fold_bytes = 0;
            status = ts_gpu_function_find(p->gpu, &kernel, &bytes, why, why_bytes);
            if (status != TS_OK)
                return status;
            fits = bytes <= p->gpu->info.shared_bytes;
        }
        if (fits)
            p->kernels[list] = kernel;
        if (p->kernel == (list == LIST_TILE  ? TS_KERNEL_TILE
                          : list == LIST_MMA ? TS_KERNEL_MMA
                          : is_wgmma(list)   ? TS_KERNEL_WGMMA
                                             : TS_KERNEL_V5)) {
            wanted = true;
            found = found || fits;
            least = bytes < least ? bytes : least;
        }
    }
    if (p->kernels[LIST_WGMMA].function != NULL) {
        size_t bytes;
        p->varied_wgmma = wgmma_kernel(p, WGMMA_VARIED);
        ts_status status = ts_gpu_function_find(p->gpu, &p->varied_wgmma, &bytes, why, why_bytes);
        if (status != TS_OK)
            return status;
    }
    if (p->kernels[LIST_NARROW].function != NULL) {
        ts_status status = find_narrow(p, V5_TEAMS, 1, &p->team_kernel, why, why_bytes);
        if (status == TS_OK && holds_whole_tiles(&p->geometry))
            status = find_plain(p, why, why_bytes);
        if (status != TS_OK)
            return status;
    }
    if (!wanted || found)
        return TS_OK;
    snprintf(why, why_bytes,
             "kernel %s takes %zu bytes of shared memory for a head_dim of %u; the device has %zu",
             ts_kernel_name(p->kernel), least, p->geometry.head_dim, p->gpu->info.shared_bytes);
    return TS_EINVAL;
}

bool same_geometry(const ts_geometry *a, const ts_geometry *b)
{
    return a->layers == b->layers && a->kv_heads == b->kv_heads && a->head_dim == b->head_dim &&
           a->block_tokens == b->block_tokens && a->dtype == b->dtype && a->layout == b->layout;
}

bool is_cut_alike(const ts_gpu_plan *p, const ts_attention_seq *s, const plan_seq &before)
{
    ts_gpu_list list = list_of(p, s);
    if (list < LIST_NARROW)
        return true;
    work_split c = work_split_of(p, s, list);
    return c.tokens == before.chunk_tokens && c.chunks == before.num_chunks;
}

/* Whether a sequence has what it shares with its team by plan: the same blocks, and no new tokens.
 */
bool shares_alike(const ts_gpu_plan *p, const ts_attention_seq *s, uint32_t chunks,
                  const plan_seq &before, const uint32_t *table)
{
    uint32_t tokens = chunks * before.chunk_tokens;
    return s->kv_tokens - s->q_tokens >= tokens &&
           memcmp(table, s->blocks, ceil_div(tokens, p->geometry.block_tokens) * sizeof *table) ==
               0;
}

/* Whether the plan is these sequences', but for lengths and what lies in tables that have room for
 * them: what depends on more than that is as it was. What a sequence shares begins with its first
 * block. */
bool is_alike(const ts_gpu_plan *p, const ts_attention_seq *seqs, uint32_t num_seqs)
{
    const plan_seq *before = (const plan_seq *)(p->buffer->host + PLAN_SEQS);
    if (num_seqs != p->num_seqs || (p->shared == NULL && p->spared > 0 && are_teams_worth_it(p)))
        return false;
    for (uint32_t i = 0; i < num_seqs; i++) {
        uint32_t block_tokens = p->geometry.block_tokens;
        size_t end = i + 1 < num_seqs ? before[i + 1].table : p->entries;
        const uint32_t *table = (const uint32_t *)(p->buffer->host + p->tables) + before[i].table;
        if (seqs[i].q_tokens == 0 && before[i].q_tokens == 0)
            continue;
        if (seqs[i].q_tokens != before[i].q_tokens || seqs[i].blocks[0] != table[0] ||
            (seqs[i].kv_tokens == seqs[i].q_tokens) !=
                (before[i].kv_tokens == before[i].q_tokens) ||
            ceil_div(seqs[i].kv_tokens, block_tokens) > end - before[i].table ||
            !is_cut_alike(p, &seqs[i], before[i]) ||
            (p->shared != NULL && !shares_alike(p, &seqs[i], p->shared[i], before[i], table)))
            return false;
    }
    return true;
}

/* Finds among which blocks all lie, where wgmma is to read them in boxes. */
void find_blocks(ts_gpu_plan *p, const ts_attention_seq *seqs)
{
    block_range all = {UINT32_MAX, 0};
    if (p->count[LIST_WGMMA] + p->count[LIST_FEW] == 0)
        return;
    for (uint32_t i = 0; i < p->num_seqs; i++) {
        uint32_t blocks = ceil_div(seqs[i].kv_tokens, p->geometry.block_tokens);
        for (uint32_t b = 0; seqs[i].q_tokens > 0 && b < blocks; b++) {
            all.first = seqs[i].blocks[b] < all.first ? seqs[i].blocks[b] : all.first;
            all.last = seqs[i].blocks[b] > all.last ? seqs[i].blocks[b] : all.last;
        }
    }
    p->blocks = all;
}

/* Writes lengths and what of the tables differs; returns the bytes, from the start, that the device
 * is to get. Pieces stay in their order, which is by lengths that have grown alike. */
size_t write_lengths(ts_gpu_plan *p, const ts_attention_seq *seqs)
{
    plan_seq *to = (plan_seq *)(p->buffer->host + PLAN_SEQS);
    uint32_t *tables = (uint32_t *)(p->buffer->host + p->tables);
    size_t entries = 0;  /* up to the last that differs */
    bool others = false; /* blocks are read: an entry that is there may be one that wasn't used */
    p->renewals++;
    for (uint32_t i = 0; i < p->num_seqs; i++) {
        uint32_t *table = tables + to[i].table;
        size_t blocks = ceil_div(seqs[i].kv_tokens, p->geometry.block_tokens);
        others = others || blocks != ceil_div(to[i].kv_tokens, p->geometry.block_tokens);
        to[i].kv_tokens = seqs[i].kv_tokens;
        if (seqs[i].q_tokens == 0)
            continue;
        if (memcmp(table, seqs[i].blocks, blocks * sizeof *table) == 0)
            continue;
        memcpy(table, seqs[i].blocks, blocks * sizeof *table);
        entries = to[i].table + blocks > entries ? to[i].table + blocks : entries;
    }
    if (others || entries > 0)
        find_blocks(p, seqs);
    for (uint32_t l = LIST_NARROW; l < LIST_COUNT; l++) {
        plan_piece *pieces = (plan_piece *)(p->buffer->host + p->items[l]);
        for (uint32_t n = 0; n < p->count[l]; n++)
            pieces[n].seq.kv_tokens = to[pieces[n].index].kv_tokens;
    }
    return p->tables + entries * sizeof *tables;
}

/* Works out how the sequences' work is cut and who shares what. The batch is to be given to
 * batch_fini, also after TS_ENOMEM. */
ts_status begin_batch(ts_gpu_plan *p, const ts_attention_seq *seqs, uint32_t num_seqs, batch &b,
                      char *why, size_t why_bytes)
{
    p->num_seqs = num_seqs;
    p->renewals = 0;
    free(p->shared);
    p->shared = NULL;
    bool good = batch_init(b, num_seqs);
    if (good) {
        cut(p, seqs, b);
        find_teams(p, seqs, b);
        p->entries = count_up(p, seqs, b);
        find_blocks(p, seqs);
    }
    if (good && b.sharing.num_teams > 0) {
        p->shared = (uint32_t *)malloc(num_seqs * sizeof *p->shared);
        good = p->shared != NULL;
        for (uint32_t i = 0; good && i < num_seqs; i++)
            p->shared[i] = b.sharing.seqs[i].shared;
    }
    if (good)
        return TS_OK;
    p->num_seqs = 0; /* it has none that the next ones could be like */
    snprintf(why, why_bytes, "no memory for a plan");
    return TS_ENOMEM;
}

/* A plan without sequences. */
ts_status begin_plan(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads, ts_dtype io_dtype,
                     ts_kernel kernel, ts_gpu_plan **out, char *why, size_t why_bytes)
{
    *out = NULL;
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status == TS_OK)
        status = ts_kernel_check(kernel, geometry, gpu->info.warp_groups, why, why_bytes);
    if (status != TS_OK)
        return status;
    /* A map is aligned to more than what malloc gives. */
    ts_gpu_plan *p = (ts_gpu_plan *)aligned_alloc(alignof(ts_gpu_plan), sizeof *p);
    if (p == NULL) {
        snprintf(why, why_bytes, "no memory for a plan");
        return TS_ENOMEM;
    }
    memset(p, 0, sizeof *p);
    p->gpu = gpu;
    p->geometry = *geometry;
    p->heads = heads;
    p->io_dtype = io_dtype;
    p->kernel = kernel;
    status = find_kernels(p, why, why_bytes);
    if (status == TS_OK)
        *out = p;
    else
        ts_gpu_plan_free(p);
    return status;
}

/* What the limits come to: room for pieces, records and counters; returns that for block table
 * entries. TS_EINVAL: they aren't decoded, or not by v5 or wgmma. */
ts_status make_room(ts_gpu_plan *p, size_t *entries, char *why, size_t why_bytes)
{
    const ts_gpu_plan_limits *most = &p->limits;
    ts_attention_seq s = {};
    s.q_tokens = s.kv_tokens = most->q_tokens;
    ts_gpu_list list = list_of(p, &s);
    const bool many = is_wgmma(list) && most->q_tokens <= V5_QUERIES;
    if (list < LIST_NARROW || (has_many_rows(list) && !many)) {
        snprintf(why, why_bytes,
                 "%u query tokens of a %s cache, head_dim %u: a persistent plan is for what "
                 "kernels v5 and wgmma decode",
                 most->q_tokens, ts_dtype_name(p->geometry.dtype), p->geometry.head_dim);
        return TS_EINVAL;
    }
    uint32_t tiles = tiles_of(p, most->q_tokens, list);
    uint32_t a = least_tokens(p, list, 1, tiles, false), b = least_tokens(p, list, 1, tiles, true);
    uint64_t chunks = most->seqs + most->kv_tokens / (a < b ? a : b);
    uint64_t split =
        (uint64_t)most->seqs * most_chunks(p, list, tiles, is_wgmma(list) ? BLOCKS / 2 : BLOCKS);
    chunks = chunks < split ? chunks : split;
    p->room[list] = (uint32_t)chunks * tiles;
    p->room[LIST_APPEND] = many ? most->seqs * most->q_tokens : 0;
    p->records = chunks * most->q_tokens * p->heads;
    p->q_tokens = most->seqs * most->q_tokens;
    p->counters = most->seqs * p->geometry.kv_heads * tiles;
    size_t blocks = most->kv_tokens / p->geometry.block_tokens + most->seqs;
    *entries = blocks + blocks / 8 + most->seqs * table_room(0);
    return TS_OK;
}

/* Loads what writes new tokens, if it needs that; the rest is loaded by now. A launch that loads
 * waits until no stream waits for anything, and may be one that is captured. */
ts_status load_append(const ts_gpu_plan *p, char *why, size_t why_bytes)
{
    gpu_call c = {}; /* without items */
    cudaError_t error = cudaSuccess;
    if (p->room[LIST_APPEND] > 0)
        error = launch_append(c, p->geometry.dtype, NULL);
    return error == cudaSuccess ? TS_OK : ts_gpu_fail(error, "loading a kernel", 0, why, why_bytes);
}

/* Its memory: of the limits' size, no items, counters that are 0. */
ts_status take_memory(ts_gpu_plan *p, size_t bytes, char *why, size_t why_bytes)
{
    const size_t floats = p->records * ts_gpu_record_floats(&p->geometry);
    const size_t folds = p->room[LIST_WGMMA] + p->room[LIST_FEW] == 0
                             ? 0
                             : wgmma_fold_floats(&p->geometry, p->gpu->info.processors);
    const size_t partials = (floats + folds) * sizeof(float);
    const size_t counters = (OWN_COUNTERS + p->counters) * sizeof *p->own_counters;
    ts_status status = ts_gpu_buffer_take(p->gpu, bytes, &p->buffer, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaError_t error = cudaMalloc((void **)&p->own_partials, partials);
    p->own_folds = p->own_partials + floats;
    if (error == cudaSuccess)
        error = cudaMalloc((void **)&p->own_counters, counters);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(p->own_counters, 0, counters, p->gpu->upload_stream);
    if (error != cudaSuccess)
        return ts_gpu_fail(error, "a plan's scratch memory", partials + counters, why, why_bytes);
    return ts_gpu_plan_clear(p, why, why_bytes);
}

/* Where launches over a persistent plan bring boxes, from now on they are of its blocks. */
ts_status add_map(ts_gpu_plan *p, char *why, size_t why_bytes)
{
    if (p->boxes.tokens == 0 || p->blocks.first > p->blocks.last)
        return TS_OK;
    const box_map m = ts_gpu_box_map_of(p->gpu, &p->geometry, p->limits.base, p->blocks);
    ((plan_head *)p->buffer->host)->among = m.among;
    if (m.tokens > 0)
        return TS_OK;
    snprintf(why, why_bytes, "the driver makes no map of blocks %u to %u", p->blocks.first,
             p->blocks.last);
    return TS_EDEVICE;
}

} // namespace

extern "C" ts_status ts_gpu_plan_find_kernels(ts_gpu_plan *p, char *why, size_t why_bytes)
{
    return find_kernels(p, why, why_bytes);
}

extern "C" ts_status ts_gpu_plan_new(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                                     ts_dtype io_dtype, ts_kernel kernel,
                                     const ts_attention_seq *seqs, uint32_t num_seqs,
                                     ts_gpu_plan **out, char *why, size_t why_bytes)
{
    ts_status status = begin_plan(gpu, geometry, heads, io_dtype, kernel, out, why, why_bytes);
    if (status != TS_OK)
        return status;
    ts_gpu_plan *p = *out;
    batch b;
    size_t bytes = 0;
    status = begin_batch(p, seqs, num_seqs, b, why, why_bytes);
    if (status == TS_OK) {
        bytes = lay_out(p, num_seqs, p->count) + p->entries * sizeof(uint32_t);
        status = ts_gpu_buffer_take(gpu, bytes, &p->buffer, why, why_bytes);
    }
    if (status == TS_OK) {
        fill(p, seqs, b, p->buffer->host);
        status = ts_gpu_buffer_upload(gpu, p->buffer, bytes, why, why_bytes);
    }
    batch_fini(b);
    if (status != TS_OK) {
        ts_gpu_plan_free(p);
        *out = NULL;
    }
    return status;
}

extern "C" ts_status ts_gpu_plan_renew(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                                       ts_dtype io_dtype, ts_kernel kernel,
                                       const ts_attention_seq *seqs, uint32_t num_seqs,
                                       ts_gpu_plan **plan, char *why, size_t why_bytes)
{
    ts_gpu_plan *p = *plan;
    bool same = p != NULL && p->gpu == gpu && !p->persistent && p->heads == heads &&
                p->io_dtype == io_dtype && p->kernel == kernel &&
                same_geometry(&p->geometry, geometry) && is_alike(p, seqs, num_seqs);
    if (!same) {
        ts_gpu_plan_free(p);
        return ts_gpu_plan_new(gpu, geometry, heads, io_dtype, kernel, seqs, num_seqs, plan, why,
                               why_bytes);
    }
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status == TS_OK)
        status = ts_gpu_buffer_upload(gpu, p->buffer, write_lengths(p, seqs), why, why_bytes);
    if (status == TS_OK)
        return TS_OK;
    ts_gpu_plan_free(p);
    *plan = NULL;
    return status;
}

extern "C" ts_status ts_gpu_plan_new_persistent(ts_gpu *gpu, const ts_geometry *geometry,
                                                uint32_t heads, ts_dtype io_dtype, ts_kernel kernel,
                                                const ts_gpu_plan_limits *limits, ts_gpu_plan **out,
                                                char *why, size_t why_bytes)
{
    size_t entries = 0;
    ts_status status = begin_plan(gpu, geometry, heads, io_dtype, kernel, out, why, why_bytes);
    if (status != TS_OK)
        return status;
    ts_gpu_plan *p = *out;
    p->persistent = true;
    p->limits = *limits;
    /* Its launches are repeated for whatever comes, and without teams theirs is the slower kernel.
     */
    p->team_kernel = p->plain_team_kernel = p->close_kernel = ts_gpu_kernel{};
    status = make_room(p, &entries, why, why_bytes);
    if (limits->base != NULL && p->room[LIST_WGMMA] + p->room[LIST_FEW] > 0)
        p->boxes = ts_gpu_box_map_of(gpu, geometry, limits->base, block_range{0, 0});
    if (status == TS_OK)
        status = load_append(p, why, why_bytes);
    if (status == TS_OK)
        status = take_memory(p, lay_out(p, limits->seqs, p->room) + entries * sizeof(uint32_t), why,
                             why_bytes);
    if (status != TS_OK) {
        ts_gpu_plan_free(p);
        *out = NULL;
    }
    return status;
}

extern "C" ts_status ts_gpu_plan_set(ts_gpu_plan *p, const ts_attention_seq *seqs,
                                     uint32_t num_seqs, char *why, size_t why_bytes)
{
    const ts_gpu_plan_limits *most = &p->limits;
    uint64_t kv_tokens = 0;
    bool alike = true;
    for (uint32_t i = 0; i < num_seqs; i++) {
        kv_tokens += seqs[i].kv_tokens;
        alike = alike && seqs[i].q_tokens == most->q_tokens;
    }
    if (num_seqs > most->seqs || kv_tokens > most->kv_tokens || !alike) {
        snprintf(why, why_bytes,
                 "%u sequences of %llu tokens; the limits are %u of %llu, with %u new ones each",
                 num_seqs, (unsigned long long)kv_tokens, most->seqs,
                 (unsigned long long)most->kv_tokens, most->q_tokens);
        return TS_EINVAL;
    }
    ts_status status = ts_gpu_enter(p->gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    size_t bytes;
    if (is_alike(p, seqs, num_seqs)) {
        bytes = write_lengths(p, seqs);
    } else {
        batch b;
        status = begin_batch(p, seqs, num_seqs, b, why, why_bytes);
        if (status == TS_OK)
            fill(p, seqs, b, p->buffer->host);
        batch_fini(b);
        if (status != TS_OK)
            return status;
        bytes = p->tables + p->entries * sizeof(uint32_t);
    }
    status = add_map(p, why, why_bytes);
    if (status == TS_OK)
        status = ts_gpu_buffer_upload(p->gpu, p->buffer, bytes, why, why_bytes);
    if (status != TS_OK) {
        p->num_seqs = 0; /* the device has none that the next ones could be like */
        return status;
    }
    cudaError_t error = cudaEventSynchronize(p->buffer->there);
    if (error != cudaSuccess)
        return ts_gpu_fail(error, "uploading a plan", 0, why, why_bytes);
    __atomic_store_n(&p->buffer->is_there, true, __ATOMIC_RELAXED);
    return TS_OK;
}

extern "C" ts_status ts_gpu_plan_clear(ts_gpu_plan *p, char *why, size_t why_bytes)
{
    ts_status status = ts_gpu_enter(p->gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    __atomic_store_n(&p->buffer->is_there, false, __ATOMIC_RELAXED);
    cudaError_t error = cudaMemsetAsync(p->buffer->device, 0, PLAN_SEQS, p->gpu->upload_stream);
    if (error == cudaSuccess)
        error = cudaEventRecord(p->buffer->there, p->gpu->upload_stream);
    return error == cudaSuccess ? TS_OK : ts_gpu_fail(error, "clearing a plan", 0, why, why_bytes);
}

extern "C" void ts_gpu_plan_free(ts_gpu_plan *p)
{
    if (p == NULL)
        return;
    ts_gpu_free_later(p->gpu, p->own_partials);
    ts_gpu_free_later(p->gpu, p->own_counters);
    ts_gpu_buffer_give_back(p->gpu, p->buffer);
    free(p->shared);
    free(p);
}
