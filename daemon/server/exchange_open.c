#include "exchange_open.h"

#include "pool_memory.h"
#include "step_work.h"
#include "stored_memory.h"

#include <stdio.h>
#include <string.h>

/* The device that an exchange is to be shared with, or NULL and the answer refuses. */
static ts_gpu *exchange_gpu(const ts_service *s, const ts_connection *c,
                            const Tspb__ExchangeOpen *open, ts_answer *answer)
{
    const ts_session *session = ts_engine_session(s->exec.engine, c->session);
    if (session == NULL || open->pool >= s->exec.engine->num_pools ||
        !(session->opened_pools >> open->pool & 1)) {
        ts_refuse(answer, TS_ENOENT, "the session has not opened a pool %u", open->pool);
        return NULL;
    }
    if (s->exec.gpu_of[open->pool] == NULL) {
        ts_refuse(answer, TS_EINVAL,
                  "pool '%s' is in host memory: there is no device to share an "
                  "exchange with",
                  s->exec.engine->pools[open->pool].config.name);
        return NULL;
    }
    if (open->ipc_handle.len != 0 && open->ipc_handle.len != TS_IPC_HANDLE_BYTES) {
        ts_refuse(answer, TS_EINVAL, "an IPC handle of %zu bytes; it has %u", open->ipc_handle.len,
                  TS_IPC_HANDLE_BYTES);
        return NULL;
    }
    return s->exec.gpu_of[open->pool]->gpu;
}

/* Refuses a third exchange beside two that are in use: the connection's, and one that it replaced
 * and that runs still use. */
static bool may_replace(const ts_service *s, const ts_connection *c, ts_answer *answer)
{
    if (!ts_step_work_uses_replaced(&s->exec, c->session, c->memory.exchange))
        return true;
    ts_refuse(answer, TS_EBUSY,
              "runs still use the exchange that was replaced last; until they end, it can't be "
              "replaced again");
    return false;
}

/* The memory is stored, and takes the place of the connection's, unless the engine refuses. */
static void replace_exchange(ts_service *s, ts_connection *c, ts_exchange *x,
                             const ts_command *command, ts_answer *answer)
{
    char why[TS_MESSAGE_BYTES];
    const uint32_t number = ts_engine_session(s->exec.engine, c->session)->exchanges + 1;
    const bool stores = s->exec.books != NULL && x != NULL && ts_exchange_descriptor(x) >= 0;
    ts_status status = TS_OK;
    if (stores)
        status = ts_stored_exchange_put(s->exec.store, c->session, number,
                                        ts_exchange_descriptor(x), why, sizeof why);
    if (status != TS_OK) {
        ts_exchange_release(x);
        return ts_refuse(answer, status, "an exchange: %s", why);
    }
    ts_exec_apply(&s->exec, command, answer);
    if (answer->status != TS_OK) {
        if (stores)
            ts_stored_exchange_forget(s->exec.store, c->session, number);
        return ts_exchange_release(x);
    }
    ts_exchange_release(c->memory.exchange);
    c->memory.exchange = x;
    ts_stored_exchange_forget(s->exec.store, c->session, number - 1);
}

static ts_status new_on_device(const ts_exec *x, uint32_t pool, uint32_t tenant, uint64_t bytes,
                               ts_exchange **out, char *why, size_t why_bytes)
{
    const ts_exec_gpu *g = x->gpu_of[pool];
    ts_status status = ts_pool_memory_check_exchange(x, pool, tenant, bytes, why, why_bytes);
    return status != TS_OK
               ? status
               : ts_exchange_device_new(g->gpu, x->memory[pool]->ipc_handle == NULL, bytes,
                                        &g->exchange_bytes[tenant], out, why, why_bytes);
}

/* What the next daemon needs to find it again. */
static ts_exchange_source source_of(const Tspb__ExchangeOpen *open)
{
    ts_exchange_source from = {.place = TS_EXCHANGE_ON_DEVICE, .pool = open->pool};
    if (open->ipc_handle.len == sizeof from.handle) {
        from.place = TS_EXCHANGE_OF_CLIENT;
        from.offset = open->ipc_offset;
        memcpy(from.handle, open->ipc_handle.data, sizeof from.handle);
    }
    return from;
}

/* The memory comes first, so that applying the command is all that changes the engine. */
void ts_exchange_open(ts_service *s, ts_connection *c, const Tspb__ExchangeOpen *open,
                      ts_command *command, ts_answer *answer)
{
    uint64_t bytes = open->bytes;
    ts_gpu *gpu;
    ts_exchange *x = NULL;
    char why[TS_MESSAGE_BYTES];
    if (!open->on_device && open->ipc_handle.len == 0)
        return ts_refuse(answer, TS_EINVAL,
                         "an exchange in host memory is opened at the handle socket, not by a "
                         "message");
    if ((gpu = exchange_gpu(s, c, open, answer)) == NULL || !may_replace(s, c, answer))
        return;
    if (bytes > 0 && bytes <= s->exec.engine->limits.exchange_bytes) { /* else apply says why not */
        ts_status status =
            open->ipc_handle.len > 0
                ? ts_exchange_import(gpu, open->ipc_handle.data, open->ipc_offset, bytes, &x, why,
                                     sizeof why)
                : new_on_device(&s->exec, open->pool,
                                ts_engine_session(s->exec.engine, c->session)->tenant, bytes, &x,
                                why, sizeof why);
        if (status != TS_OK && ts_exec_leaves_to_next(&s->exec, open->pool)) {
            answer->status = TS_NEED_SWEEP;
            return;
        }
        if (status != TS_OK)
            return ts_refuse(answer, status, "an exchange: %s", why);
    }
    command->exchange_open.other_memory = c->memory.exchange != NULL;
    command->exchange_open.source = source_of(open);
    replace_exchange(s, c, x, command, answer);
}

ts_status ts_exchange_taken(ts_service *s, ts_connection *c, uint64_t *bytes, char *why,
                            size_t why_bytes)
{
    ts_exchange *x;
    ts_answer answer = {0};
    if (!may_replace(s, c, &answer)) {
        snprintf(why, why_bytes, "%s", answer.message);
        return answer.status;
    }
    c->memory.new_exchange.outlives = s->exec.books != NULL;
    ts_status status = ts_exchange_take(&c->memory.new_exchange, &x, why, why_bytes);
    if (status != TS_OK)
        return status;
    ts_command command = {.op = TS_OP_EXCHANGE_OPEN,
                          .session = c->session,
                          .exchange_open = {.bytes = x->bytes,
                                            .other_memory = c->memory.exchange != NULL &&
                                                            c->memory.exchange->host == NULL}};
    *bytes = x->bytes;
    replace_exchange(s, c, x, &command, &answer);
    snprintf(why, why_bytes, "%s", answer.message);
    return answer.status;
}

void ts_exchange_encode(const ts_connection *c, Tspb__ExchangeOpened *opened, Tspb__Reply *reply)
{
    tspb__exchange_opened__init(opened);
    opened->has_descriptor = c->memory.exchange->fd >= 0;
    if (c->memory.exchange->host == NULL && c->memory.exchange->fd < 0) {
        opened->ipc_handle.data = c->memory.exchange->shared.ipc;
        opened->ipc_handle.len = sizeof c->memory.exchange->shared.ipc;
    }
    reply->body_case = TSPB__REPLY__BODY_EXCHANGE_OPENED;
    reply->exchange_opened = opened;
}
