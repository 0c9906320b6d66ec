/*
 * Where a daemon listens that was told nothing, and clients look, as users who aren't root. Runs as
 * root, in a mount namespace whose /run is empty, so that it may have a daemon of the system's.
 */
#define _GNU_SOURCE
#include "daemon_util.h"

#include "socket_place.h"

#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>

#define POOL "p:layers=1,kv_heads=1,head_dim=32,memory=1M,device=host"
#define OTHER 65534u

/* Opened while root looks: others may not see the folder of the build. */
static int daemon_file = -1, ctl_file, self_file;

/* For who is started: TINYSERVE_URL; NULL: none. */
static const char *url_named;

/* A user of a test's own and the user's folders. */
typedef struct user {
    uid_t uid;
    char home[64];     /* for XDG_RUNTIME_DIR */
    char in_home[128]; /* the folder that the rule makes of it */
    char in_tmp[64];   /* the one without it */
} user;

static int user_make(void **state)
{
    static user u;
    if (geteuid() != 0 || daemon_file < 0)
        return 0;
    u.uid = 1900000000u + (uid_t)getpid();
    snprintf(u.home, sizeof u.home, "/tmp/tinyserve-test.XXXXXX");
    if (mkdtemp(u.home) == NULL || chown(u.home, u.uid, u.uid) != 0)
        return -1;
    snprintf(u.in_home, sizeof u.in_home, "%s/tinyserve", u.home);
    snprintf(u.in_tmp, sizeof u.in_tmp, "/tmp/tinyserve-%u", (unsigned)u.uid);
    *state = &u;
    alarm(WATCHDOG_SECONDS);
    return 0;
}

static int user_remove(void **state)
{
    const user *u = *state;
    char command[256];
    if (u == NULL)
        return 0;
    snprintf(command, sizeof command, "rm -rf %s %s /run/tinyserve", u->home, u->in_tmp);
    alarm(0);
    return chdir("/") != 0 ? -1 : system(command);
}

#define USER(state)                                                                                \
    *(state);                                                                                      \
    if (*(state) == NULL)                                                                          \
    skip()

/* In a child: becomes the user, with this runtime folder or none (NULL). */
static void become(uid_t uid, const char *runtime)
{
    if (setgroups(0, NULL) != 0 || setgid(uid) != 0 || setuid(uid) != 0)
        _exit(126);
    setenv("TMPDIR", runtime != NULL ? runtime : "/var/tmp", 1); /* the rule has no use for it */
    unsetenv("TINYSERVE_URL");
    if (url_named != NULL)
        setenv("TINYSERVE_URL", url_named, 1);
    if (runtime != NULL)
        setenv("XDG_RUNTIME_DIR", runtime, 1);
    else
        unsetenv("XDG_RUNTIME_DIR");
}

/* A program that is started as a user; *out is what it says, to both. */
static pid_t start(int file, uid_t uid, const char *runtime, int *out, const char *const *argv)
{
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        dup2(ends[1], STDOUT_FILENO);
        dup2(ends[1], STDERR_FILENO);
        become(uid, runtime);
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* after setuid, which takes it back */
        fexecve(file, ts_unconst(argv), environ);
        _exit(127);
    }
    close(ends[1]);
    *out = ends[0];
    return pid;
}

static pid_t daemon_as(uid_t uid, const char *runtime, int *out)
{
    const char *const argv[] = {"tinyserved", "--pool", POOL, "--set", "socket_mode=666", NULL};
    return start(daemon_file, uid, runtime, out, argv);
}

/* Reads until the text is there; fails where it doesn't come. Returns all that was said. */
static const char *await_text(int from, const char *text)
{
    static char said[4096];
    size_t used = 0;
    said[0] = '\0';
    while (strstr(said, text) == NULL) {
        ssize_t n = read(from, said + used, sizeof said - 1 - used);
        if (n <= 0)
            fail_msg("'%s' is missing in:\n%s", text, said);
        used += (size_t)n;
        said[used] = '\0';
    }
    return said;
}

/* Reads what the program says until it ends: one that writes to nobody is ended by SIGPIPE. */
static void ends_with(pid_t pid, int from, int expected)
{
    static char said[4096];
    int status;
    size_t used = 0;
    for (ssize_t n; (n = read(from, said + used, sizeof said - 1 - used)) > 0;)
        used += (size_t)n;
    said[used] = '\0';
    close(from);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != expected)
        fail_msg("it ended with %#x where %d was expected, and said last:\n%s", (unsigned)status,
                 expected, said);
}

static void stop(pid_t pid, int out)
{
    kill(pid, SIGTERM);
    ends_with(pid, out, 0);
}

