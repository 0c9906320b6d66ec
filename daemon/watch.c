#define _GNU_SOURCE
#include "watch.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BUCKETS 1024u
#define STOP UINT64_MAX

typedef struct watched {
    struct watched *next;
    uint32_t key;
    int fd;
} watched;

struct ts_watch {
    void (*ended)(void *arg, uint32_t key);
    void *arg;
    pthread_t thread;
    int epoll, stop;
    pthread_mutex_t lock;
    watched *buckets[BUCKETS];
};

static void *watch_main(void *arg)
{
    ts_watch *w = arg;
    for (;;) {
        struct epoll_event event;
        if (epoll_wait(w->epoll, &event, 1, -1) != 1)
            continue;
        if (event.data.u64 == STOP)
            return NULL;
        ts_watch_remove(w, (uint32_t)event.data.u64); /* told once */
        w->ended(w->arg, (uint32_t)event.data.u64);
    }
}

ts_watch *ts_watch_new(void (*ended)(void *arg, uint32_t key), void *arg)
{
    ts_watch *w = calloc(1, sizeof *w);
    if (w == NULL)
        return NULL;
    w->ended = ended;
    w->arg = arg;
    pthread_mutex_init(&w->lock, NULL);
    w->epoll = epoll_create1(EPOLL_CLOEXEC);
    w->stop = eventfd(0, EFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = STOP};
    if (w->epoll >= 0 && w->stop >= 0 && epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->stop, &event) == 0 &&
        pthread_create(&w->thread, NULL, watch_main, w) == 0)
        return w;
    if (w->epoll >= 0)
        close(w->epoll);
    if (w->stop >= 0)
        close(w->stop);
    free(w);
    return NULL;
}

void ts_watch_free(ts_watch *w)
{
    if (w == NULL)
        return;
    uint64_t one = 1;
    while (write(w->stop, &one, sizeof one) != (ssize_t)sizeof one)
        ;
    pthread_join(w->thread, NULL);
    for (uint32_t i = 0; i < BUCKETS; i++)
        for (watched *x = w->buckets[i], *next; x != NULL; x = next) {
            next = x->next;
            close(x->fd);
            free(x);
        }
    close(w->epoll);
    close(w->stop);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

void ts_watch_add(ts_watch *w, uint32_t key, uint32_t pid)
{
    int fd = pid == 0 ? -1 : (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
    if (fd < 0 && pid != 0 && errno == ESRCH) { /* dead already */
        w->ended(w->arg, key);
        return;
    }
    watched *x = fd < 0 ? NULL : malloc(sizeof *x);
    if (x == NULL) {
        if (fd >= 0)
            close(fd);
        return;
    }
    *x = (watched){.key = key, .fd = fd};
    pthread_mutex_lock(&w->lock);
    x->next = w->buckets[key % BUCKETS];
    w->buckets[key % BUCKETS] = x;
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = key};
    (void)epoll_ctl(w->epoll, EPOLL_CTL_ADD, fd, &event);
    pthread_mutex_unlock(&w->lock);
}

void ts_watch_remove(ts_watch *w, uint32_t key)
{
    pthread_mutex_lock(&w->lock);
    watched **at = &w->buckets[key % BUCKETS];
    while (*at != NULL && (*at)->key != key)
        at = &(*at)->next;
    watched *x = *at;
    if (x != NULL)
        *at = x->next;
    pthread_mutex_unlock(&w->lock);
    if (x != NULL) {
        close(x->fd); /* leaves the epoll set with it */
        free(x);
    }
}
