/*
 * Inside libtinyserve: what a client and a pool are. A field belongs to the file whose task it is
 * part of; what other files may do with it, that file's header says.
 *
 * Thread: the client's, one at a time (error.h), but for what is atomic.
 */
#ifndef TS_CLIENT_H
#define TS_CLIENT_H

#include "attention.h"
#include "handle_wire.h"
#include "rings.h"
#include "signals.h"
#include "socket_place.h"
#include "tinyserve.h"
#include "tinyserve.pb-c.h"

#include <nng/nng.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#define TS_URL_SYSTEM "ipc://" TS_SYSTEM_SOCKET
#define TS_EXCHANGE_ALIGN 64u
#define TS_UUID_BYTES 16
#define TS_IPC_HANDLE_BYTES 64

typedef struct ts_cuda ts_cuda; /* gpu_context.h */

/* A piece of the exchange in use by a step; in order of offset. */
typedef struct ts_region {
    struct ts_region *next;
    size_t offset, bytes;
    const ts_step *step; /* NULL: a frame's that has none */
} ts_region;

/* A begin, or what makes sequences, that was sent again, as its answer didn't come in time:
 * unanswered.c's own. */
typedef struct ts_unanswered ts_unanswered;

/* What the exchange is made of. */
typedef enum ts_exchange_kind {
    TS_EXCHANGE_NONE,
    TS_EXCHANGE_HOST,
    TS_EXCHANGE_VMM, /* device memory of the daemon's, by descriptor */
    TS_EXCHANGE_IPC, /* device memory of the daemon's, by IPC handle */
    TS_EXCHANGE_OWN  /* device memory of this process's */
} ts_exchange_kind;

/* What ts_error says, and the same in numbers. What fails and is none of a call's failure puts the
 * last one back. */
typedef struct ts_last_error {
    char text[256];
    ts_error_info info;
} ts_last_error;

