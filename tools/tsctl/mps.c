#define _GNU_SOURCE /* pipe2 */
#include "mps.h"

#include "clock.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define CONTROL "nvidia-cuda-mps-control"
#define ANSWER_MS 5000u
#define SERVERS_MAX 64

extern char **environ;

bool mps_runs(void)
{
    const char *folder = getenv("CUDA_MPS_PIPE_DIRECTORY");
    char path[4096];
    snprintf(path, sizeof path, "%s/control", folder != NULL ? folder : "/tmp/nvidia-mps");
    return access(path, F_OK) == 0;
}

/* Starts the control with these ends as its input and output. */
static int start_control(int in, int out, pid_t *pid)
{
    char name[] = CONTROL;
    char *arguments[] = {name, NULL};
    posix_spawn_file_actions_t actions;
    int error = posix_spawn_file_actions_init(&actions);
    if (error != 0)
        return error;
    error = posix_spawn_file_actions_adddup2(&actions, in, 0);
    if (error == 0)
        error = posix_spawn_file_actions_adddup2(&actions, out, 1);
    if (error == 0)
        error = posix_spawnp(pid, CONTROL, &actions, NULL, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    return error;
}

/* What comes until the other side ends, as one string; false after ANSWER_MS. */
static bool read_answer(int from, char *answer, size_t bytes)
{
    const uint64_t deadline = ts_now_ms() + ANSWER_MS;
    size_t length = 0;
    for (;;) {
        const uint64_t now = ts_now_ms();
        struct pollfd p = {.fd = from, .events = POLLIN};
        char rest[256];
        const bool room = length + 1 < bytes;
        if (now >= deadline || (poll(&p, 1, (int)(deadline - now)) < 0 && errno != EINTR))
            return false;
        if (p.revents == 0)
            continue;
        const ssize_t got =
            read(from, room ? answer + length : rest, room ? bytes - 1 - length : sizeof rest);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            answer[length] = '\0';
            return got == 0;
        }
        length += room ? (size_t)got : 0;
    }
}

/* Gives the control one order; what it prints is in `answer`. */
static bool ask_control(const char *words, char *answer, size_t answer_bytes, char *why,
                        size_t why_bytes)
{
    int in[2] = {-1, -1}, out[2] = {-1, -1}, status = 0, error = 0;
    pid_t pid = -1;
    bool answered = false;
    if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0)
        error = errno;
    else
        error = start_control(in[0], out[1], &pid);
    if (in[0] >= 0)
        close(in[0]);
    if (out[1] >= 0)
        close(out[1]);
    if (error != 0) {
        snprintf(why, why_bytes, CONTROL " can't be run: %s", strerror(error));
    } else {
        const ssize_t length = (ssize_t)strlen(words);
        answered = write(in[1], words, (size_t)length) == length;
        close(in[1]);
        in[1] = -1;
        answered = answered && read_answer(out[0], answer, answer_bytes);
        if (!answered)
            (void)kill(pid, SIGKILL);
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            ;
        if (!answered)
            snprintf(why, why_bytes, CONTROL " didn't answer '%.*s' within %u s",
                     (int)strcspn(words, "\n"), words, ANSWER_MS / 1000);
        else if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            snprintf(why, why_bytes, CONTROL " refused '%.*s': %.*s", (int)strcspn(words, "\n"),
                     words, (int)strcspn(answer, "\n"), answer);
        answered = answered && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    if (in[1] >= 0)
        close(in[1]);
    if (out[0] >= 0)
        close(out[0]);
    return answered;
}

/* The numbers in a listing, one in each line; lines that are none are skipped. */
static uint32_t read_pids(const char *text, uint32_t *pids, uint32_t most)
{
    uint32_t count = 0;
    for (const char *line = text; *line != '\0' && count < most;) {
        char *end;
        const unsigned long pid = strtoul(line, &end, 10);
        if (end != line && pid > 0 && pid <= UINT32_MAX && (*end == '\n' || *end == '\0'))
            pids[count++] = (uint32_t)pid;
        line += strcspn(line, "\n");
        line += *line == '\n';
    }
    return count;
}

bool mps_end_client(uint32_t pid, bool *ended, char *why, size_t why_bytes)
{
    char answer[16384], words[64];
    uint32_t servers[SERVERS_MAX], clients[1024];
    *ended = false;
    if (!ask_control("get_server_list\n", answer, sizeof answer, why, why_bytes))
        return false;
    const uint32_t num_servers = read_pids(answer, servers, SERVERS_MAX);
    for (uint32_t i = 0; i < num_servers; i++) {
        snprintf(words, sizeof words, "get_client_list %u\n", servers[i]);
        if (!ask_control(words, answer, sizeof answer, why, why_bytes))
            return false;
        const uint32_t num_clients = read_pids(answer, clients, sizeof clients / sizeof clients[0]);
        for (uint32_t j = 0; j < num_clients; j++) {
            if (clients[j] != pid)
                continue;
            snprintf(words, sizeof words, "terminate_client %u %u\n", servers[i], pid);
            if (!ask_control(words, answer, sizeof answer, why, why_bytes))
                return false;
            *ended = true;
        }
    }
    return true;
}
