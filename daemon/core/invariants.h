/*
 * Whether the engine's books agree with each other. Reads, changes nothing; costs time in
 * proportion to all sequences and blocks, and needs a state that stands still.
 *
 * Thread: the engine's.
 */
#ifndef TS_INVARIANTS_H
#define TS_INVARIANTS_H

#include "engine.h"

/* Calls `problem` with a sentence for each contradiction found; returns how many objects were
 * looked at, 0 if there was no memory to look. */
uint64_t ts_invariants_check(const ts_engine *engine,
                             void (*problem)(void *arg, const char *sentence), void *arg);

#endif
