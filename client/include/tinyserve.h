/*
 * libtinyserve: a worker's side of TinyServe, the node-local KV-cache service.
 *
 * A worker connects (its *session*), opens a *pool* by name, and keeps *sequences* in it. Tokens
 * are added in *steps*: begin one for a batch of sequences, run it once per layer (the daemon
 * writes the new K and V into the paged cache and attends), commit it. Keys, values, queries and
 * outputs lie in memory shared with the daemon; they never go through a socket.
 *
 * Errors: functions return ts_status, TS_OK (0) or what went wrong; ts_error() has the sentence. A
 * call that fails has changed nothing, except TS_ETIMEOUT and TS_ECONN, after which that is
 * unknown; a step whose begin came to TS_ETIMEOUT is dropped by a later call, once the daemon has
 * answered. After TS_ECONN the session is over: disconnect and connect again. Sequences that were
 * kept by name are still there if the daemon is.
 *
 * Threads: a ts_client and all that was opened from it is used by one thread at a time. Open one
 * per thread; each is a session of its own. A call while another thread is inside one is refused
 * (TS_EBUSY) and changes nothing; calls that free (ts_disconnect, ts_pool_close, ts_step_abort,
 * ts_frame_free) wait until that thread's call has returned. What was freed must not be used.
 *
 * fork(): connect after it, in the child, and not in the parent before: NNG can't be used on both
 * sides. A call that would break this is refused (TS_EPERM, TS_ECONN). fork() and exec is fine.
 *
 * Options: structs whose first member is their size, so that they can grow. Initialise one with its
 * TS_..._INIT, or with .size = sizeof it and the members that you need: 0 is each one's default.
 * The library takes a struct of an earlier header's size, and refuses (TS_EINVAL) a size of 0 and a
 * later header's struct that asks for what this library doesn't know.
 *
 * Version: TS_VERSION of the header, ts_version() of the library that was loaded. Before 1.0 those
 * of the same major and minor number fit.
 *
 * Environment: TINYSERVE_URL is the daemon's address where ts_options has none; without either it
 * is ipc:///run/tinyserve/tinyserve.sock.
 */
#ifndef TINYSERVE_H
#define TINYSERVE_H

#include "tinyserve_types.h"
#include "tinyserve_version.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ts_client ts_client;
typedef struct ts_pool ts_pool;
typedef struct ts_step ts_step;
typedef struct ts_frame ts_frame;
typedef struct ts_memory ts_memory;
typedef uint64_t ts_seq; /* a sequence of one pool; never 0; never used again once freed */

/* How steps reach the daemon. Everything else goes as messages. The results are the same. */
typedef enum ts_transport {
    TS_TRANSPORT_AUTO,    /* rings, or messages if there are none to be had */
    TS_TRANSPORT_RING,    /* rings in memory shared with the daemon: microseconds */
    TS_TRANSPORT_MESSAGES /* a message over the socket for each call */
} ts_transport;

#define TS_SPIN_NONE UINT32_MAX

/* Who attends. The results are the same, bit for bit. */
typedef enum ts_exec {
    TS_EXEC_DAEMON, /* the daemon: sessions' attends are joined */
    TS_EXEC_LOCAL,  /* this process, with the same kernels over the mapped pool: the daemon has no
                       part in a layer. For pools that were opened with TS_POOL_WRITABLE; on a GPU,
                       with the exchange in its memory (ts_exchange_device) and libtinyserve-cuda
                       installed */
    TS_EXEC_AUTO    /* where that can be, the session's first step goes both ways, and the quicker
                       is taken from then on (ts_client_exec says which); runs that are captured
                       into a CUDA graph are local. Where it can't be, the daemon */
} ts_exec;

/* The version of the library, as TS_VERSION is the header's: "0.1.0". */
const char *ts_version(void);

/* Bytes of a public struct by its name ("ts_options") as the library has it, for bindings that
 * declare it again; 0: there is no such struct. */
