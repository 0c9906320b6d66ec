/*
 * The daemon dies anywhere, and nothing is lost. A daemon under `tinyserved --supervise` is ended
 * by SIGKILL at the n-th time that it comes to a place (kill_points.c), for every n and place of a
 * recorded workload; the worker only calls, and every call must give what it gives with a daemon
 * that lives, every bit of attention included.
 */
#define _GNU_SOURCE
#include "restart_steps.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>

/* Everything that a worker does, and a digest of all that it is told but ids. `alone`: nobody else
 * keeps names or has sequences. */
static uint64_t workload_of(ts_client *c, uint32_t *restarts, bool alone)
{
    rng r = {42};
    digest d = {1469598103934665603u};
    ts_seq seqs[2], forks[2], found[2], kept, own, next[2], longer;
    ts_step *step;
    uint32_t ids[64], length, matched[2], lengths[4];
    uint8_t ticket[TS_TICKET_BYTES];
    ts_kept list[4];
    char name[32];
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    for (uint32_t i = 0; i < 64; i++)
        ids[i] = i % 7;
    DO(ts_seq_create(p, 2, seqs));
    one_step(c, p, seqs, (uint32_t[]){40, 7}, 2, ids, &r, &d);
    DO(ts_seq_fork(p, seqs[0], 2, forks));
    one_step(c, p, (ts_seq[]){forks[0], forks[1], seqs[1]}, (uint32_t[]){1, 2, 1}, 3, NULL, &r, &d);
    DO(ts_seq_truncate(p, &forks[1], &(uint32_t){10}, 1));
    DO(ts_seq_fork(p, seqs[0], 1, &longer));
    DO(ts_seq_append(p, &longer, &(uint32_t){3}, 1, NULL)); /* it gets a copy of the tail */
    DO(ts_step_begin(p, &longer, &(uint32_t){4}, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &step));
    run_layers(c, step, 4, &r, NULL); /* over tokens that nobody has written */
    DO(ts_step_commit(step, &(uint32_t){2}));
    DO(ts_seq_lengths(p, &longer, 1, lengths));
    mix(&d, lengths, sizeof *lengths);
    DO(ts_seq_forget(p, &longer, 1));
    snprintf(name, sizeof name, "k%d", (int)getpid());
    DO(ts_seq_keep(p, forks[0], name));
    DO(ts_seq_attach(p, name, &kept, &length));
    mix(&d, &length, sizeof length);
    DO(ts_seq_ticket(p, forks[1], 5000, ticket));
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
    DO(ts_seq_list(p, name, NULL, list, sizeof(ts_kept), 4, &length));
    mix(&d, &length, sizeof length);
    one_step(c, p, (ts_seq[]){own, seqs[0]}, (uint32_t[]){9, 17}, 2, NULL, &r, &d);
    DO(ts_seq_lengths(p, (ts_seq[]){own, seqs[0], next[0], next[1]}, 4, lengths));
    mix(&d, lengths, sizeof lengths);
    DO(ts_seq_keep(p, kept, NULL));
    DO(ts_seq_free(p, (ts_seq[]){own, kept}, 2));
    if (alone) {
        check_daemon(c);
        mix(&d, &(uint64_t){sequences(c)}, sizeof(uint64_t));
    }
    mix(&d, ts_error(c), strlen(ts_error(c))); /* no call has failed, whatever its attempts did */
    *restarts = ts_client_restarts(c);
    ts_pool_close(p);
    return d.value;
}

static uint64_t run_workload(ts_client *c, int exchange, uint32_t *restarts)
{
    (void)exchange;
    return workload_of(c, restarts, true);
}

static uint32_t kills_at(ts_transport transport, const char *place, uint32_t from)
{
    const killed_workload w = {.pool = POOL, .transport = transport, .work = run_workload};
    return kill_everywhere(&w, place, from);
}

static void killed_between_an_application_and_its_publication(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, "applied", 3) > 30 / STRIDE);
}

static void killed_after_a_publication(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, "published", 3) > 30 / STRIDE);
}

static void killed_before_an_answer(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, "answering", 2) > 20 / STRIDE);
}

static void killed_after_an_answer(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, "answered", 2) > 20 / STRIDE);
}

static void killed_when_a_descriptor_is_stored(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, "stored", 1) > 2 / STRIDE);
}

static void killed_under_messages(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_MESSAGES, "published", 3) > 30 / STRIDE);
    assert_true(kills_at(TS_TRANSPORT_MESSAGES, "answering", 2) > 20 / STRIDE);
}

/* ---- a take-over without memory ---- */

