/* Processes that benchmarks start. They end with tsbench, however it ends. */
#define _GNU_SOURCE
#include "tinyserve.h"
#include "tsbench.h"
#include "unconst.h"

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
    char *argv[] = {
        ts_unconst(o->daemon), "--socket", ts_unconst(socket), "--set",
        "log_level=warning",   "--pool",   ts_unconst(pool),   set != NULL ? "--set" : NULL,
        ts_unconst(set),       NULL};
    const ts_options options = {.size = sizeof options, .url = socket, .wait_ms = 10000};
    pid_t daemon = bench_start(argv, -1, -1);
    ts_client *client;
    const ts_status status = ts_connect(&options, &client);
    if (status != TS_OK)
        fprintf(stderr, "tsbench: %s\n", ts_error(client));
    ts_disconnect(client);
    if (status == TS_OK)
        return daemon;
    bench_end(daemon, SIGKILL);
    return -1;
}

void bench_end(pid_t pid, int signal)
{
    if (pid <= 0)
        return;
    kill(pid, signal);
    waitpid(pid, NULL, 0);
}

double bench_together(uint32_t count, char *const *argvs, size_t words)
{
    pid_t pids[BENCH_TOGETHER_MAX];
    int go[2], ready[2];
    char byte, all[BENCH_TOGETHER_MAX];
    if (pipe(go) != 0 || pipe(ready) != 0)
        return -1;
    bool ok = true;
    for (uint32_t i = 0; i < count; i++) {
        pids[i] = bench_start(argvs + i * words, go[0], ready[1]);
        ok = ok && pids[i] > 0;
    }
    close(ready[1]);
    for (uint32_t i = 0; ok && i < count; i++)
        ok = read(ready[0], &byte, 1) == 1;
    memset(all, 'g', sizeof all);
    double t = bench_now();
    ok = ok && write(go[1], all, count) == (ssize_t)count;
    for (uint32_t i = 0; i < count; i++) {
        int status;
        if (!ok && pids[i] > 0)
            kill(pids[i], SIGKILL);
        ok = waitpid(pids[i], &status, 0) == pids[i] && status == 0 && ok;
    }
    t = bench_now() - t;
    close(go[0]);
    close(go[1]);
    close(ready[0]);
    return ok ? t : -1;
}
