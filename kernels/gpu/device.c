#define _GNU_SOURCE
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- errors ---- */

static ts_status status_of(bool out_of_memory)
{
    return out_of_memory ? TS_ENOMEM : TS_EDEVICE;
}

ts_status ts_gpu_fail(cudaError_t error, const char *what, size_t bytes, char *why,
                      size_t why_bytes)
{
    if (bytes > 0)
        snprintf(why, why_bytes, "%s of %zu bytes failed: %s", what, bytes,
                 cudaGetErrorName(error));
    else
        snprintf(why, why_bytes, "%s failed: %s", what, cudaGetErrorName(error));
    (void)cudaGetLastError(); /* one that passes is not to be seen by the next call */
    return status_of(error == cudaErrorMemoryAllocation);
}

ts_status ts_gpu_fail_driver(const ts_gpu *gpu, CUresult error, const char *what, size_t bytes,
                             char *why, size_t why_bytes)
{
    const char *name = NULL;
    if (gpu->driver.get_error_name(error, &name) != CUDA_SUCCESS)
        name = "an unknown error";
    snprintf(why, why_bytes, "%s of %zu bytes failed: %s", what, bytes, name);
    return status_of(error == CUDA_ERROR_OUT_OF_MEMORY);
}

ts_status ts_gpu_launch_fail(ts_gpu_launch *l, cudaError_t error)
{
    if (error == cudaSuccess)
        return TS_OK;
    snprintf(l->why, sizeof l->why, "%s", cudaGetErrorName(error));
    (void)cudaGetLastError();
    return status_of(error == cudaErrorMemoryAllocation);
}

void *ts_gpu_launch_stream(ts_gpu_launch *l)
{
    return l->stream;
}

const char *ts_gpu_launch_why(const ts_gpu_launch *l)
{
    return l->why;
}

ts_status ts_gpu_enter(ts_gpu *gpu, char *why, size_t why_bytes)
{
    cudaError_t error = cudaSetDevice((int)gpu->info.ordinal);
    return error == cudaSuccess ? TS_OK : ts_gpu_fail(error, "using the device", 0, why, why_bytes);
}

ts_status ts_gpu_health(ts_gpu *gpu, char *why, size_t why_bytes)
{
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaError_t error = cudaStreamQuery(gpu->memory_stream);
    if (error == cudaSuccess || error == cudaErrorNotReady)
        return TS_OK;
    snprintf(why, why_bytes, "%s", cudaGetErrorName(error));
    return TS_EDEVICE;
}

/* ---- deferred frees ---- */

static void free_now(ts_gpu *gpu, const ts_gpu_deferred_free *d)
{
    d->run(gpu, d->memory, d->bytes);
    if (d->held != NULL)
        __atomic_sub_fetch(d->held, d->bytes, __ATOMIC_RELEASE);
}

static void *deferred_main(void *arg)
{
    ts_gpu *gpu = arg;
    char why[TS_GPU_WHY_BYTES];
    (void)ts_gpu_enter(gpu, why, sizeof why);
    pthread_mutex_lock(&gpu->lock);
    for (;;) {
        while ((gpu->deferred == NULL || gpu->waiting > 0) && !gpu->stop)
            pthread_cond_wait(&gpu->changed, &gpu->lock);
        ts_gpu_deferred_free *d = gpu->deferred;
        if (d == NULL)
            break;
        gpu->deferred = NULL;
        gpu->cleaning = true;
        pthread_mutex_unlock(&gpu->lock);
        for (ts_gpu_deferred_free *next; d != NULL; d = next) {
            next = d->next;
            free_now(gpu, d);
            free(d);
        }
        pthread_mutex_lock(&gpu->lock);
        gpu->cleaning = false;
        pthread_cond_broadcast(&gpu->changed);
    }
    pthread_mutex_unlock(&gpu->lock);
    return NULL;
}

