/*
 * The next tile of K and V is asked for while one is worked on, into the second-level cache: a few
 * streams in different pages take turns, each going upwards by two lines, which the hardware's
 * prefetcher can join, and not faster than the lines of this tile are used, as a core has but so
 * many requests under way and stands still when it makes more (kernels/README.md).
 */
#ifndef TS_ATTENTION_STREAMS_H
#define TS_ATTENTION_STREAMS_H

#include "attention_item.h"

#define TS_STREAMS 8u                /* half of them in K's plane, half in V's */
#define TS_STREAM_STEP ((size_t)128) /* bytes of one stream's turn */

typedef struct ts_streams {
    const unsigned char *from[TS_STREAMS];
    uint32_t turn;                    /* whose it is */
    size_t offset, end;               /* from there, of all of them; the end of this stretch */
    uint32_t stretch, stretches;      /* which is next, of how many */
    uint32_t tokens;                  /* of a tile: a multiple of 4 */
    const unsigned char *const *rows; /* of the tile's K */
    const ts_attention_item *item;
} ts_streams;

/*
 * Points the streams at the next stretch, if there is one; else they stay, and ask for what has
 * come already. NHD: a quarter of the rows of K and of V, all heads of each, a quarter of the tile
 * apart. HND: a row of four heads of K and of V.
 */
static inline void ts_streams_stretch(ts_streams *s)
{
    s->offset = 0;
    if (s->stretch == s->stretches)
        return;
    const ts_geometry *g = &s->item->call->geometry;
    const size_t row_bytes = g->head_dim * ts_dtype_bytes(g->dtype);
    const size_t plane = ts_geometry_plane_bytes(g), head_stride = ts_geometry_head_stride(g);
    const uint32_t heads = s->item->head_count, half = TS_STREAMS / 2;
    const bool nhd = g->layout == TS_LAYOUT_NHD;
    for (uint32_t i = 0; i < half; i++) {
        uint32_t row = nhd ? i * (s->tokens / half) + s->stretch : s->stretch % s->tokens;
        uint32_t head = nhd ? 0 : s->stretch / s->tokens * half + i;
        head = head < heads ? head : heads - 1;
        s->from[2 * i] = s->rows[row] + (s->item->head_first + head) * head_stride;
        s->from[2 * i + 1] = s->from[2 * i] + plane;
    }
    size_t bytes = nhd ? heads * row_bytes : row_bytes;
    s->end = (bytes + TS_STREAM_STEP - 1) / TS_STREAM_STEP * TS_STREAM_STEP;
    s->stretch++;
}

/* Begins with a tile, whose rows of K are at `rows`; NULL: there is none, and nothing comes. */
static inline void ts_streams_begin(ts_streams *s, const unsigned char *const *rows)
{
    const uint32_t heads = s->item->head_count, half = TS_STREAMS / 2;
    const bool nhd = s->item->call->geometry.layout == TS_LAYOUT_NHD;
    s->rows = rows;
    s->turn = s->stretch = s->stretches = 0;
    s->end = TS_STREAM_STEP;
    for (uint32_t i = 0; i < TS_STREAMS; i++)
        s->from[i] = (const unsigned char *)s; /* any memory that is in the cache */
    if (rows != NULL)
        s->stretches = nhd ? s->tokens / half : (heads + half - 1) / half * s->tokens;
    ts_streams_stretch(s);
}

/* Asks for two lines, for two that were used. */
static inline __attribute__((always_inline)) void ts_streams_advance(ts_streams *s)
{
    const unsigned char *lines = s->from[s->turn] + s->offset;
    __builtin_prefetch(lines, 0, 2);
    __builtin_prefetch(lines + 64, 0, 2);
    s->turn = (s->turn + 1) % TS_STREAMS;
    if (s->turn == 0 && (s->offset += TS_STREAM_STEP) == s->end)
        ts_streams_stretch(s);
}

#endif
