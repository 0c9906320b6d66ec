/* A supervisor that dies, and the next one. */
#define _GNU_SOURCE
#include "supervisor_util.h"

#include <sys/file.h>

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
    await_line(w, "already: it is taken over if it comes within 1 ms");
    await_line(w, "was not started by --supervise");
    assert_int_equal(await_end(w), 1);
    ASK("names", "0"); /* it is alive */
    say(w, "exit 4");
    assert_int_equal(waitpid(daemon, &status, 0), daemon);
    assert_int_equal(WEXITSTATUS(status), 4);
    world_end(w);
}

/* As a live daemon has it. */
static int take_lock(const world *w)
{
    char path[96];
    snprintf(path, sizeof path, "%.79s.lock", w->socket);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) != 0)
        _exit(99);
    return fd;
}

/* Connects to the supervisor as soon as it listens, and reads its greeting. */
static int come(const world *w)
{
    char path[96];
    ts_store_datagram d;
    int fd;
    snprintf(path, sizeof path, "%.79s" TS_STORE_SOCKET_SUFFIX, w->socket);
    do
        fd = ts_store_connect(path, SOCK_SEQPACKET);
    while (fd < 0);
    struct pollfd p = {.fd = fd, .events = POLLIN};
    if (poll(&p, 1, -1) != 1 || ts_store_receive(fd, &d) != 1 ||
        strcmp(d.text, "FDSTORE=4096") != 0)
        _exit(99);
    return fd;
}

/* Stops the supervisor, which is at the connection's other end; returns when it stands still. */
static void stop_supervisor(int connection)
{
    struct ucred peer;
    socklen_t length = sizeof peer;
    char path[64], stat[512], after = '?';
    if (getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0 ||
        kill(peer.pid, SIGSTOP) != 0)
        _exit(99);
    snprintf(path, sizeof path, "/proc/%d/stat", (int)peer.pid);
    while (after != 'T') {
        FILE *f = fopen(path, "r");
        if (f == NULL || fgets(stat, sizeof stat, f) == NULL)
            _exit(99);
        fclose(f);
        after = strrchr(stat, ')')[2];
    }
}

/* A daemon that comes, loses its connection, comes again and dies before it is heard. */
static _Noreturn void come_twice(const world *w)
{
    static const char *const texts[] = {"first", "second"};
    (void)take_lock(w);
    for (int i = 0; i < 2; i++) {
        int fd = come(w), memfd = memfd_create("again", MFD_CLOEXEC);
        if (i == 1)
            stop_supervisor(fd);
        if (write(memfd, texts[i], strlen(texts[i])) < 0 ||
            ts_store_send(fd, "FDSTORE=1\nFDNAME=a", memfd) != 0)
            _exit(99);
        close(memfd);
        close(fd);
    }
    _exit(0);
}

static void a_daemon_that_comes_again_is_asked_for_all_again(void **state)
{
    world world, *w = &world;
    (void)state;
    world_make(w);
    pid_t daemon = fork();
    if (daemon == 0) {
        const int lock = take_lock(w); /* before the supervisor looks */
        kill(getpid(), SIGSTOP);
        close(lock);
        come_twice(w);
    }
    int status;
    assert_int_equal(waitpid(daemon, &status, WUNTRACED), daemon);
    start_supervisor(w, &plain);
    kill(daemon, SIGCONT);
    assert_int_equal(waitpid(daemon, &status, 0), daemon);
    assert_int_equal(status, 0);
    kill(w->supervisor, SIGCONT);
    meet(w);
    ASK("deaths", "1 unknown");
    ASK("read a", "second");
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

/* One that had been waiting for a supervisor, while the one that there is had another daemon. */
static void a_live_daemon_is_adopted_after_a_childs_death(void **state)
{
    world world, *w = &world;
    int status;
    (void)state;
    world_make(w);
    start_supervisor(w, &plain);
    meet(w);
    ASK("put of.the.child b", "ok");
    ASK("barrier", "done");
    kill(w->supervisor, SIGSTOP);
    assert_int_equal(waitpid(w->supervisor, &status, WUNTRACED), w->supervisor);
    struct pollfd end = {.fd = (int)syscall(SYS_pidfd_open, w->daemon, 0), .events = POLLIN};
    say(w, "die 9");
    assert_int_equal(poll(&end, 1, -1), 1);
    close(end.fd);
    pid_t daemon = fork();
    if (daemon == 0) {
        (void)take_lock(w);
        kill(w->supervisor, SIGCONT);
        int fd = come(w), memfd = memfd_create("other", MFD_CLOEXEC);
        if (write(memfd, "its", 3) != 3 ||
            ts_store_send(fd, "FDSTORE=1\nFDNAME=of.another", memfd) != 0)
            _exit(99);
        _exit(0);
    }
    assert_int_equal(waitpid(daemon, &status, 0), daemon);
    assert_int_equal(status, 0);
    meet(w);
    ASK("deaths", "2 unknown");
    ASK("names", "1 of.another");
    ASK("read of.another", "its");
    say(w, "exit 0");
    assert_int_equal(await_end(w), 0);
    world_end(w);
}

/* Its socket can't be reached by others at all; were it, they would be refused. */
static void a_process_of_another_user_is_refused(void **state)
{
    world world, *w = &world;
    char path[96];
    (void)state;
    if (geteuid() != 0)
        skip();
    world_make(w);
    int lock = take_lock(w);
    start_supervisor(w, &plain);
    snprintf(path, sizeof path, "%.79s" TS_STORE_SOCKET_SUFFIX, w->socket);
    assert_int_equal(chmod(w->folder, 0755), 0);
    int fd;
    while (chmod(path, 0666) != 0) /* until it is there */
        assert_int_equal(errno, ENOENT);
    assert_int_equal(seteuid(65534), 0);
    do
        fd = ts_store_connect(path, SOCK_SEQPACKET);
    while (fd < 0);
    assert_int_equal(seteuid(0), 0);
    await_line(w, "a process that isn't this user's daemon is refused");
    ts_store_datagram d;
    struct pollfd p = {.fd = fd, .events = POLLIN};
    assert_int_equal(poll(&p, 1, -1), 1);
    assert_int_equal(ts_store_receive(fd, &d), 0);
    close(fd);
    close(lock); /* now nobody serves: a daemon is started */
    meet(w);
    ASK("names", "0");
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_daemon_outlives_its_supervisor_and_the_next_one_adopts_it),
        cmocka_unit_test(an_adopted_daemon_is_ended_as_a_child_is),
        cmocka_unit_test(a_daemon_that_was_not_supervised_is_left_alone),
        cmocka_unit_test(a_daemon_that_comes_again_is_asked_for_all_again),
        cmocka_unit_test(a_live_daemon_is_adopted_after_a_childs_death),
        cmocka_unit_test(a_process_of_another_user_is_refused),
        cmocka_unit_test(as_many_as_fit_come_back),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
