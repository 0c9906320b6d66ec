/*
 * Inside kernels/gpu: a device, its launches, and the driver's functions, which are looked up when
 * a device is opened so that a daemon built with CUDA runs where there is no driver.
 */
#ifndef TS_GPU_DEVICE_H
#define TS_GPU_DEVICE_H

#include "gpu.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

typedef struct ts_gpu_driver {
    PFN_cuGetErrorName_v6000 get_error_name;
    PFN_cuMemCreate_v10020 mem_create;
    PFN_cuMemRelease_v10020 mem_release;
    PFN_cuMemAddressReserve_v10020 address_reserve;
    PFN_cuMemAddressFree_v10020 address_free;
    PFN_cuMemMap_v10020 mem_map;
    PFN_cuMemUnmap_v10020 mem_unmap;
    PFN_cuMemSetAccess_v10020 set_access;
    PFN_cuMemExportToShareableHandle_v10020 export_handle;
    PFN_cuMemImportFromShareableHandle_v10020 import_handle;
    PFN_cuMemGetAllocationGranularity_v10020 granularity;
    PFN_cuMemGetAddressRange_v3020 address_range;
    PFN_cuDeviceGetAttribute_v2000 attribute;
    PFN_cuStreamWaitValue32_v11070 wait_value;
    PFN_cuStreamBatchMemOp_v11070 batch_ops;
    PFN_cuTensorMapEncodeTiled_v12000 encode_map;
} ts_gpu_driver;

/* Staging memory that is freed when the device is closed: sizes double, so this is less than what
 * is in use. */
typedef struct ts_gpu_staging {
    struct ts_gpu_staging *next;
    void *host, *device;
} ts_gpu_staging;

/* Memory on both sides for a plan; kept for the next one of its size class. */
typedef struct ts_gpu_buffer {
    struct ts_gpu_buffer *next;
    unsigned char *host, *device;
    uint32_t log;      /* 2^log bytes */
    cudaEvent_t there; /* recorded behind the last upload */
    bool is_there;     /* atomic: what was uploaded is known to be there */
} ts_gpu_buffer;

#define TS_GPU_BUFFER_LOGS 48u

/* A kernel that takes dynamic shared memory; its argument is a gpu_call (common.cuh). wgmma's have
 * one more (prefill/box_map.h). */
typedef struct ts_gpu_kernel {
    const void *function;
    uint32_t threads, bytes; /* of a block */
    uint32_t fold_bytes;     /* more, for pieces of several chunks; 0: it takes none such */
} ts_gpu_kernel;

/* What the device says about a kernel. */
typedef struct ts_gpu_function {
    ts_gpu_kernel kernel;
    size_t shared_bytes; /* that a block takes in all */
    bool allowed;        /* to be launched with that much */
} ts_gpu_function;

/* A stream, and the memory that launches use in turn, one behind the other. */
typedef struct ts_gpu_stream_slot {
    cudaStream_t stream;          /* NULL: launches are on streams of others */
    uint32_t users;               /* under the device's lock: launches that aren't done */
    uint32_t epoch;               /* under the device's lock: how often it was taken when free */
    unsigned char *host, *device; /* staging memory, the same bytes on both sides */
    size_t capacity;
    float *partials; /* on the device: what chunks come to, until they are merged */
    size_t partial_bytes;
    uint32_t *counters; /* all 0 between launches */
    size_t num_counters;
} ts_gpu_stream_slot;

struct ts_gpu_launch {
    ts_gpu *gpu;
    ts_gpu_launch *next_free;
    bool waits; /* under the device's lock: for a worker */
    ts_gpu_stream_slot *slot;
    cudaStream_t stream;
    void (*done)(void *arg, ts_status status, const char *why);
    void *arg;
    char why[TS_GPU_WHY_BYTES];
    /* Of a device opened for streams: behind what was queued (ts_gpu_launch_mark), and what a
     * thread that waits for it is woken by. Recording the former wakes nobody. */
    cudaEvent_t mark, waker;
    bool marked; /* the mark was recorded */
    /* By what its end is seen, and what came of it. */
    uint32_t *end_word, *end_there; /* of a device opened for streams NULL: nothing is written */
    uint32_t end_value;
    bool tells_end; /* the last that was queued writes the value */
    ts_gpu_launch *next_end;
};

