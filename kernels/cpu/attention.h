/*
 * Paged attention on host memory: writing new K and V into their slots, copying blocks, and causal
 * attention of any number of query tokens over any cached length, for many sequences in one call.
 * Knows no sequence object and no socket: it is given block tables.
 *
 * Numbers: fp32 arithmetic whatever the cache holds, online softmax over tiles of 16 tokens (on the
 * tile unit: of 64 to 256 where a query sees all of them) and parts of 1024 tokens whose borders
 * depend on the token's position alone. One (query token, head) therefore comes out with the same
 * bits whatever else is in the call and however many threads work on it; different instruction sets
 * (`ts_attention_isa`) differ in the last bits.
 */
#ifndef TS_ATTENTION_H
#define TS_ATTENTION_H

#include "attention_call.h"
#include "threads.h"

/* Which instructions to use. AMX: AVX-512, and the tile unit for fp8 and bf16 (ts_amx_takes). */
typedef enum ts_isa {
    TS_ISA_AUTO = 0,
    TS_ISA_PORTABLE,
    TS_ISA_AVX2,
    TS_ISA_AVX512,
    TS_ISA_AMX,
    TS_ISA_NEON
} ts_isa;
#define TS_ISA_LAST TS_ISA_NEON

const char *ts_isa_name(ts_isa isa);

/* The best that this processor has (AUTO), or `isa` itself if the processor has it, else AUTO. */
ts_isa ts_isa_resolve(ts_isa isa);

/* Owns threads and scratch memory. Thread: one call at a time. */
typedef struct ts_attention ts_attention;

/* threads 0: all processors. NULL if out of memory. */
ts_attention *ts_attention_new(uint32_t threads, ts_isa isa);
void ts_attention_free(ts_attention *attention);
uint32_t ts_attention_threads(const ts_attention *attention);
ts_isa ts_attention_isa(const ts_attention *attention);

/*
 * Writes every sequence's new K and V (where given), then attends. TS_ENOMEM: no scratch memory,
 * nothing attended. The block tables and sizes are trusted: check before.
 */
ts_status ts_attention_run(ts_attention *attention, const ts_attention_call *call);

/*
 * A call that is run bit by bit, with others between: the results have the same bits. `call`'s
 * sequences and tables must stay until the task is freed. NULL: out of memory.
 */
typedef struct ts_attention_task ts_attention_task;
ts_attention_task *ts_attention_task_new(ts_attention *attention, const ts_attention_call *call);
void ts_attention_task_free(ts_attention_task *task);

/*
 * Goes on with it until it is done, or until `pause` says so, which is asked between two items of
 * work of at most TS_ITEM_WORK multiplications each, by several threads. *done: nothing is left.
 */
#define TS_ITEM_WORK ((uint64_t)1 << 26)
ts_status ts_attention_task_run(ts_attention_task *task, ts_threads_pause_fn pause, void *pause_arg,
                                bool *done);

/* Multiplications that a call takes, about. */
double ts_attention_work(const ts_attention_call *call);

/* Makes calls under way and later ones return TS_ECONN soon, their outputs unfinished. Any thread.
 */
void ts_attention_cancel(ts_attention *attention);

/* Copies whole blocks of block_bytes. No dst may be another copy's src or dst. */
void ts_attention_copy_blocks(ts_attention *attention, unsigned char *base, size_t block_bytes,
                              const ts_block_copy *copies, uint32_t num_copies);

/*
 * The reference: the same attention (k and v of the sequences are ignored: nothing is written) in
 * float64 and plain loops, on the stored values. out is [q_tokens][heads][head_dim] of one
 * sequence, lse (may be NULL) [q_tokens][heads]. Returns TS_ENOMEM without scratch memory.
 */
ts_status ts_attention_reference(const ts_attention_call *call, const ts_attention_seq *seq,
                                 double *out, double *lse);

#endif
