/* The fake device's memory (fake_gpu.h), which is the host's. */
#define _GNU_SOURCE
#include "fake_gpu.h"

#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const ts_memory_ops *host_ops;
static ts_memory_ops memory_ops; /* the host's, on a device that can be lost */
static ts_gpu *memory_gpu;       /* of all memory: a process has one device at a time */

static ts_status renew(ts_memory *m, uint32_t slab, char *why, size_t why_bytes)
{
    ts_status status = fake_gpu_ask_for_memory(memory_gpu, why, why_bytes);
    return status != TS_OK ? status : host_ops->renew(m, slab, why, why_bytes);
}

static ts_status adopt(ts_memory *m, uint32_t slab, int fd, char *why, size_t why_bytes)
{
    ts_status status = fake_gpu_ask_to_adopt(memory_gpu, why, why_bytes);
    if (status == TS_OK)
        return host_ops->adopt(m, slab, fd, why, why_bytes);
    close(fd);
    return status;
}

ts_status ts_memory_cuda_vmm_new(ts_gpu *g, uint32_t num_slabs, size_t slab_bytes, ts_memory **out,
                                 char *why, size_t why_bytes)
{
    ts_status status = ts_memory_host_new(num_slabs, slab_bytes, out, why, why_bytes);
    if (status != TS_OK)
        return status;
    host_ops = (*out)->ops;
    memory_ops = *host_ops;
    memory_ops.renew = renew;
    memory_ops.adopt = adopt;
    memory_gpu = g;
    (*out)->ops = &memory_ops;
    return TS_OK;
}

ts_status ts_memory_cuda_ipc_new(ts_gpu *g, size_t bytes, ts_memory **out, char *why,
                                 size_t why_bytes)
{
    return ts_memory_cuda_vmm_new(g, 1, bytes, out, why, why_bytes);
}

ts_status ts_gpu_free_bytes(ts_gpu *g, uint64_t *bytes, char *why, size_t why_bytes)
{
    *bytes = FAKE_GPU_BYTES;
    return ts_gpu_health(g, why, why_bytes);
}

ts_status ts_gpu_shared_new(ts_gpu *g, bool vmm, size_t bytes, uint64_t *held, ts_gpu_shared *out,
                            char *why, size_t why_bytes)
{
    void *base;
    (void)vmm;
    ts_status status = fake_gpu_ask_for_memory(g, why, why_bytes);
    *out = (ts_gpu_shared){.gpu = g, .bytes = bytes, .held = held};
    if (status == TS_OK)
        status = ts_memory_shared_new("fake", bytes, &out->fd, &base, why, why_bytes);
    if (status != TS_OK)
        return status;
    out->base = base;
    __atomic_add_fetch(held, bytes, __ATOMIC_RELAXED);
    return TS_OK;
}

static uint64_t no_tenant; /* whom imported memory is held by */

/* Maps what the descriptor, which is closed, is of. */
static ts_status map_shared(ts_gpu_shared *s, int fd, uint64_t offset, char *why, size_t why_bytes)
{
    void *base = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    close(fd);
    if (base == MAP_FAILED) {
        snprintf(why, why_bytes, "mapping %zu bytes: %s", s->bytes, strerror(errno));
        return TS_ENOMEM;
    }
    s->base = base;
    __atomic_add_fetch(s->held, s->bytes, __ATOMIC_RELAXED);
    return TS_OK;
}

ts_status ts_gpu_shared_import(ts_gpu *g, const uint8_t handle[TS_IPC_HANDLE_BYTES],
                               uint64_t offset, size_t bytes, ts_gpu_shared *out, char *why,
                               size_t why_bytes)
{
    ts_status status = fake_gpu_ask_for_memory(g, why, why_bytes);
    if (status != TS_OK)
        return status;
    /* A fake driver's handle is the path of a file (fake_libcuda.c). */
    int fd = handle[0] == '/' ? open((const char *)handle, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) {
        snprintf(why, why_bytes, "a handle that no fake has made");
        return TS_EINVAL;
    }
    *out = (ts_gpu_shared){.gpu = g, .fd = -1, .bytes = bytes, .held = &no_tenant};
    return map_shared(out, fd, offset, why, why_bytes);
}

ts_status ts_gpu_shared_adopt(ts_gpu *g, int fd, size_t bytes, uint64_t *held, ts_gpu_shared *out,
                              char *why, size_t why_bytes)
{
    *out = (ts_gpu_shared){
        .gpu = g, .fd = fcntl(fd, F_DUPFD_CLOEXEC, 0), .bytes = bytes, .held = held};
    return map_shared(out, fd, 0, why, why_bytes);
}

void ts_gpu_shared_free(ts_gpu_shared *s)
{
    munmap(s->base, s->bytes);
    __atomic_sub_fetch(s->held, s->bytes, __ATOMIC_RELEASE);
    if (s->fd >= 0)
        close(s->fd);
}

ts_status ts_gpu_pin(ts_gpu *g, void *host, size_t bytes, void **device, char *why,
                     size_t why_bytes)
{
    (void)g;
    (void)bytes;
    (void)why;
    (void)why_bytes;
    *device = host;
    return TS_OK;
}

void ts_gpu_unpin_unmap(ts_gpu *g, void *host, size_t bytes)
{
    (void)g;
    munmap(host, bytes);
}
