/* Descriptors of memory that the daemon shares with a session, by the handle socket: who may have
 * which. */
#include "fd_export.h"

#include "exchange_open.h"
#include "ring_server.h"
#include "slab_holder.h"
#include "stored_memory.h"
#include "tinyserve_version.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

static ts_status hand_out(ts_handle_ask *ask, int fd, uint64_t bytes, char *why, size_t why_bytes)
{
    ask->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    ask->reply.bytes = bytes;
    ask->reply.writable = 1;
    if (ask->fd >= 0)
        return TS_OK;
    snprintf(why, why_bytes, "no descriptor: %s", strerror(errno));
    return TS_ENOMEM;
}

/* Makes memory for the client to fill. */
static ts_status make(ts_handle_ask *ask, ts_filling *filling, const char *what, uint64_t least,
                      uint64_t most, char *why, size_t why_bytes)
{
    uint64_t bytes = ask->request.bytes;
    if (bytes < least || bytes > most || bytes % 4096 != 0) {
        snprintf(why, why_bytes, "%s of %llu bytes; it must be a multiple of 4096, %llu to %llu",
                 what, (unsigned long long)bytes, (unsigned long long)least,
                 (unsigned long long)most);
        return TS_EINVAL;
    }
    ts_status status = ts_filling_new(filling, bytes, why, why_bytes);
    return status == TS_OK ? hand_out(ask, filling->fd, bytes, why, why_bytes) : status;
}

/* The doorbell of the rings that the client has filled, or of those that it has. */
static ts_status open_doorbell(ts_service *s, ts_connection *c, ts_handle_ask *ask, char *why,
                               size_t why_bytes)
{
    if (c->memory.new_rings.bytes > 0 || c->ring == NULL) {
        ts_status status = ts_ring_new(s->rings, c, why, why_bytes);
        if (status != TS_OK)
            return status;
    }
    return hand_out(ask, c->ring->doorbell, 0, why, why_bytes);
}

/* The session's page of signals, made and stored at the first need. */
static ts_status hand_out_signals(ts_service *s, ts_connection *c, ts_handle_ask *ask, char *why,
                                  size_t why_bytes)
{
    ts_signals_page **page = &c->memory.signals;
    ts_status status = TS_OK;
    if (*page == NULL) {
        status = ts_signals_new(page, why, why_bytes);
        if (status == TS_OK)
            (*page)->outlives = s->exec.books != NULL;
        if (status == TS_OK && (*page)->outlives)
            status = ts_stored_signals_put(s->exec.store, c->session, (*page)->fd, why, why_bytes);
        if (status != TS_OK) {
            ts_signals_release(*page);
            *page = NULL;
            return status;
        }
    }
    return hand_out(ask, (*page)->fd, TS_SIGNALS_BYTES, why, why_bytes);
}

static ts_status hand_out_revocations(ts_service *s, ts_connection *c, ts_handle_ask *ask,
                                      char *why, size_t why_bytes)
{
    (void)s;
    if (c->memory.slabs == NULL) {
        ts_status status = ts_slab_holder_new(&c->memory.slabs, why, why_bytes);
        if (status != TS_OK)
            return status;
    }
    if (ask->request.kind == TS_HANDLE_REVOCATION_BELL)
        return hand_out(ask, ts_slab_holder_bell(c->memory.slabs), 0, why, why_bytes);
    return hand_out(ask, ts_slab_holder_page(c->memory.slabs), TS_REVOCATIONS_BYTES, why,
                    why_bytes);
}

static ts_status hand_out_exchange(ts_service *s, ts_connection *c, ts_handle_ask *ask, char *why,
                                   size_t why_bytes)
{
    (void)s;
    const ts_exchange *exchange = c->memory.exchange;
    if (exchange == NULL || exchange->fd < 0) {
        snprintf(why, why_bytes,
                 exchange == NULL ? "the session has opened no exchange"
                                  : "the session's exchange has no descriptor");
        return TS_ENOENT;
    }
    return hand_out(ask, exchange->fd, exchange->bytes, why, why_bytes);
}

static ts_status make_exchange(ts_service *s, ts_connection *c, ts_handle_ask *ask, char *why,
                               size_t why_bytes)
{
    return make(ask, &c->memory.new_exchange, "an exchange", 4096,
                s->exec.engine->limits.exchange_bytes, why, why_bytes);
}

static ts_status take_exchange(ts_service *s, ts_connection *c, ts_handle_ask *ask, char *why,
                               size_t why_bytes)
{
    return ts_exchange_taken(s, c, &ask->reply.bytes, why, why_bytes);
}

