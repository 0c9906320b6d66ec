/*
 * A CUDA device as the daemon uses it: memory that other processes can map, and launches. This
 * header is plain C and needs no CUDA; without CUDA at build time gpu_none.c stands in and every
 * open says so.
 *
 * A *launch* is what is queued at once on one of a fixed number of streams, which have staging
 * memory of their own: take one, give it work in order (waits, one attend or one set of copies,
 * signals), finish it; it is free again when all of it is done. A thread for each launch sleeps
 * until then; or, for launches that are many and short, one thread looks for the ends of all. Only
 * functions that say so wait for the device. (CUDA's own host functions won't do: those of
 * different streams are called one after another, and a stream may be waiting for a worker.)
 *
 * What gives back cudaMalloc'ed or pinned memory waits until every stream is done and lets nobody
 * launch meanwhile, and a stream may be waiting for a worker. So it is left to a thread of the
 * ts_gpu's own, which does such deferred frees when no launch waits. So waits must be short:
 * see ts_gpu_may_wait.
 *
 * Threads: any, except that one launch is used by one thread at a time.
 */
#ifndef TS_GPU_H
#define TS_GPU_H

#include "attention_call.h"
#include "memory.h"

#include <string.h>

#define TS_GPU_UUID_BYTES 16
#define TS_GPU_WHY_BYTES 128
#define TS_IPC_HANDLE_BYTES 64

/* Which attention kernel; kernels/README.md tells what each one is. */
typedef enum ts_kernel {
    TS_KERNEL_AUTO = 0, /* the best for each sequence's shape */
    TS_KERNEL_V1,
    TS_KERNEL_V2,
    TS_KERNEL_V3,
    TS_KERNEL_V4,
    TS_KERNEL_V5,
    TS_KERNEL_TILE,
    TS_KERNEL_MMA,
    TS_KERNEL_WGMMA,
    TS_KERNEL_COUNT
} ts_kernel;

/* "auto", "v1", ...; NULL past the last. */
const char *ts_kernel_name(ts_kernel kernel);

/* TS_KERNEL_COUNT if no kernel has this name. */
ts_kernel ts_kernel_find(const char *name);

/* TS_OK, or TS_EINVAL with a sentence: what the kernel can't do about this geometry, or on a device
 * without warp-group products (ts_gpu_info). */
ts_status ts_kernel_check(ts_kernel kernel, const ts_geometry *g, bool warp_groups, char *why,
                          size_t why_bytes);

typedef struct ts_gpu ts_gpu;

typedef struct ts_gpu_info {
    char name[96];
    unsigned char uuid[TS_GPU_UUID_BYTES]; /* tells the device to other processes */
    uint32_t ordinal;
    uint64_t total_bytes;
    bool vmm;            /* can export VMM memory as file descriptors */
    size_t granularity;  /* of VMM memory */
    size_t shared_bytes; /* that a block of threads can have of shared memory, at most */
    size_t l2_bytes;     /* of the second-level cache */
    uint32_t processors; /* streaming multiprocessors */
    bool warp_groups;    /* has Hopper's warp-group products, and this was built for them */
    bool mps;            /* this process is a client of CUDA's multi-process service there */
} ts_gpu_info;

/* Devices there are. 0: none, with the reason in `why`. */
uint32_t ts_gpu_count(char *why, size_t why_bytes);

/* Opens device `ordinal` and its launches. TS_EDEVICE, TS_ENOMEM with a sentence. */
ts_status ts_gpu_open(uint32_t ordinal, ts_gpu **out, char *why, size_t why_bytes);

/* Opens it for a process that launches on streams of its own (ts_gpu_launch_on): no other launches
 * are there to be taken. */
ts_status ts_gpu_open_for_streams(uint32_t ordinal, ts_gpu **out, char *why, size_t why_bytes);

/*
 * Loads every kernel that caches of this geometry may need, on a device that isn't for streams.
 * Else each is loaded at its first launch, which waits until no stream waits for anything, and lets
 * nobody launch meanwhile. TS_EBUSY: a launch that waits for a worker hasn't ended within a fifth
 * of a second. TS_EDEVICE.
 */
ts_status ts_gpu_load(ts_gpu *gpu, const ts_geometry *geometry, char *why, size_t why_bytes);