/* The first daemon is killed where a fork's step has its copy to come, and the second has no memory
 * at some place: the third one does what that couldn't. */
static void what_has_no_memory_for_a_take_over_is_tried_again(void **state)
{
    (void)state;
    static const char *const places[] = {"reading the books", "copying again"};
    for (uint32_t i = 0; i < sizeof places / sizeof *places; i++) {
        daemon_process d;
        ts_seq parent, child;
        char log[64];
        snprintf(log, sizeof log, "/tmp/tinyserve-no-memory.%d", (int)getpid());
        setenv("TS_TEST_FAIL", places[i], 1);
        setenv("TS_TEST_LOG", log, 1);
        start(&d, POOL, "running:3");
        unsetenv("TS_TEST_FAIL");
        unsetenv("TS_TEST_LOG");
        ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
        ts_pool *p = open_pool(c, "p", 0);
        DO(ts_seq_create(p, 1, &parent));
        step_of_k(c, p, parent, 5, 7);
        DO(ts_seq_fork(p, parent, 1, &child));
        step_of_k(c, p, child, 1, 9);
        for (uint32_t t = 0; t < 5; t++) {
            assert_true(k_of(c, p, parent, t) == 7);
            assert_true(k_of(c, p, child, t) == 7);
        }
        assert_true(k_of(c, p, child, 5) == 9);
        finish(&d, c, p);
        char *said = read_log(log);
        assert_non_null(strstr(said, "what is stored stays, and it is tried again"));
        free(said);
    }
}

/* ---- what crashes the daemon again and again ---- */

#define A_FORK "applying/8"   /* TS_OP_SEQ_FORK */
#define A_GRANT "applying/26" /* TS_OP_SLAB_GRANT */

static void a_command_that_kills_the_daemon_twice_isnt_carried_out_a_third_time(void **state)
{
    (void)state;
    daemon_process d;
    ts_seq seqs[2], fork;
    ts_client *c = start_crashing(&d, A_FORK), *other = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", 0), *others = open_pool(other, "p", 0);
    DO(ts_seq_create(p, 1, &seqs[0]));
    OK(ts_seq_create(others, 1, &seqs[1]));
    assert_int_equal(ts_seq_fork(p, seqs[0], 1, &fork), TS_ECONN);
    ts_pool_close(p);
    finish_after_crashes(&d, c, other, others, seqs[1]);
}

/* No session can be ended for it: the fourth daemon begins with nothing. */
static void an_operation_of_its_own_that_crashes_the_daemon_thrice_ends_in_nothing(void **state)
{
    (void)state;
    daemon_process d;
    ts_seq seq;
    ts_step *step;
    ts_client *c = start_crashing(&d, A_GRANT);
    ts_pool *p = open_pool(c, "p", 0);
    DO(ts_seq_create(p, 1, &seq));
    assert_int_equal(begin_step(p, seq, 1, &step), TS_ECONN);
    assert_non_null(strstr(ts_error(c), "was started anew"));
    ts_client *next = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *again = open_pool(next, "p", 0);
    DO(ts_seq_create(again, 1, &seq));
    ts_pool_close(p);
    ts_disconnect(c);
    finish(&d, next, again);
}

static void a_run_that_crashes_the_daemon_twice_fails(void **state)
{
    (void)state;
    daemon_process d;
    ts_seq seq;
    ts_step *step;
    ts_client *c = start_crashing(&d, "running");
    ts_pool *p = open_pool(c, "p", 0);
    DO(ts_seq_create(p, 1, &seq));
    DO(begin_step(p, seq, 1, &step));
    assert_int_equal(ts_step_run(step, 0), TS_EINTERNAL);
    assert_non_null(strstr(ts_error(c), "at 2 crashes of the daemon"));
    assert_int_equal(ts_client_restarts(c), 2);
    DO(ts_step_abort(step)); /* the session goes on */
    DO(ts_seq_free(p, &seq, 1));
    finish(&d, c, p);
}

/* ---- a crowd, and kills at random times ---- */

#define WORKERS 8

