#include "ring_joins.h"

bool ts_ring_joins_wait(ts_ring_joins *j, uint32_t count, uint64_t now_ns)
{
    if (count >= j->expected)
        return false;
    if (!j->waits) {
        j->waits = true;
        j->since_ns = now_ns;
    }
    return now_ns - j->since_ns < j->join_ns;
}

void ts_ring_joins_taken(ts_ring_joins *j, uint32_t count)
{
    j->waits = false;
    j->expected = count;
}
