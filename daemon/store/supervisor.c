#define _GNU_SOURCE
#include "supervisor.h"

#include "clock.h"
#include "held_fds.h"
#include "log.h"
#include "store_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define FIRST_DELAY_MS 10
#define MOST_DELAY_MS 1000
#define LOCK_POLL_MS 100 /* a lock's end can't be waited for together with other things */
#define OWN_FDS 64u
#define MESSAGES_PER_TURN 64u /* then signals and other sockets have theirs */
#define LAST_MESSAGES 65536u  /* more than a socket holds of a daemon that is dead */
/* Which of the daemon's memory goes into a core dump (core(5)): what is private to it, and the ELF
 * headers. Stored memory, which is shared, has prompts and tokens. */
#define CORE_FILTER "0x31"

/* What is sent to the supervisor and is the daemon's. */
static const int for_the_daemon[] = {SIGTERM, SIGINT, SIGHUP};

typedef struct supervisor {
    const ts_supervise_options *options;
    char notify_path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    char store_path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    char *upward;             /* where our own holder listens; NULL: there is none */
    sigset_t signals, former; /* ours; what the daemon gets */
    int signal_fd, notify, listener;
    ts_held_fds held;

    /* The daemon: a child (pidfd is -1 then), an adopted one, or none (pid is 0). */
    pid_t pid;
    int pidfd, connection;
    bool child;
    uint64_t started_ms;
    bool ended;      /* waited for, or its pidfd says so */
    int wait_status; /* of a child */
    bool stops;      /* it said so, with this exit status */
    int stops_with;

    /* Without a daemon: */
    bool adopting; /* one lives, and is going to come until until_ms; else one is started then */
    uint64_t until_ms;

    uint32_t deaths, short_lives;
    bool was_ready;  /* the daemon served */
    bool has_served; /* one did */
    char last_death[16];
    /* What the next daemon is told: how the last one that served ended, and the last one, if that
     * didn't serve. */
    char cause[48];
    bool told_to_end;
    uint64_t told_ms;
    int exit_status; /* of the last daemon */
} supervisor;

static void tell_upward(const supervisor *s, const char *text)
{
    if (s->upward != NULL)
        ts_store_notify_at(s->upward, text);
}

/* A socket at this path, for this user alone. */
static int listen_at(const char *path, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const int on = 1;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const mode_t mask = umask(0177);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) != 0 ||
        (type == SOCK_SEQPACKET && listen(fd, 8) != 0)) {
        ts_log(TS_LOG_ERROR, "%s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        fd = -1;
    }
    umask(mask);
    return fd;
}

static bool name_path(const supervisor *s, char *path, size_t bytes, const char *suffix)
{
    const int n = snprintf(path, bytes, "%s%s", s->options->socket, suffix);
    if (n < 0 || (size_t)n >= bytes) {
        ts_log(TS_LOG_ERROR, "%s%s has %d bytes, and a socket's path has at most %zu",
               s->options->socket, suffix, n, bytes - 1);
        return false;
    }
    return true;
}

/* As many as may be held, and a daemon may be given. */
static uint32_t fds_max(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return TS_STORE_FDS;
    if (limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
    return limit.rlim_cur >= TS_STORE_FDS + OWN_FDS ? TS_STORE_FDS
           : limit.rlim_cur > OWN_FDS               ? (uint32_t)limit.rlim_cur - OWN_FDS
                                                    : 1;
}

static void leave_out_of_dumps(void)
{
    int fd = open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, CORE_FILTER, strlen(CORE_FILTER)) < 0)
        ts_log(TS_LOG_INFO, "a core dump would have the pools' memory: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
}

static void hold_passed(void *arg, const char *name, int fd)
{
    supervisor *s = arg;
    const char *why = ts_held_fds_add(&s->held, name, fd, true);
    if (why != NULL)
        ts_log(TS_LOG_ERROR, "the passed socket %s isn't passed on: %s", name, why);
}

