/* Which slab a block comes from: each tenant's list of slabs with free blocks, and each session's
 * of slabs that are its own. */
#include "block_pool_internal.h"

#include <stdlib.h>

void ts_pool_avail_add(ts_pool_books *p, uint32_t slab)
{
    ts_slab *s = &p->slabs[slab];
    ts_pool_tenant *t = &p->tenants[s->tenant];
    const bool first = s->home == 0;
    s->avail_prev = first ? TS_NONE : t->avail_last;
    s->avail_next = first ? t->avail : TS_NONE;
    if (s->avail_prev != TS_NONE)
        p->slabs[s->avail_prev].avail_next = slab;
    else
        t->avail = slab;
    if (s->avail_next != TS_NONE)
        p->slabs[s->avail_next].avail_prev = slab;
    else
        t->avail_last = slab;
    t->nobodys += first;
}

void ts_pool_avail_remove(ts_pool_books *p, uint32_t slab)
{
    const ts_slab *s = &p->slabs[slab];
    ts_pool_tenant *t = &p->tenants[s->tenant];
    if (s->avail_prev != TS_NONE)
        p->slabs[s->avail_prev].avail_next = s->avail_next;
    else
        t->avail = s->avail_next;
    if (s->avail_next != TS_NONE)
        p->slabs[s->avail_next].avail_prev = s->avail_prev;
    else
        t->avail_last = s->avail_prev;
    t->nobodys -= s->home == 0;
}

/* ---- sessions' own slabs ---- */

static void home_add(ts_pool_books *p, uint32_t slab, bool first)
{
    ts_slab *s = &p->slabs[slab];
    ts_slab_home *h = &p->homes[s->home - 1];
    p->tenants[s->tenant].homes += h->first == TS_NONE;
    s->home_prev = first ? TS_NONE : h->last;
    s->home_next = first ? h->first : TS_NONE;
    if (s->home_prev != TS_NONE)
        p->slabs[s->home_prev].home_next = slab;
    else
        h->first = slab;
    if (s->home_next != TS_NONE)
        p->slabs[s->home_next].home_prev = slab;
    else
        h->last = slab;
}

static void home_remove(ts_pool_books *p, uint32_t slab)
{
    const ts_slab *s = &p->slabs[slab];
    ts_slab_home *h = &p->homes[s->home - 1];
    if (s->home_prev != TS_NONE)
        p->slabs[s->home_prev].home_next = s->home_next;
    else
        h->first = s->home_next;
    if (s->home_next != TS_NONE)
        p->slabs[s->home_next].home_prev = s->home_prev;
    else
        h->last = s->home_prev;
    p->tenants[s->tenant].homes -= h->first == TS_NONE;
}

void ts_pool_home_move(ts_pool_books *p, uint32_t slab, bool first)
{
    if (p->slabs[slab].home == 0)
        return;
    home_remove(p, slab);
    home_add(p, slab, first);
}

void ts_pool_set_home(ts_pool_books *p, uint32_t slab, uint32_t session)
{
    ts_slab *s = &p->slabs[slab];
    const uint32_t home = session == TS_NONE ? 0 : session + 1;
    const bool avail = slab_free(s) > 0;
    if (s->home == home)
        return;
    if (avail)
        ts_pool_avail_remove(p, slab);
    if (s->home != 0)
        home_remove(p, slab);
    s->home = home;
    if (home != 0)
        home_add(p, slab, avail);
    if (avail)
        ts_pool_avail_add(p, slab);
}

uint32_t ts_pool_slab_for(ts_pool_books *p, uint32_t tenant, uint32_t session)
{
    const ts_pool_tenant *t = &p->tenants[tenant];
    if (session >= p->num_homes)
        return t->avail;
    const uint32_t own = p->homes[session].first;
    if (own != TS_NONE && slab_free(&p->slabs[own]) > 0)
        return own;
    const uint32_t slab = t->avail;
    if (p->slabs[slab].home == 0)
        ts_pool_set_home(p, slab, session);
    return slab;
}

ts_status ts_pool_use_homes(ts_pool_books *p, uint32_t sessions)
{
    p->homes = malloc((sessions + 1ull) * sizeof *p->homes);
    if (p->homes == NULL)
        return TS_ENOMEM;
    p->num_homes = sessions;
    for (uint32_t i = 0; i < sessions; i++)
        p->homes[i] = (ts_slab_home){TS_NONE, TS_NONE};
    return TS_OK;
}

void ts_pool_leave_home(ts_pool_books *p, uint32_t session)
{
    while (session < p->num_homes && p->homes[session].first != TS_NONE)
        ts_pool_set_home(p, p->homes[session].first, TS_NONE);
}

void ts_pool_find_homes(ts_pool_books *p)
{
    for (uint32_t i = 0; i < p->num_tenants; i++) {
        ts_pool_tenant *t = &p->tenants[i];
        t->avail_last = TS_NONE;
        t->nobodys = t->homes = 0;
        uint32_t left = p->ungranted;
        for (uint32_t slab = t->avail; slab < p->ungranted && left > 0;
             slab = p->slabs[slab].avail_next, left--) {
            t->avail_last = slab;
            t->nobodys += p->slabs[slab].home == 0;
        }
    }
    for (uint32_t i = 0; i < p->ungranted; i++) {
        const ts_slab *s = &p->slabs[i];
        if (s->home == 0 || s->home > p->num_homes)
            continue;
        ts_slab_home *h = &p->homes[s->home - 1];
        if (s->home_prev == TS_NONE) {
            h->first = i;
            p->tenants[s->tenant].homes++;
        }
        if (s->home_next == TS_NONE)
            h->last = i;
    }
}

bool ts_pool_wants_spare(const ts_pool_books *p, uint32_t tenant)
{
    const ts_pool_tenant *t = &p->tenants[tenant];
    const uint32_t most = p->num_slabs / 8;
    return p->ungranted < p->num_slabs && t->nobodys < (t->homes < most ? t->homes : most);
}
