#define _GNU_SOURCE
#include "passed_fds.h"

#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83
#endif
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define HURRY_NS 1000000L
#define HURRY_SIGNAL SIGURG

bool ts_passed_refuse(int socket)
{
    int off = 0;
    return setsockopt(socket, SOL_SOCKET, SO_PASSRIGHTS, &off, sizeof off) == 0;
}

/* Its coming is all that it is for: a signal that is ignored ends no wait. */
static void on_signal(int signal)
{
    (void)signal;
}

bool ts_hurry_init(ts_hurry *h)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = HURRY_SIGNAL};
    event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, HURRY_SIGNAL);
    h->ready = sigaction(HURRY_SIGNAL, &action, NULL) == 0 &&
               pthread_sigmask(SIG_UNBLOCK, &set, NULL) == 0 &&
               timer_create(CLOCK_MONOTONIC, &event, &h->timer) == 0;
    return h->ready;
}

void ts_hurry_fini(ts_hurry *h)
{
    if (h->ready)
        timer_delete(h->timer);
    h->ready = false;
}

static void set_timer(const ts_hurry *h, long ns)
{
    struct itimerspec time = {.it_value.tv_nsec = ns, .it_interval.tv_nsec = ns};
    if (h->ready)
        (void)timer_settime(h->timer, 0, &time, NULL); /* fails for no value that is given here */
}

void ts_hurry_begin(const ts_hurry *h)
{
    set_timer(h, HURRY_NS);
}

void ts_hurry_end(const ts_hurry *h)
{
    set_timer(h, 0);
}