/* Waits for what was launched, then for deferred frees. */
void ts_gpu_close(ts_gpu *gpu);

const ts_gpu_info *ts_gpu_get_info(const ts_gpu *gpu);
ts_status ts_gpu_free_bytes(ts_gpu *gpu, uint64_t *bytes, char *why, size_t why_bytes);

/* TS_OK, or TS_EDEVICE with the CUDA error's name once the device has failed: it is lost then. */
ts_status ts_gpu_health(ts_gpu *gpu, char *why, size_t why_bytes);

/* ---- memory ---- */

/*
 * Memory providers (memory.h). cuda-vmm: physical slabs mapped into one reserved range, each with a
 * file descriptor; slab_bytes is a multiple of the granularity unless there is one slab. cuda-ipc:
 * one cudaMalloc for the one slab the pool has, taken now, with a 64-byte handle; it can't be
 * renewed for another tenant, since the first may still map it.
 */
ts_status ts_memory_cuda_vmm_new(ts_gpu *gpu, uint32_t num_slabs, size_t slab_bytes,
                                 ts_memory **out, char *why, size_t why_bytes);
ts_status ts_memory_cuda_ipc_new(ts_gpu *gpu, size_t bytes, ts_memory **out, char *why,
                                 size_t why_bytes);

/* Device memory shared with one other process. */
typedef struct ts_gpu_shared {
    ts_gpu *gpu;
    unsigned char *base; /* here */
    size_t bytes;
    int fd;                           /* of VMM memory; -1: none */
    uint8_t ipc[TS_IPC_HANDLE_BYTES]; /* of cudaMalloc memory made here */
    uint64_t *held;                   /* see ts_gpu_shared_new */
    void *allocation;                 /* private */
    int kind;                         /* private */
} ts_gpu_shared;

/* Zeroed memory for another process to map, through a descriptor (vmm) or an IPC handle. Its bytes
 * are added to *held (atomic), and taken off again when the device has them back. */
ts_status ts_gpu_shared_new(ts_gpu *gpu, bool vmm, size_t bytes, uint64_t *held, ts_gpu_shared *out,
                            char *why, size_t why_bytes);

/* Maps memory that ts_gpu_shared_new of an earlier process made (vmm), by its descriptor, which
 * becomes the memory's or is closed. `bytes` are those that were asked for then. */
ts_status ts_gpu_shared_adopt(ts_gpu *gpu, int fd, size_t bytes, uint64_t *held, ts_gpu_shared *out,
                              char *why, size_t why_bytes);

/* Maps `bytes` from `offset` of another process's cudaMalloc memory. TS_EINVAL: not a handle that
 * this device can map, or the range lies outside of the allocation. */
ts_status ts_gpu_shared_import(ts_gpu *gpu, const uint8_t handle[TS_IPC_HANDLE_BYTES],
                               uint64_t offset, size_t bytes, ts_gpu_shared *out, char *why,
                               size_t why_bytes);

/* Gives the memory back, some time later. Nothing that was launched may use it any more. */
void ts_gpu_shared_free(ts_gpu_shared *shared);

/* Copies device memory to the host, and waits for that. TS_EDEVICE. Any thread. */
ts_status ts_gpu_read(ts_gpu *gpu, const void *device, size_t bytes, void *host, char *why,
                      size_t why_bytes);

/* Lets the device read and write host memory; *device is its address there. */
ts_status ts_gpu_pin(ts_gpu *gpu, void *host, size_t bytes, void **device, char *why,
                     size_t why_bytes);

/* Undoes it some time later, then unmaps the host memory with munmap. */
void ts_gpu_unpin_unmap(ts_gpu *gpu, void *host, size_t bytes);

/* ---- plans ---- */

/*
 * What attention over a batch of sequences needs beside its data, the same for every layer: block
 * tables and how the work is split, on the device. How a sequence's work is split depends on its
 * own lengths alone, so its results have the same bits in any batch.
 */
typedef struct ts_gpu_plan ts_gpu_plan;

/* How many sessions' runs are likely to be launched together from now on. Where they are many,
 * plans share more of what a session's sequences have in common, with the same bits. Any thread. */
void ts_gpu_expect_company(ts_gpu *gpu, uint32_t sessions);

