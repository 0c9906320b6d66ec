/*
 * What Hopper's copy engine is told of a cache, so that it finds boxes in it: eights of tokens of a
 * block, whole rows, of one head's K or V in one layer (PTX ISA, "Tensor-map"). A launch of wgmma
 * comes with one.
 *
 * A row is a number of slabs of up to 128 bytes. Dimensions of the map: within a slab, within eight
 * tokens, slabs, eights of tokens, and last the place of a head's K or V in the cache, in units of
 * bytes that blocks, planes and heads are all multiples of. The map has the blocks that a launch
 * reads, and those between them. So a box lies in shared memory as the products take it: eights of
 * tokens, in each its slabs, in each eight rows. What is to be widened first isn't swizzled.
 */
#ifndef TS_GPU_BOX_MAP_CUH
#define TS_GPU_BOX_MAP_CUH

#include <cuda.h>
#include <stdint.h>

struct box_map {
    CUtensorMap map;
    uint32_t tokens; /* of a box, which divide a block and a tile; 0: there is no map */
    uint32_t block_units, plane_units, head_units;
    uint32_t first_units; /* from block 0 to where the map begins */
};

/* What wgmma's launches have beside a gpu_call. */
struct wgmma_call {
    box_map boxes;
    uint32_t *tickets; /* two, 0 between launches: pieces that were taken, blocks that found none */
    float4 *folds;     /* what blocks keep of pieces of several chunks: WGMMA_FOLD each, of each
                          thread that multiplies */
};

#define BOX_SLAB 128u        /* bytes: as wide as the swizzle */
#define BOX_TOKENS_LEAST 16u /* fewer would be many boxes */

/* Tokens of an fp8 cache's boxes: a warp widens one or two at once (fp8_tiles.cuh). */
#define WGMMA_FP8_BOX(DIM) ((DIM) > 128 ? 8u : 16u)

#endif
