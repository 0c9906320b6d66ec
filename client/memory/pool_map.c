#define _GNU_SOURCE
#include "pool_map.h"

#include "error.h"
#include "fd_client.h"
#include "gpu_context.h"
#include "host_memory.h"
#include "slab_returns.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GPU_GRANULE ((size_t)2 << 20)

static size_t slab_bytes(const ts_pool *p)
{
    return ts_geometry_block_bytes(&p->geometry) * p->slab_blocks;
}

/* Memory behind a slab's descriptor: a pool of one slab on a GPU is rounded up to its granule. */
static size_t mapped_bytes(const ts_pool *p)
{
    return p->on_gpu ? (slab_bytes(p) + GPU_GRANULE - 1) / GPU_GRANULE * GPU_GRANULE
                     : slab_bytes(p);
}

static uint32_t mapped(const ts_pool *p, uint32_t slab)
{
    return __atomic_load_n(&p->mapped[slab], __ATOMIC_ACQUIRE);
}

static void set_mapped(ts_pool *p, uint32_t slab, uint32_t generation)
{
    __atomic_store_n(&p->mapped[slab], generation, __ATOMIC_RELEASE);
}

static void unmap_gpu(ts_pool *p)
{
    ts_cuda *cuda = p->client->cuda;
    (void)ts_cuda_await(p->client, cuda); /* a lost device uses nothing */
    if (p->has_ipc_handle) {
        ts_cuda_ipc_close(cuda, p->base);
        return;
    }
    for (uint32_t i = 0; i < p->num_slabs; i++)
        if (mapped(p, i) != 0)
            ts_cuda_unmap(cuda, p->base + i * slab_bytes(p), mapped_bytes(p));
    ts_cuda_unreserve(cuda, p->base, mapped_bytes(p) * p->num_slabs);
}

ts_status ts_pool_note_slab(ts_pool *p, uint32_t slab, uint32_t generation)
{
    if (slab >= p->num_slabs)
        return ts_fail(p->client, TS_EPROTO, "the daemon speaks of slab %u of %u", slab,
                       p->num_slabs);
    p->wanted[slab] = generation;
    return TS_OK;
}

ts_status ts_pool_note_slabs(ts_pool *p, Tspb__Slab **slabs, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        ts_status status = ts_pool_note_slab(p, slabs[i]->slab, slabs[i]->generation);
        if (status != TS_OK)
            return status;
        if (slabs[i]->ipc_handle.len == TS_IPC_HANDLE_BYTES && p->num_slabs == 1) {
            memcpy(p->ipc_handle, slabs[i]->ipc_handle.data, TS_IPC_HANDLE_BYTES);
            p->has_ipc_handle = true;
        }
    }
    return TS_OK;
}

/* Reserves addresses for the whole pool: of host memory, where no slab is mapped, zeros are read.
 */
static ts_status reserve(ts_pool *p)
{
    ts_client *c = p->client;
    ts_cuda *cuda;
    size_t bytes = mapped_bytes(p) * p->num_slabs;
    if (p->on_gpu) {
        ts_status status = ts_client_cuda(c, p, &cuda);
        return status == TS_OK ? ts_cuda_reserve(c, cuda, bytes, &p->base) : status;
    }
    void *base = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return ts_fail(c, TS_ENOMEM, "reserving %zu bytes of addresses: %s", bytes,
                       strerror(errno));
    p->reserved = ts_memory_new(base, bytes);
    if (p->reserved == NULL) {
        munmap(base, bytes);
        return ts_fail(c, TS_ENOMEM, "no memory for a pool's addresses");
    }
    p->base = base;
    return TS_OK;
}

ts_status ts_pool_reserve(ts_pool *p)
{
    const bool is_one = strcmp(p->memory, "cuda-ipc") == 0;
    return p->base != NULL || is_one ? TS_OK : reserve(p);
}

static ts_status map_ipc(ts_pool *p)
{
    ts_cuda *cuda;
    ts_status status = ts_client_cuda(p->client, p, &cuda);
    if (status == TS_OK)
        status = ts_cuda_ipc_open(p->client, cuda, p->ipc_handle, &p->base);
    if (status == TS_OK)
        set_mapped(p, 0, p->wanted[0]);
    p->written[0] = true; /* such memory always is */
    return status;
}

