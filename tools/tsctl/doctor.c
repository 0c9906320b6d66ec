/* The socket, the versions, and how it is all told. */
#define _GNU_SOURCE
#include "doctor.h"

#include "client.h"
#include "error.h"
#include "plain_text.h"
#include "socket_place.h"
#include "tinyserve_version.h"

#include <errno.h>
#include <grp.h>
#include <limits.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

void doctor_found(findings *f, finding_level level, const char *about, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (f->count < FINDINGS_MAX) {
        finding *one = &f->all[f->count++];
        one->level = level;
        one->advice[0] = '\0';
        snprintf(one->about, sizeof one->about, "%s", about);
        /* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): va_start set it */
        vsnprintf(one->text, sizeof one->text, format, args);
    }
    va_end(args);
}

void doctor_advise(findings *f, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (f->count > 0)
        /* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): va_start set it */
        vsnprintf(f->all[f->count - 1].advice, sizeof f->all[0].advice, format, args);
    va_end(args);
}

/* ---- the socket ---- */

static const char *user_name(uid_t uid, char *buffer, size_t bytes)
{
    const struct passwd *p = getpwuid(uid);
    if (p != NULL)
        snprintf(buffer, bytes, "%.30s", p->pw_name);
    else
        snprintf(buffer, bytes, "uid %u", (unsigned)uid);
    return buffer;
}

static const char *group_name(gid_t gid, char *buffer, size_t bytes)
{
    const struct group *g = getgrgid(gid);
    if (g != NULL)
        snprintf(buffer, bytes, "%.30s", g->gr_name);
    else
        snprintf(buffer, bytes, "gid %u", (unsigned)gid);
    return buffer;
}

/* Whether the group's list has this user, which a login alone makes so for processes. */
static bool listed_in(gid_t gid, const char *user)
{
    const struct group *g = getgrgid(gid);
    for (char **member = g == NULL ? NULL : g->gr_mem; member != NULL && *member != NULL; member++)
        if (strcmp(*member, user) == 0)
            return true;
    return false;
}

/* The first folder of the path that this user can't pass; NULL: all are open. */
static const char *closed_folder(const char *path, char *folder, size_t bytes)
{
    for (const char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        snprintf(folder, bytes, "%.*s", (int)(slash - path), path);
        if (access(folder, X_OK) != 0 && errno == EACCES)
            return folder;
    }
    return NULL;
}

static void may_not(findings *f, const char *at, const struct stat *about)
{
    char user[40], group[40];
    (void)user_name(geteuid(), user, sizeof user);
    (void)group_name(about->st_gid, group, sizeof group);
    doctor_found(f, FINDING_FAULT, "socket", "%s may not connect: %s has mode %03o and group %s",
                 user, at, (unsigned)about->st_mode & 0777, group);
    if (about->st_gid == 0 && S_ISDIR(about->st_mode) && (about->st_mode & S_IXGRP) == 0)
        doctor_advise(f, "let the daemon's socket lie in a folder that is open to group tinyserve, "
                         "as /run/tinyserve, and not in a private one of root");
    else if (about->st_gid == 0) /* nobody joins root's own group for a socket */
        doctor_advise(
            f,
            "let the daemon run under group tinyserve; or as root: chgrp tinyserve %.160s "
            "and usermod -aG tinyserve %s; then log in again",
            at, user);
    else if (listed_in(about->st_gid, user))
        doctor_advise(f,
                      "%s is listed in group %s, and this shell is older than that: log in "
                      "again, or newgrp %s",
                      user, group, group);
    else
        doctor_advise(f, "as root: usermod -aG %s %s; then log in again", group, user);
}

