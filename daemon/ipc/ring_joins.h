/*
 * How long attends that come by ring wait for others, to be one launch with them.
 *
 * Workers that were told together come back together, some microseconds apart. So as many as were
 * launched together last are waited for, but not for long: one whose worker does something else
 * meanwhile is waited for once, since the next launch has one less.
 */
#ifndef TS_RING_JOINS_H
#define TS_RING_JOINS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct ts_ring_joins {
    uint64_t join_ns;  /* that the first of them waits at most; 0: none waits */
    uint64_t since_ns; /* when the first of those that wait was seen */
    bool waits;        /* there are some */
    uint32_t expected; /* as many as were launched together last */
} ts_ring_joins;

/* Processors below which nobody is to wait: whoever polls meanwhile has one that those that are
 * waited for need. */
#define TS_RING_JOINS_PROCESSORS 4u

/* Whether the `count` attends that there are, one at least, wait for more. */
bool ts_ring_joins_wait(ts_ring_joins *joins, uint32_t count, uint64_t now_ns);

/* `count` were taken, to be launched. */
void ts_ring_joins_taken(ts_ring_joins *joins, uint32_t count);

#endif
