/*
 * The part of the CUDA driver's binary interface that a worker needs, as cuda.h has it since CUDA
 * 11.7 (tests/gpu/test_driver_interface.c holds the two against each other). Declared here so that
 * libtinyserve is the same whether or not CUDA is there when it is built.
 */
#ifndef TS_CUDA_DRIVER_H
#define TS_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

typedef int ts_cu_result; /* 0: success */
typedef int ts_cu_device;
typedef uint64_t ts_cu_pointer;
typedef uint64_t ts_cu_memory;
typedef struct ts_cu_uuid {
    char bytes[16];
} ts_cu_uuid;
typedef struct ts_cu_ipc_handle {
    char reserved[64];
} ts_cu_ipc_handle;
typedef struct ts_cu_access {
    struct {
        int type;
        int id;
    } location;
    int flags;
} ts_cu_access;

typedef union ts_cu_stream_op {
    struct {
        int operation; /* TS_CU_OP_... */
        ts_cu_pointer word;
        uint64_t value; /* 32 bits of it */
        unsigned flags;
    } on;
    uint64_t room[6];
} ts_cu_stream_op;

enum {
    TS_CU_LOCATION_DEVICE = 1,
    TS_CU_ACCESS_READ = 1,
    TS_CU_ACCESS_READ_WRITE = 3,
    TS_CU_HANDLE_POSIX_FD = 1,
    TS_CU_IPC_LAZY_PEER_ACCESS = 1,
    TS_CU_HOST_PORTABLE = 1,
    TS_CU_HOST_DEVICE_MAP = 2,
    TS_CU_OP_WAIT = 1,
    TS_CU_OP_WRITE = 2,
    TS_CU_WAIT_GEQ = 0,
    TS_CU_WRITE_DEFAULT = 0,
    TS_CU_EVENT_DEFAULT = 0,
    TS_CU_CAPTURE_RELAXED = 2,
};

/* name in the driver, member, arguments */
#define TS_CU_FUNCTIONS(F)                                                                         \
    F("cuInit", init, (unsigned))                                                                  \
    F("cuGetErrorName", error_name, (ts_cu_result, const char **))                                 \
    F("cuDeviceGetCount", device_count, (int *))                                                   \
    F("cuDeviceGet", device_get, (ts_cu_device *, int))                                            \
    F("cuDeviceGetUuid_v2", device_uuid, (ts_cu_uuid *, ts_cu_device))                             \
    F("cuDevicePrimaryCtxRetain", context_retain, (void **, ts_cu_device))                         \
    F("cuDevicePrimaryCtxRelease_v2", context_release, (ts_cu_device))                             \
    F("cuCtxPushCurrent_v2", context_push, (void *))                                               \
    F("cuCtxPopCurrent_v2", context_pop, (void **))                                                \
    F("cuCtxSynchronize", context_await, (void))                                                   \
    F("cuMemAddressReserve", address_reserve,                                                      \
      (ts_cu_pointer *, size_t, size_t, ts_cu_pointer, unsigned long long))                        \
    F("cuMemAddressFree", address_free, (ts_cu_pointer, size_t))                                   \
    F("cuMemImportFromShareableHandle", import, (ts_cu_memory *, void *, int))                     \
    F("cuMemRelease", release, (ts_cu_memory))                                                     \
    F("cuMemMap", map, (ts_cu_pointer, size_t, size_t, ts_cu_memory, unsigned long long))          \
    F("cuMemUnmap", unmap, (ts_cu_pointer, size_t))                                                \
    F("cuMemSetAccess", set_access, (ts_cu_pointer, size_t, const ts_cu_access *, size_t))         \
    F("cuIpcOpenMemHandle_v2", ipc_open, (ts_cu_pointer *, ts_cu_ipc_handle, unsigned))            \
    F("cuIpcCloseMemHandle", ipc_close, (ts_cu_pointer))                                           \
    F("cuIpcGetMemHandle", ipc_get, (ts_cu_ipc_handle *, ts_cu_pointer))                           \
    F("cuMemGetAddressRange_v2", address_range, (ts_cu_pointer *, size_t *, ts_cu_pointer))        \
    F("cuMemGetInfo_v2", memory_info, (size_t *, size_t *))                                        \
    F("cuMemHostRegister_v2", host_register, (void *, size_t, unsigned))                           \
    F("cuMemHostUnregister", host_unregister, (void *))                                            \
    F("cuMemHostGetDevicePointer_v2", host_pointer, (ts_cu_pointer *, void *, unsigned))           \
    F("cuStreamBatchMemOp_v2", stream_ops, (void *, unsigned, ts_cu_stream_op *, unsigned))        \
    F("cuStreamIsCapturing", stream_capture, (void *, int *))                                      \
    F("cuThreadExchangeStreamCaptureMode", capture_mode, (int *))                                  \
    F("cuEventCreate", event_new, (void **, unsigned))                                             \
    F("cuEventDestroy_v2", event_free, (void *))                                                   \
    F("cuEventRecord", event_record, (void *, void *))                                             \
    F("cuEventSynchronize", event_await, (void *))                                                 \
    F("cuEventElapsedTime", event_elapsed, (float *, void *, void *))

typedef struct ts_cu_functions {
#define TS_CU_MEMBER(name, member, arguments) ts_cu_result(*member) arguments;
    TS_CU_FUNCTIONS(TS_CU_MEMBER)
#undef TS_CU_MEMBER
} ts_cu_functions;

#endif
