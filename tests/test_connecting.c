/* Connecting where there is no daemon, not any more, not yet, or no descriptor left for it. */
#define _GNU_SOURCE
#include "execution_util.h"

#include "thread_trial.h"

#include <dirent.h>
#include <fcntl.h>
#include <nng/nng.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { WORKERS = 3, CONNECTS = 60, REPLACEMENTS = 12 };
enum { CROWD = 16, ROUNDS = 20 };
#define NOBODY 65534

/* Worker: connects many times, each with an exchange, and tells of each through the pipe. */
static void connects(const char *url, const char *argument)
{
    const int tell = atoi(argument);
    const ts_options options = {
        .size = sizeof options, .url = url, .wait_ms = 120000, .exchange_bytes = 4096};
    for (int i = 0; i < CONNECTS; i++) {
        ts_client *c;
        ts_status status = ts_connect(&options, &c);
        if (status != TS_OK)
            fail_msg("%s: %s", ts_status_name(status), ts_error(c));
        ts_disconnect(c);
        assert_int_equal(write(tell, "c", 1), 1);
    }
}

/* Another daemon where this one was. */
static void daemon_replace(daemon_process *d, int signal)
{
    kill(d->pid, signal);
    assert_int_equal(waitpid(d->pid, NULL, 0), d->pid);
    d->pid = fork();
    assert_true(d->pid >= 0);
    if (d->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl(daemon_path(), daemon_path(), "--set", "log_level=warning", "--pool",
              POOL ",device=host", "--socket", d->url, NULL);
        _exit(127);
    }
}

static void whoever_waits_for_a_daemon_outlives_those_that_die(void **state)
{
    (void)state;
    daemon_process d;
    pid_t workers[WORKERS];
    int told[2];
    char number[16], byte;
    daemon_start(&d, POOL);
    assert_int_equal(pipe(told), 0);
    fcntl(told[0], F_SETFD, FD_CLOEXEC);
    snprintf(number, sizeof number, "%d", told[1]);
    for (int i = 0; i < WORKERS; i++)
        workers[i] = spawn("connects", d.url, number);
    close(told[1]);
    for (int i = 0; i < REPLACEMENTS; i++) {
        for (int n = 0; n < WORKERS * CONNECTS / (REPLACEMENTS + 1); n++)
            assert_int_equal(read(told[0], &byte, 1), 1);
        daemon_replace(&d, i % 2 == 0 ? SIGKILL : SIGTERM);
    }
    for (int i = 0; i < WORKERS; i++)
        join_child(workers[i]);
    close(told[0]);
    daemon_stop(&d);
}

/* Worker: as somebody who is no operator, waits for a daemon that takes sessions. */
static void waits(const char *url, const char *argument)
{
    (void)argument;
    const ts_options options = {.size = sizeof options, .url = url, .wait_ms = 120000};
    ts_client *c;
    assert_int_equal(setuid(65534), 0);
    OK(ts_connect(&options, &c));
    ts_disconnect(c);
}

static void drain(ts_client *operators, bool on)
{
    Tspb__AdminDrain body = TSPB__ADMIN_DRAIN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    body.off = !on;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_DRAIN;
    request.admin_drain = &body;
    OK(ts_call_plain(operators, &request));
}

static void whoever_waits_outwaits_a_drain(void **state)
{
    (void)state;
    daemon_process d;
    if (geteuid() != 0)
        skip();
    daemon_start(&d, POOL);
    ts_client *c = connect_to(&d);
    drain(c, true);
    uint64_t before = daemon_status(c).refused;
    pid_t worker = spawn("waits", d.url, "");
    while (daemon_status(c).refused == before) /* until it was turned away */
        ;
    drain(c, false);
    join_child(worker);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* Worker: has no descriptor left when a call needs one of the daemon's. */
static void has_no_descriptor(const char *url, const char *argument)
{
    (void)argument;
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    uint64_t slot;
    ts_kv kv;
    struct rlimit before, none;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &(uint32_t){1}, 1, NULL, &step)); /* the handle connection is there */
    for (uint32_t layer = 0; layer < 2; layer++)
        OK(ts_step_run(step, layer));
    OK(ts_step_commit(step, NULL));
    OK(ts_seq_slots(p, seq, 0, 0, 1, &slot));
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    none = before;
    none.rlim_cur = 1; /* poll() takes one descriptor still */
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    assert_int_equal(ts_slot_kv(p, slot, 0, &kv), TS_ENOMEM);
    assert_non_null(strstr(ts_error(c), "this process has as many as it may have (RLIMIT_NOFILE)"));
    ts_client *other;
    assert_int_equal(
        ts_connect(&(ts_options){.size = sizeof(ts_options), .url = url, .wait_ms = 60000}, &other),
        TS_ENOMEM); /* at once: it isn't the daemon that is awaited */
    assert_non_null(strstr(ts_error(other), "descriptor"));
    ts_disconnect(other);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    OK(ts_slot_kv(p, slot, 0, &kv)); /* nothing is the worse for it */
    ts_pool_close(p);
    ts_disconnect(c);
}