static bool set_up(supervisor *s)
{
    const char *upward = getenv("NOTIFY_SOCKET");
    s->signal_fd = s->notify = s->listener = s->pidfd = s->connection = -1;
    sigemptyset(&s->signals);
    for (size_t i = 0; i < sizeof for_the_daemon / sizeof *for_the_daemon; i++)
        sigaddset(&s->signals, for_the_daemon[i]);
    sigaddset(&s->signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &s->signals, &s->former);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* of the log, where that is a file */
    signal(SIGCHLD, SIG_DFL); /* ignored, it would take the daemon's status with it */
    leave_out_of_dumps();
    if (!ts_held_fds_init(&s->held, fds_max()) ||
        (upward != NULL && (s->upward = strdup(upward)) == NULL)) {
        ts_log(TS_LOG_ERROR, "no memory for a supervisor");
        return false;
    }
    ts_store_passed(hold_passed, s);
    (void)unsetenv(TS_ENV_DEATHS); /* of another supervisor */
    (void)unsetenv(TS_ENV_LAST_DEATH);
    s->signal_fd = signalfd(-1, &s->signals, SFD_CLOEXEC | SFD_NONBLOCK);
    return s->signal_fd >= 0 &&
           name_path(s, s->notify_path, sizeof s->notify_path, TS_NOTIFY_SOCKET_SUFFIX) &&
           name_path(s, s->store_path, sizeof s->store_path, TS_STORE_SOCKET_SUFFIX) &&
           (s->notify = listen_at(s->notify_path, SOCK_DGRAM)) >= 0 &&
           (s->listener = listen_at(s->store_path, SOCK_SEQPACKET)) >= 0;
}

static void tear_down(supervisor *s)
{
    const int fds[] = {s->signal_fd, s->pidfd, s->connection};
    if (s->notify >= 0) {
        (void)unlink(s->notify_path);
        close(s->notify);
    }
    if (s->listener >= 0) {
        (void)unlink(s->store_path);
        close(s->listener);
    }
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    ts_held_fds_fini(&s->held);
    free(s->upward);
    sigprocmask(SIG_SETMASK, &s->former, NULL);
}

/* Whether a daemon serves the socket: whether somebody has its lock. */
static bool daemon_lives(const supervisor *s)
{
    char path[256];
    snprintf(path, sizeof path, "%s.lock", s->options->socket);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    const bool lives = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    if (fd >= 0)
        close(fd);
    return lives;
}

/* What the child tells its daemon by the environment. */
static bool set_environment(const supervisor *s)
{
    char number[16];
    const char *usec = getenv("WATCHDOG_USEC");
    snprintf(number, sizeof number, "%u", s->held.max);
    bool set = setenv("NOTIFY_SOCKET", s->notify_path, 1) == 0 &&
               setenv(TS_ENV_FDSTORE, number, 1) == 0 &&
               setenv(TS_ENV_SUPERVISOR, s->store_path, 1) == 0;
    if (s->deaths > 0) {
        snprintf(number, sizeof number, "%u", s->deaths);
        set = set && setenv(TS_ENV_DEATHS, number, 1) == 0 &&
              setenv(TS_ENV_LAST_DEATH, s->cause, 1) == 0;
    }
    if (usec !=
        NULL) { /* our own holder waits for WATCHDOG=1, which the daemon sends and we pass */
        snprintf(number, sizeof number, "%d", (int)getpid());
        set = set && setenv("WATCHDOG_PID", number, 1) == 0;
    }
    return set;
}

static _Noreturn void become_daemon(supervisor *s)
{
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    /* What ends a daemon, or has it reload, waits until it listens: so it stays blocked. */
    sigset_t mask = s->former;
    for (size_t i = 0; i < sizeof for_the_daemon / sizeof *for_the_daemon; i++)
        sigaddset(&mask, for_the_daemon[i]);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    if (set_environment(s) && ts_held_fds_pass(&s->held))
        execv("/proc/self/exe", s->options->argv);
    ts_log(TS_LOG_ERROR, "the daemon can't be started: %s", strerror(errno));
    _exit(EXIT_FAILURE);
}

