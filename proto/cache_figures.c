#include "cache_figures.h"

const char *const ts_cache_causes[TS_CACHE_CAUSES] = {"room", "limit", "others", "resize", "drop"};
const uint32_t ts_cache_ages[TS_CACHE_AGES] = {1, 10, 60, 600, 3600};

double ts_cache_mean_age(const Tspb__PoolSummary *p)
{
    return p->evicted_blocks == 0 ? 0 : (double)p->evicted_age_sum_s / (double)p->evicted_blocks;
}

double ts_cache_hit_rate(uint64_t found, uint64_t asked)
{
    return asked == 0 ? 0 : (double)found / (double)asked;
}
