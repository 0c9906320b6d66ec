/*
 * From a call as the daemon has it to launches: the sequences' block tables and lists of work items
 * go to the device in one copy, then the new K and V are written, then the kernels run. Which
 * kernel a sequence gets depends on its own shape alone, so its result has the same bits in any
 * company.
 */
#include "common.cuh"

extern "C" {
#include "device.h"
}

#include <string.h>

namespace
{

#define TILE_QUERIES 4u /* from so many query tokens on, `auto` takes the tile kernel */

/* Where things lie in the staging memory, in bytes. */
struct plan {
    size_t seqs, append, decode, tiles, tables, bytes;
    uint32_t num_append, num_decode, num_tiles;
};

divisor divisor_of(uint32_t d)
{
    uint32_t log = 0;
    while (((uint64_t)1 << log) < d)
        log++;
    return divisor{d, (uint32_t)((((uint64_t)1 << (31 + log)) + d - 1) / d), 31 + log};
}

uint32_t blocks_of(const ts_attention_call *call, const ts_attention_seq *s)
{
    return (s->kv_tokens + call->geometry.block_tokens - 1) / call->geometry.block_tokens;
}

/* Query tokens of one tile. */
uint32_t tile_tokens(const ts_attention_call *call)
{
    uint32_t group = call->heads / call->geometry.kv_heads;
    return group < TILE_ROWS ? TILE_ROWS / group : 1;
}

bool takes_tiles(const ts_attention_seq *s, ts_kernel kernel)
{
    return kernel == TS_KERNEL_TILE || (kernel == TS_KERNEL_AUTO && s->q_tokens >= TILE_QUERIES);
}

plan make_plan(const ts_attention_call *call, ts_kernel kernel)
{
    plan p = {};
    size_t entries = 0;
    uint32_t per_tile = tile_tokens(call);
    for (uint32_t i = 0; i < call->num_seqs; i++) {
        const ts_attention_seq *s = &call->seqs[i];
        entries += blocks_of(call, s);
        p.num_append += s->k != NULL ? s->q_tokens : 0;
        if (takes_tiles(s, kernel))
            p.num_tiles += (s->q_tokens + per_tile - 1) / per_tile;
        else
            p.num_decode += s->q_tokens;
    }
    p.append = p.seqs + call->num_seqs * sizeof(gpu_seq);
    p.decode = p.append + p.num_append * sizeof(uint2);
    p.tiles = p.decode + p.num_decode * sizeof(uint2);
    p.tables = p.tiles + p.num_tiles * sizeof(uint2);
    p.bytes = p.tables + entries * sizeof(uint32_t);
    return p;
}

/* Fills the staging memory; device addresses in it start at `device`. */
void fill(const ts_attention_call *call, ts_kernel kernel, const plan &p, unsigned char *host,
          const unsigned char *device)
{
    gpu_seq *seqs = (gpu_seq *)(host + p.seqs);
    uint2 *append = (uint2 *)(host + p.append), *decode = (uint2 *)(host + p.decode);
    uint2 *tiles = (uint2 *)(host + p.tiles);
    uint32_t *table = (uint32_t *)(host + p.tables);
    uint32_t per_tile = tile_tokens(call);
    for (uint32_t i = 0; i < call->num_seqs; i++) {
        const ts_attention_seq *s = &call->seqs[i];
        uint32_t blocks = blocks_of(call, s);
        seqs[i] = gpu_seq{(const uint32_t *)(device + ((unsigned char *)table - host)),
                          s->q,
                          s->k,
                          s->v,
                          s->out,
                          s->sinks,
                          s->alibi,
                          s->lse,
                          s->kv_tokens,
                          s->q_tokens,
                          s->layer};
        memcpy(table, s->blocks, blocks * sizeof *table);
        table += blocks;
        for (uint32_t q = 0; s->k != NULL && q < s->q_tokens; q++)
            *append++ = make_uint2(i, q);
        if (takes_tiles(s, kernel))
            for (uint32_t q = 0; q < s->q_tokens; q += per_tile)
                *tiles++ = make_uint2(i, q);
        else
            for (uint32_t q = 0; q < s->q_tokens; q++)
                *decode++ = make_uint2(i, q);
    }
}

gpu_call call_of(const ts_attention_call *call, const plan &p, const unsigned char *device)
{
    const ts_geometry *g = &call->geometry;
    gpu_call c = {};
    c.base = call->base;
    c.block_bytes = ts_geometry_block_bytes(g);
    c.plane_bytes = ts_geometry_plane_bytes(g);
    c.token_stride = ts_geometry_token_stride(g);
    c.head_stride = ts_geometry_head_stride(g);
    c.seqs = (const gpu_seq *)(device + p.seqs);
    c.heads = call->heads;
    c.kv_heads = g->kv_heads;
    c.group = call->heads / g->kv_heads;
    c.head_dim = g->head_dim;
    c.block_tokens = divisor_of(g->block_tokens);
    c.io_fp32 = call->io_dtype == TS_DTYPE_FP32;
    c.scale_log2 = call->variant.scale * 1.4426950408889634f;
    c.cap_log2 = call->variant.soft_cap * 1.4426950408889634f;
    c.window = call->variant.window;
    return c;
}

cudaError_t launch_decode(const gpu_call &c, const ts_geometry *g, ts_kernel kernel,
                          cudaStream_t stream)
{
    switch (kernel) {
    case TS_KERNEL_V1:
        return launch_v1(c, g->dtype, stream);
    case TS_KERNEL_V2:
        return launch_v2(c, g->dtype, stream);
    case TS_KERNEL_V3:
        return launch_v3(c, g->dtype, stream);
    case TS_KERNEL_V4:
        return launch_v4(c, g->dtype, stream);
    default:
        return v4_fits(g) ? launch_v4(c, g->dtype, stream) : launch_v3(c, g->dtype, stream);
    }
}

} // namespace