/* Starts a daemon, or waits for one that lives already. */
static void start(supervisor *s)
{
    const uint64_t now = ts_now_ms();
    if (daemon_lives(s)) {
        s->adopting = true;
        s->until_ms = now + s->options->adopt_ms;
        ts_log(TS_LOG_INFO,
               "a daemon serves %s already: it is taken over if it comes within %u ms, as one does "
               "whose supervisor died",
               s->options->socket, s->options->adopt_ms);
        return;
    }
    s->started_ms = now;
    s->child = true;
    s->ended = s->stops = false;
    s->pid = fork();
    if (s->pid == 0)
        become_daemon(s);
    if (s->pid < 0) {
        s->pid = 0;
        s->until_ms = now + MOST_DELAY_MS;
        ts_log(TS_LOG_ERROR, "the daemon can't be started: %s", strerror(errno));
    }
}

/* ---- what the daemon says ---- */

static void answer_barrier(int pipe)
{
    const int flags = fcntl(pipe, F_GETFL);
    if (flags >= 0 && (flags & O_NONBLOCK) != 0 && write(pipe, "", 1) < 0) {
        /* nobody waits for it any more */
    }
    close(pipe);
}

/* Carries out one message of the daemon; the datagram's descriptor is used up. */
static void carry_out(supervisor *s, ts_store_datagram *d)
{
    ts_store_message m;
    const char *why = ts_store_parse(d, &m);
    if (why != NULL) {
        ts_log(TS_LOG_WARNING, "a message of the daemon (pid %d) is dropped: %s", (int)s->pid, why);
        if (d->fd >= 0)
            close(d->fd);
        return;
    }
    if (m.store) {
        why = ts_held_fds_add(&s->held, m.name, d->fd, false);
        if (why != NULL)
            ts_log(TS_LOG_ERROR, "%s isn't held: %s (%u of %u, names of %zu of %d bytes)", m.name,
                   why, s->held.count, s->held.max, s->held.names_bytes, TS_STORE_NAMES_BYTES);
    } else if (m.remove) {
        if (!ts_held_fds_remove(&s->held, m.name))
            ts_log(TS_LOG_WARNING, "%s can't be removed: it isn't held", m.name);
    } else if (m.barrier) {
        answer_barrier(d->fd);
    }
    if (m.stopping) {
        s->stops = true;
        s->stops_with = m.exit_status;
    }
    s->was_ready = s->was_ready || m.ready;
    if (m.forward[0] != '\0')
        tell_upward(s, m.forward);
}

/* Reads at most `most` of the messages that have come to this socket. False: its connection has
 * ended. */
static bool read_messages(supervisor *s, int socket, uint32_t most)
{
    ts_store_datagram d;
    int came = 1;
    for (; most > 0 && (came = ts_store_receive(socket, &d)) > 0; most--) {
        if (s->pid != 0 && d.pid == s->pid) {
            carry_out(s, &d);
            continue;
        }
        ts_log(TS_LOG_WARNING, "a message of pid %d is dropped: the daemon is pid %d", (int)d.pid,
               (int)s->pid);
        if (d.fd >= 0)
            close(d.fd);
    }
    return came > 0 || (came < 0 && (errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM));
}

static void drop_connection(supervisor *s)
{
    if (s->connection >= 0)
        close(s->connection);
    s->connection = -1;
}

/* ---- a daemon whose supervisor died ---- */

/* A connection to SOCKET.store, of the daemon that is to be adopted or that was and lost its
 * connection. It has all its descriptors, and sends them again. */
static void adopt(supervisor *s)
{
    struct ucred peer;
    socklen_t length = sizeof peer;
    char greeting[32];
    int fd = accept4(s->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0 || peer.uid != geteuid() ||
        (s->pid != 0 && peer.pid != s->pid)) {
        ts_log(TS_LOG_WARNING, "%s: a process that isn't this user's daemon is refused",
               s->store_path);
        close(fd);
        return;
    }
    /* If the peer is dead already, its connection is closed, and the pidfd may be another's. */
    int pidfd = s->pid == 0 ? (int)syscall(SYS_pidfd_open, peer.pid, 0) : s->pidfd;
    struct pollfd end = {.fd = fd};
    snprintf(greeting, sizeof greeting, TS_ENV_FDSTORE "=%u", s->held.max);
    if (pidfd < 0 || poll(&end, 1, 0) != 0 || ts_store_send(fd, greeting, -1) != 0) {
        if (pidfd >= 0 && pidfd != s->pidfd)
            close(pidfd);
        close(fd);
        return;
    }
    if (s->pid == 0) {
        ts_log(TS_LOG_INFO, "takes over the live daemon, pid %d", (int)peer.pid);
        s->started_ms = ts_now_ms();
        s->ended = s->stops = s->child = s->adopting = false;
        s->was_ready = true;
    }
    ts_held_fds_clear(&s->held);
    s->pid = peer.pid;
    s->pidfd = pidfd;
    s->connection = fd;
    tell_upward(s, "READY=1");
}

