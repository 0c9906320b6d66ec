/* libtinyserve against a real daemon: what a worker does, and what it meets. */
#define _GNU_SOURCE
#include "daemon_util.h"

#include "attention.h"
#include "unconst.h"

#include <math.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

/* One layer, one KV head of 32 floats, blocks of 4: the prototype's memory-manager test. */
#define POOL_SMALL                                                                                 \
    "small:layers=1,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=4,client_write=all"

/* Worker: reads back the rows of the prototype's test through its own read-only mapping. */
static void reader(const char *url, const char *argument)
{
    (void)argument;
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "small", 0);
    uint64_t slots[9];
    uint32_t length;
    ts_seq found;
    ts_kv kv;
    OK(ts_seq_attach(p, "rows", &found, &length));
    assert_int_equal(length, 9);
    OK(ts_seq_slots(p, found, 0, 0, 9, slots));
    for (uint32_t t = 0; t < 9; t++) {
        OK(ts_slot_kv(p, slots[t], 0, &kv));
        for (int i = 0; i < 32; i++) {
            assert_true(((float *)kv.k)[i] == (t == 3 ? 100.0f + (float)i : 0.0f));
            assert_true(((float *)kv.v)[i] == (t == 3 ? -100.0f - (float)i : 0.0f));
        }
    }
    ts_pool_close(p);
    ts_disconnect(c);
}

static void the_prototypes_rows_are_where_their_slots_say_and_the_others_are_zero(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_SMALL ",blocks=64");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "small", TS_POOL_WRITABLE);
    ts_seq seq;
    uint64_t slots[5];
    uint32_t tokens = 5;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_append(p, &seq, &tokens, 1, slots));
    for (uint64_t i = 0; i < 5; i++)
        assert_int_equal(slots[i], i); /* blocks 0 and 1 */
    assert_int_equal(used_blocks(c), 2);
    ts_kv kv;
    OK(ts_slot_kv(p, slots[3], 0, &kv));
    for (int i = 0; i < 32; i++) {
        ((float *)kv.k)[i] = 100.0f + (float)i;
        ((float *)kv.v)[i] = -100.0f - (float)i;
    }
    tokens = 3;
    OK(ts_seq_append(p, &seq, &tokens, 1, slots));
    assert_int_equal(slots[0], 5);
    assert_int_equal(used_blocks(c), 2);
    tokens = 1;
    OK(ts_seq_append(p, &seq, &tokens, 1, slots));
    assert_int_equal(slots[0], 8);
    assert_int_equal(used_blocks(c), 3);

    /* Read back through another process's read-only mapping of the kept sequence. */
    OK(ts_seq_keep(p, seq, "rows"));
    pid_t reader = spawn("reader", d.url, "");
    join_child(reader);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void random_floats(rng *numbers, float *to, size_t count)
{
    for (size_t i = 0; i < count; i++)
        to[i] = rng_normal(numbers);
}

/* Sequences of different lengths in one step of several tokens each, prefill then decode, held
 * against the float64 reference over the pool's memory as the worker itself maps it. */
