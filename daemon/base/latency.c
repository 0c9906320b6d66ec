#include "latency.h"

const uint64_t ts_latency_borders_ns[TS_LATENCY_BORDERS] = {
    1000,    2500,    5000,    10000,    25000,    50000,     100000,     250000,     500000,
    1000000, 2500000, 5000000, 10000000, 25000000, 100000000, 1000000000, 10000000000};

void ts_latency_add(ts_latency *latency, uint64_t nanoseconds)
{
    uint32_t i = 0;
    while (i < TS_LATENCY_BORDERS && nanoseconds > ts_latency_borders_ns[i])
        i++;
    latency->counts[i]++;
    latency->sum_ns += nanoseconds;
}
