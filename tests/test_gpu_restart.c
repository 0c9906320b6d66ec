/*
 * A worker that orders its runs on a stream goes on over its daemon's death: the next daemon does
 * what was under way again, whether or not the worker calls anything. Daemon and library have a GPU
 * of the tests' own each (fake_gpu.c, fake_libcuda.c); the daemon is ended at places of
 * kill_points.c, and every bit must be what it is without.
 */
#define _GNU_SOURCE
#include "restart_util.h"

#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/syscall.h>

#define LAYERS 3u
#define DIM 32u
#define HEADS 2u
#define POOL                                                                                       \
    "p:layers=3,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=1024,slab=2M,"            \
    "device=cuda:0,provider=cuda-vmm,model=m,client_write=all"

/* fake_libcuda.c */
void fake_stream_call(void (*call)(void *arg), void *arg);
void fake_stream_await(void);
void *fake_device_new(size_t bytes);
extern atomic_bool fake_is_lost;

/* What the stream does for a layer, before and after its run. */
typedef struct layer_task {
    ts_step *step;
    uint32_t tokens;
    rng *random;
    digest *digest;
} layer_task;

static void fill_inputs(void *arg)
{
    const layer_task *t = arg;
    fill(t->random, ts_step_q(t->step), (size_t)t->tokens * HEADS * DIM);
    fill(t->random, ts_step_k(t->step), (size_t)t->tokens * DIM);
    fill(t->random, ts_step_v(t->step), (size_t)t->tokens * DIM);
    /* Whoever reads it before it is written is found out. */
    memset(ts_unconst(ts_step_out(t->step)), 0xff, (size_t)t->tokens * HEADS * DIM * sizeof(float));
}

static void read_output(void *arg)
{
    const layer_task *t = arg;
    mix(t->digest, ts_step_out(t->step), (size_t)t->tokens * HEADS * DIM * sizeof(float));
}

/* Queues all layers of a step; the memory of *task is the stream's until it is done. */
static void queue_layers(ts_client *c, layer_task *task)
{
    const ts_run_options options = {.size = sizeof(ts_run_options), .on_stream = true};
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        fake_stream_call(fill_inputs, task);
        DO(ts_step_run_with(task->step, layer, &options));
        fake_stream_call(read_output, task);
    }
}

static ts_step *begin(ts_client *c, ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens,
                      uint32_t count)
{
    ts_step *step;
    const ts_step_options options = {.size = sizeof(ts_step_options), .heads = HEADS};
    DO(ts_step_begin(p, seqs, new_tokens, count, &options, &step));
    return step;
}

/* A step whose layers are queued ahead, and are awaited by the commit alone. */
static void stream_step(ts_client *c, ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens,
                        uint32_t count, rng *random, digest *d)
{
    layer_task task = {.random = random, .digest = d};
    for (uint32_t i = 0; i < count; i++)
        task.tokens += new_tokens[i];
    task.step = begin(c, p, seqs, new_tokens, count);
    queue_layers(c, &task);
    fake_stream_await();
    DO(ts_step_commit(task.step, NULL));
}

/* Where q, k, v and out lie. */
typedef enum exchange_kind { OF_DAEMON, OF_WORKER, IN_HOST } exchange_kind;

static void open_exchange(ts_client *c, ts_pool *p, exchange_kind kind)
{
    const size_t bytes = 4u << 20;
    if (kind == OF_DAEMON)
        DO(ts_exchange_device(p, bytes));
    else if (kind == OF_WORKER)
        DO(ts_exchange_register(p, fake_device_new(bytes), bytes));
}

/* A worker with one sequence, and the step that it has begun. */
typedef struct worker {
    ts_client *client;
    ts_pool *pool;
    ts_seq seq;
    rng random;
    digest digest;
    layer_task task;
} worker;

