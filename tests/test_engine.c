/* The engine's rules one by one: pools, sequences, steps, sessions, tenants, limits. */
#include "engine_util.h"

#include "pool_stats.h"

#define BLOCKS(e) ((e)->pools[0].books)

static void the_prototypes_scenario_gives_its_exact_blocks_and_slots(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), seq = seq_new(e, session);
    ts_answer answer;
    uint32_t tokens = 5;
    assert_int_equal(begin(e, session, &seq, &tokens, 1, true, &answer), TS_OK);
    assert_int_equal(answer.begun.num_blocks, 2);
    assert_int_equal(answer.begun.blocks[0], 0);
    assert_int_equal(answer.begun.blocks[1], 1);
    assert_int_equal(BLOCKS(e).used, 2);
    assert_int_equal(answer.begun.blocks[3 / 4] * 4 + 3 % 4, 3); /* the 4th token's slot */
    tokens = 3;
    assert_int_equal(begin(e, session, &seq, &tokens, 1, true, &answer), TS_OK);
    assert_int_equal(BLOCKS(e).used, 2);
    assert_int_equal(answer.begun.starts[0], 5);
    tokens = 1;
    assert_int_equal(begin(e, session, &seq, &tokens, 1, true, &answer), TS_OK);
    assert_int_equal(answer.begun.num_blocks, 1);
    assert_int_equal(answer.begun.blocks[0], 2);
    assert_int_equal(BLOCKS(e).used, 3);
    assert_int_equal(length_of(e, session, seq), 9);
    check_engine(e);
    ts_engine_free(e);
}

static void fork_then_append_copies_only_the_tail_block(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), parent = seq_new(e, session);
    append(e, session, parent, 10); /* blocks 0 1 2, the last half full */
    uint64_t child = fork_seq(e, session, parent);
    assert_int_equal(BLOCKS(e).used, 3);
    assert_int_equal(BLOCKS(e).shared, 3);
    ts_answer answer;
    uint32_t tokens = 1;
    assert_int_equal(begin(e, session, &child, &tokens, 1, true, &answer), TS_OK);
    assert_int_equal(answer.begun.num_copies, 1);
    assert_int_equal(answer.begun.copies[0].src, 2);
    assert_int_equal(answer.begun.copies[0].dst, 3);
    assert_int_equal(length_of(e, session, child), 10); /* until the copy is made */
    assert_int_equal(step_done(e, answer.begun.step->id, TS_NONE), TS_OK);
    assert_int_equal(length_of(e, session, child), 11);
    assert_int_equal(BLOCKS(e).used, 4);
    assert_int_equal(BLOCKS(e).shared, 2);
    append(e, session, parent, 1); /* its tail is its own again: no copy */
    assert_int_equal(BLOCKS(e).used, 4);
    check_engine(e);
    assert_int_equal(free_seq(e, session, parent), TS_OK);
    assert_int_equal(free_seq(e, session, child), TS_OK);
    assert_int_equal(BLOCKS(e).used, 0);
    check_engine(e);
    ts_engine_free(e);
}

static void a_sequence_without_new_tokens_takes_no_block_and_no_copy(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), parent = seq_new(e, session),
             empty = seq_new(e, session);
    append(e, session, parent, 10); /* blocks 0 1 2, the last half full */
    uint64_t child = fork_seq(e, session, parent), other = seq_new(e, session);
    const uint64_t seqs[] = {empty, parent, other};
    const uint32_t tokens[] = {0, 0, 5};
    ts_answer answer;
    for (int commit = 0; commit < 2; commit++) {
        assert_int_equal(begin(e, session, seqs, tokens, 3, false, &answer), TS_OK);
        assert_int_equal(answer.begun.num_copies, 0);
        assert_int_equal(answer.begun.num_blocks, 2);
        assert_int_equal(answer.begun.counts[0], 0);
        assert_int_equal(answer.begun.counts[1], 0);
        assert_int_equal(answer.begun.counts[2], 2);
        assert_int_equal(answer.begun.starts[1], 10);
        assert_int_equal(BLOCKS(e).used, 5);
        assert_int_equal(BLOCKS(e).shared, 3);
        check_engine(e);
        ts_op op = commit ? TS_OP_STEP_COMMIT : TS_OP_STEP_ABORT;
        assert_int_equal(step_end(e, session, op, answer.begun.step->id, NULL, 0), TS_OK);
        check_engine(e);
    }
    assert_int_equal(length_of(e, session, empty), 0);
    assert_int_equal(length_of(e, session, parent), 10);
    assert_int_equal(length_of(e, session, child), 10);
    assert_int_equal(length_of(e, session, other), 5);
    assert_int_equal(BLOCKS(e).used, 5);
    assert_int_equal(BLOCKS(e).shared, 3);
    ts_engine_free(e);
}