static void a_step_attends_over_all_earlier_tokens_as_the_reference_does(void **state)
{
    (void)state;
    enum { LAYERS = 2, KV = 2, HEADS = 6, DIM = 64, SEQS = 3 };
    static const uint32_t rounds[3][SEQS] = {{37, 1, 20}, {1, 1, 1}, {5, 70, 2}};
    daemon_process d;
    daemon_start(&d, "p:layers=2,kv_heads=2,head_dim=64,dtype=bf16,block_tokens=16,blocks=64");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "p", 0);
    ts_seq seqs[SEQS];
    uint32_t lengths[SEQS] = {0};
    rng numbers = {5};
    OK(ts_seq_create(p, SEQS, seqs));
    for (int round = 0; round < 3; round++) {
        ts_step *step;
        ts_step_options options = {.size = sizeof(ts_step_options), .heads = HEADS};
        OK(ts_step_begin(p, seqs, rounds[round], SEQS, &options, &step));
        size_t tokens = ts_step_tokens(step);
        float *q = malloc(LAYERS * tokens * HEADS * DIM * sizeof *q),
              *out = malloc(LAYERS * tokens * HEADS * DIM * sizeof *out);
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            size_t at = layer * tokens * HEADS * DIM;
            random_floats(&numbers, ts_step_q(step), tokens * HEADS * DIM);
            random_floats(&numbers, ts_step_k(step), tokens * KV * DIM);
            random_floats(&numbers, ts_step_v(step), tokens * KV * DIM);
            memset(ts_unconst(ts_step_out(step)), 0xff, tokens * HEADS * DIM * sizeof *out);
            OK(ts_step_run(step, layer));
            memcpy(q + at, ts_step_q(step), tokens * HEADS * DIM * sizeof *q);
            memcpy(out + at, ts_step_out(step), tokens * HEADS * DIM * sizeof *out);
        }
        OK(ts_step_commit(step, NULL));
        size_t first = 0;
        for (int i = 0; i < SEQS; i++) {
            lengths[i] += rounds[round][i];
            uint64_t *slots = malloc(lengths[i] * sizeof *slots);
            uint32_t *blocks = malloc(lengths[i] * sizeof *blocks);
            ts_kv kv;
            OK(ts_seq_slots(p, seqs[i], 0, 0, lengths[i], slots));
            for (uint32_t t = 0; t < lengths[i]; t++) {
                blocks[t / 16] = (uint32_t)(slots[t] / 16);
                OK(ts_slot_kv(p, slots[t], 0, &kv)); /* maps the slab */
            }
            for (uint32_t layer = 0; layer < LAYERS; layer++) {
                size_t at = (layer * tokens + first) * HEADS * DIM,
                       count = (size_t)rounds[round][i] * HEADS * DIM;
                double *reference = malloc(count * sizeof *reference), diff = 0, norm = 0;
                ts_attention_call call = {.geometry = *ts_pool_geometry(p, 0),
                                          .base = p->base,
                                          .heads = HEADS,
                                          .variant.scale = 0.125f};
                ts_attention_seq one = {.blocks = blocks,
                                        .kv_tokens = lengths[i],
                                        .q_tokens = rounds[round][i],
                                        .layer = layer,
                                        .q = q + at};
                OK(ts_attention_reference(&call, &one, reference, NULL));
                for (size_t j = 0; j < count; j++) {
                    diff += (out[at + j] - reference[j]) * (out[at + j] - reference[j]);
                    norm += reference[j] * reference[j];
                }
                assert_true(sqrt(diff / norm) <= 1e-5);
                free(reference);
            }
            first += rounds[round][i];
            free(slots);
            free(blocks);
        }
        free(q);
        free(out);
    }
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void a_fork_has_its_own_copy_of_the_tail_and_shares_the_rest(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_SMALL ",blocks=64");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "small", TS_POOL_WRITABLE);
    ts_seq parent, child;
    uint64_t slots[6], child_slots[7];
    uint32_t tokens = 6;
    ts_kv kv;
    OK(ts_seq_create(p, 1, &parent));
    OK(ts_seq_append(p, &parent, &tokens, 1, slots));
    for (int t = 0; t < 6; t++) {
        OK(ts_slot_kv(p, slots[t], 0, &kv));
        ((float *)kv.k)[0] = (float)(t + 1);
    }
    OK(ts_seq_fork(p, parent, 1, &child));
    ts_step *step;
    tokens = 1;
    OK(ts_step_begin(p, &child, &tokens, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .no_run = true}, &step));
    uint64_t slot;
    ts_step_slots(step, 0, &slot);
    OK(ts_slot_kv(p, slot, 0, &kv));
    ((float *)kv.k)[0] = 77;
    OK(ts_step_commit(step, NULL));
    OK(ts_seq_slots(p, child, 0, 0, 7, child_slots));
    for (int t = 0; t < 4; t++)
        assert_int_equal(child_slots[t], slots[t]);
    for (int t = 4; t < 6; t++)
        assert_int_not_equal(child_slots[t], slots[t]);
    for (int t = 0; t < 7; t++) {
        OK(ts_slot_kv(p, child_slots[t], 0, &kv));
        assert_true(((float *)kv.k)[0] == (t == 6 ? 77.0f : (float)(t + 1)));
    }
    OK(ts_slot_kv(p, slots[5] + 1, 0, &kv)); /* the slot behind the parent's tail is untouched */
    assert_true(((float *)kv.k)[0] == 0.0f);
    ts_seq both[2] = {parent, child};
    OK(ts_seq_free(p, both, 2));
    assert_int_equal(used_blocks(c), 0);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* The client knows how many blocks the pool had when it was opened. */
