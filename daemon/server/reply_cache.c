#include "reply_cache.h"

#include <stdlib.h>
#include <string.h>

/* Forgets what the answer was. */
static void drop(ts_kept_reply *kept)
{
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): all callers have one */
    if (kept->bytes == NULL)
        return;
    ts_reply_account *account = kept->owner->account;
    kept->owner->bytes -= kept->size;
    account->bytes -= kept->size;
    *(kept->older != NULL ? &kept->older->newer : &account->oldest) = kept->newer;
    *(kept->newer != NULL ? &kept->newer->older : &account->newest) = kept->older;
    free(kept->bytes);
    kept->bytes = NULL;
}

bool ts_reply_cache_init(ts_reply_cache *r, ts_reply_account **accounts, uint32_t uid)
{
    ts_reply_account *account = *accounts;
    while (account != NULL && account->uid != uid)
        account = account->next;
    if (account == NULL) {
        account = calloc(1, sizeof *account);
        if (account == NULL)
            return false;
        account->uid = uid;
        account->next = *accounts;
        *accounts = account;
    }
    account->users++;
    *r = (ts_reply_cache){.account = account};
    return true;
}

void ts_reply_cache_fini(ts_reply_cache *r, ts_reply_account **accounts)
{
    for (uint32_t i = 0; i < TS_REPLIES_SLOTS; i++)
        drop(&r->slots[i]);
    if (--r->account->users > 0)
        return;
    while (*accounts != r->account)
        accounts = &(*accounts)->next;
    *accounts = r->account->next;
    free(r->account);
}

ts_kept_reply *ts_reply_cache_at(ts_reply_cache *r, uint64_t id)
{
    for (uint32_t i = 0; i < TS_REPLIES_SLOTS; i++)
        if (r->slots[i].id == id)
            return &r->slots[i];
    return NULL;
}

ts_kept_reply *ts_reply_cache_start(ts_reply_cache *r, uint64_t id)
{
    ts_kept_reply *oldest = NULL;
    uint32_t kept = 0;
    if (id <= r->forgotten)
        return NULL;
    for (uint32_t i = 0; i < TS_REPLIES_SLOTS; i++) {
        ts_kept_reply *slot = &r->slots[i];
        kept += slot->id != 0 && !slot->pending;
        if (!slot->pending && (oldest == NULL || slot->id < oldest->id))
            oldest = slot; /* an empty one has id 0 */
    }
    if (oldest != NULL && oldest->id == 0 && kept >= TS_REPLIES_KEPT)
        for (uint32_t i = 0; i < TS_REPLIES_SLOTS; i++) {
            ts_kept_reply *slot = &r->slots[i];
            if (!slot->pending && slot->id != 0 && (oldest->id == 0 || slot->id < oldest->id))
                oldest = slot;
        }
    if (oldest == NULL)
        return NULL;
    if (oldest->id > r->forgotten)
        r->forgotten = oldest->id;
    drop(oldest);
    *oldest = (ts_kept_reply){.id = id};
    return oldest;
}

void ts_reply_cache_keep(ts_reply_cache *r, ts_kept_reply *kept, const void *bytes, size_t size)
{
    ts_reply_account *account = r->account;
    kept->pending = false;
    kept->bytes = malloc(size > 0 ? size : 1);
    if (kept->bytes == NULL)
        return;
    memcpy(kept->bytes, bytes, size);
    kept->size = size;
    kept->owner = r;
    kept->older = account->newest;
    kept->newer = NULL;
    *(kept->older != NULL ? &kept->older->newer : &account->oldest) = kept;
    account->newest = kept;
    r->bytes += size;
    account->bytes += size;
    while (account->bytes > TS_REPLY_BYTES_UID)
        drop(account->oldest);
    while (r->bytes > TS_REPLY_BYTES_KEPT) {
        ts_kept_reply *oldest = NULL;
        for (uint32_t i = 0; i < TS_REPLIES_SLOTS; i++)
            if (r->slots[i].bytes != NULL && (oldest == NULL || r->slots[i].id < oldest->id))
                oldest = &r->slots[i];
        drop(oldest);
    }
}
