#include "block_table_cache.h"
#include "error.h"
#include "gpu_context.h"
#include "options.h"
#include "pool_map.h"
#include "rpc.h"
#include "slab_returns.h"
#include "unconst.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POOLS_MAX 64u /* of a daemon: each has a bit of unheard_closes */

static void pool_free(ts_pool *p)
{
    if (p == NULL)
        return;
    ts_tables_fini(p);
    free(p->mapped);
    free(p->revoked);
    free(p->wanted);
    free(p->written);
    free(p);
}

/* It isn't among the client's any more, and nothing of it is mapped. */
static void remove_and_unmap(ts_pool *p)
{
    ts_client *c = p->client;
    ts_pool **at = &c->pools;
    ts_slab_returns_lock(c);
    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    ts_pool_unmap(p);
    ts_slab_returns_unlock(c);
}

/* Tells the daemon, unless the session has it open once more. A refusal is as good: sequences stay,
 * and the pool with them. */
static void close_at_daemon(ts_client *c, uint32_t index)
{
    for (const ts_pool *other = c->pools; other != NULL; other = other->next)
        if (other->index == index)
            return;
    Tspb__PoolClose body = TSPB__POOL_CLOSE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    body.pool = index;
    request.body_case = TSPB__REQUEST__BODY_POOL_CLOSE;
    request.pool_close = &body;
    const ts_status status = ts_call_briefly(c, &request);
    if (status == TS_ECONN || status == TS_ETIMEOUT)
        c->unheard_closes |= 1ull << index;
}

/* Fills in the pool as the daemon describes it. */
static ts_status describe(ts_client *c, ts_pool *p, const Tspb__PoolOpened *o, bool writable)
{
    const uint32_t blocks = o->max_blocks > o->num_blocks ? o->max_blocks : o->num_blocks;
    char why[sizeof c->error.text];
    *p = (ts_pool){
        .client = c,
        .index = o->pool,
        .geometry = {.layers = o->layers,
                     .kv_heads = o->kv_heads,
                     .head_dim = o->head_dim,
                     .block_tokens = o->block_tokens,
                     .dtype = (ts_dtype)o->dtype,
                     .layout = (ts_layout)o->layout},
        .num_blocks = blocks,
        .slab_blocks = o->slab_blocks,
        .num_slabs = (blocks - 1) / o->slab_blocks + 1,
        .sequence_tokens_max = o->sequence_tokens_max,
        .writable = writable,
        .on_gpu = o->device_uuid.len == TS_UUID_BYTES,
    };
    snprintf(p->device, sizeof p->device, "%s", o->device);
    snprintf(p->memory, sizeof p->memory, "%s", o->memory);
    snprintf(p->kernel, sizeof p->kernel, "%s", o->kernel);
    if (p->on_gpu)
        memcpy(p->uuid, o->device_uuid.data, TS_UUID_BYTES);
    ts_status status = ts_geometry_check(&p->geometry, why, sizeof why);
    return status == TS_OK ? TS_OK : ts_fail(c, status, "%s", why);
}

/* What is known of each slab: nothing yet. */
static ts_status make_slab_lists(ts_client *c, ts_pool *p)
{
    p->mapped = calloc(p->num_slabs, sizeof *p->mapped);
    p->revoked = calloc(p->num_slabs, sizeof *p->revoked);
    p->wanted = calloc(p->num_slabs, sizeof *p->wanted);
    p->written = calloc(p->num_slabs, sizeof *p->written);
    if (p->mapped != NULL && p->revoked != NULL && p->wanted != NULL && p->written != NULL)
        return TS_OK;
    return ts_fail(c, TS_ENOMEM, "no memory for a pool of %u slabs", p->num_slabs);
}

ts_status ts_pool_open(ts_client *c, const char *name, unsigned flags, ts_pool **out)
{
    Tspb__PoolOpen open = TSPB__POOL_OPEN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    *out = NULL;
    TS_ENTER(c);
    if (flags & ~(unsigned)TS_POOL_WRITABLE)
        return ts_fail(c, TS_EINVAL, "flags %#x; known is TS_POOL_WRITABLE (%#x)", flags,
                       TS_POOL_WRITABLE);
    open.name = ts_unconst(name);
    open.writable = flags & TS_POOL_WRITABLE;
    request.body_case = TSPB__REQUEST__BODY_POOL_OPEN;
    request.pool_open = &open;
    ts_status status = ts_call(c, &request, &reply);
    if (status != TS_OK)
        return status;
    ts_pool *p = calloc(1, sizeof *p);
    const Tspb__PoolOpened *o = reply->pool_opened;
    if (p == NULL)
        status = ts_fail(c, TS_ENOMEM, "no memory for a pool");
    else if (reply->body_case != TSPB__REPLY__BODY_POOL_OPENED || o->num_blocks == 0 ||
             o->slab_blocks == 0 || o->pool >= POOLS_MAX)
        status = ts_fail(c, TS_EPROTO, "the daemon's answer describes no pool");
    else
        status = describe(c, p, o, open.writable);
    if (status == TS_OK)
        status = make_slab_lists(c, p);
    tspb__reply__free_unpacked(reply, NULL);
    if (status != TS_OK) {
        pool_free(p);
        return status;
    }
    ts_slab_returns_lock(c);
    p->next = c->pools;
    c->pools = p;
    ts_slab_returns_unlock(c);
    c->pools_are_new = true;
    c->unheard_closes &= ~(1ull << p->index);
    *out = p;
    return TS_OK;
}

