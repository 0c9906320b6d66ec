/*
 * From runs of planned batches to launches: each list of the plans' items is one kernel launch for
 * up to GPU_RUNS runs. And all kernels that those may be are loaded before.
 */
#include "cache.cuh"
#include "decode.cuh"
#include "prefill.cuh"
#include "tile_shapes.cuh"

extern "C" {
#include "box_map.h"
#include "dtypes.h"
#include "plan.h"
#include "waves.h"
}

#include <math.h>
#include <string.h>

namespace
{

divisor divisor_of(uint32_t d)
{
    uint32_t log = 0;
    while (((uint64_t)1 << log) < d)
        log++;
    return divisor{d, (uint32_t)((((uint64_t)1 << (31 + log)) + d - 1) / d), 31 + log};
}

gpu_call call_of(const ts_gpu_plan *p, unsigned char *base, const ts_attention_variant *variant)
{
    const ts_geometry *g = &p->geometry;
    gpu_call c = {};
    c.base = base;
    c.block_bytes = ts_geometry_block_bytes(g);
    c.plane_bytes = ts_geometry_plane_bytes(g);
    c.token_stride = ts_geometry_token_stride(g);
    c.head_stride = ts_geometry_head_stride(g);
    c.heads = p->heads;
    c.kv_heads = g->kv_heads;
    c.group = p->heads / g->kv_heads;
    c.head_dim = g->head_dim;
    c.block_tokens = divisor_of(g->block_tokens);
    c.groups = divisor_of(c.group);
    c.io = p->io_dtype;
    c.io_bytes = (uint32_t)ts_dtype_bytes(p->io_dtype);
    c.cache_bytes = (uint32_t)ts_dtype_bytes(g->dtype);
    c.scale_log2 = variant->scale * 1.4426950408889634f;
    c.cap_log2 = variant->soft_cap * 1.4426950408889634f;
    c.window = variant->window;
    c.rope = variant->rope;
    c.rope_log2 = variant->rope.theta == 0 ? 0 : log2((double)variant->rope.theta);
    return c;
}

/* What follows in the launch's stream starts when the plans are on the device. */
cudaError_t await_plans(ts_gpu_launch *l, const ts_gpu_run *runs, uint32_t num_runs)
{
    cudaError_t error = cudaSuccess;
    for (uint32_t i = 0; i < num_runs && error == cudaSuccess; i++) {
        ts_gpu_buffer *b = runs[i].plan->buffer;
        if (__atomic_load_n(&b->is_there, __ATOMIC_RELAXED))
            continue;
        error = cudaEventQuery(b->there);
        if (error == cudaSuccess)
            __atomic_store_n(&b->is_there, true, __ATOMIC_RELAXED);
        else if (error == cudaErrorNotReady) {
            (void)cudaGetLastError(); /* a launch that looks at the last error isn't to see it */
            error = cudaStreamWaitEvent(l->stream, b->there, 0);
        }
    }
    return error;
}

/* The first counters of a launch; its pieces' counters follow. */
uint32_t *tickets_of(const ts_gpu_launch *l, const ts_gpu_plan *p)
{
    return p->persistent ? p->own_counters : l->slot->counters;
}

/* The call's runs, over one list of items. Of a persistent plan the device alone knows, when the
 * launch runs, how many there are. */
void set_runs(gpu_call &c, const ts_gpu_launch *l, ts_gpu_list list, const ts_gpu_run *runs,
              uint32_t num_runs)
{
    const ts_gpu_plan *first = runs[0].plan;
    float *partials = first->persistent ? first->own_partials : l->slot->partials;
    uint32_t *counters = tickets_of(l, first) + OWN_COUNTERS;
    c.num_items = 0;
    c.num_runs = num_runs;
    c.least_items = ~0u;
    c.items_there =
        first->persistent ? ((const plan_head *)first->buffer->device)->counts + list : NULL;
    for (uint32_t i = 0; i < num_runs; i++) {
        const ts_gpu_run *r = &runs[i];
        const ts_gpu_plan *p = r->plan;
        const unsigned char *at = p->buffer->device;
        const uint32_t items = p->persistent ? p->room[list] : p->count[list];
        c.num_items += items;
        c.least_items = items < c.least_items ? items : c.least_items;
        c.runs[i] = gpu_run{at + p->items[list],
                            (const plan_seq *)(at + PLAN_SEQS),
                            (const uint32_t *)(at + p->tables),
                            r->q,
                            r->k,
                            r->v,
                            r->out,
                            r->sinks,
                            r->alibi,
                            r->scales,
                            r->lse,
                            partials,
                            counters,
                            r->layer,
                            c.num_items,
                            {r->words[0], r->words[1]},
                            r->number};
        partials += p->records * ts_gpu_record_floats(&p->geometry);
        counters += p->counters;
    }
}

/* Whether pieces may be teams'. */
bool has_teams(const ts_gpu_run *runs, uint32_t num_runs)
{
    bool any = false;
    for (uint32_t i = 0; i < num_runs; i++)
        any = any || runs[i].plan->shared != NULL;
    return any;
}

/*
 * What the second-level cache is told. It is to keep partial results and outputs if they are few
 * beside it. Where a launch writes so much that the cache can't, K and V aren't to leave it first
 * either: then what was written would be evicted in between, a little here and there, which costs
 * more. Beside teams, partial results are most of what is written, and K and V are read once. Runs
 * may share what they read; that isn't looked for.
 */
void set_cache_hints(gpu_call &c, const ts_gpu_run *runs, uint32_t num_runs)
{
    size_t records = 0, q_tokens = 0, l2 = runs[0].plan->gpu->info.l2_bytes;
    for (uint32_t i = 0; i < num_runs; i++) {
        records += runs[i].plan->records;
        q_tokens += runs[i].plan->q_tokens;
    }
    size_t partials = records * ts_gpu_record_floats(&runs[0].plan->geometry) * sizeof(float);
    size_t out = q_tokens * c.heads * c.head_dim * c.io_bytes;
    c.alone = num_runs == 1 && partials + out <= l2 / 2;
    c.keeps_partials = partials <= (has_teams(runs, num_runs) ? l2 * 2 / 5 : l2 / 4);
    c.keeps_out = partials + out <= l2 / 4;
}

/* The blocks that wgmma's sequences have lie among these. */
block_range blocks_of(const ts_gpu_run *runs, uint32_t num_runs)
{
    block_range all = {UINT32_MAX, 0};
    for (uint32_t i = 0; i < num_runs; i++) {
        const ts_gpu_plan *p = runs[i].plan;
        if (p->count[LIST_WGMMA] + p->count[LIST_FEW] == 0)
            continue;
        all.first = p->blocks.first < all.first ? p->blocks.first : all.first;
        all.last = p->blocks.last > all.last ? p->blocks.last : all.last;
    }
    return all;
}

/* Whether it lies in the device's own memory. */
bool is_on_device(const void *memory)
{
    cudaPointerAttributes its = {};
    if (cudaPointerGetAttributes(&its, memory) == cudaSuccess)
        return its.type == cudaMemoryTypeDevice;
    (void)cudaGetLastError(); /* a launch that looks at the last error isn't to see it */
    return false;
}

/* Whether a launch of wgmma may store the sequences itself that are all new: there is one run, and
 * its new rows are as the cache has them. It reads them once for each tile of q, where an append
 * does so once: they aren't to come from the host each time. */
bool may_store(const wgmma_call &wgmma, const gpu_call &c, const ts_gpu_run *runs,
               uint32_t num_runs)
{
    const ts_gpu_run *r = &runs[0];
    const ts_gpu_plan *p = r->plan;
    const bool alike = p->io_dtype == p->geometry.dtype && c.cache_bytes == 2 && c.rope.theta == 0;
    return num_runs == 1 && p->storable > 0 && r->k != NULL && alike && wgmma.boxes.tokens > 0 &&
           ((uintptr_t)r->k | (uintptr_t)r->v) % 16 == 0 && is_on_device(r->k) &&
           is_on_device(r->v);
}

/* Gives it the run's own rows, if so. */
void add_rows(wgmma_call &wgmma, const ts_gpu_run *r)
{
    const ts_gpu_plan *p = r->plan;
    const ts_geometry *g = &p->geometry;
    const void *const rows[] = {r->k, r->v};
    wgmma.stores = wgmma.wide = true;
    for (int i = 0; i < 2; i++) {
        wgmma.stores =
            wgmma.stores && ts_gpu_eight_map_of(p->gpu, g, rows[i], p->q_tokens, &wgmma.eight[i]);
        wgmma.wide = wgmma.wide && ts_gpu_many_map_of(p->gpu, g, rows[i], p->q_tokens,
                                                      wgmma.boxes.tokens, &wgmma.many[i]);
    }
}

/* Whether K and V of a sequence's heads are so much more than the second-level cache has that
 * blocks of threads are to work on one head after the other: then those of one are read by all at
 * about the same time. Where they are less that only costs (doc/notebook.md). */
bool keeps_no_heads(const ts_gpu_plan *p, size_t tokens)
{
    const ts_geometry *g = &p->geometry;
    const size_t bytes = tokens * 2 * g->kv_heads * g->head_dim * ts_dtype_bytes(g->dtype);
    return bytes > 2 * p->gpu->info.l2_bytes;
}

/* What launches of the runs' lists that are wgmma's have beside a gpu_call. */
wgmma_call wgmma_call_of(const gpu_call &c, const ts_gpu_launch *l, const ts_gpu_run *runs,
                         uint32_t num_runs)
{
    const ts_gpu_plan *p = runs[0].plan;
    wgmma_call wgmma = {};
    wgmma.tickets = tickets_of(l, p);
    if (p->persistent) {
        wgmma.boxes = p->boxes;
        wgmma.among = &((const plan_head *)p->buffer->device)->among;
        wgmma.folds = (float4 *)p->own_folds;
        return wgmma;
    }
    size_t records = 0, longest = 0;
    bool any = false;
    for (uint32_t i = 0; i < num_runs; i++) {
        const ts_gpu_plan *its = runs[i].plan;
        records += its->records;
        longest = its->longest > longest ? its->longest : longest;
        any = any || its->count[LIST_WGMMA] + its->count[LIST_FEW] > 0;
    }
    if (!any)
        return wgmma;
    wgmma.by_heads = keeps_no_heads(p, longest);
    wgmma.boxes = ts_gpu_box_map_of(p->gpu, &p->geometry, c.base, blocks_of(runs, num_runs));
    wgmma.folds = (float4 *)(l->slot->partials + records * ts_gpu_record_floats(&p->geometry));
    if (may_store(wgmma, c, runs, num_runs))
        add_rows(wgmma, &runs[0]);
    return wgmma;
}

/* Of a launch over a persistent plan, on each processor: enough that those which come free take
 * what is left, and few enough that those without a piece cost little. */
#define PERSISTENT_BLOCKS 12u

/* One block for each piece and KV head. */
cudaError_t launch_pieces(const gpu_call &c, const ts_gpu_plan *p, const ts_gpu_kernel &kernel,
                          cudaStream_t stream)
{
    void *arguments[] = {(void *)&c};
    uint64_t blocks = (uint64_t)c.num_items * c.kv_heads;
    if (p->persistent && blocks > p->gpu->info.processors * PERSISTENT_BLOCKS)
        blocks = p->gpu->info.processors * PERSISTENT_BLOCKS;
    return cudaLaunchKernel(kernel.function, dim3((uint32_t)blocks), dim3(kernel.threads),
                            arguments, kernel.bytes, stream);
}

/* One block on each processor, which takes pieces one after the other. */
cudaError_t launch_wgmma(const gpu_call &c, const ts_gpu_plan *p, const ts_gpu_kernel &kernel,
                         const wgmma_call &wgmma, cudaStream_t stream)
{
    void *arguments[] = {(void *)&c, (void *)&wgmma};
    uint64_t blocks = (uint64_t)c.num_items * c.kv_heads;
    if (blocks > p->gpu->info.processors)
        blocks = p->gpu->info.processors;
    return cudaLaunchKernel(kernel.function, dim3((uint32_t)blocks), dim3(kernel.threads),
                            arguments, kernel.bytes, stream);
}

/* Whether something happens to scores of a run beside scaling by a positive factor. */
bool any_is_varied(const gpu_call &c, const ts_gpu_run *runs, uint32_t num_runs)
{
    bool varied = !(c.scale_log2 > 0);
    for (uint32_t i = 0; i < num_runs; i++)
        varied = varied || is_varied(c, runs[i].alibi);
    return varied;
}

/* Whether it is a plain_call, where the plan has a kernel for those. */
bool is_plain(const gpu_call &c, const ts_gpu_run *runs, uint32_t num_runs)
{
    bool plain = !takes_fp32(c) && !turns_rows(c) && c.window == 0;
    for (uint32_t i = 0; i < num_runs; i++)
        plain = plain && !is_varied(c, runs[i].alibi);
    return plain;
}

/* v5's kernel for few rows that a launch of the runs takes. */
const ts_gpu_kernel &narrow_kernel(const gpu_call &c, const ts_gpu_run *runs, uint32_t num_runs)
{
    const ts_gpu_plan *p = runs[0].plan;
    uint32_t shortest = UINT32_MAX, longest = 0;
    const bool plain = is_plain(c, runs, num_runs);
    if (has_teams(runs, num_runs))
        return plain && p->plain_team_kernel.function != NULL ? p->plain_team_kernel
                                                              : p->team_kernel;
    if (!plain || p->plain_kernel.function == NULL)
        return p->kernels[LIST_NARROW];
    for (uint32_t i = 0; i < num_runs; i++) {
        const ts_gpu_plan *its = runs[i].plan;
        shortest = its->shortest_piece < shortest ? its->shortest_piece : shortest;
        longest = its->longest_piece > longest ? its->longest_piece : longest;
    }
    return p->close_kernel.function != NULL &&
                   is_close_faster((uint64_t)c.num_items * c.kv_heads, p->gpu->info.processors,
                                   shortest, longest)
               ? p->close_kernel
               : p->plain_kernel;
}

cudaError_t launch_list(const gpu_call &c, ts_gpu_list list, const ts_gpu_plan *p,
                        cudaStream_t stream)
{
    ts_dtype dtype = p->geometry.dtype;
    if (list == LIST_APPEND)
        return launch_append(c, dtype, stream);
    if (list == LIST_TILE)
        return launch_tile(c, p->kernels[list], stream);
    if (list >= LIST_NARROW)
        return launch_pieces(c, p, p->kernels[list], stream);
    ts_kernel kernel = p->kernel;
    if (kernel == TS_KERNEL_AUTO) /* it has nothing better here */
        kernel = loads_vectors(&p->geometry) ? TS_KERNEL_V4 : TS_KERNEL_V3;
    switch (kernel) {
    case TS_KERNEL_V1:
        return launch_v1(c, dtype, stream);
    case TS_KERNEL_V2:
        return launch_v2(c, dtype, stream);
    case TS_KERNEL_V4:
        return launch_v4(c, dtype, stream);
    default:
        return launch_v3(c, dtype, stream);
    }
}

/* Room for the partial results of any GPU_RUNS of the runs that are launched together. */
ts_status reserve(ts_gpu_launch *l, const ts_gpu_run *runs, uint32_t num_runs)
{
    size_t most_records = 0, most_counters = 0;
    bool folds = false, own = true; /* all of them have their own: nothing is taken in a capture */
    for (uint32_t first = 0; first < num_runs; first += GPU_RUNS) {
        size_t records = 0, counters = 0;
        for (uint32_t i = first; i < num_runs && i < first + GPU_RUNS; i++) {
            if (runs[i].plan->persistent) /* it has its own */
                continue;
            own = false;
            records += runs[i].plan->records;
            counters += runs[i].plan->counters;
            folds = folds || runs[i].plan->folds;
        }
        most_records = records > most_records ? records : most_records;
        most_counters = counters > most_counters ? counters : most_counters;
    }
    most_counters += own ? 0 : OWN_COUNTERS;
    size_t floats = most_records * ts_gpu_record_floats(&runs[0].plan->geometry);
    floats += folds ? wgmma_fold_floats(&runs[0].plan->geometry, l->gpu->info.processors) : 0;
    return ts_gpu_launch_scratch(l, floats * sizeof(float), most_counters);
}

bool have_words(const ts_gpu_run *runs, uint32_t num_runs)
{
    bool any = false;
    for (uint32_t i = 0; i < num_runs; i++)
        any = any || runs[i].words[0] != NULL || runs[i].words[1] != NULL;
    return any;
}

/* Whether one kernel does all of it, and it is one whose last block can tell the end. */
bool tells_end(const ts_gpu_run *runs, uint32_t num_runs)
{
    uint32_t lists = 0;
    if (num_runs > GPU_RUNS)
        return false;
    for (uint32_t i = 0; i < num_runs; i++) {
        if (runs[i].plan->persistent)
            return false;
        for (uint32_t list = 0; list < LIST_COUNT; list++)
            if (runs[i].plan->count[list] > 0)
                lists |= 1u << list;
    }
    return lists == 1u << LIST_NARROW || lists == 1u << LIST_MEDIUM || lists == 1u << LIST_WIDE;
}

/* Words of the runs, by a kernel or stream operations behind what was queued; `last`: and what
 * tells the launch's end. */
ts_status tell(ts_gpu_launch *l, const ts_gpu_run *runs, uint32_t num_runs, uint32_t from,
               uint32_t to, bool last)
{
    const ts_gpu_signal nobody = {};
    ts_gpu_signal signals[2 * GPU_RUNS];
    uint32_t count = 0;
    for (uint32_t word = from; word < to; word++)
        for (uint32_t i = 0; i < num_runs; i++)
            if (runs[i].words[word] != NULL)
                signals[count++] = ts_gpu_signal{runs[i].words[word], runs[i].number};
    return last ? ts_gpu_launch_signal(l, signals, count)
                : ts_gpu_launch_words(l, signals, count, &nobody);
}

/* All words of all runs, every run's in their order: those of one run are stream operations. */
ts_status tell_runs(ts_gpu_launch *l, const ts_gpu_run *runs, uint32_t num_runs)
{
    if (num_runs == 1)
        return tell(l, runs, 1, 0, 2, true);
    ts_status status = TS_OK;
    for (uint32_t word = 0; word < 2; word++)
        for (uint32_t first = 0; first < num_runs && status == TS_OK; first += GPU_RUNS) {
            uint32_t count = num_runs - first < GPU_RUNS ? num_runs - first : GPU_RUNS;
            bool last = word == 1 && first + GPU_RUNS >= num_runs;
            status = tell(l, runs + first, count, word, word + 1, last);
        }
    return status;
}

cudaError_t launch_some(ts_gpu_launch *l, gpu_call &c, const ts_gpu_run *runs, uint32_t num_runs)
{
    const ts_gpu_plan *p = runs[0].plan; /* they are alike */
    cudaError_t error = await_plans(l, runs, num_runs);
    set_cache_hints(c, runs, num_runs);
    wgmma_call wgmma = wgmma_call_of(c, l, runs, num_runs);
    for (uint32_t list = 0; list < LIST_COUNT && error == cudaSuccess; list++) {
        set_runs(c, l, (ts_gpu_list)list, runs, num_runs);
        if (list == LIST_APPEND && wgmma.stores)
            c.num_items = c.runs[0].end -= p->storable;
        if (c.num_items == 0)
            continue;
        if (list == LIST_NARROW) {
            error = launch_pieces(c, p, narrow_kernel(c, runs, num_runs), l->stream);
            continue;
        }
        if (list < LIST_WGMMA) {
            error = launch_list(c, (ts_gpu_list)list, p, l->stream);
            continue;
        }
        wgmma.stores = wgmma.stores && list == LIST_WGMMA;
        bool varied = any_is_varied(c, runs, num_runs);
        error = launch_wgmma(c, p, varied ? p->varied_wgmma : p->kernels[list], wgmma, l->stream);
    }
    return error;
}

/* Loads the kernels that are no list's own. */
cudaError_t load_others(const ts_geometry *g)
{
    gpu_call c = {};
    c.head_dim = g->head_dim;
    cudaError_t error = load_copies();
    for (int capped = 0; capped < 2 && error == cudaSuccess; capped++) {
        c.cap_log2 = (float)capped;
        error = launch_v1(c, g->dtype, NULL);
    }
    if (error == cudaSuccess)
        error = launch_v2(c, g->dtype, NULL);
    if (error == cudaSuccess)
        error = launch_v3(c, g->dtype, NULL);
    if (error == cudaSuccess && loads_vectors(g))
        error = launch_v4(c, g->dtype, NULL);
    return error == cudaSuccess ? launch_append(c, g->dtype, NULL) : error;
}

} // namespace