/* A daemon of the user's, which says that it listens in this folder. */
static pid_t serve_in(const user *u, const char *runtime, const char *folder, int *out)
{
    char sentence[192];
    pid_t pid = daemon_as(u->uid, runtime, out);
    snprintf(sentence, sizeof sentence, "listens at %s/tinyserve.sock;", folder);
    const char *said = await_text(*out, " threads");
    if (strstr(said, sentence) == NULL)
        fail_msg("'%s' is missing in:\n%s", sentence, said);
    return pid;
}

/* The daemon doesn't start, and says this. */
static void refuses(const user *u, const char *runtime, int status, const char *sentence)
{
    int out;
    pid_t pid = daemon_as(u->uid, runtime, &out);
    await_text(out, sentence);
    ends_with(pid, out, status);
}

/* ---- clients ---- */

/* Worker: looks for a daemon with ts_connect's defaults, and says whom it found or why none.
 * "wait": then again, waiting for one to come. */
static void looks(const char *how, const char *argument)
{
    (void)argument;
    for (uint32_t wait_ms = 0;; wait_ms = 120000) {
        ts_client *c;
        ts_status status =
            ts_connect(&(ts_options){.size = sizeof(ts_options), .wait_ms = wait_ms}, &c);
        if (status == TS_OK) {
            ts_step *step;
            ts_seq seq;
            ts_pool *p = open_pool(c, "p", 0);
            OK(ts_seq_create(p, 1, &seq));
            OK(ts_step_begin(p, &seq, &(uint32_t){1}, 1, NULL, &step)); /* by the handle socket */
            OK(ts_step_abort(step));
            ts_pool_close(p);
            printf("found %llu.\n", (unsigned long long)daemon_status(c).pid);
        } else {
            printf("%s: %s.\n", ts_status_name(status), ts_error(c));
        }
        fflush(stdout);
        ts_disconnect(c);
        if (strcmp(how, "wait") != 0 || wait_ms > 0)
            return;
    }
}

static pid_t client_as(uid_t uid, const char *runtime, const char *how, int *out)
{
    const char *const argv[] = {"worker", "looks", how, "", NULL};
    return start(self_file, uid, runtime, out, argv);
}

static void client_says(uid_t uid, const char *runtime, const char *text)
{
    int out;
    pid_t pid = client_as(uid, runtime, "once", &out);
    await_text(out, text);
    ends_with(pid, out, 0);
}

static void client_finds(uid_t uid, const char *runtime, pid_t daemon)
{
    char text[32];
    snprintf(text, sizeof text, "found %d.", (int)daemon);
    client_says(uid, runtime, text);
}

static void tsctl_finds_pool(uid_t uid, const char *runtime)
{
    int out;
    const char *const argv[] = {"tsctl", "pools", NULL};
    pid_t pid = start(ctl_file, uid, runtime, &out, argv);
    await_text(out, "\np ");
    ends_with(pid, out, 0);
}

/* The system's daemon: root's, which everybody may reach, whatever root's umask is. It makes its
 * folder. */
static pid_t system_daemon(int *out)
{
    struct stat about;
    const mode_t mask = umask(0077);
    pid_t pid = daemon_as(0, "/tmp", out);
    umask(mask);
    await_text(*out, "listens at /run/tinyserve/tinyserve.sock;");
    assert_int_equal(lstat(TS_SYSTEM_FOLDER, &about), 0);
    assert_int_equal(about.st_mode, S_IFDIR | 0755);
    return pid;
}

/* ---- tests ---- */

static void a_users_daemon_lies_in_the_runtime_folder_and_is_found_there(void **state)
{
    const user *u = USER(state);
    struct stat about;
    char path[160];
    int out;
    pid_t daemon = serve_in(u, u->home, u->in_home, &out);
    assert_int_equal(lstat(u->in_home, &about), 0);
    assert_int_equal(about.st_mode, S_IFDIR | 0700);
    assert_int_equal(about.st_uid, u->uid);
    snprintf(path, sizeof path, "%s/tinyserve.sock.handles", u->in_home);
    assert_int_equal(lstat(path, &about), 0);
    assert_true(S_ISSOCK(about.st_mode));
    client_finds(u->uid, u->home, daemon);
    tsctl_finds_pool(u->uid, u->home);
    stop(daemon, out);
    daemon = serve_in(u, u->home, u->in_home, &out); /* the folder is there already */
    stop(daemon, out);
}

