/* Steps by ring, by message and attended by the worker itself, against a real daemon: the same
 * bits. */
#define _GNU_SOURCE
#include "execution_util.h"

#include "ring_client.h"
#include "unconst.h"
#define SEQS 3

static void fill(rng *r, void *to, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((float *)to)[i] = rng_normal(r);
}

/* One step with both layers run in each mode there is; its outputs go to *out. */
static size_t varied_step(ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens, uint32_t seed,
                          bool fp8, float *out)
{
#define FOUR(type, name, place, most, what) .name = 4,
    ts_run_options ways[] = {
        {.scale = 0},
        {TS_RUN_NUMBERS(FOUR)},
        {.scale = 0.2f, .soft_cap = 3, .window = 5},
        {.alibi = true, .sinks = true, .lse = true},
        {.rope_theta = 10000, .rope_dims = 32},
        {.rope_theta = 500, .rope_interleaved = true, .lse = true, .scales = fp8},
    };
#undef FOUR
    rng r = {seed};
    ts_step *s;
    size_t n = 0;
    OK(ts_step_begin(p, seqs, new_tokens, SEQS,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &s));
    size_t tokens = ts_step_tokens(s), rows = tokens * HEADS;
    for (uint32_t layer = 0; layer < 2; layer++)
        for (size_t mode = 0; mode < sizeof ways / sizeof *ways; mode++) {
            ways[mode].size = sizeof *ways;
            fill(&r, ts_step_q(s), rows * DIM);
            fill(&r, ts_step_k(s), tokens * KV * DIM);
            fill(&r, ts_step_v(s), tokens * KV * DIM);
            fill(&r, ts_step_alibi(s), HEADS);
            fill(&r, ts_step_sinks(s), HEADS);
            for (uint32_t i = 0; i < 2 * KV; i++)
                ts_step_scales(s)[i] = 0.5f + (float)rng_below(&r, 100) / 100;
            memset(ts_unconst(ts_step_out(s)), 0xff, rows * DIM * sizeof(float));
            OK(ts_step_run_with(s, layer, &ways[mode]));
            memcpy(out + n, ts_step_out(s), rows * DIM * sizeof(float));
            n += rows * DIM;
            if (ways[mode].lse) {
                memcpy(out + n, ts_step_lse(s), rows * sizeof(float));
                n += rows;
            }
        }
    uint32_t accepted[SEQS] = {new_tokens[0], new_tokens[1] - new_tokens[1] / 2, new_tokens[2]};
    OK(ts_step_commit(s, seed % 2 == 0 ? NULL : accepted));
    return n;
}

/* By ring, by message, and attended by this process. */
enum { RING, MESSAGES, LOCAL, MODES };

static void check_ways(const char *pool, bool fp8)
{
    static const uint32_t rounds[][SEQS] = {{9, 0, 30}, {1, 2, 1}, {3, 8, 0}, {0, 4, 2}, {1, 1, 0}};
    static float out[MODES][200000];
    daemon_process d;
    daemon_start(&d, pool);
    ts_client *c[MODES] = {connect_by(&d, TS_TRANSPORT_RING, TS_EXEC_DAEMON, 0),
                           connect_by(&d, TS_TRANSPORT_MESSAGES, TS_EXEC_DAEMON, 0),
                           connect_by(&d, TS_TRANSPORT_AUTO, TS_EXEC_LOCAL, 0)};
    ts_pool *p[MODES];
    ts_seq seqs[MODES][SEQS];
    uint32_t lengths[MODES][SEQS];
    for (int mode = 0; mode < MODES; mode++) {
        p[mode] = open_pool(c[mode], "tiny", mode == LOCAL ? TS_POOL_WRITABLE : 0);
        OK(ts_seq_create(p[mode], SEQS, seqs[mode]));
    }
    for (uint32_t round = 0; round < sizeof rounds / sizeof *rounds; round++) {
        size_t n = 0;
        for (int mode = 0; mode < MODES; mode++) {
            n = varied_step(p[mode], seqs[mode], rounds[round], 10 + round, fp8, out[mode]);
            OK(ts_seq_lengths(p[mode], seqs[mode], SEQS, lengths[mode]));
            assert_memory_equal(lengths[0], lengths[mode], sizeof lengths[0]);
            assert_memory_equal(out[0], out[mode], n * sizeof(float));
        }
        if (round == 1) /* shared tails: the next step's begin waits for copies */
            for (int mode = 0; mode < MODES; mode++)
                OK(ts_seq_fork(p[mode], seqs[mode][0], 1, &seqs[mode][2]));
    }
    assert_int_equal(ts_client_transport(c[RING]), TS_TRANSPORT_RING);
    assert_int_equal(ts_client_transport(c[MESSAGES]), TS_TRANSPORT_MESSAGES);
    assert_int_equal(ts_client_exec(c[RING]), TS_EXEC_DAEMON);
    assert_int_equal(ts_client_exec(c[LOCAL]), TS_EXEC_LOCAL);
    check_daemon(c[0]);
    for (int mode = 0; mode < MODES; mode++) {
        ts_pool_close(p[mode]);
        ts_disconnect(c[mode]);
    }
    daemon_stop(&d);
}

