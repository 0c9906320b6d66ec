/*
 * A daemon of tests under `tinyserved --supervise` that ends at places of kill_points.c, and what a
 * worker beside it digests of all that it is told.
 */
#ifndef TS_RESTART_UTIL_H
#define TS_RESTART_UTIL_H

#include "daemon_util.h"

#include <dirent.h>
#include <poll.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define STRIDE 11u /* only every 11th place: a daemon takes long to start then */
#define KILLS 15u
#else
#define STRIDE 1u
#define KILLS 100u
#endif

/* A daemon that is told to end leaves what it has, its threads (and a fake device's) too: to
 * ThreadSanitizer these are leaks. */
static inline void ignore_threads_left(void)
{
    const char *sanitizer = getenv("TSAN_OPTIONS");
    char options[1024];
    snprintf(options, sizeof options, "%s:report_thread_leaks=0", sanitizer ? sanitizer : "");
    setenv("TSAN_OPTIONS", options, 1);
}

/* Starts the daemon, with one pool and a setting. kill_at: see kill_points.c; NULL: nothing ends
 * it.
 */
static inline void start_with(daemon_process *d, const char *pool, const char *kill_at,
                              const char *setting)
{
    snprintf(d->folder, sizeof d->folder, "/tmp/tinyserve-test.XXXXXX");
    assert_non_null(mkdtemp(d->folder));
    snprintf(d->url, sizeof d->url, "%s/s", d->folder);
    snprintf(d->handles, sizeof d->handles, "%s/s" TS_HANDLE_SUFFIX, d->folder);
    standstill_after(WATCHDOG_SECONDS);
    d->pid = fork();
    assert_true(d->pid >= 0);
    if (d->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (kill_at != NULL)
            setenv("TS_TEST_KILL", kill_at, 1);
        const char *log = getenv("TS_TEST_LOG"); /* a path, or anything: what it says is shown */
        if (log == NULL || log[0] == '/')        /* it says of each death that it died */
            (void)!freopen(log == NULL ? "/dev/null" : log, "a", stderr);
        execl(TS_KILLED_DAEMON, TS_KILLED_DAEMON, "--supervise", "--set", "log_level=error",
              "--set", "threads=1", "--set", setting, "--socket", d->url, "--pool", pool, NULL);
        _exit(127);
    }
}

static inline void start(daemon_process *d, const char *pool, const char *kill_at)
{
    start_with(d, pool, kill_at, "submit_seconds=30");
}

static inline ts_client *connect_with(const daemon_process *d, ts_transport transport, ts_exec exec)
{
    ts_client *c;
    const ts_options options = {.size = sizeof(ts_options),
                                .url = d->url,
                                .wait_ms = 60000,
                                .timeout_ms = 60000,
                                .exchange_bytes = 1u << 20,
                                .transport = transport,
                                .exec = exec};
    ts_status status = ts_connect(&options, &c);
    if (status != TS_OK)
        fail_msg("%s: %s", ts_status_name(status), ts_error(c));
    return c;
}

static inline ts_client *connect_by(const daemon_process *d, ts_transport transport)
{
    return connect_with(d, transport, TS_EXEC_DAEMON);
}

/* A call of the worker's, which must succeed. */
#define DO(call)                                                                                   \
    do {                                                                                           \
        ts_status done = (call);                                                                   \
        if (done != TS_OK)                                                                         \
            fail_msg("%s: %s: %s", #call, ts_status_name(done), ts_error(c));                      \
    } while (0)

typedef struct digest {
    uint64_t value;
} digest;

static inline void mix(digest *d, const void *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        d->value = (d->value ^ ((const unsigned char *)bytes)[i]) * 1099511628211u;
}

static inline void fill(rng *r, float *to, size_t count)
{
    for (size_t i = 0; i < count; i++)
        to[i] = rng_normal(r);
}

/* What daemons that were started with this TS_TEST_LOG have said; the caller frees it. The file
 * goes. */
static inline char *read_log(const char *path)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    assert_true(getdelim(&text, &bytes, '\0', f) >= 0);
    (void)fclose(f);
    (void)unlink(path);
    return text;
}

/* Ends both; nothing may be left of them. `late`: the daemon may come to where it is killed only
 * now, and the next one may be told to end before it has begun. */
