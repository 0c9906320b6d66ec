/* Connects and disconnects: the one file that knows all that a client has. */
#define _GNU_SOURCE
#include "arrive.h"
#include "clock.h"
#include "error.h"
#include "exchange.h"
#include "fd_client.h"
#include "gpu_context.h"
#include "local_exec.h"
#include "local_gpu.h"
#include "options.h"
#include "ring_client.h"
#include "rpc.h"
#include "slab_returns.h"
#include "stream_signals.h"
#include "tinyserve_version.h"
#include "unanswered.h"
#include "unconst.h"

#include <errno.h>
#include <limits.h>
#include <nng/protocol/reqrep0/req.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define TIMEOUT_DEFAULT_MS 30000u
#define POLL_MS 20 /* between attempts to reach a daemon that is awaited */
#define SPIN_DEFAULT_US 50u

/*
 * The process that uses NNG: NNG ends a process that uses it after a fork from one that did, so
 * this must be known before NNG is asked. 0: none yet. Inherited by fork, which is the point.
 */
static _Atomic pid_t nng_user;

ts_transport ts_client_transport(const ts_client *c)
{
    return c->last_transport;
}

ts_exec ts_client_exec(const ts_client *c)
{
    return c->last_exec;
}

uint32_t ts_client_restarts(const ts_client *c)
{
    return c->restarts;
}

uint64_t ts_session_id(const ts_client *c)
{
    return c->session;
}

const char *ts_daemon_version(const ts_client *c)
{
    return c->version;
}

/*
 * Puts the user's own socket into c->path. False: there is none, or none to be trusted; `why`
 * continues the sentence that tells of the system's, and is empty where the user's is that.
 */
static bool find_own(ts_client *c, char *why, size_t why_bytes)
{
    char socket[PATH_MAX], problem[160];
    size_t length = ts_own_socket(socket, sizeof socket);
    why[0] = '\0';
    if (length == 0)
        return false;
    if (length >= sizeof c->path) {
        snprintf(why, why_bytes,
                 "; the user's own, by XDG_RUNTIME_DIR, has a path of %zu bytes; the limit is %zu",
                 length, sizeof c->path - 1);
        return false;
    }
    memcpy(c->path, socket, length + 1);
    ts_status status = ts_own_folder_check(c->path, problem, sizeof problem);
    c->absent = status == TS_ENOENT;
    if (status == TS_ENOENT)
        snprintf(why, why_bytes, "; nor is there %s", c->path);
    else if (status != TS_OK)
        snprintf(why, why_bytes, "; %s", problem);
    return status == TS_OK;
}

/* Arrives at the user's own daemon; if there is none, at the system's. */
static ts_status arrive_by_default(ts_client *c, const char *program, size_t exchange_bytes,
                                   uint64_t until_ms)
{
    char why[192];
    c->absent = false;
    if (find_own(c, why, sizeof why)) {
        ts_status status = ts_arrive(c, program, exchange_bytes, until_ms);
        if (status == TS_OK || c->met || !c->absent)
            return status;
        ts_hang_up(c);
        snprintf(why, sizeof why, "; nor is there %s", c->path);
    }
    bool own_absent = c->absent;
    snprintf(c->path, sizeof c->path, "%s", TS_SYSTEM_SOCKET);
    ts_status status = ts_arrive(c, program, exchange_bytes, until_ms);
    if (status == TS_OK || c->met)
        return status;
    char first[sizeof c->error.text];
    memcpy(first, c->error.text, sizeof first);
    c->absent = c->absent || (status == TS_EPERM && own_absent); /* the user's own may come */
    return ts_fail(c, status, "%s%s", first, why);
}

/* Takes the daemon's address apart, which errors call `what`; only sockets of this machine are
 * served. An empty one may be a variable that isn't set: what was meant for one daemon would be
 * done to another. */
static ts_status set_path(ts_client *c, const char *url, const char *what)
{
    const char *scheme = strstr(url, "://");
    if (url[0] == '\0')
        return ts_fail(c, TS_EINVAL,
                       "%s is empty: ipc:///PATH or /PATH is needed, or none at all for the user's "
                       "own daemon or the system's",
                       what);
    if (scheme != NULL && strncmp(url, "ipc://", 6) != 0)
        return ts_fail(c, TS_EINVAL,
                       "the address %.100s: the daemon is reached by ipc:///PATH alone, on its own "
                       "machine",
                       url);
    const char *path = scheme != NULL ? url + 6 : url;
    if (path[0] != '/')
        return ts_fail(c, TS_EINVAL,
                       "the address %.100s: an absolute path such as " TS_URL_SYSTEM " is needed",
                       url);
    if (strlen(path) >= sizeof c->path)
        return ts_fail_beyond(c, TS_EINVAL, strlen(path), sizeof c->path - 1,
                              "the daemon's socket has a path of %zu bytes; the limit is %zu",
                              strlen(path), sizeof c->path - 1);
    snprintf(c->path, sizeof c->path, "%s", path);
    return TS_OK;
}

