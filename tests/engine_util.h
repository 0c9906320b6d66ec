/* Driving an engine without a daemon: sessions, and commands that find slabs when they need them.
 */
#ifndef TS_ENGINE_UTIL_H
#define TS_ENGINE_UTIL_H

#include "test_util.h"

#include "engine.h"
#include "invariants.h"

static inline void fail_on_problem(void *arg, const char *sentence)
{
    (void)arg;
    fail_msg("%s", sentence);
}

static inline void check_engine(const ts_engine *e)
{
    assert_true(ts_invariants_check(e, fail_on_problem, NULL) > 0);
}

/* Called for every command that was applied; NULL: nobody asks. */
typedef struct applied_hook {
    void (*call)(void *arg, const ts_engine *e, const ts_command *c, const ts_answer *answer);
    void *arg;
} applied_hook;
static applied_hook engine_applied;

static inline void apply_one(ts_engine *e, const ts_command *c, ts_answer *answer)
{
    ts_engine_apply(e, c, answer);
    if (engine_applied.call != NULL)
        engine_applied.call(engine_applied.arg, e, c, answer);
}

/* Called for every slab that gets new memory; may be NULL. */
typedef void (*on_grant)(void *arg, uint32_t pool, uint32_t slab);

/* Applies as the daemon does: slabs are granted until the command has enough. */
static inline ts_status apply_with(ts_engine *e, const ts_command *c, ts_answer *answer,
                                   on_grant grant, void *arg)
{
    for (;;) {
        apply_one(e, c, answer);
        if (answer->status != TS_NEED_SLABS)
            return answer->status;
        uint32_t pool = answer->need.pool, tenant = answer->need.tenant;
        uint32_t slab = ts_engine_next_slab(e, pool, tenant);
        assert_int_not_equal(slab, TS_NONE);
        if (grant != NULL)
            grant(arg, pool, slab);
        ts_answer granted;
        apply_one(e,
                  &(ts_command){.op = TS_OP_SLAB_GRANT,
                                .pool = pool,
                                .slab_grant = {.slab = slab, .tenant = tenant}},
                  &granted);
        assert_int_equal(granted.status, TS_OK);
    }
}

static inline ts_status apply(ts_engine *e, ts_command c, ts_answer *answer)
{
    return apply_with(e, &c, answer, NULL, NULL);
}

/* Adds a pool; its index. */
static inline uint32_t pool_add(ts_engine *e, const ts_pool_config *config)
{
    ts_answer answer;
    apply(e, (ts_command){.op = TS_OP_POOL_ADD, .pool_add.config = config}, &answer);
    assert_int_equal(answer.status, TS_OK);
    return answer.pool;
}

static inline ts_engine *engine_new(uint32_t num_blocks, uint32_t slab_blocks,
                                    uint32_t block_tokens, ts_client_write write)
{
    ts_engine_limits limits;
    ts_engine_default_limits(&limits);
    ts_engine *e = ts_engine_new(&limits);
    assert_non_null(e);
    ts_pool_config config = {
        .name = "test",
        .geometry = {.layers = 2, .kv_heads = 1, .head_dim = 32, .block_tokens = block_tokens},
        .num_blocks = num_blocks,
        .slab_blocks = slab_blocks,
        .sequences_max = 1u << 24,
        .sequence_tokens_max = 1u << 20,
        .tenant_blocks_max = UINT64_MAX,
        .client_write = write,
    };
    pool_add(e, &config);
    return e;
}

