/* Who keeps the books' descriptors in a test: what is kept lives while the test does. */
#ifndef TS_KEEPER_UTIL_H
#define TS_KEEPER_UTIL_H

#include "test_util.h"

#include "books.h"

#include <fcntl.h>
#include <unistd.h>

#define KEPT_MAX 8

typedef struct keeper {
    char names[KEPT_MAX][32];
    int fds[KEPT_MAX]; /* with a name */
} keeper;

static inline int place_of(const keeper *k, const char *name)
{
    int i = 0;
    while (i < KEPT_MAX && strcmp(k->names[i], name) != 0)
        i++;
    return i;
}

static inline int take(void *arg, const char *name)
{
    const keeper *k = arg;
    const int i = place_of(k, name);
    return i == KEPT_MAX ? -1 : fcntl(k->fds[i], F_DUPFD_CLOEXEC, 0);
}

static inline ts_status keep(void *arg, const char *name, int fd, char *why, size_t why_bytes)
{
    keeper *k = arg;
    (void)why;
    (void)why_bytes;
    assert_int_equal(place_of(k, name), KEPT_MAX);
    const int i = place_of(k, "");
    assert_true(i < KEPT_MAX);
    snprintf(k->names[i], sizeof k->names[i], "%s", name);
    k->fds[i] = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return TS_OK;
}

static inline void forget(void *arg, const char *name)
{
    keeper *k = arg;
    const int i = place_of(k, name);
    if (i == KEPT_MAX || name[0] == '\0')
        return;
    close(k->fds[i]);
    k->names[i][0] = '\0';
}

static inline void keeper_end(keeper *k)
{
    for (int i = 0; i < KEPT_MAX; i++)
        if (k->names[i][0] != '\0')
            close(k->fds[i]);
}

#endif
