/*
 * The names of kept sequences in order: by tenant, then by bytes. A listing begins anywhere and
 * goes on after any name, also one that is gone, and looks at no other names than it tells.
 *
 * It is a skip list. A node's height comes from a hash of its name, so the same names give the same
 * list; with a seed that nobody knows, no choice of names makes it slow.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_NAME_ORDER_H
#define TS_NAME_ORDER_H

#include "tinyserve_types.h"

#include <stdbool.h>

#define TS_NAME_HEIGHT_MAX                                                                         \
    12u /* a quarter of the nodes of each height have the next: 4^12 names                         \
         */

typedef struct ts_name_node {
    const char *name; /* its owner's (ts_names), while the node is here */
    uint32_t tenant, height;
    struct ts_name_node *next[]; /* of each height; next[0]: the next of all */
} ts_name_node;

/* All 0: no names. */
typedef struct ts_name_order {
    uint64_t seed; /* of the heights */
    ts_name_node *first[TS_NAME_HEIGHT_MAX];
} ts_name_order;

void ts_name_order_fini(ts_name_order *order);

/* Adds a name that the tenant doesn't have yet. False: out of memory. */
bool ts_name_order_add(ts_name_order *order, uint32_t tenant, const char *name);

/* Takes out a name that is there. */
void ts_name_order_remove(ts_name_order *order, uint32_t tenant, const char *name);

/* The tenant's first name that isn't before this one, or, with `past`, that is after it. NULL:
 * there is none. */
const ts_name_node *ts_name_order_from(const ts_name_order *order, uint32_t tenant,
                                       const char *name, bool past);

/* The tenant's next name, or NULL. */
static inline const ts_name_node *ts_name_order_next(const ts_name_node *node)
{
    const ts_name_node *next = node->next[0];
    return next != NULL && next->tenant == node->tenant ? next : NULL;
}

#endif