/* That AUTO came to the daemon, and why, is no failure. */
static void a_step_that_succeeds_keeps_the_error_of_the_last_that_failed(void **state)
{
    (void)state;
    daemon_process d;
    ts_client *c;
    ts_seq seq;
    ts_step *step;
    ts_error_info before = TS_ERROR_INFO_INIT, after = TS_ERROR_INFO_INIT;
    char text[256];
    daemon_start(&d, POOL ",client_write=all,device=host");
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url, .exec = TS_EXEC_AUTO},
                  &c));
    ts_pool *p = open_pool(c, "tiny", 0);
    OK(ts_seq_create(p, 1, &seq));
    assert_int_equal(ts_step_begin(p, &seq, &(uint32_t){UINT32_MAX}, 1, NULL, &step), TS_EINVAL);
    snprintf(text, sizeof text, "%s", ts_error(c));
    OK(ts_error_read(c, &before));
    assert_true(before.needed == UINT32_MAX);
    OK(ts_step_begin(p, &seq, &(uint32_t){3}, 1, NULL, &step));
    assert_string_equal(ts_error(c), text);
    OK(ts_error_read(c, &after));
    assert_memory_equal(&before, &after, sizeof before);
    OK(ts_step_abort(step));
    assert_string_equal(ts_error(c), text);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void every_way_gives_the_same_bits(void **state)
{
    (void)state;
    check_ways(POOL ",client_write=all,device=host", false);
    check_ways("tiny:layers=2,kv_heads=2,head_dim=64,dtype=fp8_e4m3,block_tokens=4,blocks=512,"
               "client_write=all,device=host",
               true);
}

/* On a GPU there are two ways. */
static void rings_and_messages_give_the_same_bits(void **state)
{
    (void)state;
    static const uint32_t rounds[3][SEQS] = {{9, 2, 30}, {1, 0, 1}, {3, 8, 0}};
    static float out[2][200000];
    daemon_process d;
    daemon_start(&d, POOL);
    ts_client *c[2] = {connect_by(&d, TS_TRANSPORT_RING, 0, 0),
                       connect_by(&d, TS_TRANSPORT_MESSAGES, 0, 0)};
    ts_pool *p[2];
    ts_seq seqs[2][SEQS];
    for (int mode = 0; mode < 2; mode++) {
        p[mode] = open_pool(c[mode], "tiny", 0);
        OK(ts_seq_create(p[mode], SEQS, seqs[mode]));
    }
    for (uint32_t round = 0; round < 3; round++) {
        size_t n = 0;
        for (int mode = 0; mode < 2; mode++)
            n = varied_step(p[mode], seqs[mode], rounds[round], 10 + round, false, out[mode]);
        assert_memory_equal(out[0], out[1], n * sizeof(float));
    }
    for (int mode = 0; mode < 2; mode++) {
        ts_pool_close(p[mode]);
        ts_disconnect(c[mode]);
    }
    daemon_stop(&d);
}

/* One step of one token, all layers with plain attention over random numbers. */
static void plain_step(ts_pool *p, ts_seq seq, uint32_t seed)
{
    ts_step *s;
    rng r = {seed};
    OK(ts_step_begin(p, &seq, &(uint32_t){1}, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &s));
    for (uint32_t layer = 0; layer < 2; layer++) {
        fill(&r, ts_step_q(s), HEADS * DIM);
        fill(&r, ts_step_k(s), KV * DIM);
        fill(&r, ts_step_v(s), KV * DIM);
        OK(ts_step_run(s, layer));
    }
    OK(ts_step_commit(s, NULL));
}