static inline void stop(daemon_process *d, bool late)
{
    int status;
    kill(d->pid, SIGTERM);
    assert_int_equal(waitpid(d->pid, &status, 0), d->pid);
    assert_true(WIFEXITED(status));
    if (late && (WEXITSTATUS(status) == 128 + SIGKILL || WEXITSTATUS(status) == 128 + SIGTERM))
        return daemon_clean(d);
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(rmdir(d->folder), 0);
    alarm(0);
}

/* The end of a test: the daemon's books must agree. */
static inline void finish(daemon_process *d, ts_client *c, ts_pool *p)
{
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    stop(d, false);
}

/* What a worker does the same way each time, on a daemon with one pool. */
typedef struct killed_workload {
    const char *pool;
    const char *setting; /* of the daemon; NULL: the usual one */
    ts_transport transport;
    int exchange; /* the test's own word for where q, k, v and out lie */
    /* Returns a digest of all that the worker is told, and how often the daemon was restarted. */
    uint64_t (*work)(ts_client *client, int exchange, uint32_t *restarts);
} killed_workload;

static inline uint64_t run_killed(const killed_workload *w, const char *kill_at, uint32_t *restarts)
{
    daemon_process d;
    if (w->setting != NULL)
        start_with(&d, w->pool, kill_at, w->setting);
    else
        start(&d, w->pool, kill_at);
    ts_client *c = connect_by(&d, w->transport);
    const uint64_t digest = w->work(c, w->exchange, restarts);
    ts_disconnect(c);
    stop(&d, kill_at != NULL && *restarts == 0);
    return digest;
}

/* Ends the daemon at each of these places in turn, from the one numbered `from` on: the worker must
 * be told the same. How many kills there were. */
static inline uint32_t kill_everywhere(const killed_workload *w, const char *place, uint32_t from)
{
    uint32_t restarts, kills = 0;
    const uint64_t expected = run_killed(w, NULL, &restarts);
    assert_int_equal(restarts, 0);
    for (uint32_t n = from;; n += STRIDE) {
        char kill_at[32];
        snprintf(kill_at, sizeof kill_at, "%s:%u", place, n);
        const uint64_t digest = run_killed(w, kill_at, &restarts);
        if (restarts == 0) /* it comes there fewer than n times */
            return kills;
        kills++;
        if (digest != expected)
            fail_msg("ended at %s, a worker with exchange %d by %s was told something else",
                     kill_at, w->exchange, w->transport == TS_TRANSPORT_RING ? "ring" : "message");
    }
}

/* The supervisor's child; 0: it has none at the moment. */
static inline pid_t daemon_of(const daemon_process *d)
{
    char path[64], text[32] = "";
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)d->pid, (int)d->pid);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    (void)!fgets(text, sizeof text, f);
    (void)fclose(f);
    return (pid_t)atoi(text);
}

/* Whether each thread of the process has stopped. */
static inline bool has_stopped(pid_t pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    DIR *tasks = opendir(path);
    bool all = tasks != NULL;
    for (struct dirent *e; all && (e = readdir(tasks)) != NULL;) {
        char stat[400], state = 0;
        if (e->d_name[0] == '.')
            continue;
        snprintf(stat, sizeof stat, "/proc/%d/task/%s/stat", (int)pid, e->d_name);
        FILE *f = fopen(stat, "r");
        if (f != NULL) {
            (void)!fscanf(f, "%*d (%*[^)]) %c", &state);
            (void)fclose(f);
        }
        all = state == 'T';
    }
    if (tasks != NULL)
        (void)closedir(tasks);
    return all;
}

/* Waits until the supervisor's child has stopped; which it is. */
static inline pid_t await_stopped(const daemon_process *d)
{
    pid_t pid;
    while ((pid = daemon_of(d)) == 0 || !has_stopped(pid))
        (void)poll(NULL, 0, 1);
    return pid;
}

/* Stops the daemon itself, not its supervisor, until somebody has it go on; its pid. */
static inline pid_t stop_serving(const daemon_process *d)
{
    assert_int_equal(kill(daemon_of(d), SIGSTOP), 0);
    return await_stopped(d);
}

#endif
