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

/* Runs all layers of a step with random q, k and v, and mixes what came out. d: NULL: it isn't. */
static inline void run_layers(ts_client *c, ts_step *step, uint32_t tokens, rng *r, digest *d)
{
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        fill(r, ts_step_q(step), (size_t)tokens * HEADS * DIM);
        fill(r, ts_step_k(step), (size_t)tokens * DIM);
        fill(r, ts_step_v(step), (size_t)tokens * DIM);
        DO(ts_step_run(step, layer));
        if (d != NULL)
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

/* Begins a step of new tokens for one sequence. */
static inline ts_status begin_step(ts_pool *p, ts_seq seq, uint32_t tokens, ts_step **step)
{
    const ts_step_options options = {.size = sizeof(ts_step_options), .heads = HEADS};
    return ts_step_begin(p, &seq, &tokens, 1, &options, step);
}

/* Layer 0's K of the token, its first element. */
static inline float k_of(ts_client *c, ts_pool *p, ts_seq seq, uint32_t token)
{
    uint64_t slot;
    ts_kv kv;
    DO(ts_seq_slots(p, seq, 0, token, 1, &slot));
    DO(ts_slot_kv(p, slot, 0, &kv));
    return *(float *)kv.k;
}

/* A step whose K is the same everywhere. */
static inline void step_of_k(ts_client *c, ts_pool *p, ts_seq seq, uint32_t tokens, float k)
{
    ts_step *step;
    DO(begin_step(p, seq, tokens, &step));
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        for (uint32_t i = 0; i < tokens * DIM; i++)
            ((float *)ts_step_k(step))[i] = k;
        DO(ts_step_run(step, layer));
    }
    DO(ts_step_commit(step, NULL));
}

static inline ts_status delete_pool(ts_client *c, const char *name)
{
    Tspb__AdminPoolDelete body = TSPB__ADMIN_POOL_DELETE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    body.pool = ts_unconst(name);
    request.body_case = TSPB__REQUEST__BODY_ADMIN_POOL_DELETE;
    request.admin_pool_delete = &body;
    return ts_call_plain(c, &request);
}

/* Starts a daemon that crashes whenever it comes to the place; a client of it. */
static inline ts_client *start_crashing(daemon_process *d, const char *place)
{
    setenv("TS_TEST_CRASH", place, 1);
    start(d, POOL, NULL);
    unsetenv("TS_TEST_CRASH");
    return connect_by(d, TS_TRANSPORT_RING);
}

/* Two daemons have died of what a client asked for, whose session is over. Another client's isn't:
 * it has called nothing since, and has its sequence. Ends both clients, and the daemon. */
static inline void finish_after_crashes(daemon_process *d, ts_client *c, ts_client *other,
                                        ts_pool *others, ts_seq seq)
{
    assert_non_null(strstr(ts_error(c), "the session is over"));
    assert_int_equal(ts_seq_lengths(others, &seq, 1, &(uint32_t){0}), TS_OK);
    assert_int_equal(ts_client_restarts(other), 1);
    ts_disconnect(c);
    finish(d, other, others);
}

#endif
