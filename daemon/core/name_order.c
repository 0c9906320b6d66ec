#include "name_order.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static uint32_t height_of(uint64_t seed, uint32_t tenant, const char *name)
{
    uint64_t h = XXH3_64bits_withSeed(name, strlen(name), seed + tenant);
    h |= (uint64_t)1 << (2 * (TS_NAME_HEIGHT_MAX - 1));
    return 1 + (uint32_t)__builtin_ctzll(h) / 2;
}

/* Whether the node is before the name; with `at`, before it or at it. */
static bool is_before(const ts_name_node *node, uint32_t tenant, const char *name, bool at)
{
    if (node->tenant != tenant)
        return node->tenant < tenant;
    int order = strcmp(node->name, name);
    return order < 0 || (at && order == 0);
}

/* The links, of each height, that lead to the first node that isn't before the name. */
static void find_links(ts_name_order *o, uint32_t tenant, const char *name,
                       ts_name_node **found[TS_NAME_HEIGHT_MAX])
{
    ts_name_node **links = o->first;
    for (uint32_t i = TS_NAME_HEIGHT_MAX; i-- > 0;) {
        while (links[i] != NULL && is_before(links[i], tenant, name, false))
            links = links[i]->next;
        found[i] = &links[i];
    }
}

void ts_name_order_fini(ts_name_order *o)
{
    for (ts_name_node *node = o->first[0], *next; node != NULL; node = next) {
        next = node->next[0];
        free(node);
    }
    *o = (ts_name_order){.seed = o->seed};
}

bool ts_name_order_add(ts_name_order *o, uint32_t tenant, const char *name)
{
    ts_name_node **links[TS_NAME_HEIGHT_MAX];
    const uint32_t height = height_of(o->seed, tenant, name);
    ts_name_node *node = malloc(sizeof *node + height * sizeof(ts_name_node *));
    if (node == NULL)
        return false;
    node->name = name;
    node->tenant = tenant;
    node->height = height;
    find_links(o, tenant, name, links);
    for (uint32_t i = 0; i < height; i++) {
        node->next[i] = *links[i];
        *links[i] = node;
    }
    /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): its height is 1 at least, so the list has it */
    return true;
}

void ts_name_order_remove(ts_name_order *o, uint32_t tenant, const char *name)
{
    ts_name_node **links[TS_NAME_HEIGHT_MAX];
    find_links(o, tenant, name, links);
    ts_name_node *node = *links[0];
    for (uint32_t i = 0; i < node->height; i++)
        *links[i] = node->next[i];
    free(node);
}

const ts_name_node *ts_name_order_from(const ts_name_order *o, uint32_t tenant, const char *name,
                                       bool past)
{
    ts_name_node *const *links = o->first;
    for (uint32_t i = TS_NAME_HEIGHT_MAX; i-- > 0;)
        while (links[i] != NULL && is_before(links[i], tenant, name, past))
            links = links[i]->next;
    return links[0] != NULL && links[0]->tenant == tenant ? links[0] : NULL;
}
