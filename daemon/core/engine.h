/*
 * The engine: all state of the daemon, changed by commands one at a time.
 *
 * ts_engine_apply is a pure function of the state and the command: no clock, no I/O, no randomness,
 * so the same commands always give the same state and the same answers. What a command needs from
 * outside (memory for a slab, a kernel to run) is in its answer, for the caller to do:
 *
 * - TS_NEED_SLABS: nothing was changed, except that some of what is cached may have been given up;
 *   renew the memory of ts_engine_next_slab's slab, apply TS_OP_SLAB_GRANT for it, and apply the
 *   command again.
 * - TS_NEED_SWEEP: no more than that was changed; what is wanted is being freed bit by bit. Apply
 *   the command again after TS_OP_SWEEP.
 * - TS_WAITS: the command may wait, and does (waits.h): apply it again when ts_engine_woken tells
 * its session, or without `wait` when its time is over.
 * - a step that was begun with copies, or a run: hand it to the kernels, and apply TS_OP_STEP_DONE
 *   when they are done.
 *
 * Thread: the one that owns the engine.
 */
#ifndef TS_ENGINE_H
#define TS_ENGINE_H

#include "claims.h"
#include "layer_run.h"
#include "session.h"
#include "step.h"

#include "gpu.h"

#define TS_POOLS_MAX 64u
#define TS_TENANTS_MAX 4096u
#define TS_MESSAGE_BYTES 232
#define TS_EXCHANGE_ALIGN 64u
#define TS_NEED_SLABS ((ts_status)100) /* never leaves the daemon */
#define TS_NEED_SWEEP ((ts_status)101) /* the same */
#define TS_WAITS ((ts_status)102)      /* the same */
#define TS_SWEEP_ENTRIES (1u << 15)    /* ... that are freed at a time */
#define TS_ENTRIES_PER_BLOCK 16u       /* of block tables, for each block of a pool */
#define TS_OPERATOR_SESSIONS 8u        /* the last ones, that are for operators */
#define TS_TICKETS_MAX 1024u           /* of one tenant */
#define TS_TICKET_MS 30000u            /* that a ticket is good for, unless another time is named */
#define TS_TICKET_MS_MAX 3600000u      /* ... at most */
#define TS_STEP_CRASHES 2u             /* of the daemon, that runs of a step may be under way at */
#define TS_LIST_MAX 200u               /* kept sequences that one answer tells of */

typedef enum ts_op {
    TS_OP_NONE,
#define OPERATION(name, ...) TS_OP_##name,
#include "operations.inc.h"
#undef OPERATION
    TS_OP_COUNT
} ts_op;

typedef struct ts_engine_limits {
    uint32_t sessions;          /* live at once */
    uint32_t tenant_sessions;   /* ... of one tenant that is no operator; 0: all */
    uint32_t session_sequences; /* that one session may own */
    uint32_t session_steps;     /* that one session may have open */
    uint32_t step_runs;         /* that one step may have in flight */
    uint64_t session_blocks; /* block table entries of a session's sequences and steps; 0: 16 times
                              * the blocks of the pool that it asks for more in */
    uint32_t batch;          /* sequences in one command */
    uint32_t step_tokens;    /* new tokens in one step */
    uint64_t exchange_bytes;
    uint32_t first_generation; /* of ids: random, for each daemon; less than 2^31 */
    uint64_t hash_seed;        /* of prefix indexes: random, for each daemon */
} ts_engine_limits;

/* A namespace of the prefix index; no bytes: the pool's own, its configuration's `model`. */
typedef struct ts_space_name {
    const void *bytes;
    size_t count;
} ts_space_name;

/* Who asks for something: a session, and the call's number by its client's count. */
typedef struct ts_caller {
    uint64_t session, call; /* 0: nobody, and it has none */
} ts_caller;

