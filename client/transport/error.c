#include "error.h"

#include "clock.h"
#include "public_structs.h"

#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LOOKS 100 /* of a millisecond each */

/* The client that this thread was refused last, as another one was inside. Its sentence is the
 * constant below and not in the client, where that other thread may be writing one. */
static _Thread_local const ts_client *refused;

static ts_status fail(ts_client *c, const ts_error_info *info, const char *format, va_list args)
{
    if (refused == c)
        refused = NULL;
    if (!c->has_failed) { /* the first time in this call */
        c->error_before = c->error;
        c->has_failed = true;
    }
    vsnprintf(c->error.text, sizeof c->error.text, format, args);
    c->error.info = *info;
    return info->status;
}

ts_status(ts_fail)(ts_client *c, ts_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)fail(c, &(ts_error_info){.status = status}, format, args);
    va_end(args);
    return status;
}

ts_status(ts_fail_beyond)(ts_client *c, ts_status status, uint64_t needed, uint64_t limit,
                          const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)fail(c, &(ts_error_info){.status = status, .needed = needed, .limit = limit}, format,
               args);
    va_end(args);
    return status;
}

ts_status ts_fail_refused(ts_client *c, const ts_error_info *info, const char *message)
{
    (void)ts_fail(c, info->status, "%s", message);
    c->error.info = *info;
    return info->status;
}

ts_status ts_error_read(const ts_client *c, ts_error_info *out)
{
    const size_t size = out->size;
    ts_error_info info = c->error.info;
    if (!ts_result_fits(TS_STRUCT_ERROR_INFO, size))
        return TS_EINVAL;
    if (c == refused)
        info = (ts_error_info){.status = TS_EBUSY};
    info.size = size;
    ts_result_put(TS_STRUCT_ERROR_INFO, out, size, &info);
    return TS_OK;
}

const char *ts_error(const ts_client *c)
{
    if (c == NULL)
        return "out of memory";
    return c == refused ? "another thread is inside a call on this client: a client, and what was "
                          "opened from it, is used by one thread at a time"
                        : c->error.text;
}

ts_status ts_in_use(ts_client *c)
{
    if (c->pid != getpid()) /* the thread that was inside isn't in this process */
        return ts_not_ours(c);
    refused = c;
    return TS_EBUSY;
}

ts_client *ts_enter_last(ts_client *c)
{
    while (!ts_try_enter(c) && c->pid == getpid())
        (void)poll(NULL, 0, 1);
    c->has_failed = false;
    return c;
}

ts_status ts_not_ours(ts_client *c)
{
    return ts_fail(c, TS_ECONN, "the session belongs to process %d: connect after fork()",
                   (int)c->pid);
}

ts_status ts_gone(ts_client *c)
{
    atomic_store(&c->broken, true);
    if (ts_device_failed(c))
        return ts_fail(c, TS_EDEVICE,
                       "a GPU of the daemon at %s failed, and it ended: the session is over",
                       c->path);
    return ts_fail(c, TS_ECONN, "the connection to %s ended: the session is over", c->path);
}

uint64_t ts_call_end_ms(const ts_client *c)
{
    return ts_now_ms() + c->timeout_ms + c->wait_ms;
}

bool ts_goes_on(ts_client *c, ts_status status, uint64_t until_ms)
{
    if (status != TS_ECONN || c->reconnect == NULL || !c->outlives || c->reconnecting ||
        ts_is_brief(c) || c->lost || c->session == 0 || c->pid != getpid())
        return false;
    /* Another of its sockets may have ended before NNG's thread has seen that its own has: a daemon
     * that dies with a GPU's context closes them one by one, for up to 0.2 s. The call is tried
     * again meanwhile: by a new connection it may be, if that one alone had ended. */
    for (int i = 0; i < LOOKS && !atomic_load(&c->broken); i++)
        (void)poll(NULL, 0, 1);
    const bool again =
        atomic_load(&c->broken) ? c->reconnect(c, until_ms) == TS_OK : ts_now_ms() < until_ms;
    if (again && c->has_failed) {
        c->error = c->error_before;
        c->has_failed = false;
    }
    return again;
}

void ts_give_up(ts_client *c, ts_status status, uint64_t call)
{
    if (status == TS_ECONN && !c->reconnecting && c->num_given_up < TS_GIVEN_UP_MOST)
        c->given_up[c->num_given_up++] = call;
}

ts_status ts_may_ask(ts_client *c)
{
    if (c->pid != getpid())
        return ts_not_ours(c);
    if (atomic_load(&c->abandoned))
        return ts_fail(
            c, TS_ECONN,
            "the session is over: no daemon at %s was at its runs on a stream for %u ms, "
            "and the stream went on without them",
            c->path, c->timeout_ms);
    if (c->lost)
        return ts_fail(c, TS_ECONN, "the session is over: connect again to the daemon at %s",
                       c->path);
    if (atomic_load(&c->broken) || !c->open) {
        if (c->reconnect == NULL || !c->outlives || c->reconnecting || ts_is_brief(c) ||
            c->session == 0)
            return ts_gone(c);
        if (!ts_goes_on(c, TS_ECONN, ts_call_end_ms(c)))
            return TS_ECONN;
    }
    if (c->settle != NULL)
        c->settle(c);
    return TS_OK;
}

bool ts_device_failed(const ts_client *c)
{
    return c->rings != NULL &&
           __atomic_load_n(&c->rings->ended, __ATOMIC_ACQUIRE) == TS_RINGS_DEVICE_FAILED;
}

void ts_error_forget(void)
{
    refused = NULL;
}
