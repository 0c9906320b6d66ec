/*
 * Two words through which the order between a worker's CUDA stream and the daemon's is kept on the
 * GPU: a page of memory that both processes map and pin. The worker's stream writes `submitted`
 * when q, k and v of its run number n lie in the exchange, and waits for `completed`; the daemon's
 * stream waits for `submitted`, works, and writes `completed`. Both are compared by (int32_t)(word
 * - n) >= 0.
 *
 * Each word has a cache line to itself. A worker that scribbles over them harms only its own runs:
 * the daemon reads `completed` from its own count. When a worker goes, the daemon writes
 * `submitted` itself; when the daemon goes for good, the worker's library writes `completed`:
 * nobody waits for the dead.
 *
 * Where the daemon's memory outlives it, the page does, too, and the next daemon goes on where
 * `completed` is: a run beyond it is done again, since its worker was never told. It counts
 * `daemons` up, by which the library sees that somebody is at it. A run that its worker did not
 * submit in time is written to `late` before `submitted` is forged for it, so that the next daemon
 * knows, too.
 *
 * A worker need not wait until a run is answered (TS_RUN_POSTED in its ring's entry): then `posted`
 * has the run before the ring has it. Where the daemon goes without having taken it, or the ring
 * does, the daemon finds it there, though its worker may be asleep until its stream is done: when
 * it takes over, when the session's worker is back or has a run that comes next, and each second. A
 * posted run that the daemon refuses keeps its number: `completed` comes to it in its turn, and its
 * step fails.
 */
#ifndef TS_SIGNALS_H
#define TS_SIGNALS_H

#include "layer_run.h"

#include <stddef.h>
#include <stdint.h>

#define TS_SIGNALS_BYTES 4096u

/* A run that the worker has put into its ring and goes on without its answer. The worker posts one
 * when the one before is answered. */
typedef struct ts_posted_run {
    uint32_t number; /* as the run's, written last; 0: none was posted */
    uint32_t pad;
    uint64_t step, call; /* as the ring entry's */
    ts_layer_run run;
} ts_posted_run;

typedef struct ts_signals {
    uint32_t submitted;
    uint32_t pad0[31];
    uint32_t completed;
    uint32_t pad1[31];
    uint32_t late;    /* the last one; 0: none was */
    uint32_t daemons; /* that have taken the page up */
    uint32_t pad2[30];
    ts_posted_run posted;
} ts_signals;

_Static_assert(offsetof(ts_signals, completed) == 128, "layout is shared by two programs");
_Static_assert(offsetof(ts_signals, posted) == 384, "layout is shared by two programs");
_Static_assert(sizeof(ts_signals) <= TS_SIGNALS_BYTES, "fits its page");

#endif
