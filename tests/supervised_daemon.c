/*
 * A program that stands in for the daemon in test_supervisor: it stores what it is told to, and
 * dies as it is told to. Orders come by a SOCK_SEQPACKET connection to the test, one answer for
 * each.
 *
 *   supervised_daemon --supervise STABLE_MS KILL_AFTER_MS ADOPT_MS SOCKET CONTROL
 *   supervised_daemon SOCKET CONTROL
 */
#define _GNU_SOURCE
#include "log.h"
#include "socket_path.h"
#include "store.h"
#include "store_wire.h"
#include "supervisor.h"

#include <dirent.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EXIT_BROKEN = 99 }; /* no test asks for it */

static void need(bool holds, const char *what)
{
    if (holds)
        return;
    perror(what);
    _exit(EXIT_BROKEN);
}

typedef struct fake {
    ts_store *store;
    int control;
    bool deaf; /* SIGTERM ends it not */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int holds; /* what the store told last; -1: nothing yet */
} fake;

static void on_change(void *arg, bool holds)
{
    fake *f = arg;
    pthread_mutex_lock(&f->lock);
    f->holds = holds;
    pthread_cond_signal(&f->changed);
    pthread_mutex_unlock(&f->lock);
}

static void put(fake *f, char *argument, char *answer, size_t bytes)
{
    char *text = strchr(argument, ' ');
    need(text != NULL, argument);
    *text++ = '\0';
    int fd = memfd_create(argument, MFD_CLOEXEC);
    need(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), "memfd");
    if (ts_store_put(f->store, argument, fd, answer, bytes) == TS_OK)
        snprintf(answer, bytes, "ok");
    close(fd);
}

/* Puts under names as long as they may be until one is refused. */
static void fill(fake *f, char *argument, char *answer, size_t bytes)
{
    uint32_t n = 0;
    char name[TS_STORE_NAME_BYTES + 1], why[256];
    (void)argument;
    do {
        snprintf(name, sizeof name, "%.*s.%05u", TS_STORE_NAME_BYTES - 6,
                 "abcdefghijklmnopqrstuvwxyz", n);
        int fd = memfd_create("filling", MFD_CLOEXEC);
        need(fd >= 0, "memfd");
        const ts_status status = ts_store_put(f->store, name, fd, why, sizeof why);
        close(fd);
        if (status != TS_OK)
            break;
    } while (++n < 100000);
    snprintf(answer, bytes, "%u", n);
}

static void read_stored(fake *f, char *argument, char *answer, size_t bytes)
{
    int fd = ts_store_take(f->store, argument);
    ssize_t n = fd < 0 ? -1 : pread(fd, answer, bytes - 1, 0);
    if (n < 0)
        n = snprintf(answer, bytes, "none");
    answer[n] = '\0';
}

static void listening(fake *f, char *argument, char *answer, size_t bytes)
{
    int on = 0;
    socklen_t length = sizeof on;
    int fd = ts_store_take(f->store, argument);
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &length) != 0)
        on = -1;
    snprintf(answer, bytes, "%d", on);
}

typedef struct name_list {
    char *text;
    size_t bytes;
    uint32_t count;
} name_list;

static void add_name(void *arg, const char *name)
{
    name_list *l = arg;
    const size_t used = strlen(l->text);
    if (l->count++ < 16)
        snprintf(l->text + used, l->bytes - used, " %s", name);
}

static void names(fake *f, char *argument, char *answer, size_t bytes)
{
    char text[1024] = "";
    name_list l = {.text = text, .bytes = sizeof text};
    (void)argument;
    ts_store_each(f->store, add_name, &l);
    snprintf(answer, bytes, "%u%s", l.count, text);
}

static void remove_stored(fake *f, char *argument, char *answer, size_t bytes)
{
    snprintf(answer, bytes, "%s", ts_status_name(ts_store_remove(f->store, argument)));
}

static void barrier(fake *f, char *argument, char *answer, size_t bytes)
{
    (void)argument;
    snprintf(answer, bytes, ts_store_barrier(f->store, 60000) ? "done" : "not done");
}

