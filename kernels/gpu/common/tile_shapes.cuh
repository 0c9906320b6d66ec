/*
 * How many rows and tokens the kernels' tiles have. Plans cut work by it, and kernels are compiled
 * for it. A row is a query token x head of the group.
 */
#ifndef TS_GPU_TILE_SHAPES_CUH
#define TS_GPU_TILE_SHAPES_CUH

#include "common.cuh"

#define TILE_ROWS 32u /* query rows (query token x head of the group) of one prefill tile */

/* Rows (query token x head of the group) of a tile of v5's kernels: for few rows, some, many. */
static inline uint32_t v5_rows(const ts_geometry *g, uint32_t kind)
{
    static const uint32_t rows[2][3] = {{8, 32, 64}, {1, 8, 8}};
    return rows[g->dtype == TS_DTYPE_FP32][kind];
}

#define WHOLE_TILE 16u /* tokens of a tile of v5's kernels for few rows */

/* Whether such a tile always lies in one block. */
static inline bool holds_whole_tiles(const ts_geometry *g)
{
    return g->block_tokens % WHOLE_TILE == 0;
}

/* Rows of all members of a team. fp8's kernels need more warps, so have fewer registers. */
static inline uint32_t team_rows(const ts_geometry *g)
{
    return g->dtype == TS_DTYPE_FP8_E4M3 ? 16 : 32;
}

static inline uint32_t mma_rows(const ts_geometry *g) /* ... of mma */
{
    return g->head_dim <= 128 ? 128 : 64;
}

#define WGMMA_TOKENS 128u /* of wgmma's tiles, at most: chunks are whole ones */

static inline uint32_t
wgmma_dims(const ts_geometry *g) /* of its rows; behind head_dim they are 0 */
{
    return g->head_dim <= 64 ? 64 : g->head_dim <= 128 ? 128 : 256;
}

/* Rows of wgmma's tiles: of its groups, which have 64 each, three where registers allow. */
static inline uint32_t wgmma_rows(const ts_geometry *g)
{
    return g->head_dim <= 64 ? 192 : 128;
}

#define WGMMA_FEW_ROWS 64u /* of a sequence, at most, for its kernel for few */

static inline uint32_t wgmma_tokens(const ts_geometry *g) /* of its tiles */
{
    return g->head_dim > 128 ? WGMMA_TOKENS / 2 : WGMMA_TOKENS;
}

#define WGMMA_TICKETS 2u                  /* a launch's first counters: wgmma_call's tickets, */
#define OWN_COUNTERS (WGMMA_TICKETS + 1u) /* ... and gpu_call.arrived; then its pieces' */

/* Of a row of DIM dimensions: its sums, of two rows, and their maxima and sums of weights. */
#define WGMMA_FOLD(DIM) ((DIM) / 8 + 1)

/* What wgmma's blocks, one on each processor, keep of pieces of several chunks. */
static inline size_t wgmma_fold_floats(const ts_geometry *g, uint32_t processors)
{
    size_t threads = wgmma_rows(g) * 2;
    return processors * threads * WGMMA_FOLD(wgmma_dims(g)) * 4;
}

/* Chunks of a context, at most: for each, every row of a tile has a float in shared memory. */
#define V5_CHUNKS 128u
#define MMA_CHUNKS 64u

/* Whether v4, v5 and mma can load this geometry's rows: whole, aligned 16-byte vectors. */
static inline bool loads_vectors(const ts_geometry *g)
{
    return (size_t)g->head_dim * ts_dtype_bytes(g->dtype) % 16 == 0;
}

#endif