/* A session of this uid that has opened pool 0, to write if the pool lets it. */
static inline uint64_t session_new(ts_engine *e, uint32_t uid)
{
    ts_answer answer;
    apply(e,
          (ts_command){.op = TS_OP_SESSION_OPEN,
                       .session_open = {.uid = uid, .pid = 1, .program = "test"}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    uint64_t session = answer.session;
    bool write = e->pools[0].config.client_write == TS_CLIENT_WRITE_ALL;
    apply(e,
          (ts_command){.op = TS_OP_POOL_OPEN,
                       .session = session,
                       .pool_open = {.name = "test", .writable = write}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    return session;
}

/* Frees all that is freed bit by bit; in how many bits. */
static inline uint32_t sweep_all(ts_engine *e)
{
    uint32_t bits = 0;
    ts_answer answer;
    for (; ts_engine_sweeps(e); bits++) {
        uint32_t used = e->pools[0].books.used;
        assert_int_equal(apply(e, (ts_command){.op = TS_OP_SWEEP}, &answer), TS_OK);
        /* The last sequence of a sweep may pass its limit. */
        assert_true(used - e->pools[0].books.used <= TS_SWEEP_ENTRIES + TS_COMMAND_ENTRIES);
    }
    return bits;
}

static inline uint64_t seq_new(ts_engine *e, uint64_t session)
{
    ts_answer answer;
    apply(e, (ts_command){.op = TS_OP_SEQ_CREATE, .session = session, .seq_create = {.count = 1}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    return answer.seqs.seqs[0];
}

static inline ts_status begin(ts_engine *e, uint64_t session, const uint64_t *seqs,
                              const uint32_t *new_tokens, uint32_t count, bool append,
                              ts_answer *answer)
{
    return apply(e,
                 (ts_command){.op = TS_OP_STEP_BEGIN,
                              .session = session,
                              .step_begin = {.seqs = seqs,
                                             .new_tokens = new_tokens,
                                             .count = count,
                                             .heads = 1,
                                             .append = append}},
                 answer);
}

static inline ts_status step_end(ts_engine *e, uint64_t session, ts_op op, uint64_t step,
                                 const uint32_t *accepted, uint32_t count)
{
    ts_answer answer;
    return apply(e,
                 (ts_command){.op = op,
                              .session = session,
                              .step_end = {.step = step, .accepted = accepted, .count = count}},
                 &answer);
}

static inline ts_status step_done(ts_engine *e, uint64_t step, uint32_t layer)
{
    ts_answer answer;
    return apply(e,
                 (ts_command){.op = TS_OP_STEP_DONE, .step_done = {.step = step, .layer = layer}},
                 &answer);
}

/* Begins a step of n tokens with these ids, and has its copies done; its id. */
static inline uint64_t step_of_ids(ts_engine *e, uint64_t session, uint64_t seq,
                                   const uint32_t *ids, uint32_t n)
{
    ts_answer answer;
    ts_command c = {
        .op = TS_OP_STEP_BEGIN,
        .session = session,
        .step_begin = {.seqs = &seq, .new_tokens = &n, .count = 1, .heads = 1, .tokens = ids}};
    assert_int_equal(apply(e, c, &answer), TS_OK);
    const uint64_t step = answer.begun.step->id;
    if (answer.begun.num_copies > 0)
        assert_int_equal(step_done(e, step, TS_NONE), TS_OK);
    return step;
}

static inline uint32_t length_of(ts_engine *e, uint64_t session, uint64_t seq)
{
    ts_answer answer;
    apply(e,
          (ts_command){
              .op = TS_OP_SEQ_LENGTHS, .session = session, .seq_batch = {.seqs = &seq, .count = 1}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    return answer.lengths.lengths[0];
}

/* Appends without anybody writing: what most tests here need. */
static inline void append(ts_engine *e, uint64_t s, uint64_t seq, uint32_t n)
{
    ts_answer answer;
    assert_int_equal(begin(e, s, &seq, &n, 1, true, &answer), TS_OK);
    if (answer.begun.num_copies > 0)
        assert_int_equal(step_done(e, answer.begun.step->id, TS_NONE), TS_OK);
}

static inline uint64_t fork_seq(ts_engine *e, uint64_t s, uint64_t parent)
{
    ts_answer answer;
    apply(e,
          (ts_command){
              .op = TS_OP_SEQ_FORK, .session = s, .seq_fork = {.parent = parent, .count = 1}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    return answer.seqs.seqs[0];
}

/* Keeps the sequence under a name. */
static inline ts_status keep_seq(ts_engine *e, uint64_t s, uint64_t seq, const char *name)
{
    ts_answer answer;
    return apply(
        e, (ts_command){.op = TS_OP_SEQ_KEEP, .session = s, .seq_keep = {.seq = seq, .name = name}},
        &answer);
}

/* The sequence that is kept under the name; 0: there is none. */
static inline uint64_t attach(ts_engine *e, uint64_t s, const char *name)
{
    ts_answer answer;
    apply(e, (ts_command){.op = TS_OP_SEQ_ATTACH, .session = s, .seq_keep = {.name = name}},
          &answer);
    return answer.status == TS_OK ? answer.seqs.seqs[0] : 0;
}

static inline ts_status free_seq(ts_engine *e, uint64_t s, uint64_t seq)
{
    ts_answer answer;
    return apply(
        e,
        (ts_command){.op = TS_OP_SEQ_FREE, .session = s, .seq_batch = {.seqs = &seq, .count = 1}},
        &answer);
}

static inline void close_session(ts_engine *e, uint64_t s)
{
    ts_answer answer;
    assert_int_equal(apply(e, (ts_command){.op = TS_OP_SESSION_CLOSE, .session = s}, &answer),
                     TS_OK);
}

#endif
