/* What one session or tenant may hold, and that long work goes on bit by bit. */
#include "engine_util.h"

static ts_status batch(ts_engine *e, ts_op op, uint64_t session, const uint64_t *seqs,
                       const uint32_t *lengths, uint32_t count, ts_answer *answer)
{
    return apply(e,
                 (ts_command){.op = op,
                              .session = session,
                              .seq_batch = {.seqs = seqs, .lengths = lengths, .count = count}},
                 answer);
}

static ts_status keep(ts_engine *e, uint64_t session, uint64_t seq, const char *name,
                      ts_answer *answer)
{
    return apply(e,
                 (ts_command){.op = TS_OP_SEQ_KEEP,
                              .session = session,
                              .seq_keep = {.seq = seq, .name = name}},
                 answer);
}

#define TENANT(e) ((e)->pools[0].books.tenants[0])

static void assert_amounts(const ts_answer *answer, uint64_t needed, uint64_t available,
                           uint64_t limit)
{
    assert_int_equal(answer->amounts.needed, needed);
    assert_int_equal(answer->amounts.free, available);
    assert_int_equal(answer->amounts.limit, limit);
}

static void quotas_stop_a_session_and_a_tenant_but_no_other(void **state)
{
    (void)state;
    ts_engine *e = engine_new(64, 4, 4, TS_CLIENT_WRITE_ALL);
    e->limits.session_sequences = 3;
    e->limits.session_blocks = 5;
    e->limits.session_steps = 1;
    e->pools[0].config.tenant_blocks_max = 8;
    uint64_t s = session_new(e, 1000), same_uid = session_new(e, 1000),
             other = session_new(e, 1001);
    uint64_t x = seq_new(e, s);
    ts_answer answer;
    ts_command create = {.op = TS_OP_SEQ_CREATE, .session = s, .seq_create = {.count = 3}};
    assert_int_equal(apply(e, create, &answer), TS_EQUOTA);
    assert_string_equal(answer.message,
                        "the session owns 1 sequences; 3 more would pass its limit of 3");
    assert_amounts(&answer, 3, 2, 3);
    create.seq_create.count = 2;
    assert_int_equal(apply(e, create, &answer), TS_OK);
    uint64_t y = answer.seqs.seqs[0];
    uint32_t n = 24;
    assert_int_equal(begin(e, s, &x, &n, 1, true, &answer), TS_EQUOTA);
    assert_string_equal(
        answer.message,
        "the session refers to 0 blocks; 6 more would pass its limit of 5 (session_blocks)");
    assert_amounts(&answer, 6, 5, 5);
    append(e, s, x, 20);
    n = 1;
    assert_int_equal(begin(e, s, &y, &n, 1, true, &answer), TS_EQUOTA);
    uint64_t z = seq_new(e, same_uid);
    n = 16;
    assert_int_equal(begin(e, same_uid, &z, &n, 1, true, &answer), TS_EQUOTA);
    assert_string_equal(answer.message,
                        "uid 1000 uses 5 blocks of pool 'test'; 4 more would pass its limit of 8");
    assert_amounts(&answer, 4, 3, 8);
    append(e, same_uid, z, 12);
    append(e, other, seq_new(e, other), 20);
    assert_int_equal(free_seq(e, s, x), TS_OK); /* what is given back may be taken again */
    n = 4;
    assert_int_equal(begin(e, s, &y, &n, 1, false, &answer), TS_OK);
    check_engine(e);
    ts_engine_free(e);
}

static void a_tenant_has_its_share_of_sessions_and_operators_get_in(void **state)
{
    (void)state;
    ts_engine_limits limits;
    ts_engine_default_limits(&limits);
    limits.sessions = 20;
    limits.tenant_sessions = 5;
    ts_engine *e = ts_engine_new(&limits);
    ts_answer answer;
    ts_command open = {.op = TS_OP_SESSION_OPEN, .session_open = {.uid = 7, .program = "test"}};
    uint64_t first = 0;
    for (int i = 0; i < 5; i++) {
        assert_int_equal(apply(e, open, &answer), TS_OK);
        first = first != 0 ? first : answer.session;
    }
    assert_int_equal(apply(e, open, &answer), TS_EQUOTA);
    assert_string_equal(answer.message, "uid 7 has 5 sessions; the limit is 5 (tenant_sessions)");
    open.session_open.uid = 8;
    for (int i = 0; i < 5; i++)
        assert_int_equal(apply(e, open, &answer), TS_OK);
    open.session_open.uid = 9;
    assert_int_equal(apply(e, open, &answer), TS_OK);
    assert_int_equal(apply(e, open, &answer), TS_OK);
    assert_int_equal(apply(e, open, &answer), TS_EQUOTA);
    assert_string_equal(answer.message,
                        "12 sessions are open; the limit is 20, the last 8 of them for operators");
    open.session_open.uid = 0;
    open.session_open.is_operator = true;
    for (int i = 0; i < 8; i++)
        assert_int_equal(apply(e, open, &answer), TS_OK);
    assert_int_equal(apply(e, open, &answer), TS_EQUOTA);
    assert_string_equal(answer.message, "20 sessions are open; the limit is 20");
    close_session(e, first); /* what is given back may be taken again */
    assert_int_equal(apply(e, open, &answer), TS_OK);
    ts_engine_free(e);
}