static void a_client_without_descriptors_is_told_so(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL);
    join_child(spawn("has_no_descriptor", d.url, ""));
    daemon_stop(&d);
}

static void refused(const char *url, ts_status status, const char *sentence)
{
    ts_client *c;
    /* None of these is awaited: a daemon that appears would change nothing. */
    const ts_options options = {.size = sizeof options, .url = url, .wait_ms = UINT32_MAX};
    assert_int_equal(ts_connect(&options, &c), status);
    if (strcmp(ts_error(c), sentence) != 0)
        fail_msg("'%s' and not '%s'", ts_error(c), sentence);
    ts_disconnect(c);
}

static void an_address_that_can_be_no_daemons_is_named(void **state)
{
    (void)state;
    char path[64], sentence[160], far[160];
    snprintf(path, sizeof path, "/tmp/tinyserve-file.XXXXXX");
    standstill_after(WATCHDOG_SECONDS);
    refused("tcp://127.0.0.1:80", TS_EINVAL,
            "the address tcp://127.0.0.1:80: the daemon is reached by ipc:///PATH alone, on its "
            "own machine");
    refused("run/s", TS_EINVAL,
            "the address run/s: an absolute path such as " TS_URL_SYSTEM " is needed");
    refused("ipc://run/s", TS_EINVAL,
            "the address ipc://run/s: an absolute path such as " TS_URL_SYSTEM " is needed");
    memset(far, 'x', sizeof far);
    far[0] = '/';
    far[sizeof far - 1] = '\0';
    refused(far, TS_EINVAL, "the daemon's socket has a path of 159 bytes; the limit is 99");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    snprintf(sentence, sizeof sentence, "%s is not a socket", path);
    refused(path, TS_EINVAL, sentence);
    close(fd);
    assert_int_equal(unlink(path), 0);
    refused("/tmp", TS_EINVAL, "/tmp is not a socket");
    alarm(0);
}

/* Stops all of the daemon's threads; returns when they stand still. */
static void stop(const daemon_process *d)
{
    int status;
    assert_int_equal(kill(d->pid, SIGSTOP), 0);
    assert_int_equal(waitpid(d->pid, &status, WUNTRACED), d->pid);
    assert_true(WIFSTOPPED(status));
}

static void times_out(const char *url, uint32_t timeout_ms, uint32_t wait_ms)
{
    ts_client *c;
    const ts_options options = {
        .size = sizeof options, .url = url, .timeout_ms = timeout_ms, .wait_ms = wait_ms};
    char sentence[160];
    assert_int_equal(ts_connect(&options, &c), TS_ETIMEOUT);
    snprintf(sentence, sizeof sentence, "no answer from %s within ", url);
    assert_memory_equal(ts_error(c), sentence, strlen(sentence));
    ts_disconnect(c);
}

static void a_daemon_that_takes_no_connection_has_the_callers_time(void **state)
{
    (void)state;
    daemon_process d;
    ts_client *c;
    standstill_after(WATCHDOG_SECONDS);
    daemon_start(&d, POOL);
    stop(&d);
    times_out(d.url, 20, 0);
    times_out(d.url, 10, 40);
    times_out(d.url, 40, 10);
    assert_int_equal(kill(d.pid, SIGCONT), 0);
    const ts_options options = {.size = sizeof options, .url = d.url};
    OK(ts_connect(&options, &c));
    ts_disconnect(c);
    daemon_stop(&d);
    alarm(0);
}

/* Worker: connects to a daemon that goes on meanwhile. */
static void outlasts_a_stop(const char *url, const char *argument)
{
    const int tell = atoi(argument);
    const ts_options options = {.size = sizeof options, .url = url, .wait_ms = 120000};
    ts_client *c;
    assert_int_equal(write(tell, "c", 1), 1);
    OK(ts_connect(&options, &c));
    ts_disconnect(c);
}