static ts_status make_rings(ts_service *s, ts_connection *c, ts_handle_ask *ask, char *why,
                            size_t why_bytes)
{
    (void)s;
    return make(ask, &c->memory.new_rings, "rings", ts_rings_bytes(0, 0, 0),
                ts_rings_bytes(TS_RING_BLOCKS, TS_RING_SLABS, TS_RING_IDS), why, why_bytes);
}

static ts_status hand_out_slab(ts_service *s, ts_connection *c, ts_handle_ask *ask, char *why,
                               size_t why_bytes)
{
    const ts_handle_request *r = &ask->request;
    const ts_session *session = ts_engine_session(s->exec.engine, c->session);
    if (r->pool >= s->exec.engine->num_pools || !(session->opened_pools >> r->pool & 1)) {
        snprintf(why, why_bytes, "the session has not opened a pool %u", r->pool);
        return TS_ENOENT;
    }
    const ts_pool_books *books = &s->exec.engine->pools[r->pool].books;
    if (r->slab >= books->num_slabs || books->slabs[r->slab].tenant != session->tenant) {
        snprintf(why, why_bytes, "slab %u of pool %u is not uid %u's", r->slab, r->pool, c->uid);
        return TS_EPERM;
    }
    if (r->writable && !(session->writable_pools >> r->pool & 1)) {
        snprintf(why, why_bytes, "the session didn't open pool %u to write", r->pool);
        return TS_EPERM;
    }
    ask->reply.bytes = s->exec.memory[r->pool]->export_bytes;
    ask->reply.generation = books->slabs[r->slab].generation;
    ask->reply.writable = r->writable != 0;
    const ts_exec_gpu *gpu = s->exec.gpu_of[r->pool];
    if (gpu != NULL) {
        if (c->memory.slabs == NULL) {
            snprintf(why, why_bytes, "the session has not asked for its page of revocations");
            return TS_EPROTO;
        }
        ts_status status = ts_slab_holder_note(
            c->memory.slabs, r->pool, r->slab, ask->reply.generation, ask->reply.bytes,
            &gpu->exchange_bytes[session->tenant], why, why_bytes);
        if (status != TS_OK)
            return status;
    }
    return ts_memory_export(s->exec.memory[r->pool], r->slab, r->writable != 0, &ask->fd, why,
                            why_bytes);
}

/* What is done for each kind of request. */
static ts_status (*const by_kind[])(ts_service *s, ts_connection *c, ts_handle_ask *ask, char *why,
                                    size_t why_bytes) = {
    [TS_HANDLE_EXCHANGE] = hand_out_exchange,
    [TS_HANDLE_SLAB] = hand_out_slab,
    [TS_HANDLE_SIGNALS] = hand_out_signals,
    [TS_HANDLE_NEW_RINGS] = make_rings,
    [TS_HANDLE_DOORBELL] = open_doorbell,
    [TS_HANDLE_NEW_EXCHANGE] = make_exchange,
    [TS_HANDLE_TAKE_EXCHANGE] = take_exchange,
    [TS_HANDLE_REVOCATIONS] = hand_out_revocations,
    [TS_HANDLE_REVOCATION_BELL] = hand_out_revocations,
};

static ts_status find_handle(ts_service *s, ts_handle_ask *ask, char *why, size_t why_bytes)
{
    const ts_handle_request *r = &ask->request;
    ts_connection *c = ts_service_connection_of(s, r->session);
    if (r->session == 0 || c == NULL || c->uid != ask->uid ||
        memcmp(c->token, r->token, sizeof c->token) != 0) {
        snprintf(why, why_bytes, "uid %u has no session %llx with this token", ask->uid,
                 (unsigned long long)r->session);
        return TS_ECONN; /* it may be an earlier daemon's, and come back */
    }
    if (r->kind >= sizeof by_kind / sizeof *by_kind || by_kind[r->kind] == NULL) {
        snprintf(why, why_bytes, "a handle request of kind %u; %zu is the last that is known",
                 r->kind, sizeof by_kind / sizeof *by_kind - 1);
        return TS_ENOENT;
    }
    return by_kind[r->kind](s, c, ask, why, why_bytes);
}

void ts_fd_export(ts_work *work, void *service)
{
    ts_handle_ask *ask = (ts_handle_ask *)work;
    ask->fd = -1;
    ask->reply = (ts_handle_reply){.magic = TS_HANDLE_MAGIC};
    ask->reply.status =
        (uint32_t)find_handle(service, ask, ask->reply.message, sizeof ask->reply.message);
    ask->done(ask);
}