/* Pointers belong to whoever applies it, and are read only meanwhile. */
typedef struct ts_command {
    ts_op op;
    uint64_t session; /* who asks, operators for their orders included; not for SESSION_OPEN,
                       * STEP_DONE, SLAB_GRANT */
    uint32_t pool;    /* where the command has one */
    uint64_t now_ms;  /* when it is given, by a clock that only goes on: the engine's time from now
                       * on, unless that is later already */
    bool again;       /* it was answered TS_WAITS before */
    uint64_t call;    /* its number by the client's count, which only grows; 0: it has none */
    union {
        struct {
            uint32_t uid, pid;
            uint64_t process_started;
            const char *program;
            bool is_operator;
            uint8_t token[TS_SECRET_BYTES], nonce[TS_SECRET_BYTES];
        } session_open;
        struct {
            bool quarantine; /* blocks that its kernels may yet write stay until SESSION_GONE */
            ts_caller by;    /* the operator who ends it; all 0: nobody does */
        } session_close;
        struct {
            uint64_t bytes;
            bool other_memory; /* than the last one: it may be smaller */
            ts_exchange_source source;
        } exchange_open;
        struct {
            const char *name;
            bool writable;
        } pool_open;
        struct {
            uint32_t count;
            ts_space_name space;
        } seq_create;
        struct {
            const uint32_t *tokens, *counts; /* of all prompts, one after another; of each */
            uint32_t count;                  /* prompts */
            ts_space_name space;
            bool dry;  /* tells what is there, and makes no sequences */
            bool wait; /* for what other sessions compute of it */
        } seq_match;
        struct {
            uint64_t parent;
            uint32_t count, length;
            bool has_length;
        } seq_fork;
        struct {
            const uint64_t *seqs;
            const uint32_t *lengths; /* SEQ_TRUNCATE */
            uint32_t count;
            bool by_counts; /* `lengths` are tokens to be dropped */
            bool forget;    /* SEQ_FREE: what no other sequence uses isn't cached */
        } seq_batch;        /* SEQ_FREE, SEQ_TRUNCATE, SEQ_LENGTHS */
        struct {
            const uint64_t *seqs;
            uint32_t count;
            const uint32_t *from; /* which of them each new one continues */
            uint32_t picked;
        } seq_select;
        struct {
            uint64_t seq;
            const char *name;
            uint64_t ttl_ms; /* 0: for ever */
            bool replace;    /* what is kept under the name, if anything is, is freed */
        } seq_keep;          /* SEQ_ATTACH uses the name */
        struct {
            uint64_t seq;
            uint64_t ttl_ms;                 /* 0: TS_TICKET_MS */
            uint8_t ticket[TS_TICKET_BYTES]; /* random: nobody can guess it */
        } seq_ticket;
        struct {
            uint8_t ticket[TS_TICKET_BYTES];
        } seq_redeem;
        struct {
            const char *prefix, *after; /* of the names to be told; the name to go on after */
            uint32_t limit;             /* 0: TS_LIST_MAX, the most */
        } seq_list;
        struct {
            uint64_t seq;
            uint32_t first, count;
        } seq_blocks;
        struct {
            const uint64_t *seqs;
            const uint32_t *new_tokens;
            uint32_t count, heads, io_dtype;
            float scale;
            bool append;
            ts_kernel kernel;       /* TS_KERNEL_AUTO: the pool's */
            const uint32_t *tokens; /* ids of all new tokens, in order; NULL: none are known */
            bool no_new_slabs;      /* there is no memory for them: what is cached makes room */
            bool wait;              /* for room */
            bool by_worker;         /* its own kernels attend */
            int32_t priority;       /* -1, 0 or 1: of what is cached of it */
        } step_begin;
        struct {
            uint64_t step;
            ts_layer_run run;
        } step_run;
        struct {
            uint64_t step;
            const uint32_t *accepted; /* NULL: all */
            uint32_t count;
            bool once_idle; /* an abort: as soon as none of its runs is in flight */
        } step_end;         /* STEP_COMMIT, STEP_ABORT */
        struct {
            uint64_t step;
            uint32_t layer;   /* that was run; TS_NONE: the copies were made */
            ts_status status; /* what came of it */
            bool on_stream;   /* it was a run on a stream, with this number */
            bool undone;      /* ... that no kernel got: its number is free again */
            uint32_t number;
            bool refused; /* it was posted by the session (proto/signals.h) and isn't accepted: it
                             keeps its number, and its step, if there is one, has failed */
        } step_done;
        struct {
            uint32_t slab, tenant;
        } slab_grant; /* SLAB_LOST uses the slab */
        struct {
            uint32_t block;
        } block_lost;
        struct {
            bool crashed; /* by what it did itself, and not by a kill */
        } restarted;
        struct {
            uint64_t seq;
        } seq_remove;
        struct {
            bool has_uid, has_space; /* of all else */
            uint32_t uid;
            ts_space_name space;
        } cache_drop;
        struct {
            bool on;
        } cache_set, drain;
        struct {
            const struct ts_pool_config *config; /* POOL_QUOTAS: as it is, with other quotas */
        } pool_add, pool_quotas;
        struct {
            const ts_engine_limits *limits; /* but for what only a new engine takes */
        } limits;
        struct {
            uint32_t num_blocks; /* made whole slabs, or all that the pool may have */
        } pool_resize;
    };
} ts_command;

