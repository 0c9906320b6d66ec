/* What comes from outside and must not matter: garbage, repeats, floods, and workers that die. */
#define _GNU_SOURCE
#include "raw_client.h"

#include "attention.h"

#include <fcntl.h>
#include <math.h>
#include <nng/protocol/reqrep0/rep.h>
#include <nng/protocol/reqrep0/req.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

/* ---- workers that die ---- */

enum { KV = 2, HEADS = 4, DIM = 64, LAYERS = 6, ROUND = 90 };

static void fill(rng *r, float *to, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = rng_normal(r);
}

/* Worker: decodes with a cache of its own beside the daemon's, until `stop` is at its end; every
 * output must equal what the same kernels make of the private cache, bit for bit. */
static void steady(const char *url, const char *argument)
{
    const int stop = atoi(argument);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_geometry g = *ts_pool_geometry(p, 0);
    ts_attention *own = ts_attention_new(1, TS_ISA_AUTO);
    unsigned char *cache = malloc(ts_geometry_block_bytes(&g) * ((ROUND + 15) / 16));
    float *out = malloc(HEADS * DIM * sizeof *out);
    uint32_t blocks[(ROUND + 15) / 16];
    for (uint32_t i = 0; i < (ROUND + 15) / 16; i++)
        blocks[i] = i;
    rng r = {(uint64_t)getpid()};
    struct pollfd end = {.fd = stop, .events = POLLIN};
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    for (uint32_t token = 0; poll(&end, 1, 0) == 0; token = (token + 1) % ROUND) {
        ts_step *step;
        uint32_t n = 1, zero = 0;
        if (token == 0)
            OK(ts_seq_truncate(p, &seq, &zero, 1));
        OK(ts_step_begin(p, &seq, &n, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS},
                         &step));
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            fill(&r, ts_step_q(step), HEADS * DIM);
            fill(&r, ts_step_k(step), KV * DIM);
            fill(&r, ts_step_v(step), KV * DIM);
            OK(ts_step_run(step, layer));
            ts_attention_seq one = {.blocks = blocks,
                                    .kv_tokens = token + 1,
                                    .q_tokens = 1,
                                    .layer = layer,
                                    .q = ts_step_q(step),
                                    .k = ts_step_k(step),
                                    .v = ts_step_v(step),
                                    .out = out};
            ts_attention_call call = {.geometry = g,
                                      .base = cache,
                                      .heads = HEADS,
                                      .variant.scale = 0.125f,
                                      .seqs = &one,
                                      .num_seqs = 1};
            OK(ts_attention_run(own, &call));
            const float *there = ts_step_out(step);
            if (strcmp(ts_pool_memory(p), "host") == 0)
                assert_memory_equal(out, there, HEADS * DIM * sizeof *out);
            else /* other kernels: other roundings */
                for (uint32_t j = 0; j < HEADS * DIM; j++)
                    assert_true(fabsf(out[j] - there[j]) <= 1e-5f);
        }
        OK(ts_step_commit(step, NULL));
    }
    ts_attention_free(own);
    free(cache);
    free(out);
    ts_pool_close(p);
    ts_disconnect(c);
}

/* Worker: does all that can be done, until it is killed. */
static void victim(const char *url, const char *argument)
{
    const int ready = atoi(argument);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    rng r = {(uint64_t)getpid()};
    ts_seq kept, forks[3];
    uint64_t slot;
    ts_kv kv;
    bool told = false;
    OK(ts_seq_attach(p, "shared", &kept, NULL));
    for (;;) {
        ts_step *step;
        OK(ts_seq_fork(p, kept, 3, forks));
        uint32_t n[4] = {1 + rng_below(&r, 40), 1 + rng_below(&r, 9), 1, 5};
        bool with_kept = rng_below(&r, 2); /* a step on what must stay as it is */
        ts_seq batch[4] = {forks[0], forks[1], forks[2], kept};
        if (!told && write(ready, "r", 1) != 1)
            _exit(1);
        told = true;
        ts_status status = ts_step_begin(
            p, batch, n, with_kept ? 4 : 3,
            &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &step);
        if (status != TS_OK) { /* another victim has the kept one in a step */
            assert_int_equal(status, TS_EBUSY);
            OK(ts_seq_free(p, forks, 3));
            continue;
        }
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            OK(ts_step_run(step, layer));
        OK(with_kept ? ts_step_abort(step) : ts_step_commit(step, NULL));
        OK(ts_seq_slots(p, forks[0], 0, 0, 1, &slot));
        OK(ts_slot_kv(p, slot, 0, &kv));
        OK(ts_seq_free(p, forks, 3));
    }
}

