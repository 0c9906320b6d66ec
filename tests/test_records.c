/* What the journal and snapshots store: the engine's state field by field, and commands. */
#define _GNU_SOURCE
#include "engine_util.h"

#include "answers.h"
#include "command_codec.h"
#include "records.h"

/* Another version wrote it, which has a field that this one lacks, and lacks one of its. */
static void a_snapshot_of_other_fields_is_read(void **state)
{
    (void)state;
    ts_record_writer w = {0};
    ts_record_reader r;
    const ts_stored_name names[2] = {{1, 2, 3}, {4, 5, 6}};
    ts_stored_name read[2];
    unsigned char bytes[1 << 16], *table = NULL;
    w.at = bytes;
    ts_records_begin(&w);
    ts_records_put(&w, TS_RECORD_NAME, names, 2);
    assert_true(w.bytes < sizeof bytes);
    for (uint64_t i = 0; i + 5 < w.bytes && table == NULL; i++)
        if (memcmp(bytes + i, "value", 6) == 0)
            table = bytes + i;
    assert_non_null(table);
    memcpy(table, "other", 6); /* a field that this version doesn't know, in place of one */
    assert_true(ts_records_open(&r, bytes, w.bytes));
    assert_true(ts_records_get_all(&r, TS_RECORD_NAME, read, 2));
    for (int i = 0; i < 2; i++) {
        assert_int_equal(read[i].tenant, names[i].tenant);
        assert_int_equal(read[i].value, 0);
        assert_int_equal(read[i].bytes, names[i].bytes);
    }
}

/* Every byte of what is stored as a record is a field's, or lies between fields for their
 * alignment, or is a pointer. */
static void no_field_of_a_record_was_forgotten(void **state)
{
    (void)state;
    static const uint32_t expected[TS_RECORDS] = {
        [TS_RECORD_LIMITS] = 8,    [TS_RECORD_POOL_CONFIG] = 8, [TS_RECORD_TENANT] = 4,
        [TS_RECORD_SEQUENCE] = 26, [TS_RECORD_LIFE] = 12,       [TS_RECORD_SPACE] = 9,
        [TS_RECORD_SESSION] = 20,  [TS_RECORD_STEP] = 24,       [TS_RECORD_STEP_SEQ] = 8,
        [TS_RECORD_CLAIM] = 19,    [TS_RECORD_ANSWER] = 4,
    };
    for (int t = TS_RECORD_WORD; t < TS_RECORDS; t++) {
        const ts_record_type *type = &ts_record_types[t];
        if (type->in_place || type->num_fields == 0)
            continue;
        unsigned char *is_field = calloc(type->bytes, 1);
        uint32_t others = 0;
        for (uint32_t i = 0; i < type->num_fields; i++)
            memset(is_field + type->fields[i].offset, 1, type->fields[i].bytes);
        for (uint32_t i = 0; i < type->bytes; i++)
            others += is_field[i] == 0;
        free(is_field);
        if (others != expected[t])
            fail_msg("%s: %u bytes are no field's, where %u are pointers or lie between fields: "
                     "add what is new to records.c, or its alignment to this number",
                     type->name, others, expected[t]);
    }
}

/* The books have these numbers: rows of operations.inc.h are added at the end alone. */
static void commands_keep_their_numbers(void **state)
{
    (void)state;
    assert_int_equal(TS_OP_SESSION_OPEN, 1);
    assert_int_equal(TS_OP_SEQ_FORK, 8);
    assert_int_equal(TS_OP_STEP_BEGIN, 21);
    assert_int_equal(TS_OP_SLAB_GRANT, 26);
    assert_int_equal(TS_OP_BLOCK_LOST, 41);
    assert_false(ts_command_is_known(TS_OP_NONE));
    assert_true(ts_command_is_known(TS_OP_BLOCK_LOST));
    assert_false(ts_command_is_known(TS_OP_COUNT));
}

/* The command as the journal gives it back. */
static ts_command stored(const ts_command *c, unsigned char *bytes, size_t room)
{
    static ts_command_room outside;
    ts_command read;
    assert_true(ts_command_bytes(c) <= room);
    memset(bytes, 0xa5, room);
    ts_command_write(c, bytes);
    assert_true(ts_command_read(bytes, ts_command_bytes(c), &outside, &read));
    assert_int_equal(read.op, c->op);
    return read;
}