static void without_a_runtime_folder_of_the_users_alone_it_is_in_tmp(void **state)
{
    const user *u = USER(state);
    struct stat about;
    char absent[80], run[80];
    snprintf(absent, sizeof absent, "%s/absent", u->home);
    snprintf(run, sizeof run, "%s/run", u->home);
    assert_int_equal(mkdir(run, 0700), 0); /* theirs, and named by a relative path */
    assert_int_equal(chown(run, u->uid, u->uid), 0);
    assert_int_equal(chdir(u->home), 0);
    const char *const runtimes[] = {NULL, "", "run", "/", absent, u->home};
    assert_int_equal(chmod(u->home, 0770), 0); /* the group may write to the last */
    for (size_t i = 0; i < sizeof runtimes / sizeof *runtimes; i++) {
        int out;
        pid_t daemon = serve_in(u, runtimes[i], u->in_tmp, &out);
        client_finds(u->uid, runtimes[i], daemon);
        stop(daemon, out);
    }
    assert_int_equal(lstat(u->in_tmp, &about), 0);
    assert_int_equal(about.st_mode, S_IFDIR | 0700);
}

/* What somebody else may have put in the place of the user's folder. */
typedef struct foreign {
    mode_t type, mode;
    bool theirs;
    const char *what;
} foreign;

static void a_folder_that_isnt_the_users_alone_is_refused_by_both_sides(void **state)
{
    static const foreign all[] = {
        {S_IFDIR, 0755, true, "belongs to uid 65534 and not to uid"},
        {S_IFDIR, 0770, false, "may be written by others (its mode is 770)"},
        {S_IFDIR, 01707, false, "may be written by others (its mode is 1707)"},
        {S_IFLNK, 0700, false, "is a symbolic link and not a folder"},
        {S_IFREG, 0600, false, "is a file and not a folder"},
    };
    const user *u = USER(state);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const foreign *f = &all[i];
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        char sentence[400], socket_path[96];
        const char *folder = f->type == S_IFLNK ? u->in_home : u->in_tmp;
        snprintf(socket_path, sizeof socket_path, "%.80s/tinyserve.sock", folder);
        int trap = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        assert_true(trap >= 0);
        if (f->type == S_IFREG) {
            int fd = open(u->in_tmp, O_CREAT | O_EXCL | O_WRONLY, f->mode);
            assert_true(fd >= 0);
            close(fd);
        } else {
            assert_int_equal(mkdir(folder, 0700), 0);
            assert_int_equal(chmod(folder, f->mode), 0);
            assert_int_equal(chown(folder, f->theirs ? OTHER : u->uid, u->uid), 0);
            strcpy(address.sun_path, socket_path);
            assert_int_equal(bind(trap, (struct sockaddr *)&address, sizeof address), 0);
            assert_int_equal(chmod(socket_path, 0666), 0);
            assert_int_equal(listen(trap, 8), 0);
        }
        if (f->type == S_IFLNK)
            assert_int_equal(symlink(folder, u->in_tmp), 0);
        snprintf(sentence, sizeof sentence, "%s %s", u->in_tmp, f->what);
        refuses(u, NULL, 1, sentence);
        snprintf(sentence, sizeof sentence,
                 "TS_ECONN: cannot reach /run/tinyserve/tinyserve.sock: is tinyserved running? "
                 "(systemctl status tinyserved; TINYSERVE_URL names another socket); %s %s",
                 u->in_tmp, f->what);
        client_says(u->uid, NULL, sentence);
        assert_int_equal(accept(trap, NULL, NULL), -1); /* nobody has come */
        close(trap);
        unlink(socket_path);
        if (f->type != S_IFREG)
            assert_int_equal(rmdir(folder), 0);
        if (f->type != S_IFDIR)
            assert_int_equal(unlink(u->in_tmp), 0);
    }
}

static void the_address_comes_before_the_users_and_the_users_before_the_systems(void **state)
{
    const user *u = USER(state);
    int systems_out, own_out;
    pid_t systems = system_daemon(&systems_out);
    client_finds(u->uid, u->home, systems);
    pid_t own = serve_in(u, u->home, u->in_home, &own_out);
    client_finds(u->uid, u->home, own);
    client_finds(OTHER, u->home, systems); /* the folder isn't this user's */
    client_finds(0, u->home, systems);     /* root's own is the system's */
    url_named = "/run/tinyserve/tinyserve.sock";
    client_finds(u->uid, u->home, systems);
    tsctl_finds_pool(u->uid, u->home);
    url_named = "";
    client_says(u->uid, u->home,
                "TS_EINVAL: TINYSERVE_URL is empty: ipc:///PATH or /PATH is needed, or none at all "
                "for the user's own daemon or the system's.");
    url_named = NULL;
    kill(own, SIGKILL); /* its socket stays */
    assert_int_equal(waitpid(own, NULL, 0), own);
    close(own_out);
    client_finds(u->uid, u->home, systems);
    stop(systems, systems_out);
}

