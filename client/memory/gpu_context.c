#define _GNU_SOURCE
#include "gpu_context.h"

#include "cuda_driver.h"
#include "error.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

struct ts_cuda {
    void *library;
    ts_cu_functions f;
    ts_cu_device device;
    void *context; /* the primary one */
    uint8_t uuid[TS_UUID_BYTES];
};

static ts_status fail(ts_client *c, const ts_cuda *cuda, ts_status status, const char *what,
                      ts_cu_result error)
{
    const char *name = NULL;
    if (cuda->f.error_name(error, &name) != 0 || name == NULL)
        name = "an unknown error";
    return ts_fail(c, status, "%s failed: %s", what, name);
}

static ts_status load(ts_client *c, ts_cuda *cuda)
{
    static const struct {
        const char *name;
        size_t offset;
    } wanted[] = {
#define WANTED(name, member, arguments) {name, offsetof(ts_cu_functions, member)},
        TS_CU_FUNCTIONS(WANTED)
#undef WANTED
    };
    cuda->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (cuda->library == NULL)
        return ts_fail(c, TS_EDEVICE, "no CUDA driver here: %s", dlerror());
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *function = dlsym(cuda->library, wanted[i].name);
        if (function == NULL)
            return ts_fail(c, TS_EDEVICE, "the CUDA driver has no %s: a newer driver is needed",
                           wanted[i].name);
        memcpy((char *)&cuda->f + wanted[i].offset, &function, sizeof function);
    }
    ts_cu_result error = cuda->f.init(0);
    return error == 0 ? TS_OK : fail(c, cuda, TS_EDEVICE, "starting CUDA", error);
}

static ts_status find_device(ts_client *c, ts_cuda *cuda, const uint8_t *uuid)
{
    int count = 0;
    ts_cu_result error = cuda->f.device_count(&count);
    for (int i = 0; error == 0 && i < count; i++) {
        ts_cu_device device;
        ts_cu_uuid id;
        error = cuda->f.device_get(&device, i);
        if (error == 0)
            error = cuda->f.device_uuid(&id, device);
        if (error != 0 || memcmp(id.bytes, uuid, sizeof id.bytes) != 0)
            continue;
        error = cuda->f.context_retain(&cuda->context, device);
        if (error != 0)
            break;
        cuda->device = device;
        memcpy(cuda->uuid, uuid, sizeof cuda->uuid);
        return TS_OK;
    }
    if (error != 0)
        return fail(c, cuda, TS_EDEVICE, "finding the pool's GPU", error);
    return ts_fail(c, TS_EDEVICE,
                   "the pool's GPU is none of the %d that this process sees: is "
                   "CUDA_VISIBLE_DEVICES set?",
                   count);
}

ts_status ts_cuda_open(ts_client *c, const uint8_t uuid[TS_UUID_BYTES], ts_cuda **out)
{
    ts_cuda *cuda = calloc(1, sizeof *cuda);
    *out = NULL;
    if (cuda == NULL)
        return ts_fail(c, TS_ENOMEM, "no memory for a GPU");
    ts_status status = load(c, cuda);
    if (status == TS_OK)
        status = find_device(c, cuda, uuid);
    if (status == TS_OK)
        *out = cuda;
    else
        ts_cuda_close(cuda);
    return status;
}

void ts_cuda_close(ts_cuda *cuda)
{
    if (cuda == NULL)
        return;
    if (cuda->context != NULL)
        cuda->f.context_release(cuda->device);
    /* The library stays loaded: the driver has threads of its own. */
    free(cuda);
}

int ts_cuda_ordinal(const ts_cuda *cuda)
{
    return cuda->device;
}

bool ts_cuda_is(const ts_cuda *cuda, const uint8_t uuid[TS_UUID_BYTES])
{
    return memcmp(cuda->uuid, uuid, TS_UUID_BYTES) == 0;
}

/* What the calling thread had when it entered. */
static _Thread_local int capture_mode_before;

static ts_cu_result enter(ts_cuda *cuda)
{
    ts_cu_result error = cuda->f.context_push(cuda->context);
    if (error != 0)
        return error;
    capture_mode_before = TS_CU_CAPTURE_RELAXED;
    (void)cuda->f.capture_mode(&capture_mode_before);
    return 0;
}

ts_status ts_cuda_enter(ts_client *c, ts_cuda *cuda)
{
    ts_cu_result error = enter(cuda);
    return error == 0 ? TS_OK : fail(c, cuda, TS_EDEVICE, "using the GPU", error);
}