/* A refusal in numbers, in the units of its sentence; 0: does not apply. */
typedef struct ts_amounts {
    uint64_t needed; /* what the command would take */
    uint64_t free;   /* how much of it is available */
    uint64_t limit;  /* that would be passed */
    /* Where a step finds no room: blocks of the tenant's that are cached, and pinned, and that
     * others use. */
    uint64_t cached, pinned, others;
} ts_amounts;

/* What a tenant has of a pool, in blocks. */
typedef struct ts_room {
    uint64_t blocks;    /* of the pool */
    uint64_t available; /* that a step could take now, cached ones that it would evict included */
    uint64_t used, cached, pinned, limit;
    uint64_t others; /* that other tenants use */
    uint32_t sequences, waiting;
    uint64_t asked_tokens, found_tokens; /* of prompts that were matched */
} ts_room;

/* Pointers are the engine's and good until the next command is applied. */
typedef struct ts_answer {
    ts_status status;
    ts_amounts amounts;
    char message[TS_MESSAGE_BYTES]; /* empty if status is TS_OK */
    union {
        uint64_t session; /* SESSION_OPEN */
        uint32_t pool;    /* POOL_OPEN, POOL_ADD */
        struct {
            const uint64_t *seqs;
            uint32_t count, length;
        } seqs; /* SEQ_CREATE, SEQ_FORK, SEQ_SELECT, SEQ_ATTACH, SEQ_REDEEM */
        struct {
            const uint32_t *lengths;
            uint32_t count;
        } lengths;
        struct {
            const uint64_t *seqs; /* NULL: of a dry match */
            const uint32_t *lengths;
            const uint32_t *twins; /* of each prompt, the earlier one of this match that will
                                    * compute what it lacks, or itself; NULL: of a dry match */
            uint32_t count;
        } matched; /* SEQ_MATCH */
        struct {
            const char *const *names;
            const uint64_t *seqs, *left_ms; /* 0: for ever */
            const uint32_t *lengths, *blocks;
            uint32_t count;
            const char *next; /* the name to go on after; empty: these were the last */
        } kept;               /* SEQ_LIST */
        struct {
            const uint32_t *blocks;
            uint32_t count, length;
        } blocks; /* SEQ_BLOCKS */
        struct {
            const ts_step *step; /* NULL when an append was committed at once */
            const uint32_t *starts, *counts, *blocks;
            uint32_t num_seqs, num_blocks;
            const ts_block_copy *copies; /* to be made before the step's first run */
            uint32_t num_copies;
        } begun;
        const ts_step *step; /* STEP_RUN: in flight until STEP_DONE */
        ts_room room;        /* POOL_ROOM */
        uint64_t dropped;    /* CACHE_DROP: blocks that are forgotten, or will be; SLAB_LOST,
                              * BLOCK_LOST: sequences */
        struct {
            uint32_t pool, tenant;
        } need; /* TS_NEED_SLABS */
    };
} ts_answer;