static void an_aborted_step_leaves_every_sequence_as_it_was(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 4, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), seqs[2] = {seq_new(e, session), seq_new(e, session)};
    append(e, session, seqs[0], 6);
    uint64_t child = fork_seq(e, session, seqs[0]);
    ts_answer answer;
    uint32_t tokens[2] = {9, 4};
    assert_int_equal(begin(e, session, seqs, tokens, 2, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(answer.begun.num_copies, 1);
    assert_int_equal(BLOCKS(e).used, 2 + 1 + 2 + 1);
    check_engine(e);
    assert_int_equal(step_end(e, session, TS_OP_STEP_ABORT, step, NULL, 0), TS_EBUSY);
    assert_int_equal(step_done(e, step, TS_NONE), TS_OK);
    assert_int_equal(step_end(e, session, TS_OP_STEP_ABORT, step, NULL, 0), TS_OK);
    assert_int_equal(BLOCKS(e).used, 2);
    assert_int_equal(BLOCKS(e).shared, 2);
    assert_int_equal(length_of(e, session, seqs[0]), 6);
    assert_int_equal(length_of(e, session, seqs[1]), 0);
    assert_int_equal(length_of(e, session, child), 6);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, NULL, 0), TS_ENOENT);
    check_engine(e);
    ts_engine_free(e);
}

static void committing_fewer_tokens_gives_the_other_blocks_back(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000),
             seqs[3] = {seq_new(e, session), seq_new(e, session), seq_new(e, session)};
    ts_answer answer;
    uint32_t tokens[3] = {9, 9, 9}, accepted[3] = {9, 5, 0}, too_many[3] = {9, 10, 0};
    assert_int_equal(begin(e, session, seqs, tokens, 3, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(BLOCKS(e).used, 9);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, too_many, 3), TS_EINVAL);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, accepted, 2), TS_EINVAL);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, accepted, 3), TS_OK);
    assert_int_equal(BLOCKS(e).used, 3 + 2);
    assert_int_equal(length_of(e, session, seqs[0]), 9);
    assert_int_equal(length_of(e, session, seqs[1]), 5);
    assert_int_equal(length_of(e, session, seqs[2]), 0);
    check_engine(e);
    ts_engine_free(e);
}

static void a_step_that_does_not_fit_takes_nothing(void **state)
{
    (void)state;
    ts_engine *e = engine_new(7, 3, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), seqs[2] = {seq_new(e, session), seq_new(e, session)};
    append(e, session, seqs[0], 8);
    ts_answer answer;
    uint32_t tokens[2] = {4, 20};
    assert_int_equal(begin(e, session, seqs, tokens, 2, false, &answer), TS_ENOSPC);
    assert_string_equal(answer.message,
                        "6 blocks are needed, but pool 'test' has 5 free for uid 1000 (of 7)");
    assert_int_equal(BLOCKS(e).used, 2);
    assert_int_equal(length_of(e, session, seqs[0]), 8);
    tokens[1] = 16;
    assert_int_equal(begin(e, session, seqs, tokens, 2, false, &answer), TS_OK);
    assert_int_equal(BLOCKS(e).used, 7);
    check_engine(e);
    ts_engine_free(e);
}

static void bad_batches_are_refused_whole_with_a_reason(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), first = seq_new(e, session),
             second = seq_new(e, session);
    ts_answer answer;
    uint64_t twice[2] = {first, first}, unknown[2] = {first, 12345};
    uint32_t tokens[2] = {1, 1}, zero[2] = {0, 0}, huge[2] = {UINT32_MAX, UINT32_MAX};
    assert_int_equal(begin(e, session, twice, tokens, 2, false, &answer), TS_EINVAL);
    assert_int_equal(begin(e, session, unknown, tokens, 2, false, &answer), TS_ENOENT);
    assert_string_equal(answer.message, "there is no sequence 3039 in pool 'test'");
    assert_int_equal(begin(e, session, (uint64_t[]){first, second}, zero, 2, false, &answer),
                     TS_EINVAL);
    assert_string_equal(answer.message,
                        "a step of 2 sequences has 0 new tokens; it needs at least 1");
    assert_int_equal(begin(e, session, (uint64_t[]){first, second}, huge, 2, false, &answer),
                     TS_EINVAL);
    char told[160];
    snprintf(told, sizeof told,
             "4294967295 new tokens for sequence %llx of 0; the pool's limit is 1048576 tokens a "
             "sequence",
             (unsigned long long)first);
    assert_string_equal(answer.message, told);
    assert_int_equal(begin(e, session, &first, tokens, 0, false, &answer), TS_EINVAL);
    assert_int_equal(begin(e, session, &first, tokens, 65537, false, &answer), TS_EINVAL);
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_SEQ_FREE,
                                        .session = session,
                                        .seq_batch = {.seqs = twice, .count = 2}},
                           &answer),
                     TS_EINVAL);
    uint32_t lengths[2] = {0, 1};
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_SEQ_TRUNCATE,
                                        .session = session,
                                        .seq_batch = {.seqs = (uint64_t[]){first, second},
                                                      .lengths = lengths,
                                                      .count = 2}},
                           &answer),
                     TS_EINVAL);
    /* Nothing of all that left a mark. */
    assert_int_equal(begin(e, session, (uint64_t[]){first, second}, tokens, 2, false, &answer),
                     TS_OK);
    check_engine(e);
    ts_engine_free(e);
}