/* Makes the client a worker whose exchange is the daemon's. */
static void worker_open(worker *w, ts_client *c)
{
    *w = (worker){.client = c, .pool = open_pool(c, "p", 0), .random = {7}, .digest = {1}};
    open_exchange(c, w->pool, OF_DAEMON);
    DO(ts_seq_create(w->pool, 1, &w->seq));
}

static void worker_begin(worker *w, uint32_t tokens)
{
    w->task = (layer_task){.step = begin(w->client, w->pool, &w->seq, &tokens, 1),
                           .tokens = tokens,
                           .random = &w->random,
                           .digest = &w->digest};
}

static void worker_close(worker *w)
{
    ts_pool_close(w->pool);
    ts_disconnect(w->client);
}

static uint64_t workload(ts_client *c, exchange_kind kind, uint32_t *restarts)
{
    rng r = {42};
    digest d = {1469598103934665603u};
    ts_seq seqs[2], fork;
    uint32_t lengths[3];
    ts_pool *p = open_pool(c, "p", 0);
    open_exchange(c, p, kind);
    DO(ts_seq_create(p, 2, seqs));
    stream_step(c, p, seqs, (uint32_t[]){40, 7}, 2, &r, &d);
    DO(ts_seq_fork(p, seqs[0], 1, &fork));
    stream_step(c, p, (ts_seq[]){fork, seqs[1]}, (uint32_t[]){1, 2}, 2, &r, &d);
    stream_step(c, p, (ts_seq[]){seqs[0], fork}, (uint32_t[]){9, 1}, 2, &r, &d);
    DO(ts_seq_lengths(p, (ts_seq[]){seqs[0], seqs[1], fork}, 3, lengths));
    mix(&d, lengths, sizeof lengths);
    check_daemon(c);
    *restarts = ts_client_restarts(c);
    ts_pool_close(p);
    return d.value;
}

static uint64_t run_workload(ts_client *c, int exchange, uint32_t *restarts)
{
    return workload(c, (exchange_kind)exchange, restarts);
}

static uint32_t kills_at(ts_transport transport, exchange_kind kind, const char *place,
                         uint32_t from)
{
    return kill_everywhere(&(killed_workload){POOL, transport, (int)kind, run_workload}, place,
                           from);
}

static void killed_between_an_application_and_its_publication(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_DAEMON, "applied", 4) > 20 / STRIDE);
}

static void killed_after_a_publication(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_WORKER, "published", 4) > 20 / STRIDE);
}

/* The second word of each is the daemon's own. */
static void killed_between_the_two_words_of_a_run(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_DAEMON, "signalled", 1) > 15 / STRIDE);
}

static void killed_when_a_run_is_handed_on(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, IN_HOST, "running", 1) > 8 / STRIDE);
}

static void killed_when_a_descriptor_is_stored(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_DAEMON, "stored", 1) > 2 / STRIDE);
}

static void killed_around_an_answer(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_DAEMON, "answered", 2) > 15 / STRIDE);
    assert_true(kills_at(TS_TRANSPORT_MESSAGES, OF_DAEMON, "answering", 2) > 15 / STRIDE);
}

/* ---- a device that is lost ---- */

/* A step whose worker waits for each layer. */
static void awaited_step(ts_client *c, ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens,
                         uint32_t count, rng *random, digest *d)
{
    layer_task task = {.random = random, .digest = d};
    for (uint32_t i = 0; i < count; i++)
        task.tokens += new_tokens[i];
    task.step = begin(c, p, seqs, new_tokens, count);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        fill_inputs(&task);
        DO(ts_step_run(task.step, layer));
        read_output(&task);
    }
    DO(ts_step_commit(task.step, NULL));
}