static void a_daemon_that_goes_on_in_time_is_connected_to(void **state)
{
    (void)state;
    daemon_process d;
    int told[2];
    char number[16], byte;
    daemon_start(&d, POOL);
    assert_int_equal(pipe(told), 0);
    snprintf(number, sizeof number, "%d", told[1]);
    stop(&d);
    pid_t worker = spawn("outlasts_a_stop", d.url, number);
    assert_int_equal(read(told[0], &byte, 1), 1);
    assert_int_equal(kill(d.pid, SIGCONT), 0);
    join_child(worker);
    close(told[0]);
    close(told[1]);
    daemon_stop(&d);
}

/* ---- as many connections as a user may have ---- */

/* With an exchange: there is one to the handle socket, too. */
static ts_status connect_as_one_of_many(const char *url, ts_client **c)
{
    const ts_options options = {.size = sizeof options, .url = url, .exchange_bytes = 4096};
    return ts_connect(&options, c);
}

static void is_one_too_many(const char *url)
{
    char sentence[128];
    ts_client *c;
    snprintf(sentence, sizeof sentence,
             "uid %d has %d connections; the limit is %d (tenant_connections)", NOBODY, CROWD,
             CROWD);
    assert_int_equal(connect_as_one_of_many(url, &c), TS_EQUOTA);
    assert_string_equal(ts_error(c), sentence);
    ts_disconnect(c);
}

static void daemon_start_for_a_crowd(daemon_process *d)
{
    char limit[32];
    snprintf(limit, sizeof limit, "tenant_connections=%d", CROWD);
    standstill_after(WATCHDOG_SECONDS);
    daemon_start_with(d, POOL,
                      (const char *const[]){"--set", "socket_mode=0666", "--set", limit, NULL});
}

/* What all of a crowd do in turn. For each there is a pipe, through which they are told to. */
enum { CONNECT, DISCONNECT, TURNS };

/* Worker: connects when told to, and disconnects when told to. */
static void is_of_a_crowd(const char *url, const char *pipes)
{
    int tell, told[TURNS];
    char byte;
    ts_client *c;
    assert_int_equal(sscanf(pipes, "%d,%d,%d", &tell, &told[CONNECT], &told[DISCONNECT]), 3);
    assert_int_equal(setuid(NOBODY), 0);
    while (read(told[CONNECT], &byte, 1) == 1) {
        const bool connected = connect_as_one_of_many(url, &c) == TS_OK;
        assert_int_equal(write(tell, connected ? "y" : "n", 1), 1);
        if (!connected)
            fail_msg("%s", ts_error(c));
        assert_int_equal(read(told[DISCONNECT], &byte, 1), 1);
        ts_disconnect(c);
        assert_int_equal(write(tell, "y", 1), 1);
    }
}

/* All are told, by a byte for each, and have done it. */
static void all_do(int tell, int told)
{
    char bytes[CROWD] = "";
    assert_int_equal(write(tell, bytes, CROWD), CROWD);
    for (int i = 0; i < CROWD; i++)
        if (read(told, bytes, 1) != 1 || bytes[0] != 'y')
            fail_msg("one of them has failed");
}

static void as_many_as_may_connect_at_the_same_moment(void **state)
{
    (void)state;
    daemon_process d;
    pid_t workers[CROWD];
    int out[TURNS][2], in[2];
    char pipes[48];
    if (geteuid() != 0)
        skip();
    daemon_start_for_a_crowd(&d);
    assert_int_equal(pipe(in), 0);
    fcntl(in[0], F_SETFD, FD_CLOEXEC);
    for (int turn = 0; turn < TURNS; turn++) {
        assert_int_equal(pipe(out[turn]), 0);
        fcntl(out[turn][1], F_SETFD, FD_CLOEXEC);
    }
    snprintf(pipes, sizeof pipes, "%d,%d,%d", in[1], out[CONNECT][0], out[DISCONNECT][0]);
    for (int i = 0; i < CROWD; i++)
        workers[i] = spawn("is_of_a_crowd", d.url, pipes);
    close(in[1]);
    for (int round = 0; round < ROUNDS; round++) {
        all_do(out[CONNECT][1], in[0]);
        assert_int_equal(seteuid(NOBODY), 0);
        is_one_too_many(d.url);
        assert_int_equal(seteuid(0), 0);
        all_do(out[DISCONNECT][1], in[0]);
    }
    for (int turn = 0; turn < TURNS; turn++)
        close(out[turn][1]);
    for (int i = 0; i < CROWD; i++)
        join_child(workers[i]);
    for (int turn = 0; turn < TURNS; turn++)
        close(out[turn][0]);
    close(in[0]);
    daemon_stop(&d);
    alarm(0);
}

