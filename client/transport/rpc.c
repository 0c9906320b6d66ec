#define _GNU_SOURCE
#include "rpc.h"

#include "clock.h"
#include "error.h"

#include <nng/protocol/reqrep0/req.h>
#include <stdio.h>
#include <unistd.h>

#define NO_MEMORY (-1) /* nothing was sent */

/* Sends the packed request and waits for one reply message; NNG's error, or NO_MEMORY. */
static int try_exchange(ts_client *c, const Tspb__Request *request, size_t bytes, uint32_t ms,
                        nng_msg **reply)
{
    nng_msg *message;
    if (nng_msg_alloc(&message, bytes) != 0)
        return NO_MEMORY;
    tspb__request__pack(request, nng_msg_body(message));
    nng_aio_set_timeout(c->aio, (nng_duration)ms);
    nng_aio_set_msg(c->aio, message);
    nng_send_aio(c->socket, c->aio);
    if (atomic_load(&c->broken)) /* it may have ended before there was anything to abort */
        nng_aio_abort(c->aio, NNG_ECONNRESET);
    nng_aio_wait(c->aio);
    int error = nng_aio_result(c->aio);
    if (error != 0)
        nng_msg_free(nng_aio_get_msg(c->aio));
    if (error == 0) {
        nng_recv_aio(c->socket, c->aio);
        if (atomic_load(&c->broken))
            nng_aio_abort(c->aio, NNG_ECONNRESET);
        nng_aio_wait(c->aio);
        error = nng_aio_result(c->aio);
    }
    if (error == 0)
        *reply = nng_aio_get_msg(c->aio);
    return error;
}

/* The daemon would end the connection, and the session with it. */
static ts_status fail_too_long(ts_client *c, size_t bytes)
{
    char why[sizeof c->error.text];
    snprintf(why, sizeof why,
             "a request of %zu bytes; %s takes messages of up to %llu (message_max)", bytes,
             c->path, (unsigned long long)c->message_bytes_max);
    return ts_fail_refused(
        c, &(ts_error_info){.status = TS_EINVAL, .needed = bytes, .limit = c->message_bytes_max},
        why);
}

/* The same, for as long as the call may take. What NNG says is late may be the call before, which
 * had the same aio and was answered in its last moment: then this one is asked again, and is
 * carried out once. */
static ts_status exchange_messages(ts_client *c, const Tspb__Request *request, nng_msg **reply)
{
    const size_t bytes = tspb__request__get_packed_size(request);
    const uint32_t time_ms = ts_call_time(c);
    const uint64_t until_ms = ts_now_ms() + time_ms;
    uint32_t left_ms = time_ms;
    int error;
    if (c->message_bytes_max != 0 && bytes > c->message_bytes_max)
        return fail_too_long(c, bytes);
    do {
        error = try_exchange(c, request, bytes, left_ms, reply);
        const uint64_t now_ms = ts_now_ms();
        left_ms = now_ms < until_ms ? (uint32_t)(until_ms - now_ms) : 0;
    } while (error == NNG_ETIMEDOUT && left_ms > 1);
    c->unanswered_message = error == NNG_ETIMEDOUT;
    if (error == 0) {
        ts_note_heard(c);
        return TS_OK;
    }
    if (error == NO_MEMORY)
        return ts_fail(c, TS_ENOMEM, "no memory for a request of %zu bytes", bytes);
    if (atomic_load(&c->broken))
        return ts_gone(c);
    c->late = c->unanswered_message;
    c->unheard = c->unheard || c->late;
    if (c->late)
        return ts_fail(c, TS_ETIMEOUT, "no answer from %s within %u ms", c->path, time_ms);
    return ts_fail(c, TS_ECONN, "%s: %s", c->path, nng_strerror(error));
}

/* One answer of the daemon's, whichever it is. */
static ts_status ask(ts_client *c, const Tspb__Request *request, nng_msg **message)
{
    ts_status status = TS_ETIMEOUT;
    for (uint32_t i = 0; status == TS_ETIMEOUT && i <= (ts_is_brief(c) ? 0 : c->retries); i++)
        status = exchange_messages(c, request, message);
    return status;
}

