/* Memory that launches and plans use, on both sides. It is given back when the device is closed:
 * giving back waits for every stream (gpu.h). */
#include "device.h"

#include <stdio.h>
#include <stdlib.h>

#define SCRATCH_BYTES ((size_t)1 << 16) /* the least that is taken at once for partial results */

static void free_device(ts_gpu *gpu, void *memory, size_t bytes)
{
    (void)gpu;
    (void)bytes;
    (void)cudaFree(memory);
}

static void free_host(ts_gpu *gpu, void *memory, size_t bytes)
{
    (void)gpu;
    (void)bytes;
    (void)cudaFreeHost(memory);
}

void ts_gpu_free_later(ts_gpu *gpu, void *device)
{
    if (device != NULL)
        ts_gpu_later(gpu, free_device, device, 0, NULL);
}

/* Keeps what the slot has outgrown, and launches before this one may still use, until the device is
 * closed. */
static void outgrow(ts_gpu_launch *l, ts_gpu_staging *old, void *host, void *device)
{
    *old = (ts_gpu_staging){.host = host, .device = device};
    pthread_mutex_lock(&l->gpu->lock);
    old->next = l->gpu->old;
    l->gpu->old = old;
    pthread_mutex_unlock(&l->gpu->lock);
}

ts_status ts_gpu_launch_reserve(ts_gpu_launch *l, size_t bytes)
{
    ts_gpu_stream_slot *slot = l->slot;
    if (slot->capacity >= bytes)
        return TS_OK;
    size_t capacity = slot->capacity == 0 ? TS_GPU_STAGING_BYTES : slot->capacity;
    while (capacity < bytes)
        capacity *= 2;
    ts_gpu_staging *old = malloc(sizeof *old);
    void *host = NULL, *device = NULL;
    cudaError_t error = old == NULL ? cudaErrorMemoryAllocation : cudaMalloc(&device, capacity);
    if (error == cudaSuccess)
        error = cudaHostAlloc(&host, capacity, cudaHostAllocDefault);
    if (error != cudaSuccess) {
        ts_gpu_free_later(l->gpu, device);
        free(old);
        return ts_gpu_launch_fail(l, error);
    }
    outgrow(l, old, slot->host, slot->device);
    slot->host = host;
    slot->device = device;
    slot->capacity = capacity;
    return TS_OK;
}

/* Grows one piece of device memory, a power of two of bytes, to at least `bytes`. */
static cudaError_t grow(ts_gpu_launch *l, void **memory, size_t *capacity, size_t bytes)
{
    size_t size = SCRATCH_BYTES;
    while (size < bytes)
        size *= 2;
    void *device = NULL;
    ts_gpu_staging *old = malloc(sizeof *old);
    cudaError_t error = old == NULL ? cudaErrorMemoryAllocation : cudaMalloc(&device, size);
    if (error != cudaSuccess) {
        free(old);
        return error;
    }
    outgrow(l, old, NULL, *memory);
    *memory = device;
    *capacity = size;
    return cudaSuccess;
}

ts_status ts_gpu_launch_scratch(ts_gpu_launch *l, size_t bytes, size_t counters)
{
    ts_gpu_stream_slot *slot = l->slot;
    cudaError_t error = cudaSuccess;
    if (bytes > slot->partial_bytes) {
        void *partials = slot->partials;
        error = grow(l, &partials, &slot->partial_bytes, bytes);
        slot->partials = partials;
    }
    if (error == cudaSuccess && counters > slot->num_counters) {
        void *memory = slot->counters;
        size_t capacity = 0;
        error = grow(l, &memory, &capacity, counters * sizeof *slot->counters);
        slot->counters = memory;
        if (error == cudaSuccess)
            error = cudaMemsetAsync(memory, 0, capacity, l->stream);
        if (error == cudaSuccess)
            slot->num_counters = capacity / sizeof *slot->counters;
    }
    return ts_gpu_launch_fail(l, error);
}

/* ---- plans' memory ---- */

ts_status ts_gpu_buffer_take(ts_gpu *gpu, size_t bytes, ts_gpu_buffer **out, char *why,
                             size_t why_bytes)
{
    uint32_t log = 16;
    while ((size_t)1 << log < bytes)
        log++;
    pthread_mutex_lock(&gpu->lock);
    ts_gpu_buffer *b = gpu->buffers[log];
    if (b != NULL)
        gpu->buffers[log] = b->next;
    pthread_mutex_unlock(&gpu->lock);
    *out = b;
    if (b != NULL)
        return TS_OK;
    b = calloc(1, sizeof *b);
    if (b == NULL) {
        snprintf(why, why_bytes, "no memory for a plan's buffer");
        return TS_ENOMEM;
    }
    b->log = log;
    cudaError_t error = cudaMalloc((void **)&b->device, (size_t)1 << log);
    if (error == cudaSuccess)
        error = cudaHostAlloc((void **)&b->host, (size_t)1 << log, cudaHostAllocDefault);
    if (error == cudaSuccess)
        error = cudaEventCreateWithFlags(&b->there, cudaEventDisableTiming);
    if (error == cudaSuccess) {
        *out = b;
        return TS_OK;
    }
    ts_gpu_free_later(gpu, b->device);
    if (b->host != NULL)
        ts_gpu_later(gpu, free_host, b->host, (size_t)1 << log, NULL);
    free(b);
    return ts_gpu_fail(error, "allocating a plan's buffer", (size_t)1 << log, why, why_bytes);
}

ts_status ts_gpu_buffer_upload(ts_gpu *gpu, ts_gpu_buffer *b, size_t bytes, char *why,
                               size_t why_bytes)
{
    __atomic_store_n(&b->is_there, false, __ATOMIC_RELAXED);
    cudaError_t error =
        cudaMemcpyAsync(b->device, b->host, bytes, cudaMemcpyHostToDevice, gpu->upload_stream);
    if (error == cudaSuccess)
        error = cudaEventRecord(b->there, gpu->upload_stream);
    return error == cudaSuccess ? TS_OK
                                : ts_gpu_fail(error, "uploading a plan", bytes, why, why_bytes);
}

void ts_gpu_buffer_give_back(ts_gpu *gpu, ts_gpu_buffer *b)
{
    if (b == NULL)
        return;
    pthread_mutex_lock(&gpu->lock);
    b->next = gpu->buffers[b->log];
    gpu->buffers[b->log] = b;
    pthread_mutex_unlock(&gpu->lock);
}

void ts_gpu_buffers_fini(ts_gpu *gpu)
{
    for (ts_gpu_staging *old = gpu->old, *next; old != NULL; old = next) {
        next = old->next;
        (void)cudaFreeHost(old->host);
        (void)cudaFree(old->device);
        free(old);
    }
    for (uint32_t i = 0; i < TS_GPU_BUFFER_LOGS; i++)
        for (ts_gpu_buffer *b = gpu->buffers[i], *next; b != NULL; b = next) {
            next = b->next;
            (void)cudaFreeHost(b->host);
            (void)cudaFree(b->device);
            (void)cudaEventDestroy(b->there);
            free(b);
        }
}