static void a_step_that_only_a_pool_that_has_grown_has_room_for_begins(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=4");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    uint32_t tokens = 40, length;
    OK(ts_seq_create(p, 1, &seq));
    p->num_blocks = 2;
    OK(ts_step_begin(p, &seq, &tokens, 1, NULL, &step));
    for (uint32_t layer = 0; layer < ts_pool_geometry(p, 0)->layers; layer++)
        OK(ts_step_run(step, layer));
    OK(ts_step_commit(step, NULL));
    OK(ts_seq_lengths(p, &seq, 1, &length));
    assert_int_equal(length, tokens);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void refusals_name_the_value_and_the_limit(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=4");
    ts_client *c = connect_to(&d);
    ts_pool *p;
    assert_int_equal(ts_pool_open(c, "big", 0, &p), TS_ENOENT);
    assert_string_equal(ts_error(c), "there is no pool 'big'; there is 'tiny'");
    assert_null(p);
    assert_int_equal(ts_pool_open(c, "tiny", TS_POOL_WRITABLE, &p), TS_EPERM);
    assert_int_equal(ts_pool_open(c, "tiny", 2, &p), TS_EINVAL);
    p = open_pool(c, "tiny", 0);
    ts_seq seq, none = 99;
    ts_step *step;
    uint32_t tokens = 65, zero = 0, length;
    uint64_t slot;
    void *base;
    OK(ts_seq_create(p, 1, &seq));
    assert_int_equal(ts_step_begin(p, &seq, &tokens, 1, NULL, &step), TS_ENOSPC);
    assert_null(step);
    assert_int_equal(c->exchange_bytes, 0); /* nothing was taken for it */
    char expected[128];
    snprintf(expected, sizeof expected,
             "5 blocks are needed, but pool 'tiny' has 4 free for uid %u (of 4)", getuid());
    assert_string_equal(ts_error(c), expected);
    ts_error_info info = TS_ERROR_INFO_INIT;
    OK(ts_error_read(c, &info));
    assert_int_equal(info.size, sizeof info);
    assert_int_equal(info.status, TS_ENOSPC);
    assert_int_equal(info.needed, 5);
    assert_int_equal(info.free, 4);
    assert_int_equal(info.limit, 4);
    info.size = sizeof info - 8; /* the first version had all */
    assert_int_equal(ts_error_read(c, &info), TS_EINVAL);
    info.size = sizeof info;
    assert_int_equal(ts_step_begin(p, &seq, &zero, 1, NULL, &step), TS_EINVAL);
    assert_int_equal(ts_step_begin(p, &none, &tokens, 1, NULL, &step), TS_ENOENT);
    OK(ts_error_read(c, &info));
    assert_int_equal(info.status, TS_ENOENT);
    assert_int_equal(info.needed | info.free | info.limit, 0);
    tokens = UINT32_MAX;
    assert_int_equal(ts_seq_append(p, &seq, &tokens, 1, NULL), TS_EINVAL);
    snprintf(expected, sizeof expected,
             "4294967295 new tokens for sequence %llx; the pool's limit is 1048576 tokens a "
             "sequence",
             (unsigned long long)seq);
    assert_string_equal(ts_error(c), expected);
    ts_seq twice[2] = {seq, seq};
    uint32_t each[2] = {1048576, 1048576};
    assert_int_equal(ts_step_begin(p, twice, each, 2, NULL, &step), TS_ENOSPC);
    assert_string_equal(ts_error(c), "2097152 new tokens; the pool has 64 slots in all");
    tokens = 1;
    assert_int_equal(
        ts_step_begin(p, &seq, &tokens, 1,
                      &(ts_step_options){.size = sizeof(ts_step_options), .no_run = true}, &step),
        TS_EPERM);
    assert_string_equal(ts_error(c), "a step with no_run leaves K and V to the session, "
                                     "which didn't open pool 'tiny' to write");
    assert_int_equal(ts_step_begin(p, &seq, &tokens, 1,
                                   &(ts_step_options){.size = sizeof(ts_step_options), .heads = 3},
                                   &step),
                     TS_EINVAL);
    assert_string_equal(ts_error(c), "3 query heads; they must be a multiple of the pool's 2 KV "
                                     "heads, at most 1024");
    assert_int_equal(ts_step_begin(p, &seq, &tokens, 1,
                                   &(ts_step_options){.size = sizeof(ts_step_options),
                                                      .io_dtype = TS_DTYPE_BF16},
                                   &step),
                     TS_EINVAL);
    assert_string_equal(ts_error(c), "io_dtype bf16; beside a pool of fp32 it must be fp32");
    assert_int_equal(
        ts_step_begin(p, &seq, &tokens, 1,
                      &(ts_step_options){.size = sizeof(ts_step_options), .scale = NAN}, &step),
        TS_EINVAL);
    assert_int_equal(ts_seq_append(p, &seq, &tokens, 1, NULL), TS_EPERM);
    assert_int_equal(ts_seq_attach(p, "nobody", &none, &length), TS_ENOENT);
    assert_int_equal(ts_seq_keep(p, seq, ""), TS_EINVAL);
    assert_int_equal(ts_seq_slots(p, seq, 0, 0, 1, &slot), TS_EINVAL);
    assert_int_equal(ts_seq_slots(p, seq, 6, 0, 1, &slot), TS_EINVAL);
    assert_string_equal(ts_error(c), "layer 6; the pool has 6");
    assert_int_equal(ts_pool_map(p, NULL, 0, 6, &base), TS_EINVAL);
    assert_true(ts_pool_geometry(p, 5) != NULL && ts_pool_geometry(p, 6) == NULL);
    assert_int_equal(ts_seq_create(p, 0, &seq), TS_EINVAL);
    OK(ts_step_begin(p, &seq, &tokens, 1, NULL, &step));
    assert_int_equal(ts_step_run(step, 6), TS_EINVAL);
    assert_string_equal(ts_error(c), "layer 6; the pool has 6");
    OK(ts_step_run(step, 0));
    assert_int_equal(ts_step_commit(step, NULL), TS_EINVAL); /* 1 layer of 6 */
    OK(ts_step_abort(step));
    ts_pool_close(p);
    ts_disconnect(c);

    assert_int_equal(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = "/nowhere/s"}, &c),
                     TS_ECONN);
    assert_string_equal(ts_error(c), "cannot reach /nowhere/s: is tinyserved running? "
                                     "(its log says where it listens)");
    ts_disconnect(c);
    daemon_stop(&d);
}

