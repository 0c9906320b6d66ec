#define _GNU_SOURCE
#include "rpc.h"

#include "error.h"

#include <unistd.h>

/* Sends the packed request and waits for one reply message. */
static ts_status exchange_messages(ts_client *c, const Tspb__Request *request, nng_msg **reply)
{
    nng_msg *message;
    size_t bytes = tspb__request__get_packed_size(request);
    if (nng_msg_alloc(&message, bytes) != 0)
        return ts_fail(c, TS_ENOMEM, "no memory for a request of %zu bytes", bytes);
    tspb__request__pack(request, nng_msg_body(message));
    nng_aio_set_timeout(c->aio, (nng_duration)c->timeout_ms);
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
    if (error == 0) {
        *reply = nng_aio_get_msg(c->aio);
        return TS_OK;
    }
    if (atomic_load(&c->broken))
        return ts_gone(c);
    if (error == NNG_ETIMEDOUT)
        return ts_fail(c, TS_ETIMEOUT, "no answer from %s within %u ms", c->path, c->timeout_ms);
    return ts_fail(c, TS_ECONN, "%s: %s", c->path, nng_strerror(error));
}

ts_status ts_call(ts_client *c, Tspb__Request *request, Tspb__Reply **reply)
{
    *reply = NULL;
    ts_status status = ts_may_ask(c);
    if (status != TS_OK)
        return status;
    request->request_id = c->next_id++;
    status = TS_ETIMEOUT;
    nng_msg *message = NULL;
    for (uint32_t i = 0; status == TS_ETIMEOUT && i <= c->retries; i++)
        status = exchange_messages(c, request, &message);
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
        status = ts_fail_refused(c, (ts_status)r->status, r->needed, r->free, r->limit, r->message);
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
