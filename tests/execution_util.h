/* Connecting to a test's daemon by one of the ways that a step can go. */
#ifndef TS_EXECUTION_UTIL_H
#define TS_EXECUTION_UTIL_H

#include "daemon_util.h"

#define POOL "tiny:layers=2,kv_heads=2,head_dim=64,dtype=bf16,block_tokens=4,blocks=512"

enum { HEADS = 4, KV = 2, DIM = 64 };

static inline ts_client *connect_by(const daemon_process *d, ts_transport transport, ts_exec exec,
                                    uint32_t spin_us)
{
    ts_client *c;
    ts_status status = ts_connect(&(ts_options){.size = sizeof(ts_options),
                                                .url = d->url,
                                                .timeout_ms = 120000,
                                                .transport = transport,
                                                .exec = exec,
                                                .threads = 2,
                                                .spin_us = spin_us},
                                  &c);
    if (status != TS_OK)
        fail_msg("%s: %s", ts_status_name(status), ts_error(c));
    return c;
}

#endif
