/*
 * Random commands against a naive model. The model keeps each sequence as the plain list of its
 * tokens' values, and the test keeps the pool's memory as an array that it fills as a kernel would:
 * new tokens into the slots of a step, whole blocks for its copies. After every command that
 * changed a sequence, reading that sequence through the engine's block table must give the model's
 * list; now and then all of them are read and the engine's books are checked.
 *
 * Tokens have ids too, of an alphabet of two. What a token with known ids before it "computes" is a
 * function of them and of the namespace, so that a match, or a block that takes another's place,
 * must read as if the sequence had computed it.
 */
#include "model_waits.h"

/* With `homes` slabs are sessions' own, as a GPU pool's are. */
static world *world_new(uint64_t seed, bool homes)
{
    world *w = calloc(1, sizeof *w);
    w->e = engine_new(NUM_BLOCKS, SLAB_BLOCKS, BLOCK_TOKENS, TS_CLIENT_WRITE_ALL);
    w->e->pools[0].config.sequence_tokens_max = LENGTH_MAX;
    w->r.state = seed;
    if (homes)
        assert_int_equal(ts_pool_use_homes(&w->e->pools[0].books, w->e->limits.sessions), TS_OK);
    return w;
}

static void agree(uint64_t seed, bool homes)
{
    world *w = world_new(seed, homes);
    for (uint32_t i = 1; i <= 1000000; i++) {
        one_command(w);
        if (i % 64 != 0)
            continue;
        check_engine(w->e);
        for (int s = 0; s < (int)SEQS; s++)
            if (w->seqs[s].live)
                verify_seq(w, s);
    }
    for (size_t i = 0; i < sizeof w->done / sizeof *w->done; i++)
        assert_true(w->done[i] > 200); /* every kind of command was exercised */
    assert_true(w->matched > 10000 && ts_pool_evicted(&w->e->pools[0].books) > 5000);
    assert_true(w->refused > 10000);
    /* Everybody leaves, kept sequences are freed, tickets end: nothing may be left. */
    for (int i = 0; i < (int)SESSIONS; i++)
        while (w->sessions[i] != 0)
            op_session(w);
    assert_int_equal(w->e->pools[0].waiting, 0);
    assert_int_equal(w->e->claims.live, 0);
    for (int i = 0; i < (int)UIDS; i++) {
        uint64_t session = session_new(w->e, (uint32_t)i);
        for (int s = 0; s < (int)SEQS; s++)
            if (w->seqs[s].live && w->seqs[s].uid == (uint32_t)i && w->seqs[s].ticket == 0) {
                ts_answer answer;
                assert_int_equal(
                    run(w,
                        (ts_command){.op = TS_OP_SEQ_FREE,
                                     .session = session,
                                     .seq_batch = {.seqs = &w->seqs[s].id, .count = 1}},
                        &answer),
                    TS_OK);
            }
    }
    ts_answer answer;
    w->now += TS_TICKET_MS;
    assert_int_equal(run(w, (ts_command){.op = TS_OP_SWEEP}, &answer), TS_OK);
    assert_false(ts_engine_sweeps(w->e));
    assert_int_equal(w->e->pools[0].seqs.num_lives, 0);
    assert_int_equal(w->e->pools[0].seqs.tickets.count, 0);
    assert_int_equal(w->e->pools[0].books.used, 0);
    assert_int_equal(w->e->pools[0].seqs.live, 0);
    check_engine(w->e);
    for (uint32_t i = 0; i < w->e->pools[0].books.ungranted; i++)
        ts_pool_evict_slab(&w->e->pools[0].books, i, TS_EVICT_RESIZE, &(uint32_t){UINT32_MAX});
    assert_int_equal(w->e->pools[0].books.index->count, 0);
    for (uint32_t i = 0; i < w->e->pools[0].books.index->num_spaces; i++)
        assert_false(w->e->pools[0].books.index->spaces[i].live);
    check_engine(w->e);
    ts_engine_free(w->e);
    free(w);
}

static void a_million_random_commands_agree_with_a_naive_model(void **state)
{
    (void)state;
    agree(20261124, false);
}

static void so_they_do_where_slabs_are_sessions_own(void **state)
{
    (void)state;
    agree(20261129, true);
}

/* Everything in the engine that a later command could see. */
static uint64_t digest(const ts_engine *e)
{
    uint64_t h = 14695981039346656037u;
#define MIX(x) (h = (h ^ (uint64_t)(x)) * 1099511628211u)
    const ts_engine_pool *pool = &e->pools[0];
    for (uint32_t i = 0; i < pool->seqs.count; i++) {
        const ts_sequence *s = &pool->seqs.all[i];
        MIX(s->generation), MIX(s->tenant), MIX(s->length), MIX(s->owner), MIX(s->step);
        for (uint32_t b = 0; b < (s->tenant == TS_NONE ? 0 : s->num_blocks); b++)
            MIX(s->blocks[b]);
    }
    for (uint32_t i = 0; i < pool->seqs.num_lives; i++)
        MIX(pool->seqs.lives[i].seq), MIX(pool->seqs.lives[i].end_ms),
            MIX(pool->seqs.lives[i].ttl_ms), MIX(pool->seqs.lives[i].ticket != NULL);
    for (const ts_name_node *n = pool->seqs.order.first[0]; n != NULL; n = n->next[0])
        MIX(n->tenant), MIX(n->name[0]), MIX(n->height);
    for (uint32_t i = 0; i < e->num_sessions; i++)
        MIX(e->sessions[i].wait.kind), MIX(e->sessions[i].wait.woken),
            MIX(e->sessions[i].wait.next), MIX(e->sessions[i].wait.claim);
    for (uint32_t i = 0; i < e->claims.count; i++)
        MIX(e->claims.all[i].live), MIX(e->claims.all[i].hash), MIX(e->claims.all[i].at);
    MIX(e->now_ms), MIX(pool->seqs.tickets.count);
    for (uint32_t b = 0; b < pool->books.num_blocks; b++)
        MIX(pool->books.refs[b]), MIX(pool->books.index->nodes[b].parent),
            MIX(pool->books.classes[b]);
    for (uint32_t i = 0; i < pool->books.num_slabs; i++)
        MIX(pool->books.slabs[i].tenant), MIX(pool->books.slabs[i].generation),
            MIX(pool->books.slabs[i].home);
    for (uint32_t i = 0; i < e->num_sessions; i++)
        MIX(e->sessions[i].generation), MIX(e->sessions[i].live), MIX(e->sessions[i].blocks);
    MIX(e->tokens_committed), MIX(e->live_steps), MIX(pool->seqs.free_head);
    return h;
}

static void the_same_commands_always_give_the_same_state(void **state)
{
    (void)state;
    world *a = world_new(7, true), *b = world_new(7, true);
    for (uint32_t i = 0; i < 20000; i++) {
        one_command(a);
        one_command(b);
        assert_true(digest(a->e) == digest(b->e));
    }
    assert_memory_equal(a->memory, b->memory, sizeof a->memory);
    ts_engine_free(a->e);
    ts_engine_free(b->e);
    free(a);
    free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_million_random_commands_agree_with_a_naive_model),
        cmocka_unit_test(so_they_do_where_slabs_are_sessions_own),
        cmocka_unit_test(the_same_commands_always_give_the_same_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
