/* The engine: whose sequences, names and slabs are whose, and what ids name. */
#include "engine_util.h"

#define BLOCKS(e) ((e)->pools[0].books)

static void names_belong_to_a_tenant_and_lead_to_one_sequence(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000), foreign = session_new(e, 1001);
    uint64_t x = seq_new(e, s), y = seq_new(e, s);
    assert_int_equal(keep_seq(e, s, x, "a"), TS_OK);
    assert_int_equal(keep_seq(e, s, x, "a"), TS_OK); /* again changes nothing */
    assert_int_equal(keep_seq(e, s, y, "a"), TS_EEXIST);
    assert_int_equal(keep_seq(e, s, x, "b"), TS_OK); /* a new name instead */
    assert_int_equal(attach(e, s, "a"), 0);
    assert_int_equal(attach(e, s, "b"), x);
    assert_int_equal(attach(e, foreign, "b"), 0);
    char longest[129];
    memset(longest, 'n', 128);
    longest[128] = '\0';
    assert_int_equal(keep_seq(e, s, y, longest), TS_EINVAL);
    longest[127] = '\0';
    assert_int_equal(keep_seq(e, s, y, longest), TS_OK);
    assert_int_equal(attach(e, s, longest), y);
    assert_int_equal(keep_seq(e, s, x, ""), TS_OK); /* its own again */
    assert_int_equal(keep_seq(e, s, x, ""), TS_ENOENT);
    check_engine(e);
    close_session(e, s);
    assert_int_equal(e->pools[0].seqs.live, 1); /* y is kept */
    check_engine(e);
    ts_engine_free(e);
}

static void foreign_sequences_are_out_of_reach(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000), same_uid = session_new(e, 1000);
    uint64_t foreign = session_new(e, 1001), seq = seq_new(e, s);
    append(e, s, seq, 3);
    ts_answer answer;
    uint32_t n = 1;
    assert_int_equal(begin(e, foreign, &seq, &n, 1, false, &answer), TS_ENOENT);
    assert_int_equal(free_seq(e, foreign, seq), TS_ENOENT);
    assert_int_equal(free_seq(e, same_uid, seq), TS_EPERM);
    assert_int_equal(begin(e, s, &seq, &n, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(step_end(e, same_uid, TS_OP_STEP_ABORT, step, NULL, 0), TS_ENOENT);
    assert_int_equal(step_end(e, foreign, TS_OP_STEP_COMMIT, step, NULL, 0), TS_ENOENT);
    ts_command query = {
        .op = TS_OP_SEQ_LENGTHS, .session = 77, .seq_batch = {.seqs = &seq, .count = 1}};
    assert_int_equal(apply(e, query, &answer), TS_ENOENT); /* no such session */
    query.session = s;
    query.pool = 1;
    assert_int_equal(apply(e, query, &answer), TS_ENOENT); /* no such pool */
    check_engine(e);
    ts_engine_free(e);
}

static void ids_of_the_dead_never_come_back(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000), old = seq_new(e, s);
    assert_int_equal(free_seq(e, s, old), TS_OK);
    uint64_t new = seq_new(e, s); /* takes the same place */
    assert_int_equal((uint32_t) new, (uint32_t)old);
    assert_int_not_equal(new, old);
    assert_int_equal(free_seq(e, s, old), TS_ENOENT);
    ts_answer answer;
    uint32_t n = 1;
    assert_int_equal(begin(e, s, &new, &n, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(step_end(e, s, TS_OP_STEP_ABORT, step, NULL, 0), TS_OK);
    assert_int_equal(begin(e, s, &new, &n, 1, false, &answer), TS_OK);
    assert_int_not_equal(answer.begun.step->id, step);
    assert_int_equal(step_end(e, s, TS_OP_STEP_ABORT, step, NULL, 0), TS_ENOENT);
    close_session(e, s);
    uint64_t next = session_new(e, 1000);
    assert_int_not_equal(next, s);
    assert_int_equal(free_seq(e, s, new), TS_ENOENT);
    assert_int_equal(free_seq(e, next, new), TS_ENOENT);
    ts_engine_free(e);
}

static void count_grants(void *arg, uint32_t pool, uint32_t slab)
{
    (void)pool;
    uint32_t *grants = arg;
    grants[slab]++;
}

static void a_slab_serves_one_tenant_and_is_renewed_for_the_next(void **state)
{
    (void)state;
    ts_engine *e = engine_new(8, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000), t = session_new(e, 1001);
    uint64_t x = seq_new(e, s), y = seq_new(e, t);
    uint32_t grants[2] = {0}, n = 4;
    ts_answer answer;
    ts_command c = {.op = TS_OP_STEP_BEGIN,
                    .session = s,
                    .step_begin = {.seqs = &x, .new_tokens = &n, .count = 1, .append = true}};
    assert_int_equal(apply_with(e, &c, &answer, count_grants, grants), TS_OK);
    c.session = t;
    c.step_begin.seqs = &y;
    assert_int_equal(apply_with(e, &c, &answer, count_grants, grants), TS_OK);
    assert_int_equal(answer.begun.blocks[0], 4); /* not behind the other's block */
    n = 16;
    assert_int_equal(apply_with(e, &c, &answer, count_grants, grants), TS_ENOSPC);
    assert_int_equal(free_seq(e, s, x), TS_OK);
    uint32_t generation = BLOCKS(e).slabs[0].generation;
    assert_int_equal(apply_with(e, &c, &answer, count_grants, grants), TS_OK);
    assert_int_equal(BLOCKS(e).slabs[0].generation, generation + 1);
    assert_int_equal(grants[0], 2); /* new memory: what was there is not to be seen */
    assert_int_equal(grants[1], 1);
    check_engine(e);
    ts_engine_free(e);
}

static void a_kept_sequence_is_removed_when_no_session_is_left(void **state)
{
    (void)state;
    ts_engine *e = engine_new(8, 4, 4, TS_CLIENT_WRITE_ALL);
    ts_answer answer;
    uint64_t session = session_new(e, 1), seq = seq_new(e, session);
    assert_int_equal(begin(e, session, &seq, &(uint32_t){5}, 1, true, &answer), TS_OK);
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_SEQ_KEEP,
                                        .session = session,
                                        .seq_keep = {.seq = seq, .name = "kept"}},
                           &answer),
                     TS_OK);
    apply(e, (ts_command){.op = TS_OP_SESSION_CLOSE, .session = session}, &answer);
    assert_int_equal(e->live_sessions, 0);
    assert_int_equal(e->pools[0].books.used, 2);
    assert_int_equal(
        apply(e, (ts_command){.op = TS_OP_SEQ_REMOVE, .seq_remove = {.seq = seq}}, &answer), TS_OK);
    assert_int_equal(e->pools[0].books.used, 0);
    check_engine(e);
    ts_engine_free(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_belong_to_a_tenant_and_lead_to_one_sequence),
        cmocka_unit_test(foreign_sequences_are_out_of_reach),
        cmocka_unit_test(ids_of_the_dead_never_come_back),
        cmocka_unit_test(a_slab_serves_one_tenant_and_is_renewed_for_the_next),
        cmocka_unit_test(a_kept_sequence_is_removed_when_no_session_is_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