size_t ts_struct_bytes(const char *name);

typedef struct ts_options {
    size_t size;         /* sizeof(ts_options) */
    const char *url;     /* "ipc:///path" or "/path"; NULL: see above */
    const char *program; /* shown to the operator; NULL: the process's name */
    uint32_t timeout_ms; /* of one call; 0: 30000 */
    uint32_t retries;    /* times that a call is sent again after its timeout; it is applied once */
    uint32_t wait_ms; /* how long ts_connect waits for a daemon to appear, or for one that ends or
                         is drained to be replaced; 0: not at all */
    size_t exchange_bytes; /* of shared memory for q, k, v and out to start with; it grows as steps
                              need it, while none is open. 0: what the first step needs */
    ts_transport transport;
    uint32_t spin_us; /* that a call through a ring polls for its answer before it sleeps; 0: 50,
                         TS_SPIN_NONE: it sleeps at once */
    ts_exec exec;
    uint32_t threads; /* of local execution; 0: one for each processor */
} ts_options;

#define TS_OPTIONS_INIT                                                                            \
    {                                                                                              \
        sizeof(ts_options), NULL, NULL, 0, 0, 0, 0, TS_TRANSPORT_AUTO, 0, TS_EXEC_DAEMON, 0        \
    }

/*
 * Connects and opens a session. options may be NULL.
 * *out is set in any case, unless TS_ENOMEM made it NULL: after a failure it serves ts_error and
 * ts_disconnect alone. TS_ECONN: no daemon there. TS_EPROTO: it speaks another version.
 */
TS_WARN_UNUSED ts_status ts_connect(const ts_options *options, ts_client **out);

/* Ends the session: its sequences, except kept ones, are freed, its pools and steps are gone. */
void ts_disconnect(ts_client *client);

/* What was wrong with the last call that failed, for the thread that made it; valid until the next
 * one does. Never NULL. */
const char *ts_error(const ts_client *client);

/* The same failure in numbers, in the units of its sentence (blocks, sequences, sessions, ...). */
typedef struct ts_error_info {
    size_t size; /* sizeof(ts_error_info) */
    ts_status status;
    uint64_t needed; /* what the call would have taken; these are 0 where they do not apply */
    uint64_t free;   /* of it there is to be had */
    uint64_t limit;  /* that would be passed: a quota, or the pool's blocks */
} ts_error_info;

#define TS_ERROR_INFO_INIT                                                                         \
    {                                                                                              \
        sizeof(ts_error_info), TS_OK, 0, 0, 0                                                      \
    }

/* Fills in out->size bytes. TS_EINVAL: that isn't a ts_error_info's. The client must not be NULL.
 */
TS_WARN_UNUSED ts_status ts_error_read(const ts_client *client, ts_error_info *out);

/* What the client's last step went by: TS_TRANSPORT_RING or TS_TRANSPORT_MESSAGES. */
ts_transport ts_client_transport(const ts_client *client);

/* Who attended in the client's last step: TS_EXEC_DAEMON or TS_EXEC_LOCAL; both, in the first step
 * of TS_EXEC_AUTO, is TS_EXEC_AUTO. */
ts_exec ts_client_exec(const ts_client *client);

/* This session's id as the operator sees it, and the daemon's version. */
uint64_t ts_session_id(const ts_client *client);
const char *ts_daemon_version(const ts_client *client);

/* ---- pools ---- */

enum { TS_POOL_WRITABLE = 1 }; /* map slabs writable, to write K and V here: where it is allowed */

/* The pool of this name; "": the only one. TS_ENOENT: there is none. TS_EINVAL: "", and there are
 * several. TS_EPERM: flags ask for more than the configuration allows. */
TS_WARN_UNUSED ts_status ts_pool_open(ts_client *client, const char *name, unsigned flags,
                                      ts_pool **out);

/* Unmaps the pool; on a GPU, when all is done that this process has queued there. Its steps must
 * have ended; sequences stay. While the session has any in it, it has the pool open at the daemon,
 * and an operator can't delete it. */