/* A client that gives up soon. */
static ts_client *connect_briefly(const daemon_process *d, ts_transport transport)
{
    const ts_options options = {
        .size = sizeof options, .url = d->url, .timeout_ms = 1000, .transport = transport};
    ts_client *c;
    OK(ts_connect(&options, &c));
    return c;
}

static void a_step_whose_begin_went_unanswered_is_dropped(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *watcher = connect_to(&d);
    for (int transport = TS_TRANSPORT_RING; transport <= TS_TRANSPORT_MESSAGES; transport++) {
        ts_client *c = connect_briefly(&d, (ts_transport)transport);
        ts_seq seq;
        ts_step *step;
        uint32_t tokens = 20, length;
        ts_pool *p = open_pool(c, "tiny", 0);
        OK(ts_seq_create(p, 1, &seq));
        /* After this step the exchange and the rings are there. */
        OK(ts_step_begin(p, &seq, &tokens, 1, NULL, &step));
        OK(ts_step_abort(step));
        daemon_pause(&d);
        assert_int_equal(ts_step_begin(p, &seq, &tokens, 1, NULL, &step), TS_ETIMEOUT);
        daemon_resume(&d);
        await_used_blocks(watcher, 2); /* it was begun, and the client doesn't know the step */
        do
            OK(ts_seq_lengths(p, &seq, 1, &length));
        while (used_blocks(watcher) != 0);
        OK(ts_step_begin(p, &seq, &tokens, 1, NULL, &step)); /* the sequence is in no step */
        OK(ts_step_abort(step));

        daemon_pause(&d); /* a session that ends before the answer comes */
        assert_int_equal(ts_step_begin(p, &seq, &tokens, 1, NULL, &step), TS_ETIMEOUT);
        ts_pool_close(p);
        ts_disconnect(c);
        daemon_resume(&d);
        await_used_blocks(watcher, 0);
        check_daemon(watcher);
    }
    ts_disconnect(watcher);
    daemon_stop(&d);
}

