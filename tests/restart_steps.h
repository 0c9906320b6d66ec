/* What tests of a daemon's death do with a pool in host memory: whole steps, and crashes. */
#ifndef TS_RESTART_STEPS_H
#define TS_RESTART_STEPS_H

#include "restart_util.h"

#define LAYERS 2u
#define DIM 32u
#define HEADS 2u
#define BLOCK 16u
#define POOL                                                                                       \
    "p:layers=2,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=512,slab=64K,"            \
    "device=host,model=m,client_write=all"

/* Runs all layers of a step with random q, k and v, and mixes what came out. */
static inline void run_layers(ts_client *c, ts_step *step, uint32_t tokens, rng *r, digest *d)
{
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        fill(r, ts_step_q(step), (size_t)tokens * HEADS * DIM);
        fill(r, ts_step_k(step), (size_t)tokens * DIM);
        fill(r, ts_step_v(step), (size_t)tokens * DIM);
        DO(ts_step_run(step, layer));
        mix(d, ts_step_out(step), (size_t)tokens * HEADS * DIM * sizeof(float));
    }
}

static inline void one_step(ts_client *c, ts_pool *p, const ts_seq *seqs,
                            const uint32_t *new_tokens, uint32_t count, const uint32_t *ids, rng *r,
                            digest *d)
{
    ts_step *step;
    uint32_t tokens = 0;
    const ts_step_options options = {
        .size = sizeof(ts_step_options), .heads = HEADS, .tokens = ids};
    for (uint32_t i = 0; i < count; i++)
        tokens += new_tokens[i];
    DO(ts_step_begin(p, seqs, new_tokens, count, &options, &step));
    run_layers(c, step, tokens, r, d);
    DO(ts_step_commit(step, NULL));
}

/* Starts a daemon that crashes whenever it comes to the place; a client of it. */
static inline ts_client *start_crashing(daemon_process *d, const char *place)
{
    setenv("TS_TEST_CRASH", place, 1);
    start(d, POOL, NULL);
    unsetenv("TS_TEST_CRASH");
    return connect_by(d, TS_TRANSPORT_RING);
}

#endif
