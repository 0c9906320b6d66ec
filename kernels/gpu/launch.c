/* Launches: the streams that they are queued in, waits for workers, and what tells them. */
#include "device.h"

#include <stdio.h>

/* Up to this many words are told by stream operations, more by a kernel of its own, where the
 * attention's kernel doesn't tell them itself (tells_end in attend.cu). The device takes operations
 * (0.7 us each) and kernels (1 us) of all streams and processes one after the other, so a kernel
 * costs it less; but that may have to wait until others leave a processor. */
#define SIGNALS_BY_OPS 3u

ts_status ts_gpu_launch_fail(ts_gpu_launch *l, cudaError_t error)
{
    if (error == cudaSuccess)
        return TS_OK;
    snprintf(l->why, sizeof l->why, "%s", cudaGetErrorName(error));
    (void)cudaGetLastError();
    return error == cudaErrorMemoryAllocation ? TS_ENOMEM : TS_EDEVICE;
}

void *ts_gpu_launch_stream(ts_gpu_launch *l)
{
    return l->stream;
}

const char *ts_gpu_launch_why(const ts_gpu_launch *l)
{
    return l->why;
}

/* The slot of what was queued at the position, unless that is done: then a free one, or NULL. Under
 * the lock. */
static ts_gpu_stream_slot *take_slot(ts_gpu *gpu, const ts_gpu_position *position)
{
    ts_gpu_stream_slot *slot = gpu->slots;
    if (position != NULL && position->epoch != 0) {
        slot += position->slot;
        if (slot->users > 0 && slot->epoch == position->epoch)
            return slot;
        slot = gpu->slots;
    }
    while (slot < gpu->slots + TS_GPU_STREAM_SLOTS && slot->users > 0)
        slot++;
    if (slot == gpu->slots + TS_GPU_STREAM_SLOTS)
        return NULL;
    if (++slot->epoch == 0)
        slot->epoch = 1;
    return slot;
}

ts_gpu_launch *ts_gpu_launch_take(ts_gpu *gpu, ts_gpu_position *position)
{
    pthread_mutex_lock(&gpu->lock);
    ts_gpu_launch *l = gpu->free_launch;
    ts_gpu_stream_slot *slot = l == NULL ? NULL : take_slot(gpu, position);
    if (slot == NULL) {
        l = NULL;
    } else {
        gpu->free_launch = l->next_free;
        l->tells_end = false;
        l->slot = slot;
        l->slot->users++;
        l->stream = l->slot->stream;
        if (position != NULL)
            *position = (ts_gpu_position){(uint32_t)(l->slot - gpu->slots), l->slot->epoch};
    }
    pthread_mutex_unlock(&gpu->lock);
    return l;
}

void ts_gpu_launch_give_back(ts_gpu_launch *l)
{
    ts_gpu *gpu = l->gpu;
    l->next_free = gpu->free_launch;
    gpu->free_launch = l;
    l->slot->users--;
    if (l->waits) {
        l->waits = false;
        gpu->waiting--;
        pthread_cond_broadcast(&gpu->changed);
    }
}

static ts_status stream_op(ts_gpu_launch *l, CUresult error)
{
    if (error == CUDA_SUCCESS)
        return TS_OK;
    return ts_gpu_fail_driver(l->gpu, error, "a stream memory operation", sizeof(uint32_t), l->why,
                              sizeof l->why);
}

ts_status ts_gpu_launch_wait(ts_gpu_launch *l, const uint32_t *word, uint32_t value)
{
    ts_gpu *gpu = l->gpu;
    pthread_mutex_lock(&gpu->lock);
    while (gpu->cleaning)
        pthread_cond_wait(&gpu->changed, &gpu->lock);
    gpu->waiting += !l->waits;
    l->waits = true;
    l->tells_end = false;
    pthread_mutex_unlock(&gpu->lock);
    return stream_op(l, l->gpu->driver.wait_value((CUstream)l->stream, (CUdeviceptr)word, value,
                                                  CU_STREAM_WAIT_VALUE_GEQ));
}

