/* Inside kernels/gpu: what a plan's memory holds of its sequences and their pieces of work, as the
 * planner writes it and kernels read it. */
#ifndef TS_GPU_PIECES_H
#define TS_GPU_PIECES_H

#include <stdint.h>

/* One sequence of a plan. */
typedef struct plan_seq {
    uint32_t table; /* where its block table starts among the plan's */
    uint32_t kv_tokens, q_tokens;
    uint32_t first_row;                /* of its query tokens, among the plan's */
    uint32_t chunk_tokens, num_chunks; /* of its context */
    uint32_t slot;                     /* of its first partial row among the plan's */
    uint32_t counter;                  /* of finished chunks: the first of its KV heads' */
} plan_seq;

/* One piece of a sequence that is cut into chunks: whole, so that a block finds all in one read. */
typedef struct plan_piece {
    plan_seq seq;
    uint32_t tile; /* of rows; or TEAM_PIECE and more */
    uint32_t chunk;
    uint32_t index; /* the sequence's, among the plan's */
    /* Twice its chunks from that one on, 1 or all of the sequence's; and 1, if no other piece of
     * the plan reads its K and V, as far as is known. (As two numbers it would take v5 registers.)
     */
    uint32_t chunks_and_alone;
} __attribute__((aligned(16))) plan_piece;

/*
 * In `tile` of v5's pieces for few rows: the piece is a team's, sequences whose chunk has the same
 * K and V (sharing.h). The next seven bits say how many members it has, the others where their list
 * is among the plan's tables: each one's number among the plan's sequences. `seq` is the first's.
 */
#define TEAM_PIECE 0x80000000u
#define TEAM_SIZE(TILE) ((TILE) >> 24 & 127u)
#define TEAM_LIST(TILE) ((TILE)&0xffffff)

#endif
