/* Clients that arrive and go no further, break off, read nothing or come in crowds: they harm
 * nobody else. */
#define _GNU_SOURCE
#include "raw_client.h"

#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pwd.h>

static void a_worker_works(const daemon_process *d)
{
    ts_client *c = connect_to(d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    uint32_t n = 3;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    memset(ts_step_q(step), 0, 3 * 2 * 64 * 4);
    for (uint32_t layer = 0; layer < 6; layer++)
        OK(ts_step_run(step, layer));
    OK(ts_step_commit(step, NULL));
    ts_pool_close(p);
    ts_disconnect(c);
}

static uint32_t descriptors(const daemon_process *d)
{
    char path[64];
    uint32_t n = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)d->pid);
    DIR *dir = opendir(path);
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

/* Waits until the daemon has `count` descriptors; the watchdog ends it if that never comes. */
static void await_descriptors(const daemon_process *d, uint32_t count)
{
    while (descriptors(d) != count)
        a_worker_works(d);
}

static const char *const impatient[] = {"--set", "idle_seconds=1", NULL};

static void a_message_of_a_gibibyte_ends_its_connection_and_nothing_else(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    int fd = raw_connect(&d);
    raw_greet(fd);
    /* type 1 (message), then the length, big-endian */
    static const unsigned char head[9] = {1, 0, 0, 0, 0, 0x40, 0, 0, 0};
    assert_int_equal(write(fd, head, 9), 9);
    static unsigned char zeros[1 << 16];
    size_t sent = 0;
    while (sent < (size_t)1 << 30) {
        ssize_t n = send(fd, zeros, sizeof zeros, MSG_NOSIGNAL);
        if (n <= 0)
            break;
        sent += (size_t)n;
    }
    assert_true(sent < (size_t)1 << 30); /* the daemon hung up instead of reading it */
    close(fd);
    a_worker_works(&d);
    daemon_stop(&d);
}

static void what_is_no_greeting_or_no_request_ends_its_connection(void **state)
{
    (void)state;
    static const struct {
        bool greet;
        unsigned char bytes[16];
        size_t size;
    } bad[] = {
        {false, "GET / HTTP/1.1\r", 8},
        {false, {0, 'S', 'P', 0, 0, 0x31, 0, 0}, 8},              /* another REP */
        {true, {2, 0, 0, 0, 0, 0, 0, 0, 8}, 9},                   /* no message */
        {true, {1, 0, 0, 0, 0, 0, 0, 0, 3}, 9},                   /* no room for an id */
        {true, {1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 9}, /* longer than memory */
        {true, {1, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 1}, 13},      /* an id that goes on */
    };
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        unsigned char byte[16];
        int fd = raw_connect(&d);
        if (bad[i].greet)
            raw_greet(fd);
        assert_int_equal(write(fd, bad[i].bytes, bad[i].size), bad[i].size);
        while (recv(fd, byte, sizeof byte, 0) > 0) /* until the daemon ends it */
            ;
        close(fd);
    }
    a_worker_works(&d);
    daemon_stop(&d);
}

static void requests_that_come_byte_by_byte_are_answered(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    int fd = raw_connect(&d);
    static const unsigned char hello[8] = {0, 'S', 'P', 0, 0, 0x30, 0, 0};
    for (size_t i = 0; i < sizeof hello; i++)
        assert_int_equal(write(fd, hello + i, 1), 1);
    unsigned char theirs[8];
    assert_int_equal(recv(fd, theirs, 8, MSG_WAITALL), 8);
    /* Two requests of request ids 1 and 2 for the status, each behind two hops. */
    static const unsigned char requests[] = {
        1, 0, 0, 0, 0, 0, 0, 0, 13, 0, 0, 0, 7, 0x80, 0, 0, 9, 8, 1, 0x8a, 1, 0,
        1, 0, 0, 0, 0, 0, 0, 0, 13, 0, 0, 0, 7, 0x80, 0, 0, 9, 8, 2, 0x8a, 1, 0};
    for (size_t i = 0; i < sizeof requests; i++)
        assert_int_equal(write(fd, requests + i, 1), 1);
    for (uint64_t id = 1; id <= 2; id++) {
        unsigned char head[17], body[4096];
        assert_int_equal(recv(fd, head, sizeof head, MSG_WAITALL), sizeof head);
        assert_memory_equal(head + 9, "\0\0\0\7\x80\0\0\x9", 8);
        size_t bytes = (size_t)head[7] << 8 | head[8];
        assert_int_equal(recv(fd, body, bytes - 8, MSG_WAITALL), bytes - 8);
        Tspb__Reply *reply = tspb__reply__unpack(NULL, bytes - 8, body);
        assert_non_null(reply);
        assert_int_equal(reply->status, TS_OK);
        assert_int_equal(reply->request_id, id);
        tspb__reply__free_unpacked(reply, NULL);
    }
    close(fd);
    daemon_stop(&d);
}

