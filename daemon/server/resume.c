#define _GNU_SOURCE
#include "resume.h"

#include "clock.h"
#include "step_work.h"
#include "stored_memory.h"
#include "stream_runs.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

_Static_assert(TS_SECRET_BYTES == TS_TOKEN_BYTES, "a session's secret is its token");

/* A session without a connection. */
typedef struct ts_absent {
    struct ts_absent *next;
    uint64_t session;
    int process;              /* a descriptor of it; -1: it can't be seen */
    uint64_t deadline_ms;     /* ... and then */
    ts_session_memory memory; /* taken over for it */
} ts_absent;

uint64_t ts_process_started(uint32_t pid)
{
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    const int fd = pid == 0 ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (got <= 0)
        return 0;
    text[got] = '\0';
    /* The name, in parentheses, may have any bytes; the field is the 20th after it. */
    const char *at = strrchr(text, ')');
    for (int field = 0; at != NULL && field < 20; field++)
        at = strchr(at + 1, ' ');
    return at == NULL ? 0 : strtoull(at, NULL, 10);
}

/* Whether the session's process may live; *process is a descriptor of it, if it can be seen. */
static bool lives(const ts_session *s, int *process)
{
    *process = -1;
    if (s->pid == 0)
        return true;
    *process = (int)syscall(SYS_pidfd_open, s->pid, 0u);
    if (*process < 0)
        return false;
    /* Where /proc doesn't show others' processes, the pid must do: for it to be another's by now,
     * all others would have to have been used while there was no daemon. */
    const uint64_t started = ts_process_started(s->pid);
    if ((started == s->process_started || started == 0 || s->process_started == 0) &&
        poll(&(struct pollfd){.fd = *process, .events = POLLIN}, 1, 0) == 0)
        return true;
    close(*process);
    *process = -1;
    return false;
}

static void end(ts_service *s, uint64_t session, const char *why, const ts_caller *by)
{
    const ts_session *about = ts_engine_session(s->exec.engine, session);
    if (about == NULL)
        return;
    ts_log_on(TS_LOG_INFO,
              &(ts_log_about){.session = session,
                              .uid = s->exec.engine->tenants[about->tenant],
                              .pid = about->pid},
              "session %llx closed (uid %u, pid %u): %s", (unsigned long long)session,
              s->exec.engine->tenants[about->tenant], about->pid, why);
    ts_service_close_session(s, session, about->pid, by);
}

/* Takes it off the list. */
static void remove_absent(ts_absent **at)
{
    ts_absent *absent = *at;
    *at = absent->next;
    if (absent->process >= 0)
        close(absent->process);
    ts_service_free_memory(&absent->memory);
    free(absent);
}

/* Ends those whose process has gone meanwhile, or whose time is over, and takes what those that
 * live have posted; the last time it forgets all. */
static void look(ts_service *s, bool last)
{
    while (last && s->absent != NULL)
        remove_absent(&s->absent);
    for (ts_absent **at = &s->absent, *absent; (absent = *at) != NULL;) {
        const bool gone = absent->process >= 0 &&
                          poll(&(struct pollfd){.fd = absent->process, .events = POLLIN}, 1, 0) > 0;
        const bool late = absent->process < 0 && ts_now_ms() >= absent->deadline_ms;
        const uint64_t session = absent->session;
        if (!gone && !late) {
            ts_stream_run_take_posted(&s->exec, session, &absent->memory);
            at = &absent->next;
            continue;
        }
        ts_step_work_drop_session(&s->exec, session);
        end(s, session, gone ? "its process has ended" : "it did not come back", NULL);
        remove_absent(at); /* what waits for its worker goes on: after its end is in the books */
    }
}

/* A device's exchange of an earlier daemon's session. */
static ts_status take_device_exchange(const ts_exec *x, uint64_t session, ts_exchange **out,
                                      char *why, size_t why_bytes)
{
    const ts_session *about = ts_engine_session(x->engine, session);
    const ts_exchange_source *from = &about->exchange;
    const ts_exec_gpu *gpu = from->pool < TS_POOLS_MAX ? x->gpu_of[from->pool] : NULL;
    if (gpu == NULL) {
        snprintf(why, why_bytes, "its GPU isn't there any more");
        return TS_EDEVICE;
    }
    if (from->place == TS_EXCHANGE_OF_CLIENT)
        return ts_exchange_import(gpu->gpu, from->handle, from->offset, about->exchange_bytes, out,
                                  why, why_bytes);
    const int fd = ts_stored_exchange_take(x->store, session, about->exchanges);
    if (fd < 0) {
        snprintf(why, why_bytes, "it isn't in the store, where cuda-ipc memory can't be");
        return TS_ENOENT;
    }
    return ts_exchange_adopt_device(gpu->gpu, fd, about->exchange_bytes,
                                    &gpu->exchange_bytes[about->tenant], out, why, why_bytes);
}