/* ---- the daemon's end ---- */

static void describe_end(supervisor *s)
{
    if (!s->child) {
        s->exit_status = s->stops ? s->stops_with : EXIT_FAILURE;
        if (s->stops)
            snprintf(s->last_death, sizeof s->last_death, "status %d", s->exit_status);
        else
            snprintf(s->last_death, sizeof s->last_death, "unknown");
    } else if (WIFEXITED(s->wait_status)) {
        s->exit_status = WEXITSTATUS(s->wait_status);
        snprintf(s->last_death, sizeof s->last_death, "status %d", s->exit_status);
    } else {
        s->exit_status = 128 + WTERMSIG(s->wait_status);
        snprintf(s->last_death, sizeof s->last_death, "signal %d", WTERMSIG(s->wait_status));
    }
}

static void note_cause(supervisor *s)
{
    const int first = (int)strcspn(s->cause, ",");
    char served[sizeof s->last_death];
    snprintf(served, sizeof served, "%.*s", first, s->cause);
    if (s->was_ready || !s->has_served || strcmp(served, s->last_death) == 0)
        snprintf(s->cause, sizeof s->cause, "%s", s->last_death);
    else
        snprintf(s->cause, sizeof s->cause, "%s, then %s", served, s->last_death);
}

static uint32_t restart_delay(supervisor *s)
{
    uint32_t delay = FIRST_DELAY_MS;
    if (s->exit_status == TS_EXIT_AGAIN || ts_now_ms() - s->started_ms >= s->options->stable_ms) {
        s->short_lives = 0;
        return 0;
    }
    if (s->was_ready) /* what ended it came from outside: others wait for it */
        s->short_lives = 0;
    for (uint32_t i = 0; i < s->short_lives && delay < MOST_DELAY_MS; i++)
        delay *= 2;
    s->short_lives++;
    return delay < MOST_DELAY_MS ? delay : MOST_DELAY_MS;
}

/* The daemon is dead, and what it sent last is carried out. Whether the supervisor goes on. */
static bool bury(supervisor *s)
{
    char status[96];
    (void)read_messages(s, s->notify, LAST_MESSAGES);
    if (s->connection >= 0)
        (void)read_messages(s, s->connection, LAST_MESSAGES);
    drop_connection(s);
    if (s->pidfd >= 0)
        close(s->pidfd);
    describe_end(s);
    const pid_t pid = s->pid;
    s->pid = 0;
    s->pidfd = -1;
    s->ended = false;
    if (s->told_to_end || s->exit_status == 0)
        return false;
    const uint32_t delay = restart_delay(s);
    s->has_served = s->has_served || s->was_ready;
    note_cause(s);
    s->was_ready = false;
    s->deaths++;
    s->until_ms = ts_now_ms() + delay;
    const bool ordered = s->exit_status == TS_EXIT_AGAIN;
    ts_log(ordered ? TS_LOG_INFO : TS_LOG_ERROR,
           "the daemon (pid %d) %s: %s. It is started again in %u ms with %u "
           "descriptors; death %u",
           (int)pid, ordered ? "ended" : "died", s->last_death, delay, s->held.count, s->deaths);
    snprintf(status, sizeof status, "STATUS=The daemon %s (%s) and is started again; death %u",
             ordered ? "ended" : "died", s->last_death, s->deaths);
    tell_upward(s, status);
    return true;
}

/* ---- signals and the loop ---- */

/* Children that aren't the daemon are orphans, where this is a container's first process. */
static void reap(supervisor *s)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == s->pid && s->child) {
            s->ended = true;
            s->wait_status = status;
        }
}