void ts_gpu_later(ts_gpu *gpu, void (*run)(ts_gpu *gpu, void *memory, size_t bytes), void *memory,
                  size_t bytes, uint64_t *held)
{
    const ts_gpu_deferred_free wanted = {
        .run = run, .memory = memory, .bytes = bytes, .held = held};
    ts_gpu_deferred_free *d = malloc(sizeof *d);
    if (d == NULL) /* better late than never */
        return free_now(gpu, &wanted);
    *d = wanted;
    pthread_mutex_lock(&gpu->lock);
    d->next = gpu->deferred;
    gpu->deferred = d;
    pthread_cond_broadcast(&gpu->changed);
    pthread_mutex_unlock(&gpu->lock);
}

bool ts_gpu_may_wait(ts_gpu *gpu)
{
    pthread_mutex_lock(&gpu->lock);
    bool may = gpu->deferred == NULL && !gpu->cleaning;
    pthread_mutex_unlock(&gpu->lock);
    return may;
}

/* ---- what there is ---- */

/* What CUDA reads when it starts: before its first call. */
static void prepare(void)
{
    /* Streams share hardware queues: with too few, one that waits for a worker holds up others. */
    (void)setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    /* A kernel that is loaded at its first launch waits until every stream is done, and lets nobody
     * launch meanwhile: a stream may be waiting for a worker. */
    (void)setenv("CUDA_MODULE_LOADING", "EAGER", 1);
}

static uint32_t count_devices(char *why, size_t why_bytes)
{
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0)
        return (uint32_t)count;
    (void)cudaGetLastError();
    int driver = 0;
    (void)cudaDriverGetVersion(&driver);
    snprintf(why, why_bytes, "%s",
             driver == 0            ? "no CUDA driver"
             : error == cudaSuccess ? "no CUDA device is visible"
                                    : cudaGetErrorString(error));
    return 0;
}

uint32_t ts_gpu_count(char *why, size_t why_bytes)
{
    prepare();
    return count_devices(why, why_bytes);
}

static ts_status find_driver(ts_gpu *gpu, char *why, size_t why_bytes)
{
    ts_gpu_driver *d = &gpu->driver;
    const struct {
        const char *name;
        void *at;
        unsigned version;
    } wanted[] = {
        {"cuGetErrorName", &d->get_error_name, 6000},
        {"cuMemCreate", &d->mem_create, 10020},
        {"cuMemRelease", &d->mem_release, 10020},
        {"cuMemAddressReserve", &d->address_reserve, 10020},
        {"cuMemAddressFree", &d->address_free, 10020},
        {"cuMemMap", &d->mem_map, 10020},
        {"cuMemUnmap", &d->mem_unmap, 10020},
        {"cuMemSetAccess", &d->set_access, 10020},
        {"cuMemExportToShareableHandle", &d->export_handle, 10020},
        {"cuMemGetAllocationGranularity", &d->granularity, 10020},
        {"cuMemGetAddressRange", &d->address_range, 3020},
        {"cuDeviceGetAttribute", &d->attribute, 2000},
        {"cuStreamWaitValue32", &d->wait_value, 11070},
        {"cuStreamBatchMemOp", &d->batch_ops, 11070},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        enum cudaDriverEntryPointQueryResult found;
        cudaError_t error = cudaGetDriverEntryPointByVersion(
            wanted[i].name, wanted[i].at, wanted[i].version, cudaEnableDefault, &found);
        if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
            snprintf(why, why_bytes, "the CUDA driver has no %s: a newer driver is needed",
                     wanted[i].name);
            return TS_EDEVICE;
        }
    }
    return TS_OK;
}

static ts_status find_info(ts_gpu *gpu, char *why, size_t why_bytes)
{
    struct cudaDeviceProp p;
    ts_gpu_info *info = &gpu->info;
    int vmm = 0;
    cudaError_t error = cudaGetDeviceProperties(&p, (int)info->ordinal);
    if (error != cudaSuccess)
        return ts_gpu_fail(error, "asking for the device's properties", 0, why, why_bytes);
    snprintf(info->name, sizeof info->name, "%.95s", p.name);
    memcpy(info->uuid, &p.uuid, sizeof info->uuid);
    info->total_bytes = p.totalGlobalMem;
    info->shared_bytes = p.sharedMemPerBlockOptin;
    info->l2_bytes = (size_t)p.l2CacheSize;
    info->processors = (uint32_t)p.multiProcessorCount;
    info->warp_groups = TS_WARP_GROUPS && p.major == 9 && p.minor == 0;
    if (gpu->driver.attribute(&vmm, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                              (CUdevice)info->ordinal) != CUDA_SUCCESS)
        vmm = 0;
    CUmemAllocationProp prop = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = (int)info->ordinal}};
    info->vmm =
        vmm != 0 && gpu->driver.granularity(&info->granularity, &prop,
                                            CU_MEM_ALLOC_GRANULARITY_MINIMUM) == CUDA_SUCCESS;
    return TS_OK;
}

