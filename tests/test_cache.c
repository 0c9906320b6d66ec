/* What is found by its tokens and what makes room, as the engine decides it, without a daemon. */
#include "engine_util.h"

#include <stdio.h>
#include <string.h>

static const ts_space_name model = {"m", 1};

static uint64_t create_in(ts_engine *e, uint64_t s, ts_space_name space)
{
    ts_answer answer;
    apply(e,
          (ts_command){
              .op = TS_OP_SEQ_CREATE, .session = s, .seq_create = {.count = 1, .space = space}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    return answer.seqs.seqs[0];
}

/* Commits tokens with their ids, NULL: without; what the step began with. */
static ts_status add(ts_engine *e, uint64_t s, uint64_t seq, uint32_t n, const uint32_t *ids)
{
    ts_answer answer;
    ts_command c = {
        .op = TS_OP_STEP_BEGIN,
        .session = s,
        .step_begin = {.seqs = &seq, .new_tokens = &n, .count = 1, .heads = 1, .tokens = ids}};
    if (apply(e, c, &answer) != TS_OK)
        return answer.status;
    const uint64_t step = answer.begun.step->id;
    if (answer.begun.num_copies > 0)
        assert_int_equal(step_done(e, step, TS_NONE), TS_OK);
    assert_int_equal(step_end(e, s, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
    check_engine(e);
    return TS_OK;
}

/* How many of the ids are found; *seq shares them, NULL: it is only asked. */
static uint32_t match(ts_engine *e, uint64_t s, ts_space_name space, const uint32_t *ids,
                      uint32_t n, uint64_t *seq)
{
    ts_answer answer;
    apply(e,
          (ts_command){
              .op = TS_OP_SEQ_MATCH,
              .session = s,
              .seq_match =
                  {.tokens = ids, .counts = &n, .count = 1, .space = space, .dry = seq == NULL}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    if (seq != NULL)
        *seq = answer.matched.seqs[0];
    return answer.matched.lengths[0];
}

static void a_prompt_that_fits_fits_again_when_it_is_found(void **state)
{
    (void)state;
    enum { TOKENS = 16 };
    uint32_t ids[TOKENS];
    for (uint32_t i = 0; i < TOKENS; i++)
        ids[i] = i;
    for (int by_quota = 0; by_quota < 2; by_quota++) {
        ts_engine *e = engine_new(by_quota ? 64 : 4, 4, 4, TS_CLIENT_WRITE_ALL);
        e->pools[0].config.tenant_blocks_max = by_quota ? 4 : UINT64_MAX;
        uint64_t s = session_new(e, 1), seq = create_in(e, s, model);
        assert_int_equal(add(e, s, seq, TOKENS, ids), TS_OK);
        assert_int_equal(free_seq(e, s, seq), TS_OK);
        /* There is no room for a copy of the last block, and nobody else needs it. */
        assert_int_equal(match(e, s, model, ids, TOKENS, &seq), TOKENS - 1);
        assert_int_equal(add(e, s, seq, 1, ids + TOKENS - 1), TS_OK);
        assert_int_equal(match(e, s, model, ids, TOKENS, NULL), TOKENS - 1);
        /* But what another refers to is copied, or there is no room. */
        uint64_t other;
        assert_int_equal(match(e, s, model, ids, TOKENS, &other), TOKENS - 1);
        assert_int_equal(add(e, s, other, 1, ids), by_quota ? TS_EQUOTA : TS_ENOSPC);
        ts_engine_free(e);
    }
}

static void where_there_is_room_a_found_tail_stays_in_the_cache(void **state)
{
    (void)state;
    const uint32_t ids[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, other = 10;
    ts_engine *e = engine_new(4, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1), seq = create_in(e, s, model);
    assert_int_equal(add(e, s, seq, 8, ids), TS_OK);
    assert_int_equal(free_seq(e, s, seq), TS_OK);
    assert_int_equal(match(e, s, model, ids, 8, &seq), 7);
    assert_int_equal(add(e, s, seq, 1, &other), TS_OK);
    assert_int_equal(match(e, s, model, ids, 9, NULL), 8);
    ts_engine_free(e);
}

static void a_step_that_is_refused_takes_no_tail_from_the_cache(void **state)
{
    (void)state;
    const uint32_t ids[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, other = 10;
    ts_engine *e = engine_new(4, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1), seq = create_in(e, s, model), beside = create_in(e, s, model);
    assert_int_equal(add(e, s, seq, 8, ids), TS_OK);
    assert_int_equal(free_seq(e, s, seq), TS_OK);
    assert_int_equal(match(e, s, model, ids, 8, &seq), 7);
    assert_int_equal(add(e, s, beside, 8, NULL), TS_OK); /* there is no room for a copy */
    const uint32_t limit = e->limits.step_tokens;
    e->limits.step_tokens = 0;
    assert_int_equal(add(e, s, seq, 1, &other), TS_EINVAL);
    e->limits.step_tokens = limit;
    assert_int_equal(free_seq(e, s, beside), TS_OK); /* now there is */
    assert_int_equal(add(e, s, seq, 1, &other), TS_OK);
    assert_int_equal(match(e, s, model, ids, 9, NULL), 8);
    ts_engine_free(e);
}

static void where_memory_for_a_slab_is_not_to_be_had_what_is_cached_makes_room(void **state)
{
    (void)state;
    ts_engine *e = engine_new(64, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1), seq = create_in(e, s, model);
    const uint32_t ids[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    assert_int_equal(add(e, s, seq, 16, ids), TS_OK);
    assert_int_equal(free_seq(e, s, seq), TS_OK);
    seq = create_in(e, s, model);
    ts_answer answer;
    uint32_t n = 20;
    ts_command c = {.op = TS_OP_STEP_BEGIN,
                    .session = s,
                    .step_begin = {.seqs = &seq, .new_tokens = &n, .count = 1, .heads = 1}};
    ts_engine_apply(e, &c, &answer);
    assert_int_equal(answer.status, TS_NEED_SLABS);
    c.step_begin.no_new_slabs = true; /* five blocks aren't there, but four are */
    ts_engine_apply(e, &c, &answer);
    assert_int_equal(answer.status, TS_NEED_SLABS);
    assert_int_equal(match(e, s, model, ids, 16, NULL), 15);
    n = 16;
    c.step_begin.no_new_slabs = false;
    ts_engine_apply(e, &c, &answer);
    assert_int_equal(answer.status, TS_NEED_SLABS);
    c.step_begin.no_new_slabs = true;
    ts_engine_apply(e, &c, &answer);
    assert_int_equal(answer.status, TS_OK);
    assert_int_equal(match(e, s, model, ids, 16, NULL), 0);
    check_engine(e);
    ts_engine_free(e);
}

static void what_one_tenant_has_cached_leaves_others_their_share(void **state)
{
    (void)state;
    enum { SLABS = 16, SLAB_BLOCKS = 16, BLOCK = 4 };
    ts_engine *e = engine_new(SLABS * SLAB_BLOCKS, SLAB_BLOCKS, BLOCK, TS_CLIENT_WRITE_ALL);
    uint64_t one = session_new(e, 1), two = session_new(e, 2);
    uint32_t ids[(SLAB_BLOCKS - 1) * BLOCK];
    for (uint32_t k = 0; k < SLABS; k++) { /* a live block, and many that are cached */
        for (uint32_t i = 0; i < sizeof ids / sizeof *ids; i++)
            ids[i] = 1000 * k + i;
        assert_int_equal(add(e, one, create_in(e, one, model), BLOCK, ids + 1), TS_OK);
        uint64_t seq = create_in(e, one, model);
        assert_int_equal(add(e, one, seq, sizeof ids / sizeof *ids, ids), TS_OK);
        assert_int_equal(free_seq(e, one, seq), TS_OK);
    }
    assert_true(e->pools[0].books.tenants[0].slabs <= SLABS / 2);
    assert_int_equal(add(e, two, create_in(e, two, model), SLABS / 2 * SLAB_BLOCKS * BLOCK, NULL),
                     TS_OK);
    ts_engine_free(e);
}

static void namespaces_that_nobody_uses_make_room_for_new_ones(void **state)
{
    (void)state;
    const uint32_t ids[4] = {1, 2, 3, 4}, num = TS_NAMESPACES_MAX + 100;
    ts_engine *e = engine_new(8192, 64, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1);
    char name[16];
    for (uint32_t i = 0; i < num; i++) {
        snprintf(name, sizeof name, "%u", i);
        const ts_space_name space = {name, strlen(name)};
        uint64_t seq = create_in(e, s, space);
        assert_int_equal(add(e, s, seq, 4, ids), TS_OK);
        assert_int_equal(free_seq(e, s, seq), TS_OK);
    }
    (void)sweep_all(e);
    assert_int_equal(e->pools[0].books.cached, TS_NAMESPACES_MAX);
    for (uint32_t i = 0; i < num; i++) { /* the oldest are gone, and to ask evicts nothing */
        snprintf(name, sizeof name, "%u", i);
        const ts_space_name space = {name, strlen(name)};
        assert_int_equal(match(e, s, space, ids, 4, NULL), i < 100 ? 0 : 3);
    }
    assert_int_equal(e->pools[0].books.cached, TS_NAMESPACES_MAX);
    ts_engine_free(e);
}

static void a_layer_whose_last_run_failed_is_published_by_nobody(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_NONE);
    uint64_t s = session_new(e, 1), seq = create_in(e, s, model);
    const uint32_t ids[5] = {1, 2, 3, 4, 5}, n = 4;
    ts_answer answer;
    apply(
        e,
        (ts_command){.op = TS_OP_EXCHANGE_OPEN, .session = s, .exchange_open = {.bytes = 1 << 16}},
        &answer);
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_STEP_BEGIN,
                                        .session = s,
                                        .step_begin = {.seqs = &seq,
                                                       .new_tokens = &n,
                                                       .count = 1,
                                                       .heads = 1,
                                                       .tokens = ids}},
                           &answer),
                     TS_OK);
    const uint64_t step = answer.begun.step->id;
    static const struct {
        uint32_t layer;
        ts_status status;
    } runs[] = {{0, TS_OK}, {1, TS_OK}, {0, TS_EDEVICE}, {1, TS_EDEVICE}, {0, TS_OK}};
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        ts_command run = {
            .op = TS_OP_STEP_RUN,
            .session = s,
            .step_run = {
                .step = step,
                .run = {.q = 0, .k = 4096, .v = 8192, .out = 12288, .layer = runs[i].layer}}};
        assert_int_equal(apply(e, run, &answer), TS_OK);
        apply(e,
              (ts_command){
                  .op = TS_OP_STEP_DONE,
                  .step_done = {.step = step, .layer = runs[i].layer, .status = runs[i].status}},
              &answer);
    }
    assert_int_equal(step_end(e, s, TS_OP_STEP_COMMIT, step, NULL, 0), TS_EINVAL);
    assert_int_equal(match(e, s, model, ids, 5, NULL), 0);
    ts_engine_free(e);
}

/* A slab's memory is gone at a restart, and a step of a session that has ended waits for its copy:
 * nothing that lay there is found, whether it was cached or has that step yet. */
static void of_a_lost_slab_nothing_is_found(void **state)
{
    (void)state;
    enum { CACHED = 9, OPEN = 10 };
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    const uint64_t s = session_new(e, 1), other = session_new(e, 1);
    uint64_t cached = create_in(e, s, model), open = create_in(e, s, model);
    uint32_t ids[2][OPEN];
    ts_answer answer;
    for (uint32_t i = 0; i < OPEN; i++) {
        ids[0][i] = i;
        ids[1][i] = i + 100;
    }
    assert_int_equal(add(e, s, cached, CACHED, ids[0]), TS_OK);
    assert_int_equal(add(e, s, open, OPEN, ids[1]), TS_OK);
    assert_int_equal(free_seq(e, s, cached), TS_OK);
    (void)fork_seq(e, s, open);
    assert_int_equal(begin(e, s, &open, &(uint32_t){1}, 1, false, &answer), TS_OK);
    assert_int_equal(answer.begun.num_copies, 1);
    const uint64_t step = answer.begun.step->id;
    close_session(e, s);
    apply(e, (ts_command){.op = TS_OP_RESTARTED}, &answer);
    assert_int_equal(match(e, other, model, ids[0], CACHED, NULL), 8);
    assert_int_equal(match(e, other, model, ids[1], OPEN, NULL), 8);
    assert_int_equal(apply(e, (ts_command){.op = TS_OP_SLAB_LOST}, &answer), TS_OK);
    check_engine(e);
    assert_int_equal(match(e, other, model, ids[0], CACHED, NULL), 0);
    assert_int_equal(match(e, other, model, ids[1], OPEN, NULL), 0);
    assert_int_equal(step_done(e, step, TS_NONE), TS_OK);
    assert_int_equal(e->pools[0].books.used, 0);
    assert_int_equal(match(e, other, model, ids[1], OPEN, NULL), 0);
    check_engine(e);
    ts_engine_free(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_prompt_that_fits_fits_again_when_it_is_found),
        cmocka_unit_test(where_there_is_room_a_found_tail_stays_in_the_cache),
        cmocka_unit_test(a_step_that_is_refused_takes_no_tail_from_the_cache),
        cmocka_unit_test(where_memory_for_a_slab_is_not_to_be_had_what_is_cached_makes_room),
        cmocka_unit_test(what_one_tenant_has_cached_leaves_others_their_share),
        cmocka_unit_test(namespaces_that_nobody_uses_make_room_for_new_ones),
        cmocka_unit_test(a_layer_whose_last_run_failed_is_published_by_nobody),
        cmocka_unit_test(of_a_lost_slab_nothing_is_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
