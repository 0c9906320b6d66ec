/* Kept sequences as the engine decides it: listed, replaced, and with a time to live. */
#include "engine_util.h"

#include <stdio.h>
#include <string.h>

#define TENANT(e) ((e)->pools[0].books.tenants[0])

static ts_engine *small_engine(void)
{
    return engine_new(64, 4, 4, TS_CLIENT_WRITE_ALL);
}

static ts_status keep(ts_engine *e, uint64_t session, uint64_t seq, const char *name,
                      uint64_t ttl_ms, bool replace, ts_answer *answer)
{
    return apply(
        e,
        (ts_command){.op = TS_OP_SEQ_KEEP,
                     .session = session,
                     .seq_keep = {.seq = seq, .name = name, .ttl_ms = ttl_ms, .replace = replace}},
        answer);
}

/* A sequence of `length` tokens. */
static uint64_t of_length(ts_engine *e, uint64_t session, uint32_t length)
{
    uint64_t seq = seq_new(e, session);
    append(e, session, seq, length);
    return seq;
}

static void list(ts_engine *e, uint64_t session, const char *prefix, const char *after,
                 uint32_t limit, ts_answer *answer)
{
    apply(e,
          (ts_command){.op = TS_OP_SEQ_LIST,
                       .session = session,
                       .seq_list = {.prefix = prefix, .after = after, .limit = limit}},
          answer);
    assert_int_equal(answer->status, TS_OK);
}

static void advance(ts_engine *e, uint64_t now_ms)
{
    ts_answer answer;
    assert_int_equal(apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = now_ms}, &answer), TS_OK);
    (void)sweep_all(e);
    check_engine(e);
}

static void a_tenant_s_names_are_listed_in_order_by_prefix_and_page_by_page(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), other = session_new(e, 2);
    static const char *const names[] = {"user/9", "sys/b", "user/1", "sys", "user/10", "sys/a"};
    ts_answer answer;
    for (uint32_t i = 0; i < 6; i++)
        assert_int_equal(keep(e, session, of_length(e, session, i + 1), names[i], i == 2 ? 5000 : 0,
                              false, &answer),
                         TS_OK);
    assert_int_equal(keep_seq(e, other, seq_new(e, other), "user/2"), TS_OK);
    list(e, session, "", "", 0, &answer);
    assert_int_equal(answer.kept.count, 6);
    static const char *const sorted[] = {"sys", "sys/a", "sys/b", "user/1", "user/10", "user/9"};
    static const uint32_t lengths[] = {4, 6, 2, 3, 5, 1};
    for (uint32_t i = 0; i < 6; i++) {
        assert_string_equal(answer.kept.names[i], sorted[i]);
        assert_int_equal(answer.kept.lengths[i], lengths[i]);
        assert_int_equal(answer.kept.blocks[i], (lengths[i] + 3) / 4);
        assert_int_equal(answer.kept.left_ms[i], i == 3 ? 5000 : 0);
        assert_int_equal(answer.kept.seqs[i], attach(e, session, sorted[i]));
        list(e, session, "", "", 0, &answer);
    }
    assert_string_equal(answer.kept.next, "");
    list(e, session, "user/1", "", 0, &answer);
    assert_int_equal(answer.kept.count, 2);
    list(e, session, "sys/", "", 1, &answer);
    assert_int_equal(answer.kept.count, 1);
    assert_string_equal(answer.kept.names[0], "sys/a");
    assert_string_equal(answer.kept.next, "sys/a");
    list(e, session, "sys/", "sys/a", 1, &answer);
    assert_string_equal(answer.kept.names[0], "sys/b");
    assert_string_equal(answer.kept.next, "");
    list(e, session, "sys/", "sys/aaa", 0, &answer); /* a name that isn't there, or not any more */
    assert_int_equal(answer.kept.count, 1);
    list(e, session, "sys/", "a", 0, &answer); /* before the prefix */
    assert_int_equal(answer.kept.count, 2);
    list(e, session, "sys/", "user/1", 0, &answer);
    assert_int_equal(answer.kept.count, 0);
    list(e, other, "", "", 0, &answer);
    assert_int_equal(answer.kept.count, 1);
    assert_string_equal(answer.kept.names[0], "user/2");
    ts_engine_free(e);
}