static void deaths(fake *f, char *argument, char *answer, size_t bytes)
{
    const char *count = getenv(TS_ENV_DEATHS), *last = getenv(TS_ENV_LAST_DEATH);
    (void)f;
    (void)argument;
    snprintf(answer, bytes, "%s %s", count != NULL ? count : "-", last != NULL ? last : "-");
}

/* Waits until the store has said that it is held, or that it isn't. */
static void await(fake *f, char *argument, char *answer, size_t bytes)
{
    pthread_mutex_lock(&f->lock);
    while (f->holds != atoi(argument))
        pthread_cond_wait(&f->changed, &f->lock);
    pthread_mutex_unlock(&f->lock);
    snprintf(answer, bytes, "%d", ts_store_holds(f->store));
}

/* Which of the environment's variables of the store this process still has. */
static void variables(fake *f, char *argument, char *answer, size_t bytes)
{
    static const char *const all[] = {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE",
                                      TS_ENV_SUPERVISOR};
    (void)f;
    (void)argument;
    snprintf(answer, bytes, "none");
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (getenv(all[i]) != NULL)
            snprintf(answer, bytes, "%s", all[i]);
}

static void fds(fake *f, char *argument, char *answer, size_t bytes)
{
    uint32_t n = 0;
    DIR *folder = opendir("/proc/self/fd");
    (void)f;
    (void)argument;
    need(folder != NULL, "/proc/self/fd");
    while (readdir(folder) != NULL)
        n++;
    closedir(folder);
    snprintf(answer, bytes, "%u", n - 3); /* ".", ".." and the folder itself */
}

/* "COUNT TEXT": sends the text as it is, with COUNT descriptors. */
static void raw(fake *f, char *argument, char *answer, size_t bytes)
{
    const int count = atoi(argument);
    char *text = strchr(argument, ' ');
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(8 * sizeof(int))];
    } control = {.bytes = {0}};
    (void)f;
    need(text != NULL && count <= 8, argument);
    text++;
    struct iovec part = {.iov_base = text, .iov_len = strlen(text)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memset(CMSG_DATA(c), 0, (size_t)count * sizeof(int)); /* standard input, each */
    }
    int fd = ts_store_connect(getenv("NOTIFY_SOCKET"), SOCK_DGRAM);
    need(fd >= 0, "NOTIFY_SOCKET");
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    need(poll(&p, 1, -1) == 1 && sendmsg(fd, &message, 0) >= 0, "sendmsg");
    close(fd);
    snprintf(answer, bytes, "sent");
}

static void notify(fake *f, char *argument, char *answer, size_t bytes)
{
    (void)f;
    ts_store_notify(argument);
    snprintf(answer, bytes, "sent");
}

static void deafen(fake *f, char *argument, char *answer, size_t bytes)
{
    (void)argument;
    f->deaf = true;
    snprintf(answer, bytes, "deaf");
}

static void end(fake *f, char *argument, char *answer, size_t bytes)
{
    (void)f;
    (void)answer;
    (void)bytes;
    _exit(atoi(argument));
}

static void die(fake *f, char *argument, char *answer, size_t bytes)
{
    (void)f;
    (void)answer;
    (void)bytes;
    signal(atoi(argument), SIG_DFL); /* a sanitizer handles some */
    raise(atoi(argument));
    _exit(EXIT_BROKEN);
}

static const struct {
    const char *name;
    void (*run)(fake *f, char *argument, char *answer, size_t bytes);
} orders[] = {
    {"put", put},       {"fill", fill},       {"read", read_stored}, {"listening", listening},
    {"names", names},   {"barrier", barrier}, {"deaths", deaths},    {"remove", remove_stored},
    {"await", await},   {"fds", fds},         {"raw", raw},          {"notify", notify},
    {"deafen", deafen}, {"exit", end},        {"die", die},          {"variables", variables},
};

