/*
 * Inside kernels/gpu: what a plan has on the device. Its memory holds, one after the other, its
 * head, the sequences, the lists of items and the block tables. In a plan that is kept they have
 * room for what its limits allow, and so stay where they are.
 */
#ifndef TS_GPU_PLAN_H
#define TS_GPU_PLAN_H

#include "box_map.h"
#include "device.h"

/* Who works through a list of items. */
typedef enum ts_gpu_list {
    LIST_APPEND, /* (sequence, new token) of those whose kernel doesn't write them itself */
    LIST_DECODE, /* (sequence, query token): v1 to v4 */
    LIST_TILE,   /* (sequence, first query token of a tile) */
    LIST_NARROW, /* pieces, longest first: v5's kernel for few rows, */
    LIST_MEDIUM, /* ... for some more, */
    LIST_WIDE,   /* ... and for many */
    LIST_MMA,    /* the same for mma, */
    LIST_WGMMA,  /* ... for wgmma, */
    LIST_FEW,    /* ... and for wgmma's kernel for few rows */
    LIST_COUNT
} ts_gpu_list;

typedef struct plan_head {
    box_blocks among;            /* of a persistent plan with boxes: of the blocks that it reads */
    uint32_t counts[LIST_COUNT]; /* of items */
} plan_head;

struct ts_gpu_plan {
    ts_gpu *gpu;
    ts_geometry geometry;
    uint32_t heads;
    ts_dtype io_dtype;
    ts_kernel kernel;
    ts_gpu_kernel kernels[LIST_COUNT]; /* of LIST_TILE and later ones; function NULL: the device has
                                          too little shared memory for it */
    ts_gpu_kernel varied_wgmma;        /* wgmma's lists' where scores are capped or sloped */
    /* LIST_NARROW's where pieces may be teams'; function NULL: none are made. */
    ts_gpu_kernel team_kernel;
    /* LIST_NARROW's for plain calls: as a rule, where pieces may be teams', and where waves.h says
     * so; function NULL: none. */
    ts_gpu_kernel plain_kernel, plain_team_kernel, close_kernel;
    ts_gpu_buffer *buffer;
    uint32_t num_seqs;
    uint32_t count[LIST_COUNT];
    size_t items[LIST_COUNT], tables; /* offsets in bytes; the sequences': PLAN_SEQS */
    size_t entries;     /* of the block tables, with room in each, behind the lists of members */
    block_range blocks; /* of all tables, where wgmma has work */
    uint32_t *shared;   /* chunks that each sequence shares with its team; NULL: there is no team */
    uint64_t spared;    /* tokens that teams don't read, or wouldn't, of sequences with so many: */
    uint64_t kv_tokens;
    size_t records;    /* partial rows of chunks that are to be merged */
    bool folds;        /* wgmma has pieces of several chunks */
    uint32_t q_tokens; /* of all sequences */
    uint32_t storable; /* items of LIST_APPEND, its last: wgmma may store them itself (box_map.h) */
    uint32_t counters;
    uint32_t longest;                       /* of LIST_WGMMA's sequences: tokens */
    uint32_t shortest_piece, longest_piece; /* of LIST_NARROW's: tokens */
    uint32_t whole_tokens[LIST_COUNT];      /* of a sequence whose chunks are one piece, at most */
    uint64_t renewals;                      /* since it was written whole */
    bool persistent;
    ts_gpu_plan_limits limits; /* of a persistent one, as all that follows: */
    box_map boxes;             /* but for `among`, which is on the device */
    uint32_t room[LIST_COUNT]; /* for items */
    float *own_partials;       /* its own */
    float *own_folds;          /* behind them, of wgmma's blocks */
    uint32_t *own_counters;    /* its own, all 0 between launches; wgmma's tickets first */
};

#define PLAN_SEQS sizeof(plan_head) /* where the sequences are */

/* Finds the kernels that the device can launch for a plan of this device, geometry, io_dtype and
 * kernel, which are all that was set; they are loaded then. TS_EINVAL: the one that was asked for
 * isn't among them. */
ts_status ts_gpu_plan_find_kernels(ts_gpu_plan *plan, char *why, size_t why_bytes);

/* Floats of a partial row: its softmax's maximum and sum, two that are not used, its sums. */
static inline size_t ts_gpu_record_floats(const ts_geometry *g)
{
    return g->head_dim + 4u;
}

#endif
