/* Sequences that outlive their session: kept under names, or on tickets. */
#include "block_table_cache.h"
#include "error.h"
#include "options.h"
#include "rpc.h"
#include "seq_calls.h"
#include "unconst.h"

#include <string.h>

static ts_status keep(ts_pool *p, ts_seq seq, const char *name, const ts_keep_options *options)
{
    Tspb__SeqKeep body = TSPB__SEQ_KEEP__INIT;
    TS_REQUEST(seq_keep, SEQ_KEEP);
    ts_keep_options o;
    ts_status status = ts_options_read(p->client, TS_STRUCT_KEEP_OPTIONS, options, &o);
    if (status != TS_OK)
        return status;
    if (name != NULL && name[0] == '\0')
        return ts_fail(p->client, TS_EINVAL, "a name has at least 1 byte");
    body.pool = p->index;
    body.seq = seq;
    body.name = ts_unconst(name != NULL ? name : "");
    body.ttl_ms = o.ttl_ms;
    body.replace = o.replace;
    return ts_call_plain(p->client, &request);
}

ts_status ts_seq_keep(ts_pool *p, ts_seq seq, const char *name)
{
    TS_ENTER(p->client);
    return keep(p, seq, name, NULL);
}

ts_status ts_seq_keep_with(ts_pool *p, ts_seq seq, const char *name, const ts_keep_options *options)
{
    TS_ENTER(p->client);
    return keep(p, seq, name, options);
}

ts_status ts_seq_attach(ts_pool *p, const char *name, ts_seq *out, uint32_t *length)
{
    TS_ENTER(p->client);
    Tspb__SeqAttach body = TSPB__SEQ_ATTACH__INIT;
    TS_REQUEST(seq_attach, SEQ_ATTACH);
    body.pool = p->index;
    body.name = ts_unconst(name);
    return ts_call_for_seqs(p, &request, 1, out, length);
}

/* ---- listing ---- */

/* The caller's array, of elements of that many bytes, of which some are told. */
typedef struct kept_array {
    ts_kept *first;
    size_t bytes, told;
} kept_array;

/* Copies what one answer lists; false: it isn't what was asked for. */
static bool read_list(const Tspb__KeptList *l, uint32_t most, kept_array out)
{
    if (l->n_names > most || l->n_seqs != l->n_names || l->n_lengths != l->n_names ||
        l->n_blocks != l->n_names || l->n_left_ms != l->n_names)
        return false;
    for (size_t i = 0; i < l->n_names; i++) {
        ts_kept kept = {.seq = l->seqs[i],
                        .left_ms = l->left_ms[i],
                        .length = l->lengths[i],
                        .blocks = l->blocks[i]};
        const size_t bytes = strlen(l->names[i]);
        if (bytes >= sizeof kept.name)
            return false;
        memcpy(kept.name, l->names[i], bytes + 1);
        ts_result_put(TS_STRUCT_KEPT, (unsigned char *)out.first + (out.told + i) * out.bytes,
                      out.bytes, &kept);
    }
    return true;
}

/* One answer of at most `most` sequences; *next is the name to go on after, empty at the end. */
static ts_status list_some(ts_pool *p, const char *prefix, kept_array out, uint32_t most,
                           uint32_t *count, char next[sizeof out.first->name])
{
    Tspb__ListKept body = TSPB__LIST_KEPT__INIT;
    Tspb__Reply *reply;
    TS_REQUEST(list_kept, LIST_KEPT);
    body.pool = p->index;
    body.prefix = ts_unconst(prefix);
    body.after = next;
    body.limit = most;
    ts_status status = ts_call(p->client, &request, &reply);
    if (status != TS_OK)
        return status;
    const Tspb__KeptList *l = reply->kept_list;
    if (reply->body_case != TSPB__REPLY__BODY_KEPT_LIST || !read_list(l, most, out) ||
        strlen(l->next) >= sizeof out.first->name) {
        status =
            ts_fail(p->client, TS_EPROTO, "the daemon's answer is no list of %u sequences", most);
    } else {
        *count = (uint32_t)l->n_names;
        memcpy(next, l->next, strlen(l->next) + 1);
    }
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

ts_status ts_seq_list(ts_pool *p, const char *prefix, const char *after, ts_kept *out,
                      size_t kept_bytes, uint32_t room, uint32_t *count)
{
    TS_ENTER(p->client);
    ts_status status = ts_result_check(p->client, TS_STRUCT_KEPT, kept_bytes);
    if (status != TS_OK)
        return status;
    char next[sizeof out->name] = "";
    const size_t bytes = after == NULL ? 0 : strlen(after);
    if (room == 0)
        return ts_fail(p->client, TS_EINVAL, "room for 0 sequences; at least 1 is needed");
    if (bytes >= sizeof next)
        return ts_fail_beyond(p->client, TS_EINVAL, bytes, sizeof next - 1,
                              "a name of %zu bytes; the limit is %zu", bytes, sizeof next - 1);
    if (bytes > 0)
        memcpy(next, after, bytes + 1);
    uint32_t told = 0;
    do {
        uint32_t some = 0;
        const kept_array array = {out, kept_bytes, told};
        status = list_some(p, prefix == NULL ? "" : prefix, array, room - told, &some, next);
        if (status != TS_OK)
            return status;
        told += some;
    } while (told < room && next[0] != '\0');
    *count = told;
    return TS_OK;
}

/* ---- tickets ---- */

ts_status ts_seq_ticket(ts_pool *p, ts_seq seq, uint32_t ttl_ms, uint8_t ticket[TS_TICKET_BYTES])
{
    TS_ENTER(p->client);
    Tspb__SeqTicket body = TSPB__SEQ_TICKET__INIT;
    Tspb__Reply *reply;
    TS_REQUEST(seq_ticket, SEQ_TICKET);
    body.pool = p->index;
    body.seq = seq;
    body.ttl_ms = ttl_ms;
    ts_status status = ts_call(p->client, &request, &reply);
    if (status != TS_OK)
        return status;
    ts_tables_forget(p, &seq, 1);
    if (reply->body_case == TSPB__REPLY__BODY_TICKET &&
        reply->ticket->ticket.len == TS_TICKET_BYTES)
        memcpy(ticket, reply->ticket->ticket.data, TS_TICKET_BYTES);
    else
        status = ts_fail(p->client, TS_EPROTO, "the daemon's answer is no ticket");
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

ts_status ts_seq_redeem(ts_pool *p, const uint8_t ticket[TS_TICKET_BYTES], ts_seq *out,
                        uint32_t *length)
{
    TS_ENTER(p->client);
    Tspb__SeqRedeem body = TSPB__SEQ_REDEEM__INIT;
    TS_REQUEST(seq_redeem, SEQ_REDEEM);
    body.pool = p->index;
    body.ticket.data = ts_unconst(ticket);
    body.ticket.len = TS_TICKET_BYTES;
    return ts_call_for_seqs(p, &request, 1, out, length);
}
