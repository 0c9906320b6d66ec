#include "rope.h"

#include <math.h>

void ts_rope_table(const ts_rope *r, uint32_t position, float *table)
{
    double log_theta = log2((double)r->theta);
    for (uint32_t i = 0; i < r->dims / 2; i++) {
        double angle = position * exp2(-2.0 * i / r->dims * log_theta);
        table[2 * i] = (float)cos(angle);
        table[2 * i + 1] = (float)sin(angle);
    }
}

void ts_rope_turn(const ts_rope *r, const float *table, float *row)
{
    for (uint32_t i = 0; i < r->dims / 2; i++) {
        uint32_t first = ts_rope_first(r, i), second = ts_rope_second(r, i);
        float x = row[first], y = row[second], c = table[2 * i], s = table[2 * i + 1];
        row[first] = x * c - y * s;
        row[second] = x * s + y * c;
    }
}