const ts_gpu_info *ts_gpu_get_info(const ts_gpu *gpu)
{
    return &gpu->info;
}

ts_status ts_gpu_free_bytes(ts_gpu *gpu, uint64_t *bytes, char *why, size_t why_bytes)
{
    size_t available = 0, total = 0;
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaError_t error = cudaMemGetInfo(&available, &total);
    *bytes = available;
    return error == cudaSuccess ? TS_OK
                                : ts_gpu_fail(error, "asking for free memory", 0, why, why_bytes);
}

static cudaError_t ask_about(ts_gpu_function *f)
{
    struct cudaFuncAttributes a;
    cudaError_t error = cudaFuncGetAttributes(&a, f->kernel.function);
    if (error == cudaSuccess) {
        f->shared_bytes = a.sharedSizeBytes + f->kernel.bytes;
        f->allowed = (int)f->kernel.bytes <= a.maxDynamicSharedSizeBytes;
    }
    return error;
}

ts_status ts_gpu_function_find(ts_gpu *gpu, const ts_gpu_kernel *kernel, size_t *shared_bytes,
                               char *why, size_t why_bytes)
{
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&gpu->lock);
    ts_gpu_function *f = gpu->functions, *end = f + gpu->num_functions;
    while (f < end && (f->kernel.function != kernel->function || f->kernel.bytes != kernel->bytes))
        f++;
    if (f == end) {
        f->kernel = *kernel;
        error = ask_about(f);
        gpu->num_functions += error == cudaSuccess;
    }
    if (error == cudaSuccess && !f->allowed && f->shared_bytes <= gpu->info.shared_bytes) {
        error = cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)kernel->bytes);
        f->allowed = error == cudaSuccess;
    }
    *shared_bytes = f->shared_bytes;
    pthread_mutex_unlock(&gpu->lock);
    return error == cudaSuccess
               ? TS_OK
               : ts_gpu_fail(error, "asking for a kernel's properties", 0, why, why_bytes);
}

/* ---- launches ---- */

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
        l->done = NULL;
        l->slot = slot;
        l->slot->users++;
        l->stream = l->slot->stream;
        if (position != NULL)
            *position = (ts_gpu_position){(uint32_t)(l->slot - gpu->slots), l->slot->epoch};
    }
    pthread_mutex_unlock(&gpu->lock);
    return l;
}

static void give_back(ts_gpu_launch *l)
{
    ts_gpu *gpu = l->gpu;
    pthread_mutex_lock(&gpu->lock);
    l->next_free = gpu->free_launch;
    gpu->free_launch = l;
    l->slot->users--;
    if (l->waits) {
        l->waits = false;
        gpu->waiting--;
        pthread_cond_broadcast(&gpu->changed);
    }
    pthread_mutex_unlock(&gpu->lock);
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
    pthread_mutex_unlock(&gpu->lock);
    return stream_op(l, l->gpu->driver.wait_value((CUstream)l->stream, (CUdeviceptr)word, value,
                                                  CU_STREAM_WAIT_VALUE_GEQ));
}

ts_status ts_gpu_launch_signal(ts_gpu_launch *l, const ts_gpu_signal *signals, uint32_t count)
{
    CUstreamBatchMemOpParams ops[32]; /* the driver takes no more than 256 */
    ts_status status = TS_OK;
    for (uint32_t n = 0; n < count && status == TS_OK;) {
        uint32_t some = 0;
        for (; n < count && some < sizeof ops / sizeof *ops; n++)
            ops[some++].writeValue = (struct CUstreamMemOpWriteValueParams_st){
                .operation = CU_STREAM_MEM_OP_WRITE_VALUE_32,
                .address = (CUdeviceptr)signals[n].word,
                .value = signals[n].value,
                .flags = CU_STREAM_WRITE_VALUE_DEFAULT};
        status = stream_op(l, l->gpu->driver.batch_ops((CUstream)l->stream, some, ops, 0));
    }
    return status;
}