static void rights(findings *f, const char *path)
{
    struct stat about;
    char folder[PATH_MAX], user[40], group[40];
    if (closed_folder(path, folder, sizeof folder) != NULL && stat(folder, &about) == 0)
        return may_not(f, folder, &about);
    if (stat(path, &about) != 0) {
        doctor_found(f, FINDING_FAULT, "socket", "there is no %s", path);
        doctor_advise(f, "start the daemon (systemctl start tinyserved, or tinyserved --pool ...), "
                         "or name its socket by TINYSERVE_URL");
        return;
    }
    if (!S_ISSOCK(about.st_mode)) {
        doctor_found(f, FINDING_FAULT, "socket", "%s is no socket", path);
        doctor_advise(f, "TINYSERVE_URL names the daemon's socket, not its folder");
        return;
    }
    if (access(path, W_OK) != 0)
        return may_not(f, path, &about);
    const bool open = (about.st_mode & S_IWOTH) != 0;
    doctor_found(f, open ? FINDING_WARNING : FINDING_OK, "socket", "%s: mode %03o, %s:%s", path,
                 (unsigned)about.st_mode & 0777, user_name(about.st_uid, user, sizeof user),
                 group_name(about.st_gid, group, sizeof group));
    if (open)
        doctor_advise(f, "every user of this machine may take memory: socket_mode = 0660");
}

void doctor_socket(findings *f, const char *url)
{
    char own[PATH_MAX], why[200];
    const char *named = url != NULL ? url : getenv("TINYSERVE_URL");
    if (named != NULL && named[0] == '\0') {
        doctor_found(f, FINDING_FAULT, "socket", "%s is empty",
                     url != NULL ? "the daemon's address" : "TINYSERVE_URL");
        doctor_advise(f,
                      "name a socket, or leave it out for the user's own daemon or the system's");
        return;
    }
    if (named != NULL)
        return rights(f, strncmp(named, "ipc://", 6) == 0 ? named + 6 : named);
    const size_t length = ts_own_socket(own, sizeof own);
    const size_t most = sizeof(((ts_client *)NULL)->path) - 1;
    if (length > most) {
        doctor_found(f, FINDING_WARNING, "socket",
                     "the user's own socket, by XDG_RUNTIME_DIR, has a path of %zu bytes; the "
                     "limit is %zu, so the system's is looked for",
                     length, most);
        doctor_advise(f, "set XDG_RUNTIME_DIR to a folder with a shorter path, or name the "
                         "daemon's socket by TINYSERVE_URL");
    } else if (length > 0) {
        const ts_status status = ts_own_folder_check(own, why, sizeof why);
        if (status == TS_OK && access(own, F_OK) == 0)
            return rights(f, own);
        if (status == TS_EPERM) {
            doctor_found(f, FINDING_WARNING, "socket", "the user's own folder isn't used: %s", why);
            doctor_advise(f, "remove it, unless it is known whose it is");
        }
    }
    rights(f, TS_SYSTEM_SOCKET);
}

/* ---- the daemon ---- */

#define PATIENCE_MS 5000u /* with a daemon that may be stopped: that is a finding */

static void versions(findings *f, const Tspb__StatusReply *r)
{
    const bool same = strcmp(r->version, TS_VERSION) == 0;
    doctor_found(f, same ? FINDING_OK : FINDING_WARNING, "versions", "tsctl %s, tinyserved %s",
                 TS_VERSION, r->version);
    if (same)
        return;
    const bool held = r->restart != NULL && r->restart->journaled &&
                      r->restart->holder == TSPB__RESTART_STATUS__HOLDER__SYSTEMD;
    doctor_advise(f,
                  held ? "an upgrade of the package restarts a daemon whose memory systemd holds, "
                         "as this one's; it came otherwise: systemctl restart tinyserved loses "
                         "nothing; then restart workers"
                       : "an upgrade doesn't restart a daemon whose memory systemd doesn't hold: "
                         "tsctl drain; once tsctl sessions lists no worker, end the daemon "
                         "(systemctl restart tinyserved) and restart workers");
}

/* What of `verify = restart` is wrong. */
static void verify(findings *f, const Tspb__RestartStatus *s)
{
    if (s->verify == TSPB__RESTART_STATUS__VERIFY__RESTART && !s->journaled) {
        doctor_found(f, FINDING_WARNING, "verify",
                     "verify = restart is in vain: nothing outlives the daemon");
        doctor_advise(f, "have somebody hold the memory, or set verify = off");
    } else if (s->unsummed_pools > 0) {
        doctor_found(f, FINDING_WARNING, "verify",
                     "%u pools have no checksums: no restart checks their memory",
                     s->unsummed_pools);
        doctor_advise(f, "the log says why; mostly the store has no room for a descriptor "
                         "(FileDescriptorStoreMax=), or there is no memory: 8 bytes a block");
    }
    if (s->wrong_blocks > 0) {
        doctor_found(f, FINDING_WARNING, "verify",
                     "the last restart found %llu blocks that didn't hold what was stored in them; "
                     "%llu sequences are lost",
                     (unsigned long long)s->wrong_blocks, (unsigned long long)s->lost_sequences);
        doctor_advise(f, "the log names the pools; memory fails (dmesg, nvidia-smi -q -d ECC), or "
                         "a worker that maps slabs writable (client_write = all) wrote there");
    }
}

