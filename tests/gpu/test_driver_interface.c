/*
 * libtinyserve declares the part of CUDA's driver interface that it uses itself
 * (client/memory/cuda_driver.h); here the declarations are held against cuda.h. Compiling is the
 * test: it needs the toolkit, no GPU.
 */
#include "cuda_driver.h"

#include <cuda.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

_Static_assert(sizeof(CUresult) == sizeof(ts_cu_result), "CUresult");
_Static_assert(sizeof(CUdevice) == sizeof(ts_cu_device), "CUdevice");
_Static_assert(sizeof(CUdeviceptr) == sizeof(ts_cu_pointer), "CUdeviceptr");
_Static_assert(sizeof(CUmemGenericAllocationHandle) == sizeof(ts_cu_memory), "CUmem...Handle");
_Static_assert(sizeof(CUuuid) == sizeof(ts_cu_uuid), "CUuuid");
_Static_assert(sizeof(CUipcMemHandle) == sizeof(ts_cu_ipc_handle), "CUipcMemHandle");
_Static_assert(sizeof(CUmemAccessDesc) == sizeof(ts_cu_access), "CUmemAccessDesc");
_Static_assert(offsetof(CUmemAccessDesc, location.id) == offsetof(ts_cu_access, location.id), "");
_Static_assert(offsetof(CUmemAccessDesc, flags) == offsetof(ts_cu_access, flags), "flags");
_Static_assert(sizeof(CUcontext) == sizeof(void *) && sizeof(CUstream) == sizeof(void *), "");
_Static_assert(sizeof(cuuint32_t) == sizeof(uint32_t), "cuuint32_t");

_Static_assert((int)CU_MEM_LOCATION_TYPE_DEVICE == TS_CU_LOCATION_DEVICE, "");
_Static_assert((int)CU_MEM_ACCESS_FLAGS_PROT_READ == TS_CU_ACCESS_READ, "");
_Static_assert((int)CU_MEM_ACCESS_FLAGS_PROT_READWRITE == TS_CU_ACCESS_READ_WRITE, "");
_Static_assert((int)CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR == TS_CU_HANDLE_POSIX_FD, "");
_Static_assert((int)CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS == TS_CU_IPC_LAZY_PEER_ACCESS, "");
_Static_assert(CU_MEMHOSTREGISTER_PORTABLE == TS_CU_HOST_PORTABLE, "");
_Static_assert(CU_MEMHOSTREGISTER_DEVICEMAP == TS_CU_HOST_DEVICE_MAP, "");
_Static_assert(sizeof(CUstreamBatchMemOpParams) == sizeof(ts_cu_stream_op), "");
_Static_assert(offsetof(CUstreamBatchMemOpParams, waitValue.address) ==
                   offsetof(ts_cu_stream_op, on.word),
               "");
_Static_assert(offsetof(CUstreamBatchMemOpParams, writeValue.value) ==
                   offsetof(ts_cu_stream_op, on.value),
               "");
_Static_assert(offsetof(CUstreamBatchMemOpParams, writeValue.flags) ==
                   offsetof(ts_cu_stream_op, on.flags),
               "");
_Static_assert((int)CU_STREAM_MEM_OP_WAIT_VALUE_32 == TS_CU_OP_WAIT, "");
_Static_assert((int)CU_STREAM_MEM_OP_WRITE_VALUE_32 == TS_CU_OP_WRITE, "");
_Static_assert((int)CU_STREAM_WAIT_VALUE_GEQ == TS_CU_WAIT_GEQ, "");
_Static_assert((int)CU_STREAM_WRITE_VALUE_DEFAULT == TS_CU_WRITE_DEFAULT, "");
_Static_assert((int)CU_EVENT_DEFAULT == TS_CU_EVENT_DEFAULT, "");
_Static_assert(sizeof(CUstreamCaptureStatus) == sizeof(int), "CUstreamCaptureStatus");
_Static_assert((int)CU_STREAM_CAPTURE_STATUS_NONE == 0, "");
_Static_assert(sizeof(CUstreamCaptureMode) == sizeof(int), "CUstreamCaptureMode");
_Static_assert((int)CU_STREAM_CAPTURE_MODE_RELAXED == TS_CU_CAPTURE_RELAXED, "");
_Static_assert(sizeof(CUevent) == sizeof(void *), "CUevent");

/* cuda.h's macros give each function the name of its current version: those that are asked for must
 * be the ones whose arguments are declared here. */
#define CURRENT(function) CURRENT_(function)
#define CURRENT_(function) #function

int main(void)
{
    static const struct {
        const char *current, *asked;
    } names[] = {
        {CURRENT(cuDeviceGetUuid), "cuDeviceGetUuid_v2"},
        {CURRENT(cuDevicePrimaryCtxRetain), "cuDevicePrimaryCtxRetain"},
        {CURRENT(cuDevicePrimaryCtxRelease), "cuDevicePrimaryCtxRelease_v2"},
        {CURRENT(cuCtxPushCurrent), "cuCtxPushCurrent_v2"},
        {CURRENT(cuCtxPopCurrent), "cuCtxPopCurrent_v2"},
        {CURRENT(cuMemAddressReserve), "cuMemAddressReserve"},
        {CURRENT(cuMemAddressFree), "cuMemAddressFree"},
        {CURRENT(cuMemImportFromShareableHandle), "cuMemImportFromShareableHandle"},
        {CURRENT(cuMemRelease), "cuMemRelease"},
        {CURRENT(cuMemMap), "cuMemMap"},
        {CURRENT(cuMemUnmap), "cuMemUnmap"},
        {CURRENT(cuMemSetAccess), "cuMemSetAccess"},
        {CURRENT(cuIpcOpenMemHandle), "cuIpcOpenMemHandle_v2"},
        {CURRENT(cuIpcCloseMemHandle), "cuIpcCloseMemHandle"},
        {CURRENT(cuIpcGetMemHandle), "cuIpcGetMemHandle"},
        {CURRENT(cuMemGetAddressRange), "cuMemGetAddressRange_v2"},
        {CURRENT(cuMemGetInfo), "cuMemGetInfo_v2"},
        {CURRENT(cuMemHostRegister), "cuMemHostRegister_v2"},
        {CURRENT(cuMemHostUnregister), "cuMemHostUnregister"},
        {CURRENT(cuMemHostGetDevicePointer), "cuMemHostGetDevicePointer_v2"},
        {CURRENT(cuStreamBatchMemOp), "cuStreamBatchMemOp_v2"},
        {CURRENT(cuStreamIsCapturing), "cuStreamIsCapturing"},
        {CURRENT(cuThreadExchangeStreamCaptureMode), "cuThreadExchangeStreamCaptureMode"},
        {CURRENT(cuEventCreate), "cuEventCreate"},
        {CURRENT(cuEventDestroy), "cuEventDestroy_v2"},
        {CURRENT(cuEventRecord), "cuEventRecord"},
        {CURRENT(cuEventSynchronize), "cuEventSynchronize"},
    };
    int wrong = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i].current, names[i].asked) != 0) {
            printf("%s is asked for; cuda.h has %s\n", names[i].asked, names[i].current);
            wrong++;
        }
    if (wrong == 0)
        puts("the driver's interface is as cuda.h has it");
    return wrong;
}