static void workers_killed_at_random_points_take_nothing_with_them(void **state)
{
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    const int kills = 100; /* to start a process takes long */
#else
    const int kills = 200;
#endif
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=128");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    rng r = {4242};
    int stop[2], ready[2];
    assert_int_equal(pipe(stop), 0);
    assert_int_equal(pipe(ready), 0);
    fcntl(stop[1], F_SETFD,
          FD_CLOEXEC); /* its only holder's close is the end that workers wait for */
    fcntl(ready[0], F_SETFD, FD_CLOEXEC);
    ts_seq kept;
    ts_step *step;
    uint32_t n = 25, length;
    OK(ts_seq_create(p, 1, &kept));
    OK(ts_step_begin(p, &kept, &n, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &step));
    memset(ts_step_k(step), 0, 25 * KV * DIM * 4);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        OK(ts_step_run(step, layer));
    OK(ts_step_commit(step, NULL));
    OK(ts_seq_keep(p, kept, "shared"));

    char number[16], byte;
    snprintf(number, sizeof number, "%d", stop[0]);
    pid_t load[2];
    for (int i = 0; i < 2; i++)
        load[i] = spawn("steady", d.url, number);
    close(stop[0]);
    snprintf(number, sizeof number, "%d", ready[1]);
    double worst = 0;
    for (int i = 0; i < kills; i += 2) {
        pid_t victims[2];
        for (int v = 0; v < 2; v++)
            victims[v] = spawn("victim", d.url, number);
        for (int v = 0; v < 2; v++)
            assert_int_equal(read(ready[0], &byte, 1), 1);
        for (uint32_t j = rng_below(&r, 25); j > 0; j--) /* some round trips later */
            (void)used_blocks(c);
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        for (int v = 0; v < 2; v++) {
            kill(victims[v], SIGKILL);
            assert_int_equal(waitpid(victims[v], NULL, 0), victims[v]);
        }
        /* Only this test's session, the load's and what they own may be left. */
        while (daemon_status(c).sessions > 3)
            ;
        clock_gettime(CLOCK_MONOTONIC, &to);
        double took =
            (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) * 1e-9;
        if (took > worst)
            worst = took;
        check_daemon(c);
    }
    print_message("%d workers killed; the slowest was reclaimed after %.1f ms\n", kills,
                  worst * 1e3);
    close(stop[1]);
    for (int i = 0; i < 2; i++)
        join_child(load[i]);
    await_used_blocks(c, 2); /* the kept sequence's */
    OK(ts_seq_lengths(p, &kept, 1, &length));
    assert_int_equal(length, 25);
    assert_int_equal(sequences(c), 1);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    close(ready[0]);
    close(ready[1]);
    daemon_stop(&d);
}

/* Worker: forks a child that holds on to all that was open here, tells the child's pid, and waits.
 */
static void parent_of_a_holder(const char *url, const char *argument)
{
    const int ready = atoi(argument);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    uint32_t n = 40;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    pid_t child = fork();
    if (child == 0)
        for (;;)
            pause();
    assert_int_equal(write(ready, &child, sizeof child), sizeof child);
    for (;;)
        pause();
}

static void an_id_from_before_a_restart_names_nothing(void **state)
{
    (void)state;
    ts_seq before[20], after[20];
    for (int turn = 0; turn < 2; turn++) {
        daemon_process d;
        daemon_start(&d, POOL_TINY ",blocks=16");
        ts_client *c = connect_to(&d);
        ts_pool *p = open_pool(c, "tiny", 0);
        uint32_t length;
        OK(ts_seq_create(p, 20, turn == 0 ? before : after));
        for (int i = 0; turn == 1 && i < 20; i++) {
            assert_true(before[i] != after[i]);
            assert_int_equal(ts_seq_lengths(p, &before[i], 1, &length), TS_ENOENT);
        }
        ts_pool_close(p);
        ts_disconnect(c);
        daemon_stop(&d);
    }
}

/* Worker: begins a run on the processor that takes many minutes, and tells when it is under way. */
static void runs_for_minutes(const char *url, const char *argument)
{
    const int ready = atoi(argument);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    uint32_t n = 20000;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = 64}, &step));
    if (write(ready, "r", 1) != 1)
        _exit(1);
    _exit(2 + (int)ts_step_run(step, 0)); /* it was to be killed long before */
}

static void a_killed_workers_long_run_ends_and_others_go_on_meanwhile(void **state)
{
    (void)state;
    daemon_process d;
    char number[16], byte;
    int ready[2];
    daemon_start(&d, POOL_TINY ",blocks=2000");
    ts_client *c = connect_to(&d);
    assert_int_equal(pipe(ready), 0);
    fcntl(ready[0], F_SETFD, FD_CLOEXEC);
    snprintf(number, sizeof number, "%d", ready[1]);
    pid_t worker = spawn("minutes", d.url, number);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    ts_pool *p = open_pool(c, "tiny", 0);
    for (int i = 0; i < 20; i++) {
        ts_seq seq;
        ts_step *step;
        uint32_t n = 3;
        OK(ts_seq_create(p, 1, &seq));
        OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
        memset(ts_step_q(step), 0, 3 * KV * DIM * sizeof(float));
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            OK(ts_step_run(step, layer));
        OK(ts_step_commit(step, NULL));
        OK(ts_seq_free(p, &seq, 1));
    }
    assert_int_equal(used_blocks(c), 1250); /* it runs still */
    kill(worker, SIGKILL);
    assert_int_equal(waitpid(worker, NULL, 0), worker);
    await_used_blocks(c, 0);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    close(ready[0]);
    close(ready[1]);
    daemon_stop(&d);
}

