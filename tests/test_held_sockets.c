/* Connections of which another process has the daemon's end, too: they end all the same. */
#define _GNU_SOURCE
#include "raw_client.h"

#include "fd_client.h"

#include <dirent.h>
#include <sched.h>
#include <sys/syscall.h>

#define FDS_MAX 1024

/* Which sockets its descriptors are, by inode; 0: none. Numbers of descriptors come again. */
static void find_sockets(const daemon_process *d, unsigned long *found)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd", (int)d->pid);
    memset(found, 0, FDS_MAX * sizeof *found);
    DIR *dir = opendir(path);
    assert_non_null(dir);
    for (const struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        char target[40] = "";
        const int fd = atoi(entry->d_name);
        if (readlinkat(dirfd(dir), entry->d_name, target, sizeof target - 1) > 0 &&
            strncmp(target, "socket:[", 8) == 0 && fd < FDS_MAX)
            found[fd] = strtoul(target + 8, NULL, 10);
    }
    closedir(dir);
}

static bool has_socket(const unsigned long *sockets, unsigned long inode)
{
    for (int fd = 0; fd < FDS_MAX; fd++)
        if (sockets[fd] == inode)
            return true;
    return false;
}

/* Waits until the daemon has accepted a connection: the descriptor that it has of it. */
static int await_socket(const daemon_process *d, const unsigned long *before, unsigned long *inode)
{
    unsigned long now[FDS_MAX];
    for (;; sched_yield()) { /* or the watchdog ends the test */
        find_sockets(d, now);
        for (int fd = 0; fd < FDS_MAX; fd++)
            if (now[fd] != 0 && !has_socket(before, now[fd])) {
                *inode = now[fd];
                return fd;
            }
    }
}

static void await_close(const daemon_process *d, unsigned long inode)
{
    unsigned long now[FDS_MAX];
    do {
        sched_yield();
        find_sockets(d, now);
    } while (has_socket(now, inode));
}

/* Has both sockets' threads look for events, and the daemon answer. */
static void check_both_serve(const daemon_process *d)
{
    ts_client *c = connect_to(d); /* by messages */
    ts_handle_reply reply;
    int fd;
    assert_int_equal(ts_handle_get(c, TS_HANDLE_EXCHANGE, 0, 0, true, &reply, &fd), TS_ENOENT);
    ts_disconnect(c);
}

static void a_connection_that_another_process_has_too_is_over_when_the_daemon_ends_it(void **state)
{
    (void)state;
    daemon_process d;
    unsigned long before[FDS_MAX], inode;
    daemon_start(&d, POOL_TINY ",blocks=16");
    const int pidfd = (int)syscall(SYS_pidfd_open, d.pid, 0);
    assert_true(pidfd >= 0);
    for (int handles = 0; handles < 2; handles++) {
        find_sockets(&d, before);
        const int raw = handles ? raw_handles(&d) : raw_connect(&d);
        const int theirs = await_socket(&d, before, &inode);
        const int copy = (int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0);
        if (copy < 0 && errno == EPERM) {
            print_message("skipped: this user may not have a descriptor of the daemon's\n");
            close(raw);
            break;
        }
        assert_true(copy >= 0);
        assert_int_equal(send(raw, "no greeting", 11, 0), 11);
        await_close(&d, inode); /* it has ended the connection, whose file is there yet */
        assert_int_equal(send(raw, "and more", 8, 0), 8);
        check_both_serve(&d);
        close(raw);
        check_both_serve(&d);
        close(copy);
    }
    close(pidfd);
    daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_connection_that_another_process_has_too_is_over_when_the_daemon_ends_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