static void an_answer_tells_of_200_at_most_and_walks_over_no_more(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1);
    char name[16], last[16] = "", after[16] = "";
    ts_answer answer;
    uint32_t told = 0, answers = 0;
    for (uint32_t i = 0; i < 1000; i++) { /* of every three, one is over and not swept yet */
        snprintf(name, sizeof name, "%03u", i * 7 % 1000);
        assert_int_equal(keep(e, session, seq_new(e, session), name, i * 7 % 1000 % 3 == 0 ? 1 : 0,
                              false, &answer),
                         TS_OK);
    }
    e->now_ms = 1;
    do {
        list(e, session, "", after, UINT32_MAX, &answer);
        assert_true(answer.kept.count <= 200);
        for (uint32_t i = 0; i < answer.kept.count; i++) {
            assert_true(strcmp(last, answer.kept.names[i]) < 0);
            assert_true(atoi(answer.kept.names[i]) % 3 != 0);
            snprintf(last, sizeof last, "%s", answer.kept.names[i]);
        }
        told += answer.kept.count;
        answers++;
        snprintf(after, sizeof after, "%s", answer.kept.next);
    } while (after[0] != '\0');
    assert_int_equal(told, 666);
    assert_int_equal(answers, 5);
    advance(e, 1);
    assert_int_equal(e->pools[0].seqs.kept, 666);
    ts_engine_free(e);
}

static void one_command_gives_a_name_to_another_sequence_and_frees_the_old(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), old = of_length(e, session, 8),
             new = fork_seq(e, session, old);
    ts_answer answer;
    append(e, session, new, 5);
    assert_int_equal(keep_seq(e, session, old, "x"), TS_OK);
    assert_int_equal(keep(e, session, new, "x", 0, false, &answer), TS_EEXIST);
    assert_int_equal(attach(e, session, "x"), old);
    assert_int_equal(keep(e, session, new, "x", 0, true, &answer), TS_OK);
    check_engine(e);
    assert_int_equal(attach(e, session, "x"), new);
    assert_int_equal(free_seq(e, session, old), TS_ENOENT);
    assert_int_equal(e->pools[0].seqs.kept, 1);
    assert_int_equal(e->pools[0].seqs.live, 1);
    assert_int_equal(TENANT(e).used, 4);
    assert_int_equal(TENANT(e).pinned, 4);
    assert_int_equal(ts_engine_session(e, session)->sequences, 0);
    assert_int_equal(ts_engine_session(e, session)->blocks, 0);
    /* Where there is nothing to replace it keeps; replacing itself changes nothing. */
    assert_int_equal(keep(e, session, new, "x", 0, true, &answer), TS_OK);
    assert_int_equal(attach(e, session, "x"), new);
    uint64_t third = of_length(e, session, 1);
    assert_int_equal(keep(e, session, third, "y", 0, true, &answer), TS_OK);
    /* A kept one may take another's name: its own is free then. */
    assert_int_equal(keep(e, session, third, "x", 0, true, &answer), TS_OK);
    assert_int_equal(attach(e, session, "x"), third);
    assert_int_equal(attach(e, session, "y"), 0);
    assert_int_equal(TENANT(e).used, 1);
    check_engine(e);
    ts_engine_free(e);
}