/* Whether clients may map a pool's slabs writable. */
typedef enum ts_client_write { TS_CLIENT_WRITE_NONE, TS_CLIENT_WRITE_ALL } ts_client_write;

/* Whether a pool has a prefix index. */
typedef enum ts_cache_mode { TS_CACHE_ON, TS_CACHE_OFF } ts_cache_mode;

typedef struct ts_pool_config {
    char name[64];
    ts_geometry geometry;
    uint32_t num_blocks, slab_blocks; /* num_blocks: to begin with (ts_pool_init) */
    uint32_t max_blocks;              /* that it may be given */
    uint32_t sequences_max;
    uint32_t sequence_tokens_max;
    uint64_t tenant_blocks_max; /* blocks one tenant may use */
    /* Of one tenant; 0: no limit of its own */
    uint32_t tenant_sequences_max;
    uint64_t tenant_entries_max; /* in the block tables of its sequences */
    uint64_t tenant_pinned_max;  /* blocks that its kept sequences refer to */
    ts_client_write client_write;
    ts_cache_mode cache;
    char model[TS_NAMESPACE_BYTES_MAX + 1]; /* the namespace of sequences that name none; empty:
                                             * they have none */
    bool warp_groups;                       /* of its GPU: ts_gpu_info */
    bool on_gpu, mps;
    ts_kernel kernel;            /* of a GPU */
    char device[32], memory[16]; /* for people: where the pool is and what provides it */
    char device_name[96];
    uint8_t device_uuid[TS_GPU_UUID_BYTES];
} ts_pool_config;

typedef struct ts_engine_pool {
    ts_pool_config config; /* no name: there is no pool here (any more) */
    ts_pool_books books;
    ts_sequences seqs;
    uint32_t open_steps;
    uint32_t waiting;                    /* sessions (waits.h) */
    ts_wait_list room;                   /* those that wait for blocks */
    uint32_t room_turn;                  /* the tenant whose turn is next */
    uint64_t asked_tokens, found_tokens; /* of prompts that were matched, dry matches aside */
} ts_engine_pool;

typedef struct ts_engine {
    ts_engine_limits limits;
    ts_engine_pool *pools;
    uint32_t num_pools;        /* places: some may be empty */
    uint32_t live_pools;       /* pools */
    uint32_t *tenants;         /* uid of each */
    uint32_t *tenant_sessions; /* live ones of each */
    uint32_t present_tenants;  /* that have any */
    uint32_t num_tenants;
    ts_session *sessions;
    uint32_t num_sessions, live_sessions, free_session;
    bool draining;  /* no sessions are opened but operators' */
    ts_step *steps; /* an array of entries; a step is told by id */
    uint32_t num_steps, free_step, live_steps;
    uint64_t tokens_committed;
    /* Of all that was ever stored: what restarts had to give up. */
    uint64_t wrong_blocks;   /* that didn't hold what was stored in them */
    uint64_t lost_sequences; /* that had one, or a block in memory that was gone */
    ts_claims claims;
    uint32_t *tenant_claim_ids; /* token ids in the claims of each */
    ts_wait_list woken;
    uint32_t waiting_for_room;      /* sessions */
    uint64_t now_ms;                /* the latest of the commands' times */
    bool wants_sweep;               /* a command waits for its next bit */
    uint32_t closing;               /* the first session that closes bit by bit; TS_NONE: none */
    struct ts_engine_grave *graves; /* sequences of pools that were removed */
    /* what answers point to */
    uint64_t *out_ids;
    uint32_t *out_words;
    ts_block_copy *out_copies;
    const char **out_names;
    size_t out_names_capacity, out_ids_capacity, out_words_capacity, out_copies_capacity;
} ts_engine;

