/*
 * The way from the store to its holder: a list of messages, and a thread that sends them, sees the
 * holder's death and looks for the next one. Inside the store; its users include store.h.
 *
 * The lock guards all fields but for what is atomic. The thread sends without blocking while it has
 * it.
 */
#ifndef TS_STORE_LINK_H
#define TS_STORE_LINK_H

#include "store_wire.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/un.h>

typedef enum ts_store_item_kind { TS_ITEM_PUT, TS_ITEM_REMOVE, TS_ITEM_BARRIER } ts_store_item_kind;

typedef struct ts_store_item {
    TAILQ_ENTRY(ts_store_item) next;
    ts_store_item_kind kind;
    uint64_t id;
    int fd;       /* a put's duplicate, a barrier's pipe; -1: not needed any more */
    bool untaken; /* there at start */
    char name[TS_STORE_NAME_BYTES + 1];
} ts_store_item;

TAILQ_HEAD(ts_store_items, ts_store_item);

/* A listening socket of socket activation. */
typedef struct ts_store_listener {
    char *name;
    int fd;
} ts_store_listener;

struct ts_store {
    pthread_mutex_t lock;
    pthread_t thread;
    bool runs, ends;
    atomic_bool lags; /* the last barrier wasn't reached */
    int wake;         /* an eventfd */
    int socket;       /* to the holder; -1: none */
    int death;        /* readable when the supervisor, our parent, is dead; -1: none */
    bool holds;       /* the holder lives and takes messages */
    bool supervised;  /* by a supervisor: another one may follow it */
    char supervisor[sizeof(((struct sockaddr_un *)0)->sun_path)];
    uint64_t look_ms; /* when a supervisor is looked for again */
    uint32_t fds_max, fds, reserved;
    size_t names_bytes;
    uint64_t ids;
    struct ts_store_items pending; /* to be sent, in order */
    struct ts_store_items held;    /* puts that were sent */
    ts_store_listener *listeners;
    uint32_t num_listeners;
    void (*changed)(void *arg, bool holds);
    void *changed_arg;
};

typedef struct ts_store ts_store;

/* An item that owns the descriptor from then on; NULL: no memory. */
ts_store_item *ts_store_item_new(ts_store *s, ts_store_item_kind kind, const char *name, int fd);

void ts_store_item_free(ts_store_item *i);

/* The put of this name; NULL: there is none. */
ts_store_item *ts_store_find(struct ts_store_items *list, const char *name);

/* One descriptor of this name more (1) or less (-1). */
void ts_store_count(ts_store *s, const char *name, int by);

/* Has the thread look at what changed. */
void ts_store_wake(ts_store *s);

/* The holder is gone. Puts are kept for the next one; orders to one that is dead are void. */
void ts_store_lose(ts_store *s);

/* Finds the holder that the environment names. */
void ts_store_find_holder(ts_store *s);

/* The thread, until `ends` is set. */
void *ts_store_run(void *store);

#endif
