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

/* A request of this kind. All bodies lie in one union of pointers. */
static Tspb__Request request_of(Tspb__Request__BodyCase kind, void *body)
{
    Tspb__Request r = TSPB__REQUEST__INIT;
    r.body_case = kind;
    r.seq_free = body;
    return r;
}

static bool decode_body(Tspb__Request__BodyCase kind, void *body)
{
    const Tspb__Request r = request_of(kind, body);
    return decode(&r);
}

/* Encodes the answer to a request of this kind into `reply`. */
static Tspb__Reply reply;
static ts_reply_body reply_body;

static void encode(Tspb__Request__BodyCase kind, const ts_answer *answer)
{
    const Tspb__Request r = request_of(kind, NULL);
    tspb__reply__init(&reply);
    ts_encode(NULL, &r, &command, answer, &reply, &reply_body);
    assert_int_equal(reply.status, TS_OK);
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
    fork.has_length = false;
    assert_true(decode(&r));
    assert_false(command.seq_fork.has_length);
}

static void what_is_freed_cut_or_picked_is_decoded_field_by_field(void **state)
{
    (void)state;
    uint64_t seqs[3] = {7, 8, 9};
    uint32_t numbers[3] = {2, 0, 1};
    Tspb__SeqFree free_some = TSPB__SEQ_FREE__INIT;
    free_some.seqs = seqs;
    free_some.n_seqs = 3;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_FREE, &free_some));
    assert_int_equal(command.op, TS_OP_SEQ_FREE);
    assert_ptr_equal(command.seq_batch.seqs, seqs);
    assert_int_equal(command.seq_batch.count, 3);
    assert_false(command.seq_batch.forget);
    free_some.forget = true;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_FREE, &free_some));
    assert_true(command.seq_batch.forget);

    Tspb__SeqTruncate truncate = TSPB__SEQ_TRUNCATE__INIT;
    truncate.seqs = seqs;
    truncate.lengths = numbers;
    truncate.n_seqs = truncate.n_lengths = 2;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_TRUNCATE, &truncate));
    assert_ptr_equal(command.seq_batch.lengths, numbers);
    assert_false(command.seq_batch.by_counts);
    truncate.by_counts = true;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_TRUNCATE, &truncate));
    assert_true(command.seq_batch.by_counts);

    Tspb__SeqSelect pick = TSPB__SEQ_SELECT__INIT;
    pick.seqs = seqs;
    pick.n_seqs = 2;
    pick.from = numbers;
    pick.n_from = 3;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_SELECT, &pick));
    assert_int_equal(command.seq_select.count, 2);
    assert_int_equal(command.seq_select.picked, 3);
    assert_ptr_equal(command.seq_select.from, numbers);
}

static void what_is_kept_and_listed_is_decoded_field_by_field(void **state)
{
    (void)state;
    char name[] = "chat", after[] = "bot";
    Tspb__SeqKeep keep = TSPB__SEQ_KEEP__INIT;
    keep.seq = 0x300000001;
    keep.name = name;
    keep.ttl_ms = 5000000000;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_KEEP, &keep));
    assert_int_equal(command.seq_keep.seq, 0x300000001);
    assert_string_equal(command.seq_keep.name, "chat");
    assert_int_equal(command.seq_keep.ttl_ms, 5000000000);
    assert_false(command.seq_keep.replace);
    keep.replace = true;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_KEEP, &keep));
    assert_true(command.seq_keep.replace);

    Tspb__ListKept list = TSPB__LIST_KEPT__INIT;
    list.prefix = name;
    list.after = after;
    list.limit = 12;
    assert_true(decode_body(TSPB__REQUEST__BODY_LIST_KEPT, &list));
    assert_string_equal(command.seq_list.prefix, "chat");
    assert_string_equal(command.seq_list.after, "bot");
    assert_int_equal(command.seq_list.limit, 12);

    Tspb__SeqBlocks blocks = TSPB__SEQ_BLOCKS__INIT;
    blocks.seq = 4;
    blocks.first = 100;
    blocks.count = 20;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_BLOCKS, &blocks));
    assert_int_equal(command.seq_blocks.first, 100);
    assert_int_equal(command.seq_blocks.count, 20);
}

