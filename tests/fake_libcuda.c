/*
 * A libcuda.so.1 with one device whose memory is this process's own: what the library needs to map
 * slabs of a GPU pool, and to order its runs on a stream. A descriptor that is imported is mapped
 * as it is; an IPC handle is the path of the memory's file. There is one stream, whichever is
 * named: a thread that does what is queued, one after the other. Functions that no test needs fail.
 *
 * fake_unmaps counts cuMemUnmap's calls, and fake_strict_calls those, of whatever would spoil
 * another thread's capture, by threads whose captures aren't relaxed; fake_capture_mode is the
 * calling thread's. fake_stream_call queues a call on the stream, as a kernel would be;
 * fake_stream_await waits until all that is queued is done. fake_device_new is cudaMalloc. While
 * fake_is_lost the context is one that a fault has taken.
 */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { FAILED = 999 };

extern atomic_uint fake_unmaps, fake_strict_calls;
atomic_uint fake_unmaps, fake_strict_calls;

extern atomic_bool fake_is_lost;
atomic_bool fake_is_lost;

static _Thread_local int capture_mode; /* 0: global, as each thread begins */

int fake_capture_mode(void);
int fake_capture_mode(void)
{
    return capture_mode;
}

#define FAKE(name, ...)                                                                            \
    ts_cu_result name(__VA_ARGS__);                                                                \
    ts_cu_result name(__VA_ARGS__)
#define NOT_HERE(name)                                                                             \
    FAKE(name, void)                                                                               \
    {                                                                                              \
        return FAILED;                                                                             \
    }

static void note_unsafe(void)
{
    atomic_fetch_add(&fake_strict_calls, capture_mode != TS_CU_CAPTURE_RELAXED);
}

/* ---- the stream ---- */

enum { QUEUE = 4096 }; /* more than any test queues at a time */

typedef struct queued {
    void (*call)(void *arg); /* NULL: `value` is written to the word, or waited for there */
    void *arg;
    uint32_t *word, value;
    bool writes;
} queued;

static queued queue[QUEUE];
static unsigned long put, done;
static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t queue_changed = PTHREAD_COND_INITIALIZER;

static void carry_out(const queued *q)
{
    if (q->call != NULL)
        q->call(q->arg);
    else if (q->writes)
        __atomic_store_n(q->word, q->value, __ATOMIC_RELEASE);
    else
        while ((int32_t)(__atomic_load_n(q->word, __ATOMIC_ACQUIRE) - q->value) < 0)
            (void)sched_yield();
}

static void *stream_main(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&queue_lock);
    for (;;) {
        while (done == put)
            pthread_cond_wait(&queue_changed, &queue_lock);
        const queued next = queue[done % QUEUE];
        pthread_mutex_unlock(&queue_lock);
        carry_out(&next);
        pthread_mutex_lock(&queue_lock);
        done++;
        pthread_cond_broadcast(&queue_changed);
    }
    return NULL;
}

static void queue_put(queued q)
{
    static pthread_t thread;
    pthread_mutex_lock(&queue_lock);
    if ((put == 0 && pthread_create(&thread, NULL, stream_main, NULL) != 0) || put - done == QUEUE)
        abort();
    queue[put++ % QUEUE] = q;
    pthread_cond_broadcast(&queue_changed);
    pthread_mutex_unlock(&queue_lock);
}

void fake_stream_call(void (*call)(void *arg), void *arg);
void fake_stream_call(void (*call)(void *arg), void *arg)
{
    queue_put((queued){.call = call, .arg = arg});
}

void fake_stream_await(void);
void fake_stream_await(void)
{
    pthread_mutex_lock(&queue_lock);
    while (done != put)
        pthread_cond_wait(&queue_changed, &queue_lock);
    pthread_mutex_unlock(&queue_lock);
}

/* ---- the driver ---- */