void doctor_store(findings *f, const Tspb__StatusReply *r)
{
    const Tspb__RestartStatus *s = r->restart;
    if (s == NULL)
        return; /* an older daemon, which versions() tells of */
    const bool held = s->holder != TSPB__RESTART_STATUS__HOLDER__NOBODY;
    if (held && s->behind) {
        doctor_found(f, FINDING_FAULT, "store",
                     "the journal is full, and the daemon has no memory for a snapshot: a restart "
                     "would begin with nothing");
        doctor_advise(f, "give its control group more memory (MemoryMax=), or raise its limit on "
                         "files' sizes (ulimit -f); it tries again every 5 s");
    } else if (held && s->journaled)
        doctor_found(f, FINDING_OK, "store", "%s holds the memory: a restart loses nothing",
                     s->holder == TSPB__RESTART_STATUS__HOLDER__SYSTEMD ? "systemd"
                                                                        : "a supervisor");
    else if (s->journaled) {
        doctor_found(f, FINDING_WARNING, "store",
                     "the supervisor is dead: the daemon's end would lose all that is stored");
        doctor_advise(f, "start tinyserved --supervise again with the same socket: it takes the "
                         "daemon over");
    } else {
        doctor_found(f, FINDING_WARNING, "store",
                     "nobody holds the memory: what is stored ends with the daemon");
        doctor_advise(f, "tinyserved --supervise, or systemd's FileDescriptorStoreMax= as in the "
                         "shipped unit");
    }
    for (size_t i = 0; held && i < r->n_pools; i++)
        if (strcmp(r->pools[i]->memory, "cuda-ipc") == 0) {
            doctor_found(f, FINDING_WARNING, "store",
                         "pool %s's memory is of provider cuda-ipc, and ends with the daemon",
                         r->pools[i]->name);
            doctor_advise(f, "provider = cuda-vmm, where the driver exports its memory");
        }
    if (s->failure[0] != '\0') {
        doctor_found(f, FINDING_WARNING, "store",
                     "what the last daemon left could not be taken over: %s", s->failure);
        doctor_advise(
            f, "the log says more; journal and snapshots are kept in the store as failed.*, for a "
               "report");
    }
    verify(f, s);
}

static void pools(findings *f, const Tspb__StatusReply *r, doctor_facts *facts)
{
    facts->pid = r->pid;
    for (size_t i = 0; i < r->n_pools; i++) {
        const Tspb__PoolSummary *p = r->pools[i];
        const bool host = strncmp(p->device, "cuda:", 5) != 0;
        facts->host_bytes += host ? p->block_bytes * p->blocks : 0;
        facts->host_slabs += host ? p->slabs : 0;
        facts->slabs += p->slabs;
        facts->mps = host ? facts->mps : p->mps;
        facts->on_gpu = facts->on_gpu || !host;
        const uint64_t room = p->blocks - p->used_blocks;
        if (room * 20 < p->blocks) {
            doctor_found(f, FINDING_WARNING, "pools",
                         "pool %s: %llu of %u blocks are free or cached", p->name,
                         (unsigned long long)room, p->blocks);
            doctor_advise(f,
                          "tsctl frag %s shows who holds the others; tsctl pool resize gives "
                          "it more, up to memory_max",
                          p->name);
        }
    }
    if (r->n_pools == 0) {
        doctor_found(f, FINDING_FAULT, "pools", "the daemon has no pool");
        doctor_advise(f, "a [pool NAME] section, or tsctl pool create; tsctl plan works it out");
    }
    if (r->draining) {
        doctor_found(f, FINDING_FAULT, "pools",
                     "the daemon is drained: it takes no new sessions, but operators'");
        doctor_advise(f, "tsctl drain off");
    }
}