static void silent_connections_disturb_nobody_and_are_ended(void **state)
{
    (void)state;
    daemon_process d;
    enum { N = 400 };
    static int fds[N];
    daemon_start_with(&d, POOL_TINY ",blocks=16", impatient);
    a_worker_works(&d);
    uint32_t before = descriptors(&d);
    for (int i = 0; i < N; i++) {
        fds[i] = i % 4 == 0 ? raw_handles(&d) : raw_connect(&d);
        if (i % 4 >= 2) /* greets, and opens no session */
            raw_greet(fds[i]);
        if (i % 4 == 3) /* begins a message */
            assert_int_equal(write(fds[i], "\1\0\0", 3), 3);
    }
    a_worker_works(&d);
    for (int i = 0; i < N; i++) { /* the daemon ends all of them */
        char byte;
        while (recv(fds[i], &byte, 1, 0) > 0)
            ;
        close(fds[i]);
    }
    await_descriptors(&d, before);
    daemon_stop(&d);
}

/* Opens a session on a connection of its own, which is ended for being without one otherwise. */
static int raw_worker(const daemon_process *d)
{
    Tspb__SessionOpen open = TSPB__SESSION_OPEN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    int fd = raw_connect(d);
    raw_greet(fd);
    open.protocol = TS_PROTOCOL;
    open.program = ts_unconst("raw");
    request.request_id = 1;
    request.body_case = TSPB__REQUEST__BODY_SESSION_OPEN;
    request.session_open = &open;
    assert_true(raw_submit(fd, &request, 1));
    Tspb__Reply *reply = raw_answer(fd);
    assert_non_null(reply);
    assert_int_equal(reply->status, TS_OK);
    tspb__reply__free_unpacked(reply, NULL);
    return fd;
}

/* More half-sent messages than their user has room for: those that waited for room are ended as the
 * ones before them, and the room is there again. */
static void half_sent_messages_are_ended_also_after_they_waited_for_room(void **state)
{
    (void)state;
    daemon_process d;
    enum { N = 20 }; /* of 8 MiB each; 64 MiB may be in progress */
    int fds[N];
    daemon_start_with(&d, POOL_TINY ",blocks=16", impatient);
    for (int i = 0; i < N; i++)
        fds[i] = raw_worker(&d);
    for (int i = 0; i < N; i++) { /* every other one goes on with a byte */
        static const unsigned char head[10] = {1, 0, 0, 0, 0, 0, 0x80, 0, 0, 0};
        const ssize_t bytes = 9 + i % 2;
        assert_int_equal(send(fds[i], head, (size_t)bytes, MSG_NOSIGNAL), bytes);
    }
    for (int i = 0; i < N; i++) { /* the watchdog ends the test if the daemon doesn't end one */
        char byte;
        while (recv(fds[i], &byte, 1, 0) > 0)
            ;
        close(fds[i]);
    }
    a_worker_works(&d);
    daemon_stop(&d);
}

/* What the daemon says of itself is asked for, as request 1. */
static Tspb__Request status_request(void)
{
    static Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.request_id = 1;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    return request;
}

static void a_client_that_breaks_off_leaves_nothing(void **state)
{
    (void)state;
    daemon_process d;
    Tspb__Request request = status_request();
    daemon_start(&d, POOL_TINY ",blocks=16");
    a_worker_works(&d);
    uint32_t before = descriptors(&d);
    ts_client *c = connect_to(&d);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 300; i++) {
            int fd = raw_connect(&d);
            if (i % 3 > 0) /* else NNG 1.5's listener would be deaf */
                raw_greet(fd);
            if (i % 3 == 2) /* NNG 1.5 would never free another connection */
                for (uint32_t id = 1; id <= 40; id++) {
                    request.request_id = id;
                    (void)raw_submit(fd, &request, id);
                }
            close(fd);
        }
        a_worker_works(&d);
        check_daemon(c); /* a client that was connected stays so */
    }
    ts_disconnect(c);
    await_descriptors(&d, before);
    daemon_stop(&d);
}

static void another_version_is_told_both(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    int fd = raw_handles(&d);
    ts_handle_request request = raw_request(TS_HANDLE_EXCHANGE, 1);
    ts_handle_reply reply;
    request.protocol = 2;
    assert_int_equal(send(fd, &request, 48, 0), 48); /* as long as it was */
    assert_true(raw_reply(fd, &reply));
    assert_int_equal(reply.status, TS_EPROTO);
    assert_non_null(strstr(reply.message, "protocol version 2; tinyserved "));
    assert_false(raw_reply(fd, &reply));
    close(fd);
    daemon_stop(&d);
}

