#define _GNU_SOURCE
#include "exchange.h"

#include "error.h"
#include "fd_client.h"
#include "gpu_context.h"
#include "host_memory.h"
#include "rpc.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEVICE_GRANULE ((size_t)2 << 20) /* of VMM memory */

/* The memory goes, and the kind stays: the next step that needs one has another made. */
static void empty(ts_client *c)
{
    switch (c->exchange == NULL ? TS_EXCHANGE_NONE : c->exchange_kind) {
    case TS_EXCHANGE_HOST:
        ts_memory_release(c->exchange_memory);
        c->exchange_memory = NULL;
        break;
    case TS_EXCHANGE_VMM:
        (void)ts_cuda_await(c, c->cuda);
        ts_cuda_unmap(c->cuda, c->exchange, c->exchange_bytes);
        ts_cuda_unreserve(c->cuda, c->exchange, c->exchange_bytes);
        break;
    case TS_EXCHANGE_IPC:
        (void)ts_cuda_await(c, c->cuda);
        ts_cuda_ipc_close(c->cuda, c->exchange);
        break;
    case TS_EXCHANGE_NONE:
    case TS_EXCHANGE_OWN:
        break;
    }
    c->exchange = NULL;
    c->exchange_bytes = 0;
}

void ts_exchange_close(ts_client *c)
{
    empty(c);
    c->exchange_kind = TS_EXCHANGE_NONE;
}

/* What came of offering the daemon another exchange. Where no answer came, it may have that or may
 * take it yet: what a step put into the old one would be read by nobody. The next one that is
 * offered is as large, for none is replaced by a smaller one. */
static ts_status offered(ts_client *c, size_t bytes, ts_status status)
{
    if (status == TS_ETIMEOUT || status == TS_ECONN || status == TS_EPROTO) {
        const size_t most = bytes > c->exchange_bytes ? bytes : c->exchange_bytes;
        c->exchange_least = most > c->exchange_least ? most : c->exchange_least;
        empty(c);
    }
    return status;
}

/* Checks the size and rounds it up, as far as the daemon's limit allows. */
static ts_status check_bytes(ts_client *c, size_t *bytes, size_t granule)
{
    const size_t most = c->exchange_bytes_max / 4096 * 4096;
    if (*bytes == 0 || *bytes > most)
        return ts_fail_beyond(
            c, TS_EINVAL, *bytes, most,
            "an exchange of %zu bytes; the daemon's limits are 1..%zu (exchange_max)", *bytes,
            most);
    *bytes = (*bytes + granule - 1) / granule * granule;
    *bytes = *bytes < most ? *bytes : most;
    return TS_OK;
}

/* The same, and asks the daemon for the exchange. */
static ts_status ask(ts_client *c, Tspb__ExchangeOpen *open, size_t granule, Tspb__Reply **reply)
{
    Tspb__Request request = TSPB__REQUEST__INIT;
    size_t bytes = open->bytes;
    *reply = NULL;
    ts_status wrong = check_bytes(c, &bytes, granule);
    if (wrong != TS_OK)
        return wrong;
    open->bytes = bytes;
    request.body_case = TSPB__REQUEST__BODY_EXCHANGE_OPEN;
    request.exchange_open = open;
    ts_status status = offered(c, bytes, ts_call(c, &request, reply));
    if (status == TS_OK && (*reply)->body_case != TSPB__REPLY__BODY_EXCHANGE_OPENED) {
        tspb__reply__free_unpacked(*reply, NULL);
        *reply = NULL;
        status = offered(c, bytes, ts_fail(c, TS_EPROTO, "the daemon's answer opens no exchange"));
    }
    return status;
}