static void what_a_command_points_to_is_stored_with_it(void **state)
{
    (void)state;
    unsigned char bytes[1024];
    const uint32_t counts[] = {2, 0, 3}, tokens[] = {7, 8, 9, 10, 11};
    const uint64_t seqs[] = {5, 6};
    ts_command c = {.op = TS_OP_SEQ_MATCH,
                    .seq_match = {.counts = counts, .tokens = tokens, .count = 3, .dry = true}};
    c.seq_match.space = (ts_space_name){"space", 5};
    assert_true(ts_command_only_looks(&c));
    ts_command is = stored(&c, bytes, sizeof bytes);
    assert_int_equal(is.seq_match.count, 3);
    assert_memory_equal(is.seq_match.counts, counts, sizeof counts);
    assert_memory_equal(is.seq_match.tokens, tokens, sizeof tokens);
    assert_memory_equal(is.seq_match.space.bytes, "space", 5);

    c = (ts_command){.op = TS_OP_SEQ_TRUNCATE,
                     .seq_batch = {.seqs = seqs, .lengths = tokens, .count = 2}};
    is = stored(&c, bytes, sizeof bytes);
    assert_memory_equal(is.seq_batch.seqs, seqs, sizeof seqs);
    assert_memory_equal(is.seq_batch.lengths, tokens, 2 * sizeof *tokens);

    c = (ts_command){.op = TS_OP_SEQ_KEEP, .seq_keep = {.seq = 3, .name = "name"}};
    is = stored(&c, bytes, sizeof bytes);
    assert_string_equal(is.seq_keep.name, "name");
    assert_false(ts_command_only_looks(&c));

    c = (ts_command){.op = TS_OP_STEP_BEGIN,
                     .step_begin = {.seqs = seqs, .new_tokens = counts, .count = 2}};
    is = stored(&c, bytes, sizeof bytes);
    assert_memory_equal(is.step_begin.new_tokens, counts, 2 * sizeof *counts);
    assert_null(is.step_begin.tokens); /* no ids are known */
    c.step_begin.tokens = tokens;
    is = stored(&c, bytes, sizeof bytes);
    assert_memory_equal(is.step_begin.tokens, tokens, 2 * sizeof *tokens);
}

/* One field of a command that was stored isn't what it was: the command can't be read. */
static void spoiled(const ts_command *c, const void *field, size_t field_bytes, uint64_t value)
{
    static ts_command_room outside;
    unsigned char bytes[1024], *at;
    ts_command read;
    assert_true(ts_command_bytes(c) <= sizeof bytes);
    ts_command_write(c, bytes);
    assert_true(ts_command_read(bytes, ts_command_bytes(c), &outside, &read));
    /* Its struct is stored as it is, and comes before what it points to. */
    at = memmem(bytes, sizeof bytes, &c->session_open, 8);
    assert_non_null(at);
    at += (const unsigned char *)field - (const unsigned char *)&c->session_open;
    memcpy(at, &value, field_bytes);
    if (ts_command_read(bytes, ts_command_bytes(c), &outside, &read))
        fail_msg("command %u: a field that is %llu", (unsigned)c->op, (unsigned long long)value);
}

static void a_command_that_speaks_of_more_than_it_points_to_isnt_read(void **state)
{
    (void)state;
    const uint32_t counts[] = {2, 0, 3}, tokens[] = {7, 8, 9, 10, 11};
    const uint64_t seqs[] = {5, 6};
    ts_command c = {.op = TS_OP_SEQ_MATCH,
                    .seq_match = {.counts = counts, .tokens = tokens, .count = 3}};
    c.seq_match.space = (ts_space_name){"space", 5};
    spoiled(&c, &c.seq_match.count, sizeof c.seq_match.count, 4);
    spoiled(&c, &c.seq_match.count, sizeof c.seq_match.count, 2);
    spoiled(&c, &c.seq_match.count, sizeof c.seq_match.count, UINT32_MAX);
    spoiled(&c, &c.seq_match.space.count, sizeof c.seq_match.space.count, 6);
    spoiled(&c, &c.seq_match.space.count, sizeof c.seq_match.space.count, SIZE_MAX);

    c = (ts_command){.op = TS_OP_SEQ_TRUNCATE,
                     .seq_batch = {.seqs = seqs, .lengths = tokens, .count = 2}};
    spoiled(&c, &c.seq_batch.count, sizeof c.seq_batch.count, 3);
    c.op = TS_OP_SEQ_FREE;
    spoiled(&c, &c.seq_batch.count, sizeof c.seq_batch.count, 0x10002);

    c = (ts_command){.op = TS_OP_STEP_COMMIT,
                     .step_end = {.step = 77, .accepted = counts, .count = 3}};
    spoiled(&c, &c.step_end.count, sizeof c.step_end.count, 4);

    c = (ts_command){.op = TS_OP_SEQ_KEEP, .seq_keep = {.seq = 3, .name = "name"}};
    unsigned char bytes[1024];
    ts_command_room outside;
    ts_command read;
    ts_command_write(&c, bytes);
    char *name = memmem(bytes, ts_command_bytes(&c), "name", 5);
    name[4] = 's'; /* no NUL ends it */
    assert_false(ts_command_read(bytes, ts_command_bytes(&c), &outside, &read));
}