void ts_cuda_leave(ts_cuda *cuda)
{
    void *context;
    (void)cuda->f.capture_mode(&capture_mode_before);
    (void)cuda->f.context_pop(&context);
}

bool ts_cuda_is_lost(ts_cuda *cuda)
{
    size_t available, all;
    if (enter(cuda) != 0)
        return true;
    const bool lost = cuda->f.memory_info(&available, &all) != 0; /* it tells of earlier failures */
    ts_cuda_leave(cuda);
    return lost;
}

ts_status ts_cuda_await(ts_client *c, ts_cuda *cuda)
{
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_result error = cuda->f.context_await();
    if (error != 0)
        status = fail(c, cuda, TS_EDEVICE, "waiting for the GPU", error);
    ts_cuda_leave(cuda);
    return status;
}

ts_status ts_cuda_reserve(ts_client *c, ts_cuda *cuda, size_t bytes, unsigned char **base)
{
    ts_cu_pointer at = 0;
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_result error = cuda->f.address_reserve(&at, bytes, 0, 0, 0);
    ts_cuda_leave(cuda);
    *base = (unsigned char *)at;
    return error == 0 ? TS_OK : fail(c, cuda, TS_ENOMEM, "reserving device addresses", error);
}

void ts_cuda_unreserve(ts_cuda *cuda, unsigned char *base, size_t bytes)
{
    if (enter(cuda) != 0)
        return;
    (void)cuda->f.address_free((ts_cu_pointer)base, bytes);
    ts_cuda_leave(cuda);
}

ts_status ts_cuda_map(ts_client *c, ts_cuda *cuda, unsigned char *at, size_t bytes, int fd,
                      bool writable)
{
    ts_cu_memory memory = 0;
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_access access = {.location = {.type = TS_CU_LOCATION_DEVICE, .id = cuda->device},
                           .flags = writable ? TS_CU_ACCESS_READ_WRITE : TS_CU_ACCESS_READ};
    ts_cu_result error = cuda->f.import(&memory, (void *)(intptr_t)fd, TS_CU_HANDLE_POSIX_FD);
    if (error == 0) {
        error = cuda->f.map((ts_cu_pointer)at, bytes, 0, memory, 0);
        (void)cuda->f.release(memory); /* the mapping keeps it */
    }
    if (error == 0) {
        error = cuda->f.set_access((ts_cu_pointer)at, bytes, &access, 1);
        if (error != 0)
            (void)cuda->f.unmap((ts_cu_pointer)at, bytes);
    }
    if (error != 0)
        status = fail(c, cuda, TS_EDEVICE, "mapping device memory", error);
    ts_cuda_leave(cuda);
    return status;
}

void ts_cuda_unmap(ts_cuda *cuda, unsigned char *at, size_t bytes)
{
    if (enter(cuda) != 0)
        return;
    (void)cuda->f.unmap((ts_cu_pointer)at, bytes);
    ts_cuda_leave(cuda);
}

ts_status ts_cuda_ipc_open(ts_client *c, ts_cuda *cuda, const uint8_t handle[TS_IPC_HANDLE_BYTES],
                           unsigned char **base)
{
    ts_cu_ipc_handle h;
    ts_cu_pointer at = 0;
    memcpy(&h, handle, sizeof h);
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_result error = cuda->f.ipc_open(&at, h, TS_CU_IPC_LAZY_PEER_ACCESS);
    if (error != 0)
        status = fail(c, cuda, TS_EDEVICE, "mapping device memory", error);
    ts_cuda_leave(cuda);
    *base = (unsigned char *)at;
    return status;
}

void ts_cuda_ipc_close(ts_cuda *cuda, unsigned char *base)
{
    if (enter(cuda) != 0)
        return;
    (void)cuda->f.ipc_close((ts_cu_pointer)base);
    ts_cuda_leave(cuda);
}

ts_status ts_cuda_ipc_export(ts_client *c, ts_cuda *cuda, void *memory, size_t bytes,
                             uint8_t handle[TS_IPC_HANDLE_BYTES], uint64_t *offset)
{
    ts_cu_ipc_handle h;
    ts_cu_pointer start = 0;
    size_t size = 0;
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_result error = cuda->f.address_range(&start, &size, (ts_cu_pointer)memory);
    if (error != 0)
        status = fail(c, cuda, TS_EINVAL, "finding the allocation of that memory", error);
    *offset = (ts_cu_pointer)memory - start;
    if (status == TS_OK && bytes > size - *offset)
        status = ts_fail(c, TS_EINVAL, "%zu bytes at offset %llu of an allocation of %zu", bytes,
                         (unsigned long long)*offset, size);
    if (status == TS_OK) {
        error = cuda->f.ipc_get(&h, start);
        if (error != 0)
            status = fail(c, cuda, TS_EINVAL,
                          "making an IPC handle (only memory of cudaMalloc has one)", error);
        memcpy(handle, &h, TS_IPC_HANDLE_BYTES);
    }
    ts_cuda_leave(cuda);
    return status;
}