/* Whether members that are one of a few words are. */
static ts_status check_words(ts_client *c, const ts_options *o)
{
    const struct {
        const char *name;
        int is, last;
        const char *last_name;
    } words[] = {
        {"transport", (int)o->transport, TS_TRANSPORT_MESSAGES, "TS_TRANSPORT_MESSAGES"},
        {"exec", (int)o->exec, TS_EXEC_AUTO, "TS_EXEC_AUTO"},
        {"reconnect", (int)o->reconnect, TS_RECONNECT_OFF, "TS_RECONNECT_OFF"},
    };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (words[i].is < 0 || words[i].is > words[i].last)
            return ts_fail(c, TS_EINVAL, "ts_options.%s is %d; the last one is %d, %s",
                           words[i].name, words[i].is, words[i].last, words[i].last_name);
    return TS_OK;
}

ts_status ts_connect(const ts_options *options, ts_client **out)
{
    ts_options o;
    ts_client *c = calloc(1, sizeof *c);
    *out = c;
    ts_error_forget();
    if (c == NULL)
        return TS_ENOMEM;
    c->handle_fd = -1;
    c->pid = getpid();
    pthread_mutex_init(&c->socket_lock, NULL);
    pthread_mutex_init(&c->live_lock, NULL);
    ts_status status = ts_options_read(c, TS_STRUCT_OPTIONS, options, &o);
    if (status == TS_OK)
        status = check_words(c, &o);
    if (status != TS_OK)
        return status;
    c->timeout_ms = o.timeout_ms != 0 ? o.timeout_ms : TIMEOUT_DEFAULT_MS;
    c->retries = o.retries;
    c->transport = o.transport;
    c->last_transport = TS_TRANSPORT_MESSAGES;
    c->exec = o.exec;
    c->threads = o.threads;
    c->reconnect = o.reconnect == TS_RECONNECT_ON ? ts_arrive_again : NULL;
    if (getrandom(c->nonce, sizeof c->nonce, 0) != (ssize_t)sizeof c->nonce)
        memset(c->nonce, 0, sizeof c->nonce); /* then an answer that is lost leaves a session */
    c->spin_us = o.spin_us != 0 ? o.spin_us : SPIN_DEFAULT_US;
    const char *url = o.url != NULL ? o.url : getenv("TINYSERVE_URL");
    const bool named = url != NULL;
    if (named && (status = set_path(
                      c, url, o.url != NULL ? "the daemon's address" : "TINYSERVE_URL")) != TS_OK)
        return status;

    pid_t user = 0;
    if (!atomic_compare_exchange_strong(&nng_user, &user, c->pid) && user != c->pid)
        return ts_fail(c, TS_EPERM,
                       "process %d was forked from %d after that had connected: connect in the "
                       "child alone, or exec",
                       (int)c->pid, (int)user);
    const char *program = o.program != NULL ? o.program : program_invocation_short_name;
    const uint64_t until = ts_now_ms() + o.wait_ms;
    ts_status (*const go)(ts_client *, const char *, size_t, uint64_t) =
        named ? ts_arrive : arrive_by_default;
    for (;;) {
        /* A daemon that is there has a call's time, or what is left of the wait, if that is more:
         * it may be the next one's socket that has taken the connection. */
        const uint64_t call_ends = ts_now_ms() + c->timeout_ms;
        status = go(c, program, o.exchange_bytes, call_ends > until ? call_ends : until);
        if (status == TS_OK) {
            c->error = (ts_last_error){0}; /* of attempts that failed */
            return status;
        }
        if (!c->absent || ts_now_ms() >= until)
            return status;
        ts_hang_up(c);
        (void)poll(NULL, 0, POLL_MS);
    }
}

void ts_disconnect(ts_client *c)
{
    if (c == NULL)
        return;
    (void)ts_enter_last(c);
    bool ours = c->pid == getpid(); /* a forked child must not touch its parent's */
    if (ours) {
        ts_leave_session(c);
        ts_hang_up(c);
        ts_signals_release_waiters(c); /* what is waited for below may wait for the daemon */
        (void)ts_local_gpu_await(c);   /* they write into the exchange */
    }
    ts_slab_returns_stop(c);
    ts_exchange_close(c);
    ts_signals_close(c);
    ts_rings_close(c);
    ts_local_close(c);
    if (ours) { /* their threads are not in the child */
        ts_attention_free(c->attention);
        ts_local_gpu_close(c);
    }
    ts_cuda_close(c->cuda);
    ts_handles_close(c);
    pthread_mutex_destroy(&c->socket_lock);
    pthread_mutex_destroy(&c->live_lock);
    free(c->unaborted);
    free(c);
}
