/*
 * The error sentence, and who may be inside a call on a client.
 *
 * Thread: the client's; ts_enter and what follows it any.
 */
#ifndef TS_ERROR_H
#define TS_ERROR_H

#include "client.h"

/*
 * Stands first in every public function that uses the client: a second thread is refused while one
 * is inside. The client is left when the function returns. Functions inside the library that other
 * public functions need too don't have it.
 */
#define TS_ENTER(client)                                                                           \
    ts_client *entered __attribute__((cleanup(ts_leave))) = ts_enter(client);                      \
    if (entered == NULL)                                                                           \
    return ts_in_use(client)

/* The same where nothing can be refused: waits until the other thread's call has returned. */
#define TS_ENTER_LAST(client)                                                                      \
    ts_client *entered __attribute__((cleanup(ts_leave), unused)) = ts_enter_last(client)

/* False: another thread is inside. */
static inline bool ts_try_enter(ts_client *client)
{
    return !atomic_exchange_explicit(&client->in_call, true, memory_order_acquire);
}

/* NULL: another thread is inside. */
static inline ts_client *ts_enter(ts_client *client)
{
    if (!ts_try_enter(client))
        return NULL;
    client->has_failed = false;
    return client;
}

static inline void ts_leave(ts_client **client)
{
    if (*client != NULL)
        atomic_store_explicit(&(*client)->in_call, false, memory_order_release);
}

ts_client *ts_enter_last(ts_client *client);

/* Whether the caller makes a call that failed with this status once more: the daemon had gone, and
 * another one has the session now. This waits until `until_ms` at most. The sentence is then what
 * it was before the call; if false, the call's, or why the session can't go on. */
bool ts_goes_on(ts_client *client, ts_status status, uint64_t until_ms);

/* The call ends with this status. A daemon that went before it had answered may have carried it
 * out, and a later call may reach the next one, which is told then. */
void ts_give_up(ts_client *client, ts_status status, uint64_t call);

/* When the present call's time is over. */
uint64_t ts_call_end_ms(const ts_client *client);

/* Why the client can't be entered: TS_EBUSY; in a forked child TS_ECONN. */
ts_status ts_in_use(ts_client *client);

/* Sets the error sentence, without numbers, and returns status. */
ts_status ts_fail(ts_client *client, ts_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
#ifdef __clang_analyzer__ /* which can't see that it returns status */
#define ts_fail(client, status, ...) (ts_fail(client, status, __VA_ARGS__), (status))
#endif

/* The same with numbers: of what the caller asked for, and the most that it may. */
ts_status ts_fail_beyond(ts_client *client, ts_status status, uint64_t needed, uint64_t limit,
                         const char *format, ...) __attribute__((format(printf, 5, 6)));
#ifdef __clang_analyzer__
#define ts_fail_beyond(client, status, ...) (ts_fail_beyond(client, status, __VA_ARGS__), (status))
#endif

/* The sentence and the numbers of a refusal of the daemon's. */
ts_status ts_fail_refused(ts_client *client, const ts_error_info *info, const char *message);

/* The daemon has said that it ends because a device of it failed. */
bool ts_device_failed(const ts_client *client);

/* The connection has ended: TS_ECONN, or TS_EDEVICE where the daemon ended with its device. It is
 * another process's: TS_ECONN. */
ts_status ts_gone(ts_client *client);
ts_status ts_not_ours(ts_client *client);

/* Stands before every request: settles what must come before it. An error: the session has ended,
 * or is another process's. */
TS_WARN_UNUSED ts_status ts_may_ask(ts_client *client);

/* A new client may have the address of one that this thread was refused. */
void ts_error_forget(void);

#endif