static ts_status take_exchange(const ts_exec *x, uint64_t session, ts_exchange **out, char *why,
                               size_t why_bytes)
{
    const ts_session *about = ts_engine_session(x->engine, session);
    if (about->exchange.place != TS_EXCHANGE_IN_HOST)
        return take_device_exchange(x, session, out, why, why_bytes);
    const int fd = ts_stored_exchange_take(x->store, session, about->exchanges);
    if (fd >= 0)
        return ts_exchange_adopt(fd, about->exchange_bytes, out, why, why_bytes);
    snprintf(why, why_bytes, "it isn't in the store");
    return TS_ENOENT;
}

/* What an earlier daemon's session shared with it, as far as it is there. */
static void take_memory(const ts_service *s, uint64_t session, ts_session_memory *m)
{
    const ts_session *about = ts_engine_session(s->exec.engine, session);
    const ts_log_about who = {.session = session, .pid = about->pid};
    char why[TS_MESSAGE_BYTES];
    *m = (ts_session_memory){0};
    if (about->exchange_bytes > 0 &&
        take_exchange(&s->exec, session, &m->exchange, why, sizeof why) != TS_OK)
        ts_log_on(TS_LOG_WARNING, &who, "the exchange of session %llx is lost: %s",
                  (unsigned long long)session, why);
    const int fd = ts_stored_signals_take(s->exec.store, session);
    if (fd >= 0 &&
        ts_signals_adopt(fd, about->stream_number, &m->signals, why, sizeof why) != TS_OK)
        ts_log_on(TS_LOG_WARNING, &who, "the page of signals of session %llx is lost: %s",
                  (unsigned long long)session, why);
}

void ts_resume_start(ts_service *s)
{
    const ts_engine *e = s->exec.engine;
    s->look_for_absent = look;
    for (uint32_t i = 0; i < e->num_sessions; i++) {
        const ts_session *about = &e->sessions[i];
        const uint64_t session = ts_engine_session_id(e, i);
        int process;
        if (!about->live)
            continue;
        if (about->closing) {
            ts_service_quarantine_again(s, session, about->pid);
            continue;
        }
        ts_session_memory memory;
        take_memory(s, session, &memory);
        ts_absent *absent = NULL;
        if (!lives(about, &process) || (absent = malloc(sizeof *absent)) == NULL) {
            ts_stream_runs_give_up(&s->exec, session);
            ts_service_free_memory(&memory);
            end(s, session, "its process ended with the daemon before this one", NULL);
            continue;
        }
        *absent = (ts_absent){.next = s->absent,
                              .session = session,
                              .process = process,
                              .deadline_ms = ts_now_ms() + TS_RESUME_MS,
                              .memory = memory};
        s->absent = absent;
    }
}

static void resume_runs(ts_work *work, void *service)
{
    ts_service *s = service;
    for (ts_absent *absent = s->absent; absent != NULL; absent = absent->next) {
        ts_stream_runs_resume(&s->exec, absent->session, &absent->memory);
        ts_stream_run_take_posted(&s->exec, absent->session, &absent->memory);
    }
    free(work);
}

bool ts_resume_runs(ts_service *s)
{
    ts_work *work = calloc(1, sizeof *work);
    if (work == NULL)
        return false;
    work->run = resume_runs;
    ts_queue_put(&s->exec.queue, work);
    return true;
}

void ts_resume_attach(ts_service *s, ts_connection *c, uint64_t session)
{
    const ts_session *about = ts_engine_session(s->exec.engine, session);
    for (ts_absent **at = &s->absent; *at != NULL; at = &(*at)->next)
        if ((*at)->session == session) {
            c->memory = (*at)->memory;
            (*at)->memory = (ts_session_memory){0};
            remove_absent(at);
            break;
        }
    c->session = session;
    c->idle_since_ms = 0;
    memcpy(c->token, about->token, sizeof c->token);
    s->by_session[(uint32_t)session] = c;
    ts_answer back;
    ts_exec_apply(&s->exec, &(ts_command){.op = TS_OP_SESSION_BACK, .session = session}, &back);
    ts_stream_run_take_posted(&s->exec, session, &c->memory);
}

/* Aborts the session's step that the call began, if there is one. */
static void abort_steps_of(ts_service *s, const ts_connection *c, uint64_t call)
{
    const ts_engine *e = s->exec.engine;
    for (uint32_t i = ts_engine_session(e, c->session)->step_list, next; i != TS_NONE && call != 0;
         i = next) {
        next = e->steps[i].next;
        if (e->steps[i].call == call)
            ts_step_work_abort(&s->exec, c->session, e->steps[i].id);
    }
}

