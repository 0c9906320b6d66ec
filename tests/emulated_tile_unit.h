/* What kernels/cpu/isa/tile_unit.h has, in plain C: so that any processor with AVX-512's byte
 * permutations tests what is written for the tile unit. As there, bf16's subnormals count as 0. */
#ifndef TS_EMULATED_TILE_UNIT_H
#define TS_EMULATED_TILE_UNIT_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef union emulated_tile {
    float sums[16][16];
    uint16_t pairs[16][16][2];
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

static inline float emulated_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)((x & 0x7f80) == 0 ? x & 0x8000 : x) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Not inlined, as it comes hundreds of times, nor sanitized, as it takes most of the time. */
__attribute__((noinline, unused, no_sanitize("address", "undefined"))) static void
emulated_multiply(emulated_tile *to, const emulated_tile *a, const emulated_tile *b)
{
    float wide[16][2][16];
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++)
            for (int i = 0; i < 2; i++)
                wide[k][i][n] = emulated_bf16(b->pairs[k][n][i]);
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < 2; i++) {
                const float x = emulated_bf16(a->pairs[m][k][i]);
                for (int n = 0; n < 16; n++)
                    to->sums[m][n] += x * wide[k][i][n];
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
