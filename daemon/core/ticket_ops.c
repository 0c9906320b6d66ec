/*
 * Tickets: a sequence goes from one session to another of its tenant by 16 random bytes, once. In
 * between it is nobody's but the tenant's, for as long as the ticket is good.
 *
 * The bytes are looked up by a hash of all of them, and compared only where all 64 bits of the hash
 * agree. So how long that takes says which places of the table are taken, a few bits of a ticket's
 * hash, and nothing from which the other bytes could be found one after another. The tenant is part
 * of the key: the right bytes of another's ticket are as good as any others.
 */
#include "claim_ops.h"
#include "engine_internal.h"

#include <stdio.h>

static void to_text(const uint8_t *ticket, char *text)
{
    for (uint32_t i = 0; i < TS_TICKET_BYTES; i++)
        snprintf(text + 2 * (size_t)i, 3, "%02x", ticket[i]);
}

/* Sequences of the tenant that are on tickets, in all pools. */
static uint32_t count_tickets(const ts_engine *e, uint32_t tenant)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < e->num_pools; i++)
        if (ts_engine_has_pool(e, i))
            count += e->pools[i].books.tenants[tenant].tickets;
    return count;
}

void ts_engine_seq_ticket(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const uint64_t id = c->seq_ticket.seq, ttl = c->seq_ticket.ttl_ms;
    char text[TS_TICKET_CHARS + 1];
    ts_sequence *seq = ts_engine_sequence(e, c->pool, s, id, true, answer);
    if (seq == NULL)
        return;
    if (seq->name != NULL)
        return ts_refuse(answer, TS_EINVAL,
                         "sequence %llx is kept as '%s', which others attach to: fork it for a "
                         "ticket, or forget the name",
                         (unsigned long long)id, seq->name);
    if (ttl > TS_TICKET_MS_MAX)
        return ts_refuse_beyond(answer, TS_EINVAL, ttl, TS_TICKET_MS_MAX,
                                "a ticket good for %llu ms; the limit is %u",
                                (unsigned long long)ttl, TS_TICKET_MS_MAX);
    const uint32_t tickets = count_tickets(e, s->tenant);
    if (tickets >= TS_TICKETS_MAX) {
        ts_refuse_more(answer, TS_EQUOTA, tickets, 1, TS_TICKETS_MAX,
                       "uid %u has %u tickets; the limit is %u", e->tenants[s->tenant], tickets,
                       TS_TICKETS_MAX);
        if (ts_engine_ends_by(e, e->now_ms))
            answer->status = TS_NEED_SWEEP;
        return;
    }
    to_text(c->seq_ticket.ticket, text);
    ts_status status = ts_sequences_reserve_life(&pool->seqs);
    if (status == TS_OK) {
        ts_sequence_set_life(&pool->seqs, seq, ttl == 0 ? TS_TICKET_MS : ttl, e->now_ms);
        status =
            ts_sequence_put_on_ticket(&pool->seqs, &pool->books, seq, text, &s->owned[c->pool]);
        if (status != TS_OK)
            ts_sequence_end_life(&pool->seqs, &pool->books, seq);
    }
    if (status == TS_EEXIST)
        return ts_refuse(answer, status, "there is such a ticket already: ask for another");
    if (status != TS_OK)
        return ts_refuse(answer, status, "no memory for a ticket");
    ts_claims_end_of(e, c->pool, ts_sequence_index(&pool->seqs, seq));
    s->blocks -= seq->num_blocks;
    s->sequences--;
}

void ts_engine_seq_redeem(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    char text[TS_TICKET_CHARS + 1];
    to_text(c->seq_redeem.ticket, text);
    const uint32_t index = ts_names_find(&pool->seqs.tickets, s->tenant, text);
    ts_sequence *seq = index == TS_NONE ? NULL : &pool->seqs.all[index];
    if (seq == NULL || ts_sequence_is_over(&pool->seqs, seq, e->now_ms))
        return ts_refuse(answer, TS_ENOENT,
                         "there is no such ticket in pool '%s': it was redeemed, or its time is "
                         "over, or it is another tenant's",
                         pool->config.name);
    if (!ts_engine_check_owned(e, s, c->pool, seq->num_blocks, answer))
        return;
    if (!ts_engine_grow((void **)&e->out_ids, &e->out_ids_capacity, 1, sizeof *e->out_ids))
        return ts_refuse(answer, TS_ENOMEM, "no memory for an answer");
    ts_sequence_take_off_ticket(&pool->seqs, &pool->books, seq, (uint32_t)(s - e->sessions),
                                &s->owned[c->pool]);
    s->blocks += seq->num_blocks;
    s->sequences++;
    e->out_ids[0] = ts_sequence_id(&pool->seqs, index);
    answer->seqs.seqs = e->out_ids;
    answer->seqs.count = 1;
    answer->seqs.length = seq->length;
}