static void a_process_has_all_the_connections_that_it_may(void **state)
{
    (void)state;
    daemon_process d;
    ts_client *clients[CROWD];
    if (geteuid() != 0)
        skip();
    daemon_start_for_a_crowd(&d);
    assert_int_equal(seteuid(NOBODY), 0);
    for (int i = 0; i < CROWD; i++)
        OK(connect_as_one_of_many(d.url, &clients[i]));
    is_one_too_many(d.url);
    for (int i = 0; i < ROUNDS * CROWD; i++) { /* what is given back may be taken at once */
        ts_disconnect(clients[i % CROWD]);
        OK(connect_as_one_of_many(d.url, &clients[i % CROWD]));
    }
    for (int i = 0; i < CROWD; i++)
        ts_disconnect(clients[i]);
    assert_int_equal(seteuid(0), 0);
    daemon_stop(&d);
    alarm(0);
}

/* ---- where threads or memory are short ---- */

/* What came of connecting. */
typedef struct outcome {
    ts_status status;
    uint64_t wanted, started; /* threads, where they were too few */
    bool about_threads;       /* the sentence is */
} outcome;

static uint32_t own_threads(void)
{
    uint32_t n = 0;
    DIR *dir = opendir("/proc/self/task");
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

/* Worker's: connects, the first time in this process, and tells what came of it. */
static void tell_outcome(const char *url, int tell)
{
    ts_client *c;
    const ts_options options = {.size = sizeof options, .url = url, .timeout_ms = 120000};
    ts_error_info info = TS_ERROR_INFO_INIT;
    alarm(60);
    outcome o = {.status = ts_connect(&options, &c)};
    if (c != NULL) {
        OK(ts_error_read(c, &info));
        o.wanted = info.needed;
        o.started = info.limit;
        o.about_threads = strstr(ts_error(c), "the messages' library needs ") == ts_error(c);
    }
    ts_disconnect(c);
    assert_int_equal(write(tell, &o, sizeof o), sizeof o);
}

/* Worker: has a user of its own, who may have so many threads. */
static void has_few_threads(const char *url, const char *argument)
{
    int tell, limit;
    assert_int_equal(sscanf(argument, "%d,%d", &tell, &limit), 2);
    struct rlimit before, threads;
    assert_int_equal(getrlimit(RLIMIT_NPROC, &before), 0);
    threads = before;
    threads.rlim_cur = (rlim_t)limit;
    assert_int_equal(setrlimit(RLIMIT_NPROC, &threads), 0);
    assert_int_equal(setuid(20000 + (uid_t)getpid() % 40000), 0);
    prctl(PR_SET_DUMPABLE, 1); /* as a program that was started as this user */
    tell_outcome(url, tell);
    assert_int_equal(setrlimit(RLIMIT_NPROC, &before), 0); /* a sanitizer needs one at the end */
}

/* Worker: may have so many MiB more than it has now. */
static void has_little_memory(const char *url, const char *argument)
{
    int tell, more_mib;
    unsigned long pages;
    assert_int_equal(sscanf(argument, "%d,%d", &tell, &more_mib), 2);
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%lu", &pages), 1);
    fclose(f);
    const rlim_t bytes = pages * (rlim_t)sysconf(_SC_PAGESIZE) + ((rlim_t)more_mib << 20);
    assert_int_equal(setrlimit(RLIMIT_AS, &(struct rlimit){bytes, bytes}), 0);
    tell_outcome(url, tell);
}

/* Worker: counts NNG's threads. */
static void has_nngs_threads(const char *url, const char *argument)
{
    (void)argument;
    uint32_t started;
    assert_int_equal(ts_threads_try(1, &started), 0); /* a sanitizer starts its own with it */
    const uint32_t before = own_threads();
    ts_client *c = connect_url(url);
    if (strncmp(nng_version(), "1.5.", 4) == 0)
        assert_int_equal(own_threads() - before, ts_nng_threads());
    ts_disconnect(c);
}

static outcome outcome_with(const char *role, const char *url, int limit)
{
    int told[2];
    char argument[32];
    outcome o;
    assert_int_equal(pipe(told), 0);
    snprintf(argument, sizeof argument, "%d,%d", told[1], limit);
    const pid_t worker = spawn(role, url, argument);
    close(told[1]);
    join_child(worker);
    assert_int_equal(read(told[0], &o, sizeof o), sizeof o);
    close(told[0]);
    return o;
}

static void as_many_threads_are_tried_as_nng_starts(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL);
    join_child(spawn("has_nngs_threads", d.url, ""));
    daemon_stop(&d);
}