FAKE(cuInit, unsigned flags)
{
    return (int)flags;
}
FAKE(cuGetErrorName, ts_cu_result error, const char **name)
{
    (void)error;
    *name = "a fake's error";
    return 0;
}
FAKE(cuDeviceGetCount, int *count)
{
    *count = 1;
    return 0;
}
FAKE(cuDeviceGet, ts_cu_device *device, int ordinal)
{
    *device = ordinal;
    return 0;
}
FAKE(cuDeviceGetUuid_v2, ts_cu_uuid *uuid, ts_cu_device device)
{
    (void)device;
    memset(uuid, 0, sizeof *uuid);
    return 0;
}
FAKE(cuDevicePrimaryCtxRetain, void **context, ts_cu_device device)
{
    (void)device;
    *context = &fake_unmaps;
    return 0;
}
FAKE(cuDevicePrimaryCtxRelease_v2, ts_cu_device device)
{
    (void)device;
    return 0;
}
FAKE(cuCtxPushCurrent_v2, void *context)
{
    return context == &fake_unmaps ? 0 : FAILED;
}
FAKE(cuCtxPopCurrent_v2, void **context)
{
    *context = &fake_unmaps;
    return 0;
}
FAKE(cuCtxSynchronize, void)
{
    note_unsafe();
    fake_stream_await();
    return 0;
}
FAKE(cuMemAddressReserve, ts_cu_pointer *at, size_t bytes, size_t align, ts_cu_pointer wanted,
     unsigned long long flags)
{
    note_unsafe();
    (void)align;
    (void)wanted;
    (void)flags;
    void *base = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *at = (ts_cu_pointer)base;
    return base == MAP_FAILED ? FAILED : 0;
}
FAKE(cuMemAddressFree, ts_cu_pointer at, size_t bytes)
{
    note_unsafe();
    return munmap((void *)at, bytes);
}
FAKE(cuMemImportFromShareableHandle, ts_cu_memory *memory, void *fd, int kind)
{
    note_unsafe();
    (void)kind;
    *memory = (ts_cu_memory)dup((int)(intptr_t)fd);
    return 0;
}
FAKE(cuMemRelease, ts_cu_memory memory)
{
    note_unsafe();
    return close((int)memory);
}
FAKE(cuMemMap, ts_cu_pointer at, size_t bytes, size_t offset, ts_cu_memory memory,
     unsigned long long flags)
{
    note_unsafe();
    (void)flags;
    return mmap((void *)at, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, (int)memory, (off_t)offset) ==
                   MAP_FAILED
               ? FAILED
               : 0;
}
FAKE(cuMemUnmap, ts_cu_pointer at, size_t bytes)
{
    note_unsafe();
    atomic_fetch_add(&fake_unmaps, 1);
    return mmap((void *)at, bytes, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED
               ? FAILED
               : 0;
}
FAKE(cuMemSetAccess, ts_cu_pointer at, size_t bytes, const ts_cu_access *access, size_t count)
{
    note_unsafe();
    (void)count;
    return mprotect((void *)at, bytes,
                    access->flags == TS_CU_ACCESS_READ ? PROT_READ : PROT_READ | PROT_WRITE);
}
FAKE(cuThreadExchangeStreamCaptureMode, int *mode)
{
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}
NOT_HERE(cuIpcOpenMemHandle_v2)
NOT_HERE(cuIpcCloseMemHandle)

static struct {
    ts_cu_pointer base;
    size_t bytes;
    int fd;
} device; /* the memory of fake_device_new */

void *fake_device_new(size_t bytes);
void *fake_device_new(size_t bytes)
{
    device.fd = memfd_create("fake device memory", MFD_CLOEXEC);
    if (device.fd < 0 || ftruncate(device.fd, (off_t)bytes) != 0)
        abort();
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, device.fd, 0);
    if (base == MAP_FAILED)
        abort();
    device.base = (ts_cu_pointer)base;
    device.bytes = bytes;
    return base;
}

FAKE(cuMemGetAddressRange_v2, ts_cu_pointer *base, size_t *bytes, ts_cu_pointer at)
{
    note_unsafe();
    *base = device.base;
    *bytes = device.bytes;
    return at >= device.base && at < device.base + device.bytes ? 0 : FAILED;
}
FAKE(cuIpcGetMemHandle, ts_cu_ipc_handle *handle, ts_cu_pointer base)
{
    note_unsafe();
    memset(handle, 0, sizeof *handle);
    (void)snprintf((char *)handle, sizeof *handle, "/proc/%d/fd/%d", (int)getpid(), device.fd);
    return base == device.base ? 0 : FAILED;
}
FAKE(cuMemGetInfo_v2, size_t *available, size_t *all)
{
    note_unsafe();
    *available = *all = (size_t)1 << 30;
    return atomic_load(&fake_is_lost) ? FAILED : 0;
}
FAKE(cuMemHostRegister_v2, void *host, size_t bytes, unsigned flags)
{
    note_unsafe();
    (void)bytes;
    (void)flags;
    return host == NULL;
}
FAKE(cuMemHostUnregister, void *host)
{
    note_unsafe();
    return cuCtxSynchronize() + (host == NULL); /* it waits for the device */
}
FAKE(cuMemHostGetDevicePointer_v2, ts_cu_pointer *there, void *host, unsigned flags)
{
    note_unsafe();
    (void)flags;
    *there = (ts_cu_pointer)host;
    return 0;
}
FAKE(cuStreamBatchMemOp_v2, void *stream, unsigned count, ts_cu_stream_op *ops, unsigned flags)
{
    note_unsafe();
    (void)stream;
    (void)flags;
    for (unsigned i = 0; i < count; i++)
        queue_put((queued){.word = (uint32_t *)ops[i].on.word,
                           .value = (uint32_t)ops[i].on.value,
                           .writes = ops[i].on.operation == TS_CU_OP_WRITE});
    return 0;
}
NOT_HERE(cuStreamIsCapturing)
NOT_HERE(cuEventCreate)
NOT_HERE(cuEventDestroy_v2)
NOT_HERE(cuEventRecord)
NOT_HERE(cuEventSynchronize)
NOT_HERE(cuEventElapsedTime)