/* What a selection picked stays; its forks, which nobody knows of, are freed. */
static void forks_of_a_selection_that_went_unanswered_are_freed(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    for (int transport = TS_TRANSPORT_RING; transport <= TS_TRANSPORT_MESSAGES; transport++) {
        ts_client *c = connect_briefly(&d, (ts_transport)transport);
        ts_seq seqs[3], picked[4];
        ts_pool *p = open_pool(c, "tiny", 0);
        OK(ts_seq_create(p, 3, seqs));
        daemon_pause(&d);
        assert_int_equal(ts_seq_select(p, seqs, 3, (uint32_t[]){2, 0, 2, 2}, 4, picked),
                         TS_ETIMEOUT);
        daemon_resume(&d);
        while (sequences(c) != 2) /* there were three, and two and two forks then */
            ;
        OK(ts_seq_free(p, (ts_seq[]){seqs[0], seqs[2]}, 2));
        ts_pool_close(p);
        ts_disconnect(c);
    }
    daemon_stop(&d);
}

/* Where the daemon stands still, one abort waits for its time; the others are told, and so is the
 * pool's end. The watchdog ends the test if each waits. */
static void closing_what_is_open_waits_for_one_answer_at_most(void **state)
{
    (void)state;
    enum { STEPS = 6 };
    static const ts_transport ways[] = {TS_TRANSPORT_RING, TS_TRANSPORT_MESSAGES};
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *other = connect_to(&d);
    for (int i = 0; i < 2; i++) {
        ts_client *c;
        ts_seq seqs[STEPS];
        ts_step *steps[STEPS], *step;
        uint32_t one = 1;
        OK(ts_connect(&(ts_options){.size = sizeof(ts_options),
                                    .url = d.url,
                                    .timeout_ms = 120000,
                                    .transport = ways[i],
                                    .exchange_bytes = 1 << 20},
                      &c));
        ts_pool *p = open_pool(c, "tiny", 0);
        OK(ts_seq_create(p, STEPS, seqs));
        for (int s = 0; s < STEPS; s++)
            OK(ts_step_begin(p, &seqs[s], &one, 1, NULL, &steps[s]));
        assert_int_equal(used_blocks(other), STEPS);
        daemon_pause(&d);
        c->timeout_ms = 100;
        assert_int_equal(ts_step_abort(steps[0]), TS_ETIMEOUT);
        c->timeout_ms = 120000;
        for (int s = 1; s < STEPS; s++)
            assert_int_equal(ts_step_abort(steps[s]), TS_ETIMEOUT);
        ts_pool_close(p);
        daemon_resume(&d);
        await_used_blocks(other, 0); /* it has heard all of it */
        p = open_pool(c, "tiny", 0);
        OK(ts_step_begin(p, seqs, &one, 1, NULL, &step));
        OK(ts_step_abort(step)); /* which is answered again */
        ts_pool_close(p);
        ts_disconnect(c);
    }
    ts_disconnect(other);
    daemon_stop(&d);
}