static void whoever_has_too_few_threads_is_told_so(void **state)
{
    (void)state;
    daemon_process d;
    const uint32_t wanted = ts_nng_threads();
    uint64_t started = 0;
    int limit = 1;
    if (geteuid() != 0)
        skip();
    daemon_start_with(&d, POOL, (const char *const[]){"--set", "socket_mode=0666", NULL});
    for (outcome o; (o = outcome_with("has_few_threads", d.url, limit)).status != TS_OK; limit++) {
        assert_int_equal(o.status, TS_ENOMEM);
        assert_true(o.about_threads);
        assert_int_equal(o.wanted, wanted);
        if (started > 0) /* before, all are its own process's */
            assert_int_equal(o.started, started + 1);
        started = o.started;
    }
    assert_int_equal(started, wanted - 1);
    assert_int_equal(outcome_with("has_few_threads", d.url, limit + 1).status, TS_OK);
    daemon_stop(&d);
}

static void whoever_has_too_little_memory_for_threads_is_told_so(void **state)
{
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    skip(); /* they have terabytes */
#else
    daemon_process d;
    outcome o;
    int mib = 0;
    daemon_start(&d, POOL);
    for (; (o = outcome_with("has_little_memory", d.url, mib)).status != TS_OK; mib += 3)
        assert_int_equal(o.status, TS_ENOMEM);
    assert_true(mib > 0);
    assert_int_equal(outcome_with("has_little_memory", d.url, mib + 64).status, TS_OK);
    daemon_stop(&d);
#endif
}

/* Members of ts_options that are one of a few words. A later header's errors have more numbers. */
static void words_that_do_not_exist_are_refused(void **state)
{
    (void)state;
    ts_client *c;
    ts_options options = {.size = sizeof options, .url = "/nowhere/at/all"};
    const struct {
        int *member;
        const char *error;
    } words[] = {
        {(int *)(void *)&options.transport,
         "ts_options.transport is 3; the last one is 2, TS_TRANSPORT_MESSAGES"},
        {(int *)(void *)&options.exec, "ts_options.exec is 3; the last one is 2, TS_EXEC_AUTO"},
        {(int *)(void *)&options.reconnect,
         "ts_options.reconnect is 3; the last one is 1, TS_RECONNECT_OFF"},
    };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        *words[i].member = 3;
        assert_int_equal(ts_connect(&options, &c), TS_EINVAL);
        assert_string_equal(ts_error(c), words[i].error);
        struct {
            ts_error_info info;
            uint64_t more;
        } later = {.info.size = sizeof later, .more = 7};
        OK(ts_error_read(c, &later.info));
        assert_int_equal(later.info.size, sizeof later);
        assert_int_equal(later.info.status, TS_EINVAL);
        assert_int_equal(later.more, 0);
        ts_disconnect(c);
        *words[i].member = 0;
    }
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {
        {"connects", connects},
        {"waits", waits},
        {"has_no_descriptor", has_no_descriptor},
        {"outlasts_a_stop", outlasts_a_stop},
        {"is_of_a_crowd", is_of_a_crowd},
        {"has_few_threads", has_few_threads},
        {"has_little_memory", has_little_memory},
        {"has_nngs_threads", has_nngs_threads},
    };
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whoever_waits_for_a_daemon_outlives_those_that_die),
        cmocka_unit_test(whoever_waits_outwaits_a_drain),
        cmocka_unit_test(a_client_without_descriptors_is_told_so),
        cmocka_unit_test(an_address_that_can_be_no_daemons_is_named),
        cmocka_unit_test(a_daemon_that_takes_no_connection_has_the_callers_time),
        cmocka_unit_test(a_daemon_that_goes_on_in_time_is_connected_to),
        cmocka_unit_test(as_many_as_may_connect_at_the_same_moment),
        cmocka_unit_test(a_process_has_all_the_connections_that_it_may),
        cmocka_unit_test(as_many_threads_are_tried_as_nng_starts),
        cmocka_unit_test(whoever_has_too_few_threads_is_told_so),
        cmocka_unit_test(whoever_has_too_little_memory_for_threads_is_told_so),
        cmocka_unit_test(words_that_do_not_exist_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