static void sequences_of_an_open_step_cannot_be_changed_but_forked_as_they_were(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), seq = seq_new(e, session);
    append(e, session, seq, 6);
    uint64_t first = fork_seq(e, session, seq); /* so the step will copy the tail */
    ts_answer answer;
    uint32_t tokens = 1, length = 2;
    assert_int_equal(begin(e, session, &seq, &tokens, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(free_seq(e, session, seq), TS_EBUSY);
    assert_int_equal(begin(e, session, &seq, &tokens, 1, false, &answer), TS_EBUSY);
    assert_int_equal(
        apply(e,
              (ts_command){.op = TS_OP_SEQ_TRUNCATE,
                           .session = session,
                           .seq_batch = {.seqs = &seq, .lengths = &length, .count = 1}},
              &answer),
        TS_EBUSY);
    uint64_t second = fork_seq(e, session, seq); /* shares the original tail, not the copy */
    apply(e,
          (ts_command){.op = TS_OP_SEQ_BLOCKS, .session = session, .seq_blocks = {.seq = second}},
          &answer);
    assert_int_equal(answer.blocks.blocks[1], 1);
    apply(e, (ts_command){.op = TS_OP_SEQ_BLOCKS, .session = session, .seq_blocks = {.seq = seq}},
          &answer);
    assert_int_equal(answer.blocks.blocks[1], 1);
    check_engine(e);
    assert_int_equal(step_done(e, step, TS_NONE), TS_OK);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
    apply(e, (ts_command){.op = TS_OP_SEQ_BLOCKS, .session = session, .seq_blocks = {.seq = seq}},
          &answer);
    assert_int_equal(answer.blocks.blocks[1], 2);
    assert_int_equal(length_of(e, session, first), 6);
    check_engine(e);
    ts_engine_free(e);
}

static void a_session_that_dies_in_a_step_leaves_kept_sequences_as_they_were(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), kept = seq_new(e, session), own = seq_new(e, session);
    append(e, session, kept, 6);
    assert_int_equal(keep_seq(e, session, kept, "prompt"), TS_OK);
    ts_answer answer;
    uint32_t tokens[2] = {7, 3};
    assert_int_equal(begin(e, session, (uint64_t[]){kept, own}, tokens, 2, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_EXCHANGE_OPEN,
                                        .session = session,
                                        .exchange_open = {.bytes = 1 << 16}},
                           &answer),
                     TS_OK);
    ts_command run = {
        .op = TS_OP_STEP_RUN,
        .session = session,
        .step_run = {.step = step, .run = {.q = 0, .k = 4096, .v = 8192, .out = 12288}}};
    assert_int_equal(apply(e, run, &answer), TS_OK);
    close_session(e, session); /* while the kernel works */
    assert_int_equal(e->live_sessions, 1);
    assert_int_not_equal(BLOCKS(e).used, 2);
    check_engine(e);
    assert_int_equal(step_done(e, step, 0), TS_OK); /* now all is free */
    assert_int_equal(e->live_sessions, 0);
    assert_int_equal(BLOCKS(e).used, 2);
    uint64_t other = session_new(e, 1000);
    assert_int_equal(attach(e, other, "prompt"), kept);
    assert_int_equal(length_of(e, other, kept), 6);
    check_engine(e);
    ts_engine_free(e);
}

