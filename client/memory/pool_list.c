/* Which pools the daemon has, and making one. */
#include "error.h"
#include "options.h"
#include "rpc.h"
#include "unconst.h"

#include <stdio.h>

static ts_pool_info info_of(const Tspb__PoolSummary *p)
{
    ts_pool_info info = {.geometry = {.layers = p->layers,
                                      .kv_heads = p->kv_heads,
                                      .head_dim = p->head_dim,
                                      .block_tokens = p->block_tokens,
                                      .dtype = (ts_dtype)p->dtype,
                                      .layout = (ts_layout)p->layout},
                         .blocks = p->max_blocks > p->blocks ? p->max_blocks : p->blocks};
    snprintf(info.name, sizeof info.name, "%s", p->name);
    snprintf(info.device, sizeof info.device, "%s", p->device);
    return info;
}

ts_status ts_pool_list(ts_client *c, ts_pool_info *out, size_t info_bytes, uint32_t room,
                       uint32_t *count)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    *count = 0;
    TS_ENTER(c);
    ts_status status = ts_result_check(c, TS_STRUCT_POOL_INFO, info_bytes);
    if (status != TS_OK)
        return status;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    status = ts_call(c, &request, &reply);
    if (status != TS_OK)
        return status;
    if (reply->body_case == TSPB__REPLY__BODY_STATUS_REPLY) {
        const Tspb__StatusReply *r = reply->status_reply;
        *count = (uint32_t)r->n_pools;
        for (uint32_t i = 0; i < room && i < *count; i++) {
            const ts_pool_info info = info_of(r->pools[i]);
            ts_result_put(TS_STRUCT_POOL_INFO, (unsigned char *)out + i * info_bytes, info_bytes,
                          &info);
        }
    } else {
        status = ts_fail(c, TS_EPROTO, "the daemon's answer lists no pools");
    }
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

ts_status ts_pool_create(ts_client *c, const char *text)
{
    Tspb__AdminPoolCreate body = TSPB__ADMIN_POOL_CREATE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    TS_ENTER(c);
    body.text = ts_unconst(text);
    request.body_case = TSPB__REQUEST__BODY_ADMIN_POOL_CREATE;
    request.admin_pool_create = &body;
    return ts_call_plain(c, &request);
}
