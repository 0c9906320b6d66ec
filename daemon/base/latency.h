/*
 * How long requests took to be answered, counted by borders for a histogram.
 *
 * Thread: its owner's.
 */
#ifndef TS_LATENCY_H
#define TS_LATENCY_H

#include <stdint.h>

#define TS_LATENCY_BORDERS 17u

/* All 0 to start with. counts[i] is of requests up to border i, the last of those beyond all. */
typedef struct ts_latency {
    uint64_t counts[TS_LATENCY_BORDERS + 1], sum_ns;
} ts_latency;

/* Upper borders, in nanoseconds: 1 microsecond to 10 seconds. */
extern const uint64_t ts_latency_borders_ns[TS_LATENCY_BORDERS];

void ts_latency_add(ts_latency *latency, uint64_t nanoseconds);

#endif
