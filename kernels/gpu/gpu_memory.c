/*
 * Device memory that other processes map.
 *
 * VMM memory: a physical allocation is made with a type that can be exported as a file descriptor,
 * mapped into a reserved range and opened for this process. The importing process sets its own
 * access rights, so a read-only mapping guards against its bugs; what guards against malice is that
 * another tenant never gets the descriptor.
 *
 * cudaMalloc memory: told to others by a 64-byte handle, which speaks of the whole allocation and
 * always allows writing.
 */
#define _GNU_SOURCE
#include "device.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { KIND_VMM = 1, KIND_OWN, KIND_IMPORTED };

static size_t round_up(size_t bytes, size_t unit)
{
    return (bytes + unit - 1) / unit * unit;
}

/* ---- one physical allocation ---- */

static ts_status vmm_create(ts_gpu *gpu, size_t bytes, CUmemGenericAllocationHandle *handle,
                            char *why, size_t why_bytes)
{
    CUmemAllocationProp prop = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = (int)gpu->info.ordinal}};
    CUresult error = gpu->driver.mem_create(handle, bytes, &prop, 0);
    return error == CUDA_SUCCESS
               ? TS_OK
               : ts_gpu_fail_driver(gpu, error, "taking device memory", bytes, why, why_bytes);
}

/* Maps the allocation at `at`, which is free, and opens it for this process. */
static ts_status vmm_map(ts_gpu *gpu, CUdeviceptr at, size_t bytes,
                         CUmemGenericAllocationHandle handle, char *why, size_t why_bytes)
{
    const ts_gpu_driver *d = &gpu->driver;
    CUmemAccessDesc access = {
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = (int)gpu->info.ordinal},
        .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUresult error = d->mem_map(at, bytes, 0, handle, 0);
    if (error != CUDA_SUCCESS)
        return ts_gpu_fail_driver(gpu, error, "mapping device memory", bytes, why, why_bytes);
    error = d->set_access(at, bytes, &access, 1);
    if (error == CUDA_SUCCESS)
        return TS_OK;
    (void)d->mem_unmap(at, bytes);
    return ts_gpu_fail_driver(gpu, error, "opening device memory", bytes, why, why_bytes);
}

