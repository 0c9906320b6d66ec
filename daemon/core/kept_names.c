/* Open addressing with linear probing; removal moves later entries back, so there are no
 * tombstones. */
#include "kept_names.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static uint64_t hash_of(uint32_t tenant, const char *name)
{
    return XXH3_64bits_withSeed(name, strlen(name), tenant);
}

void ts_names_fini(ts_names *n)
{
    for (uint32_t i = 0; i < n->capacity; i++)
        free(n->entries[i].name);
    free(n->entries);
    *n = (ts_names){0};
}

/* Where the name is, or the empty entry where it would go. */
static uint32_t locate(const ts_names *n, uint32_t tenant, const char *name, uint64_t hash)
{
    uint32_t i = (uint32_t)hash & (n->capacity - 1);
    for (;; i = (i + 1) & (n->capacity - 1)) {
        const ts_name_entry *e = &n->entries[i];
        if (e->name == NULL ||
            (e->hash == hash && e->tenant == tenant && strcmp(e->name, name) == 0))
            return i;
    }
}

uint32_t ts_names_find(const ts_names *n, uint32_t tenant, const char *name)
{
    if (n->count == 0)
        return UINT32_MAX;
    const ts_name_entry *e = &n->entries[locate(n, tenant, name, hash_of(tenant, name))];
    return e->name == NULL ? UINT32_MAX : e->value;
}

static ts_status grow(ts_names *n)
{
    ts_names bigger = {.capacity = n->capacity == 0 ? 16 : n->capacity * 2, .count = n->count};
    bigger.entries = calloc(bigger.capacity, sizeof *bigger.entries);
    if (bigger.entries == NULL)
        return TS_ENOMEM;
    for (uint32_t i = 0; i < n->capacity; i++) {
        ts_name_entry *e = &n->entries[i];
        if (e->name != NULL)
            bigger.entries[locate(&bigger, e->tenant, e->name, e->hash)] = *e;
    }
    free(n->entries);
    *n = bigger;
    return TS_OK;
}

ts_status ts_names_add(ts_names *n, uint32_t tenant, const char *name, uint32_t value,
                       const char **kept)
{
    if ((n->count + 1) * 4ull > n->capacity * 3ull && grow(n) != TS_OK)
        return TS_ENOMEM;
    char *copy = strdup(name);
    if (copy == NULL)
        return TS_ENOMEM;
    uint64_t hash = hash_of(tenant, name);
    n->entries[locate(n, tenant, name, hash)] =
        (ts_name_entry){.name = copy, .tenant = tenant, .value = value, .hash = hash};
    n->count++;
    *kept = copy;
    return TS_OK;
}

void ts_names_set(ts_names *n, uint32_t tenant, const char *name, uint32_t value)
{
    n->entries[locate(n, tenant, name, hash_of(tenant, name))].value = value;
}

void ts_names_remove(ts_names *n, uint32_t tenant, const char *name)
{
    uint32_t mask = n->capacity - 1;
    uint32_t hole = locate(n, tenant, name, hash_of(tenant, name));
    if (n->entries[hole].name == NULL)
        return;
    free(n->entries[hole].name);
    n->count--;
    for (uint32_t i = (hole + 1) & mask; n->entries[i].name != NULL; i = (i + 1) & mask) {
        uint32_t home = (uint32_t)n->entries[i].hash & mask;
        if (((i - home) & mask) >= ((i - hole) & mask)) {
            n->entries[hole] = n->entries[i];
            hole = i;
        }
    }
    n->entries[hole].name = NULL;
}