ts_status ts_cuda_pin(ts_client *c, ts_cuda *cuda, void *host, size_t bytes, uint64_t *there)
{
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_result error =
        cuda->f.host_register(host, bytes, TS_CU_HOST_PORTABLE | TS_CU_HOST_DEVICE_MAP);
    if (error == 0) {
        error = cuda->f.host_pointer(there, host, 0);
        if (error != 0)
            (void)cuda->f.host_unregister(host);
    }
    if (error != 0)
        status = fail(c, cuda, TS_EDEVICE, "pinning host memory", error);
    ts_cuda_leave(cuda);
    return status;
}

void ts_cuda_unpin(ts_cuda *cuda, void *host)
{
    if (enter(cuda) != 0)
        return;
    (void)cuda->f.host_unregister(host);
    ts_cuda_leave(cuda);
}

ts_status ts_cuda_hand_over(ts_client *c, ts_cuda *cuda, void *stream, uint64_t submitted,
                            uint64_t completed, uint32_t value)
{
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_stream_op ops[] = {/* the device takes them in one go */
                             {.on = {TS_CU_OP_WRITE, submitted, value, TS_CU_WRITE_DEFAULT}},
                             {.on = {TS_CU_OP_WAIT, completed, value, TS_CU_WAIT_GEQ}}};
    ts_cu_result error = cuda->f.stream_ops(stream, 2, ops, 0);
    if (error != 0)
        status = fail(c, cuda, TS_EDEVICE, "queueing on the stream", error);
    ts_cuda_leave(cuda);
    return status;
}

ts_status ts_cuda_is_captured(ts_client *c, ts_cuda *cuda, void *stream, bool *captured)
{
    int state = 0;
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_result error = cuda->f.stream_capture(stream, &state);
    if (error != 0)
        status = fail(c, cuda, TS_EDEVICE, "asking whether the stream is captured", error);
    ts_cuda_leave(cuda);
    *captured = state != 0;
    return status;
}

ts_status ts_cuda_mark(ts_client *c, ts_cuda *cuda, void *stream, void **mark)
{
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_result error = cuda->f.event_new(mark, TS_CU_EVENT_DEFAULT);
    if (error == 0)
        error = cuda->f.event_record(*mark, stream);
    if (error != 0)
        status = fail(c, cuda, TS_EDEVICE, "queueing an event on the stream", error);
    ts_cuda_leave(cuda);
    return status;
}

void ts_cuda_unmark(ts_cuda *cuda, void *mark)
{
    if (mark == NULL || enter(cuda) != 0)
        return;
    (void)cuda->f.event_free(mark);
    ts_cuda_leave(cuda);
}

ts_status ts_cuda_between(ts_client *c, ts_cuda *cuda, void *from, void *to, uint64_t *ns)
{
    float ms = 0;
    ts_status status = ts_cuda_enter(c, cuda);
    if (status != TS_OK)
        return status;
    ts_cu_result error = cuda->f.event_await(to);
    if (error == 0)
        error = cuda->f.event_elapsed(&ms, from, to);
    if (error != 0)
        status = fail(c, cuda, TS_EDEVICE, "timing a run", error);
    ts_cuda_leave(cuda);
    *ns = (uint64_t)((double)ms * 1e6);
    return status;
}

ts_status ts_client_cuda(ts_client *c, const ts_pool *p, ts_cuda **out)
{
    *out = NULL;
    if (!p->on_gpu)
        return ts_fail(c, TS_EINVAL, "the pool is in host memory: there is no GPU");
    if (c->cuda == NULL) {
        ts_status status = ts_cuda_open(c, p->uuid, &c->cuda);
        if (status != TS_OK)
            return status;
    }
    if (!ts_cuda_is(c->cuda, p->uuid))
        return ts_fail(c, TS_EINVAL,
                       "a session uses one GPU, and the pool is on another: connect "
                       "once for each");
    *out = c->cuda;
    return TS_OK;
}