extern "C" ts_status ts_gpu_launch_attend(ts_gpu_launch *l, const ts_attention_call *call,
                                          ts_kernel kernel)
{
    const ts_geometry *g = &call->geometry;
    ts_status status = ts_gpu_enter(l->gpu, l->why, sizeof l->why);
    if (status == TS_OK)
        status = ts_kernel_check(kernel, g, l->why, sizeof l->why);
    plan p = make_plan(call, kernel);
    if (status == TS_OK)
        status = ts_gpu_launch_reserve(l, p.bytes);
    if (status != TS_OK)
        return status;
    fill(call, kernel, p, l->host, l->device);
    cudaError_t error =
        cudaMemcpyAsync(l->device, l->host, p.bytes, cudaMemcpyHostToDevice, l->stream);
    gpu_call c = call_of(call, p, l->device);
    if (error == cudaSuccess && p.num_append > 0) {
        c.items = (const uint2 *)(l->device + p.append);
        c.num_items = p.num_append;
        error = launch_append(c, g->dtype, l->stream);
    }
    if (error == cudaSuccess && p.num_decode > 0) {
        c.items = (const uint2 *)(l->device + p.decode);
        c.num_items = p.num_decode;
        error = launch_decode(c, g, kernel, l->stream);
    }
    if (error == cudaSuccess && p.num_tiles > 0) {
        c.items = (const uint2 *)(l->device + p.tiles);
        c.num_items = p.num_tiles;
        error = launch_tile(c, g->dtype, l->stream);
    }
    return ts_gpu_launch_fail(l, error);
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
    memcpy(l->host, copies, bytes);
    cudaError_t error =
        cudaMemcpyAsync(l->device, l->host, bytes, cudaMemcpyHostToDevice, l->stream);
    if (error == cudaSuccess)
        error = launch_copies(base, block_bytes, (const ts_block_copy *)l->device, num_copies,
                              l->stream);
    return ts_gpu_launch_fail(l, error);
}
