/* A connection and its session. */
#define _GNU_SOURCE
#include "arrive.h"

#include "clock.h"
#include "dial.h"
#include "error.h"
#include "exchange.h"
#include "fd_client.h"
#include "gpu_context.h"
#include "ring_client.h"
#include "rpc.h"
#include "slab_returns.h"
#include "socket_place.h"
#include "stream_signals.h"
#include "thread_trial.h"
#include "tinyserve_version.h"
#include "unanswered.h"
#include "unconst.h"

#include <grp.h>
#include <nng/protocol/reqrep0/req.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REPLY_BYTES_MAX (64u << 20) /* an answer never needs more */
#define LEAVE_MS 1000u              /* for a session's end */
#define LATE_MS 20 /* for an answer that is late, before the connection is closed */
#define AGAIN_MS 5 /* between attempts to reach the next daemon */

static void pipe_removed(nng_pipe pipe, nng_pipe_ev event, void *arg)
{
    (void)event;
    ts_client *c = arg;
    pthread_mutex_lock(&c->live_lock);
    if (nng_socket_id(nng_pipe_socket(pipe)) == c->live_socket) { /* else of one before */
        atomic_store(&c->broken, true);
        ts_signals_daemon_gone(c);
        ts_rings_wake(c);
        nng_aio_abort(c->aio, NNG_ECONNRESET); /* whoever waits for an answer */
    }
    pthread_mutex_unlock(&c->live_lock);
}

static void set_live_socket(ts_client *c, int socket)
{
    pthread_mutex_lock(&c->live_lock);
    c->live_socket = socket;
    pthread_mutex_unlock(&c->live_lock);
}

/* The group that may connect, in parentheses, as the socket or its folder has it; empty: neither
 * can be looked at. */
static void name_group(const char *path, char *name, size_t bytes)
{
    struct stat about;
    struct group group, *found = NULL;
    char folder[sizeof((ts_client *)0)->path], text[1024];
    name[0] = '\0';
    if (stat(path, &about) != 0) {
        snprintf(folder, sizeof folder, "%s", path);
        *strrchr(folder, '/') = '\0';
        if (stat(folder, &about) != 0)
            return;
    }
    if (getgrgid_r(about.st_gid, &group, text, sizeof text, &found) == 0 && found != NULL)
        snprintf(name, bytes, " (%.32s)", group.gr_name);
    else
        snprintf(name, bytes, " (gid %u)", (unsigned)about.st_gid);
}

/* Why the daemon can't be reached. c->absent: because there is none (any more). */
static ts_status cannot_reach(ts_client *c, int error, uint64_t since_ms)
{
    struct stat about;
    bool there = stat(c->path, &about) == 0;
    if (error == NNG_EPERM) {
        char group[48];
        name_group(c->path, group, sizeof group);
        return ts_fail(c, TS_EPERM, "may not connect to %s: is uid %u in the daemon's group%s?",
                       c->path, (unsigned)getuid(), group);
    }
    if (there && !S_ISSOCK(about.st_mode))
        return ts_fail(c, TS_EINVAL, "%s is not a socket", c->path);
    if (error == NNG_ENOFILES || error == NNG_ENOMEM)
        return ts_fail(c, TS_ENOMEM, "no descriptor or memory for a connection to %s", c->path);
    if (error == NNG_ETIMEDOUT)
        return ts_fail(c, TS_ETIMEOUT,
                       "no answer from %s within %llu ms: tinyserved is there, and takes no "
                       "connection",
                       c->path, (unsigned long long)(ts_now_ms() - since_ms));
    c->absent = error == NNG_ECONNREFUSED || error == NNG_ENOENT || error == NNG_ECONNSHUT ||
                error == NNG_ECONNRESET || error == NNG_ECLOSED;
    if (error == NNG_ECONNREFUSED || error == NNG_ENOENT)
        return ts_fail(c, TS_ECONN, "cannot reach %s: is tinyserved running? (%s)", c->path,
                       strcmp(c->path, TS_SYSTEM_SOCKET) == 0
                           ? "systemctl status tinyserved; TINYSERVE_URL names another socket"
                           : "its log says where it listens");
    return ts_fail(c, TS_ECONN, "cannot reach %s: %s", c->path, nng_strerror(error));
}

/* Whether NNG can start its threads, which it does once in a process, in its first call. The lock
 * is held until it has them: what another thread of the process tries would take them away. */
static pthread_mutex_t first_lock = PTHREAD_MUTEX_INITIALIZER;
static bool nng_runs; /* under the lock */

static ts_status open_first(ts_client *c, int *error)
{
    uint32_t started;
    *error = 0;
    if (!nng_runs) {
        const uint32_t wanted = ts_nng_threads();
        const int lack = ts_threads_try(wanted, &started);
        if (lack != 0)
            return ts_fail_beyond(c, TS_ENOMEM, wanted, started,
                                  "the messages' library needs %u threads, and %u could be "
                                  "started: %s (ulimit -u, ulimit -v, pids.max)",
                                  wanted, started, strerror(lack));
    }
    *error = nng_req0_open(&c->socket);
    nng_runs |= *error == 0;
    return TS_OK;
}