static void options_may_be_of_an_earlier_or_a_later_header(void **state)
{
    (void)state;
    struct {
        ts_step_options options;
        char later[8]; /* what another version has behind them */
    } extended = {.options = TS_STEP_OPTIONS_INIT};
    ts_run_options run = TS_RUN_OPTIONS_INIT;
    const ts_frame_options frame_options = {
        .size = sizeof frame_options, .seqs = 1, .step = &extended.options};
    daemon_process d;
    ts_client *c;
    ts_seq seq;
    ts_step *step;
    ts_frame *frame;
    uint32_t tokens = 1;
    daemon_start(&d, POOL_TINY ",blocks=256");
    assert_int_equal(ts_connect(&(ts_options){.url = d.url}, &c), TS_EINVAL);
    assert_string_equal(ts_error(c), "ts_options has a size of 0: initialise it with "
                                     "TS_OPTIONS_INIT");
    ts_disconnect(c);
    c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    OK(ts_seq_create(p, 1, &seq));

    extended.options.kernel = "none of that name"; /* behind what the earlier one had */
    extended.options.size = offsetof(ts_step_options, kernel);
    OK(ts_step_begin(p, &seq, &tokens, 1, &extended.options, &step));
    run.size = 0;
    assert_int_equal(ts_step_run_with(step, 0, &run), TS_EINVAL);
    assert_non_null(strstr(ts_error(c), "ts_run_options has a size of 0"));
    OK(ts_step_run_with(step, 0, NULL));
    OK(ts_step_abort(step));

    extended.options.kernel = NULL;
    extended.options.size = sizeof extended;
    OK(ts_step_begin(p, &seq, &tokens, 1, &extended.options, &step));
    OK(ts_step_abort(step));
    extended.later[3] = 1;
    assert_int_equal(ts_step_begin(p, &seq, &tokens, 1, &extended.options, &step), TS_EINVAL);
    assert_non_null(strstr(ts_error(c), "ts_step_options has 56 bytes"));
    assert_non_null(strstr(ts_error(c), "knows 48, and byte 51 isn't 0"));
    assert_int_equal(ts_frame_new(p, &frame_options, &frame), TS_EINVAL);
    assert_non_null(strstr(ts_error(c), "and byte 51 isn't 0"));
    extended.options.size = SIZE_MAX; /* never set */
    assert_int_equal(ts_step_begin(p, &seq, &tokens, 1, &extended.options, &step), TS_EINVAL);
    assert_non_null(strstr(ts_error(c), "TS_STEP_OPTIONS_INIT"));

    assert_string_equal(ts_version(), TS_VERSION);
    assert_int_equal(ts_struct_bytes("ts_run_options"), sizeof run);
    assert_int_equal(ts_struct_bytes("ts_nothing"), 0);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void forks_of_a_long_sequence_take_as_many_calls_as_needed(void **state)
{
    (void)state;
    enum { BLOCKS = 6250, FORKS = 100 };
    daemon_process d;
    daemon_start_with(&d,
                      "long:layers=1,kv_heads=1,head_dim=32,dtype=fp8_e4m3,blocks=6300,"
                      "client_write=all,tenant_entries=1000000",
                      (const char *const[]){"--set", "session_blocks=1000000", NULL});
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "long", TS_POOL_WRITABLE);
    ts_seq parent, forks[FORKS], more[FORKS];
    uint32_t tokens = BLOCKS * 16, lengths[FORKS];
    OK(ts_seq_create(p, 1, &parent));
    OK(ts_seq_append(p, &parent, &tokens, 1, NULL));
    OK(ts_seq_fork(p, parent, FORKS, forks));
    OK(ts_seq_lengths(p, forks, FORKS, lengths));
    for (int i = 0; i < FORKS; i++)
        assert_int_equal(lengths[i], tokens);
    assert_int_equal(used_blocks(c), BLOCKS);
    /* All or none: past the limit of entries what was made is freed. */
    assert_int_equal(ts_seq_fork(p, parent, FORKS, more), TS_EQUOTA);
    assert_non_null(strstr(ts_error(c), "(session_blocks)"));
    Tspb__Reply *reply = pool_stats(c);
    assert_int_equal(reply->pool_stats_reply->pool->sequences, 1 + FORKS);
    tspb__reply__free_unpacked(reply, NULL);
    OK(ts_seq_free(p, forks, FORKS)); /* more than one command frees: the rest goes bit by bit */
    OK(ts_seq_free(p, &parent, 1));
    await_used_blocks(c, 0);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* Worker: redeems the ticket that it is told in hexadecimal, twice. */
static void taker(const char *url, const char *argument)
{
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "small", 0);
    uint8_t ticket[TS_TICKET_BYTES];
    ts_seq seq, twice;
    uint32_t length = 0;
    uint64_t slot;
    for (uint32_t i = 0; i < TS_TICKET_BYTES; i++) {
        unsigned byte;
        assert_int_equal(sscanf(argument + 2 * (size_t)i, "%2x", &byte), 1);
        ticket[i] = (uint8_t)byte;
    }
    OK(ts_seq_redeem(p, ticket, &seq, &length));
    assert_int_equal(length, 6);
    OK(ts_seq_slots(p, seq, 0, 5, 1, &slot));
    assert_int_equal(ts_seq_redeem(p, ticket, &twice, NULL), TS_ENOENT);
    ts_pool_close(p);
    ts_disconnect(c);
}