static ts_status exchange_host(ts_client *c, size_t bytes)
{
    void *base;
    ts_status status = ts_memory_fill(c, TS_HANDLE_NEW_EXCHANGE, "an exchange", bytes, &base);
    if (status != TS_OK)
        return status;
    ts_memory *memory = ts_memory_new(base, bytes);
    if (memory == NULL) {
        munmap(base, bytes);
        return ts_fail(c, TS_ENOMEM, "no memory for an exchange");
    }
    status = offered(c, bytes, ts_handle_tell(c, TS_HANDLE_TAKE_EXCHANGE));
    if (status != TS_OK) {
        ts_memory_release(memory);
        return status;
    }
    ts_exchange_close(c);
    c->exchange_memory = memory;
    c->exchange = base;
    c->exchange_bytes = bytes;
    c->exchange_kind = TS_EXCHANGE_HOST;
    return TS_OK;
}

ts_status ts_exchange_host(ts_client *c, size_t bytes)
{
    const uint64_t until_ms = ts_call_end_ms(c);
    ts_status status = check_bytes(c, &bytes, 4096);
    if (status != TS_OK)
        return status;
    do
        status = exchange_host(c, bytes);
    while (ts_goes_on(c, status, until_ms));
    return status;
}

static ts_status map_vmm(ts_client *c, size_t bytes, unsigned char **base)
{
    ts_handle_reply reply;
    int fd;
    ts_status status = ts_handle_get(c, TS_HANDLE_EXCHANGE, 0, 0, true, &reply, &fd);
    if (status != TS_OK)
        return status;
    if (reply.bytes < bytes)
        status = ts_fail(c, TS_EPROTO, "the exchange has %llu bytes, not %zu",
                         (unsigned long long)reply.bytes, bytes);
    if (status == TS_OK)
        status = ts_cuda_reserve(c, c->cuda, bytes, base);
    if (status == TS_OK) {
        status = ts_cuda_map(c, c->cuda, *base, bytes, fd, true);
        if (status != TS_OK)
            ts_cuda_unreserve(c->cuda, *base, bytes);
    }
    close(fd);
    return status;
}

static ts_status no_steps(ts_client *c)
{
    if (c->regions == NULL)
        return TS_OK;
    return ts_fail(c, TS_EBUSY, "the exchange can't be replaced while steps use it");
}

static ts_status exchange_device(ts_pool *p, size_t bytes)
{
    ts_client *c = p->client;
    Tspb__ExchangeOpen open = TSPB__EXCHANGE_OPEN__INIT;
    Tspb__Reply *opened;
    ts_cuda *cuda;
    unsigned char *base = NULL;
    open.bytes = bytes;
    open.pool = p->index;
    open.on_device = true;
    ts_status status = no_steps(c);
    if (status == TS_OK)
        status = ts_client_cuda(c, p, &cuda);
    if (status == TS_OK)
        status = ask(c, &open, DEVICE_GRANULE, &opened);
    if (status != TS_OK)
        return status;
    empty(c); /* the daemon has another one now, whatever becomes of this */
    const Tspb__ExchangeOpened *o = opened->exchange_opened;
    bool vmm = o->has_descriptor;
    if (vmm)
        status = map_vmm(c, open.bytes, &base);
    else if (o->ipc_handle.len == TS_IPC_HANDLE_BYTES)
        status = ts_cuda_ipc_open(c, cuda, o->ipc_handle.data, &base);
    else
        status = ts_fail(c, TS_EPROTO, "the daemon's answer has no handle for the exchange");
    tspb__reply__free_unpacked(opened, NULL);
    if (status != TS_OK)
        return status;
    c->exchange = base;
    c->exchange_bytes = open.bytes;
    c->exchange_kind = vmm ? TS_EXCHANGE_VMM : TS_EXCHANGE_IPC;
    c->exchange_pool = p;
    return TS_OK;
}

ts_status ts_exchange_device(ts_pool *p, size_t bytes)
{
    TS_ENTER(p->client);
    return exchange_device(p, bytes);
}

