/* Messages to commands and answers to messages, without an engine's doing. */
#include "test_util.h"

#include "codec.h"

#include <string.h>

static ts_command command;
static ts_answer refusal;

static bool decode(const Tspb__Request *r)
{
    refusal = (ts_answer){0};
    return ts_decode(r, 77, &command, &refusal);
}

static void a_fork_is_decoded_field_by_field(void **state)
{
    (void)state;
    Tspb__SeqFork fork = TSPB__SEQ_FORK__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    fork.pool = 3;
    fork.parent = 0x500000002;
    fork.count = 4;
    fork.has_length = true;
    fork.length = 9;
    r.body_case = TSPB__REQUEST__BODY_SEQ_FORK;
    r.seq_fork = &fork;
    assert_true(decode(&r));
    assert_int_equal(command.op, TS_OP_SEQ_FORK);
    assert_int_equal(command.session, 77);
    assert_int_equal(command.pool, 3);
    assert_int_equal(command.seq_fork.parent, 0x500000002);
    assert_int_equal(command.seq_fork.count, 4);
    assert_true(command.seq_fork.has_length);
    assert_int_equal(command.seq_fork.length, 9);
}

static void counts_that_disagree_are_refused(void **state)
{
    (void)state;
    uint64_t seqs[2] = {1, 2};
    uint32_t lengths[1] = {5};
    Tspb__SeqTruncate truncate = TSPB__SEQ_TRUNCATE__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    truncate.seqs = seqs;
    truncate.n_seqs = 2;
    truncate.lengths = lengths;
    truncate.n_lengths = 1;
    r.body_case = TSPB__REQUEST__BODY_SEQ_TRUNCATE;
    r.seq_truncate = &truncate;
    assert_false(decode(&r));
    assert_int_equal(refusal.status, TS_EINVAL);
    assert_string_equal(refusal.message, "2 sequences, but 1 lengths");
}

static void a_run_has_what_its_flags_say(void **state)
{
    (void)state;
    Tspb__StepRun run = TSPB__STEP_RUN__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    run.step = 5;
    run.layer = 2;
    run.q = 64;
    run.out = 128;
    run.has_sinks = true;
    run.sinks = 192;
    run.rope_interleaved = true;
    run.on_stream = true;
    run.number = 12;
    r.body_case = TSPB__REQUEST__BODY_STEP_RUN;
    r.step_run = &run;
    assert_true(decode(&r));
    assert_int_equal(command.step_run.step, 5);
    const ts_layer_run *decoded = &command.step_run.run;
    assert_int_equal(decoded->layer, 2);
    assert_int_equal(decoded->q, 64);
    assert_int_equal(decoded->out, 128);
    assert_int_equal(decoded->sinks, 192);
    assert_int_equal(decoded->number, 12);
    assert_int_equal(decoded->flags, TS_RUN_SINKS | TS_RUN_INTERLEAVED | TS_RUN_ON_STREAM);
}

static void a_ticket_of_another_size_is_refused(void **state)
{
    (void)state;
    uint8_t bytes[TS_TICKET_BYTES + 1] = {9, 8, 7};
    Tspb__SeqRedeem redeem = TSPB__SEQ_REDEEM__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    redeem.pool = 2;
    redeem.ticket.data = bytes;
    r.body_case = TSPB__REQUEST__BODY_SEQ_REDEEM;
    r.seq_redeem = &redeem;
    for (redeem.ticket.len = 0; redeem.ticket.len <= sizeof bytes; redeem.ticket.len++) {
        assert_int_equal(decode(&r), redeem.ticket.len == TS_TICKET_BYTES);
        if (redeem.ticket.len == TS_TICKET_BYTES)
            assert_memory_equal(command.seq_redeem.ticket, bytes, TS_TICKET_BYTES);
    }
    assert_int_equal(command.pool, 2);
    assert_string_equal(refusal.message, "a ticket of 17 bytes; it has 16");
}

static void what_is_no_command_is_left_to_others(void **state)
{
    (void)state;
    static const Tspb__Request__BodyCase others[] = {
        TSPB__REQUEST__BODY__NOT_SET, TSPB__REQUEST__BODY_SESSION_OPEN, TSPB__REQUEST__BODY_STATUS,
        TSPB__REQUEST__BODY_ADMIN_DRAIN, (Tspb__Request__BodyCase)5000};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        Tspb__Request r = TSPB__REQUEST__INIT;
        r.body_case = others[i];
        assert_false(decode(&r));
        assert_int_equal(refusal.status, TS_OK);
    }
}

static void a_refusal_is_encoded_without_a_body(void **state)
{
    (void)state;
    Tspb__SeqCreate create = TSPB__SEQ_CREATE__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    Tspb__Reply reply = TSPB__REPLY__INIT;
    ts_reply_body body;
    ts_answer answer = {0};
    r.body_case = TSPB__REQUEST__BODY_SEQ_CREATE;
    r.seq_create = &create;
    assert_true(decode(&r));
    ts_refuse_more(&answer, TS_EQUOTA, 3, 2, 4, "%s", "too many");
    ts_encode(NULL, &r, &command, &answer, &reply, &body);
    assert_int_equal(reply.body_case, TSPB__REPLY__BODY__NOT_SET);
    assert_int_equal(reply.status, TS_EQUOTA);
    assert_string_equal(reply.message, "too many");
    assert_int_equal(reply.needed, 2);
    assert_int_equal(reply.free, 1);
    assert_int_equal(reply.limit, 4);
}

static void a_string_with_control_characters_is_named(void **state)
{
    (void)state;
    Tspb__SeqKeep keep = TSPB__SEQ_KEEP__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    char name[] = "a\nb";
    keep.name = name;
    r.body_case = TSPB__REQUEST__BODY_SEQ_KEEP;
    r.seq_keep = &keep;
    refusal = (ts_answer){0};
    assert_false(ts_decode_plain(&r, &refusal));
    assert_int_equal(refusal.status, TS_EINVAL);
    assert_non_null(strstr(refusal.message, "name 'a\\"));
    name[1] = ' ';
    refusal = (ts_answer){0};
    assert_true(ts_decode_plain(&r, &refusal));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_fork_is_decoded_field_by_field),
        cmocka_unit_test(counts_that_disagree_are_refused),
        cmocka_unit_test(a_run_has_what_its_flags_say),
        cmocka_unit_test(a_ticket_of_another_size_is_refused),
        cmocka_unit_test(what_is_no_command_is_left_to_others),
        cmocka_unit_test(a_refusal_is_encoded_without_a_body),
        cmocka_unit_test(a_string_with_control_characters_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
