#define _GNU_SOURCE
#include "slab_holder.h"

#include "config.h"
#include "memory.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

/* A slab of one pool that the session has a descriptor of. */
typedef struct held_slab {
    uint32_t generation; /* 0: it has none */
    bool goes;           /* there was no room to tell of it */
    uint64_t bytes;
    uint64_t *held; /* counts them while they are owed */
} held_slab;

typedef struct held_pool {
    held_slab *slabs;
    uint32_t capacity;
} held_pool;

struct ts_slab_holder {
    int page_fd, bell;
    ts_revocations *page;
    uint32_t posted, returned;      /* what the page says; the latter is believed within bounds */
    uint32_t waiting;               /* that go, and weren't told of */
    uint64_t since_ms;              /* that nothing was returned, though something is owed */
    held_slab told[TS_REVOCATIONS]; /* by place in the ring */
    held_pool pools[TS_POOLS_MAX];
};

ts_status ts_slab_holder_new(ts_slab_holder **out, char *why, size_t why_bytes)
{
    ts_slab_holder *h = calloc(1, sizeof *h);
    void *page = NULL;
    ts_status status = h == NULL ? TS_ENOMEM : TS_OK;
    *out = NULL;
    if (status == TS_OK)
        status = ts_memory_shared_new("tinyserve-revocations", TS_REVOCATIONS_BYTES, &h->page_fd,
                                      &page, why, why_bytes);
    else
        snprintf(why, why_bytes, "no memory for a session's slabs");
    if (status != TS_OK) {
        free(h);
        return status;
    }
    h->page = page;
    h->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (h->bell < 0) {
        snprintf(why, why_bytes, "no descriptor: %s", strerror(errno));
        ts_slab_holder_free(h);
        return TS_ENOMEM;
    }
    *out = h;
    return TS_OK;
}

int ts_slab_holder_page(const ts_slab_holder *h)
{
    return h->page_fd;
}

int ts_slab_holder_bell(const ts_slab_holder *h)
{
    return h->bell;
}

/* The slab is owed, or isn't any more. */
static void count(const held_slab *s, bool owed)
{
    __atomic_add_fetch(s->held, owed ? s->bytes : -s->bytes, __ATOMIC_RELAXED);
}

ts_status ts_slab_holder_note(ts_slab_holder *h, uint32_t pool, uint32_t slab, uint32_t generation,
                              uint64_t bytes, uint64_t *held, char *why, size_t why_bytes)
{
    held_pool *p = &h->pools[pool];
    if (slab >= p->capacity) {
        uint32_t capacity = p->capacity * 2 > slab ? p->capacity * 2 : slab + 1;
        held_slab *slabs = realloc(p->slabs, capacity * sizeof *slabs);
        if (slabs == NULL) {
            snprintf(why, why_bytes, "no memory for a session's %u slabs", capacity);
            return TS_ENOMEM;
        }
        memset(slabs + p->capacity, 0, (capacity - p->capacity) * sizeof *slabs);
        p->slabs = slabs;
        p->capacity = capacity;
    }
    if (p->slabs[slab].goes) { /* of a pool that was there before */
        h->waiting--;
        count(&p->slabs[slab], false);
    }
    p->slabs[slab] = (held_slab){.generation = generation, .bytes = bytes, .held = held};
    return TS_OK;
}

/* Tells the session of it; there is room. */
static void tell(ts_slab_holder *h, uint32_t pool, uint32_t slab)
{
    held_slab *s = &h->pools[pool].slabs[slab];
    const uint32_t place = h->posted % TS_REVOCATIONS;
    h->page->entries[place] =
        (ts_revocation){.pool = pool, .slab = slab, .generation = s->generation};
    h->told[place] = *s;
    *s = (held_slab){0};
    __atomic_store_n(&h->page->posted, ++h->posted, __ATOMIC_RELEASE);
    ssize_t written = write(h->bell, &(uint64_t){1}, sizeof(uint64_t));
    (void)written; /* else it rings already */
}

void ts_slab_holder_revoke(ts_slab_holder *h, uint32_t pool, uint32_t slab, uint64_t now_ms)
{
    if (h == NULL || slab >= h->pools[pool].capacity)
        return;
    held_slab *s = &h->pools[pool].slabs[slab];
    if (s->generation == 0 || s->goes)
        return;
    if (ts_slab_holder_owes(h) == 0)
        h->since_ms = now_ms;
    count(s, true);
    if (h->posted - h->returned < TS_REVOCATIONS) {
        tell(h, pool, slab);
    } else {
        s->goes = true;
        h->waiting++;
    }
}

/* Counts what the page says was returned. */
static void believe(ts_slab_holder *h, uint64_t now_ms)
{
    const uint32_t said = __atomic_load_n(&h->page->returned, __ATOMIC_ACQUIRE) - h->returned;
    if (said == 0 || said > h->posted - h->returned) /* nothing, or nonsense */
        return;
    for (uint32_t i = 0; i < said; i++)
        count(&h->told[(h->returned + i) % TS_REVOCATIONS], false);
    h->returned += said;
    h->since_ms = now_ms;
}

bool ts_slab_holder_look(ts_slab_holder *h, uint64_t now_ms, uint32_t most_ms)
{
    if (h == NULL || ts_slab_holder_owes(h) == 0)
        return false;
    believe(h, now_ms);
    for (uint32_t pool = 0; pool < TS_POOLS_MAX && h->waiting > 0; pool++)
        for (uint32_t i = 0; i < h->pools[pool].capacity && h->waiting > 0; i++)
            if (h->pools[pool].slabs[i].goes && h->posted - h->returned < TS_REVOCATIONS) {
                tell(h, pool, i);
                h->waiting--;
            }
    return ts_slab_holder_owes(h) > 0 && now_ms - h->since_ms >= most_ms;
}

uint32_t ts_slab_holder_owes(const ts_slab_holder *h)
{
    return h == NULL ? 0 : h->posted - h->returned + h->waiting;
}

void ts_slab_holder_free(ts_slab_holder *h)
{
    if (h == NULL)
        return;
    for (uint32_t i = h->returned; i != h->posted; i++)
        count(&h->told[i % TS_REVOCATIONS], false);
    for (uint32_t pool = 0; pool < TS_POOLS_MAX; pool++) {
        for (uint32_t i = 0; i < h->pools[pool].capacity; i++)
            if (h->pools[pool].slabs[i].goes)
                count(&h->pools[pool].slabs[i], false);
        free(h->pools[pool].slabs);
    }
    if (h->bell >= 0)
        close(h->bell);
    munmap(h->page, TS_REVOCATIONS_BYTES);
    close(h->page_fd);
    free(h);
}