/* A call that was given up may be carried out behind the one after it, which may come again. */
static void a_late_call_hides_no_answer(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    ts_answers answers;
    ts_answer answer;
    const uint64_t s = session_new(e, 1000), seq = seq_new(e, s);
    ts_command create = {
        .op = TS_OP_SEQ_CREATE, .session = s, .call = 5, .seq_create = {.count = 1}};
    const ts_command late = {
        .op = TS_OP_SEQ_FREE, .session = s, .call = 4, .seq_batch = {.seqs = &seq, .count = 1}};
    assert_true(ts_answers_init(&answers, 8));
    assert_int_equal(apply(e, create, &answer), TS_OK);
    const uint64_t made = answer.seqs.seqs[0];
    assert_true(ts_answers_note(&answers, &create, &answer));
    assert_int_equal(apply(e, late, &answer), TS_OK);
    assert_true(ts_answers_note(&answers, &late, &answer));
    assert_true(ts_answers_find(&answers, e, &create, &answer));
    assert_int_equal(answer.seqs.seqs[0], made);
    create.call = 6;
    assert_false(ts_answers_find(&answers, e, &create, &answer));
    ts_answers_fini(&answers);
    ts_engine_free(e);
}

/* Its answer wouldn't fit what asks now: a ring has room for less than a message. */
static void a_number_that_is_used_for_something_else_is_told_no_answer(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    ts_answers answers;
    ts_answer answer;
    const uint64_t s = session_new(e, 1000), seq = seq_new(e, s);
    const uint32_t ones[] = {1, 1}, zeros[] = {0, 0};
    assert_true(ts_answers_init(&answers, 8));
    ts_command calls[] = {
        {.op = TS_OP_SEQ_CREATE, .seq_create = {.count = 2}},
        {.op = TS_OP_SEQ_FORK, .seq_fork = {.parent = seq, .count = 2}},
        {.op = TS_OP_SEQ_SELECT,
         .seq_select = {.seqs = &seq, .count = 1, .from = zeros, .picked = 2}},
        {.op = TS_OP_SEQ_MATCH,
         .seq_match = {.counts = ones, .tokens = ones, .count = 2, .space = {"m", 1}}},
        {.op = TS_OP_STEP_BEGIN,
         .step_begin = {.seqs = &seq, .new_tokens = ones, .count = 1, .heads = 1, .append = true}},
    };
    uint32_t *const counts[] = {&calls[0].seq_create.count, &calls[1].seq_fork.count,
                                &calls[2].seq_select.picked, &calls[3].seq_match.count,
                                &calls[4].step_begin.count};
    for (uint32_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        ts_command *c = &calls[i];
        c->session = s;
        c->call = i + 1;
        if (apply(e, *c, &answer) != TS_OK)
            fail_msg("%u: %s", i, answer.message);
        assert_true(ts_answers_note(&answers, c, &answer));
        assert_true(ts_answers_find(&answers, e, c, &answer));
        *counts[i] += 1;
        assert_false(ts_answers_find(&answers, e, c, &answer));
        *counts[i] -= 2;
        assert_false(ts_answers_find(&answers, e, c, &answer));
        *counts[i] += 1;
        if (c->op == TS_OP_STEP_BEGIN)
            c->step_begin.append = false; /* an append has no step by now */
        assert_int_equal(ts_answers_find(&answers, e, c, &answer), c->op != TS_OP_STEP_BEGIN);
    }
    ts_answers_fini(&answers);
    ts_engine_free(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(commands_keep_their_numbers),
        cmocka_unit_test(what_a_command_points_to_is_stored_with_it),
        cmocka_unit_test(a_command_that_speaks_of_more_than_it_points_to_isnt_read),
        cmocka_unit_test(a_snapshot_of_other_fields_is_read),
        cmocka_unit_test(no_field_of_a_record_was_forgotten),
        cmocka_unit_test(a_late_call_hides_no_answer),
        cmocka_unit_test(a_number_that_is_used_for_something_else_is_told_no_answer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
