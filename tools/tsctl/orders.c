/* What operators order: each asks before it destroys or refuses something. */
#include "clock.h"
#include "error.h"
#include "mps.h"
#include "options.h"
#include "unconst.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

bool tsctl_sure(const options *o, const char *question)
{
    char answer[16];
    if (o->yes)
        return true;
    if (!isatty(0)) {
        fprintf(stderr, "tsctl: %s Add --yes, or run it on a terminal.\n", question);
        return false;
    }
    fprintf(stderr, "%s [y/N] ", question);
    return fgets(answer, sizeof answer, stdin) != NULL && (answer[0] == 'y' || answer[0] == 'Y');
}

/* An id as the listings have it; 0: it is none. */
static uint64_t id_of(const char *word)
{
    char *end;
    errno = 0;
    unsigned long long id = strtoull(word, &end, 16);
    if (errno == 0 && end != word && *end == '\0' && word[0] != '-' && id != 0)
        return id;
    fprintf(stderr, "tsctl: '%s' is no id; they are hexadecimal, as the listings show them\n",
            word);
    return 0;
}

/* Has done what is answered with a status alone. */
static int order(ts_client *c, Tspb__Request *request, ts_status *ts)
{
    *ts = ts_call_plain(c, request);
    return *ts == TS_OK ? EXIT_SUCCESS : EXIT_REFUSED;
}

/* What was done, which JSON alone tells: "what" is `done`. Takes `done`. */
static int told(const options *o, int code, const char *what, json_t *done)
{
    if (code == EXIT_SUCCESS && o->json)
        tsctl_print_json(o, json_pack("{s:o}", what, done));
    else
        json_decref(done);
    return code;
}

static json_t *json_id(uint64_t id)
{
    return json_sprintf("%llx", (unsigned long long)id);
}

/* The session's process, 0 if there is no such session. */
static ts_status pid_of(ts_client *c, uint64_t session, uint32_t *pid)
{
    Tspb__ListSessions body = TSPB__LIST_SESSIONS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    *pid = 0;
    body.after = session - 1;
    request.body_case = TSPB__REQUEST__BODY_LIST_SESSIONS;
    request.list_sessions = &body;
    ts_status status = tsctl_ask(c, &request, TSPB__REPLY__BODY_SESSION_LIST, &reply);
    if (status != TS_OK)
        return status;
    const Tspb__SessionList *l = reply->session_list;
    if (l->n_sessions > 0 && l->sessions[0]->session == session)
        *pid = l->sessions[0]->pid;
    tspb__reply__free_unpacked(reply, NULL);
    return TS_OK;
}

/* Kernels of the session's process may be at work in its blocks, which others get next. */
static ts_status end_kernels(ts_client *c, uint64_t session)
{
    char why[256];
    uint32_t pid;
    bool ended;
    ts_status status = pid_of(c, session, &pid);
    if (status != TS_OK || pid == 0)
        return status;
    if (!mps_end_client(pid, &ended, why, sizeof why))
        fprintf(stderr, "tsctl: the GPU work of process %u goes on: %s\n", pid, why);
    else if (ended)
        fprintf(stderr, "tsctl: MPS has ended the GPU work of process %u\n", pid);
    return TS_OK;
}

int do_kick(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__AdminKick body = TSPB__ADMIN_KICK__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    char question[128];
    body.session = id_of(o->words[2]);
    snprintf(question, sizeof question, "End session %s and free its sequences?", o->words[2]);
    if (body.session == 0 || !tsctl_sure(o, question))
        return EXIT_USAGE;
    if (mps_runs()) {
        *ts = end_kernels(c, body.session);
        if (*ts != TS_OK)
            return EXIT_REFUSED;
    }
    request.body_case = TSPB__REQUEST__BODY_ADMIN_KICK;
    request.admin_kick = &body;
    return told(o, order(c, &request, ts), "ended_session", json_id(body.session));
}

int do_free(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__AdminFree body = TSPB__ADMIN_FREE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    char question[128];
    body.pool = ts_unconst(o->pool);
    body.seq = id_of(o->words[2]);
    snprintf(question, sizeof question, "Free sequence %s?", o->words[2]);
    if (body.seq == 0 || !tsctl_sure(o, question))
        return EXIT_USAGE;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_FREE;
    request.admin_free = &body;
    return told(o, order(c, &request, ts), "freed_seq", json_id(body.seq));
}

