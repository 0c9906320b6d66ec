/*
 * Rotary position embedding: pairs of a row's dimensions are turned by an angle that grows with the
 * token's position (Su et al., arXiv:2104.09864). Pair i of dims / 2 turns by
 * position * theta^(-2 i / dims), which is worked out in float64, so that far positions are as
 * exact as near ones.
 */
#ifndef TS_ROPE_H
#define TS_ROPE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct ts_rope {
    float theta;      /* 0: nothing is turned */
    uint32_t dims;    /* how many are turned, the first ones: even, at most head_dim */
    bool interleaved; /* pairs are (2 i, 2 i + 1); else (i, i + dims / 2) */
} ts_rope;

#if defined(__CUDACC__)
#define TS_ROPE_INLINE __host__ __device__ static inline
#else
#define TS_ROPE_INLINE static inline
#endif

/* The dimensions of pair i. */
TS_ROPE_INLINE uint32_t ts_rope_first(const ts_rope *r, uint32_t i)
{
    return r->interleaved ? 2 * i : i;
}
TS_ROPE_INLINE uint32_t ts_rope_second(const ts_rope *r, uint32_t i)
{
    return r->interleaved ? 2 * i + 1 : i + r->dims / 2;
}

/* Cosine and sine of each pair's angle at this position: dims numbers. */
void ts_rope_table(const ts_rope *rope, uint32_t position, float *table);

/* Turns a row in place. */
void ts_rope_turn(const ts_rope *rope, const float *table, float *row);

#endif
