/* Sequences that go from one session to another by a ticket, as the engine decides it. */
#include "engine_util.h"

#include <string.h>

static const ts_space_name model = {"m", 1};
static const uint32_t prompt[8] = {1, 2, 3, 4, 5, 6, 7, 8};

#define TENANT(e, i) ((e)->pools[0].books.tenants[i])

static ts_engine *small_engine(void)
{
    return engine_new(64, 4, 4, TS_CLIENT_WRITE_ALL);
}

/* Gives the sequence away; the ticket's bytes are all `mark`. */
static ts_status give(ts_engine *e, uint64_t s, uint64_t seq, uint8_t mark, uint64_t ttl_ms,
                      ts_answer *answer)
{
    ts_command c = {
        .op = TS_OP_SEQ_TICKET, .session = s, .seq_ticket = {.seq = seq, .ttl_ms = ttl_ms}};
    memset(c.seq_ticket.ticket, mark, sizeof c.seq_ticket.ticket);
    return apply(e, c, answer);
}

static ts_status redeem(ts_engine *e, uint64_t s, uint8_t mark, uint64_t now_ms, ts_answer *answer)
{
    ts_command c = {.op = TS_OP_SEQ_REDEEM, .session = s, .now_ms = now_ms};
    memset(c.seq_redeem.ticket, mark, sizeof c.seq_redeem.ticket);
    return apply(e, c, answer);
}