static void where_there_is_none_the_sentence_names_both_places(void **state)
{
    const user *u = USER(state);
    char sentence[400];
    snprintf(sentence, sizeof sentence,
             "TS_ECONN: cannot reach /run/tinyserve/tinyserve.sock: is tinyserved running? "
             "(systemctl status tinyserved; TINYSERVE_URL names another socket); nor is there "
             "%s/tinyserve.sock.",
             u->in_home);
    client_says(u->uid, u->home, sentence);
    client_says(0, u->home,
                "TS_ECONN: cannot reach /run/tinyserve/tinyserve.sock: is tinyserved running? "
                "(systemctl status tinyserved; TINYSERVE_URL names another socket).");
    int out;
    pid_t own = serve_in(u, u->home, u->in_home, &out); /* and the folder without a daemon */
    stop(own, out);
    client_says(u->uid, u->home, sentence);
}

static void the_owner_of_the_systems_folder_has_the_systems_socket(void **state)
{
    const user *u = USER(state);
    int out;
    assert_int_equal(mkdir(TS_SYSTEM_FOLDER, 0755), 0);
    assert_int_equal(chown(TS_SYSTEM_FOLDER, u->uid, u->uid), 0);
    pid_t daemon = serve_in(u, u->home, TS_SYSTEM_FOLDER, &out);
    client_finds(u->uid, u->home, daemon);
    stop(daemon, out);
}

static void whoever_waits_finds_the_users_daemon_once_it_is_there(void **state)
{
    const user *u = USER(state);
    for (int closed = 0; closed < 2; closed++) {
        int told, out;
        char text[32];
        if (closed) /* to the user: what is refused there isn't an answer */
            assert_int_equal(mkdir(TS_SYSTEM_FOLDER, 0700), 0);
        pid_t client = client_as(u->uid, u->home, "wait", &told);
        await_text(told, closed ? "TS_EPERM: " : "TS_ECONN: ");
        pid_t daemon = serve_in(u, u->home, u->in_home, &out);
        snprintf(text, sizeof text, "found %d.", (int)daemon);
        await_text(told, text);
        ends_with(client, told, 0);
        stop(daemon, out);
    }
}

static void a_runtime_folder_of_too_long_a_path_is_named(void **state)
{
    const user *u = USER(state);
    char far[192], sentence[256];
    snprintf(far, sizeof far, "%s/%0100d", u->home, 0);
    assert_int_equal(mkdir(far, 0700), 0);
    assert_int_equal(chown(far, u->uid, u->uid), 0);
    size_t bytes = strlen(far) + strlen("/tinyserve/tinyserve.sock");
    snprintf(sentence, sizeof sentence,
             "socket: by XDG_RUNTIME_DIR it has a path of %zu bytes; the limit is 91: set another",
             bytes);
    refuses(u, far, 2, sentence);
    snprintf(sentence, sizeof sentence,
             "; the user's own, by XDG_RUNTIME_DIR, has a path of %zu bytes; the limit is 99.",
             bytes);
    client_says(u->uid, far, sentence);
    const char *const doctor[] = {"tsctl", "--json", "doctor", NULL};
    int out;
    pid_t pid = start(ctl_file, u->uid, far, &out, doctor);
    snprintf(sentence, sizeof sentence,
             "the user's own socket, by XDG_RUNTIME_DIR, has a path of %zu bytes; the limit is 99,",
             bytes);
    await_text(out, sentence);
    ends_with(pid, out, 3);
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {{"looks", looks}};
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    if (geteuid() == 0 && unshare(CLONE_NEWNS) == 0 &&
        mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
        mount("none", "/run", "tmpfs", 0, "mode=755") == 0) {
        daemon_file = open(daemon_path(), O_RDONLY | O_CLOEXEC);
        ctl_file = open(TS_CTL, O_RDONLY | O_CLOEXEC);
        self_file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
        if (daemon_file < 0 || ctl_file < 0 || self_file < 0) {
            fprintf(stderr, "%s or %s: %s\n", daemon_path(), TS_CTL, strerror(errno));
            return 1;
        }
    }
#define AS_USER(test) cmocka_unit_test_setup_teardown(test, user_make, user_remove)
    const struct CMUnitTest tests[] = {
        AS_USER(a_users_daemon_lies_in_the_runtime_folder_and_is_found_there),
        AS_USER(without_a_runtime_folder_of_the_users_alone_it_is_in_tmp),
        AS_USER(a_folder_that_isnt_the_users_alone_is_refused_by_both_sides),
        AS_USER(the_address_comes_before_the_users_and_the_users_before_the_systems),
        AS_USER(where_there_is_none_the_sentence_names_both_places),
        AS_USER(the_owner_of_the_systems_folder_has_the_systems_socket),
        AS_USER(whoever_waits_finds_the_users_daemon_once_it_is_there),
        AS_USER(a_runtime_folder_of_too_long_a_path_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
