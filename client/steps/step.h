/*
 * Inside libtinyserve: what a step is. step.c begins and ends it, run.c runs its layers, frame.c
 * has those that lie where the one before lay.
 *
 * Thread: the client's.
 */
#ifndef TS_CLIENT_STEP_H
#define TS_CLIENT_STEP_H

#include "autotune.h"
#include "local_exec.h"

struct ts_step {
    ts_pool *pool;
    uint64_t id;
    uint32_t count, tokens;
    ts_seq *seqs;
    uint32_t *starts, *new_tokens; /* per sequence */
    uint64_t *slots;               /* per new token */
    ts_region region;              /* of the exchange; a frame's step has none of its own */
    ts_layer_run at;               /* where its data lies, and nothing else */
    uint32_t heads;
    ts_dtype io_dtype;
    float scale;
    ts_exec exec;    /* AUTO: both ways, to see which is quicker */
    ts_local *local; /* NULL: the daemon attends alone */
    ts_autotune autotune;
    ts_frame *frame;       /* NULL: none */
    bool ran_here;         /* this process attended, or tried to */
    ts_layer_set run_here; /* in these layers it did */
    bool writes_itself;    /* K and V, on a GPU: no layer is run */
    bool publishes;        /* its token ids, at the commit */
    /* Runs on a stream that the daemon has accepted: models have layers of one kind or two. Those
     * like them are posted. */
    ts_layer_run accepted[2];
    uint32_t num_accepted;
};

struct ts_frame {
    ts_pool *pool;
    ts_frame_options options; /* new_tokens and tokens as they were meant */
    ts_step_options step;     /* heads and scale as they were meant */
    char kernel[16];
    ts_region region;
    ts_layer_run at;      /* the same */
    uint32_t *new_tokens; /* of as many sequences as a step may have */
    ts_gpu_plan *plan;    /* persistent */
    bool in_use;          /* by a step */
};

/* A step that isn't begun; NULL: no memory. */
ts_step *ts_step_new(ts_pool *pool, const ts_seq *seqs, const uint32_t *new_tokens, uint32_t count,
                     uint32_t tokens);
void ts_step_free(ts_step *step);

/* Lays out `tokens` tokens' data from offset `start` on, and returns the bytes. */
size_t ts_step_lay_out(const ts_geometry *g, uint32_t heads, ts_dtype io_dtype, uint32_t tokens,
                       size_t start, ts_layer_run *at);

/* Begins a new step, whose places, heads, io_dtype and scale are set; or appends. */
ts_status ts_step_call_begin(ts_step *step, const ts_seq *seqs, const ts_step_options *options,
                             bool append);

#endif
