/*
 * libtinyserve: the worker's side of TinyServe, the node-local KV-cache service. The manual pages
 * (libtinyserve(3) names them all) say more about each group of calls.
 *
 * A worker connects to the daemon: that is its *session*. It opens a *pool* of KV-cache blocks by
 * name and makes *sequences* in it. Tokens are added in *steps*: begin a step for a batch of
 * sequences, run it once for each layer, commit it. A run writes the new K and V into the pool and
 * attends. q, k, v and out lie in the *exchange*, memory that the worker and the daemon share.
 *
 * Errors: functions return TS_OK (0) or what went wrong; ts_error() has the sentence. A call that
 * failed has changed nothing. Two statuses are exceptions. After TS_ETIMEOUT it is unknown whether
 * the call took effect or will (README.md); a step whose begin timed out is dropped by a later
 * call, and new sequences whose making did are freed. TS_ECONN ends the session: disconnect
 * and connect again; kept sequences are still there if the daemon is.
 *
 * Threads: one thread at a time may use a client and what was opened from it. For more threads,
 * open more clients. A call while another thread is inside one returns TS_EBUSY and does nothing;
 * one that frees (ts_disconnect, ts_pool_close, ts_step_abort, ts_frame_free) waits for it.
 *
 * fork(): connect in the child, not in the parent before the fork; NNG works on one side alone.
 * Calls that would break this are refused (TS_EPERM, TS_ECONN). fork() with exec is fine.
 *
 * Options are structs that begin with their size, so that they can grow. Initialise one with its
 * TS_..._INIT, or set .size to its sizeof and the members you need: 0 is the default of each.
 * TS_EINVAL: the size is 0, or a later header's struct asks for what this library doesn't know.
 * Calls that fill in arrays of structs are told the size of one.
 * Before version 1.0, a library fits headers of the same major and minor version.
 */
#ifndef TINYSERVE_H
#define TINYSERVE_H

#include "tinyserve_sequences.h"
#include "tinyserve_types.h"
#include "tinyserve_version.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ts_client ts_client;
typedef struct ts_step ts_step;
typedef struct ts_frame ts_frame;
typedef struct ts_memory ts_memory;

/* How steps and most calls on sequences reach the daemon (ts_connect(3)). Results are the same. */
typedef enum ts_transport {
    TS_TRANSPORT_AUTO,    /* rings, or messages if rings can't be had */
    TS_TRANSPORT_RING,    /* rings in memory shared with the daemon: microseconds */
    TS_TRANSPORT_MESSAGES /* one message over the socket for each call */
} ts_transport;

#define TS_SPIN_NONE UINT32_MAX

/* Who computes attention. Results are the same, bit for bit. */
typedef enum ts_exec {
    TS_EXEC_DAEMON, /* the daemon, which joins the runs of several sessions into one launch */
    TS_EXEC_LOCAL,  /* this process, with the same kernels over the mapped pool. Requires
                       TS_POOL_WRITABLE; on a GPU also ts_exchange_device and libtinyserve-cuda */
    TS_EXEC_AUTO    /* the faster of both, timed in the session's first step; if local execution is
                       not possible, the daemon. Runs captured into a CUDA graph are local */
} ts_exec;

/* The version of the library that was loaded; TS_VERSION is the header's: "0.1.0". */
const char *ts_version(void);

/* The library's sizeof a public struct, by name ("ts_options"), for bindings that declare it again;
 * 0: there is no such struct. */
size_t ts_struct_bytes(const char *name);

/* What a call does when the daemon ends, or is killed, and another takes over what it had. */
typedef enum ts_reconnect {
    TS_RECONNECT_ON = 0,  /* it goes on with the other one, within its time-out, and takes effect
                             once; TS_ECONN: there is none, or it doesn't have the session */
    TS_RECONNECT_OFF = 1, /* TS_ECONN: the session is over */
} ts_reconnect;

typedef struct ts_options {
    size_t size;         /* sizeof(ts_options) */
    const char *url;     /* "ipc:///path" or "/path"; NULL: the environment's TINYSERVE_URL, or the
                            user's own daemon, or the system's: ts_connect(3). "": TS_EINVAL */
    const char *program; /* shown to operators; NULL: the process's name */
    uint32_t timeout_ms; /* of one call; 0: 30000 */
    uint32_t retries;    /* how often a call that timed out is sent again; it takes effect once */
    uint32_t wait_ms;    /* how long ts_connect waits for a daemon to start or to be replaced */
    size_t exchange_bytes; /* size of the exchange at the start; it grows when a step needs more and
                              no other step is open. 0: what the first step needs */
    ts_transport transport;
    uint32_t spin_us; /* a call through a ring polls this long before it sleeps; 0: 50;
                         TS_SPIN_NONE: it sleeps at once */
    ts_exec exec;
    uint32_t threads; /* for local execution; 0: one for each processor */
    ts_reconnect reconnect;
} ts_options;