static void nothing_is_half_replaced_when_it_is_refused(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), other = session_new(e, 1);
    uint64_t old = of_length(e, session, 8), new = of_length(e, session, 13);
    ts_answer answer;
    uint32_t tokens = 1;
    assert_int_equal(keep(e, session, old, "x", 7000, false, &answer), TS_OK);
    assert_int_equal(begin(e, other, &old, &tokens, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(keep(e, session, new, "x", 0, true, &answer), TS_EBUSY);
    assert_int_equal(step_end(e, other, TS_OP_STEP_ABORT, step, NULL, 0), TS_OK);
    e->pools[0].config.tenant_pinned_max = 3;
    assert_int_equal(keep(e, session, new, "x", 0, true, &answer), TS_EQUOTA);
    assert_int_equal(keep(e, session, old,
                          "0123456789012345678901234567890123456789012345678901234567890"
                          "12345678901234567890123456789012345678901234567890123456789"
                          "0123456",
                          0, true, &answer),
                     TS_OK); /* 127 bytes */
    assert_int_equal(keep(e, session, old, "x", 7000, true, &answer), TS_OK);
    check_engine(e);
    assert_int_equal(attach(e, session, "x"), old);
    assert_int_equal(TENANT(e).pinned, 2);
    assert_int_equal(ts_engine_session(e, session)->sequences, 1);
    list(e, session, "", "", 0, &answer);
    assert_int_equal(answer.kept.left_ms[0], 7000);
    /* A time beyond all clocks is none. */
    assert_int_equal(keep(e, session, old, "x", UINT64_MAX, true, &answer), TS_OK);
    list(e, session, "", "", 0, &answer);
    assert_true(answer.kept.left_ms[0] == 0);
    /* What the old one has pinned makes room for the new one. */
    assert_int_equal(free_seq(e, session, new), TS_OK);
    new = fork_seq(e, session, old);
    append(e, session, new, 4);
    assert_int_equal(keep(e, session, new, "x", 0, true, &answer), TS_OK);
    uint64_t third = of_length(e, session, 12);
    assert_int_equal(keep(e, session, third, "x", 0, true, &answer), TS_OK);
    assert_int_equal(TENANT(e).pinned, 3);
    check_engine(e);
    ts_engine_free(e);
}

static void a_sequence_that_is_in_a_step_may_take_a_name(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), old = of_length(e, session, 6),
             new = fork_seq(e, session, old);
    ts_answer answer;
    uint32_t tokens = 1;
    assert_int_equal(keep_seq(e, session, old, "x"), TS_OK);
    /* the step copies the tail */
    assert_int_equal(begin(e, session, &new, &tokens, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(answer.begun.num_copies, 1);
    assert_int_equal(step_done(e, step, TS_NONE), TS_OK);
    assert_int_equal(keep(e, session, new, "x", 3000, true, &answer), TS_OK);
    check_engine(e);
    advance(e, 10000);
    assert_int_equal(attach(e, session, "x"), new);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
    advance(e, 12999);
    assert_int_equal(attach(e, session, "x"), new);
    check_engine(e);
    ts_engine_free(e);
}

static void whatever_uses_a_sequence_makes_its_time_to_live_begin_anew(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), seq = of_length(e, session, 4);
    ts_answer answer;
    uint32_t tokens = 1;
    assert_int_equal(keep(e, session, seq, "x", 1000, false, &answer), TS_OK);
    advance(e, 999);
    assert_int_equal(attach(e, session, "x"), seq);
    advance(e, 1998);
    (void)fork_seq(e, session, seq);
    advance(e, 2997);
    static const uint32_t from[] = {0};
    const ts_command select = {.op = TS_OP_SEQ_SELECT,
                               .session = session,
                               .seq_select = {.seqs = &seq, .count = 1, .from = from, .picked = 1}};
    assert_int_equal(apply(e, select, &answer), TS_OK);
    advance(e, 3996);
    assert_int_equal(begin(e, session, &seq, &tokens, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    advance(e, 60000); /* it waits for the step */
    assert_int_equal(length_of(e, session, seq), 4);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
    advance(e, 60999);
    assert_int_equal(length_of(e, session, seq), 5); /* a look is no use */
    advance(e, 61000);
    assert_int_equal(attach(e, session, "x"), 0);
    assert_int_equal(free_seq(e, session, seq), TS_ENOENT);
    assert_int_equal(e->pools[0].seqs.kept, 0);
    assert_int_equal(e->pools[0].seqs.live, 1); /* the fork */
    assert_int_equal(TENANT(e).pinned, 0);
    ts_engine_free(e);
}

static void a_step_whose_session_ends_lets_the_time_end(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), other = session_new(e, 1), seq = of_length(e, session, 4);
    ts_answer answer;
    uint32_t tokens = 1;
    assert_int_equal(keep(e, session, seq, "x", 1000, false, &answer), TS_OK);
    assert_int_equal(begin(e, session, &seq, &tokens, 1, false, &answer), TS_OK);
    advance(e, 5000);
    close_session(e, session);
    assert_int_equal(attach(e, other, "x"), seq);
    advance(e, 6000);
    assert_int_equal(attach(e, other, "x"), 0);
    assert_int_equal(TENANT(e).used, 0);
    ts_engine_free(e);
}

static void a_name_whose_time_is_over_is_free_before_it_is_swept(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), seq = of_length(e, session, 4),
             other = of_length(e, session, 4);
    ts_answer answer;
    assert_int_equal(keep(e, session, seq, "x", 1000, false, &answer), TS_OK);
    e->now_ms = 1000;
    assert_int_equal(attach(e, session, "x"), 0);
    assert_int_equal(length_of(e, session, other), 4);
    assert_int_equal(free_seq(e, session, seq), TS_ENOENT);
    assert_int_equal(keep(e, session, other, "x", 0, false, &answer), TS_OK);
    assert_int_equal(attach(e, session, "x"), other);
    assert_int_equal(TENANT(e).used, 1);
    advance(e, 1000000); /* the new one is kept for ever */
    assert_int_equal(attach(e, session, "x"), other);
    ts_engine_free(e);
}

static void a_time_to_live_is_set_anew_and_given_up(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), seq = of_length(e, session, 4);
    ts_answer answer;
    assert_int_equal(keep(e, session, seq, "x", 1000, false, &answer), TS_OK);
    assert_int_equal(keep(e, session, seq, "x", 0, false, &answer), TS_OK);
    advance(e, 5000);
    assert_int_equal(keep(e, session, seq, "x", UINT64_MAX, false, &answer), TS_OK);
    advance(e, 10000);
    assert_int_equal(keep(e, session, seq, "y", 1000, false, &answer), TS_OK);
    advance(e, 10999);
    assert_int_equal(keep_seq(e, session, seq, ""), TS_OK); /* the session's own, and no end */
    advance(e, 100000);
    assert_int_equal(length_of(e, session, seq), 4);
    assert_int_equal(e->pools[0].seqs.num_lives, 0);
    ts_engine_free(e);
}

