/*
 * Inside libtinyserve: the connection, the call, and what pools and steps share. Tools of this
 * project use ts_call for the operator's requests, which are not part of the public header.
 */
#ifndef TS_CLIENT_H
#define TS_CLIENT_H

#include "attention.h"
#include "cuda_worker.h"
#include "handle_wire.h"
#include "rings.h"
#include "signals.h"
#include "tinyserve.h"
#include "tinyserve.pb-c.h"

#include <nng/nng.h>
#include <stdatomic.h>
#include <sys/types.h>

#define TS_URL_DEFAULT "ipc:///run/tinyserve/tinyserve.sock"
#define TS_EXCHANGE_ALIGN 64u

/* A piece of the exchange in use by a step; in order of offset. */
typedef struct ts_region {
    struct ts_region *next;
    size_t offset, bytes;
} ts_region;

/* A begin that was sent again, as its answer didn't come in time: unanswered.c's own. */
typedef struct ts_unanswered ts_unanswered;

/* What the exchange is made of. */
typedef enum ts_exchange_kind {
    TS_EXCHANGE_NONE,
    TS_EXCHANGE_HOST,
    TS_EXCHANGE_VMM, /* device memory of the daemon's, by descriptor */
    TS_EXCHANGE_IPC, /* device memory of the daemon's, by IPC handle */
    TS_EXCHANGE_OWN  /* device memory of this process's */
} ts_exchange_kind;

struct ts_client {
    atomic_bool in_call; /* a thread is inside a public call: TS_ENTER */
    nng_socket socket;
    nng_aio *aio;
    pid_t pid;          /* of the process that connected */
    bool open;          /* socket and aio are there */
    atomic_bool broken; /* the connection ended; set on NNG's threads */
    bool absent;        /* connecting failed for want of a daemon */
    char path[100];     /* of the daemon's socket */
    uint32_t timeout_ms, retries;
    uint64_t next_id;
    uint64_t session;
    uint8_t token[TS_TOKEN_BYTES];
    char version[32];
    int handle_fd; /* the connection to the handle socket; -1: there is none */
    uint32_t handle_tag;
    unsigned char *exchange;
    size_t exchange_bytes, exchange_bytes_max;
    ts_exchange_kind exchange_kind;
    ts_memory *exchange_memory; /* of TS_EXCHANGE_HOST */
    ts_pool *exchange_pool;     /* of device memory: the pool it was made for */
    ts_region *regions;
    ts_pool *pools;      /* that are open, linked by next */
    ts_cuda *cuda;       /* the GPU of the session's GPU pools; NULL: none was needed */
    ts_signals *signals; /* mapped and pinned; NULL: no run was ordered */
    uint64_t signals_there;
    atomic_uint ordered;              /* runs that were handed over to the daemon's stream */
    bool order_lost;                  /* one may or may not have been */
    ts_transport transport;           /* that was asked for */
    ts_rings_memory *rings;           /* NULL: not open */
    uint32_t ring_blocks, ring_slabs; /* that they have room for */
    bool pools_are_new;               /* one was opened that they may have no room for */
    int doorbell;
    uint32_t ring_submitted, ring_seen, ring_tag, spin_us;
    int spin_luck;             /* how often polling was worth it lately */
    bool rings_lost;           /* they can't be used, or not any more */
    bool ring_unanswered;      /* the last entry was a begin whose completion is yet to come */
    ts_unanswered *unanswered; /* begins by message whose answers are yet to come */
    ts_exec exec;              /* that was asked for, or that AUTO has come to */
    ts_exec last_exec;
    bool tried; /* a run has gone both ways */
    uint32_t threads;
    ts_attention *attention;        /* of local execution; NULL: none yet */
    struct ts_local *local_spare;   /* the last step's; NULL: none */
    struct ts_local_gpu *local_gpu; /* the same on a GPU */
    char error[256];
};

/* A sequence's block table as a step's begin told of it. */
typedef struct ts_table {
    ts_seq seq;
    uint64_t told; /* the step that told of it last; 0: nothing is known */
    uint32_t *blocks;
    uint32_t count, room;
} ts_table;

