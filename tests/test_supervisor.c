/* What the supervisor does with a daemon that dies, and with what it is sent. */
#define _GNU_SOURCE
#include "supervisor_util.h"

static void a_daemon_that_dies_in_any_way_is_followed_by_one_that_finds_all(void **state)
{
    static const char *const ways_to_die[][2] = {
        {"die 9", "1 signal 9"}, {"die 11", "2 signal 11"}, {"exit 3", "3 status 3"}};
    world world, *w = &world;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    ASK("deaths", "- -");
    ASK("names", "0");
    ASK("put a first", "ok");
    ASK("put pool.1.2 second", "ok");
    ASK("put c third", "ok");
    ASK("remove c", "TS_OK");
    for (size_t i = 0; i < 3; i++) {
        ASK("barrier", "done");
        ASK("notify READY=1", "sent");
        say(w, ways_to_die[i][0]);
        meet(w);
        ASK("deaths", ways_to_die[i][1]);
        ASK("variables", "none");
        ASK("names", "2 a pool.1.2");
        ASK("read a", "first");
        ASK("read pool.1.2", "second");
        ASK("read a", "none"); /* taken */
        ASK("names", "0");
    }
    ASK("put a again", "a descriptor is stored under 'a' already");
    ASK("remove a", "TS_OK");
    ASK("remove a", "TS_ENOENT");
    ASK("put a again", "ok");
    ASK("barrier", "done");
    say(w, "die 9");
    meet(w);
    ASK("names", "2 pool.1.2 a");
    ASK("read a", "again");
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void ends_before_a_daemon_serves_do_not_hide_the_end_of_the_one_that_did(void **state)
{
    world world, *w = &world;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    ASK("notify READY=1", "sent");
    say(w, "die 9");
    meet(w);
    ASK("deaths", "1 signal 9");
    say(w, "exit 2");
    meet(w);
    ASK("deaths", "2 signal 9, then status 2");
    say(w, "exit 3");
    meet(w);
    ASK("deaths", "3 signal 9, then status 3");
    ASK("notify READY=1", "sent");
    say(w, "die 11");
    meet(w);
    ASK("deaths", "4 signal 11");
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void what_a_daemon_sent_before_its_death_is_not_lost(void **state)
{
    world world, *w = &world;
    int status;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    ASK("put a b", "ok");
    ASK("barrier", "done");
    kill(w->supervisor, SIGSTOP);
    assert_int_equal(waitpid(w->supervisor, &status, WUNTRACED), w->supervisor);
    ASK("raw 1 FDSTORE=1\nFDNAME=last", "sent");
    ASK("raw 0 FDSTOREREMOVE=1\nFDNAME=a", "sent");
    struct pollfd end = {.fd = (int)syscall(SYS_pidfd_open, w->daemon, 0), .events = POLLIN};
    assert_true(end.fd >= 0);
    say(w, "die 9");
    assert_int_equal(poll(&end, 1, -1), 1);
    close(end.fd);
    kill(w->supervisor, SIGCONT); /* hears of its death and has its messages */
    meet(w);
    ASK("names", "1 last");
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void descriptors_keep_their_names_whatever_their_numbers(void **state)
{
    enum { MANY = 30, REMOVED = 6 };
    world world, *w = &world;
    char order[32], number[16];
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    for (int i = 0; i < MANY; i++) { /* the last ones have the numbers of the first */
        snprintf(order, sizeof order, "put n.%d %d", i, i);
        ASK(order, "ok");
        if (i != MANY - REMOVED - 1)
            continue;
        for (int gone = 0; gone < REMOVED; gone++) {
            snprintf(order, sizeof order, "remove n.%d", gone);
            ASK(order, "TS_OK");
        }
        ASK("barrier", "done");
    }
    ASK("barrier", "done");
    for (int times = 0; times < 2; times++) {
        say(w, "die 9");
        meet(w);
        for (int i = 0; i < MANY; i++) {
            snprintf(order, sizeof order, "read n.%d", i);
            snprintf(number, sizeof number, "%d", i);
            ASK(order, i < REMOVED ? "none" : number);
        }
        ASK("names", "0");
    }
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void told_to_end_it_ends_both_and_has_the_daemons_status(void **state)
{
    world world, *w = &world;
    (void)state;
    for (int i = 0; i < 2; i++) {
        world_make(w);
        start_supervisor(w, &plain);
        meet(w);
        if (i == 1)
            ASK("deafen", "deaf");
        kill(w->supervisor, i == 0 ? SIGTERM : SIGINT);
        if (i == 0) {
            assert_string_equal(hear(w), "terminate");
            assert_int_equal(await_end(w), 0);
        } else { /* of SIGINT it dies, having no handler; it isn't started again */
            assert_int_equal(await_end(w), 128 + SIGINT);
        }
        world_end(w);
    }
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    ASK("deafen", "deaf");
    kill(w->supervisor, SIGTERM);
    assert_string_equal(hear(w), "terminate");
    say(w, "exit 7");
    assert_int_equal(await_end(w), 7);
    world_end(w);
}

/* Signals that a daemon gets before it is ready for them. */
static void a_signal_that_comes_early_waits_for_the_daemon(void **state)
{
    const int signals[] = {SIGHUP, SIGTERM};
    (void)state;
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        world world, *w = &world;
        char number[8];
        ways how = plain;
        snprintf(number, sizeof number, "%d", signals[i]);
        how.early = number;
        world_make(w);
        start_supervisor(w, &how);
        meet(w);
        assert_string_equal(hear(w), signals[i] == SIGHUP ? "hangup" : "terminate");
        if (signals[i] == SIGHUP) {
            ASK("deaths", "- -");
            kill(w->supervisor, SIGTERM);
            assert_string_equal(hear(w), "terminate");
        }
        assert_int_equal(await_end(w), 0);
        world_end(w);
    }
}

static void a_second_order_to_end_kills_a_daemon_that_does_not(void **state)
{
    const ways at_once = {.stable_ms = "0", .kill_after_ms = "0", .adopt_ms = "60000"};
    world world, *w = &world;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain); /* 10 s have not passed: it is left alone */
    meet(w);
    ASK("deafen", "deaf");
    kill(w->supervisor, SIGTERM);
    assert_string_equal(hear(w), "terminate");
    kill(w->supervisor, SIGTERM);
    kill(w->supervisor, SIGHUP);
    assert_string_equal(hear(w), "hangup");
    say(w, "exit 5");
    assert_int_equal(await_end(w), 5);
    world_end(w);
    world_make(w);
    start_supervisor(w, &at_once);
    meet(w);
    ASK("deafen", "deaf");
    kill(w->supervisor, SIGTERM);
    assert_string_equal(hear(w), "terminate");
    kill(w->supervisor, SIGTERM);
    assert_int_equal(await_end(w), 128 + SIGKILL);
    world_end(w);
}

/* The next message to the supervisor's own holder. */
static void expect(int fd, const char *text)
{
    char got[512];
    ssize_t n = recv(fd, got, sizeof got - 1, 0);
    assert_true(n > 0);
    got[n] = '\0';
    assert_string_equal(got, text);
}

static void what_the_daemon_tells_goes_upward_and_its_orders_do_not(void **state)
{
    world world, *w = &world;
    char path[96];
    (void)state;
    world_make(w);
    snprintf(path, sizeof path, "%.63s/notify", w->folder);
    int fd = listen_in(path, SOCK_DGRAM);
    ways how = plain;
    how.notify = path;
    start_supervisor(w, &how);
    meet(w);
    ASK("notify READY=1\nSTATUS=well\nMAINPID=1", "sent");
    expect(fd, "READY=1\nSTATUS=well");
    ASK("put a b", "ok");
    ASK("barrier", "done");
    ASK("notify RELOADING=1\nMONOTONIC_USEC=5\n", "sent");
    expect(fd, "RELOADING=1\nMONOTONIC_USEC=5");
    ASK("notify WATCHDOG=1", "sent");
    expect(fd, "WATCHDOG=1");
    kill(w->supervisor, SIGHUP);
    assert_string_equal(hear(w), "hangup");
    say(w, "die 9");
    expect(fd, "STATUS=The daemon died (signal 9) and is started again; death 1");
    meet(w);
    kill(w->supervisor, SIGTERM);
    expect(fd, "STOPPING=1");
    assert_int_equal(await_end(w), 0);
    close(fd);
    world_end(w);
}

/* Sends to the daemon's notify socket as somebody who isn't the daemon. */
static void send_as_stranger(const world *w, const char *text, int passed)
{
    char path[96];
    snprintf(path, sizeof path, "%.79s" TS_NOTIFY_SOCKET_SUFFIX, w->socket);
    int fd = ts_store_connect(path, SOCK_DGRAM);
    assert_true(fd >= 0);
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    do
        assert_int_equal(poll(&p, 1, -1), 1);
    while (ts_store_send(fd, text, passed) == EAGAIN);
    close(fd);
}

/* The supervisor's descriptors when it has done all that it was asked before. */
static uint32_t settled_fds(world *w)
{
    ASK("barrier", "done"); /* it has read all, and is about to close the barrier's pipe */
    kill(w->supervisor, SIGHUP);
    assert_string_equal(hear(w), "hangup");
    return open_fds(w->supervisor);
}

static void garbage_and_strangers_change_nothing(void **state)
{
    static const char *const garbage[] = {
        "raw 0 ", /* empty */
        "raw 0 \n\n",
        "raw 0 FDSTORE",
        "raw 0 =1",
        "raw 0 FDSTORE=1\nFDNAME=x", /* no descriptor */
        "raw 1 FDSTORE=1",           /* no name */
        "raw 2 FDSTORE=1\nFDNAME=x", /* two descriptors */
        "raw 8 FDSTORE=1\nFDNAME=x", /* more than are received */
        "raw 1 FDSTORE=2\nFDNAME=x",
        "raw 1 FDSTORE=1\nFDNAME=X", /* not a name */
        "raw 1 FDSTORE=1\nFDNAME=a:b",
        "raw 1 FDSTORE=1\nFDNAME=abcdefghijklmnopqrstuvwxyz1234567", /* 33 */
        "raw 1 FDSTORE=1\nFDNAME=x\nFDNAME=y",
        "raw 1 FDSTORE=1\nFDNAME=x\nFDPOLL=1",
        "raw 1 FDSTORE=1\nFDNAME=x\nBARRIER=1",
        "raw 0 FDSTOREREMOVE=1\nFDNAME=x\nBARRIER=1",
        "raw 1 FDSTOREREMOVE=1\nFDNAME=a",
        "raw 0 FDSTOREREMOVE=1",
        "raw 0 FDSTOREREMOVE=1\nFDNAME=unknown",
        "raw 0 BARRIER=1",
        "raw 1 STATUS=with a descriptor",
        "raw 0 STOPPING=1\nEXIT_STATUS=256",
        "raw 1 FDSTORE=1\nFDNAME=a", /* taken */
        "raw 1 BARRIER=1",           /* of a blocking descriptor: just closed */
    };
    world world, *w = &world;
    char path[96], message[TS_STORE_MESSAGE_BYTES + 64];
    struct stat st;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    ASK("put a kept", "ok");
    const uint32_t fds = settled_fds(w);
    for (size_t i = 0; i < sizeof garbage / sizeof *garbage; i++)
        ASK(garbage[i], "sent");
    snprintf(message, sizeof message, "raw 1 FDSTORE=1\nFDNAME=x\nSTATUS=");
    memset(message + strlen(message), 'x', sizeof message - strlen(message) - 1);
    message[sizeof message - 1] = '\0';
    ASK(message, "sent");
    int memfd = memfd_create("a stranger's", MFD_CLOEXEC);
    send_as_stranger(w, "FDSTORE=1\nFDNAME=stranger", memfd);
    send_as_stranger(w, "FDSTOREREMOVE=1\nFDNAME=a", -1);
    send_as_stranger(w, "STOPPING=1", -1);
    close(memfd);
    assert_int_equal(settled_fds(w), fds);
    say(w, "die 9");
    meet(w);
    ASK("names", "1 a");
    ASK("read a", "kept");
    static const char *const own[] = {TS_NOTIFY_SOCKET_SUFFIX, TS_STORE_SOCKET_SUFFIX};
    for (size_t i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%.79s%s", w->socket, own[i]);
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0600);
    }
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void a_second_supervisor_is_refused(void **state)
{
    world world, *w = &world;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    const pid_t first = w->supervisor;
    start_supervisor(w, &plain);
    await_line(w, "another supervisor serves this socket");
    assert_int_equal(await_end(w), 99);
    w->supervisor = first;
    ASK("put a b", "ok");
    ASK("barrier", "done");
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void a_daemon_that_dies_young_waits_longer_each_time(void **state)
{
    const ways how = {.stable_ms = "3600000", .kill_after_ms = "0", .adopt_ms = "0"};
    static const char *const delays[] = {"again in 10 ms", "again in 20 ms", "again in 40 ms"};
    world world, *w = &world;
    (void)state;
    world_make(w);
    start_supervisor(w, &how);
    for (size_t i = 0; i < 3; i++) {
        meet(w);
        say(w, "exit 1");
        await_line(w, delays[i]);
    }
    meet(w);
    say(w, "exit 4"); /* it wants to be started again: no failure */
    await_line(w, ") ended: status 4. It is started again in 0 ms");
    meet(w);
    ASK("deaths", "4 status 4");
    say(w, "exit 1");
    await_line(w, ") died: status 1. It is started again in 10 ms");
    meet(w);
    kill(w->supervisor, SIGTERM);
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

static void listening_sockets_are_passed_on_to_each_daemon(void **state)
{
    world world, *w = &world;
    ways how = plain;
    (void)state;
    how.passed = true;
    world_make(w);
    start_supervisor(w, &how);
    meet(w);
    ASK("put a b", "ok");
    for (int i = 0; i < 2; i++) {
        ASK("listening tinyserved.socket", "1");
        ASK("listening tinyserved.socket", "-1");
        ASK("remove tinyserved.socket", "TS_ENOENT");
        ASK("barrier", "done");
        say(w, "die 9");
        meet(w);
        ASK("names", "1 a");
    }
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

/* Where each start takes long, fewer do: the plain build is what counts descriptors. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DEATHS 50
#else
#define DEATHS 1000
#endif

static void a_thousand_deaths_leak_no_descriptor(void **state)
{
    world world, *w = &world;
    uint32_t supervisors = 0;
    char daemons[32] = "", deaths[32];
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    for (int i = 0; i < 8; i++) {
        char order[32];
        snprintf(order, sizeof order, "put kept.%d it", i);
        ASK(order, "ok");
    }
    ASK("barrier", "done");
    for (int i = 0; i < DEATHS; i++) {
        kill(w->daemon, SIGKILL);
        meet(w);
        if (i == 0) {
            supervisors = open_fds(w->supervisor);
            snprintf(daemons, sizeof daemons, "%.31s", ask(w, "fds"));
        }
    }
    snprintf(deaths, sizeof deaths, "%d signal 9", DEATHS);
    ASK("deaths", deaths);
    assert_int_equal(open_fds(w->supervisor), supervisors);
    ASK("fds", daemons);
    ASK("read kept.7", "it");
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_daemon_that_dies_in_any_way_is_followed_by_one_that_finds_all),
        cmocka_unit_test(ends_before_a_daemon_serves_do_not_hide_the_end_of_the_one_that_did),
        cmocka_unit_test(what_a_daemon_sent_before_its_death_is_not_lost),
        cmocka_unit_test(descriptors_keep_their_names_whatever_their_numbers),
        cmocka_unit_test(told_to_end_it_ends_both_and_has_the_daemons_status),
        cmocka_unit_test(a_signal_that_comes_early_waits_for_the_daemon),
        cmocka_unit_test(a_second_order_to_end_kills_a_daemon_that_does_not),
        cmocka_unit_test(what_the_daemon_tells_goes_upward_and_its_orders_do_not),
        cmocka_unit_test(garbage_and_strangers_change_nothing),
        cmocka_unit_test(a_second_supervisor_is_refused),
        cmocka_unit_test(a_daemon_that_dies_young_waits_longer_each_time),
        cmocka_unit_test(listening_sockets_are_passed_on_to_each_daemon),
        cmocka_unit_test(a_thousand_deaths_leak_no_descriptor),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
