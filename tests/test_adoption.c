/* A supervisor that dies, and the next one. */
#define _GNU_SOURCE
#include "supervisor_util.h"

/* Kills the supervisor; the daemon has seen it when this returns. */
static void kill_supervisor(world *w)
{
    kill(w->supervisor, SIGKILL);
    assert_int_equal(waitpid(w->supervisor, NULL, 0), w->supervisor);
    ASK("await 0", "0");
}

static void a_daemon_outlives_its_supervisor_and_the_next_one_adopts_it(void **state)
{
    world world, *w = &world;
    char line[64];
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    ASK("put a stored before", "ok");
    ASK("put b removed after", "ok");
    ASK("put taken.over twice", "ok");
    ASK("barrier", "done");
    say(w, "die 9");
    meet(w);
    ASK("read taken.over", "twice");
    const pid_t daemon = w->daemon;
    kill_supervisor(w);
    ASK("barrier", "not done");
    ASK("put c stored between", "ok");
    ASK("remove b", "TS_OK");
    start_supervisor(w, &plain);
    snprintf(line, sizeof line, "takes over the live daemon, pid %d", (int)daemon);
    await_line(w, line);
    ASK("await 1", "1");
    ASK("put d stored after", "ok");
    ASK("barrier", "done");
    assert_int_equal(kill(daemon, 0), 0); /* nobody has ended it */
    kill(w->supervisor, SIGHUP);
    assert_string_equal(hear(w), "hangup");
    say(w, "die 9"); /* nobody can wait for it */
    meet(w);
    assert_int_not_equal(w->daemon, daemon);
    ASK("deaths", "1 unknown");
    ASK("names", "4 a taken.over c d");
    ASK("read a", "stored before");
    ASK("read c", "stored between");
    ASK("read d", "stored after");
    ASK("read taken.over", "twice");

    kill_supervisor(w); /* an adopted one's successor is a child, and is adopted in its turn */
    start_supervisor(w, &plain);
    ASK("await 1", "1");
    ASK("notify STOPPING=1\nEXIT_STATUS=3", "sent");
    say(w, "exit 3");
    meet(w);
    ASK("deaths", "1 status 3");
    ASK("names", "4 a taken.over c d");

    kill_supervisor(w);
    start_supervisor(w, &plain);
    ASK("await 1", "1");
    ASK("notify STOPPING=1", "sent"); /* so ends a daemon that was told to */
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void an_adopted_daemon_is_ended_as_a_child_is(void **state)
{
    world world, *w = &world;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    kill_supervisor(w);
    start_supervisor(w, &plain);
    ASK("await 1", "1");
    ASK("deafen", "deaf");
    ASK("notify STOPPING=1", "sent");
    kill(w->supervisor, SIGTERM);
    assert_string_equal(hear(w), "terminate");
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void a_daemon_that_was_not_supervised_is_left_alone(void **state)
{
    const ways how = {.stable_ms = "0", .kill_after_ms = "0", .adopt_ms = "1"};
    world world, *w = &world;
    int status;
    (void)state;
    world_make(w);
    pid_t daemon = fork();
    if (daemon == 0) {
        execl(fake_daemon(), "supervised_daemon", w->socket, w->control_path, NULL);
        _exit(99);
    }
    meet(w);
    ASK("put a b", "'a' isn't stored: there is no store");
    ASK("barrier", "not done");
    start_supervisor(w, &how);
    await_line(w, "was not started by --supervise");
    assert_int_equal(await_end(w), 1);
    ASK("names", "0"); /* it is alive */
    say(w, "exit 4");
    assert_int_equal(waitpid(daemon, &status, 0), daemon);
    assert_int_equal(WEXITSTATUS(status), 4);
    world_end(w);
}

static void as_many_as_fit_come_back(void **state)
{
    world world, *w = &world;
    char expected[32];
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    const unsigned long stored = strtoul(ask(w, "fill"), NULL, 10);
    assert_int_equal(stored, TS_STORE_NAMES_BYTES / (TS_STORE_NAME_BYTES + 1));
    ASK("barrier", "done");
    for (int i = 0; i < 2; i++) {
        say(w, "die 9");
        meet(w);
        snprintf(expected, sizeof expected, "%lu ", stored);
        assert_memory_equal(ask(w, "names"), expected, strlen(expected));
    }
    kill_supervisor(w);
    start_supervisor(w, &plain);
    ASK("await 1", "1");
    ASK("barrier", "done");
    say(w, "die 9");
    meet(w);
    assert_memory_equal(ask(w, "names"), expected, strlen(expected));
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_daemon_outlives_its_supervisor_and_the_next_one_adopts_it),
        cmocka_unit_test(an_adopted_daemon_is_ended_as_a_child_is),
        cmocka_unit_test(a_daemon_that_was_not_supervised_is_left_alone),
        cmocka_unit_test(as_many_as_fit_come_back),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
