/* What operators do to the prefix cache, as the engine does it: bit by bit, and under those who
 * use it. */
#include "engine_util.h"

#include <stdlib.h>
#include <string.h>

enum { MANY = TS_SWEEP_ENTRIES + 5000, SLAB = 64 };

static const ts_space_name model = {"m", 1};

static uint32_t match(ts_engine *e, uint64_t s, const uint32_t *ids, uint32_t n, bool wait,
                      bool again, ts_answer *answer)
{
    apply(e,
          (ts_command){.op = TS_OP_SEQ_MATCH,
                       .session = s,
                       .again = again,
                       .seq_match = {.tokens = ids,
                                     .counts = &n,
                                     .count = 1,
                                     .space = model,
                                     .dry = !wait,
                                     .wait = wait}},
          answer);
    return answer->status == TS_OK ? answer->matched.lengths[0] : 0;
}

/* A sequence of the ids. */
static uint64_t compute(ts_engine *e, uint64_t s, const uint32_t *ids, uint32_t n)
{
    ts_answer answer;
    apply(e,
          (ts_command){
              .op = TS_OP_SEQ_CREATE, .session = s, .seq_create = {.count = 1, .space = model}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    const uint64_t seq = answer.seqs.seqs[0];
    const uint64_t step = step_of_ids(e, s, seq, ids, n);
    assert_int_equal(step_end(e, s, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
    return seq;
}

/* An engine whose only session has freed MANY blocks of one token that stay cached. */
static ts_engine *with_many_cached(uint64_t *session, uint32_t **ids)
{
    ts_engine *e = engine_new(MANY, SLAB, 1, TS_CLIENT_WRITE_ALL);
    *session = session_new(e, 1);
    *ids = malloc(MANY * sizeof **ids);
    assert_non_null(*ids);
    for (uint32_t i = 0; i < MANY; i++)
        (*ids)[i] = i;
    assert_int_equal(free_seq(e, *session, compute(e, *session, *ids, MANY)), TS_OK);
    sweep_all(e);
    assert_int_equal(e->pools[0].books.cached, MANY);
    return e;
}

static void what_is_dropped_is_not_found_from_the_answer_on_and_goes_bit_by_bit(void **state)
{
    (void)state;
    uint64_t s;
    uint32_t *ids;
    ts_answer answer;
    for (int how = 0; how < 2; how++) {
        ts_engine *e = with_many_cached(&s, &ids);
        const ts_pool_books *books = &e->pools[0].books;
        assert_int_equal(match(e, s, ids, MANY, false, false, &answer), MANY - 1);
        if (how == 0) {
            apply(e, (ts_command){.op = TS_OP_CACHE_DROP}, &answer);
            assert_int_equal(answer.status, TS_OK);
            assert_int_equal(answer.dropped, MANY);
        } else {
            apply(e, (ts_command){.op = TS_OP_CACHE_SET, .cache_set.on = false}, &answer);
            assert_int_equal(answer.status, TS_OK);
        }
        assert_int_equal(books->cached, MANY); /* it takes no time in proportion */
        assert_int_equal(match(e, s, ids, MANY, false, false, &answer), 0);
        check_engine(e);
        apply(e, (ts_command){.op = TS_OP_SWEEP}, &answer);
        assert_int_equal(books->cached, MANY - TS_SWEEP_ENTRIES);
        assert_true(ts_engine_sweeps(e));
        apply(e, (ts_command){.op = TS_OP_SWEEP}, &answer);
        assert_int_equal(books->cached, 0);
        assert_false(ts_engine_sweeps(e));
        assert_int_equal(books->evicted[TS_EVICT_DROP], MANY);
        check_engine(e);
        free(ids);
        ts_engine_free(e);
    }
}

static void a_pool_shrinks_in_slices_and_is_asked_again_between_them(void **state)
{
    (void)state;
    uint64_t s;
    uint32_t *ids;
    ts_answer answer;
    ts_engine *e = with_many_cached(&s, &ids);
    const ts_pool_books *books = &e->pools[0].books;
    const ts_command shrink = {.op = TS_OP_POOL_RESIZE, .pool_resize.num_blocks = SLAB};
    ts_engine_apply(e, &shrink, &answer);
    assert_int_equal(answer.status, TS_NEED_SWEEP);
    assert_int_equal(books->evicted[TS_EVICT_RESIZE], TS_SWEEP_ENTRIES);
    assert_int_equal(books->num_blocks, MANY);
    assert_true(ts_engine_sweeps(e)); /* so that somebody asks again */
    check_engine(e);
    apply(e, (ts_command){.op = TS_OP_SWEEP}, &answer);
    ts_engine_apply(e, &shrink, &answer);
    assert_int_equal(answer.status, TS_OK);
    assert_int_equal(books->num_blocks, SLAB);
    assert_int_equal(books->cached + books->evicted[TS_EVICT_RESIZE], MANY);
    check_engine(e);
    free(ids);
    ts_engine_free(e);
}

static void who_waits_for_what_is_dropped_computes_it_itself(void **state)
{
    (void)state;
    enum { PROMPT = 32 };
    uint32_t ids[PROMPT];
    ts_answer answer;
    for (uint32_t i = 0; i < PROMPT; i++)
        ids[i] = i;
    for (int off = 0; off < 2; off++) {
        ts_engine *e = engine_new(256, SLAB, 4, TS_CLIENT_WRITE_ALL);
        const uint64_t one = session_new(e, 1), other = session_new(e, 1);
        assert_int_equal(match(e, one, ids, PROMPT, true, false, &answer), 0);
        const uint64_t seq = answer.matched.seqs[0];
        const uint64_t half = step_of_ids(e, one, seq, ids, PROMPT / 2);
        assert_int_equal(step_end(e, one, TS_OP_STEP_COMMIT, half, NULL, 0), TS_OK);
        const uint64_t step = step_of_ids(e, one, seq, ids + PROMPT / 2, PROMPT / 2);
        match(e, other, ids, PROMPT, true, false, &answer);
        assert_int_equal(answer.status, TS_WAITS);
        if (off)
            apply(e, (ts_command){.op = TS_OP_CACHE_SET, .cache_set.on = false}, &answer);
        else
            apply(e, (ts_command){.op = TS_OP_CACHE_DROP}, &answer);
        assert_int_equal(answer.status, TS_OK);
        sweep_all(e);
        check_engine(e);
        assert_int_equal(step_end(e, one, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
        assert_true(ts_engine_woken(e) == other);
        assert_int_equal(match(e, other, ids, PROMPT, true, true, &answer), 0);
        assert_int_equal(answer.status, TS_OK);
        assert_true(ts_engine_woken(e) == 0);
        /* What is only in use costs no command anything. */
        assert_true(e->pools[0].books.index->retired_space == TS_NO_BLOCK);
        ts_answer again;
        apply(e, (ts_command){.op = TS_OP_CACHE_DROP}, &again); /* a namespace without blocks */
        assert_int_equal(again.status, TS_OK);
        assert_int_equal(again.dropped, 0);
        assert_true(e->pools[0].books.index->retired_space == TS_NO_BLOCK);
        check_engine(e);
        /* The one that was there goes on with all that it has. */
        ts_answer lengths;
        apply(e,
              (ts_command){
                  .op = TS_OP_SEQ_LENGTHS, .session = one, .seq_batch = {.seqs = &seq, .count = 1}},
              &lengths);
        assert_int_equal(lengths.lengths.lengths[0], PROMPT);
        check_engine(e);
        ts_engine_free(e);
    }
}

static void a_pool_that_is_made_later_counts_ages_from_then_on(void **state)
{
    (void)state;
    const uint32_t ids[4] = {1, 2, 3, 4};
    ts_answer answer;
    ts_engine *e = engine_new(64, 4, 4, TS_CLIENT_WRITE_ALL);
    apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = 500000}, &answer);
    ts_pool_config config = e->pools[0].config;
    apply(e, (ts_command){.op = TS_OP_POOL_REMOVE}, &answer);
    assert_int_equal(answer.status, TS_OK);
    pool_add(e, &config);
    const uint64_t s = session_new(e, 1);
    assert_int_equal(free_seq(e, s, compute(e, s, ids, 4)), TS_OK);
    apply(e, (ts_command){.op = TS_OP_CACHE_DROP, .now_ms = 507000}, &answer);
    sweep_all(e);
    const ts_pool_books *books = &e->pools[0].books;
    assert_int_equal(books->evicted[TS_EVICT_DROP], 1);
    assert_int_equal(books->age_sum, 7);
    assert_int_equal(books->ages[1], 1); /* up to 10 s */
    ts_engine_free(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_dropped_is_not_found_from_the_answer_on_and_goes_bit_by_bit),
        cmocka_unit_test(a_pool_shrinks_in_slices_and_is_asked_again_between_them),
        cmocka_unit_test(who_waits_for_what_is_dropped_computes_it_itself),
        cmocka_unit_test(a_pool_that_is_made_later_counts_ages_from_then_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