void ts_pool_close(ts_pool *pool);

const ts_geometry *ts_pool_geometry(const ts_pool *pool);
uint32_t ts_pool_blocks(const ts_pool *pool);       /* that the pool may be given */
uint32_t ts_pool_sequence_max(const ts_pool *pool); /* tokens that a sequence may have */

/* Where the pool is ("host", "cuda:0", by the daemon's count) and what provides its memory ("host",
 * "cuda-vmm", "cuda-ipc"). */
const char *ts_pool_device(const ts_pool *pool);
const char *ts_pool_memory(const ts_pool *pool);

/* The pool's GPU as this process counts them (CUDA's ordinal). TS_EINVAL: it is in host memory. */
TS_WARN_UNUSED ts_status ts_pool_cuda_device(ts_pool *pool, int *ordinal);

/* ---- the exchange ----
 *
 * It is host memory unless one of these says otherwise. Neither may be called while steps are open
 * (TS_EBUSY). Device memory is for GPU pools alone; a session uses one GPU. */

/* Puts the exchange into memory of the pool's GPU, which the daemon owns: the pointers of a step
 * are device addresses from then on. */
TS_WARN_UNUSED ts_status ts_exchange_device(ts_pool *pool, size_t bytes);

/* Makes this process's own device memory the exchange, in place: `bytes` (a multiple of 4096) of
 * memory made with cudaMalloc on the pool's GPU (as PyTorch's allocator does), which must stay
 * until the session ends or has another exchange. The daemon can then read and write all of it. */
TS_WARN_UNUSED ts_status ts_exchange_register(ts_pool *pool, void *memory, size_t bytes);

/* ---- sequences ---- */

/* Makes `count` empty sequences. TS_EQUOTA: too many. */
TS_WARN_UNUSED ts_status ts_seq_create(ts_pool *pool, uint32_t count, ts_seq *out);

/* Makes `count` sequences that share all of the parent's blocks; nothing is copied until one of
 * them writes into a shared tail. */
TS_WARN_UNUSED ts_status ts_seq_fork(ts_pool *pool, ts_seq parent, uint32_t count, ts_seq *out);

/* The same, sharing only the first `length` tokens. TS_EINVAL: the parent has fewer. */
TS_WARN_UNUSED ts_status ts_seq_fork_at(ts_pool *pool, ts_seq parent, uint32_t length,
                                        uint32_t count, ts_seq *out);

/* Cuts sequence i down to lengths[i] tokens; all or none. TS_EBUSY: one is in an open step. */
TS_WARN_UNUSED ts_status ts_seq_truncate(ts_pool *pool, const ts_seq *seqs, const uint32_t *lengths,
                                         uint32_t count);

/* Frees the sequences; all or none. TS_EBUSY: one is in an open step. */
TS_WARN_UNUSED ts_status ts_seq_free(ts_pool *pool, const ts_seq *seqs, uint32_t count);

/* Keeps a sequence under a name (1..127 bytes of UTF-8 without control characters): it outlives
 * this session and any session of the same tenant may attach to it. NULL forgets the name: the
 * sequence becomes this session's own again. TS_EEXIST: the tenant keeps another one under this
 * name. */
TS_WARN_UNUSED ts_status ts_seq_keep(ts_pool *pool, ts_seq seq, const char *name);

/* Finds a kept sequence; *length (may be NULL) is its tokens. TS_ENOENT: there is none. */
TS_WARN_UNUSED ts_status ts_seq_attach(ts_pool *pool, const char *name, ts_seq *out,
                                       uint32_t *length);

/* Tokens of each sequence. */
TS_WARN_UNUSED ts_status ts_seq_lengths(ts_pool *pool, const ts_seq *seqs, uint32_t count,
                                        uint32_t *lengths);

/* ---- slots: where a token's K and V lie ---- */