static void auto_goes_both_ways_once_and_then_one(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL ",client_write=all,device=host");
    ts_client *c = connect_by(&d, 0, TS_EXEC_AUTO, 0);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE), *closed = open_pool(c, "tiny", 0);
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    plain_step(closed, seq, 1); /* not writable: the daemon */
    assert_int_equal(ts_client_exec(c), TS_EXEC_DAEMON);
    assert_int_equal(daemon_status(c).runs, 2);
    plain_step(p, seq, 2);
    assert_int_equal(ts_client_exec(c), TS_EXEC_AUTO);
    assert_int_equal(daemon_status(c).runs, 4);
    plain_step(p, seq, 3);
    assert_true(ts_client_exec(c) == TS_EXEC_LOCAL || ts_client_exec(c) == TS_EXEC_DAEMON);
    assert_int_equal(daemon_status(c).runs, ts_client_exec(c) == TS_EXEC_LOCAL ? 4 : 6);
    ts_pool_close(p);
    ts_pool_close(closed);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void what_only_the_daemon_has_kernels_for_it_attends(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL ",client_write=all,device=host");
    ts_client *c = connect_by(&d, 0, TS_EXEC_AUTO, 0), *l = connect_by(&d, 0, TS_EXEC_LOCAL, 0);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE),
            *q = open_pool(l, "tiny", TS_POOL_WRITABLE);
    ts_seq seq;
    ts_step *s;
    bool rings;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_rings_use(c, &rings));
    OK(ts_rings_use(l, &rings));
    c->rings->isa = l->rings->isa = 77;
    for (uint32_t i = 1; i <= 2; i++) {
        plain_step(p, seq, i);
        assert_int_equal(ts_client_exec(c), TS_EXEC_DAEMON);
        assert_int_equal(daemon_status(c).runs, 2 * i);
    }
    assert_int_equal(ts_step_begin(q, &seq, &(uint32_t){1}, 1, NULL, &s), TS_EPROTO);
    assert_string_equal(ts_error(l),
                        "the daemon's kernels are of kind 77, which this library has not");
    for (ts_isa isa = TS_ISA_PORTABLE; isa <= TS_ISA_LAST; isa++) {
        char want[80];
        if (ts_isa_resolve(isa) == isa)
            continue;
        snprintf(want, sizeof want, "the daemon's kernels are %s's, which this process can't run",
                 ts_isa_name(isa));
        l->rings->isa = isa;
        assert_int_equal(ts_step_begin(q, &seq, &(uint32_t){1}, 1, NULL, &s), TS_EPROTO);
        assert_string_equal(ts_error(l), want);
    }
    ts_pool_close(p);
    ts_pool_close(q);
    ts_disconnect(c);
    ts_disconnect(l);
    daemon_stop(&d);
}

/* What of the pool this process may write: the slabs with its own new tokens alone. */
static void local_execution_maps_what_it_only_reads_to_be_read(void **state)
{
    (void)state;
    daemon_process d;
    /* 4 KiB a block, so 2 blocks a slab */
    daemon_start(&d, POOL ",client_write=all,device=host,slab=8K");
    ts_client *c = connect_by(&d, 0, TS_EXEC_LOCAL, 0);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    ts_seq seq, fork;
    OK(ts_seq_create(p, 1, &seq));
    for (uint32_t i = 0; i < 16; i++) /* 4 blocks: 2 slabs */
        plain_step(p, seq, i);
    OK(ts_seq_keep(p, seq, "shared"));
    ts_client *other = connect_by(&d, 0, TS_EXEC_LOCAL, 0);
    ts_pool *theirs = open_pool(other, "tiny", TS_POOL_WRITABLE);
    OK(ts_seq_fork(theirs, seq, 1, &fork));
    plain_step(theirs, fork, 20);
    uint32_t readable = 0, writable = 0;
    for (uint32_t i = 0; i < theirs->num_slabs; i++) {
        readable += theirs->mapped[i] != 0;
        writable += theirs->written[i];
    }
    assert_int_equal(readable, 3);
    assert_int_equal(writable, 1);
    ts_pool_close(p);
    ts_pool_close(theirs);
    ts_disconnect(c);
    ts_disconnect(other);
    daemon_stop(&d);
}

static void local_execution_that_cannot_be_says_why(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL ",client_write=all,device=host");
    ts_client *c = connect_by(&d, 0, TS_EXEC_LOCAL, 0),
              *m = connect_by(&d, TS_TRANSPORT_MESSAGES, TS_EXEC_LOCAL, 0);
    ts_pool *p = open_pool(c, "tiny", 0), *w = open_pool(c, "tiny", TS_POOL_WRITABLE),
            *q = open_pool(m, "tiny", TS_POOL_WRITABLE);
    ts_seq seq;
    ts_step *s;
    OK(ts_seq_create(p, 1, &seq));
    assert_int_equal(ts_step_begin(p, &seq, &(uint32_t){1}, 1, NULL, &s), TS_EPERM);
    assert_non_null(strstr(ts_error(c), "TS_POOL_WRITABLE"));
    assert_int_equal(ts_step_begin(q, &seq, &(uint32_t){1}, 1, NULL, &s), TS_EINVAL);
    assert_non_null(strstr(ts_error(m), "needs the rings"));
    OK(ts_step_begin(w, &seq, &(uint32_t){1}, 1, NULL, &s));
    assert_int_equal(ts_step_run(s, 2), TS_EINVAL);
    assert_string_equal(ts_error(c), "layer 2; the pool has 2");
    assert_int_equal(
        ts_step_run_with(s, 0, &(ts_run_options){.size = sizeof(ts_run_options), .soft_cap = -1}),
        TS_EINVAL);
    assert_non_null(strstr(ts_error(c), "a soft cap of -1"));
    assert_int_equal(
        ts_step_run_with(s, 0,
                         &(ts_run_options){.size = sizeof(ts_run_options), .on_stream = true}),
        TS_EINVAL);
    OK(ts_step_abort(s));
    assert_int_equal(used_blocks(c), 0);
    ts_pool_close(p);
    ts_pool_close(w);
    ts_pool_close(q);
    ts_disconnect(c);
    ts_disconnect(m);
    daemon_stop(&d);
}