static void a_pool_is_closed_when_the_session_has_nothing_in_it(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), kept = seq_new(e, session), own = seq_new(e, session);
    ts_command close = {.op = TS_OP_POOL_CLOSE, .session = session},
               again = {.op = TS_OP_POOL_OPEN, .session = session, .pool_open = {.name = "test"}};
    ts_answer answer;
    uint32_t tokens = 3;
    assert_int_equal(keep_seq(e, session, kept, "prompt"), TS_OK);
    assert_int_equal(apply(e, close, &answer), TS_EBUSY);
    assert_string_equal(answer.message,
                        "the session has sequences in pool 'test', which stays open in it");
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_SEQ_FREE,
                                        .session = session,
                                        .seq_batch = {.seqs = &own, .count = 1}},
                           &answer),
                     TS_OK);
    assert_int_equal(begin(e, session, &kept, &tokens, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(apply(e, close, &answer), TS_EBUSY);
    assert_string_equal(answer.message,
                        "the session has an open step in pool 'test', which stays open in it");
    assert_int_equal(step_end(e, session, TS_OP_STEP_ABORT, step, NULL, 0), TS_OK);
    assert_int_equal(apply(e, close, &answer), TS_OK);
    assert_int_equal(apply(e, close, &answer), TS_ENOENT);
    assert_int_equal(begin(e, session, &kept, &tokens, 1, false, &answer), TS_ENOENT);
    assert_int_equal(apply(e, again, &answer), TS_OK);
    /* it is open now, but not to write */
    assert_int_equal(begin(e, session, &kept, &tokens, 1, true, &answer), TS_EPERM);
    check_engine(e);
    ts_engine_free(e);
}

static void tokens_nobody_wrote_cannot_be_committed(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_NONE);
    uint64_t session = session_new(e, 1000), seq = seq_new(e, session);
    ts_answer answer;
    uint32_t tokens = 2, none = 0;
    assert_int_equal(begin(e, session, &seq, &tokens, 1, true, &answer), TS_EPERM);
    assert_int_equal(begin(e, session, &seq, &tokens, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, NULL, 0), TS_EPERM);
    apply(e,
          (ts_command){
              .op = TS_OP_EXCHANGE_OPEN, .session = session, .exchange_open = {.bytes = 1 << 16}},
          &answer);
    ts_command run = {
        .op = TS_OP_STEP_RUN,
        .session = session,
        .step_run = {.step = step, .run = {.q = 0, .k = 4096, .v = 8192, .out = 12288}}};
    assert_int_equal(apply(e, run, &answer), TS_OK);
    assert_int_equal(step_done(e, step, 0), TS_OK);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, NULL, 0),
                     TS_EINVAL); /* 1 of 2 layers */
    run.step_run.run.layer = 1;
    assert_int_equal(apply(e, run, &answer), TS_OK);
    /* A run that failed wrote nothing: no commit says so until the layer is run again. */
    apply(e,
          (ts_command){.op = TS_OP_STEP_DONE,
                       .step_done = {.step = step, .layer = 1, .status = TS_EDEVICE}},
          &answer);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, NULL, 0), TS_EDEVICE);
    assert_int_equal(apply(e, run, &answer), TS_OK);
    assert_int_equal(step_done(e, step, 1), TS_OK);
    run.step_run.run.layer = 2;
    assert_int_equal(apply(e, run, &answer), TS_EINVAL);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, step, NULL, 0), TS_OK);
    assert_int_equal(length_of(e, session, seq), 2);
    /* Committing none of a step is always possible. */
    assert_int_equal(begin(e, session, &seq, &tokens, 1, false, &answer), TS_OK);
    assert_int_equal(step_end(e, session, TS_OP_STEP_COMMIT, answer.begun.step->id, &none, 1),
                     TS_OK);
    ts_engine_free(e);
}

static void a_million_sequences_cost_what_the_readme_says(void **state)
{
    (void)state;
    ts_engine *e = engine_new(1u << 24, 1u << 16, 16, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000);
    ts_answer answer;
    ts_command create = {
        .op = TS_OP_SEQ_CREATE, .session = session, .seq_create = {.count = 65536}};
    uint64_t *ids = malloc(65536 * sizeof *ids);
    uint32_t *tokens = malloc(65536 * sizeof *tokens);
    for (uint32_t i = 0; i < 65536; i++)
        tokens[i] = 16;
    for (int i = 0; i < 16; i++) {
        assert_int_equal(apply(e, create, &answer), TS_OK);
        memcpy(ids, answer.seqs.seqs, 65536 * sizeof *ids);
        for (int j = 0; j < 16; j++) /* 16 blocks each: all 16 million */
            assert_int_equal(begin(e, session, ids, tokens, 65536, true, &answer), TS_OK);
    }
    assert_int_equal(e->pools[0].seqs.live, 1u << 20);
    assert_int_equal(BLOCKS(e).used, 1u << 24);
    uint32_t one = 1;
    assert_int_equal(begin(e, session, ids, &one, 1, true, &answer), TS_ENOSPC);
    check_engine(e);
    close_session(e, session);
    sweep_all(e);
    assert_int_equal(BLOCKS(e).used, 0);
    assert_int_equal(e->pools[0].seqs.live, 0);
    check_engine(e);
    free(ids);
    free(tokens);
    ts_engine_free(e);
}