/* What the daemon says of itself; false: there was no answer, and the finding says why. */
static bool ask_daemon(findings *f, const options *o, doctor_facts *facts, bool *reached)
{
    ts_client *c;
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    char why[1024];
    const ts_options connection = {.size = sizeof(ts_options),
                                   .url = o->url,
                                   .program = "tsctl",
                                   .timeout_ms = PATIENCE_MS,
                                   .wait_ms = o->wait_ms};
    ts_status status = ts_connect(&connection, &c);
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    if (status == TS_OK)
        status = tsctl_ask(c, &request, TSPB__REPLY__BODY_STATUS_REPLY, &reply);
    *reached = status != TS_ECONN && status != TS_ETIMEOUT;
    const bool told = f->count > 0 && f->all[f->count - 1].level == FINDING_FAULT;
    if (status != TS_OK && !(told && (status == TS_ECONN || status == TS_EPERM))) {
        doctor_found(f, FINDING_FAULT, status == TS_EPROTO ? "versions" : "daemon", "%.340s",
                     ts_text_escape(ts_error(c), why, sizeof why));
        if (status == TS_ETIMEOUT)
            doctor_advise(f, "the daemon's process is stopped or doesn't get to run: look at its "
                             "STAT in `ps -C tinyserved u` (T: kill -CONT PID) and at `systemctl "
                             "status tinyserved`");
        else if (status == TS_ECONN)
            doctor_advise(f, "the socket is there and nobody listens at it, as after a daemon that "
                             "was killed: start the daemon again (systemctl start tinyserved, or "
                             "tinyserved --pool ...), which takes the socket over");
        else if (status == TS_EPROTO)
            doctor_advise(f, "install daemon, library and tools of one version; restart both "
                             "sides after an upgrade");
    } else if (status == TS_OK) {
        versions(f, reply->status_reply);
        doctor_store(f, reply->status_reply);
        pools(f, reply->status_reply, facts);
        tspb__reply__free_unpacked(reply, NULL);
    }
    ts_disconnect(c);
    return status == TS_OK;
}

/* ---- how it is told ---- */

#define WIDTH 80u
#define INDENT 22u

/* By words, in the columns behind the indentation; what is on the line already has those. */
static void print_wrapped(const char *text, size_t indent)
{
    size_t column = indent;
    while (*text != '\0') {
        const size_t word = strcspn(text, " ");
        if (column > indent && column + 1 + word > WIDTH) {
            printf("\n%*s", (int)indent, "");
            column = indent;
        }
        column += (size_t)printf("%s%.*s", column > indent ? " " : "", (int)word, text);
        text += word + (text[word] != '\0');
    }
    putchar('\n');
}

static void print_text(const findings *f, const style *s)
{
    static const char *const words[] = {"ok", "warning", "FAULT"};
    static const char *const colors[] = {"\033[32m", "\033[33m", "\033[31m"};
    for (size_t i = 0; i < f->count; i++) {
        const finding *one = &f->all[i];
        printf("%s%-8s%s %-12s ", s->color ? colors[one->level] : "", words[one->level],
               s->color ? "\033[0m" : "", one->about);
        print_wrapped(one->text, INDENT);
        if (one->advice[0] != '\0') {
            printf("%*s-> ", (int)INDENT, "");
            print_wrapped(one->advice, INDENT + 3);
        }
    }
}

static void print_json(const findings *f, const options *o)
{
    static const char *const words[] = {"ok", "warning", "fault"};
    json_t *list = json_array();
    for (size_t i = 0; i < f->count; i++)
        json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:s}", "level",
                                              words[f->all[i].level], "about", f->all[i].about,
                                              "text", f->all[i].text, "advice", f->all[i].advice));
    tsctl_print_json(o, list);
}

int doctor_run(const options *o)
{
    findings *f = calloc(1, sizeof *f);
    doctor_facts facts = {0};
    bool reached = true, faults = false;
    if (f == NULL)
        return EXIT_REFUSED;
    doctor_socket(f, o->url);
    (void)ask_daemon(f, o, &facts, &reached);
    doctor_machine(f, "", &facts);
    if (o->json)
        print_json(f, o);
    else
        print_text(f, &o->style);
    for (size_t i = 0; i < f->count; i++)
        faults = faults || f->all[i].level == FINDING_FAULT;
    free(f);
    return !reached ? EXIT_UNREACHABLE : faults ? EXIT_REFUSED : EXIT_SUCCESS;
}