#define TS_OPTIONS_INIT                                                                            \
    {                                                                                              \
        sizeof(ts_options), NULL, NULL, 0, 0, 0, 0, TS_TRANSPORT_AUTO, 0, TS_EXEC_DAEMON, 0,       \
            TS_RECONNECT_ON                                                                        \
    }

/* Connects and opens a session. options may be NULL. After a failure *out serves ts_error and
 * ts_disconnect alone; it is NULL only after TS_ENOMEM. TS_ECONN: there is no daemon. TS_EPROTO: it
 * speaks another version. */
TS_WARN_UNUSED ts_status ts_connect(const ts_options *options, ts_client **out);

/* How often the session has gone on with another daemon (TS_RECONNECT_ON). */
uint32_t ts_client_restarts(const ts_client *client);

/* Ends the session. Its steps are dropped, its sequences freed, except kept ones and those on
 * tickets. */
void ts_disconnect(ts_client *client);

/* Why the last call that failed did so; valid until the next call fails. Never NULL. */
const char *ts_error(const ts_client *client);

/* The same failure in numbers, in the units of its sentence (blocks, sequences, ...); 0 where a
 * number doesn't apply. */
typedef struct ts_error_info {
    size_t size; /* sizeof(ts_error_info) */
    ts_status status;
    uint64_t needed; /* what the call asked for */
    uint64_t free;   /* how much of it is available */
    uint64_t limit;  /* the quota, the pool's size, or the most that is allowed */
    /* Of a step that finds no room (TS_ENOSPC), in blocks: */
    uint64_t cached; /* of `free`, of the tenant's: they would be evicted */
    uint64_t pinned; /* by the tenant's kept sequences */
    uint64_t others; /* used by other tenants */
} ts_error_info;

#define TS_ERROR_INFO_INIT                                                                         \
    {                                                                                              \
        sizeof(ts_error_info), TS_OK, 0, 0, 0, 0, 0, 0                                             \
    }

/* Fills in out->size bytes. TS_EINVAL: no version's ts_error_info has that size. */
TS_WARN_UNUSED ts_status ts_error_read(const ts_client *client, ts_error_info *out);

/* How the last step was begun: TS_TRANSPORT_RING or, also before any, TS_TRANSPORT_MESSAGES. */
ts_transport ts_client_transport(const ts_client *client);

/* Who attended in the client's last step; TS_EXEC_AUTO: both did, to be timed. */
ts_exec ts_client_exec(const ts_client *client);

/* Has the daemon end the wait (wait_ms) of a call that another thread is in; if the daemon doesn't
 * answer, TS_ETIMEOUT, and that call goes on. The one call that may be made meanwhile. */
TS_WARN_UNUSED ts_status ts_wait_end(ts_client *client);

uint64_t ts_session_id(const ts_client *client); /* as operators see it */
const char *ts_daemon_version(const ts_client *client);

/* ---- pools ---- */

/* Map the pool's memory writable, so that this process can write K and V itself. Requires
 * client_write = all in the daemon's configuration. */
enum { TS_POOL_WRITABLE = 1 };

/* Opens the pool of this name; "" or NULL: the only one. TS_ENOENT: there is none. TS_EINVAL: there
 * is no name, and there are several pools. TS_EPERM: the configuration doesn't allow the flags. */
TS_WARN_UNUSED ts_status ts_pool_open(ts_client *client, const char *name, unsigned flags,
                                      ts_pool **out);

/* Unmaps the pool; on a GPU it first waits for all work that this process has queued there. End its
 * steps before. Its sequences stay, and while there are any, operators can't delete the pool. */
void ts_pool_close(ts_pool *pool);

/* The shape of this layer, as of all others today. NULL: the pool has no such layer. */
const ts_geometry *ts_pool_geometry(const ts_pool *pool, uint32_t layer);
uint32_t ts_pool_blocks(const ts_pool *pool);       /* the most that it can have */
uint32_t ts_pool_sequence_max(const ts_pool *pool); /* tokens of the longest sequence */