/* A slot is block_id * block_tokens + offset. Finds those of tokens first..first+count-1. */
TS_WARN_UNUSED ts_status ts_seq_slots(ts_pool *pool, ts_seq seq, uint32_t first, uint32_t count,
                                      uint64_t *slots);

typedef struct ts_kv {
    void *k, *v;        /* KV head 0; head h lies head_stride * h bytes further */
    size_t head_stride; /* bytes */
} ts_kv;

/*
 * The address in this process of one token's K and V at one layer, mapping its slab if need be: a
 * device address for a GPU pool. The slot must come from this session's last answer about its
 * sequence. Writing through it needs TS_POOL_WRITABLE; without, the memory is read-only and a write
 * is a fault of this process. (On a GPU under MPS it is a fault of every process of the MPS server;
 * and cuda-ipc memory can always be written.)
 */
TS_WARN_UNUSED ts_status ts_slot_kv(ts_pool *pool, uint64_t slot, uint32_t layer, ts_kv *out);

/*
 * Maps the slabs that the slots lie in, all at once, and gives the address of block 0: a block lies
 * ts_geometry_block_bytes further than the one before. What lies in slabs that were never mapped
 * can't be read; in host memory it reads as zeros. Slots as for ts_slot_kv.
 */
TS_WARN_UNUSED ts_status ts_pool_map(ts_pool *pool, const uint64_t *slots, size_t count,
                                     void **base);

/*
 * Holds the memory that steps' buffers lie in (ts_exchange_hold), or a pool's slabs, which includes
 * those mapped later (ts_pool_hold): it stays mapped here until ts_memory_release, whatever is
 * ended, closed or replaced before that. It is for languages whose arrays outlive what they were
 * made from. What such memory holds means nothing once the step, or the pool, has gone. NULL: it is
 * a GPU's, or nothing is mapped yet. Any thread may release; NULL is released already.
 */
TS_WARN_UNUSED ts_memory *ts_exchange_hold(ts_client *client);
TS_WARN_UNUSED ts_memory *ts_pool_hold(ts_pool *pool);
void ts_memory_release(ts_memory *memory);

/*
 * A plain append in one message, for a worker that writes K and V itself (TS_POOL_WRITABLE): the
 * tokens are part of the sequences at once, so write them before anybody else is told. slots (may
 * be NULL) gets those of all new tokens, in order. TS_ENOSPC, TS_EQUOTA: nothing was appended.
 */
TS_WARN_UNUSED ts_status ts_seq_append(ts_pool *pool, const ts_seq *seqs,
                                       const uint32_t *new_tokens, uint32_t count, uint64_t *slots);

/* ---- steps ---- */

typedef struct ts_step_options {
    size_t size;        /* sizeof(ts_step_options) */
    uint32_t heads;     /* query heads: a multiple of kv_heads; 0: kv_heads */
    ts_dtype io_dtype;  /* of q, k, v and out: fp32 (0), the pool's own type, or beside an fp8 pool
                           fp16 or bf16 */
    float scale;        /* of q·k; 0: 1/sqrt(head_dim) */
    bool no_run;        /* no layer will be run: a plain append in two messages */
    const char *kernel; /* of a GPU pool: "v1" and so on; NULL: the pool's */
} ts_step_options;

#define TS_STEP_OPTIONS_INIT                                                                       \
    {                                                                                              \
        sizeof(ts_step_options), 0, TS_DTYPE_FP32, 0, false, NULL                                  \
    }

/*
 * Begins a step that adds new_tokens[i] tokens to sequence i. A sequence may get 0, as long as
 * another gets some: it takes no block, and nothing is attended for it. Takes all slots that
 * this needs, or none: TS_ENOSPC, TS_EQUOTA. While it is open, its sequences can be read and forked
 * as they were, and not be changed. TS_EBUSY: a sequence is in an open step, or a step is open and
 * the exchange has no room beside it. TS_EPERM: a sequence is another session's, or the pool wasn't
 * opened with TS_POOL_WRITABLE and no_run is set or the execution is local. options may be NULL.
 * With TS_EXEC_LOCAL, TS_EINVAL: the pool is on a GPU and the exchange isn't, there are no rings,
 * or the block tables of the step's sequences have more than 2^20 entries; TS_EDEVICE: no
 * libtinyserve-cuda, or it can't use the GPU.
 */