/* Maps a GPU's memory in place of what was there. Nothing is given back meanwhile. */
static ts_status map_gpu(ts_pool *p, uint32_t slab, const ts_handle_reply *reply, int fd,
                         bool writable)
{
    ts_client *c = p->client;
    unsigned char *at = p->base + slab * slab_bytes(p);
    if (reply->generation <= p->revoked[slab])
        return ts_fail(c, TS_EPERM, "slab %u has become another user's", slab);
    if (mapped(p, slab) != 0) {
        ts_status status = ts_cuda_await(c, c->cuda);
        ts_cuda_unmap(c->cuda, at, mapped_bytes(p));
        set_mapped(p, slab, 0);
        if (status != TS_OK)
            return status;
    }
    return ts_cuda_map(c, c->cuda, at, mapped_bytes(p), fd, writable);
}

/* Puts the memory behind the descriptor where the slab belongs, in place of what was there. */
static ts_status map_fd(ts_pool *p, uint32_t slab, const ts_handle_reply *reply, int fd,
                        bool writable)
{
    ts_client *c = p->client;
    if (reply->bytes != mapped_bytes(p))
        return ts_fail(c, TS_EPROTO, "slab %u has %llu bytes, not %zu", slab,
                       (unsigned long long)reply->bytes, mapped_bytes(p));
    if (p->on_gpu)
        return map_gpu(p, slab, reply, fd, writable);
    if (mmap(p->base + slab * slab_bytes(p), mapped_bytes(p),
             writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED | MAP_FIXED, fd,
             0) == MAP_FAILED)
        return ts_fail(c, TS_ENOMEM, "mapping slab %u of %zu bytes: %s", slab, mapped_bytes(p),
                       strerror(errno));
    return TS_OK;
}

/* See ts_give_back. */
static void give_back(ts_pool *p, uint32_t slab, uint32_t generation)
{
    const uint32_t has = mapped(p, slab);
    if (generation > p->revoked[slab])
        p->revoked[slab] = generation;
    if (!p->on_gpu || has == 0 || has > generation)
        return;
    ts_cuda_unmap(p->client->cuda, p->base + slab * slab_bytes(p), mapped_bytes(p));
    set_mapped(p, slab, 0);
}

/* Asks for the slab as it is now, and maps it where it belongs. */
static ts_status map_slab(ts_pool *p, uint32_t slab, bool writable)
{
    ts_client *c = p->client;
    ts_handle_reply reply;
    int fd;
    if (p->has_ipc_handle)
        return map_ipc(p);
    ts_status status = p->base == NULL ? reserve(p) : TS_OK;
    if (status == TS_OK && p->on_gpu)
        status = ts_slab_returns_start(c, give_back);
    if (status == TS_OK)
        status = ts_handle_get(c, TS_HANDLE_SLAB, p->index, slab, writable, &reply, &fd);
    if (status != TS_OK)
        return status;
    ts_slab_returns_lock(c);
    status = map_fd(p, slab, &reply, fd, writable);
    if (status == TS_OK) {
        set_mapped(p, slab, reply.generation);
        p->wanted[slab] = reply.generation;
        p->written[slab] = writable;
    }
    ts_slab_returns_unlock(c);
    close(fd);
    return status;
}

ts_status ts_pool_map_block(ts_pool *p, uint64_t block, bool writable)
{
    if (block >= p->num_blocks)
        return ts_fail(p->client, TS_EINVAL, "a slot of block %llu; the pool has %u blocks",
                       (unsigned long long)block, p->num_blocks);
    uint32_t slab = (uint32_t)(block / p->slab_blocks);
    const uint32_t has = mapped(p, slab);
    bool there = has != 0 && has == p->wanted[slab];
    if (there && (p->written[slab] || !writable))
        return TS_OK;
    return map_slab(p, slab, writable || (there && p->written[slab]));
}

void ts_pool_unmap(ts_pool *p)
{
    if (p->base != NULL && p->on_gpu)
        unmap_gpu(p);
    ts_memory_release(p->reserved);
}
