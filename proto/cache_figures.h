/*
 * What the counters of a pool's prefix cache mean, for all that show them.
 */
#ifndef TS_CACHE_FIGURES_H
#define TS_CACHE_FIGURES_H

#include "tinyserve.pb-c.h"

/* Why cached blocks were evicted, in the order of PoolSummary's evicted_by_cause, and up to which
 * ages in seconds its evicted_by_age counts. */
#define TS_CACHE_CAUSES 5u
#define TS_CACHE_AGES 5u
extern const char *const ts_cache_causes[TS_CACHE_CAUSES];
extern const uint32_t ts_cache_ages[TS_CACHE_AGES];

/* Seconds from the last use of evicted blocks to their eviction, on average; 0 of none. */
double ts_cache_mean_age(const Tspb__PoolSummary *pool);

/* Tokens found of those asked for; 0 of none. */
double ts_cache_hit_rate(uint64_t found, uint64_t asked);

#endif