static void a_ticket_hands_a_sequence_to_another_process(void **state)
{
    (void)state;
    daemon_process d;
    char text[2 * TS_TICKET_BYTES + 1];
    daemon_start(&d, POOL_SMALL ",blocks=64");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "small", TS_POOL_WRITABLE);
    ts_seq seq;
    uint32_t tokens = 6;
    uint8_t ticket[TS_TICKET_BYTES], other[TS_TICKET_BYTES];
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_append(p, &seq, &tokens, 1, NULL));
    assert_int_equal(ts_seq_ticket(p, seq, 3600001, ticket), TS_EINVAL);
    OK(ts_seq_ticket(p, seq, 0, ticket));
    assert_int_equal(ts_seq_lengths(p, &seq, 1, &tokens), TS_ENOENT);
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_ticket(p, seq, 0, other));
    assert_memory_not_equal(ticket, other, sizeof ticket);
    for (uint32_t i = 0; i < TS_TICKET_BYTES; i++)
        snprintf(text + 2 * (size_t)i, 3, "%02x", ticket[i]);
    join_child(spawn("taker", d.url, text));
    await_used_blocks(c, 0); /* the taker's session has ended, and with it the sequence */
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void kept_sequences_are_listed_in_pages_and_replaced(void **state)
{
    (void)state;
    enum { NAMES = 450, ROOM = 300 };
    daemon_process d;
    char name[16];
    daemon_start(&d, POOL_SMALL ",blocks=64");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "small", 0);
    ts_seq seqs[NAMES], one;
    static ts_kept kept[ROOM];
    uint32_t count;
    OK(ts_seq_list(p, NULL, NULL, kept, sizeof(ts_kept), ROOM, &count));
    assert_int_equal(count, 0);
    OK(ts_seq_create(p, NAMES, seqs));
    for (uint32_t i = 0; i < NAMES; i++) {
        snprintf(name, sizeof name, "n%03u", i);
        OK(ts_seq_keep(p, seqs[i], name));
    }
    /* two answers of the daemon's */
    OK(ts_seq_list(p, "n", NULL, kept, sizeof(ts_kept), ROOM, &count));
    assert_int_equal(count, ROOM);
    OK(ts_seq_list(p, "n", kept[ROOM - 1].name, kept, sizeof(ts_kept), ROOM, &count));
    assert_int_equal(count, NAMES - ROOM);
    assert_string_equal(kept[0].name, "n300");
    assert_int_equal(kept[count - 1].seq, seqs[NAMES - 1]);
    assert_int_equal(ts_seq_list(p, "", "", kept, sizeof(ts_kept), 0, &count), TS_EINVAL);
    /* A program whose header has more of a ts_kept, and one that has none. */
    struct {
        ts_kept known;
        uint64_t unknown;
    } later[2] = {{.unknown = 7}, {.unknown = 7}};
    OK(ts_seq_list(p, "n", "n100", &later[0].known, sizeof later[0], 2, &count));
    assert_int_equal(count, 2);
    assert_string_equal(later[1].known.name, "n102");
    assert_int_equal(later[0].unknown + later[1].unknown, 0);
    assert_int_equal(ts_seq_list(p, "n", NULL, kept, sizeof(ts_kept) - 1, ROOM, &count), TS_EINVAL);
    assert_string_equal(ts_error(c), "elements of 151 bytes; a ts_kept has 152");
    memset(kept[0].name, 'x', sizeof kept[0].name - 1);
    OK(ts_seq_list(p, "", kept[0].name, kept + 1, sizeof(ts_kept), 1, &count));
    assert_int_equal(count, 0);
    const ts_keep_options replace = {.size = sizeof replace, .replace = true};
    OK(ts_seq_create(p, 1, &one));
    assert_int_equal(ts_seq_keep_with(p, one, "n000", NULL), TS_EEXIST);
    OK(ts_seq_keep_with(p, one, "n000", &replace));
    OK(ts_seq_attach(p, "n000", &seqs[1], NULL));
    assert_int_equal(seqs[1], one);
    assert_int_equal(ts_seq_keep_with(p, one, "n000", &(ts_keep_options){0}), TS_EINVAL);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {
        {"reader", reader},
        {"taker", taker},
    };
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_prototypes_rows_are_where_their_slots_say_and_the_others_are_zero),
        cmocka_unit_test(a_step_attends_over_all_earlier_tokens_as_the_reference_does),
        cmocka_unit_test(a_fork_has_its_own_copy_of_the_tail_and_shares_the_rest),
        cmocka_unit_test(a_step_that_only_a_pool_that_has_grown_has_room_for_begins),
        cmocka_unit_test(refusals_name_the_value_and_the_limit),
        cmocka_unit_test(a_step_whose_begin_went_unanswered_is_dropped),
        cmocka_unit_test(forks_of_a_selection_that_went_unanswered_are_freed),
        cmocka_unit_test(closing_what_is_open_waits_for_one_answer_at_most),
        cmocka_unit_test(options_may_be_of_an_earlier_or_a_later_header),
        cmocka_unit_test(forks_of_a_long_sequence_take_as_many_calls_as_needed),
        cmocka_unit_test(a_ticket_hands_a_sequence_to_another_process),
        cmocka_unit_test(kept_sequences_are_listed_in_pages_and_replaced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