static void a_tenant_has_its_share_of_sequences_and_table_entries(void **state)
{
    (void)state;
    ts_engine *e = engine_new(64, 16, 4, TS_CLIENT_WRITE_ALL);
    e->pools[0].config.tenant_sequences_max = 4;
    e->pools[0].config.tenant_entries_max = 10;
    uint64_t s = session_new(e, 1000), again = session_new(e, 1000), other = session_new(e, 1001);
    ts_answer answer;
    uint64_t x = seq_new(e, s);
    (void)seq_new(e, again);
    ts_command create = {.op = TS_OP_SEQ_CREATE, .session = s, .seq_create = {.count = 3}};
    assert_int_equal(apply(e, create, &answer), TS_EQUOTA);
    assert_string_equal(answer.message,
                        "uid 1000 has 2 sequences in pool 'test'; 3 more would pass its "
                        "limit of 4 (tenant_sequences)");
    create.session = other;
    assert_int_equal(apply(e, create, &answer), TS_OK);
    append(e, s, x, 16); /* 4 blocks */
    uint64_t y = fork_seq(e, s, x);
    assert_int_equal(TENANT(e).entries, 8);
    ts_command fork = {.op = TS_OP_SEQ_FORK, .session = s, .seq_fork = {.parent = x, .count = 1}};
    assert_int_equal(apply(e, fork, &answer), TS_EQUOTA);
    assert_string_equal(answer.message,
                        "the block tables of uid 1000 in pool 'test' have 8 entries; 4 more would "
                        "pass its limit of 10 (tenant_entries)");
    assert_int_equal(keep(e, s, y, "kept ones count too", &answer), TS_OK);
    uint32_t n = 9;
    assert_int_equal(begin(e, s, &x, &n, 1, true, &answer), TS_EQUOTA);
    n = 8;
    assert_int_equal(begin(e, s, &x, &n, 1, true, &answer), TS_OK);
    check_engine(e);
    ts_engine_free(e);
}

