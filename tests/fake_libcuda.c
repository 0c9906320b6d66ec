/*
 * A libcuda.so.1 with one device whose memory is this process's own: what the library needs to map
 * slabs of a GPU pool. A descriptor that is imported is mapped as it is. Functions that no test
 * needs fail.
 *
 * fake_unmaps counts cuMemUnmap's calls, and those of threads whose captures aren't relaxed.
 */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { FAILED = 999 };

extern atomic_uint fake_unmaps, fake_strict_unmaps;
atomic_uint fake_unmaps, fake_strict_unmaps;

static _Thread_local int capture_mode; /* 0: global, as each thread begins */

#define FAKE(name, ...)                                                                            \
    ts_cu_result name(__VA_ARGS__);                                                                \
    ts_cu_result name(__VA_ARGS__)
#define NOT_HERE(name)                                                                             \
    FAKE(name, void)                                                                               \
    {                                                                                              \
        return FAILED;                                                                             \
    }

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
    return 0;
}
FAKE(cuMemAddressReserve, ts_cu_pointer *at, size_t bytes, size_t align, ts_cu_pointer wanted,
     unsigned long long flags)
{
    (void)align;
    (void)wanted;
    (void)flags;
    void *base = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *at = (ts_cu_pointer)base;
    return base == MAP_FAILED ? FAILED : 0;
}
FAKE(cuMemAddressFree, ts_cu_pointer at, size_t bytes)
{
    return munmap((void *)at, bytes);
}
FAKE(cuMemImportFromShareableHandle, ts_cu_memory *memory, void *fd, int kind)
{
    (void)kind;
    *memory = (ts_cu_memory)dup((int)(intptr_t)fd);
    return 0;
}
FAKE(cuMemRelease, ts_cu_memory memory)
{
    return close((int)memory);
}
FAKE(cuMemMap, ts_cu_pointer at, size_t bytes, size_t offset, ts_cu_memory memory,
     unsigned long long flags)
{
    (void)flags;
    return mmap((void *)at, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, (int)memory, (off_t)offset) ==
                   MAP_FAILED
               ? FAILED
               : 0;
}
FAKE(cuMemUnmap, ts_cu_pointer at, size_t bytes)
{
    atomic_fetch_add(&fake_unmaps, 1);
    atomic_fetch_add(&fake_strict_unmaps, capture_mode != TS_CU_CAPTURE_RELAXED);
    return mmap((void *)at, bytes, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED
               ? FAILED
               : 0;
}
FAKE(cuMemSetAccess, ts_cu_pointer at, size_t bytes, const ts_cu_access *access, size_t count)
{
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
NOT_HERE(cuIpcGetMemHandle)
NOT_HERE(cuMemGetAddressRange_v2)
NOT_HERE(cuMemHostRegister_v2)
NOT_HERE(cuMemHostUnregister)
NOT_HERE(cuMemHostGetDevicePointer_v2)
NOT_HERE(cuStreamWriteValue32_v2)
NOT_HERE(cuStreamWaitValue32_v2)
NOT_HERE(cuStreamIsCapturing)
NOT_HERE(cuEventCreate)
NOT_HERE(cuEventDestroy_v2)
NOT_HERE(cuEventRecord)
NOT_HERE(cuEventSynchronize)
NOT_HERE(cuEventElapsedTime)
