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
 */
#ifndef TS_SIGNALS_H
#define TS_SIGNALS_H

#include <stddef.h>
#include <stdint.h>

#define TS_SIGNALS_BYTES 4096u

typedef struct ts_signals {
    uint32_t submitted;
    uint32_t pad0[31];
    uint32_t completed;
    uint32_t pad1[31];
    uint32_t late;    /* the last one; 0: none was */
    uint32_t daemons; /* that have taken the page up */
    uint32_t pad2[30];
} ts_signals;

_Static_assert(offsetof(ts_signals, completed) == 128, "layout is shared by two programs");
_Static_assert(sizeof(ts_signals) <= TS_SIGNALS_BYTES, "fits its page");

#endif
