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
    const unsigned char *streams[TS_STREAMS]; /* where each goes on */
    uint32_t turn;                            /* whose turn it is */
    uint32_t steps;                           /* left of this stretch, for each stream */
    size_t due;                               /* bytes used and not yet asked for */
    const unsigned char *const *rows;         /* of the tile; NULL: nothing to fetch */
    uint32_t stretch, stretches;              /* which is next, of how many */
    uint32_t tokens;                          /* of a tile: a multiple of 4 */
    const ts_attention_item *item;
} ts_streams;

/*
 * Points the streams at the next stretch. NHD: a quarter of the rows of K and of V, all heads of
 * each, a quarter of the tile apart. HND: a row of four heads of K and of V.
 */
static inline void ts_streams_stretch(ts_streams *s)
{
    const ts_geometry *g = &s->item->call->geometry;
    const size_t row_bytes = g->head_dim * ts_dtype_bytes(g->dtype);
    const size_t plane = ts_geometry_plane_bytes(g), head_stride = ts_geometry_head_stride(g);
    const uint32_t heads = s->item->head_count, quarter = TS_STREAMS / 2;
    size_t bytes = row_bytes;
    for (uint32_t i = 0; i < quarter; i++) {
        uint32_t row, head = 0;
        if (g->layout == TS_LAYOUT_NHD) {
            row = i * (s->tokens / quarter) + s->stretch;
        } else {
            row = s->stretch % s->tokens;
            head = s->stretch / s->tokens * quarter + i;
            head = head < heads ? head : heads - 1;
        }
        s->streams[2 * i] = s->rows[row] + (s->item->head_first + head) * head_stride;
        s->streams[2 * i + 1] = s->streams[2 * i] + plane;
    }
    if (g->layout == TS_LAYOUT_NHD)
        bytes *= heads;
    s->steps = (uint32_t)((bytes + TS_STREAM_STEP - 1) / TS_STREAM_STEP);
    s->stretch++;
}

/* Begins with the tile of these rows; NULL: there is none. */
static inline void ts_streams_begin(ts_streams *s, const unsigned char *const *rows)
{
    const bool nhd = s->item->call->geometry.layout == TS_LAYOUT_NHD;
    const uint32_t quarter = TS_STREAMS / 2;
    s->rows = rows;
    s->turn = s->steps = s->stretch = 0;
    s->due = 0;
    s->stretches = rows == NULL ? 0
                   : nhd        ? s->tokens / quarter
                                : (s->item->head_count + quarter - 1) / quarter * s->tokens;
}

/* Asks for as much as was used: `bytes`. */
static inline __attribute__((always_inline)) void ts_streams_advance(ts_streams *s, size_t bytes)
{
    s->due += bytes;
    while (s->due >= TS_STREAM_STEP) {
        s->due -= TS_STREAM_STEP;
        if (s->steps == 0) {
            if (s->stretch == s->stretches)
                return;
            ts_streams_stretch(s);
        }
        const unsigned char *line = s->streams[s->turn];
        __builtin_prefetch(line, 0, 2);
        __builtin_prefetch(line + 64, 0, 2);
        s->streams[s->turn] = line + TS_STREAM_STEP;
        s->turn = (s->turn + 1) % TS_STREAMS;
        s->steps -= s->turn == 0;
    }
}

#endif
