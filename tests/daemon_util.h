/*
 * Tests against a real daemon: each test starts its own, in a folder of its own, and it is gone
 * afterwards. Waiting is for events (a process's end, an answer), never for time to pass; an alarm
 * ends a test that would wait for ever.
 */
#ifndef TS_DAEMON_UTIL_H
#define TS_DAEMON_UTIL_H

#include "standstill.h"
#include "test_util.h"

#include "rpc.h"
#include "unconst.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define WATCHDOG_SECONDS 240

/* The daemon to test: the one that was built, or another (a bundle's). */
static inline const char *daemon_path(void)
{
    const char *path = getenv("TS_TEST_DAEMON");
    return path != NULL ? path : TS_DAEMON;
}

#define OK(call) assert_int_equal((call), TS_OK)

typedef struct daemon_process {
    pid_t pid;
    char folder[64], url[80], handles[96];
} daemon_process;

/* 6 layers, 2 KV heads of 64, blocks of 16: the demo model's cache. */
#define POOL_TINY "tiny:layers=6,kv_heads=2,head_dim=64,dtype=fp32"

/*
 * Starts a daemon with one pool (and more options, NULL at the end) and waits until it listens.
 * Pools are in host memory unless TS_TEST_DEVICE says otherwise ("cuda:0"): what tests read and
 * write through a mapping, they do with the processor.
 */
static inline void daemon_start_with(daemon_process *d, const char *pool, const char *const *more)
{
    const char *argv[32] = {daemon_path(), "--set", "log_level=warning",
                            "--pool",      pool,    "--socket"};
    const char *device = getenv("TS_TEST_DEVICE");
    char pool_there[256];
    int argc = 6;
    snprintf(pool_there, sizeof pool_there, "%s%s%s", pool,
             strstr(pool, "device=") ? "" : ",device=",
             strstr(pool, "device=") ? ""
             : device != NULL        ? device
                                     : "host");
    argv[4] = pool_there;
    snprintf(d->folder, sizeof d->folder, "/tmp/tinyserve-test.XXXXXX");
    assert_non_null(mkdtemp(d->folder));
    assert_int_equal(chmod(d->folder, 0755), 0); /* other uids connect in some tests */
    snprintf(d->url, sizeof d->url, "%s/s", d->folder);
    snprintf(d->handles, sizeof d->handles, "%s/s" TS_HANDLE_SUFFIX, d->folder);
    argv[argc++] = d->url;
    while (more != NULL && *more != NULL)
        argv[argc++] = *more++;
    standstill_after(WATCHDOG_SECONDS);
    pid_t parent = getpid();
    d->pid = fork();
    assert_true(d->pid >= 0);
    if (d->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that crashes leaves no daemon */
        if (getppid() != parent)
            _exit(1);
        execv(daemon_path(), ts_unconst(argv));
        perror(daemon_path());
        _exit(127);
    }
    ts_client *c;
    ts_status status =
        ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d->url, .wait_ms = 60000}, &c);
    if (status != TS_OK)
        fail_msg("the daemon doesn't answer: %s", ts_error(c));
    ts_disconnect(c);
}

/* Stops all threads of the daemon; returns when they stand still. What is sent to it until it is
 * resumed comes to it at once then. */
static inline void daemon_pause(const daemon_process *d)
{
    int status;
    assert_int_equal(kill(d->pid, SIGSTOP), 0);
    assert_int_equal(waitpid(d->pid, &status, WUNTRACED), d->pid);
    assert_true(WIFSTOPPED(status));
}

static inline void daemon_resume(const daemon_process *d)
{
    assert_int_equal(kill(d->pid, SIGCONT), 0);
}

#ifdef TS_CTL
/*
 * The beginning of a shell's command that runs tsctl as another user, with arguments to setpriv: a
 * copy of it that anybody can read, as the build may lie where only its owner looks (and so may
 * ThreadSanitizer's list of exceptions). Undone by ctl_of_others_remove().
 */
static inline const char *ctl_of_others(const daemon_process *d, const char *user)
{
    static char command[512];
    snprintf(command, sizeof command, "install -m 755 %s %s/ctl", TS_CTL, d->folder);
    assert_int_equal(system(command), 0);
    snprintf(command, sizeof command, "TSAN_OPTIONS=exitcode=0 setpriv %s --clear-groups %s/ctl",
             user, d->folder);
    return command;
}

static inline void ctl_of_others_remove(const daemon_process *d)
{
    char path[112];
    snprintf(path, sizeof path, "%s/ctl", d->folder);
    assert_int_equal(unlink(path), 0);
}
#endif

static inline void daemon_start(daemon_process *d, const char *pool)
{
    daemon_start_with(d, pool, NULL);
}

