/* Inside kernels/gpu: how many blocks of v5's kernels for few rows share a processor, and which of
 * the two for plain calls a launch takes for that. */
#ifndef TS_GPU_WAVES_H
#define TS_GPU_WAVES_H

#include <stdbool.h>
#include <stdint.h>

/* Of 16-bit caches and rows of 65 to 128 dimensions; and of the kernel that takes less of a
 * processor (V5_CLOSE), a little slower by itself. */
#define V5_BLOCKS 3u
#define V5_CLOSE_BLOCKS 4u

/* Times that all places are taken, the last time perhaps in part. */
static inline uint64_t waves_of(uint64_t blocks, uint64_t places)
{
    return (blocks + places - 1) / places;
}

/*
 * Whether V5_CLOSE is the faster one: where it spares a launch its last wave, for a block by itself
 * takes a quarter of the time that it takes among all others. Not where pieces differ in length, of
 * which the short ones come last and fill in; and of more waves than two, one counts for less than
 * what V5_CLOSE is slower by (doc/notebook.md). Tokens of the shortest piece and of the longest.
 */
static inline bool is_close_faster(uint64_t blocks, uint32_t processors, uint32_t shortest,
                                   uint32_t longest)
{
    const uint64_t close = waves_of(blocks, (uint64_t)processors * V5_CLOSE_BLOCKS);
    return close < waves_of(blocks, (uint64_t)processors * V5_BLOCKS) && close <= 2 &&
           shortest >= longest / 2;
}

#endif