/* Opens NNG's socket. Its threads leave signals to the program's own. */
static ts_status open_socket(ts_client *c)
{
    sigset_t all, before;
    int error;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&c->socket_lock);
    pthread_mutex_lock(&first_lock);
    ts_status status = open_first(c, &error);
    pthread_mutex_unlock(&first_lock);
    if (status == TS_OK && error == 0 && (error = nng_aio_alloc(&c->aio, NULL, NULL)) != 0)
        nng_close(c->socket);
    if (status == TS_OK && error == 0)
        atomic_store(&c->broken, false);
    pthread_mutex_unlock(&c->socket_lock);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status != TS_OK)
        return status;
    if (error != 0)
        return ts_fail(c, TS_ENOMEM, "no socket: %s", nng_strerror(error));
    c->open = true;
    c->late = c->unanswered_message = false;
    ts_note_heard(c);
    set_live_socket(c, nng_socket_id(c->socket));
    nng_socket_set_ms(c->socket, NNG_OPT_REQ_RESENDTIME, -1);
    nng_socket_set_size(c->socket, NNG_OPT_RECVMAXSZ, REPLY_BYTES_MAX);
    nng_pipe_notify(c->socket, NNG_PIPE_EV_REM_POST, pipe_removed, c);
    return TS_OK;
}

/* Opens the socket, and connects it to the daemon. *error: NNG's, if that is what failed. */
static ts_status reach(ts_client *c, uint64_t until_ms, int *error)
{
    const uint64_t since_ms = ts_now_ms();
    *error = 0;
    const ts_status status = open_socket(c);
    if (status != TS_OK)
        return status;
    *error = ts_dial(c, until_ms);
    return *error == 0 ? TS_OK : cannot_reach(c, *error, since_ms);
}

/* What the daemon has of what it shares with the session. */
typedef struct shared_memory {
    bool exchange, signals;
} shared_memory;

/* What the daemon says of the session. */
static ts_status read_opened(ts_client *c, const Tspb__Reply *reply, shared_memory *has)
{
    const Tspb__SessionOpened *o = reply->session_opened;
    if (reply->body_case != TSPB__REPLY__BODY_SESSION_OPENED || o->token.len != sizeof c->token)
        return ts_fail(c, TS_EPROTO, "the daemon at %s opened no session", c->path);
    c->session = o->session;
    memcpy(c->token, o->token.data, sizeof c->token);
    snprintf(c->version, sizeof c->version, "%s", o->version);
    c->exchange_bytes_max = o->exchange_bytes_max;
    c->message_bytes_max = o->message_bytes_max;
    c->outlives = o->epoch.len > 0;
    *has = (shared_memory){o->has_exchange, o->has_signals};
    return TS_OK;
}