/* A request whose answer is some 60 KB. */
static Tspb__Request map_request(Tspb__PoolMap *map)
{
    Tspb__Request request = TSPB__REQUEST__INIT;
    tspb__pool_map__init(map);
    map->pool = (char *)"";
    map->cells = 8192;
    request.body_case = TSPB__REQUEST__BODY_POOL_MAP;
    request.pool_map = map;
    return request;
}

static void unread_answers_hold_nobody_up(void **state)
{
    (void)state;
    daemon_process d;
    enum { N = 40 };
    static int fds[N];
    Tspb__PoolMap map;
    Tspb__Request request = map_request(&map);
    daemon_start_with(&d, POOL_TINY ",blocks=10000", impatient);
    a_worker_works(&d);
    uint32_t before = descriptors(&d);
    for (int i = 0; i < N; i++) {
        fds[i] = raw_connect(&d);
        raw_greet(fds[i]);
        for (uint32_t id = 1; id <= 400; id++) {
            request.request_id = id;
            if (!raw_submit(fds[i], &request, id))
                break;
        }
    }
    for (int i = 0; i < 20; i++)
        a_worker_works(&d);
    await_descriptors(&d, before); /* the daemon ends what doesn't read */
    for (int i = 0; i < N; i++)
        close(fds[i]);
    daemon_stop(&d);
}

static void a_client_that_reads_late_gets_every_answer(void **state)
{
    (void)state;
    daemon_process d;
    enum { N = 120 };
    bool seen[N + 1] = {false};
    Tspb__PoolMap map;
    Tspb__Request request = map_request(&map);
    daemon_start(&d, POOL_TINY ",blocks=10000");
    int fd = raw_connect(&d);
    raw_greet(fd);
    for (uint32_t id = 1; id <= N; id++) { /* not read on while TS_PEER_REQUESTS are in progress */
        request.request_id = id;
        assert_true(raw_submit(fd, &request, id));
    }
    for (int i = 0; i < N; i++) {
        Tspb__Reply *reply = raw_answer(fd);
        assert_non_null(reply);
        assert_int_equal(reply->status, TS_OK);
        assert_in_range(reply->request_id, 1, N);
        assert_false(seen[reply->request_id]);
        seen[reply->request_id] = true;
        tspb__reply__free_unpacked(reply, NULL);
    }
    close(fd);
    daemon_stop(&d);
}

/* The rest needs a user who is no operator. */
static const struct passwd *a_user(void)
{
    const struct passwd *nobody = getpwnam("nobody");
    return geteuid() == 0 ? nobody : NULL;
}

static void a_users_connections_are_limited_and_operators_get_in(void **state)
{
    (void)state;
    daemon_process d;
    int fds[4];
    const struct passwd *user = a_user();
    if (user == NULL)
        skip();
    daemon_start_with(
        &d, POOL_TINY ",blocks=16",
        (const char *const[]){"--set", "socket_mode=0666", "--set", "tenant_connections=4", NULL});
    char expected[128];
    snprintf(expected, sizeof expected,
             "uid %u has 4 connections; the limit is 4 (tenant_connections)", user->pw_uid);
    assert_int_equal(seteuid(user->pw_uid), 0);
    for (int i = 0; i < 4; i++) {
        fds[i] = raw_connect(&d);
        raw_greet(fds[i]); /* it is in */
    }
    ts_client *c;
    assert_int_equal(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url}, &c),
                     TS_EQUOTA);
    assert_string_equal(ts_error(c), expected);
    ts_disconnect(c);
    assert_int_equal(seteuid(0), 0);
    a_worker_works(&d);
    for (int i = 0; i < 4; i++)
        close(fds[i]);
    /* The handle socket has a limit of its own. */
    ts_handle_reply reply;
    assert_int_equal(seteuid(user->pw_uid), 0);
    int handles[5];
    for (int i = 0; i < 5; i++)
        handles[i] = raw_handles(&d);
    assert_true(raw_reply(handles[4], &reply));
    assert_int_equal(reply.status, TS_EQUOTA);
    assert_int_equal(reply.tag, 0);
    assert_string_equal(reply.message, expected);
    assert_int_equal(seteuid(0), 0);
    for (int i = 0; i < 5; i++)
        close(handles[i]);
    daemon_stop(&d);
}

