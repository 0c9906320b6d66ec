/*
 * The names under which sequences are kept: (tenant, name) -> sequence index. One table a pool.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_KEPT_NAMES_H
#define TS_KEPT_NAMES_H

#include "tinyserve_types.h"

#define TS_NAME_BYTES_MAX 127u

typedef struct ts_name_entry {
    char *name; /* NULL: empty; owned by the table */
    uint32_t tenant, value;
    uint64_t hash;
} ts_name_entry;

typedef struct ts_names {
    ts_name_entry *entries;
    uint32_t capacity; /* a power of two, or 0 */
    uint32_t count;
} ts_names;

void ts_names_fini(ts_names *names);

/* TS_NONE (UINT32_MAX) if there is no such name. */
uint32_t ts_names_find(const ts_names *names, uint32_t tenant, const char *name);

/* Adds a name that is not there yet; *kept is the table's copy, good until it is removed. */
ts_status ts_names_add(ts_names *names, uint32_t tenant, const char *name, uint32_t value,
                       const char **kept);

/* The name, which is there, stands for another value. */
void ts_names_set(ts_names *names, uint32_t tenant, const char *name, uint32_t value);

void ts_names_remove(ts_names *names, uint32_t tenant, const char *name);

#endif