static void an_append_whose_copies_are_not_made_changes_nothing(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), parent = seq_new(e, session);
    append(e, session, parent, 10);
    uint64_t child = fork_seq(e, session, parent);
    ts_answer answer;
    uint32_t tokens = 3;
    assert_int_equal(begin(e, session, &child, &tokens, 1, true, &answer), TS_OK);
    assert_int_equal(answer.begun.num_copies, 1);
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_STEP_DONE,
                                        .step_done = {.step = answer.begun.step->id,
                                                      .layer = TS_NONE,
                                                      .status = TS_ENOMEM}},
                           &answer),
                     TS_OK);
    assert_int_equal(length_of(e, session, child), 10);
    append(e, session, child, 3); /* no step is open */
    assert_int_equal(length_of(e, session, child), 13);
    ts_engine_free(e);
}

static void a_walk_counts_stored_tokens_once(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    uint64_t session = session_new(e, 1000), parent = seq_new(e, session);
    append(e, session, parent, 10);
    uint64_t child = fork_seq(e, session, parent);
    append(e, session, child, 3); /* its own tail: 2 copied + 3 new, over 2 blocks */
    ts_answer answer;
    uint64_t lone = seq_new(e, session);
    uint32_t tokens = 6;
    /* the step reserves 2 blocks */
    assert_int_equal(begin(e, session, &lone, &tokens, 1, false, &answer), TS_OK);
    ts_pool_stats *walk = ts_pool_stats_new(e, 0);
    assert_non_null(walk);
    uint32_t bits = 1;
    for (; !ts_pool_stats_go_on(walk, e, 3); bits++) /* however it is cut */
        ;
    assert_true(bits > 5);
    const ts_pool_stats stats = *walk;
    ts_pool_stats_lengths lengths = ts_pool_stats_lengths_of(walk, (ts_view){.all = true});
    assert_int_equal(stats.seen_tokens, 10 + 13);
    assert_int_equal(stats.stored_tokens, 10 + 2 + 3);
    assert_int_equal(stats.used_slots, (3 + 2 + 2) * 4);
    assert_int_equal(stats.reserved_slots, 2 * 4);
    assert_int_equal(stats.table_blocks, 3 + 4);
    assert_int_equal(lengths.longest, 13);
    assert_int_equal(lengths.bins[0], 1);
    assert_int_equal(lengths.bins[3], 2);
    assert_int_equal(stats.free_runs[3], 1); /* 9 blocks in one run */
    assert_int_equal(stats.cells[2].tokens, 2);
    ts_pool_stats_free(walk);
    ts_engine_free(e);
}

/* Under Clang's UndefinedBehaviorSanitizer this also shows that no pointer is formed from none. */
int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_prototypes_scenario_gives_its_exact_blocks_and_slots),
        cmocka_unit_test(fork_then_append_copies_only_the_tail_block),
        cmocka_unit_test(a_sequence_without_new_tokens_takes_no_block_and_no_copy),
        cmocka_unit_test(an_aborted_step_leaves_every_sequence_as_it_was),
        cmocka_unit_test(committing_fewer_tokens_gives_the_other_blocks_back),
        cmocka_unit_test(a_step_that_does_not_fit_takes_nothing),
        cmocka_unit_test(bad_batches_are_refused_whole_with_a_reason),
        cmocka_unit_test(sequences_of_an_open_step_cannot_be_changed_but_forked_as_they_were),
        cmocka_unit_test(a_session_that_dies_in_a_step_leaves_kept_sequences_as_they_were),
        cmocka_unit_test(a_pool_is_closed_when_the_session_has_nothing_in_it),
        cmocka_unit_test(tokens_nobody_wrote_cannot_be_committed),
        cmocka_unit_test(a_million_sequences_cost_what_the_readme_says),
        cmocka_unit_test(an_append_whose_copies_are_not_made_changes_nothing),
        cmocka_unit_test(a_walk_counts_stored_tokens_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
