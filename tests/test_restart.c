/*
 * The daemon dies anywhere, and nothing is lost. A daemon under `tinyserved --supervise` is ended by
 * SIGKILL at the n-th time that it comes to a place (kill_points.c), for every n and place of a
 * recorded workload; the worker only calls, and every call must give what it gives with a daemon
 * that lives, every bit of attention included.
 */
#define _GNU_SOURCE
#include "daemon_util.h"

#define LAYERS 2u
#define DIM 32u
#define HEADS 2u
#define BLOCK 16u
#define POOL                                                                                       \
    "p:layers=2,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=64,slab=64K,"             \
    "device=host,model=m"

/* Starts the daemon under a supervisor. kill_at: see kill_points.c; NULL: nothing ends it. */
static void start(daemon_process *d, const char *kill_at)
{
    snprintf(d->folder, sizeof d->folder, "/tmp/tinyserve-test.XXXXXX");
    assert_non_null(mkdtemp(d->folder));
    snprintf(d->url, sizeof d->url, "%s/s", d->folder);
    snprintf(d->handles, sizeof d->handles, "%s/s" TS_HANDLE_SUFFIX, d->folder);
    alarm(WATCHDOG_SECONDS);
    d->pid = fork();
    assert_true(d->pid >= 0);
    if (d->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (kill_at != NULL)
            setenv("TS_TEST_KILL", kill_at, 1);
        if (getenv("TS_TEST_LOG") == NULL) /* it says of each death that it died */
            (void)!freopen("/dev/null", "w", stderr);
        execl(TS_KILLED_DAEMON, TS_KILLED_DAEMON, "--supervise", "--set", "log_level=error", "--set",
              "threads=1", "--socket", d->url, "--pool", POOL, NULL);
        _exit(127);
    }
}

static ts_client *connect_by(const daemon_process *d, ts_transport transport)
{
    ts_client *c;
    const ts_options options = {.size = sizeof(ts_options),
                                .url = d->url,
                                .wait_ms = 60000,
                                .timeout_ms = 60000,
                                .exchange_bytes = 1u << 20,
                                .transport = transport};
    ts_status status = ts_connect(&options, &c);
    if (status != TS_OK)
        fail_msg("%s: %s", ts_status_name(status), ts_error(c));
    return c;
}

/* A call of the worker's, which must succeed. */
#define DO(call)                                                                                   \
    do {                                                                                           \
        ts_status done = (call);                                                                   \
        if (done != TS_OK)                                                                         \
            fail_msg("%s: %s: %s", #call, ts_status_name(done), ts_error(c));                      \
    } while (0)

typedef struct digest {
    uint64_t value;
} digest;

static void mix(digest *d, const void *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        d->value = (d->value ^ ((const unsigned char *)bytes)[i]) * 1099511628211u;
}

static void fill(rng *r, float *to, size_t count)
{
    for (size_t i = 0; i < count; i++)
        to[i] = rng_normal(r);
}

/* Runs all layers of a step with random q, k and v, and mixes what came out. */
static void run_layers(ts_client *c, ts_step *step, uint32_t tokens, rng *r, digest *d)
{
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        fill(r, ts_step_q(step), (size_t)tokens * HEADS * DIM);
        fill(r, ts_step_k(step), (size_t)tokens * DIM);
        fill(r, ts_step_v(step), (size_t)tokens * DIM);
        DO(ts_step_run(step, layer));
        mix(d, ts_step_out(step), (size_t)tokens * HEADS * DIM * sizeof(float));
    }
}

static void one_step(ts_client *c, ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens,
                     uint32_t count, const uint32_t *ids, rng *r, digest *d)
{
    ts_step *step;
    uint32_t tokens = 0;
    const ts_step_options options = {
        .size = sizeof(ts_step_options), .heads = HEADS, .tokens = ids};
    for (uint32_t i = 0; i < count; i++)
        tokens += new_tokens[i];
    DO(ts_step_begin(p, seqs, new_tokens, count, &options, &step));
    run_layers(c, step, tokens, r, d);
    DO(ts_step_commit(step, NULL));
}