/* Asks for the session, and reads the answer. */
static ts_status ask_session(ts_client *c, Tspb__Request *request, shared_memory *has)
{
    Tspb__Reply *reply;
    ts_status status = ts_call(c, request, &reply);
    if (status == TS_EPROTO) { /* the daemon has told its version, unless it is too old for that */
        char why[sizeof c->error.text];
        memcpy(why, c->error.text, sizeof why);
        return ts_fail(c, status, "libtinyserve " TS_VERSION ": %s", why);
    }
    if (status != TS_OK)
        return status;
    status = read_opened(c, reply, has);
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

static ts_status open_session(ts_client *c, const char *program)
{
    Tspb__SessionOpen open = TSPB__SESSION_OPEN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    shared_memory has;
    open.protocol = TS_PROTOCOL;
    open.program = ts_unconst(program);
    open.version = (char *)TS_VERSION;
    open.nonce.data = c->nonce;
    open.nonce.len = sizeof c->nonce;
    request.body_case = TSPB__REQUEST__BODY_SESSION_OPEN;
    request.session_open = &open;
    return ask_session(c, &request, &has);
}

static ts_status resume_session(ts_client *c, shared_memory *has)
{
    Tspb__SessionResume resume = TSPB__SESSION_RESUME__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    resume.protocol = TS_PROTOCOL;
    resume.session = c->session;
    resume.token.data = c->token;
    resume.token.len = sizeof c->token;
    resume.version = (char *)TS_VERSION;
    resume.given_up = c->given_up;
    resume.n_given_up = c->num_given_up;
    resume.closed_pools = c->unheard_closes;
    resume.aborted_steps = c->unaborted;
    resume.n_aborted_steps = c->num_unaborted;
    request.body_case = TSPB__REQUEST__BODY_SESSION_RESUME;
    request.session_resume = &resume;
    return ask_session(c, &request, has);
}

void ts_hang_up(ts_client *c)
{
    ts_unanswered_close(c);
    if (c->open) {
        set_live_socket(c, 0);
        atomic_store(&c->broken, true);
        pthread_mutex_lock(&c->socket_lock);
        /* First: an answer may have come in the last moment, and NNG's thread for what is late be
         * about to tell the socket. To free waits for that. */
        nng_aio_free(c->aio);
        if (c->late) /* a connection whose answer comes as it is closed may never end (NNG 1.5) */
            (void)poll(NULL, 0, LATE_MS);
        nng_close(c->socket);
        pthread_mutex_unlock(&c->socket_lock);
    }
    c->open = false;
    ts_handles_close(c);
}

/* Connects to the daemon, opens the session and, if one is wanted, the exchange. */
ts_status ts_arrive(ts_client *c, const char *program, size_t exchange_bytes, uint64_t until_ms)
{
    int error;
    c->absent = c->met = false;
    c->session = 0;
    c->next_id = 1;
    ts_status status = reach(c, until_ms, &error);
    c->met = status == TS_OK || error == NNG_ETIMEDOUT;
    if (status != TS_OK)
        return status;
    status = open_session(c, program);
    c->absent = status == TS_ECONN || status == TS_EBUSY; /* it ends, or is being drained */
    if (status == TS_OK && exchange_bytes > 0) {
        status = ts_exchange_host(c, exchange_bytes);
        c->absent = status == TS_ECONN;
    }
    return status;
}

/* What the session had of the last daemon and can't have again; NULL: nothing. */
static const char *what_is_gone(const ts_client *c, const shared_memory *has)
{
    if (c->exchange != NULL && !has->exchange)
        return "its exchange";
    if (c->signals != NULL && !has->signals)
        return "its page of signals";
    for (const ts_pool *p = c->pools; p != NULL; p = p->next)
        if (p->has_ipc_handle && p->base != NULL)
            return "the cuda-ipc memory that it maps";
    return NULL;
}

/* One attempt. *lost: the daemon has answered, and the session can't go on with it. */
static ts_status resume(ts_client *c, uint64_t until_ms, bool *lost)
{
    shared_memory has = {0};
    int error;
    *lost = false;
    c->absent = false;
    ts_status status = reach(c, until_ms, &error);
    if (status != TS_OK)
        return status;
    status = resume_session(c, &has);
    if (status == TS_ENOENT || status == TS_EPROTO) {
        char why[sizeof c->error.text];
        memcpy(why, c->error.text, sizeof why);
        *lost = true;
        return ts_fail(c, TS_ECONN,
                       "the session is over: the daemon at %s was started anew, or has ended it: "
                       "%s",
                       c->path, why);
    }
    if (status != TS_OK)
        return status;
    const char *gone = what_is_gone(c, &has);
    *lost = gone != NULL;
    return gone == NULL ? TS_OK
                        : ts_fail(c, TS_ECONN,
                                  "the session is over: %s went with the daemon at %s that ended",
                                  gone, c->path);
}

ts_status ts_arrive_again(ts_client *c, uint64_t until_ms)
{
    bool lost = false;
    ts_status status;
    c->reconnecting = true;
    /* Kept until a daemon has been told, which a later call may be the first to reach. */
    c->num_given_up +=
        ts_unanswered_calls(c, c->given_up + c->num_given_up, TS_GIVEN_UP_MOST - c->num_given_up);
    for (;;) {
        ts_hang_up(c);
        if ((lost = c->cuda != NULL && ts_cuda_is_lost(c->cuda))) {
            /* Nor is the daemon served by CUDA's multi-process service before this process ends. */
            status = ts_fail(c, TS_ECONN,
                             "the session is over: a fault has taken this process's CUDA context, "
                             "and what the session has on the GPU can't be used any more");
            break;
        }
        status = resume(c, until_ms, &lost);
        if (status == TS_OK &&
            (ts_rings_reopen(c) == TS_ECONN || ts_slab_returns_reopen(c) != TS_OK))
            status = TS_ECONN; /* it has gone, too */
        if (status == TS_OK || lost || ts_now_ms() >= until_ms)
            break;
        (void)poll(NULL, 0, AGAIN_MS);
    }
    if (status == TS_OK) {
        c->restarts++;
        c->num_given_up = 0;
        c->unheard_closes = 0;
        c->num_unaborted = 0;
    } else {
        ts_hang_up(c);
        c->lost = lost;
    }
    if (lost)
        ts_signals_release_waiters(c);
    c->reconnecting = false;
    return status;
}

void ts_leave_session(ts_client *c)
{
    Tspb__SessionClose close = TSPB__SESSION_CLOSE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    if (c->session == 0 || !c->outlives || c->lost || c->reconnect == NULL)
        return;
    request.body_case = TSPB__REQUEST__BODY_SESSION_CLOSE;
    request.session_close = &close;
    const uint32_t most = c->end_unheard && !atomic_load(&c->broken) ? TS_TELL_MS : LEAVE_MS;
    c->timeout_ms = c->timeout_ms < most ? c->timeout_ms : most;
    c->wait_ms = c->retries = 0;
    c->settle = NULL;
    (void)ts_call_plain(c, &request); /* else its process's end will tell */
}
