#include "replies.h"

#include <stdlib.h>
#include <string.h>

static void drop(ts_replies *r, ts_kept_reply *kept)
{
    if (kept->bytes == NULL)
        return;
    r->bytes -= kept->size;
    free(kept->bytes);
    kept->bytes = NULL;
}

void ts_replies_fini(ts_replies *r)
{
    for (uint32_t i = 0; i < TS_REPLIES_KEPT; i++)
        drop(r, &r->slots[i]);
}

ts_kept_reply *ts_replies_at(ts_replies *r, uint64_t id)
{
    return &r->slots[id % TS_REPLIES_KEPT];
}

void ts_replies_start(ts_replies *r, ts_kept_reply *kept, uint64_t id)
{
    drop(r, kept);
    *kept = (ts_kept_reply){.id = id};
}

void ts_replies_keep(ts_replies *r, ts_kept_reply *kept, const void *bytes, size_t size)
{
    kept->pending = false;
    kept->bytes = malloc(size > 0 ? size : 1);
    if (kept->bytes == NULL)
        return;
    memcpy(kept->bytes, bytes, size);
    kept->size = size;
    r->bytes += size;
    while (r->bytes > TS_REPLY_BYTES_KEPT) {
        ts_kept_reply *oldest = NULL;
        for (uint32_t i = 0; i < TS_REPLIES_KEPT; i++)
            if (r->slots[i].bytes != NULL && (oldest == NULL || r->slots[i].id < oldest->id))
                oldest = &r->slots[i];
        drop(r, oldest);
    }
}