static ts_status zero(ts_gpu *gpu, void *at, size_t bytes, char *why, size_t why_bytes)
{
    cudaError_t error = cudaMemsetAsync(at, 0, bytes, gpu->memory_stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(gpu->memory_stream);
    return error == cudaSuccess
               ? TS_OK
               : ts_gpu_fail(error, "zeroing device memory", bytes, why, why_bytes);
}

static ts_status vmm_export(ts_gpu *gpu, CUmemGenericAllocationHandle handle, size_t bytes, int *fd,
                            char *why, size_t why_bytes)
{
    *fd = -1;
    CUresult error =
        gpu->driver.export_handle(fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    return error == CUDA_SUCCESS
               ? TS_OK
               : ts_gpu_fail_driver(gpu, error, "exporting device memory", bytes, why, why_bytes);
}

/* ---- cuda-vmm ---- */

typedef struct memory_vmm {
    ts_memory memory;
    ts_gpu *gpu;
    size_t physical_bytes, reserved_bytes; /* of a slab; of the pool */
    int *fds; /* of slabs that outlive this process; -1: not backed. An import isn't exported again
               */
    CUmemGenericAllocationHandle handles[]; /* 0: not backed */
} memory_vmm;

static void set_fd(memory_vmm *vmm, uint32_t slab, int fd)
{
    if (vmm->fds[slab] >= 0)
        close(vmm->fds[slab]);
    vmm->fds[slab] = fd;
}

static ts_status vmm_renew(ts_memory *m, uint32_t slab, char *why, size_t why_bytes)
{
    memory_vmm *vmm = (memory_vmm *)m;
    const ts_gpu_driver *d = &vmm->gpu->driver;
    CUdeviceptr at = (CUdeviceptr)m->base + slab * m->slab_bytes;
    ts_status status = ts_gpu_enter(vmm->gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    /* The new memory comes first: if there is none, all is as it was. A tenant that still maps the
     * old memory keeps it alive until it maps the slab anew or ends. */
    CUmemGenericAllocationHandle old = vmm->handles[slab], fresh;
    size_t bytes = vmm->physical_bytes;
    int fd = -1;
    status = vmm_create(vmm->gpu, bytes, &fresh, why, why_bytes);
    if (status != TS_OK)
        return status;
    if (m->outlives)
        status = vmm_export(vmm->gpu, fresh, bytes, &fd, why, why_bytes);
    if (status != TS_OK) {
        (void)d->mem_release(fresh);
        return status;
    }
    if (old != 0)
        (void)d->mem_unmap(at, bytes);
    status = vmm_map(vmm->gpu, at, bytes, fresh, why, why_bytes);
    if (status == TS_OK) {
        status = zero(vmm->gpu, (void *)at, bytes, why, why_bytes);
        if (status != TS_OK)
            (void)d->mem_unmap(at, bytes);
    }
    if (status != TS_OK) {
        char ignored[TS_GPU_WHY_BYTES];
        if (old != 0)
            (void)vmm_map(vmm->gpu, at, bytes, old, ignored, sizeof ignored);
        (void)d->mem_release(fresh);
        if (fd >= 0)
            close(fd);
        return status;
    }
    if (old != 0)
        (void)d->mem_release(old);
    vmm->handles[slab] = fresh;
    set_fd(vmm, slab, fd);
    return TS_OK;
}

/* Maps what an earlier process made. */
static ts_status vmm_adopt(ts_memory *m, uint32_t slab, int fd, char *why, size_t why_bytes)
{
    memory_vmm *vmm = (memory_vmm *)m;
    const ts_gpu_driver *d = &vmm->gpu->driver;
    CUdeviceptr at = (CUdeviceptr)m->base + slab * m->slab_bytes;
    CUmemGenericAllocationHandle handle = 0;
    ts_status status = ts_gpu_enter(vmm->gpu, why, why_bytes);
    if (status == TS_OK) {
        CUresult error = d->import_handle(&handle, (void *)(uintptr_t)fd,
                                          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
        if (error != CUDA_SUCCESS)
            status = ts_gpu_fail_driver(vmm->gpu, error, "taking over device memory",
                                        vmm->physical_bytes, why, why_bytes);
    }
    if (status == TS_OK) {
        status = vmm_map(vmm->gpu, at, vmm->physical_bytes, handle, why, why_bytes);
        if (status != TS_OK)
            (void)d->mem_release(handle);
    }
    if (status != TS_OK) {
        close(fd);
        return status;
    }
    vmm->handles[slab] = handle;
    set_fd(vmm, slab, fd);
    return TS_OK;
}

static ts_status vmm_drop(ts_memory *m, uint32_t slab, char *why, size_t why_bytes)
{
    memory_vmm *vmm = (memory_vmm *)m;
    if (vmm->handles[slab] == 0)
        return TS_OK;
    ts_status status = ts_gpu_enter(vmm->gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    const ts_gpu_driver *d = &vmm->gpu->driver;
    CUresult error = d->mem_unmap((CUdeviceptr)m->base + slab * m->slab_bytes, vmm->physical_bytes);
    if (error == CUDA_SUCCESS)
        error = d->mem_release(vmm->handles[slab]);
    vmm->handles[slab] = 0;
    set_fd(vmm, slab, -1);
    return error == CUDA_SUCCESS ? TS_OK
                                 : ts_gpu_fail_driver(vmm->gpu, error, "giving device memory back",
                                                      vmm->physical_bytes, why, why_bytes);
}

static ts_status vmm_export_slab(ts_memory *m, uint32_t slab, bool writable, int *fd, char *why,
                                 size_t why_bytes)
{
    (void)writable;
    memory_vmm *vmm = (memory_vmm *)m;
    if (slab >= m->num_slabs || vmm->handles[slab] == 0) {
        snprintf(why, why_bytes, "slab %u has no memory; the pool has %u slabs", slab,
                 m->num_slabs);
        return TS_ENOENT;
    }
    if (vmm->fds[slab] >= 0 && (*fd = fcntl(vmm->fds[slab], F_DUPFD_CLOEXEC, 0)) >= 0)
        return TS_OK;
    ts_status status = ts_gpu_enter(vmm->gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    return vmm_export(vmm->gpu, vmm->handles[slab], vmm->physical_bytes, fd, why, why_bytes);
}

static void vmm_free(ts_memory *m)
{
    memory_vmm *vmm = (memory_vmm *)m;
    char why[TS_GPU_WHY_BYTES];
    if (ts_gpu_enter(vmm->gpu, why, sizeof why) == TS_OK) {
        const ts_gpu_driver *d = &vmm->gpu->driver;
        for (uint32_t i = 0; i < m->num_slabs; i++)
            if (vmm->handles[i] != 0) {
                (void)d->mem_unmap((CUdeviceptr)m->base + i * m->slab_bytes, vmm->physical_bytes);
                (void)d->mem_release(vmm->handles[i]);
            }
        (void)d->address_free((CUdeviceptr)m->base, vmm->reserved_bytes);
    }
    for (uint32_t i = 0; i < m->num_slabs; i++)
        set_fd(vmm, i, -1);
    free(vmm->fds);
    free(vmm);
}

static const ts_memory_ops vmm_ops = {.name = "cuda-vmm",
                                      .renew = vmm_renew,
                                      .drop = vmm_drop,
                                      .export_fd = vmm_export_slab,
                                      .adopt = vmm_adopt,
                                      .free = vmm_free};

ts_status ts_memory_cuda_vmm_new(ts_gpu *gpu, uint32_t num_slabs, size_t slab_bytes,
                                 ts_memory **out, char *why, size_t why_bytes)
{
    *out = NULL;
    if (!gpu->info.vmm) {
        snprintf(why, why_bytes, "%s can't export VMM memory as file descriptors", gpu->info.name);
        return TS_EDEVICE;
    }
    if (num_slabs > 1 && slab_bytes % gpu->info.granularity != 0) {
        snprintf(why, why_bytes, "slabs of %zu bytes; they must be multiples of %zu", slab_bytes,
                 gpu->info.granularity);
        return TS_EINVAL;
    }
    memory_vmm *vmm = calloc(1, sizeof *vmm + num_slabs * sizeof vmm->handles[0]);
    int *fds = malloc((num_slabs + 1ull) * sizeof *fds);
    if (vmm == NULL || fds == NULL) {
        free(vmm);
        free(fds);
        snprintf(why, why_bytes, "no memory for a table of %u slabs", num_slabs);
        return TS_ENOMEM;
    }
    for (uint32_t i = 0; i < num_slabs; i++)
        fds[i] = -1;
    vmm->fds = fds;
    vmm->gpu = gpu;
    vmm->physical_bytes = round_up(slab_bytes, gpu->info.granularity);
    vmm->reserved_bytes = vmm->physical_bytes * num_slabs;
    CUdeviceptr base = 0;
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status == TS_OK) {
        CUresult error = gpu->driver.address_reserve(&base, vmm->reserved_bytes, 0, 0, 0);
        if (error != CUDA_SUCCESS)
            status = ts_gpu_fail_driver(gpu, error, "reserving addresses", vmm->reserved_bytes, why,
                                        why_bytes);
    }
    if (status != TS_OK) {
        free(fds);
        free(vmm);
        return status;
    }
    vmm->memory = (ts_memory){.ops = &vmm_ops,
                              .base = (unsigned char *)base,
                              .slab_bytes = slab_bytes,
                              .export_bytes = vmm->physical_bytes,
                              .num_slabs = num_slabs};
    *out = &vmm->memory;
    return TS_OK;
}

/* ---- cuda-ipc ---- */

typedef struct memory_ipc {
    ts_memory memory;
    ts_gpu *gpu;
    bool granted;
    cudaIpcMemHandle_t handle;
} memory_ipc;

_Static_assert(sizeof(cudaIpcMemHandle_t) == TS_IPC_HANDLE_BYTES, "what goes into messages");

static ts_status ipc_renew(ts_memory *m, uint32_t slab, char *why, size_t why_bytes)
{
    (void)slab;
    memory_ipc *ipc = (memory_ipc *)m;
    if (!ipc->granted) { /* zeroed when it was made */
        ipc->granted = true;
        return TS_OK;
    }
    snprintf(why, why_bytes,
             "cuda-ipc memory stays with its first tenant, who may still map it, until the daemon "
             "is restarted");
    return TS_EPERM;
}

static ts_status ipc_export(ts_memory *m, uint32_t slab, bool writable, int *fd, char *why,
                            size_t why_bytes)
{
    (void)m;
    (void)slab;
    (void)writable;
    *fd = -1;
    snprintf(why, why_bytes, "cuda-ipc memory has no descriptor: its handle comes with the reply");
    return TS_EINVAL;
}

static void free_own(ts_gpu *gpu, void *base, size_t bytes)
{
    (void)gpu;
    (void)bytes;
    (void)cudaFree(base);
}

static void ipc_free(ts_memory *m)
{
    memory_ipc *ipc = (memory_ipc *)m;
    ts_gpu_later(ipc->gpu, free_own, m->base, m->slab_bytes, NULL); /* it may wait for workers */
    free(ipc);
}

static const ts_memory_ops ipc_ops = {
    .name = "cuda-ipc", .renew = ipc_renew, .export_fd = ipc_export, .free = ipc_free};

/* cudaMalloc of zeroes, with its handle. */
static ts_status malloc_shared(ts_gpu *gpu, size_t bytes, void **base, cudaIpcMemHandle_t *handle,
                               char *why, size_t why_bytes)
{
    *base = NULL;
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaError_t error = cudaMalloc(base, bytes);
    if (error != cudaSuccess)
        return ts_gpu_fail(error, "taking device memory", bytes, why, why_bytes);
    status = zero(gpu, *base, bytes, why, why_bytes);
    if (status == TS_OK) {
        error = cudaIpcGetMemHandle(handle, *base);
        if (error == cudaSuccess)
            return TS_OK;
        status = ts_gpu_fail(error, "making an IPC handle for memory", bytes, why, why_bytes);
    }
    (void)cudaFree(*base);
    return status;
}

ts_status ts_memory_cuda_ipc_new(ts_gpu *gpu, size_t bytes, ts_memory **out, char *why,
                                 size_t why_bytes)
{
    *out = NULL;
    memory_ipc *ipc = calloc(1, sizeof *ipc);
    if (ipc == NULL) {
        snprintf(why, why_bytes, "no memory for a pool");
        return TS_ENOMEM;
    }
    void *base;
    ts_status status = malloc_shared(gpu, bytes, &base, &ipc->handle, why, why_bytes);
    if (status != TS_OK) {
        free(ipc);
        return status;
    }
    ipc->gpu = gpu;
    ipc->memory = (ts_memory){.ops = &ipc_ops,
                              .base = base,
                              .slab_bytes = bytes,
                              .export_bytes = bytes,
                              .num_slabs = 1,
                              .ipc_handle = (const uint8_t *)&ipc->handle};
    *out = &ipc->memory;
    return TS_OK;
}

/* ---- exchanges ---- */

/* What is the same for both kinds. */
static void note_made(ts_gpu_shared *s, int kind, void *base, size_t bytes)
{
    s->kind = kind;
    s->base = base;
    s->bytes = bytes;
    __atomic_add_fetch(s->held, bytes, __ATOMIC_RELAXED);
}

ts_status ts_gpu_shared_new(ts_gpu *gpu, bool vmm, size_t bytes, uint64_t *held, ts_gpu_shared *out,
                            char *why, size_t why_bytes)
{
    *out = (ts_gpu_shared){.gpu = gpu, .fd = -1, .held = held};
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    if (!vmm) {
        void *base;
        cudaIpcMemHandle_t handle;
        status = malloc_shared(gpu, bytes, &base, &handle, why, why_bytes);
        if (status != TS_OK)
            return status;
        memcpy(out->ipc, &handle, sizeof out->ipc);
        note_made(out, KIND_OWN, base, bytes);
        return TS_OK;
    }
    const ts_gpu_driver *d = &gpu->driver;
    size_t physical = round_up(bytes, gpu->info.granularity);
    CUdeviceptr at = 0;
    CUmemGenericAllocationHandle handle;
    CUresult error = d->address_reserve(&at, physical, 0, 0, 0);
    if (error != CUDA_SUCCESS)
        return ts_gpu_fail_driver(gpu, error, "reserving addresses", physical, why, why_bytes);
    status = vmm_create(gpu, physical, &handle, why, why_bytes);
    if (status == TS_OK) {
        status = vmm_map(gpu, at, physical, handle, why, why_bytes);
        if (status == TS_OK) {
            status = zero(gpu, (void *)at, physical, why, why_bytes);
            if (status == TS_OK)
                status = vmm_export(gpu, handle, physical, &out->fd, why, why_bytes);
            if (status != TS_OK)
                (void)d->mem_unmap(at, physical);
        }
        (void)d->mem_release(handle); /* the mapping and the descriptor keep it */
    }
    if (status != TS_OK) {
        (void)d->address_free(at, physical);
        return status;
    }
    note_made(out, KIND_VMM, (void *)at, physical);
    return TS_OK;
}

ts_status ts_gpu_shared_adopt(ts_gpu *gpu, int fd, size_t bytes, uint64_t *held, ts_gpu_shared *out,
                              char *why, size_t why_bytes)
{
    *out = (ts_gpu_shared){.gpu = gpu, .fd = -1, .held = held};
    const ts_gpu_driver *d = &gpu->driver;
    const size_t physical = round_up(bytes, gpu->info.granularity);
    CUdeviceptr at = 0;
    CUmemGenericAllocationHandle handle;
    CUresult error = CUDA_SUCCESS;
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status == TS_OK && (error = d->address_reserve(&at, physical, 0, 0, 0)) != CUDA_SUCCESS)
        status = ts_gpu_fail_driver(gpu, error, "reserving addresses", physical, why, why_bytes);
    if (status == TS_OK) {
        error = d->import_handle(&handle, (void *)(uintptr_t)fd,
                                 CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
        if (error != CUDA_SUCCESS) {
            status = ts_gpu_fail_driver(gpu, error, "taking over device memory", physical, why,
                                        why_bytes);
        } else {
            status = vmm_map(gpu, at, physical, handle, why, why_bytes);
            (void)d->mem_release(handle); /* the mapping and the descriptor keep it */
        }
        if (status != TS_OK)
            (void)d->address_free(at, physical);
    }
    if (status != TS_OK) {
        close(fd);
        return status;
    }
    out->fd = fd;
    note_made(out, KIND_VMM, (void *)at, physical);
    return TS_OK;
}

ts_status ts_gpu_shared_import(ts_gpu *gpu, const uint8_t handle[TS_IPC_HANDLE_BYTES],
                               uint64_t offset, size_t bytes, ts_gpu_shared *out, char *why,
                               size_t why_bytes)
{
    *out = (ts_gpu_shared){.gpu = gpu, .fd = -1};
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaIpcMemHandle_t h;
    void *base = NULL;
    memcpy(&h, handle, sizeof h);
    cudaError_t error = cudaIpcOpenMemHandle(&base, h, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) {
        (void)ts_gpu_fail(error, "mapping the memory behind an IPC handle", 0, why, why_bytes);
        return TS_EINVAL;
    }
    CUdeviceptr start = 0;
    size_t size = 0;
    CUresult result = gpu->driver.address_range(&start, &size, (CUdeviceptr)base);
    if (result != CUDA_SUCCESS || start != (CUdeviceptr)base || offset > size ||
        bytes > size - offset) {
        snprintf(why, why_bytes, "%zu bytes at %llu of memory that has %zu", bytes,
                 (unsigned long long)offset, size);
        (void)cudaIpcCloseMemHandle(base);
        return TS_EINVAL;
    }
    out->base = (unsigned char *)base + offset;
    out->bytes = bytes;
    out->allocation = base;
    out->kind = KIND_IMPORTED;
    return TS_OK;
}

static void free_vmm(ts_gpu *gpu, void *base, size_t bytes)
{
    char why[TS_GPU_WHY_BYTES];
    if (ts_gpu_enter(gpu, why, sizeof why) != TS_OK)
        return;
    (void)gpu->driver.mem_unmap((CUdeviceptr)base, bytes);
    (void)gpu->driver.address_free((CUdeviceptr)base, bytes);
}

static void close_imported(ts_gpu *gpu, void *base, size_t bytes)
{
    (void)gpu;
    (void)bytes;
    (void)cudaIpcCloseMemHandle(base);
}

void ts_gpu_shared_free(ts_gpu_shared *s)
{
    if (s->fd >= 0)
        close(s->fd);
    if (s->kind == KIND_VMM) {
        free_vmm(s->gpu, s->base, s->bytes); /* this waits for nobody */
        __atomic_sub_fetch(s->held, s->bytes, __ATOMIC_RELEASE);
    } else if (s->kind == KIND_OWN) {
        ts_gpu_later(s->gpu, free_own, s->base, s->bytes, s->held);
    } else if (s->kind == KIND_IMPORTED) {
        ts_gpu_later(s->gpu, close_imported, s->allocation, s->bytes, NULL);
    }
    *s = (ts_gpu_shared){.fd = -1};
}

/* ---- pinned host memory ---- */

ts_status ts_gpu_read(ts_gpu *gpu, const void *device, size_t bytes, void *host, char *why,
                      size_t why_bytes)
{
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaError_t error =
        cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, gpu->memory_stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(gpu->memory_stream);
    return error == cudaSuccess
               ? TS_OK
               : ts_gpu_fail(error, "reading device memory", bytes, why, why_bytes);
}

ts_status ts_gpu_pin(ts_gpu *gpu, void *host, size_t bytes, void **device, char *why,
                     size_t why_bytes)
{
    *device = NULL;
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaError_t error =
        cudaHostRegister(host, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error != cudaSuccess)
        return ts_gpu_fail(error, "pinning host memory", bytes, why, why_bytes);
    error = cudaHostGetDevicePointer(device, host, 0);
    if (error == cudaSuccess)
        return TS_OK;
    (void)cudaHostUnregister(host);
    return ts_gpu_fail(error, "mapping host memory", bytes, why, why_bytes);
}

static void unpin_unmap(ts_gpu *gpu, void *host, size_t bytes)
{
    (void)gpu;
    (void)cudaHostUnregister(host);
    (void)munmap(host, bytes);
}

void ts_gpu_unpin_unmap(ts_gpu *gpu, void *host, size_t bytes)
{
    ts_gpu_later(gpu, unpin_unmap, host, bytes, NULL);
}