/* Everything that a worker does, and a digest of all that it is told but ids. */
static uint64_t workload(ts_client *c, uint32_t *restarts)
{
    rng r = {42};
    digest d = {1469598103934665603u};
    ts_seq seqs[2], forks[2], found[2], kept, own, next[2];
    ts_step *step;
    uint32_t ids[64], length, matched[2], lengths[4];
    uint8_t ticket[TS_TICKET_BYTES];
    ts_kept list[4];
    ts_pool *p = open_pool(c, "p", 0);
    for (uint32_t i = 0; i < 64; i++)
        ids[i] = i % 7;
    DO(ts_seq_create(p, 2, seqs));
    one_step(c, p, seqs, (uint32_t[]){40, 7}, 2, ids, &r, &d);
    DO(ts_seq_fork(p, seqs[0], 2, forks));
    one_step(c, p, (ts_seq[]){forks[0], forks[1], seqs[1]}, (uint32_t[]){1, 2, 1}, 3, NULL, &r, &d);
    DO(ts_seq_truncate(p, &forks[1], &(uint32_t){10}, 1));
    DO(ts_seq_keep(p, forks[0], "kept"));
    DO(ts_seq_attach(p, "kept", &kept, &length));
    mix(&d, &length, sizeof length);
    DO(ts_seq_ticket(p, forks[1], 0, ticket));
    DO(ts_seq_redeem(p, ticket, &own, &length));
    mix(&d, &length, sizeof length);
    DO(ts_seq_match(p, ids, (uint32_t[]){40, 20}, 2, NULL, found, matched));
    mix(&d, matched, sizeof matched);
    DO(ts_step_begin(p, found, (uint32_t[]){1, 1}, 2,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &step));
    run_layers(c, step, 2, &r, &d);
    DO(ts_step_abort(step));
    DO(ts_seq_select(p, found, 2, (uint32_t[]){1, 1}, 2, next));
    one_step(c, p, next, (uint32_t[]){3, 1}, 2, NULL, &r, &d);
    DO(ts_seq_list(p, "k", NULL, list, 4, &length));
    mix(&d, &length, sizeof length);
    one_step(c, p, (ts_seq[]){own, seqs[0]}, (uint32_t[]){9, 17}, 2, NULL, &r, &d);
    DO(ts_seq_lengths(p, (ts_seq[]){own, seqs[0], next[0], next[1]}, 4, lengths));
    mix(&d, lengths, sizeof lengths);
    DO(ts_seq_keep(p, kept, NULL));
    DO(ts_seq_free(p, (ts_seq[]){own, kept}, 2));
    check_daemon(c);
    mix(&d, &(uint64_t){sequences(c)}, sizeof(uint64_t));
    *restarts = ts_client_restarts(c);
    ts_pool_close(p);
    return d.value;
}

/* Ends both; nothing may be left of them. `late`: the daemon may come to where it is killed only
 * now. */
static void stop(daemon_process *d, bool late)
{
    int status;
    kill(d->pid, SIGTERM);
    assert_int_equal(waitpid(d->pid, &status, 0), d->pid);
    assert_true(WIFEXITED(status));
    if (late && WEXITSTATUS(status) == 128 + SIGKILL)
        return daemon_clean(d);
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(rmdir(d->folder), 0);
    alarm(0);
}

static uint64_t run_with(const char *kill_at, ts_transport transport, uint32_t *restarts)
{
    daemon_process d;
    start(&d, kill_at);
    ts_client *c = connect_by(&d, transport);
    const uint64_t digest = workload(c, restarts);
    ts_disconnect(c);
    stop(&d, kill_at != NULL && *restarts == 0);
    return digest;
}

/* How many kills there were. */
static uint32_t kill_everywhere(ts_transport transport, const char *place, uint32_t from)
{
    uint32_t restarts, kills = 0;
    const uint64_t expected = run_with(NULL, transport, &restarts);
    assert_int_equal(restarts, 0);
    for (uint32_t n = from;; n++) {
        char kill_at[32];
        snprintf(kill_at, sizeof kill_at, "%s:%u", place, n);
        const uint64_t digest = run_with(kill_at, transport, &restarts);
        if (restarts == 0) /* it doesn't come there so often */
            return kills;
        kills++;
        if (digest != expected)
            fail_msg("ended at %s, a worker by %s was told something else", kill_at,
                     transport == TS_TRANSPORT_RING ? "ring" : "message");
    }
}

static void killed_between_an_application_and_its_publication(void **state)
{
    (void)state;
    assert_true(kill_everywhere(TS_TRANSPORT_RING, "applied", 3) > 30);
}

static void killed_after_a_publication(void **state)
{
    (void)state;
    assert_true(kill_everywhere(TS_TRANSPORT_RING, "published", 3) > 30);
}

static void killed_before_an_answer(void **state)
{
    (void)state;
    assert_true(kill_everywhere(TS_TRANSPORT_RING, "answering", 2) > 20);
}

static void killed_after_an_answer(void **state)
{
    (void)state;
    assert_true(kill_everywhere(TS_TRANSPORT_RING, "answered", 2) > 20);
}

static void killed_when_a_descriptor_is_stored(void **state)
{
    (void)state;
    assert_true(kill_everywhere(TS_TRANSPORT_RING, "stored", 1) >= 3);
}

static void killed_under_messages(void **state)
{
    (void)state;
    assert_true(kill_everywhere(TS_TRANSPORT_MESSAGES, "published", 3) > 30);
    assert_true(kill_everywhere(TS_TRANSPORT_MESSAGES, "answering", 2) > 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(killed_between_an_application_and_its_publication),
        cmocka_unit_test(killed_after_a_publication),
        cmocka_unit_test(killed_before_an_answer),
        cmocka_unit_test(killed_after_an_answer),
        cmocka_unit_test(killed_when_a_descriptor_is_stored),
        cmocka_unit_test(killed_under_messages),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