/* Reads the sequences' blocks, kv_tokens and q_tokens; the rest comes with each run. `heads`: query
 * heads. TS_EINVAL: the kernel can't do this geometry, or not on this device; TS_ENOMEM,
 * TS_EDEVICE. */
ts_status ts_gpu_plan_new(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                          ts_dtype io_dtype, ts_kernel kernel, const ts_attention_seq *seqs,
                          uint32_t num_seqs, ts_gpu_plan **out, char *why, size_t why_bytes);

/*
 * The same from *plan: NULL, or the plan of an earlier step that no launch uses any more. Where the
 * sequences are the old plan's with some tokens more, and are cut as they were, only lengths and
 * new blocks are written; else the old plan is freed and one is made. On failure *plan is NULL.
 */
ts_status ts_gpu_plan_renew(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                            ts_dtype io_dtype, ts_kernel kernel, const ts_attention_seq *seqs,
                            uint32_t num_seqs, ts_gpu_plan **plan, char *why, size_t why_bytes);

/*
 * A persistent plan for one batch after another, which may be other sequences each time: launches
 * over it are alike, so that a CUDA graph of them can be launched again. It has scratch memory of
 * its own. For decode only: TS_EINVAL if the sequences get neither v5 nor, with up to 8 query
 * tokens, wgmma.
 */
typedef struct ts_gpu_plan_limits {
    uint32_t seqs;       /* of a batch, at most */
    uint32_t q_tokens;   /* of each sequence */
    uint64_t kv_tokens;  /* of a batch's sequences together, at most */
    unsigned char *base; /* of the cache, in each launch; NULL: not known, and then some copies are
                            slower */
} ts_gpu_plan_limits;

/* It has no sequences yet. Errors: ts_gpu_plan_new's. */
ts_status ts_gpu_plan_new_persistent(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                                     ts_dtype io_dtype, ts_kernel kernel,
                                     const ts_gpu_plan_limits *limits, ts_gpu_plan **out, char *why,
                                     size_t why_bytes);

/* Gives it these sequences, and waits until the device has them. No launch may be using it.
 * TS_EINVAL: they are more than its limits. */
ts_status ts_gpu_plan_set(ts_gpu_plan *plan, const ts_attention_seq *seqs, uint32_t num_seqs,
                          char *why, size_t why_bytes);

/* Takes all sequences from it: launches do nothing until it is set again. */
ts_status ts_gpu_plan_clear(ts_gpu_plan *plan, char *why, size_t why_bytes);

/* No launch may use it any more. */
void ts_gpu_plan_free(ts_gpu_plan *plan);

/* One layer of a planned batch; of a persistent one, the only run of its launch. Rows of q, k, v,
 * out and lse: the sequences' query tokens, one sequence after the other (attention.h). */
typedef struct ts_gpu_run {
    const ts_gpu_plan *plan;
    uint32_t layer;
    const void *q, *k, *v; /* k NULL: the new tokens are in the cache */
    void *out;
    const float *sinks, *alibi; /* [heads]; NULL: none */
    const float *scales;        /* [2][kv_heads], of an fp8 cache; NULL: all are 1 */
    float *lse;                 /* NULL: isn't wanted */
    uint32_t *words[2];         /* get `number`, the first one first, when the launch's runs are
                                   over; NULL: none */
    uint32_t number;
} ts_gpu_run;

/* The run over a plan whose first sequence this is: the others' rows follow its. */
static inline ts_gpu_run ts_gpu_run_over(const ts_gpu_plan *plan, const ts_attention_seq *first)
{
    ts_gpu_run run;
    memset(&run, 0, sizeof run);
    run.plan = plan;
    run.layer = first->layer;
    run.q = first->q;
    run.k = first->k;
    run.v = first->v;
    run.out = first->out;
    run.sinks = first->sinks;
    run.alibi = first->alibi;
    run.scales = first->scales;
    run.lse = first->lse;
    return run;
}

/* ---- launches ---- */

typedef struct ts_gpu_launch ts_gpu_launch;

/*
 * Launches under way at once, at most, and the slots that they are queued in, one behind the other:
 * a stream each. Slots and the device's own two streams are no more than hardware queues: streams
 * that share one wait for each other, and a launch may wait for a worker. Each queue makes a
 * context take longer to come, and a restart with it (tests/results/h200.md).
 */
