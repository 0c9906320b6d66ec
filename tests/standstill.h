/*
 * What a test that stands still was waiting for: when its alarm ends it, it says of itself and of
 * every process that it has started, and they, which system call each thread is in, and where the
 * kernel has it wait. /proc/PID/syscall: the call's number, its arguments, the stack pointer and
 * where the call was made.
 */
#ifndef TS_STANDSTILL_H
#define TS_STANDSTILL_H

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

/* By a shell, since a signal's handler may call little. */
#define STANDSTILL                                                                                 \
    "show() { for t in /proc/$1/task/*; do "                                                       \
    "echo \"process $1, thread ${t##*/} ($(cat $t/comm)): $(cat $t/wchan); $(cat $t/syscall)\"; "  \
    "for child in $(cat $t/children); do [ $child = $$ ] || show $child; done; done; }; "          \
    "echo 'the test stands still:'; show $PPID"

static inline void standstill_end(int number)
{
    const pid_t teller = fork();
    if (teller == 0) {
        (void)dup2(STDERR_FILENO, STDOUT_FILENO);
        execl("/bin/sh", "sh", "-c", STANDSTILL, (char *)NULL);
        _exit(127);
    }
    (void)waitpid(teller, NULL, 0);
    (void)signal(number, SIG_DFL);
    (void)raise(number);
}

/* The test ends if it isn't done in `seconds` seconds, unless alarm(0) comes before. */
static inline void standstill_after(unsigned seconds)
{
    (void)signal(SIGALRM, standstill_end);
    alarm(seconds);
}

#endif
