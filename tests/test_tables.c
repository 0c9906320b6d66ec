/*
 * Block tables that a worker keeps from step to step: it is told what it lacks and no more, and
 * what it has is the daemon's table, whatever happened between.
 */
#define _GNU_SOURCE
#include "execution_util.h"

#include "block_table_cache.h"
#define SEQS 4u
#define BLOCK_TOKENS 4u
#define LOCAL_POOL POOL ",client_write=all,device=host"

static const ts_step_options four_heads = {.size = sizeof(ts_step_options), .heads = HEADS};

/* Runs what a step needs to be kept; K and V don't matter here. */
static void run_layers(ts_step *s)
{
    size_t tokens = ts_step_tokens(s);
    memset(ts_step_q(s), 0, tokens * HEADS * DIM * sizeof(float));
    memset(ts_step_k(s), 0, tokens * KV * DIM * sizeof(float));
    memset(ts_step_v(s), 0, tokens * KV * DIM * sizeof(float));
    for (uint32_t layer = 0; layer < 2; layer++)
        OK(ts_step_run(s, layer));
}

static void step(ts_pool *p, const ts_seq *seqs, uint32_t count, uint32_t each)
{
    uint32_t new_tokens[SEQS];
    ts_step *s;
    for (uint32_t i = 0; i < count; i++)
        new_tokens[i] = each;
    OK(ts_step_begin(p, seqs, new_tokens, count, &four_heads, &s));
    run_layers(s);
    OK(ts_step_commit(s, NULL));
}

/* Entries that the answer to the last begin had of sequence i, and from where on. */
static void assert_told(const ts_client *c, uint32_t i, uint32_t first, uint32_t count)
{
    assert_int_equal(c->rings->begun_firsts[i], first);
    assert_int_equal(c->rings->begun_counts[i], count);
}

static void a_steady_batch_is_told_what_its_new_tokens_touch(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, LOCAL_POOL);
    ts_client *c = connect_by(&d, 0, TS_EXEC_LOCAL, 0);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    ts_seq seqs[3];
    OK(ts_seq_create(p, 3, seqs));
    step(p, seqs, 2, 18); /* 5 entries */
    assert_told(c, 0, 0, 5);
    step(p, seqs, 2, 1);
    assert_told(c, 0, 4, 1);
    assert_told(c, 1, 4, 1);
    step(p, seqs, 2, 3); /* 22 tokens: a sixth */
    assert_told(c, 1, 4, 2);
    /* One that is new, in front: who stayed is known. */
    step(p, (ts_seq[]){seqs[2], seqs[1]}, 2, 2);
    assert_told(c, 0, 0, 1);
    assert_told(c, 1, 5, 1);
    step(p, seqs, 1, 1); /* it missed a step, and nobody else was told of it */
    assert_told(c, 0, 5, 1);
    /* What is taken back is told again, and no more than that. */
    OK(ts_seq_truncate(p, seqs, &(uint32_t){9}, 1));
    step(p, seqs, 1, 8);
    assert_told(c, 0, 2, 3);
    ts_step *s;
    OK(ts_step_begin(p, seqs, &(uint32_t){30}, 1, &four_heads, &s));
    OK(ts_step_abort(s));
    step(p, seqs, 1, 1);
    assert_told(c, 0, 4, 1);
    /* A fork is a sequence that nobody was told of; its parent's tail is copied. */
    OK(ts_seq_fork(p, seqs[0], 1, &seqs[2]));
    step(p, seqs + 2, 1, 1);
    assert_told(c, 0, 0, 5);
    OK(ts_seq_free(p, seqs, 1));
    assert_int_equal(p->tables[(uint32_t)seqs[0]].known_step, 0);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* Another session that is told makes the first be told all again. */
static void a_sequence_that_another_session_was_told_of_is_told_whole(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, LOCAL_POOL);
    ts_client *c[2];
    ts_pool *p[2];
    ts_seq seq;
    for (int i = 0; i < 2; i++) {
        c[i] = connect_by(&d, 0, TS_EXEC_LOCAL, 0);
        p[i] = open_pool(c[i], "tiny", TS_POOL_WRITABLE);
    }
    OK(ts_seq_create(p[0], 1, &seq));
    step(p[0], &seq, 1, 18);
    for (int i = 1; i >= 0; i--) { /* there and back */
        OK(ts_seq_keep(p[1 - i], seq, "wanders"));
        OK(ts_seq_attach(p[i], "wanders", &seq, NULL));
        step(p[i], &seq, 1, 1);
        assert_told(c[i], 0, 0, 5);
    }
    for (int i = 0; i < 2; i++) {
        ts_pool_close(p[i]);
        ts_disconnect(c[i]);
    }
    daemon_stop(&d);
}