/* What is over but not swept yet makes room first, where something is short. */
static void nothing_is_refused_for_the_sake_of_what_is_over(void **state)
{
    (void)state;
    for (int what = 0; what < 5; what++) {
        ts_engine *e = engine_new(8, 4, 4, TS_CLIENT_WRITE_ALL);
        ts_pool_config *config = &e->pools[0].config;
        uint64_t session = session_new(e, 1), other = seq_new(e, session),
                 seq = of_length(e, session, 20);
        uint32_t tokens = 16;
        ts_answer answer;
        assert_int_equal(keep(e, session, seq, "x", 1000, false, &answer), TS_OK);
        ts_command begins = {.op = TS_OP_STEP_BEGIN,
                             .session = session,
                             .step_begin = {.seqs = &other, .new_tokens = &tokens, .count = 1}};
        ts_command creates = {
            .op = TS_OP_SEQ_CREATE, .session = session, .seq_create = {.count = 1}};
        ts_command keeps = {
            .op = TS_OP_SEQ_KEEP, .session = session, .seq_keep = {.seq = other, .name = "y"}};
        ts_command command = what < 3 ? begins : what < 4 ? creates : keeps;
        if (what == 1)
            config->tenant_blocks_max = 8;
        if (what == 2)
            config->tenant_entries_max = 8;
        if (what == 3)
            config->tenant_sequences_max = 2;
        if (what == 4) {
            append(e, session, other, 1);
            config->tenant_pinned_max = 5;
        }
        ts_engine_apply(e, &command, &answer);
        assert_int_equal(answer.status, what == 0 ? TS_ENOSPC : TS_EQUOTA);
        command.now_ms = 1000;
        ts_engine_apply(e, &command, &answer);
        assert_int_equal(answer.status, TS_NEED_SWEEP);
        check_engine(e);
        (void)sweep_all(e);
        assert_int_equal(apply(e, command, &answer), TS_OK);
        check_engine(e);
        ts_engine_free(e);
    }
}

