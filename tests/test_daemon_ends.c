/* A daemon that goes, and processes that fork: what a worker is told. */
#define _GNU_SOURCE
#include "daemon_util.h"

#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

/* Worker: connects, says so through the pipe, and goes on until the daemon is gone. */
static void lasting(const char *url, const char *argument)
{
    const int ready = atoi(argument);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    uint32_t length;
    OK(ts_seq_create(p, 1, &seq));
    assert_int_equal(write(ready, "r", 1), 1);
    ts_status status;
    do
        status = ts_seq_lengths(p, &seq, 1, &length);
    while (status == TS_OK);
    assert_int_equal(status, TS_ECONN);
    assert_int_equal(ts_seq_lengths(p, &seq, 1, &length), TS_ECONN);
    ts_pool_close(p);
    ts_disconnect(c);
}

static void a_worker_gets_TS_ECONN_when_the_daemon_goes(void **state)
{
    (void)state;
    for (int how = SIGKILL; how <= SIGTERM; how += SIGTERM - SIGKILL) {
        daemon_process d;
        daemon_start(&d, POOL_TINY ",blocks=256");
        int ready[2];
        char byte;
        assert_int_equal(pipe(ready), 0);
        char number[16];
        snprintf(number, sizeof number, "%d", ready[1]);
        pid_t worker = spawn("lasting", d.url, number);
        assert_int_equal(read(ready[0], &byte, 1), 1);
        close(ready[0]);
        close(ready[1]);
        if (how == SIGTERM) {
            daemon_stop(&d);
        } else {
            kill(d.pid, SIGKILL);
            waitpid(d.pid, NULL, 0);
            daemon_clean(&d);
        }
        join_child(worker);
    }
}

/* SIGUSR1 is what main is sent when a GPU is lost. Its workers can tell that from an end of its
 * own: their contexts may be gone with it. */
static void a_daemon_that_lost_its_gpu_says_so_to_workers_and_by_its_status(void **state)
{
    (void)state;
    daemon_process d;
    ts_client *c;
    ts_pool *p;
    ts_step *step;
    uint64_t seq;
    const uint32_t one = 1;
    int status;
    daemon_start(&d, POOL_TINY ",blocks=16");
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url}, &c));
    OK(ts_pool_open(c, "tiny", 0, &p));
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &one, 1, NULL, &step));
    ts_step_abort(step);
    kill(d.pid, SIGUSR1);
    assert_int_equal(waitpid(d.pid, &status, 0), d.pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 3);
    assert_int_equal(access(d.url, F_OK), -1);
    assert_int_equal(ts_step_begin(p, &seq, &one, 1, NULL, &step), TS_EDEVICE);
    assert_non_null(strstr(ts_error(c), "a GPU of the daemon at"));
    assert_int_equal(ts_seq_create(p, 1, &seq), TS_EDEVICE);
    ts_pool_close(p);
    ts_disconnect(c);
    assert_int_equal(rmdir(d.folder), 0);
    alarm(0);
}

static void a_new_daemon_takes_over_the_sockets_of_a_killed_one(void **state)
{
    (void)state;
    daemon_process d, again;
    daemon_start(&d, POOL_TINY ",blocks=4");
    kill(d.pid, SIGKILL);
    waitpid(d.pid, NULL, 0);
    again = d;
    pid_t pid = fork();
    if (pid == 0) {
        execl(TS_DAEMON, TS_DAEMON, "--set", "log_level=warning", "--pool", POOL_TINY ",blocks=4",
              "--socket", d.url, NULL);
        _exit(127);
    }
    again.pid = pid;
    ts_client *c;
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url, .wait_ms = 60000}, &c));
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    uint32_t n = 1;
    ts_step *step;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step)); /* the handle socket works too */
    OK(ts_step_abort(step));
    ts_pool_close(p);
    ts_disconnect(c);

    /* A third one must leave the running one alone. */
    int status;
    pid = fork();
    if (pid == 0) {
        if (freopen("/dev/null", "w", stderr) == NULL)
            _exit(127);
        execl(TS_DAEMON, TS_DAEMON, "--pool", POOL_TINY ",blocks=4", "--socket", d.url, NULL);
        _exit(127);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url}, &c));
    p = open_pool(c, "tiny", 0);
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    OK(ts_step_abort(step));
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&again);
}

static void a_forked_child_is_refused_and_not_ended(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=4");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    pid_t child = fork();
    if (child == 0) {
        ts_client *own;
        if (ts_seq_create(p, 1, &seq) != TS_ECONN ||
            ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url}, &own) != TS_EPERM)
            _exit(1);
        ts_disconnect(own);
        ts_disconnect(c);
        _exit(0);
    }
    join_child(child);
    OK(ts_seq_create(p, 1, &seq)); /* the parent's session lives on */
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* A call that waits for room. */
typedef struct waiter {
    ts_pool *pool;
    ts_seq seq;
    ts_status status;
} waiter;

static void *wait_for_room(void *arg)
{
    waiter *w = arg;
    ts_step *s;
    w->status =
        ts_step_begin(w->pool, &w->seq, &(uint32_t){8}, 1,
                      &(ts_step_options){.size = sizeof(ts_step_options), .wait_ms = 3600000}, &s);
    return NULL;
}