/* Frees the sequences that the call made: nobody knows of them. */
static void free_seqs_of(ts_service *s, const ts_connection *c, uint64_t call)
{
    uint32_t pool, count;
    const uint64_t *seqs = ts_books_made(s->exec.books, c->session, call, &pool, &count);
    ts_answer answer;
    if (seqs != NULL)
        ts_exec_apply(&s->exec,
                      &(ts_command){.op = TS_OP_SEQ_FREE,
                                    .session = c->session,
                                    .pool = pool,
                                    .seq_batch = {.seqs = seqs, .count = count}},
                      &answer);
}

void ts_resume(ts_service *s, ts_connection *c, const Tspb__SessionResume *r, ts_answer *answer)
{
    const ts_session *about = ts_engine_session(s->exec.engine, r->session);
    if (r->protocol != TS_PROTOCOL)
        return ts_refuse(answer, TS_EPROTO,
                         "a session of protocol version %u; this daemon speaks %u", r->protocol,
                         TS_PROTOCOL);
    if (r->n_given_up > TS_GIVEN_UP_MOST || r->n_aborted_steps > TS_ABORTED_STEPS_MOST)
        return ts_refuse(answer, TS_EINVAL,
                         "a resume that gives up %zu calls and %zu steps; the limits are %u and %u",
                         r->n_given_up, r->n_aborted_steps, TS_GIVEN_UP_MOST,
                         TS_ABORTED_STEPS_MOST);
    if (c->session != 0)
        return ts_refuse(answer, TS_EEXIST, "this connection has session %llx already",
                         (unsigned long long)c->session);
    if (about == NULL || s->exec.engine->tenants[about->tenant] != c->uid || about->pid != c->pid ||
        r->token.len != sizeof about->token ||
        memcmp(r->token.data, about->token, sizeof about->token) != 0)
        return ts_refuse(answer, TS_ENOENT, "uid %u, pid %u has no session %llx with this token",
                         c->uid, c->pid, (unsigned long long)r->session);
    if (ts_service_connection_of(s, r->session) != NULL)
        return ts_refuse(answer, TS_EBUSY, "session %llx has a connection",
                         (unsigned long long)r->session);
    ts_answer closed; /* or refused, which is as good */
    ts_resume_attach(s, c, r->session);
    for (size_t i = 0; i < r->n_given_up; i++) {
        abort_steps_of(s, c, r->given_up[i]);
        free_seqs_of(s, c, r->given_up[i]);
    }
    for (size_t i = 0; i < r->n_aborted_steps; i++)
        ts_step_work_abort(&s->exec, c->session, r->aborted_steps[i]);
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++)
        if (r->closed_pools >> i & 1)
            ts_exec_apply(&s->exec,
                          &(ts_command){.op = TS_OP_POOL_CLOSE, .session = c->session, .pool = i},
                          &closed);
    ts_log_on(TS_LOG_INFO, &(ts_log_about){.session = c->session, .uid = c->uid, .pid = c->pid},
              "session %llx goes on (uid %u, pid %u)", (unsigned long long)c->session, c->uid,
              c->pid);
}

uint64_t ts_resume_opened(const ts_service *s, const ts_connection *c,
                          const ProtobufCBinaryData *nonce)
{
    const ts_engine *e = s->exec.engine;
    const ts_session *about =
        nonce->len != TS_SECRET_BYTES ? NULL : ts_engine_session_of(e, c->uid, nonce->data);
    if (about == NULL || about->pid != c->pid)
        return 0;
    const uint64_t session = ts_engine_session_id(e, (uint32_t)(about - e->sessions));
    return ts_service_connection_of(s, session) == NULL ? session : 0;
}

bool ts_resume_end(ts_service *s, uint64_t session, const char *why, const ts_caller *by)
{
    ts_absent **at = &s->absent;
    while (*at != NULL && (*at)->session != session)
        at = &(*at)->next;
    if (*at == NULL)
        return false;
    ts_step_work_drop_session(&s->exec, session);
    end(s, session, why, by);
    remove_absent(at);
    return true;
}

bool ts_resume_awaits(const ts_service *s, uint64_t session)
{
    const ts_absent *absent = s->absent;
    while (absent != NULL && absent->session != session)
        absent = absent->next;
    return absent != NULL;
}

uint32_t ts_resume_absent(const ts_service *s)
{
    uint32_t count = 0;
    for (const ts_absent *absent = s->absent; absent != NULL; absent = absent->next)
        count++;
    return count;
}
