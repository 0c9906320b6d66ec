/* What kernels/cpu/isa/tile_unit.h has, in plain C: so that any processor with AVX-512's byte
 * permutations tests what is written for the tile unit. As there, bf16's subnormals count as 0. */
#ifndef TS_EMULATED_TILE_UNIT_H
#define TS_EMULATED_TILE_UNIT_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef float emulated_row __attribute__((vector_size(64)));
typedef uint32_t emulated_words __attribute__((vector_size(64)));

typedef union emulated_tile {
    emulated_row sums[16];
    emulated_words pairs[16]; /* of bf16, the first in the lower half */
} emulated_tile;

static _Thread_local emulated_tile emulated_tiles[8];

__attribute__((noinline, unused)) static void emulated_zero(void)
{
    memset(emulated_tiles, 0, sizeof emulated_tiles);
}

__attribute__((noinline, unused)) static void emulated_copy(void *to, const void *from)
{
    memcpy(to, from, sizeof(emulated_tile));
}

/* Widens the first (0) or the second (1) bf16 of each pair. */
#define EMULATED_WIDE(pairs, which)                                                                \
    EMULATED_FLUSH((which) == 0 ? (pairs) << 16 : (pairs)&0xffff0000u)
#define EMULATED_FLUSH(bits)                                                                       \
    ((emulated_row)((bits) & ((emulated_words)(((bits)&0x7f800000u) != 0) | 0x80000000u)))

/* Not inlined, as it comes hundreds of times, nor sanitized, as it takes much of the time. */
__attribute__((noinline, unused, no_sanitize("address", "undefined"))) static void
emulated_multiply(emulated_tile *to, const emulated_tile *a, const emulated_tile *b)
{
    float first[16][16], second[16][16]; /* of a's pairs */
    for (int m = 0; m < 16; m++) {
        const emulated_row x = EMULATED_WIDE(a->pairs[m], 0), y = EMULATED_WIDE(a->pairs[m], 1);
        memcpy(first[m], &x, sizeof x);
        memcpy(second[m], &y, sizeof y);
    }
    for (int k = 0; k < 16; k++) {
        const emulated_row x = EMULATED_WIDE(b->pairs[k], 0), y = EMULATED_WIDE(b->pairs[k], 1);
        for (int m = 0; m < 16; m++)
            to->sums[m] = to->sums[m] + first[m][k] * x + second[m][k] * y;
    }
}

#define TILE_CONFIGURE(config) ((void)(config), emulated_zero())
#define TILE_RELEASE() emulated_zero()
#define TILE_ZERO(tile) memset(&emulated_tiles[tile], 0, sizeof *emulated_tiles)
#define TILE_LOAD(tile, from) emulated_copy(&emulated_tiles[tile], from)
#define TILE_STORE(tile, to) emulated_copy(to, &emulated_tiles[tile])
#define TILE_MULTIPLY(sums, a, b)                                                                  \
    emulated_multiply(&emulated_tiles[sums], &emulated_tiles[a], &emulated_tiles[b])

static inline bool ts_tile_unit_usable(void)
{
    return true;
}

#endif
