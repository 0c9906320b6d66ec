/* The store's side that is in the daemon, with the test itself as its holder. */
#define _GNU_SOURCE
#include "store_util.h"

#define PUT(s, name, fd) ts_store_put(s, name, fd, h.why, sizeof h.why)

/* What a barrier answers while nobody reads: asked by a thread. */
typedef struct asked {
    pthread_t thread;
    ts_store *store;
    bool done;
} asked;

static void *ask_barrier(void *arg)
{
    asked *a = arg;
    a->done = ts_store_barrier(a->store, UINT32_MAX);
    return NULL;
}

static void barrier_begin(asked *a, ts_store *s)
{
    a->store = s;
    assert_int_equal(pthread_create(&a->thread, NULL, ask_barrier, a), 0);
}

static bool barrier_answer(asked *a)
{
    assert_int_equal(pthread_join(a->thread, NULL), 0);
    return a->done;
}

/* The barrier's pipe, which the holder has from then on. */
static int next_barrier(int socket)
{
    ts_store_datagram d;
    next(socket, &d);
    assert_string_equal(d.text, "BARRIER=1");
    assert_true(d.fd >= 0);
    return d.fd;
}

static void not_called(void *arg, const char *name)
{
    (void)arg;
    fail_msg("%s is found", name);
}

static void without_a_holder_calls_do_nothing_and_say_so(void **state)
{
    static const char *const environments[][2] = {{"NOTIFY_SOCKET", "/nowhere"},
                                                  {"FDSTORE", "16"},
                                                  {"FDSTORE", "0"},
                                                  {"TINYSERVE_FDSTORE", "many"},
                                                  {"FDSTORE", "-1"}};
    holder h;
    (void)state;
    for (size_t i = 0; i < 1 + sizeof environments / sizeof *environments; i++) {
        if (i > 0)
            setenv(environments[i - 1][0], environments[i - 1][1], 1);
        if (i > 2)
            setenv("NOTIFY_SOCKET", "/nowhere", 1);
        ts_store *s = ts_store_open();
        assert_non_null(s);
        for (int j = 0; j < 2; j++, s = NULL) { /* a NULL is no store, either */
            assert_false(ts_store_holds(s));
            assert_int_equal(ts_store_fds_max(s), 0);
            assert_int_equal(ts_store_take(s, "a"), -1);
            ts_store_each(s, not_called, NULL);
            assert_int_equal(PUT(s, "a", 0), TS_ECONN);
            assert_string_equal(h.why, "'a' isn't stored: there is no store");
            assert_int_equal(ts_store_remove(s, "a"), TS_ECONN);
            assert_false(ts_store_barrier(s, UINT32_MAX));
            ts_store_on_change(s, NULL, NULL);
            ts_store_close(s);
        }
        unsetenv("NOTIFY_SOCKET");
        assert_null(getenv("FDSTORE"));
        assert_null(getenv("TINYSERVE_FDSTORE"));
    }
}

static void puts_removes_and_barriers_come_in_order(void **state)
{
    static const char *const variables[] = {"FDSTORE", "TINYSERVE_FDSTORE"};
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        holder h;
        asked a;
        holder_make(&h, variables[i], "16");
        ts_store *s = ts_store_open();
        assert_true(ts_store_holds(s));
        assert_int_equal(ts_store_fds_max(s), 16);
        int one = make_fd("1"), two = make_fd("22");
        assert_int_equal(PUT(s, "pool.1.2", one), TS_OK);
        assert_int_equal(PUT(s, "b", two), TS_OK);
        expect_fd(h.socket, "FDSTORE=1\nFDNAME=pool.1.2\nFDPOLL=0", one);
        expect_fd(h.socket, "FDSTORE=1\nFDNAME=b\nFDPOLL=0", two);
        assert_int_equal(PUT(s, "b", one), TS_EEXIST);
        assert_string_equal(h.why, "a descriptor is stored under 'b' already");
        assert_int_equal(ts_store_remove(s, "b"), TS_OK);
        assert_int_equal(ts_store_remove(s, "b"), TS_ENOENT);
        assert_int_equal(PUT(s, "b", one), TS_OK);
        barrier_begin(&a, s);
        expect(h.socket, "FDSTOREREMOVE=1\nFDNAME=b");
        expect_fd(h.socket, "FDSTORE=1\nFDNAME=b\nFDPOLL=0", one);
        close(next_barrier(h.socket)); /* so answers systemd */
        assert_true(barrier_answer(&a));
        assert_int_equal(ts_store_take(s, "b"), -1); /* of this daemon's making */
        assert_int_equal(PUT(s, "closed", -1), TS_EINVAL);
        assert_int_equal(fcntl(one, F_GETFD), FD_CLOEXEC); /* still ours */
        close(one);
        close(two);
        ts_store_close(s);
        holder_end(&h);
    }
}