/* What the caller's tenant has of a pool. Units: blocks, unless said. */
typedef struct ts_pool_room {
    size_t size;        /* sizeof(ts_pool_room) */
    uint64_t blocks;    /* of the pool */
    uint64_t available; /* that a step could take now: free ones, and cached ones that would go */
    uint64_t used;      /* by the tenant's sequences, each counted once */
    uint64_t cached;    /* of the tenant: no sequence uses them, and a match may find them */
    uint64_t pinned;    /* of `used`, by kept sequences */
    uint64_t limit;     /* that the tenant may use */
    uint64_t others;    /* used by other tenants */
    uint64_t sequences; /* of the tenant */
    uint64_t waiting;   /* sessions of all tenants that wait in the pool */
    uint64_t asked_tokens, found_tokens; /* of the tenant's prompts that were matched */
} ts_pool_room;

#define TS_POOL_ROOM_INIT                                                                          \
    {                                                                                              \
        sizeof(ts_pool_room), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0                                      \
    }

/* Fills in out->size bytes. TS_EINVAL: no version's ts_pool_room has that size. */
TS_WARN_UNUSED ts_status ts_pool_stats(ts_pool *pool, ts_pool_room *out);

/* A pool of the daemon, open or not. */
typedef struct ts_pool_info {
    char name[64];
    char device[32]; /* as ts_pool_device */
    ts_geometry geometry;
    uint32_t blocks; /* the most that it can have */
} ts_pool_info;

/* Lists the daemon's pools: the first `room` of them (out may be NULL if it is 0), and in *count
 * how many there are. info_bytes: sizeof(ts_pool_info). */
TS_WARN_UNUSED ts_status ts_pool_list(ts_client *client, ts_pool_info *out, size_t info_bytes,
                                      uint32_t room, uint32_t *count);

/* Makes a pool, as the daemon's --pool does: "NAME:key=value,key=value". NAME has 1 to 63 bytes of
 * UTF-8, with no colon or control character, and no blank at either end. A restart that loses
 * nothing keeps the pool. TS_EPERM: the caller isn't an operator. TS_EEXIST: there is one of this
 * name. TS_EDEVICE: the daemon can't use the device: without CUDA it has no GPU. TS_EINVAL,
 * TS_ENOMEM. */
TS_WARN_UNUSED ts_status ts_pool_create(ts_client *client, const char *text);

/* The pool's device as the daemon counts them ("host", "cuda:0"), and its kind of memory ("host",
 * "cuda-vmm", "cuda-ipc"). */
const char *ts_pool_device(const ts_pool *pool);
const char *ts_pool_memory(const ts_pool *pool);

/* The CUDA ordinal of the pool's GPU in this process. TS_EINVAL: the pool is in host memory. */
TS_WARN_UNUSED ts_status ts_pool_cuda_device(ts_pool *pool, int *ordinal);

/* ---- the exchange ----
 * It is host memory unless one of these calls moves it to a GPU. TS_EBUSY: a step or a frame is
 * open, or the GPU still works on runs that use an earlier exchange. TS_EQUOTA, TS_ENOMEM: too much
 * of the GPU's memory. A session uses one GPU. */

/* Puts the exchange into memory of the pool's GPU, which the daemon owns. The pointers of later
 * steps are device addresses. */
TS_WARN_UNUSED ts_status ts_exchange_device(ts_pool *pool, size_t bytes);

/* Makes this process's own device memory the exchange: `bytes` (a multiple of 4096) at `memory`,
 * from cudaMalloc on the pool's GPU (PyTorch's allocator uses it). Don't free it before the session
 * ends or has another exchange. The daemon can read and write the whole allocation. */
TS_WARN_UNUSED ts_status ts_exchange_register(ts_pool *pool, void *memory, size_t bytes);

/* Holds host memory for language bindings whose arrays outlive the step or pool they were made
 * from: the exchange, or a pool's slabs, also those mapped later. It stays mapped until
 * ts_memory_release, by any thread; its content means nothing once the step or the pool is gone.
 * NULL: it is a GPU's memory, or nothing is mapped yet. Releasing NULL does nothing. */
TS_WARN_UNUSED ts_memory *ts_exchange_hold(ts_client *client);
TS_WARN_UNUSED ts_memory *ts_pool_hold(ts_pool *pool);
void ts_memory_release(ts_memory *memory);

/* ---- steps ---- */