/* Removes what a killed daemon left. */
static inline void daemon_clean(const daemon_process *d)
{
    char lock[112];
    snprintf(lock, sizeof lock, "%s.lock", d->url);
    unlink(d->url);
    unlink(d->handles);
    unlink(lock);
    assert_int_equal(rmdir(d->folder), 0);
}

/* Ends the daemon with SIGTERM; it must exit with status 0 and leave no socket. */
static inline void daemon_stop(daemon_process *d)
{
    int status;
    kill(d->pid, SIGTERM);
    assert_int_equal(waitpid(d->pid, &status, 0), d->pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(access(d->url, F_OK), -1);
    assert_int_equal(access(d->handles, F_OK), -1);
    assert_int_equal(rmdir(d->folder), 0);
    alarm(0);
}

static inline ts_client *connect_url(const char *url)
{
    ts_client *c;
    ts_status status =
        ts_connect(&(ts_options){.size = sizeof(ts_options), .url = url, .timeout_ms = 120000}, &c);
    if (status != TS_OK)
        fail_msg("%s: %s", ts_status_name(status), ts_error(c));
    return c;
}

static inline ts_client *connect_to(const daemon_process *d)
{
    return connect_url(d->url);
}

static inline ts_pool *open_pool(ts_client *c, const char *name, unsigned flags)
{
    ts_pool *p;
    ts_status status = ts_pool_open(c, name, flags, &p);
    if (status != TS_OK)
        fail_msg("%s: %s", ts_status_name(status), ts_error(c));
    return p;
}

/* The daemon's own figures of its only pool; freed with tspb__reply__free_unpacked. */
static inline Tspb__Reply *pool_stats(ts_client *c)
{
    Tspb__PoolStats body = TSPB__POOL_STATS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    request.body_case = TSPB__REQUEST__BODY_POOL_STATS;
    request.pool_stats = &body;
    OK(ts_call(c, &request, &reply));
    assert_int_equal(reply->body_case, TSPB__REPLY__BODY_POOL_STATS_REPLY);
    return reply;
}

static inline uint32_t used_blocks(ts_client *c)
{
    Tspb__Reply *reply = pool_stats(c);
    uint32_t used = reply->pool_stats_reply->pool->used_blocks;
    tspb__reply__free_unpacked(reply, NULL);
    return used;
}

/* What the daemon says of itself: the numbers, not the strings. */
static inline Tspb__StatusReply daemon_status(ts_client *c)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    OK(ts_call(c, &request, &reply));
    Tspb__StatusReply answer = *reply->status_reply;
    answer.version = answer.kernel = NULL;
    tspb__reply__free_unpacked(reply, NULL);
    return answer;
}

/* Asks until the pool uses `blocks` blocks; the watchdog ends it if that never comes. */
static inline void await_used_blocks(ts_client *c, uint32_t blocks)
{
    while (used_blocks(c) != blocks)
        ;
}

/* The daemon's books hold: what `tsctl check` asks. */
static inline void check_daemon(ts_client *c)
{
    Tspb__Check body = TSPB__CHECK__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    request.body_case = TSPB__REQUEST__BODY_CHECK;
    request.check = &body;
    OK(ts_call(c, &request, &reply));
    if (reply->check_reply->n_problems > 0)
        fail_msg("%s", reply->check_reply->problems[0]);
    tspb__reply__free_unpacked(reply, NULL);
}

/*
 * Runs this test program again as a worker: NNG can't be used on both sides of a fork, so workers
 * are processes of their own. main() of such a test, which has three arguments then, hands over to
 * run_role().
 */
static inline pid_t spawn(const char *role, const char *url, const char *argument)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(WATCHDOG_SECONDS); /* run_role sees to what it says then */
        execl("/proc/self/exe", "worker", role, url, argument, NULL);
        _exit(127);
    }
    return pid;
}

/* What such a worker does, and its name. */
typedef struct worker_role {
    const char *name;
    void (*run)(const char *url, const char *argument);
} worker_role;

/* Runs the role of the name; the process's exit status. */
static inline int run_role(char **argv, const worker_role *roles, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(roles[i].name, argv[1]) == 0) {
            (void)signal(SIGALRM, standstill_end);
            roles[i].run(argv[2], argv[3]);
            return 0;
        }
    fprintf(stderr, "there is no role '%s'\n", argv[1]);
    return 1;
}

/* Waits for a child, which must have exited with 0. */
static inline void join_child(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        fail_msg("a child ended with %s %d", WIFEXITED(status) ? "status" : "signal",
                 WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
}

static inline uint64_t sequences(ts_client *c)
{
    Tspb__Reply *reply = pool_stats(c);
    uint64_t n = reply->pool_stats_reply->pool->sequences;
    tspb__reply__free_unpacked(reply, NULL);
    return n;
}

#endif