static void names_are_short_and_plain(void **state)
{
    static const char *const wrong[] = {"",
                                        "A",
                                        "a b",
                                        "a:b",
                                        "a/b",
                                        "a\n",
                                        "a_b",
                                        "\xc3",
                                        "s.socket",
                                        ".socket",
                                        "123456789012345678901234567890123"};
    static const char *const right[] = {
        "a", ".", "0", "socket", "sockets.socket.1", "12345678901234567890123456789012"};
    holder h;
    (void)state;
    holder_make(&h, "FDSTORE", "16");
    ts_store *s = ts_store_open();
    int fd = make_fd("");
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(PUT(s, wrong[i], fd), TS_EINVAL);
        assert_non_null(strstr(h.why, "is no name of a stored descriptor: 1 to 32 of"));
        assert_int_equal(ts_store_remove(s, wrong[i]), TS_ENOENT);
    }
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) {
        char text[96];
        assert_int_equal(PUT(s, right[i], fd), TS_OK);
        snprintf(text, sizeof text, "FDSTORE=1\nFDNAME=%s\nFDPOLL=0", right[i]);
        expect_fd(h.socket, text, fd);
    }
    close(fd);
    ts_store_close(s);
    holder_end(&h);
}

static void a_full_socket_blocks_nobody_and_loses_nothing(void **state)
{
    enum { MANY = 700 }; /* more than a socket takes (net.unix.max_dgram_qlen) and than is read */
    holder h;
    asked a;
    char text[96];
    (void)state;
    holder_make(&h, "FDSTORE", "1000");
    ts_store *s = ts_store_open();
    int fd = make_fd("");
    for (int i = 0; i < MANY; i++) {
        snprintf(text, sizeof text, "n.%d", i);
        assert_int_equal(PUT(s, text, fd), TS_OK);
    }
    assert_false(ts_store_lags(s));
    assert_false(ts_store_barrier(s, 0)); /* and is forgotten */
    assert_true(ts_store_lags(s));
    barrier_begin(&a, s);
    for (int i = 0; i < MANY; i++) {
        snprintf(text, sizeof text, "FDSTORE=1\nFDNAME=n.%d\nFDPOLL=0", i);
        expect_fd(h.socket, text, fd);
    }
    close(next_barrier(h.socket));
    assert_true(barrier_answer(&a));
    assert_false(ts_store_lags(s));
    close(fd);
    ts_store_close(s);
    holder_end(&h);
}