int do_pool_create(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__AdminPoolCreate body = TSPB__ADMIN_POOL_CREATE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    size_t bytes = 1;
    for (uint32_t i = 2; i < o->num_words; i++)
        bytes += strlen(o->words[i]) + 1;
    char *text = malloc(bytes), *to = text;
    if (text == NULL) {
        fputs("tsctl: out of memory\n", stderr);
        return EXIT_REFUSED;
    }
    for (uint32_t i = 2; i < o->num_words; i++)
        to += sprintf(to, "%s%s", i == 2 ? "" : i == 3 ? ":" : ",", o->words[i]);
    body.text = text;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_POOL_CREATE;
    request.admin_pool_create = &body;
    int code = order(c, &request, ts);
    free(text);
    return told(o, code, "created_pool", json_string(o->words[2]));
}

ts_status tsctl_no_pool(ts_client *c, const Tspb__StatusReply *r, const char *name)
{
    static const char more[] = ", ...";
    char known[160] = "no pools";
    size_t used = 0;
    for (size_t i = 0; i < r->n_pools; i++) {
        const char *one = r->pools[i]->name;
        if (used + strlen(one) + 4 + sizeof more > sizeof known) {
            snprintf(known + used, sizeof known - used, "%s", used == 0 ? "..." : more);
            break;
        }
        used += (size_t)snprintf(known + used, sizeof known - used, "%s'%s'", used == 0 ? "" : ", ",
                                 one);
    }
    return ts_fail(c, TS_ENOENT, "there is no pool '%.64s'; there %s %s", name,
                   r->n_pools == 1 ? "is" : "are", known);
}

/* The pool's summary from the daemon; NULL and *ts if it can't be had. The reply is the caller's.
 */
static const Tspb__PoolSummary *summary_of(ts_client *c, const char *pool, Tspb__Reply **reply,
                                           ts_status *ts)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_STATUS_REPLY, reply);
    if (*ts != TS_OK)
        return NULL;
    for (size_t i = 0; i < (*reply)->status_reply->n_pools; i++)
        if (strcmp((*reply)->status_reply->pools[i]->name, pool) == 0)
            return (*reply)->status_reply->pools[i];
    *ts = tsctl_no_pool(c, (*reply)->status_reply, pool);
    return NULL;
}

int do_pool_delete(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__AdminPoolDelete body = TSPB__ADMIN_POOL_DELETE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply = NULL;
    char question[256];
    const Tspb__PoolSummary *p = summary_of(c, o->words[2], &reply, ts);
    if (p == NULL) {
        tspb__reply__free_unpacked(reply, NULL);
        return EXIT_REFUSED;
    }
    snprintf(question, sizeof question, "Delete pool %.64s and its %llu kept sequences?", p->name,
             (unsigned long long)p->kept_sequences);
    tspb__reply__free_unpacked(reply, NULL);
    if (!tsctl_sure(o, question))
        return EXIT_USAGE;
    body.pool = o->words[2];
    request.body_case = TSPB__REQUEST__BODY_ADMIN_POOL_DELETE;
    request.admin_pool_delete = &body;
    return told(o, order(c, &request, ts), "deleted_pool", json_string(o->words[2]));
}

/* Nothing that is in use goes away: no question. */
int do_pool_resize(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__AdminPoolResize body = TSPB__ADMIN_POOL_RESIZE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply = NULL;
    const Tspb__PoolSummary *p = summary_of(c, o->words[2], &reply, ts);
    const uint32_t before = p == NULL ? 0 : p->blocks;
    body.pool = o->words[2];
    body.memory = o->words[3];
    request.body_case = TSPB__REQUEST__BODY_ADMIN_POOL_RESIZE;
    request.admin_pool_resize = &body;
    if (p == NULL || order(c, &request, ts) != EXIT_SUCCESS) {
        tspb__reply__free_unpacked(reply, NULL);
        return EXIT_REFUSED;
    }
    tspb__reply__free_unpacked(reply, NULL);
    p = summary_of(c, o->words[2], &reply, ts);
    /* What was asked for was made whole slabs. */
    if (p != NULL && o->json)
        tsctl_print_json(o, json_pack("{s:s, s:I, s:I, s:I}", "pool", p->name, "blocks",
                                      (json_int_t)p->blocks, "block_bytes",
                                      (json_int_t)p->block_bytes, "slabs", (json_int_t)p->slabs));
    else if (p != NULL && p->blocks == before)
        printf("pool %s still has %u blocks of %llu bytes in %u slabs: it has whole slabs of %u "
               "blocks\n",
               p->name, p->blocks, (unsigned long long)p->block_bytes, p->slabs, p->slab_blocks);
    else if (p != NULL)
        printf("pool %s has %u blocks of %llu bytes in %u slabs\n", p->name, p->blocks,
               (unsigned long long)p->block_bytes, p->slabs);
    tspb__reply__free_unpacked(reply, NULL);
    return p == NULL ? EXIT_REFUSED : EXIT_SUCCESS;
}

