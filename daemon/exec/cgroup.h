/*
 * What the memory cgroup that this process is in, and those above it, still allow. A cgroup kills
 * and doesn't refuse, so the daemon looks here before it touches memory that clients make it take.
 *
 * Version 2 of cgroups; where there is none, or it can't be read, there is no limit.
 *
 * Thread: any.
 */
#ifndef TS_CGROUP_H
#define TS_CGROUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TS_CGROUP_MARGIN (64u << 20) /* that is left for everything else */

/* Whether `bytes` more may be touched. False, with a sentence in `why`. */
bool ts_cgroup_allows(uint64_t bytes, char *why, size_t why_bytes);

/* The same of the cgroup `path` ("/a/b") in the file system at `root`. */
bool ts_cgroup_allows_at(const char *root, const char *path, uint64_t bytes, char *why,
                         size_t why_bytes);

#endif