TS_WARN_UNUSED ts_status ts_step_begin(ts_pool *pool, const ts_seq *seqs,
                                       const uint32_t *new_tokens, uint32_t count,
                                       const ts_step_options *options, ts_step **out);

/* All new tokens of the step, in the order of its sequences. */
uint32_t ts_step_tokens(const ts_step *step);

/* Tokens that sequence i had: the position of its first new token. */
uint32_t ts_step_start(const ts_step *step, uint32_t i);

/* Buffers in the exchange, good until the step ends: q and out [tokens][heads][head_dim], k and v
 * [tokens][kv_heads][head_dim], of io_dtype. */
void *ts_step_q(const ts_step *step);
void *ts_step_k(const ts_step *step);
void *ts_step_v(const ts_step *step);
const void *ts_step_out(const ts_step *step);

/* More of the exchange, for ts_run_options: a sink's logit and an ALiBi slope for each query head,
 * [heads], which stay for the following layers; and the natural log of the sum of exponentials of
 * each token's scores, sinks left out, [tokens][heads]. */
float *ts_step_sinks(const ts_step *step);
float *ts_step_alibi(const ts_step *step);

/* ... and of an fp8 pool [2][kv_heads]: what a stored element of K, then of V, of each KV head is
 * to be multiplied by. New K and V are divided by it and rounded; what is beyond 448 then becomes
 * 448.
 */
float *ts_step_scales(const ts_step *step);
const float *ts_step_lse(const ts_step *step);

/* Slots of all new tokens, in order. */
void ts_step_slots(const ts_step *step, uint64_t *slots);

/* Writes k and v into the step's slots of this layer and attends: token t of a sequence sees all of
 * its tokens up to and including itself. out is ready when this returns. */
TS_WARN_UNUSED ts_status ts_step_run(ts_step *step, uint32_t layer);

/* How a layer attends, where that is not plain causal attention. */
typedef struct ts_run_options {
    size_t size; /* sizeof(ts_run_options) */
    /* What becomes of a score, in this order. */
    float scale;     /* of q·k; 0: the step's */
    float soft_cap;  /* soft_cap * tanh(score / soft_cap); 0: none; at most 1e38 */
    bool alibi;      /* slope * (key's position - query's) is added: ts_step_alibi has the slopes */
    uint32_t window; /* tokens that a token sees, itself included; 0: all */
    bool sinks;      /* ts_step_sinks' logits join the softmax; they have no value */
    bool lse;        /* ts_step_lse gets the log-sum-exps */
    bool scales;     /* of an fp8 pool: ts_step_scales has the layer's; false: all are 1 */
    /* Rotary position embedding: q before it attends, and k before it is written, are turned by
     * their tokens' positions in the sequence; pair i by position * theta^(-2 i / dims). */
    float rope_theta;      /* 0: none */
    uint32_t rope_dims;    /* the first so many dimensions of each head, even; 0: all */
    bool rope_interleaved; /* pairs are neighbours; else dimensions i and i + rope_dims / 2 */
    /* On a GPU pool: in the order of a CUDA stream. */
    bool on_stream;
    void *stream; /* CUstream or cudaStream_t of the pool's device; NULL: the default one */
} ts_run_options;

#define TS_RUN_OPTIONS_INIT                                                                        \
    {                                                                                              \
        sizeof(ts_run_options), 0, 0, false, 0, false, false, false, 0, 0, false, false, NULL      \
    }

