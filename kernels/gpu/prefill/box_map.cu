/* Makes the maps of box_map.h. Thread: any. */
#include "tile_shapes.cuh"

extern "C" {
#include "box_map.h"
}

/* Tokens of a box: a 16-bit cache's are as many as blocks allow. 0: rows aren't whole slabs, or
 * blocks aren't whole boxes. */
static uint32_t tokens_of_box(const ts_geometry *g)
{
    if (g->dtype == TS_DTYPE_FP8_E4M3) {
        const bool whole = g->head_dim == wgmma_dims(g) && g->block_tokens % WGMMA_FP8_BOX == 0;
        return whole ? WGMMA_FP8_BOX : 0;
    }
    uint32_t tokens = wgmma_tokens(g);
    while (tokens >= BOX_TOKENS_LEAST && g->block_tokens % tokens != 0)
        tokens /= 2;
    return tokens >= BOX_TOKENS_LEAST && g->head_dim * 2 % BOX_SLAB == 0 ? tokens : 0;
}

/* A 16-bit map of these sizes and steps in bytes. */
static bool encode(const ts_gpu *gpu, const void *base, cuuint32_t dims, const cuuint64_t *sizes,
                   const cuuint64_t *strides, const cuuint32_t *box, bool swizzled,
                   CUtensorMap *map)
{
    const cuuint32_t steps[] = {1, 1, 1, 1, 1};
    return gpu->driver.encode_map(
               map, CU_TENSOR_MAP_DATA_TYPE_UINT16, dims, (void *)base, sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
               CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

extern "C" box_map ts_gpu_box_map_of(const ts_gpu *gpu, const ts_geometry *g, unsigned char *base,
                                     block_range blocks)
{
    box_map m = {};
    const uint32_t element = sizeof(uint16_t); /* of the map; fp8 are two in one */
    const uint32_t cache_bytes = (uint32_t)ts_dtype_bytes(g->dtype);
    const bool widens = cache_bytes < element;
    const uint32_t tokens = tokens_of_box(g), row = g->head_dim * cache_bytes;
    const uint32_t slab = row < BOX_SLAB ? row : BOX_SLAB;
    const uint32_t slabs = wgmma_dims(g) * cache_bytes / slab;
    const size_t block_bytes = ts_geometry_block_bytes(g), plane_bytes = ts_geometry_plane_bytes(g);
    const size_t head_stride = ts_geometry_head_stride(g);
    const size_t token_stride = ts_geometry_token_stride(g);
    size_t unit = block_bytes | plane_bytes | head_stride;
    unit &= ~unit + 1; /* the highest power of 2 that divides them all */
    if (tokens == 0 || gpu->info.total_bytes / unit > INT32_MAX)
        return m;
    const uint32_t block_units = (uint32_t)(block_bytes / unit);
    const cuuint64_t units = (cuuint64_t)(blocks.last - blocks.first + 1) * block_units;
    const cuuint64_t sizes[] = {slab / element, 8, row / slab, g->block_tokens / 8, units};
    const cuuint64_t strides[] = {token_stride, slab, 8 * token_stride, unit};
    const cuuint32_t box[] = {slab / element, 8, slabs, tokens / 8, 1};
    if (!encode(gpu, base + blocks.first * block_bytes, 5, sizes, strides, box, !widens,
                &m.among.map))
        return box_map{};
    m.block_units = block_units;
    m.plane_units = (uint32_t)(plane_bytes / unit);
    m.head_units = (uint32_t)(head_stride / unit);
    m.among.first_units = blocks.first * block_units;
    m.tokens = tokens;
    return m;
}

extern "C" bool ts_gpu_eight_map_of(const ts_gpu *gpu, const ts_geometry *g, const void *base,
                                    uint32_t rows, CUtensorMap *map)
{
    const uint32_t row = g->head_dim * 2, slabs = wgmma_dims(g) * 2 / BOX_SLAB;
    const cuuint64_t sizes[] = {BOX_SLAB / 2, rows, row / BOX_SLAB, g->kv_heads};
    const cuuint64_t strides[] = {(cuuint64_t)g->kv_heads * row, BOX_SLAB, row};
    const cuuint32_t box[] = {BOX_SLAB / 2, 8, slabs, 1};
    return encode(gpu, base, 4, sizes, strides, box, true, map);
}

extern "C" bool ts_gpu_many_map_of(const ts_gpu *gpu, const ts_geometry *g, const void *base,
                                   uint32_t rows, uint32_t tokens, CUtensorMap *map)
{
    const uint32_t row = g->head_dim * 2, slabs = row / BOX_SLAB, half = wgmma_tokens(g) / 2;
    const uint32_t eights = (tokens > half ? tokens : half) / 8;
    const cuuint64_t whole = (cuuint64_t)g->kv_heads * row; /* a row of all heads */
    const cuuint64_t sizes[] = {BOX_SLAB / 2, 8, (cuuint64_t)g->kv_heads * slabs, eights, rows};
    const cuuint64_t strides[] = {whole, BOX_SLAB, 8 * whole, whole};
    const cuuint32_t box[] = {BOX_SLAB / 2, 8, slabs, eights, 1};
    return g->head_dim == wgmma_dims(g) && encode(gpu, base, 5, sizes, strides, box, true, map);
}