struct ts_client {
    atomic_bool in_call; /* a thread is inside a public call: TS_ENTER */
    nng_socket socket;
    nng_aio *aio;
    pid_t pid;               /* of the process that connected */
    bool open;               /* socket and aio are there */
    bool late;               /* an answer didn't come in time, and may come yet */
    bool unanswered_message; /* it was the last message's: it may be carried out yet */
    atomic_bool broken;      /* the connection ended; set on NNG's threads */
    int live_socket; /* under live_lock: the id of the socket whose end that is, and `aio` there */
    bool absent;     /* connecting failed for want of a daemon */
    bool met;        /* connecting has reached one */
    char path[100];  /* of the daemon's socket */
    uint32_t timeout_ms, retries;
    uint32_t wait_ms; /* that the present call may take beside */
    bool brief;       /* the present call has TS_BRIEF_MS, and waits for no other daemon */
    bool aborts;      /* the present call is an abort */
    bool unheard;     /* a call had no answer in time, and none was answered since */
    bool end_unheard; /* the same of an abort, or of a brief call: the next is told, at most */
    atomic_uint_fast64_t next_id;
    uint64_t session;
    uint8_t token[TS_TOKEN_BYTES];
    char version[32];
    uint8_t nonce[TS_TOKEN_BYTES]; /* of the session's opening */
    /* Goes on with another daemon; NULL: it isn't to (arrive.c). */
    ts_status (*reconnect)(ts_client *client, uint64_t until_ms);
    bool reconnecting;           /* a thread is at it */
    bool outlives;               /* the session, its daemon */
    bool lost;                   /* the session can't go on with the daemon that there is now */
    uint32_t restarts;           /* that the session has outlived */
    pthread_mutex_t socket_lock; /* for who uses the socket beside the client's thread */
    pthread_mutex_t live_lock;   /* for NNG's thread, which tells of a connection's end */
    int handle_fd;               /* the connection to the handle socket; -1: there is none */
    uint32_t handle_tag;
    bool handle_late; /* an answer by it didn't come in time, and may come yet */
    unsigned char *exchange;
    size_t exchange_bytes, exchange_bytes_max;
    size_t exchange_least;      /* of the next one, where the daemon may have one that is larger */
    uint64_t message_bytes_max; /* 0: not known yet */
    ts_exchange_kind exchange_kind; /* if it is NULL: of the one that is to be made */
    ts_memory *exchange_memory;     /* of TS_EXCHANGE_HOST */
    ts_pool *exchange_pool;         /* of device memory: the pool it was made for */
    ts_region *regions;
    ts_pool *pools;                  /* that are open, linked by next */
    uint64_t unheard_closes;         /* by pool number: the next daemon is told in its resume */
    struct ts_slab_returns *returns; /* slab_returns.h; NULL: no slab of a GPU is mapped */
    ts_cuda *cuda;                   /* the GPU of the session's GPU pools; NULL: none was needed */
    ts_signals *signals;             /* mapped and pinned; NULL: no run was on a stream */
    struct ts_signals_watch *signals_watch; /* stream_signals.c's own; NULL without signals */
    uint64_t signals_there;
    atomic_uint runs_on_stream;  /* runs that were handed over to the daemon's stream */
    bool order_lost;             /* one may or may not have been */
    atomic_bool abandoned;       /* streams went on without them, since no daemon was at them */
    ts_transport transport;      /* that was asked for */
    ts_transport last_transport; /* of the last step's begin; of none: messages */
    ts_rings_memory *rings;      /* NULL: not open */
    uint32_t ring_blocks, ring_slabs, ring_ids; /* that they have room for */
    uint32_t ids_wanted;                        /* of tokens, by the largest begin so far */
    bool pools_are_new;                         /* one was opened that they may have no room for */
    int doorbell;
    uint32_t ring_submitted, ring_seen, ring_tag, spin_us;
    int spin_luck;   /* how often polling was worth it lately; -1: it wasn't */
    bool rings_lost; /* they can't be used, or not any more */
    /* For so long the last entry's completion was waited for, and it is yet to come: over what
     * would be asked next. Messages go instead until then. 0: it has come. */
    uint64_t ring_late_ms;
    ts_ring_entry posted;  /* the run that was posted last and is unanswered; op 0: none is */
    uint64_t refused_step; /* of a posted run that was refused, of which the caller hasn't heard */
    ts_ring_completion refusal;
    uint64_t ring_call;   /* the number of the last entry */
    bool ring_unanswered; /* the late one is of a begin, or of what makes `unanswered_seqs`
                           * sequences in the pool, and is to be undone */
    uint32_t unanswered_seqs, unanswered_pool; /* 0 sequences: a begin */
    uint64_t *unanswered_picks; /* of a selection: which sequence each pick is; NULL: all are new */
    ts_unanswered *unanswered;  /* the same by message, whose answers are yet to come */
    /* The numbers of such calls whose daemon has gone: the next one is told. */
    uint64_t given_up[TS_GIVEN_UP_MOST];
    uint32_t num_given_up;
    uint64_t *unaborted; /* steps whose abort had no answer, the newest last */
    uint32_t num_unaborted, room_unaborted;
    /* Called before each call, if it isn't NULL: undoes begins whose answers came late. */
    void (*settle)(ts_client *client);
    ts_exec exec; /* that was asked for, or that AUTO has come to */
    ts_exec last_exec;
    bool tried; /* a run has gone both ways */
    uint32_t threads;
    ts_attention *attention;        /* of local execution; NULL: none yet */
    struct ts_local *local_spare;   /* the last step's; NULL: none */
    struct ts_local_gpu *local_gpu; /* the same on a GPU */
    ts_last_error error;
    ts_last_error error_before; /* the call that is made, once `has_failed` */
    bool has_failed;            /* an attempt of the call */
};

/* A call was answered. */
static inline void ts_note_heard(ts_client *client)
{
    client->unheard = client->end_unheard = false;
}

/* Whether the present call tells an end that others of its kind had no answer to. */
static inline bool ts_only_tells(const ts_client *client)
{
    return client->end_unheard && (client->brief || client->aborts);
}

/* Whether it waits for no other daemon, and isn't asked again. */
static inline bool ts_is_brief(const ts_client *client)
{
    return client->brief || ts_only_tells(client);
}

/* What NNG and poll() take as a time: theirs end at INT32_MAX, 24 days, and a negative one is none.
 */
static inline int ts_int_ms(uint64_t ms)
{
    return ms < INT32_MAX ? (int)ms : INT32_MAX;
}

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
    bool has_ipc_handle;     /* of the only slab */
    unsigned char *base;     /* of block 0; reserved at the first need */
    ts_memory *reserved;     /* of a pool in host memory: what base is the start of */
    uint32_t *mapped;        /* per slab: generation that is mapped; 0: none; atomic */
    uint32_t *revoked;       /* per slab: the last generation that is others' */
    bool *written;           /* per slab: it is mapped writable */
    uint32_t *wanted;        /* per slab: generation that the daemon named last */
    struct ts_table *tables; /* by a sequence's index in the daemon; block_table_cache.c's own */
    uint32_t num_tables;
};

#endif