/*
 * As ts_step_run, with options, which may be NULL. A row all of whose scores are -infinity is 0,
 * its log-sum-exp -infinity. TS_EINVAL: scale, soft_cap or rope_theta is negative or not finite,
 * soft_cap is more than 1e38, rope_dims is odd or more than head_dim, or there are scales and the
 * pool isn't fp8.
 *
 * On a stream, what is on it already, and writes q, k and v (slopes, sinks and scales too), comes
 * before; what is put on it later finds out. Returns as soon as the daemon has taken the run;
 * nothing waits for the GPU. The exchange must be device memory, or host memory that the stream
 * writes. Use one stream, or make a later one wait for the earlier. If a run fails on the GPU, the
 * commit says so.
 *
 * With TS_EXEC_LOCAL a run is kernels on the stream and nothing else, so the stream may be being
 * captured into a CUDA graph. Such a graph is good until the step ends (of a frame's step: see
 * ts_frame_new): wait for what it does before the commit or the abort, which wait for the runs that
 * were not captured.
 */
TS_WARN_UNUSED ts_status ts_step_run_with(ts_step *step, uint32_t layer,
                                          const ts_run_options *options);

/* Makes the first accepted[i] new tokens part of sequence i (NULL: all of them) and drops the rest.
 * The step ends, and is freed, if this returns TS_OK. TS_EINVAL: some layers were run and others
 * not. */
TS_WARN_UNUSED ts_status ts_step_commit(ts_step *step, const uint32_t *accepted);

/* Drops the step: every sequence is as it was. The step is freed, whatever this returns, so the
 * status may be ignored. */
ts_status ts_step_abort(ts_step *step);

/* ---- frames: CUDA graphs that serve many steps ---- */

typedef struct ts_frame_options {
    size_t size;         /* sizeof(ts_frame_options) */
    uint32_t seqs;       /* of a step, at most */
    uint32_t new_tokens; /* of each sequence in each step; 0: 1; leave out a sequence without any */
    uint64_t tokens;     /* of a step's sequences together, new ones included, at most (what two of
                            them share counts twice); 0: as many as the pool has slots */
    const ts_step_options *step; /* of each step; NULL: the defaults */
} ts_frame_options;

#define TS_FRAME_OPTIONS_INIT                                                                      \
    {                                                                                              \
        sizeof(ts_frame_options), 0, 0, 0, NULL                                                    \
    }

/*
 * A frame is where steps lie, one after the other: the pointers of ts_step_q and so on are the same
 * in each, and a CUDA graph into which runs of one were captured (ts_step_run_with, on_stream) runs
 * the same layers of whichever step the frame has when the graph is launched, of other sequences,
 * or fewer, too; while it has none, the graph changes nothing. Rows behind a step's last token are
 * neither read nor written.
 *
 * Its steps are executed here, whatever ts_options.exec says, with what that needs (ts_step_begin).
 * It takes its part of the exchange, which can't be replaced until it is freed, and device memory.
 *
 * TS_EINVAL: the pool is in host memory; more than a ring tells of (4096 sequences, 2^20 blocks);
 * kernel v5 isn't the one for such steps. It is where rows are whole 16-byte vectors, for up to 8
 * new tokens, with 16-bit and fp8 caches no more than 64 of new tokens times query heads for each
 * KV head; or where it was asked for. TS_ENOMEM.
 */
TS_WARN_UNUSED ts_status ts_frame_new(ts_pool *pool, const ts_frame_options *options,
                                      ts_frame **out);

/* As ts_step_begin; new_tokens are the frame's. TS_EBUSY: it has a step. TS_EINVAL: more sequences,
 * or tokens, than it has room for. What was launched for its last step must be done. */
TS_WARN_UNUSED ts_status ts_frame_begin(ts_frame *frame, const ts_seq *seqs, uint32_t count,
                                        ts_step **out);

/* Its step must have ended; graphs of its runs must not be launched any more. Before its pool is
 * closed. */
void ts_frame_free(ts_frame *frame);

#ifdef __cplusplus
}
#endif
#endif