extern "C" ts_status ts_gpu_load(ts_gpu *gpu, const ts_geometry *geometry, char *why,
                                 size_t why_bytes)
{
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status == TS_OK)
        status = ts_gpu_load_begin(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    for (uint32_t io = 0; io < TS_DTYPE_COUNT && status == TS_OK; io++) {
        ts_gpu_plan any = {};
        any.gpu = gpu;
        any.geometry = *geometry;
        any.io_dtype = (ts_dtype)io;
        if (ts_dtype_is_io(any.io_dtype, geometry->dtype))
            status = ts_gpu_plan_find_kernels(&any, why, why_bytes);
    }
    if (status == TS_OK) {
        cudaError_t error = load_others(geometry);
        if (error != cudaSuccess)
            status = ts_gpu_fail(error, "loading kernels", 0, why, why_bytes);
    }
    ts_gpu_load_end(gpu);
    return status;
}

extern "C" ts_status ts_gpu_launch_prepare(ts_gpu_launch *l, const ts_gpu_plan *plan)
{
    ts_gpu_run run = {};
    run.plan = plan;
    ts_status status = ts_gpu_enter(l->gpu, l->why, sizeof l->why);
    if (status == TS_OK)
        status = reserve(l, &run, 1);
    if (status != TS_OK)
        return status;
    cudaError_t error = cudaEventSynchronize(plan->buffer->there);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(l->stream); /* counters that were made anew are 0 */
    if (error == cudaSuccess)
        __atomic_store_n(&plan->buffer->is_there, true, __ATOMIC_RELAXED);
    return ts_gpu_launch_fail(l, error);
}

