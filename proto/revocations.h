/*
 * The page in which a session is told which slabs of GPU pools it must unmap: they become another
 * tenant's, or the pool gives them up, and a mapping would keep their memory from the GPU. (Host
 * memory is given back to the system whoever maps it.)
 *
 * The daemon writes an entry, then `posted`, and rings the bell, an eventfd. The library has a
 * thread that waits for the bell, unmaps what the entries name, and then counts them in
 * `returned`. Entries lie one after another in a ring; there are never more than it has that
 * aren't returned yet. What a client writes here the daemon believes of that session alone.
 */
#ifndef TS_REVOCATIONS_H
#define TS_REVOCATIONS_H

#include <stdint.h>

#define TS_REVOCATIONS_BYTES 4096u
#define TS_REVOCATIONS 255u

typedef struct ts_revocation {
    uint32_t pool, slab;
    uint32_t generation; /* of the slab: this one and those before it */
    uint32_t unused;
} ts_revocation;

typedef struct ts_revocations {
    uint32_t posted;   /* entries so far; the daemon's */
    uint32_t returned; /* those of them that were dealt with; the client's */
    uint32_t unused[2];
    ts_revocation entries[TS_REVOCATIONS];
} ts_revocations;

_Static_assert(sizeof(ts_revocations) == TS_REVOCATIONS_BYTES, "layout is shared by two programs");

#endif
