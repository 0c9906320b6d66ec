/*
 * What carries out the engine's decisions: the pools' memory, the processor's and the devices'
 * kernels, and the queue of work whose runner owns the engine.
 *
 * Thread: the engine's owner of the moment (work_queue.h), but for the queue itself.
 */
#ifndef TS_EXEC_H
#define TS_EXEC_H

#include "books.h"
#include "done_words.h"
#include "engine.h"
#include "gpu_executor.h"
#include "host_executor.h"
#include "memory.h"
#include "store.h"
#include "work_queue.h"

#define TS_GPUS_MAX 16u

/* What a restart found when it compared all pools' memory with their checksums. */
typedef struct ts_exec_checked {
    bool done;
    uint64_t full, summed, wrong; /* blocks: all, those with a checksum, those that differ */
    uint64_t lost;                /* sequences that had a wrong block */
    double seconds;
} ts_exec_checked;

typedef struct ts_exec_gpu {
    ts_gpu *gpu;
    ts_gpu_executor *executor;
    ts_done_words *words;     /* of sessions with runs on streams */
    uint64_t *exchange_bytes; /* atomic; of its memory: what exchanges take, by tenant */
} ts_exec_gpu;

typedef struct ts_exec {
    ts_queue queue;
    void *owner; /* handed to the queue's work: the struct that the exec lies in */
    ts_engine *engine;
    ts_store *store; /* NULL: nobody holds anything */
    ts_books *books; /* NULL: the engine's state ends with the daemon */
    ts_memory *memory[TS_POOLS_MAX];
    ts_attention *attention;
    ts_host_executor *host;
    ts_exec_gpu gpus[TS_GPUS_MAX];
    uint32_t num_gpus;
    const ts_exec_gpu *gpu_of[TS_POOLS_MAX]; /* by pool; NULL: in host memory */
    struct ts_block_sums *sums;              /* NULL: there are none (block_sums.h) */
    bool verify;                             /* pools have checksums, where there are books */
    ts_exec_checked checked;                 /* by this daemon when it took over */
    struct ts_slab_supply *slabs;            /* NULL: none was ordered yet (slab_supply.h) */
    uint32_t submit_ms, join_us;             /* of the GPUs' executors */
    uint64_t tenant_exchange_bytes;          /* of each GPU's memory; 0: a quarter of it */
    void (*device_failed)(const char *why);
    struct ts_step_plan **step_plans; /* by a step's index; NULL: none yet (step_work.c) */
    uint32_t num_step_plans;
    struct ts_step_job *live_jobs; /* with the kernels (step_work.c) */
    ts_work sweep;                 /* goes on with what the engine frees bit by bit */
    bool sweeping;                 /* it is in the queue */
    ts_work wake;                  /* goes on with sessions that waited and were woken */
    bool waking;                   /* it is in the queue */
    void (*woken)(void *owner);
    /* The slab's memory on a GPU is given up: whoever maps it must unmap it. */
    void (*slab_goes)(void *owner, uint32_t pool, uint32_t slab);
    /* Runs have ended, or something was freed: whoever waited for that may go on. */
    void (*resumed)(void *owner);
} ts_exec;

/* Ends what has had its time, where no command came meanwhile. */
void ts_exec_tick(ts_exec *exec);

/* Applies the command to the engine, as of now, and has what is freed bit by bit go on. */
void ts_exec_apply(ts_exec *exec, const ts_command *command, ts_answer *answer);

/* Has `woken` called if sessions that waited are woken. */
void ts_exec_look_for_woken(ts_exec *exec);

/* Called when the slab's memory is renewed or dropped: has `slab_goes` called if others may map it
 * in such a way that it wouldn't come free. */
void ts_exec_slab_goes(ts_exec *exec, uint32_t pool, uint32_t slab);

/* Something couldn't be had for the pool, perhaps because its device is lost. True: the request
 * waits for the next daemon, since this one ends. */
bool ts_exec_leaves_to_next(ts_exec *exec, uint32_t pool);

/* Gives back pools' memory, devices, kernels and the engine. No job is under way, the plans
 * (step_work.h) and the executors are freed. */
void ts_exec_fini(ts_exec *exec);

#endif