extern "C" ts_status ts_gpu_launch_attend(ts_gpu_launch *l, unsigned char *base,
                                          const ts_attention_variant *variant,
                                          const ts_gpu_run *runs, uint32_t num_runs)
{
    ts_status status = ts_gpu_enter(l->gpu, l->why, sizeof l->why);
    if (status == TS_OK) /* all of it before anything is launched: then nothing is half done */
        status = reserve(l, runs, num_runs);
    if (status != TS_OK)
        return status;
    gpu_call c = call_of(runs[0].plan, base, variant);
    cudaError_t error = cudaSuccess;
    l->tells_end = false;
    const bool told = have_words(runs, num_runs), by_kernel = told && tells_end(runs, num_runs);
    if (by_kernel) {
        c.arrived = l->slot->counters + WGMMA_TICKETS;
        c.num_told = num_runs;
        c.end_word = l->end_there;
        c.end_value = ++l->end_value;
    }
    for (uint32_t first = 0; first < num_runs && error == cudaSuccess; first += GPU_RUNS) {
        uint32_t count = num_runs - first < GPU_RUNS ? num_runs - first : GPU_RUNS;
        error = launch_some(l, c, runs + first, count);
    }
    status = ts_gpu_launch_fail(l, error);
    if (status == TS_OK && told && !by_kernel)
        return tell_runs(l, runs, num_runs);
    l->tells_end = status == TS_OK && by_kernel;
    return status;
}

extern "C" ts_status ts_gpu_launch_copies(ts_gpu_launch *l, unsigned char *base, size_t block_bytes,
                                          const ts_block_copy *copies, uint32_t num_copies)
{
    size_t bytes = num_copies * sizeof *copies;
    ts_status status = ts_gpu_enter(l->gpu, l->why, sizeof l->why);
    if (status == TS_OK)
        status = ts_gpu_launch_reserve(l, bytes);
    if (status != TS_OK)
        return status;
    l->tells_end = false;
    memcpy(l->slot->host, copies, bytes);
    cudaError_t error =
        cudaMemcpyAsync(l->slot->device, l->slot->host, bytes, cudaMemcpyHostToDevice, l->stream);
    if (error == cudaSuccess)
        error = launch_copies(base, block_bytes, (const ts_block_copy *)l->slot->device, num_copies,
                              l->stream);
    return ts_gpu_launch_fail(l, error);
}