typedef struct ts_step_options {
    size_t size;        /* sizeof(ts_step_options) */
    uint32_t heads;     /* query heads: a multiple of kv_heads; 0: kv_heads */
    ts_dtype io_dtype;  /* of q, k, v and out: fp32 (0), the pool's own type, or beside an fp8 pool
                           fp16 or bf16 */
    float scale;        /* of q·k; 0: 1/sqrt(head_dim) */
    bool no_run;        /* no layer will be run: the worker writes K and V itself, by the commit */
    const char *kernel; /* of a GPU pool, to compare: "v1", ...; NULL: the pool's */
    const uint32_t *tokens; /* ids of all new tokens, in order: what is committed with them can be
                               found (ts_seq_match). TS_TOKEN_UNKNOWN: this one's isn't known.
                               NULL: none are */
    uint32_t wait_ms;       /* how long to wait for free blocks, in addition to timeout_ms; in which
                               order, ts_step_begin(3) says. 0: it is refused at once */
    int32_t priority; /* of what is cached of the step's content: -1 is evicted before 0, and 1
                         after it, among the tenant's own */
} ts_step_options;

#define TS_TOKEN_UNKNOWN UINT32_MAX

#define TS_STEP_OPTIONS_INIT                                                                       \
    {                                                                                              \
        sizeof(ts_step_options), 0, TS_DTYPE_FP32, 0, false, NULL, NULL, 0, 0                      \
    }

/*
 * Begins a step that adds new_tokens[i] tokens to sequence i; 0 is allowed if another gets some.
 * Takes all the slots it needs, or none (TS_ENOSPC, TS_EQUOTA). While the step is open, its
 * sequences can be read and forked as they were, but not changed. options may be NULL.
 * TS_EBUSY: a sequence is in an open step, or another step leaves no room in the exchange.
 * TS_EPERM: a sequence is another session's, or no_run or local execution without TS_POOL_WRITABLE.
 * ts_step_begin(3) says what local execution needs.
 */
TS_WARN_UNUSED ts_status ts_step_begin(ts_pool *pool, const ts_seq *seqs,
                                       const uint32_t *new_tokens, uint32_t count,
                                       const ts_step_options *options, ts_step **out);

/* New tokens of all the step's sequences. */
uint32_t ts_step_tokens(const ts_step *step);

/* The position of sequence i's first new token: the tokens it had before. */
uint32_t ts_step_start(const ts_step *step, uint32_t i);

/* Buffers in the exchange, valid until the step ends: q and out [tokens][heads][head_dim], k and v
 * [tokens][kv_heads][head_dim], of io_dtype; tokens in the order of the sequences. */
void *ts_step_q(const ts_step *step);
void *ts_step_k(const ts_step *step);
void *ts_step_v(const ts_step *step);
const void *ts_step_out(const ts_step *step);

/* More buffers, for ts_run_options: sink logits and ALiBi slopes [heads], which stay for later
 * layers; the natural log-sum-exp of each token's scores, without sinks, [tokens][heads]; and of an
 * fp8 pool [2][kv_heads], what stored elements of K, then of V, are multiplied by. New K and V are
 * divided by it, limited to 448 and rounded. */
float *ts_step_sinks(const ts_step *step);
float *ts_step_alibi(const ts_step *step);
float *ts_step_scales(const ts_step *step);
const float *ts_step_lse(const ts_step *step);

/* The slots of all new tokens at this layer, in order: the same at all layers today. */
void ts_step_slots(const ts_step *step, uint32_t layer, uint64_t *slots);

/* Writes k and v into the step's slots of this layer, then attends: a token sees all tokens of its
 * sequence up to itself. out is complete when this returns. */
TS_WARN_UNUSED ts_status ts_step_run(ts_step *step, uint32_t layer);