/* Rounds of the workload until the file that the argument names is there: `digest=file`. */
static void work(const char *url, const char *argument)
{
    const uint64_t expected = strtoull(argument, NULL, 16);
    const char *end = strchr(argument, '=') + 1;
    uint32_t restarts = 0, rounds = 0;
    do {
        daemon_process there;
        snprintf(there.url, sizeof there.url, "%s", url);
        /* By ring, by message, and attending themselves. */
        ts_client *c =
            connect_with(&there, rounds % 3 == 1 ? TS_TRANSPORT_MESSAGES : TS_TRANSPORT_RING,
                         rounds % 3 == 2 ? TS_EXEC_LOCAL : TS_EXEC_DAEMON);
        const uint64_t digest = workload_of(c, &restarts, false);
        if (digest != expected) {
            fprintf(stderr, "round %u of pid %d was told something else after %u restarts\n",
                    rounds, (int)getpid(), restarts);
            _exit(1);
        }
        ts_disconnect(c);
        rounds++;
    } while (access(end, F_OK) != 0);
}

/* Asks the daemon anything, so that it is known to serve. */
static void await_answer(ts_client *c)
{
    (void)daemon_status(c);
}

static uint32_t open_descriptors(pid_t pid)
{
    char path[64];
    uint32_t count = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *folder = opendir(path);
    assert_non_null(folder);
    while (readdir(folder) != NULL)
        count++;
    (void)closedir(folder);
    return count;
}

/* What workers that were killed had kept is freed. */
static void free_kept(ts_client *c, ts_pool *p)
{
    ts_kept kept;
    uint32_t count;
    for (;;) {
        DO(ts_seq_list(p, "k", NULL, &kept, sizeof(ts_kept), 1, &count));
        if (count == 0)
            return;
        DO(ts_seq_keep(p, kept.seq, NULL));
        DO(ts_seq_free(p, &kept.seq, 1));
    }
}

/* The daemon is killed again and again, and now and then a worker, too. */
static void a_crowd_goes_on_over_kills_at_random_times(void **state)
{
    (void)state;
    const char *wanted = getenv("TS_TEST_KILLS");
    const uint32_t kills = wanted != NULL ? (uint32_t)atoi(wanted) : KILLS;
    daemon_process d;
    rng r = {7};
    uint32_t restarts, held = 0;
    pid_t workers[WORKERS];
    char end[96], argument[160];
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_MESSAGES);
    const uint64_t expected = workload_of(c, &restarts, false);
    ts_disconnect(c);
    c = connect_by(&d, TS_TRANSPORT_MESSAGES);
    snprintf(end, sizeof end, "%s/end", d.folder);
    snprintf(argument, sizeof argument, "%llx=%s", (unsigned long long)expected, end);
    for (int i = 0; i < WORKERS; i++)
        workers[i] = spawn("work", d.url, argument);
    for (uint32_t i = 0; i < kills; i++) {
        await_answer(c);
        for (uint32_t n = rng_below(&r, 40); n > 0; n--)
            await_answer(c);
        const pid_t pid = daemon_of(&d);
        if (i % 5 == 4) {
            pid_t *worker = &workers[rng_below(&r, WORKERS)];
            kill(*worker, SIGKILL);
            assert_int_equal(waitpid(*worker, NULL, 0), *worker);
            *worker = spawn("work", d.url, argument);
        }
        if (pid > 0)
            kill(pid, SIGKILL);
    }
    const int file = open(end, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    assert_true(file >= 0);
    close(file);
    for (int i = 0; i < WORKERS; i++)
        join_child(workers[i]);
    check_daemon(c);
    assert_true(ts_client_restarts(c) > kills / 2);
    /* Every session but this one has ended: what they had is free or cached, and so is what the
     * supervisor held for them. */
    ts_pool *p = open_pool(c, "p", 0);
    free_kept(c, p);
    await_used_blocks(c, 0);
    ts_pool_close(p);
    held = open_descriptors(d.pid);
    if (held > 64)
        fail_msg("the supervisor has %u descriptors", held);
    ts_disconnect(c);
    unlink(end);
    stop(&d, false);
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {{"work", work}};
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(killed_between_an_application_and_its_publication),
        cmocka_unit_test(killed_after_a_publication),
        cmocka_unit_test(killed_before_an_answer),
        cmocka_unit_test(killed_after_an_answer),
        cmocka_unit_test(killed_when_a_descriptor_is_stored),
        cmocka_unit_test(killed_under_messages),
        cmocka_unit_test(what_has_no_memory_for_a_take_over_is_tried_again),
        cmocka_unit_test(a_command_that_kills_the_daemon_twice_isnt_carried_out_a_third_time),
        cmocka_unit_test(an_operation_of_its_own_that_crashes_the_daemon_thrice_ends_in_nothing),
        cmocka_unit_test(a_run_that_crashes_the_daemon_twice_fails),
        cmocka_unit_test(a_crowd_goes_on_over_kills_at_random_times),
    };
    cmocka_set_test_filter(getenv("TS_TEST_FILTER"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