/* The rings can't be used until a late answer has come by them, and can from then on. */
static void local_execution_waits_for_an_answer_that_is_late(void **state)
{
    (void)state;
    daemon_process d;
    ts_client *c;
    ts_seq seq, none;
    ts_step *s;
    ts_status status;
    daemon_start(&d, POOL ",client_write=all,device=host");
    OK(ts_connect(
        &(ts_options){
            .size = sizeof(ts_options), .url = d.url, .timeout_ms = 1000, .exec = TS_EXEC_LOCAL},
        &c));
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE), *other;
    OK(ts_seq_create(p, 1, &seq));
    plain_step(p, seq, 1); /* after this the exchange is there */
    for (int turn = 0; turn < 3; turn++) {
        daemon_pause(&d);
        if (turn == 0)
            assert_int_equal(ts_seq_fork(p, seq, 1, &none), TS_ETIMEOUT);
        else if (turn == 1) /* a message, after which nothing but a begin is asked for */
            assert_int_equal(ts_pool_open(c, "tiny", 0, &other), TS_ETIMEOUT);
        else
            assert_int_equal(ts_seq_truncate(p, &seq, &(uint32_t){0}, 1), TS_ETIMEOUT);
        assert_int_equal(ts_step_begin(p, &seq, &(uint32_t){1}, 1, NULL, &s), TS_EBUSY);
        assert_string_equal(ts_error(c),
                            "local execution needs the rings, by which the block tables come; they "
                            "wait for the answer to a call that had none within 1000 ms: begin "
                            "again when the daemon has answered");
        assert_int_equal(ts_client_transport(c), TS_TRANSPORT_RING); /* as the last that was sent */
        daemon_resume(&d);
        do
            status = ts_step_begin(p, &seq, &(uint32_t){1}, 1, NULL, &s);
        while (status == TS_EBUSY);
        OK(status);
        OK(ts_step_run(s, 0));
        OK(ts_step_run(s, 1));
        OK(ts_step_commit(s, NULL));
        assert_int_equal(ts_client_transport(c), TS_TRANSPORT_RING);
    }
    OK(ts_seq_free(p, &seq, 1));
    assert_int_equal(used_blocks(c), 0);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void tokens_that_some_layers_lack_are_not_committed(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL ",client_write=all,device=host");
    ts_client *c = connect_by(&d, 0, TS_EXEC_LOCAL, 0);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    const uint32_t one = 1, none = 0, beyond[] = {2, 255, 256, 100000, UINT32_MAX};
    ts_seq seq;
    ts_step *s;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &one, 1, NULL, &s));
    OK(ts_step_run(s, 0));
    for (size_t i = 0; i < sizeof beyond / sizeof *beyond; i++)
        assert_int_equal(ts_step_run(s, beyond[i]), TS_EINVAL);
    assert_int_equal(ts_step_commit(s, NULL), TS_EINVAL);
    assert_non_null(strstr(ts_error(c), "only 1 of 2 layers"));
    /* A run that is refused changes nothing. */
    OK(ts_step_run(s, 1));
    assert_int_equal(
        ts_step_run_with(s, 1, &(ts_run_options){.size = sizeof(ts_run_options), .soft_cap = -1}),
        TS_EINVAL);
    OK(ts_step_commit(s, NULL));
    OK(ts_step_begin(p, &seq, &one, 1, NULL, &s));
    OK(ts_step_run(s, 1));
    OK(ts_step_commit(s, &none));
    uint32_t length;
    OK(ts_seq_lengths(p, &seq, 1, &length));
    assert_int_equal(length, 1);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_way_gives_the_same_bits),
        cmocka_unit_test(a_step_that_succeeds_keeps_the_error_of_the_last_that_failed),
        cmocka_unit_test(rings_and_messages_give_the_same_bits),
        cmocka_unit_test(auto_goes_both_ways_once_and_then_one),
        cmocka_unit_test(what_only_the_daemon_has_kernels_for_it_attends),
        cmocka_unit_test(local_execution_maps_what_it_only_reads_to_be_read),
        cmocka_unit_test(local_execution_that_cannot_be_says_why),
        cmocka_unit_test(local_execution_waits_for_an_answer_that_is_late),
        cmocka_unit_test(tokens_that_some_layers_lack_are_not_committed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