static void what_was_never_sent_needs_no_removal(void **state)
{
    holder h;
    asked a;
    char text[96];
    int n = 0;
    ts_store_datagram d;
    (void)state;
    holder_make(&h, "FDSTORE", "1000");
    ts_store *s = ts_store_open();
    int fd = make_fd("");
    for (; n < 700; n++) { /* the last ones are not sent, since nobody reads */
        snprintf(text, sizeof text, "n.%d", n);
        assert_int_equal(PUT(s, text, fd), TS_OK);
    }
    expect_fd(h.socket, "FDSTORE=1\nFDNAME=n.0\nFDPOLL=0", fd); /* this one was sent */
    assert_int_equal(ts_store_remove(s, "n.699"), TS_OK);
    assert_int_equal(ts_store_remove(s, "n.0"), TS_OK);
    barrier_begin(&a, s);
    bool removed = false;
    for (next(h.socket, &d); strcmp(d.text, "BARRIER=1") != 0; next(h.socket, &d)) {
        assert_null(strstr(d.text, "n.699"));
        removed = removed || strcmp(d.text, "FDSTOREREMOVE=1\nFDNAME=n.0") == 0;
        if (d.fd >= 0)
            close(d.fd);
    }
    close(d.fd);
    assert_true(removed);
    assert_true(barrier_answer(&a));
    close(fd);
    ts_store_close(s);
    holder_end(&h);
}

/* Reads everything until it is told to end, and answers barriers as systemd does. */
static void *read_all(void *arg)
{
    const int *sockets = arg; /* the holder's, and what ends it */
    struct pollfd p[] = {{.fd = sockets[0], .events = POLLIN},
                         {.fd = sockets[1], .events = POLLIN}};
    ts_store_datagram d;
    for (;;) {
        (void)poll(p, 2, -1);
        while (ts_store_receive(sockets[0], &d) > 0)
            if (d.fd >= 0)
                close(d.fd);
        if (p[1].revents != 0)
            return NULL;
    }
}

static void ceilings_refuse_with_numbers(void **state)
{
    holder h;
    pthread_t thread;
    char name[64], expected[160];
    (void)state;
    holder_make(&h, "FDSTORE", "3");
    ts_store *s = ts_store_open();
    int fd = make_fd("");
    for (int i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "n.%d", i);
        assert_int_equal(PUT(s, name, fd), TS_OK);
    }
    assert_int_equal(PUT(s, "n.3", fd), TS_ENOSPC);
    assert_string_equal(h.why, "'n.3' can't be stored: the holder takes 3 descriptors, and has 3 "
                               "(FileDescriptorStoreMax= of the unit)");
    assert_int_equal(ts_store_remove(s, "n.1"), TS_OK); /* and there is room */
    assert_int_equal(PUT(s, "n.3", fd), TS_OK);
    assert_int_equal(PUT(s, "n.4", fd), TS_ENOSPC);
    ts_store_close(s);
    holder_end(&h);

    holder_make(&h, "FDSTORE", "5");
    s = ts_store_open();
    ts_store_reserve(s, 2);
    for (int i = 0; i < 5; i++) {
        snprintf(name, sizeof name, "n.%d", i);
        assert_int_equal(i < 3 ? PUT(s, name, fd)
                               : ts_store_put_reserved(s, name, fd, h.why, sizeof h.why),
                         TS_OK);
        if (i != 2)
            continue;
        assert_int_equal(PUT(s, "n.9", fd), TS_ENOSPC);
        assert_string_equal(h.why, "'n.9' can't be stored: the holder takes 5 descriptors, 2 of "
                                   "them for the daemon's books, and has 3 "
                                   "(FileDescriptorStoreMax= of the unit)");
    }
    assert_int_equal(ts_store_put_reserved(s, "n.5", fd, h.why, sizeof h.why), TS_ENOSPC);
    ts_store_close(s);
    holder_end(&h);

    holder_make(&h, "FDSTORE", "100000");
    s = ts_store_open();
    int sockets[] = {h.socket, eventfd(0, EFD_CLOEXEC)};
    assert_int_equal(pthread_create(&thread, NULL, read_all, sockets), 0);
    uint32_t n = 0;
    for (;; n++) {
        snprintf(name, sizeof name, "abcdefghijklmnopqrstuvwxy.%06u", n);
        if (PUT(s, name, fd) != TS_OK)
            break;
        if (n % 64 == 63) /* so that few are open at a time */
            assert_true(ts_store_barrier(s, UINT32_MAX));
    }
    assert_int_equal(n, 3939); /* 33 bytes each */
    snprintf(expected, sizeof expected,
             "'%s' can't be stored: the names of 3939 descriptors have 129987 bytes, and 130000 "
             "are the most",
             name);
    assert_string_equal(h.why, expected);
    assert_int_equal(PUT(s, "just.enough", fd), TS_OK); /* 12 and the 129987 are 129999 */
    assert_int_equal(PUT(s, "a", fd), TS_ENOSPC);
    assert_int_equal(ts_store_remove(s, "just.enough"), TS_OK);
    assert_int_equal(PUT(s, "just.enough1", fd), TS_OK);
    ts_store_close(s);
    assert_int_equal(eventfd_write(sockets[1], 1), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    close(sockets[1]);
    close(fd);
    holder_end(&h);
}