static void a_match_has_an_id_for_each_token(void **state)
{
    (void)state;
    uint32_t tokens[5] = {1, 2, 3, 4, 5}, counts[2] = {3, 2};
    Tspb__SeqMatch match = TSPB__SEQ_MATCH__INIT;
    match.tokens = tokens;
    match.n_tokens = 5;
    match.counts = counts;
    match.n_counts = 2;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_MATCH, &match));
    assert_int_equal(command.seq_match.count, 2);
    assert_false(command.seq_match.dry);
    assert_false(command.seq_match.wait);
    match.dry = true;
    match.wait_ms = 1;
    assert_true(decode_body(TSPB__REQUEST__BODY_SEQ_MATCH, &match));
    assert_true(command.seq_match.dry);
    assert_true(command.seq_match.wait);
    match.n_tokens = 4;
    assert_false(decode_body(TSPB__REQUEST__BODY_SEQ_MATCH, &match));
    assert_int_equal(refusal.status, TS_EINVAL);
    assert_string_equal(refusal.message, "5 tokens, but 4 token ids");
}

static void a_begin_is_decoded_field_by_field(void **state)
{
    (void)state;
    uint64_t seqs[2] = {7, 8};
    uint32_t new_tokens[2] = {1, 2}, ids[3] = {10, 20, 30};
    char kernel[] = "v4", unknown[] = "v9";
    Tspb__StepBegin begin = TSPB__STEP_BEGIN__INIT;
    begin.seqs = seqs;
    begin.new_tokens = new_tokens;
    begin.n_seqs = begin.n_new_tokens = 2;
    begin.heads = 32;
    begin.io_dtype = TS_DTYPE_BF16;
    begin.scale = 0.25f;
    begin.priority = -1;
    begin.kernel = kernel;
    begin.tokens = ids; /* none of them counts */
    assert_true(decode_body(TSPB__REQUEST__BODY_STEP_BEGIN, &begin));
    assert_int_equal(command.step_begin.count, 2);
    assert_int_equal(command.step_begin.heads, 32);
    assert_int_equal(command.step_begin.io_dtype, TS_DTYPE_BF16);
    assert_true(command.step_begin.scale == 0.25f);
    assert_int_equal(command.step_begin.priority, -1);
    assert_int_equal(command.step_begin.kernel, TS_KERNEL_V4);
    assert_null(command.step_begin.tokens); /* none are known */
    assert_false(command.step_begin.append);
    assert_false(command.step_begin.wait);
    begin.n_tokens = 3;
    begin.wait_ms = 100;
    begin.append = true;
    assert_true(decode_body(TSPB__REQUEST__BODY_STEP_BEGIN, &begin));
    assert_ptr_equal(command.step_begin.tokens, ids);
    assert_true(command.step_begin.append);
    assert_true(command.step_begin.wait);
    begin.n_tokens = 2;
    assert_false(decode_body(TSPB__REQUEST__BODY_STEP_BEGIN, &begin));
    assert_string_equal(refusal.message, "3 tokens, but 2 token ids");
    begin.n_tokens = 0;
    begin.kernel = unknown;
    assert_false(decode_body(TSPB__REQUEST__BODY_STEP_BEGIN, &begin));
    assert_non_null(strstr(refusal.message, "there is no kernel 'v9'; known are auto, v1"));
}

static void a_commit_without_counts_accepts_all(void **state)
{
    (void)state;
    uint32_t accepted[2] = {1, 0};
    Tspb__StepCommit commit = TSPB__STEP_COMMIT__INIT;
    commit.step = 6;
    commit.accepted = accepted; /* none of them counts */
    assert_true(decode_body(TSPB__REQUEST__BODY_STEP_COMMIT, &commit));
    assert_int_equal(command.step_end.step, 6);
    assert_null(command.step_end.accepted);
    commit.n_accepted = 2;
    assert_true(decode_body(TSPB__REQUEST__BODY_STEP_COMMIT, &commit));
    assert_ptr_equal(command.step_end.accepted, accepted);
    assert_int_equal(command.step_end.count, 2);
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
    uint32_t next = 1000;
    run.step = 5;
    run.layer = 2;
    run.q = 64;
    run.out = 128;
    run.has_sinks = true;
    run.sinks = 192;
    run.scales = 256;
    run.lse = 320;
#define NUMBER(type, name, place, most, what) run.name = (type)next++;
    TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
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
    assert_int_equal(decoded->scales, 256);
    assert_int_equal(decoded->lse, 320);
#define NUMBER(type, name, place, most, what) assert_true(decoded->name == run.name);
    TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
    assert_int_equal(decoded->flags, TS_RUN_SINKS | TS_RUN_INTERLEAVED | TS_RUN_ON_STREAM);
    run.has_sinks = run.rope_interleaved = run.on_stream = false;
    const struct {
        int *has;
        uint32_t flag;
    } flags[] = {{&run.has_sinks, TS_RUN_SINKS},
                 {&run.has_alibi, TS_RUN_ALIBI},
                 {&run.has_lse, TS_RUN_LSE},
                 {&run.has_scales, TS_RUN_SCALES}};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        *flags[i].has = true;
        assert_true(decode(&r));
        assert_int_equal(command.step_run.run.flags, flags[i].flag);
        *flags[i].has = false;
    }
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
    ts_answer answer = {0};
    tspb__reply__init(&reply);
    r.body_case = TSPB__REQUEST__BODY_SEQ_CREATE;
    r.seq_create = &create;
    assert_true(decode(&r));
    ts_refuse_more(&answer, TS_EQUOTA, 3, 2, 4, "%s", "too many");
    ts_encode(NULL, &r, &command, &answer, &reply, &reply_body);
    assert_int_equal(reply.body_case, TSPB__REPLY__BODY__NOT_SET);
    assert_int_equal(reply.status, TS_EQUOTA);
    assert_string_equal(reply.message, "too many");
    assert_int_equal(reply.needed, 2);
    assert_int_equal(reply.free, 1);
    assert_int_equal(reply.limit, 4);
}

