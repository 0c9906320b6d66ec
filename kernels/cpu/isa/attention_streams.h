/*
 * The next tile of K and V is asked for while one is worked on, into the second-level cache: a few
 * streams in different pages take turns, each going upwards by two lines, which the hardware's
 * prefetcher can join, and not faster than the lines of this tile are used, as a core can have
 * only a few requests under way and stalls when it makes more (kernels/doc/).
 */
#ifndef TS_ATTENTION_STREAMS_H
#define TS_ATTENTION_STREAMS_H

#include "attention_item.h"

#define TS_STREAMS 8u                /* half of them in K's plane, half in V's */
#define TS_STREAM_STEP ((size_t)128) /* bytes of one stream's turn */

typedef struct ts_streams {
    _Alignas(64) const unsigned char *at[TS_STREAMS];
    uint32_t steps;                   /* left of this stretch, for each of them */
    uint32_t stretch, stretches;      /* which is next, of how many */
    uint32_t tokens;                  /* of a tile: a multiple of 4 */
    const unsigned char *const *rows; /* of the tile's K */
    const ts_attention_item *item;
} ts_streams;

/* Begins with a tile, whose rows of K are at `rows`; NULL: there is none, and nothing comes. */
void ts_streams_begin(ts_streams *s, const unsigned char *const *rows);

/* Points the streams at the next stretch, if there is one; else they stand still, and ask for what
 * has come already. */
void ts_streams_stretch(ts_streams *s);

/* Asks for two lines, for two that were used: the turn-th two, which needs to be a constant, modulo
 * 8, where it is to cost little. */
static inline __attribute__((always_inline)) void ts_streams_ask(ts_streams *s, uint32_t turn)
{
    const unsigned char *lines = s->at[turn % TS_STREAMS];
    __builtin_prefetch(lines, 0, 2);
    __builtin_prefetch(lines + 64, 0, 2);
    if (turn % TS_STREAMS < TS_STREAMS - 1)
        return;
    for (uint32_t i = 0; i < TS_STREAMS; i++)
        s->at[i] += TS_STREAM_STEP;
    if (--s->steps == 0)
        ts_streams_stretch(s);
}

#endif