static void signal_daemon(const supervisor *s, int number)
{
    if (s->pid == 0 || s->ended)
        return;
    if (s->child)
        (void)kill(s->pid, number);
    else
        (void)syscall(SYS_pidfd_send_signal, s->pidfd, number, NULL, 0);
}

static void on_signal(supervisor *s, int number)
{
    const uint64_t now = ts_now_ms();
    if (number == SIGCHLD) {
        reap(s);
    } else if (number == SIGHUP) {
        signal_daemon(s, SIGHUP);
    } else if (!s->told_to_end) {
        ts_log(TS_LOG_INFO, "%s: the daemon is told to end", strsignal(number));
        tell_upward(s, "STOPPING=1");
        s->told_to_end = true;
        s->told_ms = now;
        signal_daemon(s, number);
    } else if (now - s->told_ms >= s->options->kill_after_ms) {
        ts_log(TS_LOG_WARNING, "%s again: the daemon is killed", strsignal(number));
        signal_daemon(s, SIGKILL);
    }
}

static int timeout(const supervisor *s)
{
    const uint64_t now = ts_now_ms();
    if (s->pid != 0)
        return -1;
    const uint64_t left = now < s->until_ms ? s->until_ms - now : 0;
    return (int)(s->adopting && left > LOCK_POLL_MS ? LOCK_POLL_MS : left);
}

/* Waits for something and takes it in. */
static void turn(supervisor *s)
{
    enum { SIGNALS, NOTIFY, CONNECTION, PIDFD, LISTENER };
    struct pollfd p[] = {
        [SIGNALS] = {.fd = s->signal_fd, .events = POLLIN},
        [NOTIFY] = {.fd = s->notify, .events = POLLIN},
        [CONNECTION] = {.fd = s->connection, .events = POLLIN},
        [PIDFD] = {.fd = s->child ? -1 : s->pidfd, .events = POLLIN},
        /* While a child serves, a daemon of before waits; it can't have the socket's lock. */
        [LISTENER] = {.fd = s->adopting || (s->pid != 0 && !s->child && s->connection < 0)
                                ? s->listener
                                : -1,
                      .events = POLLIN},
    };
    struct signalfd_siginfo info;
    if (poll(p, sizeof p / sizeof *p, timeout(s)) <= 0)
        return;
    while (p[SIGNALS].revents != 0 && read(s->signal_fd, &info, sizeof info) == sizeof info)
        on_signal(s, (int)info.ssi_signo);
    if (p[PIDFD].revents != 0)
        s->ended = true;
    if (s->ended)
        return;
    if (p[NOTIFY].revents != 0)
        (void)read_messages(s, s->notify, MESSAGES_PER_TURN);
    if (p[CONNECTION].revents != 0 && !read_messages(s, s->connection, MESSAGES_PER_TURN))
        drop_connection(s);
    if (p[LISTENER].revents != 0)
        adopt(s);
}

/* Without a daemon: whether to go on after it was seen to that there will be one. */
static bool without_daemon(supervisor *s)
{
    if (s->told_to_end)
        return false;
    if (s->adopting && !daemon_lives(s)) {
        s->adopting = false;
        s->until_ms = 0;
    } else if (s->adopting && ts_now_ms() >= s->until_ms) {
        ts_log(TS_LOG_ERROR,
               "another tinyserved serves %s, and it was not started by --supervise: it is left "
               "alone",
               s->options->socket);
        s->exit_status = EXIT_FAILURE;
        return false;
    }
    if (!s->adopting && ts_now_ms() >= s->until_ms)
        start(s);
    return true;
}

int ts_supervise(const ts_supervise_options *options)
{
    supervisor s = {.options = options, .exit_status = EXIT_FAILURE};
    if (set_up(&s)) {
        s.exit_status = EXIT_SUCCESS;
        bool goes_on = true;
        while (goes_on) {
            goes_on = s.pid != 0 ? !s.ended || bury(&s) : without_daemon(&s);
            if (goes_on)
                turn(&s);
        }
    }
    tear_down(&s);
    return s.exit_status;
}