#define AGAIN_MS 10000u  /* that the next daemon has to come */
#define LOOK_NS 10000000 /* between looks for it */

/* The pid of the daemon there is, which waits for one to come, and its sequences. */
static ts_status look_at_daemon(const options *o, uint64_t *pid, uint64_t *sequences, char *why,
                                size_t why_bytes)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    ts_client *c;
    const ts_options connection = {
        .size = sizeof(ts_options), .url = o->url, .program = "tsctl", .wait_ms = AGAIN_MS};
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    ts_status status = ts_connect(&connection, &c);
    if (status == TS_OK)
        status = tsctl_ask(c, &request, TSPB__REPLY__BODY_STATUS_REPLY, &reply);
    if (status != TS_OK)
        snprintf(why, why_bytes, "%s", ts_error(c));
    if (status == TS_OK) {
        const Tspb__StatusReply *r = reply->status_reply;
        *pid = r->pid;
        *sequences = 0;
        for (size_t i = 0; i < r->n_pools; i++)
            *sequences += r->pools[i]->sequences;
        tspb__reply__free_unpacked(reply, NULL);
    }
    ts_disconnect(c);
    return status;
}

/* Until another daemon serves than this one. */
static int await_next(const options *o, uint64_t before)
{
    uint64_t pid = before, sequences = 0;
    char why[256];
    const struct timespec pause = {.tv_nsec = LOOK_NS};
    ts_status status = TS_OK;
    for (uint64_t end = ts_now_ms() + AGAIN_MS; pid == before && ts_now_ms() < end;) {
        nanosleep(&pause, NULL);
        status = look_at_daemon(o, &pid, &sequences, why, sizeof why);
    }
    if (pid == before) {
        fprintf(stderr, "tsctl: the daemon (pid %llu) was told to end, and %s within %u s\n",
                (unsigned long long)before,
                status == TS_OK ? "has not ended" : "nobody has started another one",
                AGAIN_MS / 1000);
        return EXIT_REFUSED;
    }
    if (o->json)
        tsctl_print_json(o, json_pack("{s:I, s:I, s:I}", "pid", (json_int_t)pid, "before",
                                      (json_int_t)before, "sequences", (json_int_t)sequences));
    else
        printf("pid %llu follows pid %llu, with %llu sequences\n", (unsigned long long)pid,
               (unsigned long long)before, (unsigned long long)sequences);
    return EXIT_SUCCESS;
}

int do_restart(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__AdminRestart body = TSPB__ADMIN_RESTART__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    uint64_t sequences = 0;
    if (!tsctl_sure(o, o->empty ? "Restart the daemon, and lose all that is stored?"
                                : "Restart the daemon? Workers wait, and go on with the next one."))
        return EXIT_USAGE;
    char why[256];
    if (look_at_daemon(o, &body.pid, &sequences, why, sizeof why) != TS_OK) {
        fprintf(stderr, "tsctl: %s\n", why);
        return EXIT_REFUSED;
    }
    body.empty = o->empty;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_RESTART;
    request.admin_restart = &body;
    /* The answer may be lost with the daemon. */
    *ts = ts_call_plain(c, &request);
    if (*ts != TS_OK && *ts != TS_ECONN)
        return EXIT_REFUSED;
    *ts = TS_OK;
    return await_next(o, body.pid);
}

int do_drain(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__AdminDrain body = TSPB__ADMIN_DRAIN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    body.off = o->num_words == 2;
    if (body.off && strcmp(o->words[1], "off") != 0) {
        fprintf(stderr, "tsctl: drain %s: drain, or drain off\n", o->words[1]);
        return EXIT_USAGE;
    }
    if (!body.off &&
        !tsctl_sure(o, "Take no new sessions, but operators', until `tsctl drain off`?"))
        return EXIT_USAGE;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_DRAIN;
    request.admin_drain = &body;
    return told(o, order(c, &request, ts), "draining", json_boolean(!body.off));
}