static uint64_t awaited_workload(ts_client *c, uint32_t *restarts)
{
    rng r = {43};
    digest d = {1469598103934665603u};
    ts_seq seq, fork;
    ts_pool *p = open_pool(c, "p", 0);
    DO(ts_seq_create(p, 1, &seq));
    awaited_step(c, p, &seq, (uint32_t[]){40}, 1, &r, &d);
    DO(ts_seq_fork(p, seq, 1, &fork));
    awaited_step(c, p, (ts_seq[]){fork, seq}, (uint32_t[]){1, 2}, 2, &r, &d); /* copies a tail */
    check_daemon(c);
    *restarts = ts_client_restarts(c);
    ts_pool_close(p);
    return d.value;
}

/* Under CUDA's multi-process service any client's fault takes the daemon's device: nobody is told.
 */
static void what_a_lost_device_left_undone_is_the_next_daemons(void **state)
{
    (void)state;
    for (int on_stream = 0; on_stream < 2; on_stream++) {
        uint64_t expected = 0;
        uint32_t restarts = 1, losses = 0;
        for (uint32_t at = 0; restarts > 0; at++) {
            daemon_process d;
            char text[24];
            snprintf(text, sizeof text, "launch:%u", at);
            if (at > 0)
                setenv("TS_TEST_GPU_BREAKS", text, 1);
            start(&d, POOL, NULL);
            unsetenv("TS_TEST_GPU_BREAKS");
            ts_client *c = connect_by(&d, (ts_transport)(TS_TRANSPORT_RING + at % 2));
            const uint64_t found =
                on_stream ? workload(c, OF_DAEMON, &restarts) : awaited_workload(c, &restarts);
            if (at == 0)
                expected = found;
            assert_int_equal(found, expected);
            losses += restarts;
            restarts = at == 0 ? 1 : restarts;
            ts_disconnect(c);
            stop(&d, false);
        }
        assert_true(losses > (on_stream ? 8 : 5));
    }
}

/* The workload with an exchange of this kind, on a device that is lost when it is asked for memory
 * the `at`th time; 0: never. */
static uint64_t lose_memory(exchange_kind kind, ts_transport transport, uint32_t at,
                            uint32_t *restarts)
{
    daemon_process d;
    char text[24];
    snprintf(text, sizeof text, "memory:%u", at);
    if (at > 0)
        setenv("TS_TEST_GPU_BREAKS", text, 1);
    start(&d, POOL, NULL);
    unsetenv("TS_TEST_GPU_BREAKS");
    ts_client *c = connect_by(&d, transport);
    const uint64_t found = workload(c, kind, restarts);
    ts_disconnect(c);
    stop(&d, at > 0 && *restarts == 0);
    return found;
}

/* A slab and an exchange, the daemon's or the worker's: the call waits for the next daemon. */
static void what_a_lost_device_cannot_give_is_the_next_daemons(void **state)
{
    (void)state;
    for (exchange_kind kind = OF_DAEMON; kind <= OF_WORKER; kind++) {
        uint32_t restarts, at = 0;
        const uint64_t expected = lose_memory(kind, TS_TRANSPORT_RING, at, &restarts);
        do {
            at++;
            const ts_transport transport = (ts_transport)(TS_TRANSPORT_RING + at % 2);
            assert_int_equal(lose_memory(kind, transport, at, &restarts), expected);
        } while (restarts > 0);
        assert_int_equal(at, 3); /* the exchange was the first, and a slab */
    }
}

/* The daemon after a kill loses its device when it maps the slab that is stored: the one after that
 * maps it, and nothing in it is lost. */
static void a_device_that_is_lost_while_slabs_are_taken_over_loses_nothing(void **state)
{
    (void)state;
    uint32_t restarts;
    const killed_workload w = {POOL, TS_TRANSPORT_RING, IN_HOST, run_workload};
    const uint64_t expected = run_killed(&w, NULL, &restarts);
    setenv("TS_TEST_GPU_BREAKS", "adopt:1:1", 1);
    const uint64_t found = run_killed(&w, "answering:9", &restarts);
    unsetenv("TS_TEST_GPU_BREAKS");
    assert_int_equal(found, expected);
    assert_int_equal(restarts, 1);
}