static void a_crowd_leaves_descriptors_for_operators(void **state)
{
    (void)state;
    daemon_process d;
    enum { N = 60 };
    int fds[N], turned_away = 0;
    const struct passwd *user = a_user();
    if (user == NULL)
        skip();
    char script[] = "/tmp/tinyserve-few.XXXXXX";
    int fd = mkstemp(script);
    assert_true(fd >= 0);
    dprintf(fd, "#!/bin/sh\nulimit -n 448\nexec %s \"$@\"\n", daemon_path());
    assert_int_equal(fchmod(fd, 0755), 0);
    close(fd);
    const char *path = getenv("TS_TEST_DAEMON");
    setenv("TS_TEST_DAEMON", script, 1);
    daemon_start_with(&d, POOL_TINY ",blocks=16",
                      (const char *const[]){"--set", "socket_mode=0666", NULL});
    path == NULL ? unsetenv("TS_TEST_DAEMON") : setenv("TS_TEST_DAEMON", path, 1);
    unlink(script);
    Tspb__Request request = status_request();
    assert_int_equal(seteuid(user->pw_uid), 0);
    for (int i = 0; i < N; i++) {
        fds[i] = raw_connect(&d);
        raw_greet(fds[i]);
        assert_true(raw_submit(fds[i], &request, 1));
        Tspb__Reply *reply = raw_answer(fds[i]);
        assert_non_null(reply);
        turned_away += reply->status == TS_EQUOTA;
        tspb__reply__free_unpacked(reply, NULL);
    }
    assert_int_equal(seteuid(0), 0);
    assert_in_range(turned_away, 1, N - 1);
    a_worker_works(&d); /* as root */
    for (int i = 0; i < N; i++)
        close(fds[i]);
    daemon_stop(&d);
}

/* How many requests the daemon had taken when it answered this one. */
static uint64_t requests_taken(int fd)
{
    Tspb__Reply *reply = raw_answer(fd);
    assert_non_null(reply);
    assert_int_equal(reply->body_case, TSPB__REPLY__BODY_STATUS_REPLY);
    uint64_t requests = reply->status_reply->requests;
    tspb__reply__free_unpacked(reply, NULL);
    return requests;
}

static void users_have_their_turn_however_many_connections_one_has(void **state)
{
    (void)state;
    daemon_process d;
    enum { N = 100 };
    int fds[N];
    const struct passwd *user = a_user();
    if (user == NULL)
        skip();
    daemon_start_with(&d, POOL_TINY ",blocks=16",
                      (const char *const[]){"--set", "socket_mode=0666", NULL});
    Tspb__Request request = status_request();
    assert_int_equal(seteuid(user->pw_uid), 0);
    for (int i = 0; i < N; i++) {
        fds[i] = raw_connect(&d);
        raw_greet(fds[i]);
    }
    assert_int_equal(seteuid(0), 0);
    int own = raw_connect(&d);
    raw_greet(own);
    assert_true(raw_submit(own, &request, 1));
    uint64_t before = requests_taken(own);
    daemon_pause(&d);
    for (int i = 0; i < N; i++)
        assert_true(raw_submit(fds[i], &request, 1));
    request.request_id = 2;
    assert_true(raw_submit(own, &request, 2));
    daemon_resume(&d);
    assert_in_range(requests_taken(own) - before, 1, 9); /* its own, and two turns of the user's */
    for (int i = 0; i < N; i++) {
        (void)requests_taken(fds[i]); /* all are answered in the end */
        close(fds[i]);
    }
    close(own);
    daemon_stop(&d);
}

