#define _GNU_SOURCE
#include "held_fds.h"

#include "store_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FIRST 3

bool ts_held_fds_init(ts_held_fds *h, uint32_t max)
{
    *h = (ts_held_fds){.items = calloc(max, sizeof *h->items), .max = max};
    return h->items != NULL;
}

static void drop(ts_held_fds *h, uint32_t i)
{
    h->names_bytes -= strlen(h->items[i].name) + 1;
    close(h->items[i].fd);
    free(h->items[i].name);
    h->count--;
    memmove(&h->items[i], &h->items[i + 1], (h->count - i) * sizeof *h->items);
}

void ts_held_fds_fini(ts_held_fds *h)
{
    while (h->count > 0)
        drop(h, h->count - 1);
    free(h->items);
    h->items = NULL;
}

static uint32_t find(const ts_held_fds *h, const char *name)
{
    uint32_t i = 0;
    while (i < h->count && (h->items[i].passed || strcmp(h->items[i].name, name) != 0))
        i++;
    return i;
}

const char *ts_held_fds_add(ts_held_fds *h, const char *name, int fd, bool passed)
{
    const size_t bytes = strlen(name) + 1;
    const char *why = h->count == h->max ? "there are as many as are held"
                      : h->names_bytes + bytes > TS_STORE_NAMES_BYTES ? "the names are too long"
                      : !passed && find(h, name) < h->count ? "one of this name is held already"
                                                            : NULL;
    char *copy = why == NULL ? strdup(name) : NULL;
    if (why == NULL && copy == NULL)
        why = "no memory";
    if (why != NULL) {
        close(fd);
        return why;
    }
    h->items[h->count++] = (ts_held_fd){.name = copy, .fd = fd, .passed = passed};
    h->names_bytes += bytes;
    return NULL;
}

bool ts_held_fds_remove(ts_held_fds *h, const char *name)
{
    const uint32_t i = find(h, name);
    if (i == h->count)
        return false;
    drop(h, i);
    return true;
}

void ts_held_fds_clear(ts_held_fds *h)
{
    for (uint32_t i = h->count; i-- > 0;)
        if (!h->items[i].passed)
            drop(h, i);
}

/* Closes what isn't held where the held ones are going to be. */
static bool make_way(const ts_held_fds *h)
{
    bool *held = calloc(h->count + 1, sizeof *held);
    if (held == NULL)
        return false;
    for (uint32_t i = 0; i < h->count; i++)
        if ((uint32_t)(h->items[i].fd - FIRST) < h->count)
            held[h->items[i].fd - FIRST] = true;
    for (uint32_t i = 0; i < h->count; i++)
        if (!held[i])
            close(FIRST + (int)i);
    free(held);
    return true;
}

/* Each goes to its number, or, where another one still is, beyond; then those are tried again. Each
 * pass puts at least the first of them right. */
static bool put_in_order(ts_held_fds *h)
{
    for (uint32_t from = 0, again; from < h->count; from = again) {
        again = h->count;
        for (uint32_t i = from; i < h->count; i++) {
            const int want = FIRST + (int)i;
            if (h->items[i].fd == want)
                continue;
            const int fd = fcntl(h->items[i].fd, F_DUPFD, want);
            if (fd < 0)
                return false;
            close(h->items[i].fd);
            h->items[i].fd = fd;
            if (fd != want && again == h->count)
                again = i;
        }
    }
    return true;
}

bool ts_held_fds_pass(ts_held_fds *h)
{
    char pid[16], count[16];
    char *names = malloc(h->names_bytes + 1), *to = names;
    if (names == NULL || !make_way(h) || !put_in_order(h)) {
        free(names);
        return false;
    }
    *to = '\0';
    for (uint32_t i = 0; i < h->count; i++) {
        if (fcntl(h->items[i].fd, F_SETFD, 0) != 0)
            break;
        if (i > 0)
            to = stpcpy(to, ":");
        to = stpcpy(to, h->items[i].name);
    }
    snprintf(pid, sizeof pid, "%d", (int)getpid());
    snprintf(count, sizeof count, "%u", h->count);
    const bool set = setenv("LISTEN_PID", pid, 1) == 0 && setenv("LISTEN_FDS", count, 1) == 0 &&
                     setenv("LISTEN_FDNAMES", names, 1) == 0;
    free(names);
    return set;
}