ts_status ts_gpu_launch_finish(ts_gpu_launch *l,
                               void (*done)(void *arg, ts_status status, const char *why),
                               void *arg)
{
    cudaError_t error = cudaEventRecord(l->end, l->stream);
    if (error != cudaSuccess)
        return ts_gpu_launch_fail(l, error);
    pthread_mutex_lock(&l->lock);
    l->done = done;
    l->arg = arg;
    l->finished = true;
    pthread_cond_signal(&l->event);
    pthread_mutex_unlock(&l->lock);
    return TS_OK;
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
        error = cudaEventRecord(l->end, l->stream);
        l->marked = error == cudaSuccess;
    }
    return ts_gpu_launch_fail(l, error);
}

ts_status ts_gpu_launch_await_mark(ts_gpu_launch *l)
{
    if (!l->marked)
        return TS_OK;
    cudaError_t error = cudaEventSynchronize(l->end);
    l->marked = error != cudaSuccess;
    return ts_gpu_launch_fail(l, error);
}

/* Waits for what was queued, again and again. */
static void *launch_main(void *thread_arg)
{
    ts_gpu_launch *l = thread_arg;
    char why[TS_GPU_WHY_BYTES];
    (void)ts_gpu_enter(l->gpu, why, sizeof why);
    for (;;) {
        pthread_mutex_lock(&l->lock);
        while (!l->finished && !l->stop)
            pthread_cond_wait(&l->event, &l->lock);
        bool finished = l->finished;
        void (*done)(void *arg, ts_status status, const char *why) = l->done;
        void *arg = l->arg;
        l->finished = false;
        pthread_mutex_unlock(&l->lock);
        if (!finished)
            return NULL;
        cudaError_t error = cudaEventSynchronize(l->end);
        snprintf(why, sizeof why, "%s", cudaGetErrorName(error));
        give_back(l); /* before: whoever hears of it may take one */
        if (done != NULL)
            done(arg, error == cudaSuccess ? TS_OK : TS_EDEVICE, why);
    }
}

/* Makes what the slot needs, by a launch in it; those on streams of others copy no blocks. */
static ts_status slot_init(ts_gpu *gpu, ts_gpu_stream_slot *slot, char *why, size_t why_bytes)
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

static void slot_fini(ts_gpu_stream_slot *slot)
{
    (void)cudaFreeHost(slot->host);
    (void)cudaFree(slot->device);
    (void)cudaFree(slot->partials);
    (void)cudaFree(slot->counters);
    if (slot->stream != NULL)
        (void)cudaStreamDestroy(slot->stream);
}

/* Makes what the launch needs. */
static ts_status launch_init(ts_gpu *gpu, ts_gpu_launch *l, char *why, size_t why_bytes)
{
    l->gpu = gpu;
    l->slot = gpu->slots;
    l->stream = gpu->memory_stream;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->event, NULL);
    cudaError_t error =
        cudaEventCreateWithFlags(&l->end, cudaEventBlockingSync | cudaEventDisableTiming);
    if (error != cudaSuccess)
        return ts_gpu_fail(error, "making an event", 0, why, why_bytes);
    if (gpu->for_streams) /* nobody waits for it but who asks */
        return TS_OK;
    l->runs = pthread_create(&l->thread, NULL, launch_main, l) == 0;
    if (!l->runs) {
        snprintf(why, why_bytes, "no thread for a launch");
        return TS_ENOMEM;
    }
    pthread_mutex_lock(&gpu->lock);
    l->next_free = gpu->free_launch;
    gpu->free_launch = l;
    pthread_mutex_unlock(&gpu->lock);
    return TS_OK;
}