ts_status ts_gpu_launch_signal(ts_gpu_launch *l, const ts_gpu_signal *signals, uint32_t count)
{
    CUstreamBatchMemOpParams ops[SIGNALS_BY_OPS];
    const ts_gpu_signal end = {l->end_there, ++l->end_value};
    const uint32_t all = count + (end.word != NULL);
    ts_status status;
    l->tells_end = false;
    for (uint32_t n = 0; n < all && all <= SIGNALS_BY_OPS; n++) {
        const ts_gpu_signal *s = n < count ? &signals[n] : &end;
        ops[n].writeValue =
            (struct CUstreamMemOpWriteValueParams_st){.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32,
                                                      .address = (CUdeviceptr)s->word,
                                                      .value = s->value,
                                                      .flags = CU_STREAM_WRITE_VALUE_DEFAULT};
    }
    if (all > SIGNALS_BY_OPS)
        status = ts_gpu_launch_words(l, signals, count, &end);
    else
        status = stream_op(l, l->gpu->driver.batch_ops((CUstream)l->stream, all, ops, 0));
    l->tells_end = status == TS_OK && end.word != NULL;
    return status;
}

ts_gpu_launch *ts_gpu_launch_on(ts_gpu *gpu, void *stream)
{
    gpu->launches[0].stream = stream;
    return &gpu->launches[0];
}

ts_gpu_launch *ts_gpu_launch_on_own(ts_gpu *gpu)
{
    return ts_gpu_launch_on(gpu, gpu->memory_stream);
}

ts_status ts_gpu_launch_mark(ts_gpu_launch *l)
{
    enum cudaStreamCaptureStatus capture;
    cudaError_t error = cudaStreamIsCapturing(l->stream, &capture);
    if (error == cudaSuccess && capture == cudaStreamCaptureStatusNone) {
        error = cudaEventRecord(l->mark, l->stream);
        l->marked = error == cudaSuccess;
    }
    return ts_gpu_launch_fail(l, error);
}

ts_status ts_gpu_launch_await_mark(ts_gpu_launch *l)
{
    if (!l->marked)
        return TS_OK;
    cudaError_t error = cudaEventQuery(l->mark);
    if (error == cudaErrorNotReady) {
        (void)cudaGetLastError();
        error = cudaStreamWaitEvent(l->gpu->memory_stream, l->mark, 0);
        if (error == cudaSuccess)
            error = cudaEventRecord(l->waker, l->gpu->memory_stream);
        if (error == cudaSuccess)
            error = cudaEventSynchronize(l->waker);
    }
    l->marked = error != cudaSuccess;
    return ts_gpu_launch_fail(l, error);
}

ts_status ts_gpu_slot_init(ts_gpu *gpu, ts_gpu_stream_slot *slot, char *why, size_t why_bytes)
{
    cudaError_t error = cudaStreamCreateWithFlags(&slot->stream, cudaStreamNonBlocking);
    if (error != cudaSuccess)
        return ts_gpu_fail(error, "making a stream", 0, why, why_bytes);
    ts_gpu_launch l = {.gpu = gpu, .slot = slot, .stream = slot->stream};
    ts_status status = ts_gpu_launch_reserve(&l, TS_GPU_STAGING_BYTES);
    if (status != TS_OK)
        snprintf(why, why_bytes, "staging memory of %zu bytes: %s", TS_GPU_STAGING_BYTES, l.why);
    return status;
}

void ts_gpu_slot_fini(ts_gpu_stream_slot *slot)
{
    (void)cudaFreeHost(slot->host);
    (void)cudaFree(slot->device);
    (void)cudaFree(slot->partials);
    (void)cudaFree(slot->counters);
    if (slot->stream != NULL)
        (void)cudaStreamDestroy(slot->stream);
}

ts_status ts_gpu_launch_init(ts_gpu *gpu, ts_gpu_launch *l, char *why, size_t why_bytes)
{
    l->gpu = gpu;
    l->slot = gpu->slots;
    l->stream = gpu->memory_stream;
    if (gpu->for_streams) {
        /* An event that threads sleep for interrupts the processor when the device reaches it,
         * whether one sleeps or not. With one at each layer, workers that slept for their streams
         * were woken late (tests/results/h200.md). */
        cudaError_t error = cudaEventCreateWithFlags(&l->mark, cudaEventDisableTiming);
        if (error == cudaSuccess)
            error =
                cudaEventCreateWithFlags(&l->waker, cudaEventBlockingSync | cudaEventDisableTiming);
        return error == cudaSuccess ? TS_OK
                                    : ts_gpu_fail(error, "making an event", 0, why, why_bytes);
    }
    l->next_free = gpu->free_launch;
    gpu->free_launch = l;
    return TS_OK;
}

void ts_gpu_launch_fini(ts_gpu_launch *l)
{
    if (l->mark != NULL)
        (void)cudaEventDestroy(l->mark);
    if (l->waker != NULL)
        (void)cudaEventDestroy(l->waker);
}