void ts_pool_close(ts_pool *p)
{
    if (p == NULL)
        return;
    TS_ENTER_LAST(p->client);
    remove_and_unmap(p);
    if (p->client->exchange_pool == p)
        p->client->exchange_pool = NULL;
    close_at_daemon(p->client, p->index);
    pool_free(p);
}

const ts_geometry *ts_pool_geometry(const ts_pool *p, uint32_t layer)
{
    return layer < p->geometry.layers ? &p->geometry : NULL;
}

uint32_t ts_pool_blocks(const ts_pool *p)
{
    return p->num_blocks;
}

uint32_t ts_pool_sequence_max(const ts_pool *p)
{
    return p->sequence_tokens_max;
}

const char *ts_pool_device(const ts_pool *p)
{
    return p->device;
}

ts_status ts_pool_stats(ts_pool *p, ts_pool_room *out)
{
    TS_ENTER(p->client);
    Tspb__PoolRoom body = TSPB__POOL_ROOM__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    const size_t size = out->size;
    ts_status status = ts_result_check(p->client, TS_STRUCT_POOL_ROOM, size);
    if (status != TS_OK)
        return status;
    body.pool = p->index;
    request.body_case = TSPB__REQUEST__BODY_POOL_ROOM;
    request.pool_room = &body;
    status = ts_call(p->client, &request, &reply);
    if (status != TS_OK)
        return status;
    const Tspb__Room *r = reply->room;
    if (reply->body_case == TSPB__REPLY__BODY_ROOM)
        ts_result_put(TS_STRUCT_POOL_ROOM, out, size,
                      &(ts_pool_room){.size = size,
                                      .blocks = r->blocks,
                                      .available = r->available,
                                      .used = r->used,
                                      .cached = r->cached,
                                      .pinned = r->pinned,
                                      .limit = r->limit,
                                      .others = r->others,
                                      .sequences = r->sequences,
                                      .waiting = r->waiting,
                                      .asked_tokens = r->asked_tokens,
                                      .found_tokens = r->found_tokens});
    else
        status = ts_fail(p->client, TS_EPROTO, "the daemon's answer tells no room");
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

const char *ts_pool_memory(const ts_pool *p)
{
    return p->memory;
}

ts_status ts_pool_check_layer(ts_pool *p, uint32_t layer)
{
    if (layer < p->geometry.layers)
        return TS_OK;
    return ts_fail_beyond(p->client, TS_EINVAL, layer, p->geometry.layers,
                          "layer %u; the pool has %u", layer, p->geometry.layers);
}

ts_status ts_pool_map(ts_pool *p, const uint64_t *slots, size_t count, uint32_t layer, void **base)
{
    *base = NULL;
    TS_ENTER(p->client);
    ts_status status = ts_pool_check_layer(p, layer);
    for (size_t i = 0; i < count && status == TS_OK; i++)
        status = ts_pool_map_block(p, slots[i] / p->geometry.block_tokens, p->writable);
    if (status == TS_OK)
        *base = p->base;
    return status;
}

ts_status ts_pool_cuda_device(ts_pool *p, int *ordinal)
{
    TS_ENTER(p->client);
    ts_cuda *cuda;
    ts_status status = ts_client_cuda(p->client, p, &cuda);
    if (status == TS_OK)
        *ordinal = ts_cuda_ordinal(cuda);
    return status;
}

ts_status ts_slot_kv(ts_pool *p, uint64_t slot, uint32_t layer, ts_kv *out)
{
    TS_ENTER(p->client);
    const ts_geometry *g = &p->geometry;
    uint64_t block = slot / g->block_tokens;
    ts_status status = ts_pool_check_layer(p, layer);
    if (status != TS_OK)
        return status;
    status = ts_pool_map_block(p, block, p->writable);
    if (status != TS_OK)
        return status;
    size_t plane = ts_geometry_plane_bytes(g);
    unsigned char *k = p->base + block * ts_geometry_block_bytes(g) + layer * 2 * plane +
                       slot % g->block_tokens * ts_geometry_token_stride(g);
    *out = (ts_kv){.k = k, .v = k + plane, .head_stride = ts_geometry_head_stride(g)};
    return TS_OK;
}