static void answers_are_encoded_field_by_field(void **state)
{
    (void)state;
    static const uint64_t seqs[2] = {21, 22}, left[2] = {0, 900};
    static const uint32_t lengths[2] = {31, 32}, blocks[3] = {41, 42, 43}, counts[2] = {51, 52};
    static const char *const names[2] = {"a", "b"};
    encode(TSPB__REQUEST__BODY_SEQ_FORK,
           &(ts_answer){.seqs = {.seqs = seqs, .count = 2, .length = 9}});
    assert_int_equal(reply.body_case, TSPB__REPLY__BODY_SEQS);
    assert_int_equal(reply.seqs->n_seqs, 2);
    assert_int_equal(reply.seqs->seqs[1], 22);
    assert_int_equal(reply.seqs->length, 9);

    encode(TSPB__REQUEST__BODY_SEQ_LENGTHS,
           &(ts_answer){.lengths = {.lengths = lengths, .count = 2}});
    assert_int_equal(reply.lengths->n_lengths, 2);
    assert_int_equal(reply.lengths->lengths[1], 32);

    encode(TSPB__REQUEST__BODY_SEQ_BLOCKS,
           &(ts_answer){.blocks = {.blocks = blocks, .count = 3, .length = 40}});
    assert_int_equal(reply.blocks->n_blocks, 3);
    assert_int_equal(reply.blocks->blocks[2], 43);
    assert_int_equal(reply.blocks->length, 40);

    encode(TSPB__REQUEST__BODY_LIST_KEPT, &(ts_answer){.kept = {.names = names,
                                                                .seqs = seqs,
                                                                .left_ms = left,
                                                                .lengths = lengths,
                                                                .blocks = blocks,
                                                                .count = 2,
                                                                .next = "b"}});
    const Tspb__KeptList *list = reply.kept_list;
    assert_true(list->n_names == 2 && list->n_seqs == 2 && list->n_left_ms == 2);
    assert_true(list->n_lengths == 2 && list->n_blocks == 2);
    assert_string_equal(list->names[1], "b");
    assert_int_equal(list->seqs[1], 22);
    assert_int_equal(list->left_ms[1], 900);
    assert_int_equal(list->lengths[1], 32);
    assert_int_equal(list->blocks[1], 42);
    assert_string_equal(list->next, "b");

    ts_answer matched = {.matched = {.lengths = lengths, .count = 2}};
    encode(TSPB__REQUEST__BODY_SEQ_MATCH, &matched); /* a dry one */
    assert_int_equal(reply.matched->n_lengths, 2);
    assert_int_equal(reply.matched->n_seqs, 0);
    assert_int_equal(reply.matched->n_twins, 0);
    matched.matched.seqs = seqs;
    matched.matched.twins = counts;
    encode(TSPB__REQUEST__BODY_SEQ_MATCH, &matched);
    assert_int_equal(reply.matched->n_seqs, 2);
    assert_int_equal(reply.matched->twins[1], 52);

    encode(TSPB__REQUEST__BODY_POOL_ROOM, &(ts_answer){.room = {.blocks = 1,
                                                                .available = 2,
                                                                .used = 3,
                                                                .cached = 4,
                                                                .pinned = 5,
                                                                .limit = 6,
                                                                .others = 7,
                                                                .sequences = 8,
                                                                .waiting = 9,
                                                                .asked_tokens = 10,
                                                                .found_tokens = 11}});
    const Tspb__Room *room = reply.room;
    const uint64_t figures[] = {room->blocks,       room->available,   room->used,
                                room->cached,       room->pinned,      room->limit,
                                room->others,       room->sequences,   room->waiting,
                                room->asked_tokens, room->found_tokens};
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++)
        assert_int_equal(figures[i], i + 1);

    command.seq_ticket.ticket[0] = 99;
    encode(TSPB__REQUEST__BODY_SEQ_TICKET, &(ts_answer){0});
    assert_int_equal(reply.ticket->ticket.len, TS_TICKET_BYTES);
    assert_int_equal(reply.ticket->ticket.data[0], 99);

    command.step_begin.append = true; /* it has no step */
    encode(TSPB__REQUEST__BODY_STEP_BEGIN, &(ts_answer){.begun = {.starts = lengths,
                                                                  .counts = counts,
                                                                  .blocks = blocks,
                                                                  .num_seqs = 2,
                                                                  .num_blocks = 3,
                                                                  .num_copies = 1}});
    assert_int_equal(reply.step_begun->step, 0);
    assert_true(reply.step_begun->n_starts == 2 && reply.step_begun->n_counts == 2);
    assert_int_equal(reply.step_begun->starts[0], 31);
    assert_int_equal(reply.step_begun->counts[0], 51);
    assert_int_equal(reply.step_begun->n_blocks, 3);
    assert_int_equal(reply.step_begun->copied_blocks, 1);
    const ts_step step = {.id = 0x700000003};
    command.step_begin.append = false;
    encode(TSPB__REQUEST__BODY_STEP_BEGIN, &(ts_answer){.begun = {.step = &step}});
    assert_int_equal(reply.step_begun->step, 0x700000003);
}