ts_status ts_exchange_register(ts_pool *p, void *memory, size_t bytes)
{
    TS_ENTER(p->client);
    ts_client *c = p->client;
    Tspb__ExchangeOpen open = TSPB__EXCHANGE_OPEN__INIT;
    Tspb__Reply *opened;
    ts_cuda *cuda;
    uint8_t handle[TS_IPC_HANDLE_BYTES];
    if ((uintptr_t)memory % TS_EXCHANGE_ALIGN != 0 || bytes % 4096 != 0)
        return ts_fail(c, TS_EINVAL,
                       "%zu bytes at %p: the address must be a multiple of %u, the size of 4096",
                       bytes, memory, TS_EXCHANGE_ALIGN);
    ts_status status = no_steps(c);
    if (status == TS_OK)
        status = ts_client_cuda(c, p, &cuda);
    if (status == TS_OK)
        status = ts_cuda_ipc_export(c, cuda, memory, bytes, handle, &open.ipc_offset);
    if (status != TS_OK)
        return status;
    open.bytes = bytes;
    open.pool = p->index;
    open.ipc_handle.data = handle;
    open.ipc_handle.len = sizeof handle;
    status = ask(c, &open, 4096, &opened);
    if (status != TS_OK)
        return status;
    tspb__reply__free_unpacked(opened, NULL);
    ts_exchange_close(c);
    c->exchange = memory;
    c->exchange_bytes = bytes;
    c->exchange_kind = TS_EXCHANGE_OWN;
    c->exchange_pool = p;
    return TS_OK;
}

/* A larger exchange of the kind that there is, of at least `bytes`. */
static ts_status grow(ts_client *c, size_t bytes)
{
    const size_t least = c->exchange_bytes > 0 ? c->exchange_bytes * 2 : c->exchange_least;
    size_t wanted = least > bytes ? least : bytes;
    if (wanted > c->exchange_bytes_max)
        wanted = bytes;
    if (c->exchange_kind == TS_EXCHANGE_OWN)
        return ts_fail(c, TS_ENOMEM, "the registered memory has %zu bytes; the step needs %zu%s",
                       c->exchange_bytes, bytes,
                       c->exchange == NULL ? ": register it again, for no answer came to a call "
                                             "that offered the daemon another"
                                           : "");
    if (c->exchange_kind != TS_EXCHANGE_NONE && c->exchange_kind != TS_EXCHANGE_HOST) {
        if (c->exchange_pool == NULL)
            return ts_fail(c, TS_EINVAL, "the pool that the exchange was made for is closed");
        return exchange_device(c->exchange_pool, wanted);
    }
    return ts_exchange_host(c, wanted);
}

ts_status ts_exchange_take(ts_client *c, ts_region *region)
{
    ts_region **at = &c->regions;
    size_t offset = 0;
    region->bytes = (region->bytes + TS_EXCHANGE_ALIGN - 1) / TS_EXCHANGE_ALIGN * TS_EXCHANGE_ALIGN;
    while (*at != NULL && (*at)->offset - offset < region->bytes) {
        offset = (*at)->offset + (*at)->bytes;
        at = &(*at)->next;
    }
    if (*at == NULL && (offset > c->exchange_bytes || c->exchange_bytes - offset < region->bytes)) {
        if (c->regions != NULL)
            return ts_fail(c, TS_EBUSY,
                           "a step or frame is open, and the exchange of %zu bytes has no %zu free "
                           "beside it and grows only while none is: commit or abort it, or, for "
                           "both at once, connect with exchange_bytes of at least %zu",
                           c->exchange_bytes, region->bytes, offset + region->bytes);
        ts_status status = grow(c, region->bytes);
        if (status != TS_OK)
            return status;
    }
    region->offset = offset;
    region->next = *at;
    *at = region;
    return TS_OK;
}

void ts_exchange_give(ts_client *c, ts_region *region)
{
    for (ts_region **at = &c->regions; *at != NULL; at = &(*at)->next)
        if (*at == region) {
            *at = region->next;
            return;
        }
}