/* Launches that were finished, and the thread that looks at their words. */
typedef struct ts_gpu_launch_ends {
    pthread_t thread;
    bool runs;
    void *words;                  /* the launches', pinned */
    pthread_cond_t event;         /* there is one, or one more while `dozes`, or the end */
    ts_gpu_launch *first, **last; /* under the device's lock: the oldest first */
    bool dozes, stop;             /* under the device's lock */
} ts_gpu_launch_ends;

/* A free that may take long: a thread of its own does it. */
typedef struct ts_gpu_deferred_free {
    struct ts_gpu_deferred_free *next;
    void (*run)(ts_gpu *gpu, void *memory, size_t bytes);
    void *memory;
    size_t bytes;
    uint64_t *held; /* counts the bytes until they are free; NULL: nobody does */
} ts_gpu_deferred_free;

/* Sequences with a prefix in common go through common pieces of work (sharing.h) where that spares
 * each processor the reading of K and V of at least TEAM_TOKENS tokens (times KV heads, and the
 * sessions that are expected in a launch), and of at least one in TEAM_PART of all. Less is read as
 * quickly from the second-level cache, common pieces take longer, and their kernel is slower over
 * others. As measured (doc/notebook.md). */
#define TS_GPU_TEAM_TOKENS 2816u
#define TS_GPU_TEAM_PART 32u

#define TS_GPU_FUNCTIONS 192u /* more than there are kernels times their sizes: 119 */

struct ts_gpu {
    ts_gpu_info info;
    ts_gpu_driver driver;
    ts_gpu_launch launches[TS_GPU_LAUNCHES];
    ts_gpu_stream_slot slots[TS_GPU_STREAM_SLOTS];
    cudaStream_t memory_stream; /* for zeroing, and for a worker's runs on no stream of its own */
    cudaStream_t upload_stream; /* for plans */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    ts_gpu_launch *free_launch;                 /* under the lock */
    ts_gpu_launch_ends ends;                    /* those whose ends are seen by words */
    uint32_t waiting;                           /* under the lock: launches that wait for workers */
    ts_gpu_deferred_free *deferred;             /* under the lock; the newest first */
    bool cleaning, stop;                        /* under the lock: no launch may wait; the end */
    uint32_t loads;                             /* under the lock: that are to come, or under way */
    ts_gpu_staging *old;                        /* under the lock: what launches have outgrown */
    ts_gpu_buffer *buffers[TS_GPU_BUFFER_LOGS]; /* under the lock: free ones of 2^i bytes */
    ts_gpu_function functions[TS_GPU_FUNCTIONS]; /* under the lock: those that plans asked about */
    uint32_t num_functions;                      /* under the lock */
    uint32_t team_tokens;                        /* TS_GPU_TEAM_TOKENS; other in tests */
    uint32_t company; /* atomic: sessions whose runs are likely to be launched together; 0: one */
    bool for_streams; /* there is launches[0] alone, on streams of others */
    bool deferred_runs;
    pthread_t deferred_thread;
};

/* Makes the device the calling thread's; TS_EDEVICE with a sentence if it can't be. */
ts_status ts_gpu_enter(ts_gpu *gpu, char *why, size_t why_bytes);

/* The same for a thread of the library's own, once: and none of its calls spoils a CUDA graph that
 * another thread of the process captures. */
void ts_gpu_begin_thread(ts_gpu *gpu);

/* Between these two calls no launch waits for a worker. TS_EBUSY: one does for too long. */
ts_status ts_gpu_load_begin(ts_gpu *gpu, char *why, size_t why_bytes);
void ts_gpu_load_end(ts_gpu *gpu);