static void an_opened_pool_is_encoded_with_its_shape(void **state)
{
    (void)state;
    static ts_engine_pool pool = {.config = {.geometry = {.layers = 2,
                                                          .kv_heads = 3,
                                                          .head_dim = 64,
                                                          .block_tokens = 16,
                                                          .dtype = TS_DTYPE_FP16,
                                                          .layout = TS_LAYOUT_HND},
                                             .num_blocks = 100,
                                             .slab_blocks = 10,
                                             .sequence_tokens_max = 5000,
                                             .device_uuid = {1, 2, 3}},
                                  .books = {.max_blocks = 200}};
    const ts_engine engine = {.pools = &pool};
    const Tspb__Request r = request_of(TSPB__REQUEST__BODY_POOL_OPEN, NULL);
    const ts_answer answer = {.pool = 0};
    tspb__reply__init(&reply);
    ts_encode(&engine, &r, &command, &answer, &reply, &reply_body);
    const Tspb__PoolOpened *opened = reply.pool_opened;
    assert_int_equal(opened->layers, 2);
    assert_int_equal(opened->kv_heads, 3);
    assert_int_equal(opened->head_dim, 64);
    assert_int_equal(opened->block_tokens, 16);
    assert_int_equal(opened->dtype, TS_DTYPE_FP16);
    assert_int_equal(opened->layout, TS_LAYOUT_HND);
    assert_int_equal(opened->num_blocks, 100);
    assert_int_equal(opened->max_blocks, 200);
    assert_int_equal(opened->slab_blocks, 10);
    assert_int_equal(opened->sequence_tokens_max, 5000);
    assert_int_equal(opened->device_uuid.len, 0); /* it is in host memory */
    pool.config.on_gpu = true;
    ts_encode(&engine, &r, &command, &answer, &reply, &reply_body);
    assert_int_equal(reply.pool_opened->device_uuid.len, sizeof pool.config.device_uuid);
    assert_int_equal(reply.pool_opened->device_uuid.data[2], 3);
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
        cmocka_unit_test(what_is_freed_cut_or_picked_is_decoded_field_by_field),
        cmocka_unit_test(what_is_kept_and_listed_is_decoded_field_by_field),
        cmocka_unit_test(a_match_has_an_id_for_each_token),
        cmocka_unit_test(a_begin_is_decoded_field_by_field),
        cmocka_unit_test(a_commit_without_counts_accepts_all),
        cmocka_unit_test(counts_that_disagree_are_refused),
        cmocka_unit_test(a_run_has_what_its_flags_say),
        cmocka_unit_test(a_ticket_of_another_size_is_refused),
        cmocka_unit_test(what_is_no_command_is_left_to_others),
        cmocka_unit_test(a_refusal_is_encoded_without_a_body),
        cmocka_unit_test(answers_are_encoded_field_by_field),
        cmocka_unit_test(an_opened_pool_is_encoded_with_its_shape),
        cmocka_unit_test(a_string_with_control_characters_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