/* What no daemon of ours tells: the table is told whole the next time. */
static void a_tale_that_has_a_gap_is_refused(void **state)
{
    (void)state;
    daemon_process d;
    const uint32_t *blocks, made_up[] = {0};
    daemon_start(&d, LOCAL_POOL);
    ts_client *c = connect_by(&d, 0, TS_EXEC_LOCAL, 0);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    step(p, &seq, 1, 18);
    ts_table_delta delta = {.seq = seq, .first = 6, .count = 1, .touched = 6, .blocks = made_up};
    assert_int_equal(ts_tables_update(p, 99, &delta, &blocks), TS_EPROTO);
    assert_string_equal(ts_error(c), "the daemon tells of entries from 6 on of a block table of "
                                     "which 5 are known");
    step(p, &seq, 1, 1);
    assert_told(c, 0, 0, 5);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* The blocks of whole blocks of tokens, by asking the daemon. */
static uint32_t whole_blocks(ts_pool *p, ts_seq seq, uint32_t *blocks)
{
    static uint64_t slots[4096];
    uint32_t length;
    OK(ts_seq_lengths(p, &seq, 1, &length));
    length -= length % BLOCK_TOKENS;
    if (length > 0)
        OK(ts_seq_slots(p, seq, 0, 0, length, slots));
    for (uint32_t i = 0; i < length; i += BLOCK_TOKENS)
        blocks[i / BLOCK_TOKENS] = (uint32_t)(slots[i] / BLOCK_TOKENS);
    return length / BLOCK_TOKENS;
}

/* Begins a step of some of the sequences, and compares the tables that its kernels read. */
static void check_step(ts_pool *p, const ts_seq *seqs, rng *r)
{
    static uint32_t whole[SEQS][4096];
    uint64_t slots[SEQS * 16], *slot = slots;
    uint32_t new_tokens[SEQS], num_whole[SEQS], accepted[SEQS], count = 0;
    ts_seq batch[SEQS];
    ts_step *s;
    for (uint32_t i = 0, first = rng_below(r, SEQS); i < SEQS; i++)
        if (rng_below(r, 3) > 0) {
            batch[count] = seqs[(first + i) % SEQS];
            num_whole[count] = whole_blocks(p, batch[count], whole[count]);
            new_tokens[count] = 1 + rng_below(r, rng_below(r, 2) == 0 ? 2 : 16);
            accepted[count] = rng_below(r, new_tokens[count] + 1);
            count++;
        }
    if (count == 0)
        return;
    OK(ts_step_begin(p, batch, new_tokens, count, &four_heads, &s));
    ts_step_slots(s, 0, slots);
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t *table = p->tables[(uint32_t)batch[i]].blocks;
        assert_memory_equal(table, whole[i], num_whole[i] * sizeof *table);
        for (uint32_t t = ts_step_start(s, i), end = t + new_tokens[i]; t < end; t++)
            assert_int_equal(table[t / BLOCK_TOKENS], *slot++ / BLOCK_TOKENS);
    }
    if (rng_below(r, 4) == 0) {
        OK(ts_step_abort(s));
        return;
    }
    run_layers(s);
    OK(ts_step_commit(s, rng_below(r, 2) == 0 ? NULL : accepted));
}

/* Changes a sequence without telling its table. */
static void change(ts_pool *p, ts_seq *seqs, rng *r)
{
    uint32_t i = rng_below(r, SEQS), j = (i + 1 + rng_below(r, SEQS - 1)) % SEQS, length;
    OK(ts_seq_lengths(p, &seqs[i], 1, &length));
    switch (rng_below(r, 4)) {
    case 0: /* blocks come back, into other tables */
        OK(ts_seq_truncate(p, &seqs[i], &(uint32_t){rng_below(r, length + 1)}, 1));
        break;
    case 1: /* the index is another sequence's then, and tails are shared */
        OK(ts_seq_free(p, &seqs[j], 1));
        OK(ts_seq_fork(p, seqs[i], 1, &seqs[j]));
        break;
    default:
        OK(ts_seq_append(p, &seqs[i], &(uint32_t){1 + rng_below(r, 9)}, 1, NULL));
    }
}

static void tables_that_are_told_in_parts_are_the_daemons(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, LOCAL_POOL);
    ts_client *c = connect_by(&d, 0, TS_EXEC_LOCAL, 0);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    ts_seq seqs[SEQS];
    OK(ts_seq_create(p, SEQS, seqs));
    for (uint32_t seed = 1; seed <= 500; seed++) {
        rng r = {seed};
        check_step(p, seqs, &r);
        for (uint32_t ops = rng_below(&r, 5); ops > 0; ops--)
            change(p, seqs, &r);
    }
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_steady_batch_is_told_what_its_new_tokens_touch),
        cmocka_unit_test(a_sequence_that_another_session_was_told_of_is_told_whole),
        cmocka_unit_test(a_tale_that_has_a_gap_is_refused),
        cmocka_unit_test(tables_that_are_told_in_parts_are_the_daemons),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