/* ---- a worker that calls nothing ---- */

static sem_t reached, may_go;

static void hold_stream(void *arg)
{
    (void)arg;
    sem_post(&reached);
    while (sem_wait(&may_go) != 0)
        ;
}

/* What is queued from now on waits for `may_go`. */
static void stop_stream(void)
{
    sem_init(&reached, 0, 0);
    sem_init(&may_go, 0, 0);
    fake_stream_call(hold_stream, NULL);
}

/* The daemon is killed before the worker's stream has submitted anything of what is queued, and the
 * worker waits for its stream and for nothing else. */
static void the_next_daemon_does_what_nobody_asks_it_for(void **state)
{
    (void)state;
    uint64_t found[2] = {0};
    for (int kills = 0; kills < 2; kills++) {
        daemon_process d;
        worker w;
        start(&d, POOL, NULL);
        ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
        worker_open(&w, c);
        worker_begin(&w, 20);
        stop_stream();
        while (sem_wait(&reached) != 0)
            ;
        queue_layers(c, &w.task);
        if (kills > 0)
            assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
        sem_post(&may_go);
        fake_stream_await();
        assert_int_equal(ts_client_restarts(c), 0); /* it has called nothing since */
        DO(ts_step_commit(w.task.step, NULL));
        assert_int_equal(ts_client_restarts(c), kills);
        found[kills] = w.digest.value;
        worker_close(&w);
        stop(&d, false);
    }
    assert_int_equal(found[0], found[1]);
}

/* Daemon and supervisor are gone: the stream goes on when the client's time is over, and nothing of
 * the session is kept. */
static void a_stream_goes_on_when_no_daemon_comes(void **state)
{
    (void)state;
    daemon_process d;
    ts_client *c;
    worker w;
    start(&d, POOL, NULL);
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options),
                                .url = d.url,
                                .wait_ms = 60000,
                                .timeout_ms = 200,
                                .transport = TS_TRANSPORT_MESSAGES},
                  &c));
    worker_open(&w, c);
    worker_begin(&w, 20);
    stop_stream();
    queue_layers(c, &w.task);
    const pid_t daemon = daemon_of(&d);
    struct pollfd gone = {.fd = (int)syscall(SYS_pidfd_open, daemon, 0u), .events = POLLIN};
    int status;
    kill(d.pid, SIGKILL);
    assert_int_equal(waitpid(d.pid, &status, 0), d.pid);
    kill(daemon, SIGKILL);
    assert_int_equal(poll(&gone, 1, -1), 1);
    close(gone.fd);
    sem_post(&may_go);
    fake_stream_await();
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_ECONN);
    assert_non_null(strstr(ts_error(c), "the stream went on without them"));
    assert_int_equal(ts_step_abort(w.task.step), TS_ECONN);
    worker_close(&w);
    static const char *const left[] = {".notify", ".store", ".store.lock"}; /* the supervisor's */
    for (uint32_t i = 0; i < sizeof left / sizeof *left; i++) {
        char path[112];
        snprintf(path, sizeof path, "%s%s", d.url, left[i]);
        unlink(path);
    }
    daemon_clean(&d);
    alarm(0);
}

/* A fault has taken the worker's context: it doesn't wait for the daemon, which may be waiting for
 * it to end. */
static void a_worker_without_a_context_waits_for_nobody(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING); /* its calls may take a minute */
    worker_open(&w, c);
    const pid_t daemon = daemon_of(&d);
    assert_int_equal(kill(d.pid, SIGSTOP), 0); /* no daemon comes */
    assert_int_equal(kill(daemon, SIGKILL), 0);
    atomic_store(&fake_is_lost, true);
    assert_int_equal(ts_seq_free(w.pool, &w.seq, 1), TS_ECONN);
    assert_non_null(strstr(ts_error(c), "a fault has taken this process's CUDA context"));
    worker_close(&w);
    atomic_store(&fake_is_lost, false);
    assert_int_equal(kill(d.pid, SIGCONT), 0);
    ts_client *next = connect_by(&d, TS_TRANSPORT_RING);
    check_daemon(next);
    ts_disconnect(next);
    stop(&d, false);
}

