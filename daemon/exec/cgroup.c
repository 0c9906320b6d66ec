#define _GNU_SOURCE
#include "cgroup.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Opens a file of the cgroup. */
static FILE *open_file(const char *root, const char *path, const char *name)
{
    char file[PATH_MAX];
    if (snprintf(file, sizeof file, "%s%s/%s", root, path, name) >= (int)sizeof file)
        return NULL;
    return fopen(file, "re");
}

/* The number in a file; false: there is none ("max", or no such file). */
static bool read_number(const char *root, const char *path, const char *name, uint64_t *number)
{
    FILE *f = open_file(root, path, name);
    bool ok = f != NULL && fscanf(f, "%" SCNu64, number) == 1;
    if (f != NULL)
        fclose(f);
    return ok;
}

/* What is charged and can be had back: files' pages that aren't shared memory. */
static uint64_t reclaimable(const char *root, const char *path)
{
    FILE *f = open_file(root, path, "memory.stat");
    char key[64];
    uint64_t value, sum = 0;
    while (f != NULL && fscanf(f, "%63s %" SCNu64, key, &value) == 2)
        if (strcmp(key, "active_file") == 0 || strcmp(key, "inactive_file") == 0)
            sum += value;
    if (f != NULL)
        fclose(f);
    return sum;
}

bool ts_cgroup_allows_at(const char *root, const char *path, uint64_t bytes, char *why,
                         size_t why_bytes)
{
    char at[PATH_MAX];
    uint64_t most, used;
    if (snprintf(at, sizeof at, "%s", path) >= (int)sizeof at)
        return true;
    for (;;) {
        if (read_number(root, at, "memory.max", &most) &&
            read_number(root, at, "memory.current", &used)) {
            uint64_t back = reclaimable(root, at);
            used = used > back ? used - back : 0;
            if (used > most || bytes + TS_CGROUP_MARGIN > most - used) {
                snprintf(why, why_bytes,
                         "%llu bytes more, and %u for all else, but the memory cgroup %.80s uses "
                         "%llu of %llu",
                         (unsigned long long)bytes, TS_CGROUP_MARGIN, at[0] == '\0' ? "/" : at,
                         (unsigned long long)used, (unsigned long long)most);
                return false;
            }
        }
        char *slash = strrchr(at, '/');
        if (slash == NULL)
            return true;
        *slash = '\0'; /* the one above */
    }
}

bool ts_cgroup_allows(uint64_t bytes, char *why, size_t why_bytes)
{
    FILE *f = fopen("/proc/self/cgroup", "re");
    char line[PATH_MAX];
    bool allows = true;
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (strncmp(line, "0::/", 4) == 0) {
            line[strcspn(line, "\n")] = '\0';
            allows = ts_cgroup_allows_at("/sys/fs/cgroup", line + 3, bytes, why, why_bytes);
        }
    if (f != NULL)
        fclose(f);
    return allows;
}
