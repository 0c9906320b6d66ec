/* Processes that benchmarks start. They end with tsbench, however it ends. */
#define _GNU_SOURCE
#include "tsbench.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

pid_t bench_start(char *const *argv, int in, int out)
{
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (in >= 0)
            dup2(in, STDIN_FILENO);
        if (out >= 0)
            dup2(out, STDOUT_FILENO);
        execvp(argv[0], argv);
        fprintf(stderr, "tsbench: %s: %s\n", argv[0], strerror(errno));
        _exit(127);
    }
    return pid;
}

pid_t bench_daemon(const bench_options *o, const char *socket, const char *pool, const char *set)
{
    char *argv[] = {(char *)o->daemon,   "--socket", (char *)socket, "--set",
                    "log_level=warning", "--pool",   (char *)pool,   set != NULL ? "--set" : NULL,
                    (char *)set,         NULL};
    pid_t daemon = bench_start(argv, -1, -1);
    while (access(socket, F_OK) != 0 && waitpid(daemon, NULL, WNOHANG) == 0)
        usleep(1000);
    return access(socket, F_OK) == 0 ? daemon : -1;
}

void bench_end(pid_t pid, int signal)
{
    if (pid <= 0)
        return;
    kill(pid, signal);
    waitpid(pid, NULL, 0);
}