static void kept_sequences_pin_each_block_once_up_to_a_share(void **state)
{
    (void)state;
    ts_engine *e = engine_new(64, 16, 4, TS_CLIENT_WRITE_ALL);
    e->pools[0].config.tenant_pinned_max = 6;
    uint64_t s = session_new(e, 1000);
    ts_answer answer;
    uint64_t x = seq_new(e, s);
    append(e, s, x, 18); /* 5 blocks */
    uint64_t y = fork_seq(e, s, x), z = seq_new(e, s);
    assert_int_equal(keep(e, s, x, "x", &answer), TS_OK);
    assert_int_equal(TENANT(e).pinned, 5);
    assert_int_equal(keep(e, s, y, "y", &answer), TS_OK); /* the same blocks */
    assert_int_equal(TENANT(e).pinned, 5);
    append(e, s, z, 8);
    assert_int_equal(keep(e, s, z, "z", &answer), TS_EQUOTA);
    assert_string_equal(answer.message,
                        "kept sequences of uid 1000 refer to 5 blocks of pool 'test'; 2 "
                        "more would pass its limit of 6 (tenant_pinned)");
    /* A step on a kept one: its shared tail is copied, which is one block more. */
    append(e, s, y, 1);
    assert_int_equal(TENANT(e).pinned, 6);
    uint32_t n = 2;
    assert_int_equal(begin(e, s, &y, &n, 1, true, &answer), TS_EQUOTA);
    /* Kept under another name while a step has replaced its tail, which is then taken back. */
    n = 1;
    e->pools[0].config.tenant_pinned_max = 64;
    uint64_t w = fork_seq(e, s, x);
    assert_int_equal(begin(e, s, &w, &n, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(keep(e, s, w, "w", &answer), TS_OK);
    assert_int_equal(keep(e, s, w, "ww", &answer), TS_OK);
    check_engine(e);
    step_done(e, step, TS_NONE);
    assert_int_equal(step_end(e, s, TS_OP_STEP_ABORT, step, NULL, 0), TS_OK);
    assert_int_equal(TENANT(e).pinned, 6);
    check_engine(e);
    uint32_t length = 4;
    assert_int_equal(batch(e, TS_OP_SEQ_TRUNCATE, s, &y, &length, 1, &answer), TS_OK);
    assert_int_equal(TENANT(e).pinned, 5);
    assert_int_equal(keep(e, s, y, "", &answer), TS_OK); /* forgotten */
    assert_int_equal(free_seq(e, s, x), TS_OK);
    assert_int_equal(free_seq(e, s, w), TS_OK);
    assert_int_equal(TENANT(e).pinned, 0);
    check_engine(e);
    ts_engine_free(e);
}

/* ---- bit by bit ---- */

enum { MANY = 1000, LONG = 1000 }; /* sequences, and their blocks */

/* Many forks of a long sequence, made in calls that are short enough. */
static void make_forks(ts_engine *e, uint64_t s, uint64_t *parent, uint64_t *forks)
{
    ts_answer answer;
    uint32_t each = TS_COMMAND_ENTRIES / LONG;
    *parent = seq_new(e, s);
    append(e, s, *parent, LONG * 4);
    for (uint32_t made = 0; made < MANY; made += each) {
        uint32_t count = MANY - made < each ? MANY - made : each;
        ts_command fork = {
            .op = TS_OP_SEQ_FORK, .session = s, .seq_fork = {.parent = *parent, .count = count}};
        assert_int_equal(apply(e, fork, &answer), TS_OK);
        memcpy(forks + made, answer.seqs.seqs, count * sizeof *forks);
    }
}

static void one_call_changes_so_many_table_entries_at_most(void **state)
{
    (void)state;
    ts_engine *e = engine_new(2048, 64, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000), parent, *forks = malloc(MANY * sizeof *forks);
    ts_answer answer;
    e->limits.session_blocks = 1u << 30;
    make_forks(e, s, &parent, forks);
    ts_command fork = {
        .op = TS_OP_SEQ_FORK, .session = s, .seq_fork = {.parent = parent, .count = 263}};
    assert_int_equal(apply(e, fork, &answer), TS_EINVAL);
    assert_string_equal(answer.message,
                        "263 forks of 1000 blocks each; one call makes up to 262144 "
                        "block table entries");
    uint32_t *zeros = calloc(MANY, sizeof *zeros);
    assert_int_equal(batch(e, TS_OP_SEQ_TRUNCATE, s, forks, zeros, MANY, &answer), TS_EINVAL);
    assert_string_equal(answer.message,
                        "a truncation of 1000 sequences by 1000000 blocks; one call "
                        "drops up to 262144");
    assert_int_equal(length_of(e, s, forks[0]), LONG * 4);
    check_engine(e);
    free(zeros);
    free(forks);
    ts_engine_free(e);
}

static void many_sequences_are_freed_bit_by_bit(void **state)
{
    (void)state;
    ts_engine *e = engine_new(1024, 64, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000), parent, *forks = malloc(MANY * sizeof *forks);
    ts_answer answer;
    e->limits.session_blocks = 1u << 30;
    make_forks(e, s, &parent, forks);
    assert_int_equal(keep(e, s, forks[MANY - 1], "kept", &answer), TS_OK);
    assert_int_equal(batch(e, TS_OP_SEQ_FREE, s, forks, NULL, MANY, &answer), TS_OK);
    assert_true(ts_engine_sweeps(e));
    assert_int_equal(free_seq(e, s, forks[MANY - 1]), TS_ENOENT); /* they are gone for all others */
    assert_int_equal(e->sessions[0].sequences, 1);
    check_engine(e);
    /* What they still hold is waited for, not refused. */
    assert_int_equal(free_seq(e, s, parent), TS_OK);
    uint64_t x = seq_new(e, s);
    uint32_t n = 1024 * 4;
    assert_int_equal(begin(e, s, &x, &n, 1, true, &answer), TS_NEED_SWEEP);
    uint32_t bits = sweep_all(e);
    assert_in_range(bits, (MANY * LONG - TS_COMMAND_ENTRIES) / (TS_SWEEP_ENTRIES + LONG), 60);
    check_engine(e);
    assert_int_equal(begin(e, s, &x, &n, 1, true, &answer), TS_OK);
    assert_int_equal(e->pools[0].seqs.live, 1);
    assert_int_equal(TENANT(e).pinned, 0);
    free(forks);
    ts_engine_free(e);
}

static void a_session_ends_bit_by_bit(void **state)
{
    (void)state;
    ts_engine *e = engine_new(1024, 64, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000), other = session_new(e, 1000), parent,
             *forks = malloc(MANY * sizeof *forks);
    ts_answer answer;
    uint32_t n = 4;
    e->limits.session_blocks = 1u << 30;
    make_forks(e, s, &parent, forks);
    assert_int_equal(begin(e, s, &forks[7], &n, 1, false, &answer), TS_OK);
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_STEP_RUN,
                                        .session = s,
                                        .step_run.step = answer.begun.step->id},
                           &answer),
                     TS_EINVAL); /* it has no exchange: the step has nothing in flight */
    close_session(e, s);
    assert_int_equal(e->live_sessions, 2); /* it is closing */
    check_engine(e);
    uint64_t x = seq_new(e, other);
    n = 1024 * 4;
    assert_int_equal(begin(e, other, &x, &n, 1, true, &answer), TS_NEED_SWEEP);
    assert_true(sweep_all(e) > (MANY * LONG) / (TS_SWEEP_ENTRIES + LONG) - 2);
    assert_int_equal(e->live_sessions, 1);
    check_engine(e);
    assert_int_equal(begin(e, other, &x, &n, 1, true, &answer), TS_OK);
    uint64_t again = session_new(e, 1000); /* in its place */
    assert_int_equal((uint32_t)again, (uint32_t)s);
    check_engine(e);
    free(forks);
    ts_engine_free(e);
}

