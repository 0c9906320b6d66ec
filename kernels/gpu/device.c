#define _GNU_SOURCE
#include "device.h"

#include "clock.h"
#include "timed_wait.h"

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

ts_status ts_gpu_enter(ts_gpu *gpu, char *why, size_t why_bytes)
{
    cudaError_t error = cudaSetDevice((int)gpu->info.ordinal);
    return error == cudaSuccess ? TS_OK : ts_gpu_fail(error, "using the device", 0, why, why_bytes);
}

void ts_gpu_begin_thread(ts_gpu *gpu)
{
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    char why[TS_GPU_WHY_BYTES];
    (void)ts_gpu_enter(gpu, why, sizeof why);
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
}

void ts_gpu_expect_company(ts_gpu *gpu, uint32_t sessions)
{
    __atomic_store_n(&gpu->company, sessions, __ATOMIC_RELAXED);
}

ts_status ts_gpu_health(ts_gpu *gpu, char *why, size_t why_bytes)
{
    ts_status status = ts_gpu_enter(gpu, why, why_bytes);
    if (status != TS_OK)
        return status;
    cudaError_t error = cudaStreamQuery(gpu->memory_stream);
    if (error == cudaSuccess)
        return TS_OK;
    (void)cudaGetLastError(); /* a launch that looks at the last error isn't to see it */
    if (error == cudaErrorNotReady)
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
    ts_gpu_begin_thread(gpu);
    pthread_mutex_lock(&gpu->lock);
    for (;;) {
        while ((gpu->deferred == NULL || gpu->waiting > 0 || gpu->loads > 0) && !gpu->stop)
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
    bool may = gpu->deferred == NULL && !gpu->cleaning && gpu->loads == 0;
    pthread_mutex_unlock(&gpu->lock);
    return may;
}

/* ---- loading ---- */

#define LOAD_WAIT_MS 200 /* for launches that wait */

/* Whether kernels may be loaded now. Under the lock. */
static bool may_load(const ts_gpu *gpu)
{
    return gpu->waiting == ts_gpu_launches_over(gpu) && !gpu->cleaning;
}

ts_status ts_gpu_load_begin(ts_gpu *gpu, char *why, size_t why_bytes)
{
    const uint64_t until_ms = ts_now_ms() + LOAD_WAIT_MS;
    pthread_mutex_lock(&gpu->lock);
    gpu->loads++;
    /* This thread may be the one that tells of launches' ends: so words are looked at here. */
    while (!may_load(gpu) && ts_now_ms() < until_ms)
        (void)ts_timed_wait(&gpu->changed, &gpu->lock, ts_now_ms() + 1);
    const bool may = may_load(gpu);
    if (may)
        gpu->cleaning = true;
    else
        gpu->loads--;
    pthread_cond_broadcast(&gpu->changed);
    pthread_mutex_unlock(&gpu->lock);
    if (may)
        return TS_OK;
    snprintf(why, why_bytes,
             "cuda:%u waits for a worker's stream, and loads no kernels meanwhile: try again",
             gpu->info.ordinal);
    return TS_EBUSY;
}

void ts_gpu_load_end(ts_gpu *gpu)
{
    pthread_mutex_lock(&gpu->lock);
    gpu->loads--;
    gpu->cleaning = false;
    pthread_cond_broadcast(&gpu->changed);
    pthread_mutex_unlock(&gpu->lock);
}

/* ---- what there is ---- */

/* What CUDA reads when it starts: before its first call. */
static void prepare(void)
{
    char queues[16];
    snprintf(queues, sizeof queues, "%u", TS_GPU_QUEUES);
    (void)setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues, 0);
    /* All kernels take half a second; ts_gpu_load has those that are needed. */
    (void)setenv("CUDA_MODULE_LOADING", "LAZY", 1);
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
        {"cuMemImportFromShareableHandle", &d->import_handle, 10020},
        {"cuMemGetAllocationGranularity", &d->granularity, 10020},
        {"cuMemGetAddressRange", &d->address_range, 3020},
        {"cuDeviceGetAttribute", &d->attribute, 2000},
        {"cuStreamWaitValue32", &d->wait_value, 11070},
        {"cuStreamBatchMemOp", &d->batch_ops, 11070},
        {"cuTensorMapEncodeTiled", &d->encode_map, 12000},
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

/* CU_DEVICE_ATTRIBUTE_MPS_ENABLED, which older headers lack and older drivers refuse. */
#define MPS_ENABLED ((CUdevice_attribute)133)

static ts_status find_info(ts_gpu *gpu, char *why, size_t why_bytes)
{
    struct cudaDeviceProp p;
    ts_gpu_info *info = &gpu->info;
    int vmm = 0, mps = 0;
    cudaError_t error = cudaGetDeviceProperties(&p, (int)info->ordinal);
    if (error != cudaSuccess)
        return ts_gpu_fail(error, "asking for the device's properties", 0, why, why_bytes);
    snprintf(info->name, sizeof info->name, "%.95s", p.name);
    memcpy(info->uuid, &p.uuid, sizeof info->uuid);
    info->total_bytes = p.totalGlobalMem;
    info->shared_bytes = p.sharedMemPerBlockOptin;
    info->l2_bytes = (size_t)p.l2CacheSize;
    info->processors = (uint32_t)p.multiProcessorCount;
    info->mps = gpu->driver.attribute(&mps, MPS_ENABLED, (CUdevice)info->ordinal) == CUDA_SUCCESS &&
                mps != 0;
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
        uint32_t bytes = kernel->bytes; /* or what it was allowed before, with other sizes */
        for (ts_gpu_function *g = gpu->functions; g < gpu->functions + gpu->num_functions; g++)
            if (g->kernel.function == kernel->function && g->allowed && g->kernel.bytes > bytes)
                bytes = g->kernel.bytes;
        error = cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)bytes);
        f->allowed = error == cudaSuccess;
    }
    *shared_bytes = f->shared_bytes;
    pthread_mutex_unlock(&gpu->lock);
    return error == cudaSuccess
               ? TS_OK
               : ts_gpu_fail(error, "asking for a kernel's properties", 0, why, why_bytes);
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
    gpu->team_tokens = TS_GPU_TEAM_TOKENS;
    pthread_mutex_init(&gpu->lock, NULL);
    ts_timed_wait_init(&gpu->changed);
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
        status = ts_gpu_slot_init(gpu, &gpu->slots[i], why, why_bytes);
    for (uint32_t i = 0; status == TS_OK && i < (for_streams ? 1 : TS_GPU_LAUNCHES); i++)
        status = ts_gpu_launch_init(gpu, &gpu->launches[i], why, why_bytes);
    if (status == TS_OK && !for_streams) /* before anything waits: loading would wait for it */
        status = ts_gpu_load_words(gpu, why, why_bytes);
    if (status == TS_OK && !for_streams)
        status = ts_gpu_launch_ends_init(gpu, why, why_bytes);
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
    ts_gpu_launch_ends_fini(gpu);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        ts_gpu_launch_fini(&gpu->launches[i]);
    for (uint32_t i = 0; i < TS_GPU_STREAM_SLOTS; i++)
        ts_gpu_slot_fini(&gpu->slots[i]);
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