static void who_waits_for_room_has_that_of_what_ends(void **state)
{
    (void)state;
    ts_engine *e = engine_new(8, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1), seq = of_length(e, session, 20),
             other = seq_new(e, session);
    uint32_t tokens = 16;
    ts_answer answer;
    assert_int_equal(keep(e, session, seq, "x", 1000, false, &answer), TS_OK);
    ts_command command = {
        .op = TS_OP_STEP_BEGIN,
        .session = session,
        .step_begin = {.seqs = &other, .new_tokens = &tokens, .count = 1, .wait = true}};
    assert_int_equal(apply(e, command, &answer), TS_WAITS);
    advance(e, 999);
    assert_int_equal(ts_engine_woken(e), 0);
    advance(e, 1000);
    assert_int_equal(ts_engine_woken(e), session);
    command.again = true;
    assert_int_equal(apply(e, command, &answer), TS_OK);
    check_engine(e);
    ts_engine_free(e);
}

static void a_name_is_not_forgotten_past_the_limits_of_the_session(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t session = session_new(e, 1), seq = of_length(e, session, 12);
    ts_answer answer;
    assert_int_equal(keep(e, session, seq, "x", 1000, false, &answer), TS_OK);
    e->limits.session_blocks = 3;
    uint64_t own = of_length(e, session, 1);
    assert_int_equal(keep_seq(e, session, seq, ""), TS_EQUOTA);
    assert_int_equal(attach(e, session, "x"), seq);
    assert_int_equal(e->pools[0].seqs.num_lives, 1);
    assert_int_equal(free_seq(e, session, own), TS_OK);
    assert_int_equal(keep_seq(e, session, seq, ""), TS_OK);
    assert_int_equal(ts_engine_session(e, session)->blocks, 3);
    check_engine(e);
    ts_engine_free(e);
}

/* More sequences' times to live end at once than one turn can end. */
static void many_ends_take_many_turns(void **state)
{
    (void)state;
    ts_engine *e = engine_new(4096, 64, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1), seq = of_length(e, session, 4 * 1000);
    ts_answer answer;
    char name[16];
    for (uint32_t i = 0; i < 100; i++) {
        snprintf(name, sizeof name, "%u", i);
        assert_int_equal(
            keep(e, session, fork_seq(e, session, seq), name, 1000 + i % 3, false, &answer), TS_OK);
    }
    assert_false(ts_engine_sweeps(e));
    assert_int_equal(apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = 5000}, &answer), TS_OK);
    /* 32 of them with their 1000 entries; as many as a turn has room for lose their names alone. */
    assert_int_equal(e->pools[0].seqs.kept, 100 - 32 - 16);
    assert_int_equal(e->pools[0].seqs.live, 101 - 32);
    assert_true(ts_engine_sweeps(e));
    check_engine(e);
    assert_int_equal(sweep_all(e), 3);
    assert_int_equal(e->pools[0].seqs.kept, 0);
    assert_int_equal(e->pools[0].seqs.live, 1);
    check_engine(e);
    ts_engine_free(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_tenant_s_names_are_listed_in_order_by_prefix_and_page_by_page),
        cmocka_unit_test(an_answer_tells_of_200_at_most_and_walks_over_no_more),
        cmocka_unit_test(one_command_gives_a_name_to_another_sequence_and_frees_the_old),
        cmocka_unit_test(nothing_is_half_replaced_when_it_is_refused),
        cmocka_unit_test(a_sequence_that_is_in_a_step_may_take_a_name),
        cmocka_unit_test(whatever_uses_a_sequence_makes_its_time_to_live_begin_anew),
        cmocka_unit_test(a_step_whose_session_ends_lets_the_time_end),
        cmocka_unit_test(a_name_whose_time_is_over_is_free_before_it_is_swept),
        cmocka_unit_test(a_time_to_live_is_set_anew_and_given_up),
        cmocka_unit_test(nothing_is_refused_for_the_sake_of_what_is_over),
        cmocka_unit_test(who_waits_for_room_has_that_of_what_ends),
        cmocka_unit_test(a_name_is_not_forgotten_past_the_limits_of_the_session),
        cmocka_unit_test(many_ends_take_many_turns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