/* What the store told of its holder. */
typedef struct told {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int times, holds;
} told;

static void on_change(void *arg, bool holds)
{
    told *t = arg;
    pthread_mutex_lock(&t->lock);
    t->times++;
    t->holds = holds;
    pthread_cond_signal(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

static bool await_change(told *t, int times)
{
    pthread_mutex_lock(&t->lock);
    while (t->times < times)
        pthread_cond_wait(&t->changed, &t->lock);
    const bool holds = t->holds;
    pthread_mutex_unlock(&t->lock);
    return holds;
}

#define TOLD_INIT                                                                                  \
    {                                                                                              \
        .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER                     \
    }

static void a_service_manager_that_is_gone_is_said_once(void **state)
{
    holder h;
    told t = TOLD_INIT;
    (void)state;
    holder_make(&h, "FDSTORE", "16");
    ts_store *s = ts_store_open();
    int fd = make_fd("");
    ts_store_on_change(s, on_change, &t);
    close(h.socket);
    h.socket = -1;
    assert_int_equal(PUT(s, "a", fd), TS_OK);
    assert_false(await_change(&t, 1));
    assert_false(ts_store_holds(s));
    assert_int_equal(ts_store_fds_max(s), 0);
    assert_int_equal(PUT(s, "b", fd), TS_ECONN);
    assert_string_equal(h.why, "'b' isn't stored: the store was lost");
    assert_false(ts_store_barrier(s, UINT32_MAX));
    close(fd);
    ts_store_close(s);
    assert_int_equal(t.times, 1);
    holder_end(&h);
}

static void a_supervisor_that_dies_answers_no_barrier(void **state)
{
    holder h;
    asked a;
    (void)state;
    holder_make_supervisor(&h, "16");
    ts_store *s = ts_store_open();
    barrier_begin(&a, s);
    int pipe = next_barrier(h.socket);
    assert_int_equal(write(pipe, "", 1), 1);
    close(pipe);
    assert_true(barrier_answer(&a));
    barrier_begin(&a, s);
    close(next_barrier(h.socket)); /* as its death does */
    assert_false(barrier_answer(&a));
    ts_store_close(s);
    holder_end(&h);
}

static int adopt(holder *h, const char *greeting)
{
    int fd = accept4(h->listener, NULL, NULL, SOCK_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(ts_store_send(fd, greeting, -1), 0);
    return fd;
}

static void await_close(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    ts_store_datagram d;
    assert_int_equal(poll(&p, 1, -1), 1);
    assert_true(ts_store_receive(fd, &d) <= 0);
    close(fd);
}

static void the_next_supervisor_gets_all_again(void **state)
{
    holder h;
    asked a;
    told t = TOLD_INIT;
    (void)state;
    holder_make_supervisor(&h, "16");
    ts_store *s = ts_store_open();
    assert_null(getenv(TS_ENV_SUPERVISOR));
    int one = make_fd("1"), two = make_fd("22"), three = make_fd("333");
    ts_store_on_change(s, on_change, &t);
    assert_int_equal(PUT(s, "one", one), TS_OK);
    assert_int_equal(PUT(s, "two", two), TS_OK);
    expect_fd(h.socket, "FDSTORE=1\nFDNAME=one\nFDPOLL=0", one);
    expect_fd(h.socket, "FDSTORE=1\nFDNAME=two\nFDPOLL=0", two);
    close(h.socket);
    h.socket = -1;
    assert_int_equal(PUT(s, "three", three), TS_OK);
    assert_false(await_change(&t, 1));
    assert_int_equal(ts_store_remove(s, "one"), TS_OK); /* while there is nobody to tell */
    assert_int_equal(PUT(s, "four", one), TS_OK);
    await_close(adopt(&h, "who are you?"));
    int next_one = adopt(&h, "FDSTORE=8");
    expect_fd(next_one, "FDSTORE=1\nFDNAME=two\nFDPOLL=0", two);
    expect_fd(next_one, "FDSTORE=1\nFDNAME=three\nFDPOLL=0", three);
    expect_fd(next_one, "FDSTORE=1\nFDNAME=four\nFDPOLL=0", one);
    assert_true(await_change(&t, 2));
    assert_int_equal(ts_store_fds_max(s), 8);
    barrier_begin(&a, s);
    int pipe = next_barrier(next_one);
    close(next_one); /* it dies in its turn: at once, not at the next message */
    assert_false(await_change(&t, 3));
    close(pipe);
    assert_false(barrier_answer(&a));
    next_one = adopt(&h, "FDSTORE=8");
    expect_fd(next_one, "FDSTORE=1\nFDNAME=two\nFDPOLL=0", two);
    expect_fd(next_one, "FDSTORE=1\nFDNAME=three\nFDPOLL=0", three);
    expect_fd(next_one, "FDSTORE=1\nFDNAME=four\nFDPOLL=0", one);
    close(one);
    close(two);
    close(three);
    ts_store_close(s);
    await_close(next_one);
    holder_end(&h);
}

static void another_users_supervisor_is_told_nothing(void **state)
{
    holder h;
    told t = TOLD_INIT;
    (void)state;
    if (geteuid() != 0)
        skip();
    holder_make_supervisor(&h, "16");
    close(h.listener);
    (void)unlink(h.adopt);
    assert_int_equal(chmod(h.folder, 0777), 0);
    assert_int_equal(seteuid(65534), 0);
    h.listener = listen_in(h.adopt, SOCK_SEQPACKET);
    assert_int_equal(seteuid(0), 0);
    ts_store *s = ts_store_open();
    int fd = make_fd("secret");
    ts_store_on_change(s, on_change, &t);
    close(h.socket);
    h.socket = -1;
    assert_int_equal(PUT(s, "a", fd), TS_OK);
    assert_false(await_change(&t, 1));
    int connection = accept4(h.listener, NULL, NULL, SOCK_CLOEXEC);
    assert_true(connection >= 0);
    await_close(connection);
    assert_false(ts_store_holds(s));
    close(fd);
    ts_store_close(s);
    assert_int_equal(t.times, 1);
    holder_end(&h);
}

/* In a process whose descriptors from 3 on are what it was given; 0, or the line of what is wrong.
 */
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            return __LINE__;                                                                       \
    } while (0)

typedef struct seen {
    ts_store *store;
    char names[128];
} seen;

static void see(void *arg, const char *name)
{
    seen *l = arg;
    strcat(strcat(l->names, " "), name);
    if (strcmp(name, "unknown.slab") == 0)
        (void)ts_store_remove(l->store, name);
}

static int find_passed(int socket)
{
    char text[8] = "";
    ts_store_datagram d;
    struct pollfd p = {.fd = socket, .events = POLLIN};
    seen l = {.names = ""};
    ts_store *s = l.store = ts_store_open();
    CHECK(s != NULL && ts_store_holds(s));
    CHECK(getenv("LISTEN_FDS") == NULL && getenv("LISTEN_PID") == NULL);
    CHECK(getenv("LISTEN_FDNAMES") == NULL && getenv("FDSTORE") == NULL);
    CHECK(getenv("NOTIFY_SOCKET") != NULL); /* for sd_notify */
    for (int fd = 3; fd < 8; fd++)
        CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
    int fd = ts_store_take(s, "slab");
    CHECK(fd == 3 && pread(fd, text, sizeof text, 0) == 3 && strcmp(text, "one") == 0);
    CHECK(ts_store_take(s, "slab") == -1);
    CHECK(ts_store_take(s, "tinyserved.socket") == 5); /* two of one name */
    CHECK(ts_store_take(s, "tinyserved.socket") == 7);
    CHECK(ts_store_take(s, "tinyserved.socket") == -1);
    ts_store_each(s, see, &l);
    CHECK(strcmp(l.names, " unknown.slab journal") == 0);
    CHECK(poll(&p, 1, -1) == 1 && ts_store_receive(socket, &d) == 1);
    CHECK(strcmp(d.text, "FDSTOREREMOVE=1\nFDNAME=unknown.slab") == 0);
    CHECK(fcntl(4, F_GETFD) == -1);
    CHECK(ts_store_take(s, "unknown.slab") == -1);
    ts_store_close(s);
    CHECK(fcntl(6, F_GETFD) == -1); /* nobody took it */
    CHECK(fcntl(3, F_GETFD) != -1); /* this is its taker's */
    return 0;
}

/* Five descriptors from 3 on, for this process or for another. */
static int be_started(const holder *h, bool for_us, const char *names)
{
    static const char *const texts[] = {"one", "two", "", "four", ""};
    char pid[16];
    const int socket = fcntl(h->socket, F_DUPFD, 20);
    for (int i = 0; i < 5; i++) {
        int fd = memfd_create("passed", 0);
        CHECK(fd >= 0 && write(fd, texts[i], strlen(texts[i])) == (ssize_t)strlen(texts[i]));
        const int far = fcntl(fd, F_DUPFD, 20 + 1);
        CHECK(far > 20 && dup2(far, 3 + i) == 3 + i);
        close(far);
        if (fd < 3 || fd > 7)
            close(fd);
    }
    snprintf(pid, sizeof pid, "%d", for_us ? (int)getpid() : 1);
    setenv("LISTEN_PID", pid, 1);
    setenv("LISTEN_FDS", "5", 1);
    setenv("LISTEN_FDNAMES", names, 1);
    if (for_us)
        return find_passed(socket);
    ts_store *s = ts_store_open(); /* what is another's stays as it is */
    CHECK(fcntl(3, F_GETFD) == 0 && ts_store_take(s, "slab") == -1);
    CHECK(getenv("LISTEN_FDS") == NULL);
    ts_store_close(s);
    CHECK(fcntl(3, F_GETFD) == 0);
    return 0;
}

static void descriptors_of_the_daemon_before_are_found_by_name(void **state)
{
    holder h;
    int status;
    (void)state;
    for (int i = 0; i < 2; i++) {
        holder_make(&h, "FDSTORE", "16");
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            const int line = be_started(
                &h, i == 0, "slab:unknown.slab:tinyserved.socket:journal:tinyserved.socket");
            if (line != 0)
                fprintf(stderr, "line %d\n", line);
            exit(line != 0);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
        holder_end(&h);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_a_holder_calls_do_nothing_and_say_so),
        cmocka_unit_test(puts_removes_and_barriers_come_in_order),
        cmocka_unit_test(names_are_short_and_plain),
        cmocka_unit_test(a_full_socket_blocks_nobody_and_loses_nothing),
        cmocka_unit_test(what_was_never_sent_needs_no_removal),
        cmocka_unit_test(ceilings_refuse_with_numbers),
        cmocka_unit_test(a_service_manager_that_is_gone_is_said_once),
        cmocka_unit_test(a_supervisor_that_dies_answers_no_barrier),
        cmocka_unit_test(the_next_supervisor_gets_all_again),
        cmocka_unit_test(another_users_supervisor_is_told_nothing),
        cmocka_unit_test(descriptors_of_the_daemon_before_are_found_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