static void obey(fake *f, char *order)
{
    char answer[2048] = "unknown";
    char *argument = strchrnul(order, ' ');
    if (*argument != '\0')
        *argument++ = '\0';
    for (size_t i = 0; i < sizeof orders / sizeof *orders; i++)
        if (strcmp(orders[i].name, order) == 0)
            orders[i].run(f, argument, answer, sizeof answer);
    need(send(f->control, answer, strlen(answer), MSG_NOSIGNAL) >= 0, "control");
}

static int serve(const char *socket, const char *control)
{
    static fake f = {
        .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER, .holds = -1};
    char lock_path[128], why[512], text[TS_STORE_MESSAGE_BYTES * 2];
    int lock;
    sigset_t signals;
    if (getenv("TS_TEST_EARLY_SIGNAL") != NULL) /* before it is expected */
        kill(getpid(), atoi(getenv("TS_TEST_EARLY_SIGNAL")));
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    sigset_t ending;
    sigemptyset(&ending);
    sigaddset(&ending, SIGINT);
    pthread_sigmask(SIG_UNBLOCK, &ending, NULL); /* the supervisor leaves it blocked */
    if (ts_socket_path_lock(socket, "daemon", lock_path, sizeof lock_path, &lock, why,
                            sizeof why) != TS_OK)
        return 98; /* another one lives */
    f.store = ts_store_open();
    ts_store_on_change(f.store, on_change, &f);
    f.control = ts_store_connect(control, SOCK_SEQPACKET);
    int signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);
    if (f.control < 0) /* the test is over */
        return 0;
    snprintf(text, sizeof text, "started %d", (int)getpid());
    need(signal_fd >= 0 && send(f.control, text, strlen(text), 0) > 0, "control");
    for (;;) {
        struct pollfd p[] = {{.fd = f.control, .events = POLLIN},
                             {.fd = signal_fd, .events = POLLIN}};
        struct signalfd_siginfo info;
        need(poll(p, 2, -1) > 0, "poll");
        if (p[1].revents != 0) {
            need(read(signal_fd, &info, sizeof info) == sizeof info, "signalfd");
            const char *heard = info.ssi_signo == SIGHUP ? "hangup" : "terminate";
            need(send(f.control, heard, strlen(heard), MSG_NOSIGNAL) > 0, "control");
            if (info.ssi_signo == SIGTERM && !f.deaf)
                return 0;
        }
        if (p[0].revents != 0) {
            ssize_t n = recv(f.control, text, sizeof text - 1, 0);
            if (n <= 0)
                return 0;
            text[n] = '\0';
            obey(&f, text);
        }
    }
}

static int supervise(char **argv)
{
    char *daemon[] = {argv[0], argv[5], argv[6], NULL};
    char place[128], notify_path[128], lock_path[160], why[512];
    int lock;
    const ts_supervise_options options = {.socket = argv[5],
                                          .argv = daemon,
                                          .stable_ms = (uint32_t)atoi(argv[2]),
                                          .kill_after_ms = (uint32_t)atoi(argv[3]),
                                          .adopt_ms = (uint32_t)atoi(argv[4])};
    snprintf(place, sizeof place, "%s" TS_STORE_SOCKET_SUFFIX, options.socket);
    snprintf(notify_path, sizeof notify_path, "%s" TS_NOTIFY_SOCKET_SUFFIX, options.socket);
    if (ts_socket_path_lock(place, "supervisor", lock_path, sizeof lock_path, &lock, why,
                            sizeof why) != TS_OK ||
        ts_socket_path_clear(place, why, sizeof why) != TS_OK ||
        ts_socket_path_clear(notify_path, why, sizeof why) != TS_OK) {
        fprintf(stderr, "%s\n", why);
        return EXIT_BROKEN;
    }
    int code = ts_supervise(&options);
    unlink(lock_path);
    return code;
}

int main(int argc, char **argv)
{
    ts_log_init(TS_LOG_INFO);
    signal(SIGPIPE, SIG_IGN); /* the supervisor that the log went to may be dead */
    if (argc == 7)
        return supervise(argv);
    return argc == 3 ? serve(argv[1], argv[2]) : EXIT_BROKEN;
}