static void launch_fini(ts_gpu_launch *l)
{
    if (l->gpu == NULL)
        return;
    if (l->runs) {
        pthread_mutex_lock(&l->lock);
        l->stop = true;
        pthread_cond_signal(&l->event);
        pthread_mutex_unlock(&l->lock);
        pthread_join(l->thread, NULL);
    }
    if (l->end != NULL)
        (void)cudaEventDestroy(l->end);
    pthread_cond_destroy(&l->event);
    pthread_mutex_destroy(&l->lock);
}

/* ---- opening ---- */

static ts_status open_device(uint32_t ordinal, bool for_streams, ts_gpu **out, char *why,
                             size_t why_bytes)
{
    *out = NULL;
    uint32_t count = count_devices(why, why_bytes);
    if (count == 0)
        return TS_EDEVICE;
    if (ordinal >= count) {
        snprintf(why, why_bytes, "there is no cuda:%u; %u %s visible", ordinal, count,
                 count == 1 ? "device is" : "devices are");
        return TS_EDEVICE;
    }
    ts_gpu *gpu = calloc(1, sizeof *gpu);
    if (gpu == NULL) {
        snprintf(why, why_bytes, "no memory for a device");
        return TS_ENOMEM;
    }
    gpu->info.ordinal = ordinal;
    gpu->for_streams = for_streams;
    pthread_mutex_init(&gpu->lock, NULL);
    pthread_cond_init(&gpu->changed, NULL);
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status == TS_OK)
        status = find_driver(gpu, why, why_bytes);
    if (status == TS_OK)
        status = find_info(gpu, why, why_bytes);
    if (status == TS_OK) {
        cudaError_t error = cudaStreamCreateWithFlags(&gpu->memory_stream, cudaStreamNonBlocking);
        if (error == cudaSuccess)
            error = cudaStreamCreateWithFlags(&gpu->upload_stream, cudaStreamNonBlocking);
        if (error != cudaSuccess)
            status = ts_gpu_fail(error, "making a stream", 0, why, why_bytes);
    }
    if (status == TS_OK) {
        gpu->deferred_runs = pthread_create(&gpu->deferred_thread, NULL, deferred_main, gpu) == 0;
        if (!gpu->deferred_runs) {
            snprintf(why, why_bytes, "no thread for the device");
            status = TS_ENOMEM;
        }
    }
    for (uint32_t i = 0; status == TS_OK && !for_streams && i < TS_GPU_STREAM_SLOTS; i++)
        status = slot_init(gpu, &gpu->slots[i], why, why_bytes);
    for (uint32_t i = 0; status == TS_OK && i < (for_streams ? 1 : TS_GPU_LAUNCHES); i++)
        status = launch_init(gpu, &gpu->launches[i], why, why_bytes);
    if (status != TS_OK) {
        ts_gpu_close(gpu);
        return status;
    }
    *out = gpu;
    return TS_OK;
}

ts_status ts_gpu_open(uint32_t ordinal, ts_gpu **out, char *why, size_t why_bytes)
{
    prepare();
    return open_device(ordinal, false, out, why, why_bytes);
}

ts_status ts_gpu_open_for_streams(uint32_t ordinal, ts_gpu **out, char *why, size_t why_bytes)
{
    return open_device(ordinal, true, out, why, why_bytes);
}

void ts_gpu_close(ts_gpu *gpu)
{
    char why[TS_GPU_WHY_BYTES];
    if (gpu == NULL)
        return;
    (void)ts_gpu_enter(gpu, why, sizeof why);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        launch_fini(&gpu->launches[i]);
    for (uint32_t i = 0; i < TS_GPU_STREAM_SLOTS; i++)
        slot_fini(&gpu->slots[i]);
    if (gpu->deferred_runs) {
        pthread_mutex_lock(&gpu->lock);
        gpu->stop = true;
        pthread_cond_broadcast(&gpu->changed);
        pthread_mutex_unlock(&gpu->lock);
        pthread_join(gpu->deferred_thread, NULL);
    }
    ts_gpu_buffers_fini(gpu);
    if (gpu->memory_stream != NULL)
        (void)cudaStreamDestroy(gpu->memory_stream);
    if (gpu->upload_stream != NULL)
        (void)cudaStreamDestroy(gpu->upload_stream);
    pthread_cond_destroy(&gpu->changed);
    pthread_mutex_destroy(&gpu->lock);
    free(gpu);
}