/* A sequence of the prompt, committed with its ids. */
static uint64_t computed(ts_engine *e, uint64_t s)
{
    ts_answer answer;
    apply(e,
          (ts_command){
              .op = TS_OP_SEQ_CREATE, .session = s, .seq_create = {.count = 1, .space = model}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    uint64_t seq = answer.seqs.seqs[0];
    const uint64_t step = step_of_ids(e, s, seq, prompt, 8);
    assert_int_equal(step_end(e, s, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
    return seq;
}

/* How much of the prompt and one token more is found. */
static uint32_t found(ts_engine *e, uint64_t s)
{
    ts_answer answer;
    uint32_t n = 9, ids[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    apply(e,
          (ts_command){
              .op = TS_OP_SEQ_MATCH,
              .session = s,
              .seq_match = {.tokens = ids, .counts = &n, .count = 1, .space = model, .dry = true}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    return answer.matched.lengths[0];
}

/* The engine's time, and what ends by then. */
static void advance(ts_engine *e, uint64_t now_ms)
{
    ts_answer answer;
    assert_int_equal(apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = now_ms}, &answer), TS_OK);
    (void)sweep_all(e);
    check_engine(e);
}

static void a_sequence_goes_to_another_session_with_all_that_is_known_of_it(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t giver = session_new(e, 1), taker = session_new(e, 1), seq = computed(e, giver);
    ts_answer answer;
    assert_int_equal(give(e, giver, seq, 7, 0, &answer), TS_OK);
    check_engine(e);
    assert_int_equal(ts_engine_session(e, giver)->sequences, 0);
    assert_int_equal(ts_engine_session(e, giver)->blocks, 0);
    assert_int_equal(TENANT(e, 0).used, 2);
    assert_int_equal(TENANT(e, 0).sequences, 1);
    assert_int_equal(redeem(e, taker, 7, 0, &answer), TS_OK);
    check_engine(e);
    uint64_t got = answer.seqs.seqs[0];
    assert_int_equal(answer.seqs.length, 8);
    assert_int_equal(ts_engine_session(e, taker)->sequences, 1);
    assert_int_equal(ts_engine_session(e, taker)->blocks, 2);
    assert_int_equal(TENANT(e, 0).tickets, 0);
    /* What follows is indexed behind the prompt: ids and namespace went along. */
    static const uint32_t more[4] = {9, 10, 11, 12};
    const uint64_t step = step_of_ids(e, taker, got, more, 4);
    assert_int_equal(step_end(e, taker, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
    const ts_sequence *real = ts_sequence_find(&e->pools[0].seqs, got);
    assert_int_equal(real->known, 12);
    assert_true(ts_index_has(e->pools[0].books.index, real->blocks[2]));
    check_engine(e);
    ts_engine_free(e);
}

static void the_givers_handle_leads_nowhere_also_after_the_ticket_was_redeemed(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t giver = session_new(e, 1), seq = computed(e, giver);
    ts_answer answer;
    char unknown[TS_MESSAGE_BYTES];
    assert_int_equal(give(e, giver, seq, 7, 0, &answer), TS_OK);
    for (int redeemed = 0; redeemed < 2; redeemed++) {
        if (redeemed)
            assert_int_equal(redeem(e, giver, 7, 0, &answer), TS_OK);
        assert_int_equal(free_seq(e, giver, seq), TS_ENOENT);
        assert_int_equal(keep_seq(e, giver, seq, "x"), TS_ENOENT);
        assert_int_equal(give(e, giver, seq, 8, 0, &answer), TS_ENOENT);
    }
    /* Nor does the id that the sequence has on its ticket. */
    seq = answer.status == TS_ENOENT ? computed(e, giver) : 0;
    assert_int_equal(give(e, giver, seq, 7, 0, &answer), TS_OK);
    uint64_t hidden = ts_sequence_id(&e->pools[0].seqs, (uint32_t)seq);
    assert_true(hidden != seq);
    ts_command c = {.op = TS_OP_SEQ_FORK, .session = giver, .seq_fork = {hidden, 1, 0, false}};
    assert_int_equal(apply(e, c, &answer), TS_ENOENT);
    snprintf(unknown, sizeof unknown, "there is no sequence %llx in pool 'test'",
             (unsigned long long)hidden);
    assert_string_equal(answer.message, unknown);
    /* But an operator sees it and may free it. */
    c = (ts_command){.op = TS_OP_SEQ_REMOVE, .seq_remove = {hidden}};
    assert_int_equal(apply(e, c, &answer), TS_OK);
    assert_int_equal(redeem(e, giver, 7, 0, &answer), TS_ENOENT);
    check_engine(e);
    ts_engine_free(e);
}

static void a_ticket_is_redeemed_once_and_anothers_is_refused_like_an_unknown_one(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t s = session_new(e, 1), other = session_new(e, 2), seq = computed(e, s);
    ts_answer answer, unknown;
    assert_int_equal(redeem(e, other, 7, 0, &unknown), TS_ENOENT);
    assert_int_equal(give(e, s, seq, 7, 0, &answer), TS_OK);
    assert_int_equal(redeem(e, other, 7, 0, &answer), TS_ENOENT);
    assert_memory_equal(&answer, &unknown, sizeof answer);
    assert_int_equal(redeem(e, s, 7, 0, &answer), TS_OK);
    assert_int_equal(redeem(e, s, 7, 0, &answer), TS_ENOENT);
    assert_memory_equal(&answer, &unknown, sizeof answer);
    /* And so is one whose time is over, whether it was freed yet or not. */
    seq = computed(e, s);
    assert_int_equal(give(e, s, seq, 7, 100, &answer), TS_OK);
    assert_int_equal(redeem(e, s, 7, 100, &answer), TS_ENOENT);
    assert_memory_equal(&answer, &unknown, sizeof answer);
    advance(e, 100);
    assert_int_equal(redeem(e, s, 7, 100, &answer), TS_ENOENT);
    assert_memory_equal(&answer, &unknown, sizeof answer);
    ts_engine_free(e);
}

static void a_ticket_outlives_its_giver_and_is_cached_at_its_time_s_end(void **state)
{
    (void)state;
    for (int stays = 0; stays < 2; stays++) {
        ts_engine *e = small_engine();
        uint64_t giver = session_new(e, 1), s = session_new(e, 1), seq = computed(e, giver);
        ts_answer answer;
        append(e, giver, seq, 1); /* a block that isn't indexed */
        advance(e, 5000);
        assert_int_equal(give(e, giver, seq, 7, 0, &answer), TS_OK);
        if (!stays)
            close_session(e, giver);
        advance(e, 34999);
        assert_int_equal(TENANT(e, 0).used, 3);
        assert_int_equal(TENANT(e, 0).sequences, 1);
        assert_false(ts_engine_ends_by(e, 34999));
        assert_true(ts_engine_ends_by(e, 35000));
        advance(e, 35000);
        assert_int_equal(TENANT(e, 0).used, 0);
        assert_int_equal(TENANT(e, 0).cached, 2);
        assert_int_equal(TENANT(e, 0).sequences, 0);
        assert_int_equal(TENANT(e, 0).tickets, 0);
        assert_int_equal(e->pools[0].seqs.num_lives, 0);
        assert_int_equal(e->pools[0].seqs.tickets.count, 0);
        assert_int_equal(e->pools[0].seqs.live, 0);
        assert_int_equal(found(e, s), 8);
        ts_engine_free(e);
    }
}

static void what_can_t_be_given_stays_its_owner_s(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t s = session_new(e, 1), other = session_new(e, 1), seq = computed(e, s);
    ts_answer answer;
    assert_int_equal(give(e, other, seq, 7, 0, &answer), TS_EPERM);
    assert_int_equal(give(e, s, seq, 7, 3600001, &answer), TS_EINVAL);
    assert_string_equal(answer.message, "a ticket good for 3600001 ms; the limit is 3600000");
    uint32_t n = 1;
    assert_int_equal(begin(e, s, &seq, &n, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(give(e, s, seq, 7, 0, &answer), TS_EBUSY);
    assert_int_equal(step_end(e, s, TS_OP_STEP_ABORT, step, NULL, 0), TS_OK);
    assert_int_equal(keep_seq(e, s, seq, "x"), TS_OK);
    assert_int_equal(give(e, s, seq, 7, 0, &answer), TS_EINVAL);
    assert_int_equal(keep_seq(e, s, seq, ""), TS_OK);
    assert_int_equal(length_of(e, s, seq), 8);
    assert_int_equal(e->pools[0].seqs.num_lives, 0);
    assert_int_equal(give(e, s, seq, 7, 3600000, &answer), TS_OK);
    /* Bytes that are a ticket's already; a random generator never makes them. */
    seq = computed(e, s);
    assert_int_equal(give(e, s, seq, 7, 0, &answer), TS_EEXIST);
    assert_int_equal(length_of(e, s, seq), 8);
    check_engine(e);
    ts_engine_free(e);
}

static void a_tenant_has_1024_tickets_and_no_more(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    uint64_t s = session_new(e, 1), other = session_new(e, 2);
    ts_answer answer;
    for (uint32_t i = 0; i <= 1024; i++) {
        ts_command c = {.op = TS_OP_SEQ_TICKET,
                        .session = s,
                        .seq_ticket = {.seq = seq_new(e, s), .ttl_ms = 1 + i % 7 * 1000}};
        memcpy(c.seq_ticket.ticket, &i, sizeof i);
        assert_int_equal(apply(e, c, &answer), i < 1024 ? TS_OK : TS_EQUOTA);
    }
    assert_string_equal(answer.message, "uid 1 has 1024 tickets; the limit is 1024");
    assert_int_equal(answer.amounts.limit, 1024);
    assert_int_equal(give(e, other, seq_new(e, other), 7, 0, &answer), TS_OK);
    e->now_ms = 1; /* those of 1 ms are over */
    assert_int_equal(give(e, s, seq_new(e, s), 7, 0, &answer), TS_NEED_SWEEP);
    advance(e, 1);
    assert_int_equal(TENANT(e, 0).tickets, 1024 - 147);
    assert_int_equal(give(e, s, seq_new(e, s), 7, 0, &answer), TS_OK);
    advance(e, 100000);
    assert_int_equal(e->pools[0].seqs.live, 2); /* those that could not be given */
    ts_engine_free(e);
}

static void limits_of_a_session_hold_for_what_it_redeems(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    e->limits.session_sequences = 1;
    e->limits.session_blocks = 2;
    e->pools[0].config.tenant_entries_max = 3;
    e->pools[0].config.tenant_sequences_max = 2;
    uint64_t giver = session_new(e, 1), taker = session_new(e, 1), seq = computed(e, giver);
    uint64_t own = seq_new(e, taker);
    ts_answer answer;
    assert_int_equal(give(e, giver, seq, 7, 0, &answer), TS_OK);
    /* It counts for the tenant while it is on the ticket. */
    ts_command create = {.op = TS_OP_SEQ_CREATE, .session = giver, .seq_create = {.count = 1}};
    assert_int_equal(apply(e, create, &answer), TS_EQUOTA);
    assert_int_equal(redeem(e, taker, 7, 0, &answer), TS_EQUOTA);
    assert_string_equal(answer.message, "the session owns 1 sequences; the limit is 1");
    e->limits.session_sequences = 2;
    append(e, taker, own, 1);
    assert_int_equal(redeem(e, taker, 7, 0, &answer), TS_EQUOTA);
    assert_string_equal(
        answer.message,
        "the session refers to 1 blocks; 2 more would pass its limit of 2 (session_blocks)");
    assert_int_equal(free_seq(e, taker, own), TS_OK);
    assert_int_equal(redeem(e, taker, 7, 0, &answer), TS_OK); /* the ticket was still good */
    assert_int_equal(length_of(e, taker, answer.seqs.seqs[0]), 8);
    check_engine(e);
    ts_engine_free(e);
}

static void a_ticket_is_its_pool_s_and_goes_with_it(void **state)
{
    (void)state;
    ts_engine *e = small_engine();
    ts_pool_config config = e->pools[0].config;
    memcpy(config.name, "two", 4);
    pool_add(e, &config);
    uint64_t s = session_new(e, 1), seq = computed(e, s);
    ts_answer answer;
    apply(e, (ts_command){.op = TS_OP_POOL_OPEN, .session = s, .pool_open = {.name = "two"}},
          &answer);
    assert_int_equal(answer.pool, 1);
    assert_int_equal(give(e, s, seq, 7, 0, &answer), TS_OK);
    ts_command c = {.op = TS_OP_SEQ_REDEEM, .session = s, .pool = 1};
    memset(c.seq_redeem.ticket, 7, sizeof c.seq_redeem.ticket);
    assert_int_equal(apply(e, c, &answer), TS_ENOENT);
    close_session(e, s);
    assert_int_equal(apply(e, (ts_command){.op = TS_OP_POOL_REMOVE}, &answer), TS_OK);
    assert_false(ts_engine_ends_by(e, UINT64_MAX));
    (void)sweep_all(e);
    check_engine(e);
    ts_engine_free(e); /* what it left would be told of by the leak checker */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_sequence_goes_to_another_session_with_all_that_is_known_of_it),
        cmocka_unit_test(the_givers_handle_leads_nowhere_also_after_the_ticket_was_redeemed),
        cmocka_unit_test(a_ticket_is_redeemed_once_and_anothers_is_refused_like_an_unknown_one),
        cmocka_unit_test(a_ticket_outlives_its_giver_and_is_cached_at_its_time_s_end),
        cmocka_unit_test(what_can_t_be_given_stays_its_owner_s),
        cmocka_unit_test(a_tenant_has_1024_tickets_and_no_more),
        cmocka_unit_test(limits_of_a_session_hold_for_what_it_redeems),
        cmocka_unit_test(a_ticket_is_its_pool_s_and_goes_with_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