/* Writes "WHAT of N bytes failed: CUDA_ERROR_..." and returns the status that fits. */
ts_status ts_gpu_fail_driver(const ts_gpu *gpu, CUresult error, const char *what, size_t bytes,
                             char *why, size_t why_bytes);
ts_status ts_gpu_fail(cudaError_t error, const char *what, size_t bytes, char *why,
                      size_t why_bytes);

/* How much shared memory the kernel's blocks take in all; lets it be launched if the device has
 * that much. TS_EDEVICE. */
ts_status ts_gpu_function_find(ts_gpu *gpu, const ts_gpu_kernel *kernel, size_t *shared_bytes,
                               char *why, size_t why_bytes);

/* Leaves something to the thread of deferred frees, which takes its bytes off *held (atomic) when
 * it is done; held NULL: off nothing. */
void ts_gpu_later(ts_gpu *gpu, void (*run)(ts_gpu *gpu, void *memory, size_t bytes), void *memory,
                  size_t bytes, uint64_t *held);

/* Leaves device memory of cudaMalloc to that thread; NULL: nothing. */
void ts_gpu_free_later(ts_gpu *gpu, void *device);

/* Staging memory that each slot has from the start: enough for 8192 copies of blocks. */
#define TS_GPU_STAGING_BYTES ((size_t)1 << 16)

/* Room for `bytes` of the slot's staging memory, which nobody before may still use: the launch was
 * taken without a position. A launch takes one attend, or one set of copies. */
ts_status ts_gpu_launch_reserve(ts_gpu_launch *launch, size_t bytes);

/* Room for `bytes` of partial results and for `counters` counters, which are 0. */
ts_status ts_gpu_launch_scratch(ts_gpu_launch *launch, size_t bytes, size_t counters);

/* A buffer of at least `bytes`; fill its host side and upload it once. */
ts_status ts_gpu_buffer_take(ts_gpu *gpu, size_t bytes, ts_gpu_buffer **out, char *why,
                             size_t why_bytes);
ts_status ts_gpu_buffer_upload(ts_gpu *gpu, ts_gpu_buffer *buffer, size_t bytes, char *why,
                               size_t why_bytes);
void ts_gpu_buffer_give_back(ts_gpu *gpu, ts_gpu_buffer *buffer); /* NULL: nothing */

/* Frees all buffers, and what launches have outgrown. */
void ts_gpu_buffers_fini(ts_gpu *gpu);

/* Makes what the slot needs, by a launch in it (those on streams of others copy no blocks), and
 * what the launch needs. The fini functions take also what was made in part. */
ts_status ts_gpu_slot_init(ts_gpu *gpu, ts_gpu_stream_slot *slot, char *why, size_t why_bytes);
void ts_gpu_slot_fini(ts_gpu_stream_slot *slot);
ts_status ts_gpu_launch_init(ts_gpu *gpu, ts_gpu_launch *launch, char *why, size_t why_bytes);
void ts_gpu_launch_fini(ts_gpu_launch *launch);

/* The launch is free, its slot is another's. Under the device's lock. */
void ts_gpu_launch_give_back(ts_gpu_launch *launch);

/* How many launches that wait for workers are over, and not free yet. Under the device's lock. */
uint32_t ts_gpu_launches_over(const ts_gpu *gpu);

/* What ts_gpu_launch_finish needs; the thread ends when the last launch has. */
ts_status ts_gpu_launch_ends_init(ts_gpu *gpu, char *why, size_t why_bytes);
void ts_gpu_launch_ends_fini(ts_gpu *gpu);

/* Loads the kernel of ts_gpu_launch_words. */
ts_status ts_gpu_load_words(ts_gpu *gpu, char *why, size_t why_bytes);

/* Queues a kernel that writes the words, and `end` when they are there (no word: nothing more). */
ts_status ts_gpu_launch_words(ts_gpu_launch *launch, const ts_gpu_signal *signals, uint32_t count,
                              const ts_gpu_signal *end);

/* Notes the error's name for ts_gpu_launch_why. */
ts_status ts_gpu_launch_fail(ts_gpu_launch *launch, cudaError_t error);

#endif
