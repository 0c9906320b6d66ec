#include "exchange_open.h"

#include <stdio.h>

/* The device that an exchange is to be shared with, or NULL and the answer refuses. */
static ts_gpu *exchange_gpu(const ts_service *s, const ts_connection *c,
                            const Tspb__ExchangeOpen *open, ts_answer *a)
{
    const ts_session *session = ts_engine_session(s->exec.engine, c->session);
    if (session == NULL || open->pool >= s->exec.engine->num_pools ||
        !(session->opened_pools >> open->pool & 1)) {
        ts_refuse(a, TS_ENOENT, "the session has not opened a pool %u", open->pool);
        return NULL;
    }
    if (s->exec.gpu_of[open->pool] == NULL) {
        ts_refuse(a, TS_EINVAL,
                  "pool '%s' is in host memory: there is no device to share an "
                  "exchange with",
                  s->exec.engine->pools[open->pool].config.name);
        return NULL;
    }
    if (open->ipc_handle.len != 0 && open->ipc_handle.len != TS_IPC_HANDLE_BYTES) {
        ts_refuse(a, TS_EINVAL, "an IPC handle of %zu bytes; it has %u", open->ipc_handle.len,
                  TS_IPC_HANDLE_BYTES);
        return NULL;
    }
    return s->exec.gpu_of[open->pool]->gpu;
}

/* The memory takes the place of the connection's, unless the engine refuses. */
static void replace_exchange(ts_service *s, ts_connection *c, ts_exchange *x,
                             const ts_command *command, ts_answer *a)
{
    ts_exec_apply(&s->exec, command, a);
    if (a->status != TS_OK)
        return ts_exchange_release(x);
    ts_exchange_release(c->memory.exchange);
    c->memory.exchange = x;
}

/* The memory comes first, so that applying the command is all that changes the engine. */
void ts_exchange_open(ts_service *s, ts_connection *c, const Tspb__ExchangeOpen *open,
                      ts_command *command, ts_answer *a)
{
    uint64_t bytes = open->bytes;
    ts_gpu *gpu;
    ts_exchange *x = NULL;
    char why[TS_MESSAGE_BYTES];
    if (!open->on_device && open->ipc_handle.len == 0)
        return ts_refuse(a, TS_EINVAL,
                         "an exchange in host memory is opened at the handle socket, not by a "
                         "message");
    if ((gpu = exchange_gpu(s, c, open, a)) == NULL)
        return;
    if (bytes > 0 && bytes <= s->exec.engine->limits.exchange_bytes) { /* else apply says why not */
        ts_status status;
        if (open->ipc_handle.len > 0)
            status = ts_exchange_import(gpu, open->ipc_handle.data, open->ipc_offset, bytes, &x,
                                        why, sizeof why);
        else
            status = ts_exchange_device_new(gpu, s->exec.memory[open->pool]->ipc_handle == NULL,
                                            bytes, &x, why, sizeof why);
        if (status != TS_OK)
            return ts_refuse(a, status, "an exchange: %s", why);
    }
    command->exchange_open.other_memory = c->memory.exchange != NULL;
    replace_exchange(s, c, x, command, a);
}

ts_status ts_exchange_taken(ts_service *s, ts_connection *c, uint64_t *bytes, char *why,
                            size_t why_bytes)
{
    ts_exchange *x;
    ts_answer a;
    ts_status status = ts_exchange_take(&c->memory.new_exchange, &x, why, why_bytes);
    if (status != TS_OK)
        return status;
    ts_command command = {.op = TS_OP_EXCHANGE_OPEN,
                          .session = c->session,
                          .exchange_open = {.bytes = x->bytes,
                                            .other_memory = c->memory.exchange != NULL &&
                                                            c->memory.exchange->host == NULL}};
    *bytes = x->bytes;
    replace_exchange(s, c, x, &command, &a);
    snprintf(why, why_bytes, "%s", a.message);
    return a.status;
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