struct ts_pool {
    ts_client *client;
    ts_pool *next; /* of the client's */
    uint32_t index;
    ts_geometry geometry;
    uint32_t num_blocks, slab_blocks, num_slabs, sequence_tokens_max;
    bool writable, on_gpu;
    char device[32], memory[16], kernel[16];
    uint8_t uuid[TS_UUID_BYTES]; /* of the GPU */
    uint8_t ipc_handle[TS_IPC_HANDLE_BYTES];
    bool has_ipc_handle; /* of the only slab */
    unsigned char *base; /* of block 0; reserved at the first need */
    ts_memory *reserved; /* of a pool in host memory: what base is the start of */
    uint32_t *mapped;    /* per slab: generation that is mapped; 0: none */
    bool *written;       /* per slab: it is mapped writable */
    uint32_t *wanted;    /* per slab: generation that the daemon named last */
    ts_table *tables;    /* by a sequence's index in the daemon; tables.c's own */
    uint32_t num_tables;
};

/*
 * Stands first in every public function that uses the client: a second thread is refused while one
 * is inside. The client is left when the function returns. Functions inside the library that other
 * public functions need too don't have it.
 */
#define TS_ENTER(client)                                                                           \
    ts_client *entered __attribute__((cleanup(ts_leave))) = ts_enter(client);                      \
    if (entered == NULL)                                                                           \
    return ts_in_use(client)

/* The same where nothing can be refused: waits until the other thread's call has returned. */
#define TS_ENTER_LAST(client)                                                                      \
    ts_client *entered __attribute__((cleanup(ts_leave), unused)) = ts_enter_last(client)

/* NULL: another thread is inside. */
static inline ts_client *ts_enter(ts_client *client)
{
    return atomic_exchange_explicit(&client->in_call, true, memory_order_acquire) ? NULL : client;
}

static inline void ts_leave(ts_client **client)
{
    if (*client != NULL)
        atomic_store_explicit(&(*client)->in_call, false, memory_order_release);
}

ts_client *ts_enter_last(ts_client *client);

/* Why the client can't be entered: TS_EBUSY; in a forked child TS_ECONN. */
ts_status ts_in_use(ts_client *client);