/* How a layer attends, where that is not plain causal attention. */
typedef struct ts_run_options {
    size_t size; /* sizeof(ts_run_options) */
    /* What is done to a score, in this order. */
    float scale;     /* of q·k; 0: the step's */
    float soft_cap;  /* soft_cap * tanh(score / soft_cap); 0: none; at most 1e38 */
    bool alibi;      /* slope * (key's position - query's) is added: ts_step_alibi has the slopes */
    uint32_t window; /* tokens that a token sees, itself included; 0: all */
    bool sinks;      /* the logits in ts_step_sinks join the softmax, without a value */
    bool lse;        /* ts_step_lse gets the log-sum-exps */
    bool scales;     /* of an fp8 pool: use ts_step_scales; false: all are 1 */
    /* Rotary position embedding: q, and k before it is stored, are rotated by their positions in
     * the sequence; pair i by position * theta^(-2 i / dims). */
    float rope_theta;      /* 0: none */
    uint32_t rope_dims;    /* dimensions of each head that are rotated, even; 0: all */
    bool rope_interleaved; /* pairs are neighbours; else dimensions i and i + rope_dims / 2 */
    /* On a GPU pool: in the order of a CUDA stream. */
    bool on_stream;
    void *stream; /* CUstream or cudaStream_t of the pool's device; NULL: the default one */
} ts_run_options;

#define TS_RUN_OPTIONS_INIT                                                                        \
    {                                                                                              \
        sizeof(ts_run_options), 0, 0, false, 0, false, false, false, 0, 0, false, false, NULL      \
    }

/* ts_step_run with options, which may be NULL. If all scores of a token are -infinity, its out is 0
 * and its log-sum-exp -infinity. TS_EINVAL: a number is negative, not finite or out of its range,
 * or there are scales and the pool isn't fp8.
 *
 * On a stream, the run comes after the work that is on it already, and before work added later.
 * The call returns when the daemon has taken the run. If it took one of the step that differs in
 * its layer alone, the call returns when the daemon has taken the run before: the worker is one
 * ahead, and the step's next run or its commit tells of a refusal. The commit tells of a failure on
 * the GPU. The exchange must be device memory, or host memory that the stream writes. With
 * TS_EXEC_LOCAL a run is kernels on the stream alone, for CUDA graphs: see ts_step_run(3). */
TS_WARN_UNUSED ts_status ts_step_run_with(ts_step *step, uint32_t layer,
                                          const ts_run_options *options);

/* Makes the first accepted[i] new tokens part of sequence i (NULL: all), drops the rest, and frees
 * the step, if it returns TS_OK. TS_EINVAL: some layers were run and others not. */
TS_WARN_UNUSED ts_status ts_step_commit(ts_step *step, const uint32_t *accepted);

/* Drops and frees the step, whatever this returns: its sequences are as they were. */
ts_status ts_step_abort(ts_step *step);

/* ---- frames: CUDA graphs that serve many steps ---- */

typedef struct ts_frame_options {
    size_t size;         /* sizeof(ts_frame_options) */
    uint32_t seqs;       /* the most sequences of a step */
    uint32_t new_tokens; /* of each sequence in each step; 0: 1 */
    uint64_t tokens; /* the most tokens of a step's sequences together, new ones included, shared
                        ones counted for each; 0: as many as the pool has slots */
    const ts_step_options *step; /* of each step, without tokens; NULL: the defaults */
} ts_frame_options;

#define TS_FRAME_OPTIONS_INIT                                                                      \
    {                                                                                              \
        sizeof(ts_frame_options), 0, 0, 0, NULL                                                    \
    }

/*
 * A frame is a fixed set of buffers that successive steps reuse, so that one CUDA graph, into which
 * runs were captured on a stream, serves all of them: a launch of the graph runs the same layers of
 * the frame's present step, whatever its sequences. Without a step it changes nothing. Rows after a
 * step's last token are neither read nor written.
 *
 * Its steps execute locally and need what TS_EXEC_LOCAL needs. A frame holds device memory and part
 * of the exchange, which can't be replaced before ts_frame_free.
 *
 * TS_EINVAL: the pool is in host memory, or its graphs can't have such steps: see ts_frame_new(3).
 */
TS_WARN_UNUSED ts_status ts_frame_new(ts_pool *pool, const ts_frame_options *options,
                                      ts_frame **out);

/* ts_step_begin for the frame, once work launched for its last step is complete. options: this
 * step's tokens, wait_ms and priority; a wait_ms or priority of 0 is the frame's, and the rest may
 * be 0, or as the frame's. NULL: all are 0. TS_EBUSY: it has a step. TS_EINVAL: more sequences or
 * tokens than it has room for, or an option that its graphs can't follow. */
TS_WARN_UNUSED ts_status ts_frame_begin(ts_frame *frame, const ts_seq *seqs, uint32_t count,
                                        const ts_step_options *options, ts_step **out);

/* End its step before, don't launch its graphs after, and free it before its pool is closed. */
void ts_frame_free(ts_frame *frame);

#ifdef __cplusplus
}
#endif
#endif