/* ---- what can't be done again ---- */

/* A run that its worker didn't submit in time isn't taken for done by the next daemon, though its
 * word says that it was submitted. */
static void a_late_run_stays_late(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    start_with(&d, POOL, "signalled:1", "submit_seconds=1");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 20);
    stop_stream();
    DO(ts_step_run_with(w.task.step, 0,
                        &(ts_run_options){.size = sizeof(ts_run_options), .on_stream = true}));
    /* The commit waits for the run: for the daemon to be tired of it, to die, and to come back. */
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_ETIMEOUT);
    assert_int_equal(ts_client_restarts(c), 1);
    sem_post(&may_go);
    fake_stream_await();
    DO(ts_step_abort(w.task.step));
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

/* The stream isn't kept waiting for a run that isn't done a third time. */
static void a_run_on_a_stream_that_crashes_the_daemon_twice_fails(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    setenv("TS_TEST_CRASH", "running", 1);
    start(&d, POOL, NULL);
    unsetenv("TS_TEST_CRASH");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 1);
    fake_stream_call(fill_inputs, &w.task);
    DO(ts_step_run_with(w.task.step, 0,
                        &(ts_run_options){.size = sizeof(ts_run_options), .on_stream = true}));
    fake_stream_await();
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_EINTERNAL);
    DO(ts_step_abort(w.task.step)); /* the session goes on */
    DO(ts_seq_free(w.pool, &w.seq, 1));
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

static void *kill_stopped(void *arg)
{
    assert_int_equal(kill(await_stopped(arg), SIGKILL), 0);
    return NULL;
}

/* The next daemon finds that a block of the step's sequence isn't what was stored. The step is lost
 * with it, its runs aren't done, and the stream isn't kept waiting for them; nor are those of
 * another step, which wait for them, and which fail. */
static void runs_of_a_step_that_is_lost_are_not_waited_for(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    pthread_t thread;
    uint64_t slots[16];
    uint32_t length;
    ts_kv kv;
    ts_seq good;
    setenv("TS_TEST_STOP", "summed:1", 1);
    start_with(&d, POOL, NULL, "verify=restart");
    unsetenv("TS_TEST_STOP");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    worker_open(&w, c);
    assert_int_equal(pthread_create(&thread, NULL, kill_stopped, &d), 0);
    worker_begin(&w, 16);
    ts_step_slots(w.task.step, slots);
    DO(ts_slot_kv(p, slots[0], 0, &kv));
    queue_layers(c, &w.task);
    fake_stream_await();
    DO(ts_step_commit(w.task.step, NULL));
    assert_int_equal(pthread_join(thread, NULL), 0);
    DO(ts_seq_create(w.pool, 1, &good));
    worker_begin(&w, 1);
    layer_task other = w.task;
    other.step = begin(c, w.pool, &good, &other.tokens, 1);
    stop_stream();
    while (sem_wait(&reached) != 0)
        ;
    queue_layers(c, &w.task);
    queue_layers(c, &other);
    ((float *)kv.k)[0] += 1;
    assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
    sem_post(&may_go);
    fake_stream_await();
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_ENOENT);
    assert_int_equal(ts_step_abort(w.task.step), TS_ENOENT); /* nothing is left of it here */
    assert_int_equal(ts_client_restarts(c), 2);
    assert_int_equal(ts_seq_lengths(w.pool, &w.seq, 1, &length), TS_ENOENT);
    assert_int_equal(ts_step_commit(other.step, NULL), TS_EINTERNAL);
    DO(ts_step_abort(other.step)); /* the session goes on */
    stream_step(c, w.pool, &good, (uint32_t[]){16}, 1, &w.random, &w.digest);
    check_daemon(c);
    ts_pool_close(p);
    worker_close(&w);
    stop(&d, false);
}