static void an_abort_after_a_runs_timeout_ends_the_run(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=2000");
    for (int transport = TS_TRANSPORT_RING; transport <= TS_TRANSPORT_MESSAGES; transport++) {
        ts_client *c;
        ts_options options = {
            .size = sizeof(ts_options), .url = d.url, .timeout_ms = 1500, .transport = transport};
        OK(ts_connect(&options, &c));
        ts_pool *p = open_pool(c, "tiny", 0);
        ts_seq seq;
        ts_step *step;
        uint32_t n = 20000, length;
        OK(ts_seq_create(p, 1, &seq));
        OK(ts_step_begin(p, &seq, &n, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options), .heads = 64}, &step));
        assert_int_equal(ts_step_run(step, 0), TS_ETIMEOUT);
        for (int i = 0; i < 100; i++) /* no other call is any the worse */
            OK(ts_seq_lengths(p, &seq, 1, &length));
        OK(ts_step_abort(step));
        assert_int_equal(used_blocks(c), 0);
        OK(ts_seq_lengths(p, &seq, 1, &length));
        assert_int_equal(length, 0);
        n = 20000; /* its place in the exchange is free again */
        OK(ts_step_begin(p, &seq, &n, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options), .heads = 64}, &step));
        OK(ts_step_abort(step));
        OK(ts_seq_free(p, &seq, 1));
        ts_pool_close(p);
        ts_disconnect(c);
    }
    daemon_stop(&d);
}

static void a_dead_workers_blocks_are_free_though_its_child_holds_the_socket(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *c = connect_to(&d);
    int ready[2];
    char number[16];
    pid_t child;
    assert_int_equal(pipe(ready), 0);
    fcntl(ready[0], F_SETFD, FD_CLOEXEC);
    snprintf(number, sizeof number, "%d", ready[1]);
    pid_t worker = spawn("parent", d.url, number);
    assert_int_equal(read(ready[0], &child, sizeof child), sizeof child);
    assert_int_equal(used_blocks(c), 3);
    kill(worker, SIGKILL);
    assert_int_equal(waitpid(worker, NULL, 0), worker);
    await_used_blocks(c, 0); /* while the child lives */
    assert_int_equal(kill(child, SIGKILL), 0);
    close(ready[0]);
    close(ready[1]);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* Answers one request as a daemon of another protocol does. */
static void *other_daemon(void *arg)
{
    nng_socket s = *(nng_socket *)arg;
    nng_msg *message;
    assert_int_equal(nng_recvmsg(s, &message, 0), 0);
    Tspb__Request *request =
        tspb__request__unpack(NULL, nng_msg_len(message), nng_msg_body(message));
    assert_string_equal(request->session_open->version, TS_VERSION);
    Tspb__Reply reply = TSPB__REPLY__INIT;
    reply.request_id = request->request_id;
    reply.status = TS_EPROTO;
    reply.message = (char *)"protocol version 2; tinyserved 9.9 speaks 9";
    uint8_t packed[256];
    nng_msg_clear(message);
    assert_int_equal(nng_msg_append(message, packed, tspb__reply__pack(&reply, packed)), 0);
    assert_int_equal(nng_sendmsg(s, message, 0), 0);
    tspb__request__free_unpacked(request, NULL);
    return NULL;
}

static void a_library_that_meets_another_version_names_both(void **state)
{
    (void)state;
    char folder[] = "/tmp/tinyserve-other.XXXXXX", url[64];
    nng_socket s;
    pthread_t thread;
    ts_client *c;
    assert_non_null(mkdtemp(folder));
    snprintf(url, sizeof url, "ipc://%s/s", folder);
    assert_int_equal(nng_rep0_open(&s), 0);
    assert_int_equal(nng_listen(s, url, NULL, 0), 0);
    assert_int_equal(pthread_create(&thread, NULL, other_daemon, &s), 0);
    assert_int_equal(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = url}, &c),
                     TS_EPROTO);
    assert_string_equal(ts_error(c),
                        "libtinyserve " TS_VERSION ": protocol version 2; tinyserved 9.9 speaks 9");
    ts_disconnect(c);
    pthread_join(thread, NULL);
    nng_close(s);
    assert_int_equal(rmdir(folder), 0);
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {
        {"steady", steady},
        {"victim", victim},
        {"minutes", runs_for_minutes},
        {"parent", parent_of_a_holder},
    };
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_library_that_meets_another_version_names_both),
        cmocka_unit_test(an_id_from_before_a_restart_names_nothing),
        cmocka_unit_test(a_killed_workers_long_run_ends_and_others_go_on_meanwhile),
        cmocka_unit_test(an_abort_after_a_runs_timeout_ends_the_run),
        cmocka_unit_test(a_dead_workers_blocks_are_free_though_its_child_holds_the_socket),
        cmocka_unit_test(workers_killed_at_random_points_take_nothing_with_them),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