/* Sets the error sentence and returns status. */
ts_status ts_fail(ts_client *client, ts_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Which struct of options. */
typedef enum ts_options_struct {
    TS_STRUCT_OPTIONS,
    TS_STRUCT_STEP_OPTIONS,
    TS_STRUCT_RUN_OPTIONS,
    TS_STRUCT_FRAME_OPTIONS
} ts_options_struct;

/* Copies a caller's options, of whichever size its header gave them, into a struct of this
 * library's; NULL: all are 0. */
ts_status ts_options_read(ts_client *client, ts_options_struct which, const void *options,
                          void *out);

/*
 * Sends the request and waits for its reply. TS_OK: *reply is there, to be freed with
 * tspb__reply__free_unpacked. Else the error sentence is set and there is none.
 */
ts_status ts_call(ts_client *client, Tspb__Request *request, Tspb__Reply **reply);

/* The connection has ended, or is another process's: TS_ECONN. */
ts_status ts_gone(ts_client *client);
ts_status ts_not_ours(ts_client *client);

/* A step's begin got no answer in time: whatever comes of it is undone by a later call's
 * ts_unanswered_settle. */
void ts_unanswered_by_message(ts_client *client, const Tspb__Request *request);
void ts_unanswered_by_ring(ts_client *client);
void ts_unanswered_settle(ts_client *client);
void ts_unanswered_close(ts_client *client);

/* The same where the reply has nothing but its status. */
ts_status ts_call_plain(ts_client *client, Tspb__Request *request);

#define TS_TRIAL_RUNS 32u /* of a step, that are timed on a GPU's stream */

/* How long the runs of a step took that went both ways. All 0 to start with. */
typedef struct ts_trial {
    uint64_t here_ns, there_ns;
    ts_cuda *cuda;
    void *marks[TS_TRIAL_RUNS][3]; /* in the stream: before, between and after the two */
    uint32_t num_marks;
} ts_trial;

typedef struct ts_trial_ways {
    ts_status (*here)(void *arg);
    ts_status (*there)(void *arg);
} ts_trial_ways;

/* Runs here, then there, each waited for; or both queued on the stream. */
ts_status ts_trial_run(ts_client *client, ts_trial *trial, const ts_trial_ways *ways, void *arg);
ts_status ts_trial_run_on_stream(ts_client *client, ts_cuda *cuda, ts_trial *trial, void *stream,
                                 const ts_trial_ways *ways, void *arg);

/* All runs are over: from now on the session takes the quicker way, if any was timed. */
void ts_trial_settle(ts_client *client, ts_trial *trial);
void ts_trial_drop(ts_trial *trial);

/* What the daemon answers to a begin. */
typedef struct ts_begun {
    const uint32_t *starts; /* tokens of each sequence before the step */
    const uint32_t *blocks; /* entries of their block tables, one sequence after the other */
    const uint32_t *counts; /* of each sequence's */
    const uint32_t *firsts; /* which of its table's is the first; NULL: the first touched one */
    size_t num_seqs, num_blocks;
} ts_begun;

/* What this process learns of one sequence's block table: `count` entries from `first` on. Those
 * from `touched` on get new tokens. */
typedef struct ts_table_news {
    ts_seq seq;
    uint32_t first, count, touched;
    const uint32_t *blocks;
} ts_table_news;

/* Which step's begin told of each sequence's table last, for the daemon to tell what is new. */
void ts_tables_say_known(const ts_pool *pool, const ts_seq *seqs, uint32_t count, uint64_t *told);

/* Notes what the step's begin tells, and maps those blocks. *blocks: the whole table, until the
 * next begin with the sequence. */
ts_status ts_tables_learn(ts_pool *pool, uint64_t step, const ts_table_news *news,
                          const uint32_t **blocks);

/* These sequences are freed. */
void ts_tables_forget(ts_pool *pool, const ts_seq *seqs, uint32_t count);
void ts_tables_fini(ts_pool *pool);

/* A step that this process attends in: its sequences. It goes to the next step: of new memory every
 * page costs, and a plan of the same sequences is renewed. */
typedef struct ts_local {
    ts_attention_seq *seqs;
    uint32_t num_seqs, seqs_room;
    struct ts_gpu_plan *plan; /* of a GPU pool; between steps the last one's */
    bool plan_is_kept;        /* it is a frame's */
} ts_local;

/* Whether a step in the pool is to be executed here (*local), or both ways. An error: here was
 * asked for, and can't be. */
ts_status ts_local_choose(ts_client *client, const ts_pool *pool, ts_exec *exec);

/* The same where there is no choice: TS_OK, or why it can't be here. */
ts_status ts_local_require(ts_client *client, const ts_pool *pool);

/* Notes the tables of a step that was begun, with so many new tokens of each sequence, and maps
 * what lies in them. */
ts_status ts_local_new(ts_pool *pool, uint64_t step, const ts_seq *seqs, const uint32_t *new_tokens,
                       const ts_begun *begun, ts_local **out);
void ts_local_free(ts_client *client, ts_local *local);

/* Frees what was kept for the next one. */
void ts_local_close(ts_client *client);

/* The same for runs on the pool's GPU: kernel NULL: the pool's. */
ts_status ts_local_plan(ts_pool *pool, ts_local *local, uint32_t heads, ts_dtype io_dtype,
                        const char *kernel);

/* The same by a plan that is kept. */
ts_status ts_local_plan_in(ts_pool *pool, ts_local *local, struct ts_gpu_plan *plan);

/* What a run is given: pointers into the exchange, as ts_attention_seq's of all tokens. */
typedef struct ts_local_run {
    uint32_t layer, heads;
    ts_dtype io_dtype;
    ts_attention_variant variant;
    const unsigned char *q, *k, *v;
    unsigned char *out;
    const float *sinks, *alibi, *scales;
    float *lse;
    bool on_stream;
    void *stream;
} ts_local_run;

ts_status ts_local_attend(ts_pool *pool, ts_local *local, const ts_local_run *run);

/* The same on a GPU, through libtinyserve-cuda, which is loaded at the first need. */
typedef struct ts_local_gpu ts_local_gpu;
typedef struct ts_gpu_plan ts_gpu_plan;
ts_status ts_local_gpu_open(ts_client *client, const ts_pool *pool);
void ts_local_gpu_close(ts_client *client);
/* *plan: NULL, or one of an earlier step that may be renewed. */
ts_status ts_local_gpu_plan(ts_pool *pool, const ts_attention_seq *seqs, uint32_t num_seqs,
                            uint32_t heads, ts_dtype io_dtype, const char *kernel,
                            ts_gpu_plan **plan);
void ts_local_gpu_plan_free(ts_client *client, ts_gpu_plan *plan);

/* A plan that is kept, for one step after another (gpu.h). */
ts_status ts_local_gpu_keep(ts_pool *pool, const ts_frame_options *options, ts_gpu_plan **out);
ts_status ts_local_gpu_keep_set(ts_client *client, ts_gpu_plan *plan, const ts_attention_seq *seqs,
                                uint32_t num_seqs);
void ts_local_gpu_keep_clear(ts_client *client, ts_gpu_plan *plan);
ts_status ts_local_gpu_attend(ts_pool *pool, ts_gpu_plan *plan, const ts_local_run *run);

/* Waits for the runs that were queued on streams. */
ts_status ts_local_gpu_await(ts_client *client);

/* Makes sure that the block's slab is mapped, as the daemon spoke of it last. */
ts_status ts_pool_map_block(ts_pool *pool, uint64_t block, bool writable);

/* Whether steps go by the rings, which are opened at the first need. */
ts_status ts_rings_use(ts_client *client, bool *use);

/* Submits the entry, sets its tag, and waits for its completion. Else the error sentence is set. */
ts_status ts_ring_call(ts_client *client, ts_ring_entry *entry, ts_ring_completion *done);

/* The completion that has come to the rings, if one has. */
bool ts_ring_take(ts_client *client, ts_ring_completion *done);

/* A call that sleeps looks whether the connection has ended. Any thread. */
void ts_rings_wake(ts_client *client);
void ts_rings_close(ts_client *client);

/* A descriptor from the handle socket; the caller's. pool and slab for TS_HANDLE_SLAB. */
ts_status ts_handle_get(ts_client *client, enum ts_handle_kind kind, uint32_t pool, uint32_t slab,
                        bool writable, ts_handle_reply *reply, int *fd);

/* Memory of the daemon's making that this process must fill; the caller's. */
ts_status ts_handle_new(ts_client *client, enum ts_handle_kind kind, uint64_t bytes, int *fd);

/* A request whose reply brings no descriptor. */
ts_status ts_handle_tell(ts_client *client, enum ts_handle_kind kind);
void ts_handles_close(ts_client *client);

/* The GPU of the pool, made ready at the first need: a session uses one. */
ts_status ts_client_cuda(ts_client *client, const ts_pool *pool, ts_cuda **out);

/* Has the daemon make memory of whole pages (TS_HANDLE_NEW_...), allocates all of it, so that this
 * process is charged with it, and maps it. *base is the caller's. */
ts_status ts_memory_fill(ts_client *client, enum ts_handle_kind kind, const char *what,
                         size_t bytes, void **base);

/* Memory that was mapped, with one holder; the last one's release unmaps it. NULL: no memory. */
ts_memory *ts_memory_new(void *base, size_t bytes);

/* Makes an exchange of host memory, in place of the one there is; or of a GPU's. */
ts_status ts_exchange_host(ts_client *client, size_t bytes);
void ts_exchange_close(ts_client *client);

/* Maps and pins the page of signals at the first need. */
ts_status ts_signals_open(ts_client *client, const ts_pool *pool);

/* Streams that wait for the daemon go on: it is gone. Any thread. */
void ts_signals_let_go(ts_client *client);
void ts_signals_close(ts_client *client);

/* Takes `region->bytes` of the exchange, growing it if need be, and links the region. */
ts_status ts_exchange_take(ts_client *client, ts_region *region);
void ts_exchange_give(ts_client *client, ts_region *region);

/* Notes which generation of its slabs an answer speaks of. */
ts_status ts_pool_note_slab(ts_pool *pool, uint32_t slab, uint32_t generation);
ts_status ts_pool_note_slabs(ts_pool *pool, Tspb__Slab **slabs, size_t count);

#endif
