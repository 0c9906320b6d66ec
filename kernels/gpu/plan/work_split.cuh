/*
 * Which kernel each sequence of a plan gets and how its work is split, both by its own lengths
 * alone, and in which order pieces of work are launched. For plan.cu.
 */
#ifndef TS_GPU_WORK_SPLIT_CUH
#define TS_GPU_WORK_SPLIT_CUH

#include "tile_shapes.cuh"

extern "C" {
#include "plan.h"
}

namespace
{

#define V5_QUERIES 8u /* query tokens of a sequence that decodes, at most */
#define BLOCKS 256u   /* that a long sequence is cut into, about */
#define BATCHED 4096u
#define V5_FEW_ROWS 4u  /* of a sequence: their records and merging take little time */
#define TILE_QUERIES 4u /* query tokens from which on `auto` takes the tile kernel, without v5 */
#define TILE_TOKENS 64u /* chunks are whole tiles: the largest that a kernel has, wgmma aside */
#define BUCKETS 64u     /* of lengths of work, for sorting */
#define SPLIT_LISTS (LIST_COUNT - LIST_NARROW) /* those whose sequences are cut into chunks */

uint32_t ceil_div(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

uint32_t clamp(uint32_t x, uint32_t least, uint32_t most)
{
    return x < least ? least : x > most ? most : x;
}

bool is_wgmma(uint32_t list)
{
    return list == LIST_WGMMA || list == LIST_FEW;
}

/* Those that prefill takes; they don't write the new tokens' K and V themselves. */
bool has_many_rows(uint32_t list)
{
    return list == LIST_MMA || is_wgmma(list);
}

struct sorter {
    uint32_t longest;
    uint32_t next[BUCKETS]; /* where the bucket's next item goes */
};

uint32_t bucket_of(const sorter &s, uint32_t tokens)
{
    return BUCKETS - 1 - (uint32_t)((uint64_t)(tokens - 1) * BUCKETS / s.longest);
}

/* How one sequence is split: tiles of rows, each over chunks of the context. */
struct work_split {
    uint32_t rows, tiles;          /* of a tile */
    uint32_t tokens, chunks, last; /* of a chunk, and of the last */
    uint32_t together;             /* chunks of a piece: 1, or all */
};

/* Whether v5's chunks take long to end. fp32's rows are fewer for as many bytes. */
bool has_costly_ends(const ts_gpu_plan *p, ts_gpu_list list, uint32_t rows)
{
    return !has_many_rows(list) && rows > V5_FEW_ROWS && p->geometry.dtype != TS_DTYPE_FP32;
}

/* Tokens of a chunk, up to which half as many blocks do: as measured (doc/notebook.md). */
uint32_t half_most(const ts_geometry *g)
{
    return g->head_dim <= 64 ? 768 : g->dtype == TS_DTYPE_FP8_E4M3 ? 1024 : 1536;
}

/* Tokens of a chunk, at least, of sequences of up to BATCHED tokens and of longer ones. rows: of
 * the sequence. */
uint32_t least_tokens(const ts_gpu_plan *p, ts_gpu_list list, uint32_t rows, uint32_t tiles,
                      bool batch)
{
    uint32_t batched = p->geometry.dtype == TS_DTYPE_FP8_E4M3 ? 2048 : 1408; /* half the bytes */
    uint32_t least = !has_many_rows(list)                     ? (batch ? batched : 512)
                     : tiles > 1 || (is_wgmma(list) && batch) ? 2048
                                                              : 1024;
    if (p->geometry.kv_heads < 8 && !has_many_rows(list) &&
        (batch || !has_costly_ends(p, list, rows)))
        least = clamp(least * p->geometry.kv_heads / 8, 256, least);
    return least;
}

/* Chunks of one sequence, at most, that is to be so many blocks of work. */
uint32_t most_chunks(const ts_gpu_plan *p, ts_gpu_list list, uint32_t tiles, uint32_t blocks)
{
    uint64_t abreast = (uint64_t)p->geometry.kv_heads * tiles;
    uint32_t most = abreast < blocks ? blocks / (uint32_t)abreast : 1;
    return clamp(most, 1, has_many_rows(list) ? MMA_CHUNKS : V5_CHUNKS);
}

/*
 * How many tokens a chunk has. One long sequence is to be some 256 blocks of work (with every KV
 * head and tile), which fill the GPUs of today once, about evenly; a chunk isn't to be so small
 * that merging, or starting a block, would show. With more rows the end of a chunk takes longer.
 * Then half as many blocks, one on each processor, are as fast, up to a length of chunks beyond
 * which one block can't keep its processor's memory busy. A sequence of up to BATCHED tokens seldom
 * comes alone, and many of them are enough work without being cut that finely.
 */
uint32_t chunk_tokens(const ts_gpu_plan *p, const ts_attention_seq *s, ts_gpu_list list,
                      uint32_t tiles)
{
    uint32_t rows = s->q_tokens * (p->heads / p->geometry.kv_heads);
    uint32_t least = least_tokens(p, list, rows, tiles, s->kv_tokens <= BATCHED);
    uint32_t half = ceil_div(s->kv_tokens, most_chunks(p, list, tiles, BLOCKS / 2));
    bool halves = is_wgmma(list) || /* one block on a processor */
                  (has_costly_ends(p, list, rows) && half <= half_most(&p->geometry));
    uint32_t even = halves ? half : ceil_div(s->kv_tokens, most_chunks(p, list, tiles, BLOCKS));
    uint32_t tile = is_wgmma(list) ? WGMMA_TOKENS : TILE_TOKENS;
    uint32_t tokens = ceil_div(even < least ? least : even, tile) * tile;
    /* What is little more than a chunk is one: two would be merged. */
    if (!has_many_rows(list) && s->kv_tokens > tokens && s->kv_tokens <= tokens + tokens / 8)
        tokens = ceil_div(s->kv_tokens, tile) * tile;
    return tokens;
}

uint32_t rows_of_tile(const ts_gpu_plan *p, ts_gpu_list list)
{
    return list == LIST_WGMMA ? wgmma_rows(&p->geometry)
           : list == LIST_FEW ? WGMMA_FEW_ROWS
           : list == LIST_MMA ? mma_rows(&p->geometry)
                              : v5_rows(&p->geometry, list - LIST_NARROW);
}

uint32_t tiles_of(const ts_gpu_plan *p, uint32_t q_tokens, ts_gpu_list list)
{
    return ceil_div(q_tokens * (p->heads / p->geometry.kv_heads), rows_of_tile(p, list));
}

/*
 * Up to how many tokens a sequence's chunks are one piece of work, which adds them up without
 * writing any of them to memory: its results are the same bits, so this may depend on its company.
 * It is worth it where there are so many of them that processors have enough work without cutting
 * them, and a long one doesn't come to be the last. tokens: of the list's pieces.
 */
uint32_t whole_tokens(const ts_gpu_plan *p, ts_gpu_list list, uint64_t tokens)
{
    bool many = has_many_rows(list);
    uint64_t abreast = many ? 1 : 2; /* pieces on a processor */
    uint64_t share = tokens * p->geometry.kv_heads / (p->gpu->info.processors * abreast);
    uint64_t most = share * 2 / 3;
    if (is_wgmma(list) ? p->io_dtype == TS_DTYPE_FP32 : p->kernels[list].fold_bytes == 0)
        return 0;
    return most < UINT32_MAX ? (uint32_t)most : UINT32_MAX;
}

work_split work_split_of(const ts_gpu_plan *p, const ts_attention_seq *s, ts_gpu_list list)
{
    work_split c;
    c.rows = rows_of_tile(p, list);
    c.tiles = tiles_of(p, s->q_tokens, list);
    c.tokens = chunk_tokens(p, s, list, c.tiles);
    c.chunks = ceil_div(s->kv_tokens, c.tokens);
    c.last = s->kv_tokens - (c.chunks - 1) * c.tokens;
    c.together = s->kv_tokens <= p->whole_tokens[list] ? c.chunks : 1;
    return c;
}

/* Chunks of a sequence, the first ones, that a team may have in common (sharing.h): all rows see
 * all of them, and no new token lies there. */
uint32_t team_chunks(const ts_gpu_plan *p, const ts_attention_seq *s, ts_gpu_list list,
                     const work_split &c)
{
    if (list != LIST_NARROW || p->team_kernel.function == NULL || c.tiles > 1)
        return 0;
    return (s->kv_tokens - s->q_tokens) / c.tokens;
}

/* Tokens that a piece of work goes over: less where later ones aren't seen. */
uint32_t work_of(const ts_gpu_plan *p, const ts_attention_seq *s, const work_split &c,
                 uint32_t tile, uint32_t chunk)
{
    uint32_t group = p->heads / p->geometry.kv_heads;
    uint32_t last_query = ((tile + 1) * c.rows - 1) / group;
    uint32_t past = s->kv_tokens - s->q_tokens;
    uint32_t end = past + (last_query < s->q_tokens ? last_query + 1 : s->q_tokens);
    uint32_t from = chunk * c.tokens, most = c.together * c.tokens;
    return end <= from ? 1 : end - from < most ? end - from : most;
}

/* What pieces are sorted by, longest first, so that none starts late. With many rows those of a
 * sequence stay together, for they read the same K and V, which a cache then has. */
uint32_t rank_of(const ts_gpu_plan *p, const ts_attention_seq *s, ts_gpu_list list,
                 const work_split &c, uint32_t tile, uint32_t chunk)
{
    if (has_many_rows(list))
        return c.chunks > 1 ? c.tokens : c.last;
    return work_of(p, s, c, tile, chunk);
}

/* v5's kernel for `rows` rows, or the nearest that the device has; LIST_COUNT: none. */
ts_gpu_list v5_list(const ts_gpu_plan *p, uint32_t rows)
{
    uint32_t best = LIST_COUNT;
    for (uint32_t list = LIST_NARROW; list <= LIST_WIDE; list++) {
        if (p->kernels[list].function == NULL)
            continue;
        best = list;
        if (rows <= v5_rows(&p->geometry, list - LIST_NARROW))
            break;
    }
    return (ts_gpu_list)best;
}

ts_gpu_list tile_list(const ts_gpu_plan *p)
{
    return p->kernels[LIST_TILE].function != NULL ? LIST_TILE : LIST_DECODE;
}

/* Rows of a 16-bit or fp8 sequence, up to which it is decoded. With several tokens wgmma is faster
 * than v5 from fewer rows on. */
uint32_t decoded_rows(const ts_gpu_plan *p, uint32_t q_tokens)
{
    if (q_tokens == 1 || p->kernels[LIST_WGMMA].function == NULL)
        return v5_rows(&p->geometry, 2);
    return p->geometry.dtype == TS_DTYPE_FP8_E4M3 || p->kernels[LIST_FEW].function != NULL ? 8 : 16;
}

/* wgmma's kernel for a sequence of `rows` rows. */
ts_gpu_list wgmma_list(const ts_gpu_plan *p, uint32_t rows)
{
    return rows <= WGMMA_FEW_ROWS && p->kernels[LIST_FEW].function != NULL ? LIST_FEW : LIST_WGMMA;
}

ts_gpu_list list_of(const ts_gpu_plan *p, const ts_attention_seq *s)
{
    const ts_geometry *g = &p->geometry;
    uint32_t rows = s->q_tokens * (p->heads / g->kv_heads);
    switch (p->kernel) {
    case TS_KERNEL_AUTO:
        break;
    case TS_KERNEL_V5:
        return v5_list(p, rows);
    case TS_KERNEL_MMA:
        return LIST_MMA;
    case TS_KERNEL_WGMMA:
        return wgmma_list(p, rows);
    case TS_KERNEL_TILE:
        return LIST_TILE;
    default:
        return LIST_DECODE;
    }
    bool tensors = g->dtype != TS_DTYPE_FP32;
    /* With that many rows the tensor cores are waited for, not memory: then exactness has a price.
     * q in fp32 asks for it. */
    bool decodes = s->q_tokens <= V5_QUERIES && (!tensors || rows <= decoded_rows(p, s->q_tokens));
    bool exact = decodes || (tensors && p->io_dtype == TS_DTYPE_FP32);
    if (!exact && p->kernels[LIST_WGMMA].function != NULL)
        return wgmma_list(p, rows);
    if (!exact && p->kernels[LIST_MMA].function != NULL)
        return LIST_MMA;
    ts_gpu_list list = exact || tensors ? v5_list(p, rows) : LIST_COUNT;
    if (list != LIST_COUNT)
        return list;
    return s->q_tokens >= TILE_QUERIES ? tile_list(p) : LIST_DECODE;
}

} // namespace

#endif
