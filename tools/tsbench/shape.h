/*
 * What a benchmark of attention attends, as text: "512 x 64-512 + 8 x 32768, 64/8/128 bf16, 4 new".
 */
#ifndef TSBENCH_SHAPE_H
#define TSBENCH_SHAPE_H

#include "tinyserve_types.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BENCH_GROUPS_MAX 4u
#define BENCH_SEQS_MAX 65536u
#define BENCH_TOKENS_MAX (1u << 30)

/* Sequences of least..most tokens, evenly spread, in an order that isn't sorted. */
typedef struct bench_group {
    uint32_t count, least, most;
} bench_group;

typedef struct bench_shape {
    char name[96]; /* the text */
    bench_group groups[BENCH_GROUPS_MAX];
    uint32_t num_groups;
    uint32_t heads, kv_heads, head_dim;
    ts_dtype dtype;
    ts_layout layout;
    uint32_t new_tokens; /* of each sequence; 0: all of its tokens */
    uint32_t shared;     /* of each group, the first tokens of all are the same: whole blocks */
} bench_shape;

/* Whether the text is meant as a shape, and not as a part of one's name. */
bool bench_shape_is(const char *text);

/*
 * GROUP [+ GROUP ...], HEADS/KV_HEADS/HEAD_DIM DTYPE [nhd|hnd] [, N new | , all new] [, N shared],
 * a GROUP being COUNT x TOKENS or COUNT x LEAST-MOST. False, and a sentence in `why`.
 */
bool bench_shape_parse(const char *text, bench_shape *out, char *why, size_t why_bytes);

/* Tokens of sequence i of the group. */
uint32_t bench_group_tokens(const bench_group *group, uint32_t i);

#endif
