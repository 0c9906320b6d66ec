/*
 * What a test that stands still was waiting for: when its alarm ends it, it says of itself and of
 * every process that it has started, and they, which system call each thread is in, and where the
 * kernel has it wait. /proc/PID/syscall: the call's number, its arguments, the stack pointer and
 * where the call was made.
 */
#ifndef TS_STANDSTILL_H
#define TS_STANDSTILL_H

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The file's first line, or nothing. */
static inline void standstill_read(const char *path, char *line, size_t bytes)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t got = fd < 0 ? 0 : read(fd, line, bytes - 1);
    line[got < 0 ? 0 : got] = '\0';
    line[strcspn(line, "\n")] = '\0';
    if (fd >= 0)
        close(fd);
}

/* Says where each thread of the process is; `depth`: of its children, and so on, too. */
static inline void standstill_report(int pid, int depth)
{
    char path[96], name[64], where[64], call[256], children[512];
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    for (const struct dirent *t = NULL; tasks != NULL && (t = readdir(tasks)) != NULL;) {
        const int tid = atoi(t->d_name);
        if (tid == 0)
            continue;
        snprintf(path, sizeof path, "/proc/%d/task/%d/comm", pid, tid);
        standstill_read(path, name, sizeof name);
        snprintf(path, sizeof path, "/proc/%d/task/%d/wchan", pid, tid);
        standstill_read(path, where, sizeof where);
        snprintf(path, sizeof path, "/proc/%d/task/%d/syscall", pid, tid);
        standstill_read(path, call, sizeof call);
        fprintf(stderr, "%*sprocess %d, thread %d (%s): %s; %s\n", 4 - depth, "", pid, tid, name,
                where, call);
        snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, tid);
        standstill_read(path, children, sizeof children);
        char *rest, *child = strtok_r(children, " ", &rest);
        for (; depth > 0 && child != NULL; child = strtok_r(NULL, " ", &rest))
            standstill_report(atoi(child), depth - 1);
    }
    if (tasks != NULL)
        closedir(tasks);
}

static inline void standstill_end(int number)
{
    static const char said[] = "the test stands still:\n";
    (void)!write(STDERR_FILENO, said, sizeof said - 1);
    standstill_report(getpid(), 3);
    (void)signal(number, SIG_DFL);
    (void)raise(number);
}

/* The test ends with a report if it is neither over nor calls alarm(0) within `seconds` seconds. */
static inline void standstill_after(unsigned seconds)
{
    (void)signal(SIGALRM, standstill_end);
    alarm(seconds);
}

#endif
