/*
 * Who may order a running daemon about: root, the user that it runs as, and a group that the
 * configuration names. A peer is of the group if the group is its process's, or its user is one of
 * the group's members; members are looked up when the configuration is read, so that no request
 * waits for a directory service.
 */
#ifndef TS_OPERATORS_H
#define TS_OPERATORS_H

#include "tinyserve_types.h"

#include <stdbool.h>
#include <stddef.h>

#define TS_OPERATORS_MAX 256u

typedef struct ts_operators {
    char group[64]; /* empty: none */
    uint32_t gid;
    uint32_t uids[TS_OPERATORS_MAX]; /* the group's members */
    uint32_t num_uids;
} ts_operators;

/* Looks the group up. TS_EINVAL with a sentence: there is none, or it has too many members. */
ts_status ts_operators_find(const char *group, ts_operators *out, char *why, size_t why_bytes);

bool ts_operators_have(const ts_operators *operators, uint32_t uid, uint32_t gid);

#endif
