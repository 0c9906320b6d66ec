#include "operators.h"

#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>

ts_status ts_operators_find(const char *group, ts_operators *out, char *why, size_t why_bytes)
{
    *out = (ts_operators){0};
    if (strlen(group) >= sizeof out->group) {
        snprintf(why, why_bytes, "a group's name of %zu bytes; the limit is %zu", strlen(group),
                 sizeof out->group - 1);
        return TS_EINVAL;
    }
    errno = 0;
    const struct group *g = getgrnam(group);
    if (g == NULL) {
        snprintf(why, why_bytes, "there is no group '%s'%s%s", group, errno == 0 ? "" : ": ",
                 errno == 0 ? "" : strerror(errno));
        return TS_EINVAL;
    }
    snprintf(out->group, sizeof out->group, "%s", group);
    out->gid = g->gr_gid;
    for (char **name = g->gr_mem; *name != NULL; name++) {
        const struct passwd *p = getpwnam(*name);
        if (p == NULL) /* a member that is no user (any more) */
            continue;
        if (out->num_uids == TS_OPERATORS_MAX) {
            snprintf(why, why_bytes, "group '%s' has more than %u members", group,
                     TS_OPERATORS_MAX);
            return TS_EINVAL;
        }
        out->uids[out->num_uids++] = p->pw_uid;
    }
    return TS_OK;
}

bool ts_operators_have(const ts_operators *o, uint32_t uid, uint32_t gid)
{
    if (o->group[0] == '\0')
        return false;
    for (uint32_t i = 0; i < o->num_uids; i++)
        if (o->uids[i] == uid)
            return true;
    return gid == o->gid;
}