#define TS_GPU_QUEUES 16u
#define TS_GPU_STREAM_SLOTS (TS_GPU_QUEUES - 2)
#define TS_GPU_LAUNCHES (TS_GPU_STREAM_SLOTS * 2)

/* Where a launch was queued; epoch 0: nowhere. */
typedef struct ts_gpu_position {
    uint32_t slot, epoch;
} ts_gpu_position;

/*
 * NULL: all launches or all slots are in use. With a position, this launch starts after the end of
 * the one that was queued there, by the order of the device's queues alone, and *position becomes
 * its own. position NULL: it starts after nothing.
 */
ts_gpu_launch *ts_gpu_launch_take(ts_gpu *gpu, ts_gpu_position *position);

/* False while frees or loads are due or under way: they are done only while no launch waits. */
bool ts_gpu_may_wait(ts_gpu *gpu);

/* What follows starts when the 32-bit word (pinned host memory or device memory, 4-byte aligned)
 * has reached `value`: (int32_t)(*word - value) >= 0. Who wrote it wrote everything before it. */
ts_status ts_gpu_launch_wait(ts_gpu_launch *launch, const uint32_t *word, uint32_t value);

/* A word, and the value that it gets. */
typedef struct ts_gpu_signal {
    uint32_t *word;
    uint32_t value;
} ts_gpu_signal;

/* Writes the words when everything before is done and visible to other processes. A launch has its
 * signals at its end, and once: by this or by its runs' words. */
ts_status ts_gpu_launch_signal(ts_gpu_launch *launch, const ts_gpu_signal *signals, uint32_t count);

/*
 * Writes every run's new K and V (where given), and attends, as ts_attention_run does. A sequence
 * that is all new may be written while others are attended to: no block that one sequence writes is
 * in another's table, in any of the runs. The plans are alike in geometry, heads, io_dtype and
 * kernel; they and the memory stay as they are until the launch is done. Addresses are the
 * device's. The runs' words are written when all of it is done and visible to other processes:
 * where one kernel of v5's does it all, by that kernel.
 */
ts_status ts_gpu_launch_attend(ts_gpu_launch *launch, unsigned char *base,
                               const ts_attention_variant *variant, const ts_gpu_run *runs,
                               uint32_t num_runs);

/* Copies whole blocks. No dst may be another copy's src or dst. */
ts_status ts_gpu_launch_copies(ts_gpu_launch *launch, unsigned char *base, size_t block_bytes,
                               const ts_block_copy *copies, uint32_t num_copies);

/*
 * `done` is called when all of it is done, or with TS_EDEVICE and the CUDA error's name when the
 * device has failed; the launch is free again just before. It is called by one thread for all
 * launches, which sees an end up to 0.1 ms late, and up to 1 ms where for 20 ms none has ended and
 * none was finished; so it may wait for no launch. NULL: nobody is called. If this fails, nothing
 * was queued behind what was there, and nobody is called.
 */
ts_status ts_gpu_launch_finish(ts_gpu_launch *launch,
                               void (*done)(void *arg, ts_status status, const char *why),
                               void *arg);

/*
 * Of a device opened for streams: its one launch, on the cudaStream_t; NULL is the default stream.
 * It is never finished. Scratch memory is the launch's: what is queued on another stream comes
 * after what was queued before.
 */
ts_gpu_launch *ts_gpu_launch_on(ts_gpu *gpu, void *stream);
ts_gpu_launch *ts_gpu_launch_on_own(ts_gpu *gpu); /* on a stream of the device's own */

/* Waits until the plan is on the device and there is room for its runs: then ts_gpu_launch_attend
 * of one run queues kernels alone, as a stream that is being captured must have it. */
ts_status ts_gpu_launch_prepare(ts_gpu_launch *launch, const ts_gpu_plan *plan);

/* Notes what was queued so far (nothing while the stream is being captured), and waits for what was
 * noted last. */
ts_status ts_gpu_launch_mark(ts_gpu_launch *launch);
ts_status ts_gpu_launch_await_mark(ts_gpu_launch *launch);

/* The launch's cudaStream_t: to time what is queued. */
void *ts_gpu_launch_stream(ts_gpu_launch *launch);

/* Why the last call on this launch failed: a CUDA error's name, or a sentence. */
const char *ts_gpu_launch_why(const ts_gpu_launch *launch);

#endif