ts_status ts_call(ts_client *c, Tspb__Request *request, Tspb__Reply **reply)
{
    const uint64_t until_ms = ts_call_end_ms(c);
    *reply = NULL;
    ts_status status = ts_may_ask(c);
    if (status != TS_OK)
        return status;
    request->request_id = atomic_fetch_add(&c->next_id, 1);
    nng_msg *message = NULL;
    do
        status = ask(c, request, &message);
    while (ts_goes_on(c, status, until_ms)); /* the same request: it is carried out once */
    ts_give_up(c, status, request->request_id);
    if (status != TS_OK)
        return status;
    Tspb__Reply *r = tspb__reply__unpack(NULL, nng_msg_len(message), nng_msg_body(message));
    nng_msg_free(message);
    if (r == NULL || (r->request_id != request->request_id && r->status == TS_OK)) {
        if (r != NULL)
            tspb__reply__free_unpacked(r, NULL);
        return ts_fail(c, TS_EPROTO, "the daemon's answer to request %llu can't be understood",
                       (unsigned long long)request->request_id);
    }
    if (r->status != TS_OK) {
        status = ts_fail_refused(c,
                                 &(ts_error_info){.status = (ts_status)r->status,
                                                  .needed = r->needed,
                                                  .free = r->free,
                                                  .limit = r->limit,
                                                  .cached = r->cached,
                                                  .pinned = r->pinned,
                                                  .others = r->others},
                                 r->message);
        tspb__reply__free_unpacked(r, NULL);
        return status;
    }
    *reply = r;
    return TS_OK;
}

ts_status ts_call_plain(ts_client *c, Tspb__Request *request)
{
    Tspb__Reply *reply;
    ts_status status = ts_call(c, request, &reply);
    if (status == TS_OK)
        tspb__reply__free_unpacked(reply, NULL);
    return status;
}

ts_status ts_call_briefly(ts_client *c, Tspb__Request *request)
{
    const ts_last_error before = c->error;
    c->brief = true;
    const ts_status status = ts_call_plain(c, request);
    c->brief = false;
    ts_note_end(c, status);
    c->error = before;
    return status;
}

ts_status ts_wait_end(ts_client *c)
{
    /* Another thread is in a call: nothing here may be what that one uses, its sentence included.
     */
    Tspb__WaitEnd body = TSPB__WAIT_END__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    nng_ctx context;
    nng_msg *message;
    request.body_case = TSPB__REQUEST__BODY_WAIT_END;
    request.wait_end = &body;
    if (c->pid != getpid())
        return TS_ECONN;
    pthread_mutex_lock(&c->socket_lock);
    const bool opened = !atomic_load(&c->broken) && nng_ctx_open(&context, c->socket) == 0;
    pthread_mutex_unlock(&c->socket_lock);
    if (!opened)
        return TS_ECONN;
    request.request_id = atomic_fetch_add(&c->next_id, 1);
    nng_aio *aio = NULL;
    int error = nng_aio_alloc(&aio, NULL, NULL);
    if (error == 0)
        error = nng_msg_alloc(&message, tspb__request__get_packed_size(&request));
    if (error == 0) {
        tspb__request__pack(&request, nng_msg_body(message));
        nng_ctx_set_ms(context, NNG_OPT_REQ_RESENDTIME, -1);
        nng_aio_set_timeout(aio, ts_int_ms(c->timeout_ms));
        nng_aio_set_msg(aio, message);
        nng_ctx_send(context, aio);
        nng_aio_wait(aio);
        if ((error = nng_aio_result(aio)) != 0)
            nng_msg_free(message);
    }
    if (error == 0) {
        nng_ctx_recv(context, aio);
        nng_aio_wait(aio);
        if ((error = nng_aio_result(aio)) == 0)
            nng_msg_free(nng_aio_get_msg(aio));
    }
    if (aio != NULL)
        nng_aio_free(aio);
    nng_ctx_close(context);
    return error == 0 ? TS_OK : error == NNG_ETIMEDOUT ? TS_ETIMEOUT : TS_ECONN;
}
