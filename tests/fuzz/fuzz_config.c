/*
 * Fuzz target: the configuration. An input is a file, up to its first NUL byte, and then what the
 * command line says: texts with a ':' before any '=' are pools, others "key=value". The daemon
 * reads it and finishes it, as at its start. A configuration without a problem has pools within
 * their limits, and read again it is the same.
 */
#define _GNU_SOURCE
#include "config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static char path[64];
static int file;

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "%s\n", what);
    abort();
}

/* One argument of the command line. */
static void add(ts_config *c, const char *text)
{
    char key[64];
    const char *colon = strchr(text, ':'), *equals = strchr(text, '=');
    if (colon != NULL && (equals == NULL || colon < equals)) {
        (void)ts_config_add_pool(c, text);
        return;
    }
    if (equals == NULL || (size_t)(equals - text) >= sizeof key)
        return;
    snprintf(key, sizeof key, "%.*s", (int)(equals - text), text);
    (void)ts_config_set(c, key, equals + 1);
}

/* True: there are no problems. */
static bool read_all(ts_config *c, const char *text, const char *end)
{
    ts_config_init(c);
    (void)ts_config_read(c, path);
    for (text += strlen(text) + 1; text < end; text += strlen(text) + 1)
        add(c, text);
    return ts_config_finish(c) == TS_OK;
}

static void check_problems(const ts_config *c)
{
    char text[512];
    require(c->num_problems > 0 && c->num_problems <= TS_CONFIG_PROBLEMS_MAX, "no problem is told");
    for (uint32_t i = 0; i < c->num_problems; i++)
        require(strlen(ts_config_problem_text(c, i, text, sizeof text)) > 0, "an empty sentence");
}

static void check_pool(const ts_config_pool *p)
{
    char why[160];
    const ts_pool_config *pool = &p->pool;
    require(ts_geometry_check(&pool->geometry, why, sizeof why) == TS_OK, "a pool's geometry");
    require(pool->num_blocks > 0 && pool->num_blocks <= pool->max_blocks &&
                pool->max_blocks <= TS_POOL_BLOCKS_MAX,
            "a pool's blocks");
    require(pool->slab_blocks > 0, "a pool's slabs");
    require(memchr(pool->name, '\0', sizeof pool->name) != NULL && pool->name[0] != '\0',
            "a pool's name");
}

static void on_difference(void *arg, const char *key)
{
    (void)arg;
    require(false, key);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    file = memfd_create("tinyserved.conf", MFD_CLOEXEC);
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    return file < 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static ts_config first, again;
    char *text = calloc(1, size + 1);
    require(text != NULL, "no memory");
    memcpy(text, data, size);
    size_t bytes = strlen(text);
    require(ftruncate(file, 0) == 0 && pwrite(file, text, bytes, 0) == (ssize_t)bytes, "the file");
    bool good = read_all(&first, text, text + size);
    require(read_all(&again, text, text + size) == good, "another result at the second reading");
    if (good) {
        ts_config_compare(&first, &again, on_difference, NULL);
        require(first.num_pools == again.num_pools, "another number of pools");
        for (uint32_t i = 0; i < first.num_pools; i++) {
            check_pool(&first.pools[i]);
            require(!ts_config_pools_differ(&first.pools[i], &again.pools[i]), "another pool");
        }
    } else {
        check_problems(&first);
    }
    free(text);
    return 0;
}
