#include "attention_streams.h"

/* NHD: a stretch is a quarter of the rows of K and of V, all heads of each, a quarter of the tile
 * apart. HND: a row of four heads of K and of V. */
void ts_streams_stretch(ts_streams *s)
{
    if (s->stretch == s->stretches) {
        for (uint32_t i = 0; i < TS_STREAMS; i++)
            s->at[i] -= TS_STREAM_STEP;
        s->steps = 1;
        return;
    }
    const ts_geometry *g = &s->item->call->geometry;
    const size_t row_bytes = g->head_dim * ts_dtype_bytes(g->dtype);
    const size_t plane = ts_geometry_plane_bytes(g), head_stride = ts_geometry_head_stride(g);
    const uint32_t heads = s->item->head_count, half = TS_STREAMS / 2;
    const bool nhd = g->layout == TS_LAYOUT_NHD;
    for (uint32_t i = 0; i < half; i++) {
        uint32_t row = nhd ? i * (s->tokens / half) + s->stretch : s->stretch % s->tokens;
        uint32_t head = nhd ? 0 : s->stretch / s->tokens * half + i;
        head = head < heads ? head : heads - 1;
        s->at[2 * i] = s->rows[row] + (s->item->head_first + head) * head_stride;
        s->at[2 * i + 1] = s->at[2 * i] + plane;
    }
    size_t bytes = nhd ? heads * row_bytes : row_bytes;
    s->steps = (uint32_t)((bytes + TS_STREAM_STEP - 1) / TS_STREAM_STEP);
    s->stretch++;
}

void ts_streams_begin(ts_streams *s, const unsigned char *const *rows)
{
    const uint32_t heads = s->item->head_count, half = TS_STREAMS / 2;
    const bool nhd = s->item->call->geometry.layout == TS_LAYOUT_NHD;
    s->rows = rows;
    s->stretch = s->stretches = 0;
    for (uint32_t i = 0; i < TS_STREAMS; i++)
        s->at[i] = (const unsigned char *)s; /* any memory that is in the cache */
    if (rows != NULL)
        s->stretches = nhd ? s->tokens / half : (heads + half - 1) / half * s->tokens;
    ts_streams_stretch(s);
}
