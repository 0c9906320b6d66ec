/* The supervisor, with a program in the daemon's place that dies as it is told
 * (supervised_daemon.c). Nothing waits but for events: a connection, an answer, an end, a line of
 * the log. */
#define _GNU_SOURCE
#include "test_util.h"

#include "store_wire.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define WATCHDOG_SECONDS 120

/* A folder, the supervisor in it, and the daemon of the moment. */
typedef struct world {
    char folder[64], socket[80], control_path[80];
    int listener; /* daemons come here */
    pid_t supervisor, daemon;
    int log;     /* the supervisor's stderr */
    int control; /* to the daemon */
    char answer[4096];
} world;

/* How the supervisor is started. */
typedef struct ways {
    const char *stable_ms, *kill_after_ms, *adopt_ms;
    const char *notify; /* its own NOTIFY_SOCKET */
    bool passed;        /* a listening socket comes with it */
} ways;

static const ways plain = {.stable_ms = "0", .kill_after_ms = "10000", .adopt_ms = "60000"};

static int listen_in(const char *path, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    if (type != SOCK_DGRAM)
        assert_int_equal(listen(fd, 8), 0);
    return fd;
}

static void world_make(world *w)
{
    *w = (world){.control = -1, .log = -1};
    strcpy(w->folder, "/tmp/tinyserve-supervisor.XXXXXX");
    assert_non_null(mkdtemp(w->folder));
    snprintf(w->socket, sizeof w->socket, "%s/s", w->folder);
    snprintf(w->control_path, sizeof w->control_path, "%s/control", w->folder);
    w->listener = listen_in(w->control_path, SOCK_SEQPACKET);
    alarm(WATCHDOG_SECONDS);
}

static void become_supervisor(const world *w, const ways *how)
{
    if (how->notify != NULL)
        setenv("NOTIFY_SOCKET", how->notify, 1);
    if (how->passed) {
        char pid[16], path[96];
        snprintf(pid, sizeof pid, "%d", (int)getpid());
        snprintf(path, sizeof path, "%s/passed", w->folder);
        int fd = listen_in(path, SOCK_STREAM);
        if (fd == 3 || dup2(fd, 3) != 3)
            _exit(99);
        setenv("LISTEN_PID", pid, 1);
        setenv("LISTEN_FDS", "1", 1);
        setenv("LISTEN_FDNAMES", "tinyserved.socket", 1);
    }
    execl(TS_FAKE_DAEMON, TS_FAKE_DAEMON, "--supervise", how->stable_ms, how->kill_after_ms,
          how->adopt_ms, w->socket, w->control_path, NULL);
    _exit(99);
}

static void start_supervisor(world *w, const ways *how)
{
    int pipes[2];
    if (w->log >= 0)
        close(w->log);
    assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
    w->supervisor = fork();
    assert_true(w->supervisor >= 0);
    if (w->supervisor == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* then its daemon sees the control's end */
        dup2(pipes[1], STDERR_FILENO);
        become_supervisor(w, how);
    }
    close(pipes[1]);
    w->log = pipes[0];
}

static const char *hear(world *w)
{
    ssize_t n = recv(w->control, w->answer, sizeof w->answer - 1, 0);
    assert_true(n > 0);
    w->answer[n] = '\0';
    return w->answer;
}

static void say(const world *w, const char *order)
{
    assert_int_equal(send(w->control, order, strlen(order), 0), (ssize_t)strlen(order));
}

static const char *ask(world *w, const char *order)
{
    say(w, order);
    return hear(w);
}

#define ASK(order, answer) assert_string_equal(ask(w, order), answer)

/* The next daemon comes. */
static void meet(world *w)
{
    int pid;
    if (w->control >= 0)
        close(w->control);
    w->control = accept4(w->listener, NULL, NULL, SOCK_CLOEXEC);
    assert_true(w->control >= 0);
    assert_int_equal(sscanf(hear(w), "started %d", &pid), 1);
    w->daemon = pid;
}

/* The supervisor ends by itself. */
static int await_end(world *w)
{
    int status;
    assert_int_equal(waitpid(w->supervisor, &status, 0), w->supervisor);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* Reads the log until a line has this. */
static void await_line(const world *w, const char *part)
{
    char line[1024];
    size_t n = 0;
    for (;;) {
        assert_int_equal(read(w->log, line + n, 1), 1);
        if (line[n] != '\n' && n + 2 < sizeof line) {
            n++;
            continue;
        }
        line[n] = '\0';
        if (strstr(line, part) != NULL)
            return;
        n = 0;
    }
}

static void world_end(world *w)
{
    char path[128];
    static const char *const left[] = {"s.lock", "s.store.lock", "control", "passed", "notify"};
    close(w->control);
    close(w->listener);
    close(w->log);
    for (size_t i = 0; i < sizeof left / sizeof *left; i++) {
        snprintf(path, sizeof path, "%s/%s", w->folder, left[i]);
        (void)unlink(path);
    }
    assert_int_equal(rmdir(w->folder), 0); /* the supervisor has removed its sockets */
    alarm(0);
}

static uint32_t open_fds(pid_t pid)
{
    char path[64];
    uint32_t n = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *folder = opendir(path);
    assert_non_null(folder);
    while (readdir(folder) != NULL)
        n++;
    closedir(folder);
    return n - 2;
}

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
    ASK("barrier", "done");
    const uint32_t fds = open_fds(w->supervisor);
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
    ASK("barrier", "done"); /* all of it has been read */
    assert_int_equal(open_fds(w->supervisor), fds);
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
        execl(TS_FAKE_DAEMON, TS_FAKE_DAEMON, w->socket, w->control_path, NULL);
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

static void a_second_supervisor_is_refused(void **state)
{
    world world, *w = &world;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    const pid_t first = w->supervisor;
    start_supervisor(w, &plain);
    await_line(w, "another tinyserved serves this socket");
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

static void a_thousand_deaths_leak_no_descriptor(void **state)
{
    world world, *w = &world;
    uint32_t supervisors = 0;
    char daemons[32] = "";
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
    for (int i = 0; i < 1000; i++) {
        kill(w->daemon, SIGKILL);
        meet(w);
        if (i == 0) {
            supervisors = open_fds(w->supervisor);
            snprintf(daemons, sizeof daemons, "%s", ask(w, "fds"));
        }
    }
    ASK("deaths", "1000 signal 9");
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
        cmocka_unit_test(told_to_end_it_ends_both_and_has_the_daemons_status),
        cmocka_unit_test(a_second_order_to_end_kills_a_daemon_that_does_not),
        cmocka_unit_test(what_the_daemon_tells_goes_upward_and_its_orders_do_not),
        cmocka_unit_test(garbage_and_strangers_change_nothing),
        cmocka_unit_test(a_daemon_outlives_its_supervisor_and_the_next_one_adopts_it),
        cmocka_unit_test(an_adopted_daemon_is_ended_as_a_child_is),
        cmocka_unit_test(a_daemon_that_was_not_supervised_is_left_alone),
        cmocka_unit_test(a_second_supervisor_is_refused),
        cmocka_unit_test(a_daemon_that_dies_young_waits_longer_each_time),
        cmocka_unit_test(listening_sockets_are_passed_on_to_each_daemon),
        cmocka_unit_test(as_many_as_fit_come_back),
        cmocka_unit_test(a_thousand_deaths_leak_no_descriptor),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
