/*
 * What Hopper's copy engine is told of a cache, so that it finds boxes in it: eights of tokens of a
 * block, whole rows, of one head's K or V in one layer (PTX ISA, "Tensor-map"). A launch of wgmma
 * comes with one.
 *
 * A row is a number of slabs of up to 128 bytes. Dimensions of the map: within a slab, within eight
 * tokens, slabs, eights of tokens, and last the place of a head's K or V in the cache, in units of
 * bytes that blocks, planes and heads are all multiples of. The map has the blocks that a launch
 * reads, and those between them: where it begins is to be mapped (doc/notebook.md). So a box lies
 * in shared memory as the products take it: eights of tokens, in each its slabs, in each eight
 * rows. What is to be widened first isn't swizzled.
 *
 * A sequence that is all new, none of whose tokens was in the cache before, is read from the run's
 * own k and v: by a box for all that a warp brings of a tile, or of eight tokens where the sequence
 * ends in between. The copy engine stores its tiles to its blocks, in boxes of the map. So nobody
 * writes them before the launch.
 */
#ifndef TS_GPU_BOX_MAP_H
#define TS_GPU_BOX_MAP_H

#include "device.h"

#include <cuda.h>
#include <stdint.h>

/* The lowest and the highest. */
typedef struct block_range {
    uint32_t first, last;
} block_range;

/* What depends on the blocks. */
typedef struct box_blocks {
    CUtensorMap map;
    uint32_t first_units; /* from block 0 to where the map begins */
} box_blocks;

typedef struct box_map {
    box_blocks among;
    uint32_t tokens; /* of a box, which divide a block and a tile; 0: there is no map */
    uint32_t block_units, plane_units, head_units;
} box_map;

/* Of these blocks of a cache that begins at `base`, which may be NULL if nobody is to read them.
 * tokens is 0 where there are no boxes: rows aren't whole slabs, or blocks not whole boxes. */
box_map ts_gpu_box_map_of(const ts_gpu *gpu, const ts_geometry *g, unsigned char *base,
                          block_range blocks);

/* A run's rows of k or v, as the copy engine is told of them, for boxes of eight of a head's rows:
 * [rows][kv_heads][head_dim], aligned to 16 bytes, of a cache's dtype that has boxes and 16 bits.
 * Returns whether there is a map. */
bool ts_gpu_eight_map_of(const ts_gpu *gpu, const ts_geometry *g, const void *base, uint32_t rows,
                         CUtensorMap *map);

/* The same for boxes of all rows that one warp brings of a tile, where a box of the cache has
 * `tokens`: such a box must not begin so that it ends behind the last row. There is none where rows
 * are shorter than a tile's. */
bool ts_gpu_many_map_of(const ts_gpu *gpu, const ts_geometry *g, const void *base, uint32_t rows,
                        uint32_t tokens, CUtensorMap *map);

/* What wgmma's launches have beside a gpu_call. */
typedef struct wgmma_call {
    box_map boxes;
    CUtensorMap eight[2], many[2]; /* the only run's own k and v */
    bool stores;                   /* sequences that are all new, and so `eight` is there */
    bool wide;                     /* `many` is there, too */
    bool by_heads;                 /* all pieces of a KV head, then the next one's; not FEW's */
    const box_blocks *among;       /* a persistent plan's, on the device; NULL: boxes.among */
    uint32_t *tickets; /* two, 0 between launches: pieces that were taken, blocks that found none */
    float4 *folds;     /* what blocks keep of pieces of several chunks: WGMMA_FOLD each, of each
                          thread that multiplies */
} wgmma_call;

#define BOX_SLAB 128u        /* bytes: as wide as the swizzle */
#define BOX_TOKENS_LEAST 16u /* fewer would be many boxes */

#define WGMMA_FP8_BOX 16u /* tokens of an fp8 cache's boxes: a warp widens one or two at once */

#endif