static void a_daemon_ends_while_calls_wait(void **state)
{
    (void)state;
    static const ts_transport by[3] = {TS_TRANSPORT_MESSAGES, TS_TRANSPORT_RING};
    daemon_process d;
    ts_client *c[3];
    ts_pool *p[3];
    waiter w[2];
    pthread_t threads[2];
    ts_seq all;
    ts_step *s;
    daemon_start(&d, POOL_TINY ",blocks=4");
    for (int i = 0; i < 3; i++) {
        OK(ts_connect(&(ts_options){.size = sizeof(ts_options),
                                    .url = d.url,
                                    .exchange_bytes = 1 << 20,
                                    .transport = by[i]},
                      &c[i]));
        p[i] = open_pool(c[i], "tiny", 0);
    }
    OK(ts_seq_create(p[2], 1, &all));
    OK(ts_step_begin(p[2], &all, &(uint32_t){64}, 1, NULL, &s));
    for (int i = 0; i < 2; i++) {
        w[i] = (waiter){.pool = p[i]};
        OK(ts_seq_create(p[i], 1, &w[i].seq));
        assert_int_equal(pthread_create(&threads[i], NULL, wait_for_room, &w[i]), 0);
    }
    ts_pool_room room = TS_POOL_ROOM_INIT;
    do
        OK(ts_pool_stats(p[2], &room));
    while (room.waiting < 2);
    daemon_stop(&d); /* with status 0: a sanitizer ends it with another */
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_true(w[i].status == TS_ECONN || w[i].status == TS_EBUSY);
    }
    (void)ts_step_abort(s);
    for (int i = 0; i < 3; i++) {
        ts_pool_close(p[i]);
        ts_disconnect(c[i]);
    }
}

/* Who listens at the daemon's socket, and a descriptor of that process; -1: nobody does. */
static pid_t listening_process(const daemon_process *d, int *pidfd)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct ucred peer = {.pid = -1};
    socklen_t length = sizeof peer;
    snprintf(address.sun_path, sizeof address.sun_path, "%s", d->url);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
        assert_int_equal(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length), 0);
    close(fd);
    *pidfd = peer.pid > 0 ? (int)syscall(SYS_pidfd_open, peer.pid, 0) : -1;
    return peer.pid;
}

static void a_supervised_daemon_that_is_killed_serves_the_same_sockets_again(void **state)
{
    const char *const supervised[] = {"--supervise", "--set", "submit_seconds=30", NULL};
    daemon_process d;
    pid_t last = 0;
    (void)state;
    daemon_start_with(&d, POOL_TINY ",blocks=4", supervised);
    for (int i = 0; i < 3; i++) {
        ts_client *c;
        ts_seq seq;
        ts_step *step;
        int pidfd;
        OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url, .wait_ms = 60000},
                      &c));
        ts_pool *p = open_pool(c, "tiny", 0);
        OK(ts_seq_create(p, 1, &seq));
        OK(ts_step_begin(p, &seq, &(uint32_t){1}, 1, NULL, &step)); /* by the handle socket, too */
        OK(ts_step_abort(step));
        ts_pool_close(p);
        ts_disconnect(c);
        const pid_t daemon = listening_process(&d, &pidfd);
        assert_true(daemon > 0 && daemon != d.pid && daemon != last);
        last = daemon;
        if (i < 2) {
            struct pollfd end = {.fd = pidfd, .events = POLLIN};
            assert_int_equal(kill(daemon, SIGKILL), 0);
            assert_int_equal(poll(&end, 1, -1), 1);
        }
        close(pidfd);
    }
    daemon_stop(&d); /* both, with status 0, and no file is left */
}

/* Memory is files, and SIGXFSZ's default is death. */
static void a_limit_on_files_sizes_refuses_memory_and_ends_no_daemon(void **state)
{
    const struct rlimit small = {.rlim_cur = 1 << 18, .rlim_max = RLIM_INFINITY};
    struct rlimit before;
    daemon_process d;
    ts_seq seq;
    ts_step *step;
    (void)state;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    if (before.rlim_max != RLIM_INFINITY)
        skip();
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    daemon_start(&d, POOL_TINY ",memory=1M,slab=1M,device=host");
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    OK(ts_seq_create(p, 1, &seq));
    assert_int_equal(ts_step_begin(p, &seq, &(uint32_t){1}, 1, NULL, &step), TS_ENOMEM);
    assert_non_null(strstr(ts_error(c),
                           "File too large: the limit for a file of this process is 262144 bytes"));
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {
        {"lasting", lasting},
    };
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_worker_gets_TS_ECONN_when_the_daemon_goes),
        cmocka_unit_test(a_daemon_that_lost_its_gpu_says_so_to_workers_and_by_its_status),
        cmocka_unit_test(a_new_daemon_takes_over_the_sockets_of_a_killed_one),
        cmocka_unit_test(a_supervised_daemon_that_is_killed_serves_the_same_sockets_again),
        cmocka_unit_test(a_limit_on_files_sizes_refuses_memory_and_ends_no_daemon),
        cmocka_unit_test(a_forked_child_is_refused_and_not_ended),
        cmocka_unit_test(a_daemon_ends_while_calls_wait),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
