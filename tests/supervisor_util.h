/*
 * What test_supervisor and test_adoption have: a supervisor in a folder of its own, with a program
 * in the daemon's place that dies as it is told (supervised_daemon.c). Nothing waits but for
 * events: a connection, an answer, an end, a line of the log; an alarm ends a test that would wait
 * for ever.
 */
#ifndef TS_SUPERVISOR_UTIL_H
#define TS_SUPERVISOR_UTIL_H

#include "standstill.h"
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
#include <sys/syscall.h>
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
    const char *early;  /* a signal that its daemons get as they begin */
    bool passed;        /* a listening socket comes with it */
} ways;

static const ways plain = {.stable_ms = "0", .kill_after_ms = "10000", .adopt_ms = "60000"};

static inline int listen_in(const char *path, int type)
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

static inline void world_make(world *w)
{
    *w = (world){.control = -1, .log = -1};
    strcpy(w->folder, "/tmp/tinyserve-supervisor.XXXXXX");
    assert_non_null(mkdtemp(w->folder));
    snprintf(w->socket, sizeof w->socket, "%s/s", w->folder);
    snprintf(w->control_path, sizeof w->control_path, "%s/control", w->folder);
    w->listener = listen_in(w->control_path, SOCK_SEQPACKET);
    standstill_after(WATCHDOG_SECONDS);
}

/* The program in the daemon's place, which lies beside this one. */
static inline const char *fake_daemon(void)
{
    static char path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 32);
    assert_true(n > 0);
    path[n] = '\0';
    strcpy(strrchr(path, '/'), "/supervised_daemon");
    return path;
}

static inline void become_supervisor(const world *w, const ways *how)
{
    if (how->notify != NULL)
        setenv("NOTIFY_SOCKET", how->notify, 1);
    if (how->early != NULL)
        setenv("TS_TEST_EARLY_SIGNAL", how->early, 1);
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
    execl(fake_daemon(), "supervised_daemon", "--supervise", how->stable_ms, how->kill_after_ms,
          how->adopt_ms, w->socket, w->control_path, NULL);
    _exit(99);
}

static inline void start_supervisor(world *w, const ways *how)
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

static inline const char *hear(world *w)
{
    ssize_t n = recv(w->control, w->answer, sizeof w->answer - 1, 0);
    assert_true(n > 0);
    w->answer[n] = '\0';
    return w->answer;
}

static inline void say(const world *w, const char *order)
{
    assert_int_equal(send(w->control, order, strlen(order), 0), (ssize_t)strlen(order));
}

static inline const char *ask(world *w, const char *order)
{
    say(w, order);
    return hear(w);
}

#define ASK(order, answer) assert_string_equal(ask(w, order), answer)

/* The next daemon comes. */
static inline void meet(world *w)
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
static inline int await_end(world *w)
{
    int status;
    assert_int_equal(waitpid(w->supervisor, &status, 0), w->supervisor);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* Reads the log until a line has this. */
static inline void await_line(const world *w, const char *part)
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

static inline void world_end(world *w)
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

static inline uint32_t open_fds(pid_t pid)
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

#endif