static void descriptors_that_nobody_receives_are_few(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *c = connect_to(&d);
    ts_handle_request request = raw_request(TS_HANDLE_SIGNALS, 1);
    ts_handle_reply reply;
    uint32_t answers = 0;
    request.session = c->session;
    memcpy(request.token, c->token, sizeof request.token);
    int fd = raw_handles(&d);
    daemon_pause(&d);
    for (int i = 0; i < 8; i++)
        assert_int_equal(send(fd, &request, sizeof request, 0), sizeof request);
    daemon_resume(&d);
    struct pollfd end = {.fd = fd, .events = POLLRDHUP};
    assert_int_equal(poll(&end, 1, -1), 1); /* the daemon ends the connection */
    for (ssize_t n; (n = recv(fd, &reply, sizeof reply, 0)) != 0;) {
        assert_true(n > 0 || errno == ECONNRESET); /* once: for what the daemon didn't read */
        answers += n > 0;
    }
    assert_int_equal(answers, 2);
    close(fd);
    fd = raw_handles(&d);
    for (int i = 0; i < 8; i++) { /* as many as it likes if it reads them */
        assert_int_equal(send(fd, &request, sizeof request, 0), sizeof request);
        assert_true(raw_reply(fd, &reply));
        assert_int_equal(reply.status, TS_OK);
    }
    close(fd);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* ---- descriptors that are passed ---- */

/* Sends descriptors to one of the two sockets; of the stream they come inside a message. */
static void pass(const daemon_process *d, bool handles, const int *fds, size_t num_fds)
{
    ts_handle_request request = raw_request(TS_HANDLE_TAKE_EXCHANGE, 1);
    int to = handles ? raw_handles(d) : raw_connect(d);
    if (!handles)
        assert_int_equal(send(to, "\0SP\0\0\x30\0\0", 8, 0), 8);
    if (!handles) {
        (void)raw_pass(to, "\1\0\0", 3, fds, num_fds);
    } else if (raw_pass(to, &request, sizeof request, fds, num_fds)) {
        assert_int_equal(send(to, "hello", 5, 0), 5); /* and some that the daemon never reads */
        (void)raw_pass(to, &request, sizeof request, fds, num_fds);
    }
    close(to);
}

static void what_is_passed_to_a_socket_is_closed(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    for (int handles = 0; handles < 2; handles++)
        for (size_t n = 1; n <= 2; n++) {
            int ends[2];
            char byte;
            assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
            pass(&d, handles, (int[]){ends[1], ends[1]}, n);
            close(ends[1]);
            assert_int_equal(read(ends[0], &byte, 1), 0); /* once nobody has it any more */
            close(ends[0]);
        }
    daemon_stop(&d);
}

/* One end of a TCP connection whose close waits for its peer, which never reads. */
static int lingering(int *peer)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    struct linger linger = {.l_onoff = 1, .l_linger = 100 * WATCHDOG_SECONDS};
    static const char zeros[1 << 16];
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(listener >= 0 && fd >= 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(listener, 1), 0);
    assert_int_equal(getsockname(listener, (struct sockaddr *)&address, &length), 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    *peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    assert_true(*peer >= 0);
    close(listener);
    while (send(fd, zeros, sizeof zeros, MSG_DONTWAIT) > 0)
        ;
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger), 0);
    return fd;
}

static void closing_what_is_passed_holds_nobody_up(void **state)
{
    (void)state;
    daemon_process d;
    int peers[4], n = 0;
    daemon_start(&d, POOL_TINY ",blocks=16");
    for (int handles = 0; handles < 2; handles++)
        for (size_t count = 1; count <= 2; count++) {
            int fd = lingering(&peers[n++]), go[2], status;
            char byte;
            assert_int_equal(pipe2(go, O_CLOEXEC), 0);
            pid_t pid = fork(); /* a process that ends never lingers: the daemon's close may */
            assert_true(pid >= 0);
            if (pid == 0) {
                close(go[1]);
                (void)!read(go[0], &byte, 1); /* until this process alone has the socket */
                pass(&d, handles, (int[]){STDERR_FILENO, fd} + 2 - count, count);
                _exit(0);
            }
            close(fd);
            close(go[0]);
            daemon_pause(&d); /* until it alone has the socket */
            close(go[1]);
            assert_int_equal(waitpid(pid, &status, 0), pid);
            assert_int_equal(status, 0);
            daemon_resume(&d);
            a_worker_works(&d); /* or the watchdog ends the test */
        }
    daemon_stop(&d);
    while (n > 0)
        close(peers[--n]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_message_of_a_gibibyte_ends_its_connection_and_nothing_else),
        cmocka_unit_test(what_is_no_greeting_or_no_request_ends_its_connection),
        cmocka_unit_test(requests_that_come_byte_by_byte_are_answered),
        cmocka_unit_test(silent_connections_disturb_nobody_and_are_ended),
        cmocka_unit_test(half_sent_messages_are_ended_also_after_they_waited_for_room),
        cmocka_unit_test(a_client_that_breaks_off_leaves_nothing),
        cmocka_unit_test(another_version_is_told_both),
        cmocka_unit_test(unread_answers_hold_nobody_up),
        cmocka_unit_test(a_client_that_reads_late_gets_every_answer),
        cmocka_unit_test(a_users_connections_are_limited_and_operators_get_in),
        cmocka_unit_test(a_crowd_leaves_descriptors_for_operators),
        cmocka_unit_test(users_have_their_turn_however_many_connections_one_has),
        cmocka_unit_test(descriptors_that_nobody_receives_are_few),
        cmocka_unit_test(what_is_passed_to_a_socket_is_closed),
        cmocka_unit_test(closing_what_is_passed_holds_nobody_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