static void a_removed_pools_tables_are_freed_bit_by_bit(void **state)
{
    (void)state;
    enum { KEPT = 40000 };
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000);
    ts_answer answer;
    char name[16];
    for (uint32_t i = 0; i < KEPT; i++) {
        snprintf(name, sizeof name, "%u", i);
        assert_int_equal(keep(e, s, seq_new(e, s), name, &answer), TS_OK);
    }
    close_session(e, s);
    assert_int_equal(apply(e, (ts_command){.op = TS_OP_POOL_REMOVE}, &answer), TS_OK);
    assert_int_equal(e->live_pools, 0);
    uint32_t bits = 0;
    for (; ts_engine_sweeps(e); bits++)
        assert_int_equal(apply(e, (ts_command){.op = TS_OP_SWEEP}, &answer), TS_OK);
    assert_int_equal(bits, 2);
    ts_engine_free(e);
}

static void a_selection_that_gives_up_what_is_kept_gives_up_nothing_of_the_session(void **state)
{
    (void)state;
    ts_engine *e = engine_new(64, 4, 4, TS_CLIENT_WRITE_ALL);
    e->limits.session_sequences = 2;
    uint64_t s = session_new(e, 1000), seqs[2] = {seq_new(e, s), seq_new(e, s)}, more;
    ts_answer answer;
    assert_int_equal(keep(e, s, seqs[0], "kept", &answer), TS_OK);
    more = seq_new(e, s);
    static const uint32_t from[] = {1, 1};
    const ts_command select = {.op = TS_OP_SEQ_SELECT,
                               .session = s,
                               .seq_select = {.seqs = seqs, .count = 2, .from = from, .picked = 2}};
    assert_int_equal(apply(e, select, &answer), TS_EQUOTA);
    assert_string_equal(answer.message,
                        "the session owns 2 sequences; 1 more would pass its limit of 2");
    assert_int_equal(batch(e, TS_OP_SEQ_FREE, s, &more, NULL, 1, &answer), TS_OK);
    assert_int_equal(apply(e, select, &answer), TS_OK);
    assert_int_equal(
        apply(e, (ts_command){.op = TS_OP_SEQ_CREATE, .session = s, .seq_create = {.count = 1}},
              &answer),
        TS_EQUOTA);
    check_engine(e);
    ts_engine_free(e);
}

static void a_limit_that_is_lowered_under_what_a_session_has_still_holds(void **state)
{
    (void)state;
    ts_engine *e = engine_new(64, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1000), kept = seq_new(e, s);
    ts_answer answer;
    assert_int_equal(keep(e, s, kept, "kept", &answer), TS_OK);
    for (int i = 0; i < 3; i++)
        (void)seq_new(e, s);
    e->limits.session_sequences = 2;
    assert_int_equal(
        apply(e, (ts_command){.op = TS_OP_SEQ_CREATE, .session = s, .seq_create = {.count = 1}},
              &answer),
        TS_EQUOTA);
    assert_int_equal(keep(e, s, kept, "", &answer), TS_EQUOTA);
    ts_engine_free(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quotas_stop_a_session_and_a_tenant_but_no_other),
        cmocka_unit_test(a_tenant_has_its_share_of_sessions_and_operators_get_in),
        cmocka_unit_test(a_tenant_has_its_share_of_sequences_and_table_entries),
        cmocka_unit_test(kept_sequences_pin_each_block_once_up_to_a_share),
        cmocka_unit_test(a_selection_that_gives_up_what_is_kept_gives_up_nothing_of_the_session),
        cmocka_unit_test(a_limit_that_is_lowered_under_what_a_session_has_still_holds),
        cmocka_unit_test(one_call_changes_so_many_table_entries_at_most),
        cmocka_unit_test(many_sequences_are_freed_bit_by_bit),
        cmocka_unit_test(a_session_ends_bit_by_bit),
        cmocka_unit_test(a_removed_pools_tables_are_freed_bit_by_bit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