/* ---- a worker that writes K and V itself ---- */

/* What it maps stays where it is, and what it wrote is read by the next daemon's attention. */
static uint64_t written_by_worker(const char *kill_at, uint32_t *restarts)
{
    daemon_process d;
    ts_seq seq, fork;
    rng r = {9};
    digest sum = {1};
    start(&d, POOL, kill_at);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    open_exchange(c, p, OF_DAEMON);
    DO(ts_seq_create(p, 1, &seq));
    for (uint32_t round = 0; round < 3; round++) {
        ts_step *step;
        uint64_t slots[10];
        DO(ts_step_begin(p, &seq, (uint32_t[]){10}, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options)}, &step));
        ts_step_slots(step, slots);
        for (uint32_t i = 0; i < 10 * LAYERS; i++) {
            ts_kv kv;
            DO(ts_slot_kv(p, slots[i / LAYERS], i % LAYERS, &kv));
            fill(&r, kv.k, DIM);
            fill(&r, kv.v, DIM);
        }
        DO(ts_step_commit(step, NULL));
    }
    DO(ts_seq_fork(p, seq, 1, &fork));
    stream_step(c, p, (ts_seq[]){seq, fork}, (uint32_t[]){1, 1}, 2, &r, &sum);
    *restarts = ts_client_restarts(c);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    stop(&d, kill_at != NULL && *restarts == 0);
    return sum.value;
}

static void what_a_worker_wrote_is_there(void **state)
{
    (void)state;
    uint32_t restarts, n = 5;
    const uint64_t expected = written_by_worker(NULL, &restarts);
    do {
        char kill_at[32];
        snprintf(kill_at, sizeof kill_at, "published:%u", n);
        assert_int_equal(written_by_worker(kill_at, &restarts), expected);
        n += STRIDE;
    } while (restarts > 0);
    assert_true(n > 10);
}

int main(void)
{
    /* A daemon that is told to end leaves what it has, its fake device's threads too. */
    const char *sanitizer = getenv("TSAN_OPTIONS");
    char options[1024];
    snprintf(options, sizeof options, "%s:report_thread_leaks=0", sanitizer ? sanitizer : "");
    setenv("TSAN_OPTIONS", options, 1);
    setenv("TS_TEST_FAKE_GPU", "1", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_a_lost_device_cannot_give_is_the_next_daemons),
        cmocka_unit_test(what_a_lost_device_left_undone_is_the_next_daemons),
        cmocka_unit_test(a_device_that_is_lost_while_slabs_are_taken_over_loses_nothing),
        cmocka_unit_test(the_next_daemon_does_what_nobody_asks_it_for),
        cmocka_unit_test(killed_between_an_application_and_its_publication),
        cmocka_unit_test(killed_after_a_publication),
        cmocka_unit_test(killed_between_the_two_words_of_a_run),
        cmocka_unit_test(killed_when_a_run_is_handed_on),
        cmocka_unit_test(killed_when_a_descriptor_is_stored),
        cmocka_unit_test(killed_around_an_answer),
        cmocka_unit_test(a_stream_goes_on_when_no_daemon_comes),
        cmocka_unit_test(a_worker_without_a_context_waits_for_nobody),
        cmocka_unit_test(a_late_run_stays_late),
        cmocka_unit_test(a_run_on_a_stream_that_crashes_the_daemon_twice_fails),
        cmocka_unit_test(runs_of_a_step_that_is_lost_are_not_waited_for),
        cmocka_unit_test(what_a_worker_wrote_is_there),
    };
    return cmocka_run_group_tests_name("gpu_restart", tests, NULL, NULL);
}