/* Fills in limits that are far from any use's needs but bound the daemon's memory. */
void ts_engine_default_limits(ts_engine_limits *limits);

ts_engine *ts_engine_new(const ts_engine_limits *limits);
void ts_engine_free(ts_engine *engine);

/* Where such a pool would be added; TS_EINVAL or TS_EEXIST with a sentence in `why` if it can't be.
 */
ts_status ts_engine_pool_place(const ts_engine *engine, const ts_pool_config *config,
                               uint32_t *index, char *why, size_t why_bytes);

/* Whether there is a pool in this place. */
bool ts_engine_has_pool(const ts_engine *engine, uint32_t pool);

/* The pool of this name, or the only one if it is empty; TS_NONE, and the answer refuses. */
uint32_t ts_engine_pool_named(const ts_engine *engine, const char *name, ts_answer *answer);

void ts_engine_apply(ts_engine *engine, const ts_command *command, ts_answer *answer);

/* Whether kernels of the session's process may be writing into blocks of its open steps. */
bool ts_engine_session_writes(const ts_engine *engine, uint64_t session);

/* The session whose command the caller applies again next; 0: there is none. */
uint64_t ts_engine_woken(const ts_engine *engine);

/* Whether something is freed bit by bit, or the time of something has ended: TS_OP_SWEEP goes on
 * with it. */
bool ts_engine_sweeps(const ts_engine *engine);

/* Whether the time of something ends by then. */
bool ts_engine_ends_by(const ts_engine *engine, uint64_t now_ms);

/* The slab whose memory to renew for TS_NEED_SLABS. */
uint32_t ts_engine_next_slab(const ts_engine *engine, uint32_t pool, uint32_t tenant);

/* Whether the tenant should be granted a slab that nobody had, before it needs one. */
bool ts_engine_wants_spare(const ts_engine *engine, uint32_t pool, uint32_t tenant);

/* The live session, or NULL. */
ts_session *ts_engine_session(const ts_engine *engine, uint64_t id);
uint64_t ts_engine_session_id(const ts_engine *engine, uint32_t index);

/* Fills in `answer` as a refusal. */
void ts_refuse(ts_answer *answer, ts_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The same of a request for `needed` more beside `used`, where `limit` is the most. */
void ts_refuse_more(ts_answer *answer, ts_status status, uint64_t used, uint64_t needed,
                    uint64_t limit, const char *format, ...) __attribute__((format(printf, 6, 7)));

/* The same of a number, `needed`, that is out of its range, whose most is `limit`. */
void ts_refuse_beyond(ts_answer *answer, ts_status status, uint64_t needed, uint64_t limit,
                      const char *format, ...) __attribute__((format(printf, 5, 6)));

/* Makes room for `count` things of `bytes` in *memory, which may move. False: no memory. */
bool ts_engine_grow(void **memory, size_t *capacity, size_t count, size_t bytes);

/* Whether it is the session's last run on a stream, asked for again: its answer was lost with an
 * earlier daemon. */
bool ts_engine_run_is_known(const ts_engine *engine, const ts_command *run);

/* Runs of the step that may be in flight: on a GPU, all layers at least. */
uint32_t ts_engine_step_runs_max(const ts_engine *engine, const ts_step *step);

/* The tenant's session whose opening had this nonce (not all 0); NULL: there is none. */
ts_session *ts_engine_session_of(const ts_engine *engine, uint32_t uid,
                                 const uint8_t nonce[TS_SECRET_BYTES]);

/* The copies that the step was begun with: those of *count sequences at least fit into `copies`. */
void ts_engine_step_copies(const ts_engine *engine, const ts_step *step, ts_block_copy *copies,
                           uint32_t *count);

/* The open step, or NULL. */
ts_step *ts_engine_find_step(const ts_engine *engine, uint64_t id);

#endif
