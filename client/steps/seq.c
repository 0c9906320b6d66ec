#include "block_table_cache.h"
#include "error.h"
#include "options.h"
#include "pool_map.h"
#include "ring_client.h"
#include "rpc.h"
#include "seq_calls.h"
#include "unanswered.h"
#include "unconst.h"

#include <stdlib.h>
#include <string.h>

ts_status ts_call_for_seqs(ts_pool *p, Tspb__Request *request, uint32_t count, ts_seq *out,
                           uint32_t *length)
{
    ts_client *c = p->client;
    Tspb__Reply *reply;
    ts_status status = ts_call(c, request, &reply);
    if (status == TS_ETIMEOUT && request->body_case != TSPB__REQUEST__BODY_SEQ_ATTACH)
        ts_unanswered_by_message(c, request, p->index);
    if (status != TS_OK)
        return status;
    if (reply->body_case == TSPB__REPLY__BODY_SEQS && reply->seqs->n_seqs == count) {
        memcpy(out, reply->seqs->seqs, count * sizeof *out);
        if (length != NULL)
            *length = reply->seqs->length;
    } else {
        status = ts_fail(c, TS_EPROTO, "the daemon's answer has not %u sequences", count);
    }
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

/* Whether a call about `count` sequences, and with the ids of `ids` tokens, goes by the rings. */
static ts_status use_rings(ts_client *c, uint32_t count, uint64_t ids, bool *use)
{
    *use = false;
    if (count == 0 || count > TS_RING_BATCH || ids > TS_RING_IDS)
        return TS_OK; /* a message, whose refusal says more */
    if (ids > 0)
        ts_rings_want_ids(c, (uint32_t)ids);
    ts_status status = ts_rings_use(c, use);
    *use = *use && ids <= c->ring_ids;
    return status;
}

/* Asks by the rings for what is done to sequences; the batch is filled. */
static ts_status ask_ring(ts_pool *p, ts_ring_entry *entry, uint32_t count)
{
    ts_ring_completion done;
    entry->seqs.pool = p->index;
    entry->seqs.count = count;
    return ts_ring_call(p->client, entry, &done);
}

/* The same; the answer is `count` sequences. */
static ts_status ask_ring_for_seqs(ts_pool *p, ts_ring_entry *entry, uint32_t count, ts_seq *out)
{
    ts_status status = ask_ring(p, entry, count);
    if (status == TS_ETIMEOUT)
        ts_unanswered_by_ring(p->client, p->index, count);
    if (status == TS_OK)
        memcpy(out, p->client->rings->batch_seqs, count * sizeof *out);
    return status;
}

/* False: it is too long, which a message's refusal says. */
static bool put_space(ts_ring_entry *entry, const ProtobufCBinaryData *space)
{
    if (space->len > sizeof entry->seqs.space)
        return false;
    entry->seqs.space_bytes = (uint32_t)space->len;
    if (space->len > 0)
        memcpy(entry->seqs.space, space->data, space->len);
    return true;
}

/* Reads the options, and the namespace that they name into *space. */
static ts_status read_options(ts_client *c, const ts_seq_options *options, ts_seq_options *o,
                              ProtobufCBinaryData *space)
{
    ts_status status = ts_options_read(c, TS_STRUCT_SEQ_OPTIONS, options, o);
    *space = (ProtobufCBinaryData){.len = o->space_bytes, .data = ts_unconst(o->space)};
    if (status == TS_OK && o->space == NULL && o->space_bytes > 0)
        status = ts_fail(c, TS_EINVAL, "a namespace of %zu bytes at NULL", o->space_bytes);
    return status;
}

static ts_status create(ts_pool *p, uint32_t count, const ts_seq_options *options, ts_seq *out)
{
    Tspb__SeqCreate body = TSPB__SEQ_CREATE__INIT;
    TS_REQUEST(seq_create, SEQ_CREATE);
    body.pool = p->index;
    body.count = count;
    bool use = false;
    ts_ring_entry entry = {.op = TS_RING_SEQ_CREATE};
    ts_seq_options o;
    ts_status status = read_options(p->client, options, &o, &body.space);
    if (status == TS_OK)
        status = use_rings(p->client, count, 0, &use);
    if (status != TS_OK)
        return status;
    if (use && put_space(&entry, &body.space))
        return ask_ring_for_seqs(p, &entry, count, out);
    return ts_call_for_seqs(p, &request, count, out, NULL);
}

ts_status ts_seq_create(ts_pool *p, uint32_t count, ts_seq *out)
{
    TS_ENTER(p->client);
    return create(p, count, NULL, out);
}

ts_status ts_seq_create_with(ts_pool *p, uint32_t count, const ts_seq_options *options, ts_seq *out)
{
    TS_ENTER(p->client);
    return create(p, count, options, out);
}

/* What a match asks for, and where its answer goes. */
typedef struct match {
    Tspb__SeqMatch body;
    ts_seq *out;               /* NULL: it is dry */
    uint32_t *matched, *twins; /* twins: may be NULL */
} match;

static ts_status match_by_ring(ts_pool *p, ts_ring_entry *entry, const match *m)
{
    ts_client *c = p->client;
    ts_rings_memory *rings = c->rings;
    const uint32_t count = (uint32_t)m->body.n_counts;
    entry->seqs.flags = m->body.dry ? TS_RING_DRY : 0u;
    entry->seqs.wait_ms = m->body.wait_ms;
    memcpy(rings->batch_words, m->body.counts, count * sizeof *m->body.counts);
    memcpy(ts_rings_ids(rings, c->ring_blocks, c->ring_slabs), m->body.tokens,
           m->body.n_tokens * sizeof *m->body.tokens);
    ts_status status = ask_ring(p, entry, count);
    if (status == TS_ETIMEOUT && !m->body.dry)
        ts_unanswered_by_ring(c, p->index, count);
    if (status != TS_OK)
        return status;
    memcpy(m->matched, rings->begun_starts, count * sizeof *m->matched);
    if (m->twins != NULL)
        memcpy(m->twins, rings->begun_counts, count * sizeof *m->twins);
    if (m->out != NULL)
        memcpy(m->out, rings->batch_seqs, count * sizeof *m->out);
    return TS_OK;
}

static ts_status match_by_message(ts_pool *p, match *m)
{
    Tspb__Reply *reply;
    Tspb__Request request = TSPB__REQUEST__INIT;
    const size_t count = m->body.n_counts;
    request.body_case = TSPB__REQUEST__BODY_SEQ_MATCH;
    request.seq_match = &m->body;
    ts_status status = ts_call(p->client, &request, &reply);
    if (status == TS_ETIMEOUT && !m->body.dry)
        ts_unanswered_by_message(p->client, &request, p->index);
    if (status != TS_OK)
        return status;
    const Tspb__Matched *found = reply->matched;
    if (reply->body_case == TSPB__REPLY__BODY_MATCHED && found->n_lengths == count &&
        found->n_seqs == (m->out == NULL ? 0 : count) &&
        (m->twins == NULL || found->n_twins == count)) {
        memcpy(m->matched, found->lengths, count * sizeof *m->matched);
        if (m->twins != NULL)
            memcpy(m->twins, found->twins, count * sizeof *m->twins);
        if (m->out != NULL)
            memcpy(m->out, found->seqs, count * sizeof *m->out);
    } else {
        status = ts_fail(p->client, TS_EPROTO, "the daemon's answer has not %zu prompts", count);
    }
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

ts_status ts_seq_match(ts_pool *p, const uint32_t *tokens, const uint32_t *counts, uint32_t count,
                       const ts_seq_options *options, ts_seq *out, uint32_t *matched)
{
    ts_client *c = p->client;
    TS_ENTER(c);
    match m = {.body = TSPB__SEQ_MATCH__INIT, .out = out, .matched = matched};
    ts_seq_options o;
    ts_status status = read_options(c, options, &o, &m.body.space);
    if (status != TS_OK)
        return status;
    m.body.pool = p->index;
    m.body.tokens = ts_unconst(tokens);
    m.body.counts = ts_unconst(counts);
    m.body.n_counts = count;
    for (uint32_t i = 0; i < count; i++)
        m.body.n_tokens += counts[i];
    m.body.dry = out == NULL;
    m.body.wait_ms = m.body.dry ? 0 : o.wait_ms;
    m.twins = m.body.wait_ms > 0 ? o.twins : NULL;
    bool use;
    ts_ring_entry entry = {.op = TS_RING_SEQ_MATCH};
    status = use_rings(c, count, m.body.n_tokens, &use);
    if (status != TS_OK)
        return status;
    c->wait_ms = m.body.wait_ms;
    use = use && put_space(&entry, &m.body.space);
    status = use ? match_by_ring(p, &entry, &m) : match_by_message(p, &m);
    c->wait_ms = 0;
    return status;
}

static ts_status free_seqs(ts_pool *p, const ts_seq *seqs, uint32_t count, bool forget)
{
    Tspb__SeqFree body = TSPB__SEQ_FREE__INIT;
    TS_REQUEST(seq_free, SEQ_FREE);
    body.pool = p->index;
    body.seqs = ts_unconst(seqs);
    body.n_seqs = count;
    body.forget = forget;
    bool use;
    ts_status status = use_rings(p->client, count, 0, &use);
    if (status == TS_OK && use) {
        memcpy(p->client->rings->batch_seqs, seqs, count * sizeof *seqs);
        status = ask_ring(
            p, &(ts_ring_entry){.op = TS_RING_SEQ_FREE, .seqs.flags = forget ? TS_RING_FORGET : 0u},
            count);
    } else if (status == TS_OK) {
        status = ts_call_plain(p->client, &request);
    }
    if (status == TS_OK)
        ts_tables_forget(p, seqs, count);
    return status;
}

static ts_status get_lengths(ts_pool *p, const ts_seq *seqs, uint32_t count, uint32_t *lengths)
{
    Tspb__SeqLengths body = TSPB__SEQ_LENGTHS__INIT;
    Tspb__Reply *reply;
    TS_REQUEST(seq_lengths, SEQ_LENGTHS);
    body.pool = p->index;
    body.seqs = ts_unconst(seqs);
    body.n_seqs = count;
    ts_status status = ts_call(p->client, &request, &reply);
    if (status != TS_OK)
        return status;
    if (reply->body_case == TSPB__REPLY__BODY_LENGTHS && reply->lengths->n_lengths == count)
        memcpy(lengths, reply->lengths->lengths, count * sizeof *lengths);
    else
        status = ts_fail(p->client, TS_EPROTO, "the daemon's answer has not %u lengths", count);
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

static ts_status fork_seq(ts_pool *p, ts_seq parent, bool has_length, uint32_t length,
                          uint32_t count, ts_seq *out)
{
    Tspb__SeqFork body = TSPB__SEQ_FORK__INIT;
    TS_REQUEST(seq_fork, SEQ_FORK);
    body.pool = p->index;
    body.parent = parent;
    body.count = count;
    body.length = length;
    body.has_length = has_length;
    bool use;
    ts_status status = use_rings(p->client, count, 0, &use);
    if (status != TS_OK || !use)
        return status != TS_OK ? status : ts_call_for_seqs(p, &request, count, out, NULL);
    ts_ring_entry entry = {.op = TS_RING_SEQ_FORK,
                           .seqs = {.parent = parent,
                                    .length = length,
                                    .flags = has_length ? TS_RING_HAS_LENGTH : 0u}};
    return ask_ring_for_seqs(p, &entry, count, out);
}

/* Forks in as many calls as it takes, each of TS_COMMAND_ENTRIES block table entries at most. All
 * or none. */
static ts_status fork_seqs(ts_pool *p, ts_seq parent, uint32_t length, uint32_t count, ts_seq *out)
{
    uint32_t blocks = ts_blocks_for(length, p->geometry.block_tokens);
    uint32_t each = blocks == 0 ? count : TS_COMMAND_ENTRIES / blocks;
    each = each == 0 ? 1 : each;
    for (uint32_t made = 0; made < count; made += each) {
        uint32_t some = count - made < each ? count - made : each;
        ts_status status = fork_seq(p, parent, true, length, some, out + made);
        if (status == TS_OK)
            continue;
        const ts_last_error why = p->client->error;
        if (made > 0)
            (void)free_seqs(p, out, made, false);
        p->client->error = why;
        return status;
    }
    return TS_OK;
}

ts_status ts_seq_fork(ts_pool *p, ts_seq parent, uint32_t count, ts_seq *out)
{
    TS_ENTER(p->client);
    uint32_t length;
    uint64_t most = ts_blocks_for(p->sequence_tokens_max, p->geometry.block_tokens);
    if (count <= 1 || most * count <= TS_COMMAND_ENTRIES) /* one call does, however long it is */
        return fork_seq(p, parent, false, 0, count, out);
    ts_status status = get_lengths(p, &parent, 1, &length);
    return status != TS_OK ? status : fork_seqs(p, parent, length, count, out);
}

ts_status ts_seq_fork_at(ts_pool *p, ts_seq parent, uint32_t length, uint32_t count, ts_seq *out)
{
    TS_ENTER(p->client);
    return count == 0 ? fork_seq(p, parent, true, length, 0, out)
                      : fork_seqs(p, parent, length, count, out);
}

static ts_status truncate(ts_pool *p, const ts_seq *seqs, const uint32_t *words, uint32_t count,
                          bool by_counts)
{
    Tspb__SeqTruncate body = TSPB__SEQ_TRUNCATE__INIT;
    TS_REQUEST(seq_truncate, SEQ_TRUNCATE);
    body.pool = p->index;
    body.seqs = ts_unconst(seqs);
    body.lengths = ts_unconst(words);
    body.n_seqs = body.n_lengths = count;
    body.by_counts = by_counts;
    bool use;
    ts_status status = use_rings(p->client, count, 0, &use);
    if (status != TS_OK || !use)
        return status != TS_OK ? status : ts_call_plain(p->client, &request);
    memcpy(p->client->rings->batch_seqs, seqs, count * sizeof *seqs);
    memcpy(p->client->rings->batch_words, words, count * sizeof *words);
    return ask_ring(p,
                    &(ts_ring_entry){.op = TS_RING_SEQ_TRUNCATE,
                                     .seqs.flags = by_counts ? TS_RING_BY_COUNTS : 0u},
                    count);
}

ts_status ts_seq_truncate(ts_pool *p, const ts_seq *seqs, const uint32_t *lengths, uint32_t count)
{
    TS_ENTER(p->client);
    return truncate(p, seqs, lengths, count, false);
}

ts_status ts_seq_shorten(ts_pool *p, const ts_seq *seqs, const uint32_t *counts, uint32_t num_seqs)
{
    TS_ENTER(p->client);
    return truncate(p, seqs, counts, num_seqs, true);
}

ts_status ts_seq_free(ts_pool *p, const ts_seq *seqs, uint32_t count)
{
    TS_ENTER(p->client);
    return free_seqs(p, seqs, count, false);
}

ts_status ts_seq_forget(ts_pool *p, const ts_seq *seqs, uint32_t count)
{
    TS_ENTER(p->client);
    return free_seqs(p, seqs, count, true);
}

/* Forgets the block tables of those sequences of a selection that are gone. */
static void forget_losers(ts_pool *p, const ts_seq *seqs, uint32_t count, const uint32_t *from,
                          uint32_t picked)
{
    bool *stays = calloc(count, sizeof *stays);
    for (uint32_t i = 0; stays != NULL && i < picked; i++)
        stays[from[i]] = true;
    for (uint32_t i = 0; i < count; i++)
        if (stays == NULL || !stays[i])
            ts_tables_forget(p, &seqs[i], 1);
    free(stays);
}

static ts_status select_seqs(ts_pool *p, const ts_seq *seqs, uint32_t count, const uint32_t *from,
                             uint32_t picked, ts_seq *out)
{
    Tspb__SeqSelect body = TSPB__SEQ_SELECT__INIT;
    TS_REQUEST(seq_select, SEQ_SELECT);
    body.pool = p->index;
    body.seqs = ts_unconst(seqs);
    body.n_seqs = count;
    body.from = ts_unconst(from);
    body.n_from = picked;
    bool use;
    ts_status status = use_rings(p->client, count > picked ? count : picked, 0, &use);
    if (status != TS_OK)
        return status;
    ts_rings_memory *m = p->client->rings;
    if (use && count > 0 && picked > 0) {
        memcpy(m->batch_seqs, seqs, count * sizeof *seqs);
        memcpy(m->batch_words, from, picked * sizeof *from);
        ts_ring_entry entry = {.op = TS_RING_SEQ_SELECT, .seqs.length = count};
        status = ask_ring(p, &entry, picked);
        if (status == TS_ETIMEOUT)
            ts_unanswered_select_by_ring(p->client, p->index, &body);
    } else {
        status = ts_call_for_seqs(p, &request, picked, out, NULL);
    }
    if (status != TS_OK)
        return status;
    if (use)
        memcpy(out, m->batch_seqs, picked * sizeof *out);
    return TS_OK;
}

ts_status ts_seq_select(ts_pool *p, const ts_seq *seqs, uint32_t count, const uint32_t *from,
                        uint32_t picked, ts_seq *out)
{
    TS_ENTER(p->client);
    ts_seq *before = malloc((count + 1ull) * sizeof *before); /* `out` may be `seqs` */
    if (before == NULL)
        return ts_fail(p->client, TS_ENOMEM, "no memory for a selection of %u sequences", count);
    memcpy(before, seqs, count * sizeof *before);
    const ts_status status = select_seqs(p, before, count, from, picked, out);
    if (status == TS_OK)
        forget_losers(p, before, count, from, picked);
    free(before);
    return status;
}

ts_status ts_seq_lengths(ts_pool *p, const ts_seq *seqs, uint32_t count, uint32_t *lengths)
{
    TS_ENTER(p->client);
    return get_lengths(p, seqs, count, lengths);
}

static ts_status beyond(const ts_pool *p, ts_seq seq, uint32_t first, uint32_t count,
                        uint32_t length)
{
    const uint64_t end = (uint64_t)first + count;
    return ts_fail_beyond(p->client, TS_EINVAL, end, length,
                          "tokens %u to %llu of sequence %llx, which has %u", first,
                          (unsigned long long)end, (unsigned long long)seq, length);
}

ts_status ts_seq_slots(ts_pool *p, ts_seq seq, uint32_t layer, uint32_t first, uint32_t count,
                       uint64_t *slots)
{
    TS_ENTER(p->client);
    Tspb__SeqBlocks body = TSPB__SEQ_BLOCKS__INIT;
    Tspb__Reply *reply;
    TS_REQUEST(seq_blocks, SEQ_BLOCKS);
    uint32_t block_tokens = p->geometry.block_tokens;
    ts_status status = ts_pool_check_layer(p, layer);
    if (status != TS_OK)
        return status;
    if (count == 0)
        return ts_fail(p->client, TS_EINVAL, "0 tokens; at least 1 is needed");
    uint32_t first_block = first / block_tokens;
    uint64_t end_block = ((uint64_t)first + count - 1) / block_tokens + 1;
    if (end_block > UINT32_MAX)
        return ts_fail(p->client, TS_EINVAL, "tokens %u to %llu", first,
                       (unsigned long long)first + count);
    body.pool = p->index;
    body.seq = seq;
    body.first = first_block;
    body.count = (uint32_t)end_block - first_block;
    status = ts_call(p->client, &request, &reply);
    if (status == TS_EINVAL && p->client->error.info.needed == end_block) {
        uint32_t length; /* the daemon speaks of blocks */
        status = get_lengths(p, &seq, 1, &length);
        return status != TS_OK ? status : beyond(p, seq, first, count, length);
    }
    if (status != TS_OK)
        return status;
    const Tspb__Blocks *b = reply->blocks;
    if (reply->body_case != TSPB__REPLY__BODY_BLOCKS || b->n_blocks != body.count)
        status = ts_fail(p->client, TS_EPROTO, "the daemon's answer has not %u blocks", body.count);
    else if ((uint64_t)first + count > b->length)
        status = beyond(p, seq, first, count, b->length);
    else
        status = ts_pool_note_slabs(p, b->slabs, b->n_slabs);
    for (uint32_t i = 0; status == TS_OK && i < count; i++) {
        uint32_t token = first + i;
        slots[i] = (uint64_t)b->blocks[token / block_tokens - first_block] * block_tokens +
                   token % block_tokens;
    }
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}
