#include "invariants.h"

#include "large_array.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct checker {
    const ts_engine *e;
    void (*problem)(void *arg, const char *sentence);
    void *arg;
    uint64_t checked;
} checker;

static void __attribute__((format(printf, 2, 3))) wrong(checker *c, const char *format, ...)
{
    char sentence[256];
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    va_end(args);
    c->problem(c->arg, sentence);
}

static void check_sequence(checker *c, const ts_engine_pool *pool, uint32_t i, uint32_t *expected)
{
    const ts_sequence *seq = &pool->seqs.all[i];
    const char *name = pool->config.name;
    bool dying = seq->step == TS_SEQUENCE_DYING;
    if (!dying && seq->num_blocks != ts_blocks_for(seq->length, pool->seqs.block_tokens))
        wrong(c, "%s: sequence %u of %u tokens has %u blocks", name, i, seq->length,
              seq->num_blocks);
    for (uint32_t b = 0; b < seq->num_blocks; b++) {
        uint32_t block = seq->blocks[b];
        if (block >= pool->books.num_blocks) {
            wrong(c, "%s: sequence %u refers to block %u of %u", name, i, block,
                  pool->books.num_blocks);
            continue;
        }
        expected[block]++;
        if (pool->books.slabs[ts_pool_slab_of(&pool->books, block)].tenant != seq->tenant)
            wrong(c, "%s: sequence %u refers to block %u of another tenant", name, i, block);
    }
    const ts_prefix_index *x = pool->books.index;
    for (uint32_t b = 0; x != NULL && x->count > 0 && b < seq->num_blocks; b++) {
        bool known = b + 1 < seq->num_blocks || seq->step == TS_NONE; /* else it may be a copy */
        if (known && ts_index_has(x, seq->blocks[b]) &&
            x->nodes[seq->blocks[b]].parent !=
                (b == 0 ? ts_index_root(seq->space) : ts_index_block(seq->blocks[b - 1])))
            wrong(c, "%s: block %u of sequence %u is in the index elsewhere", name, b, i);
    }
    if (seq->known > seq->length && !dying)
        wrong(c, "%s: sequence %u of %u tokens has %u known ones", name, i, seq->length,
              seq->known);
    const bool ticket = ts_sequence_has_ticket(&pool->seqs, seq);
    if (!dying && (seq->name != NULL) + (seq->owner != TS_NONE) + ticket != 1)
        wrong(c, "%s: sequence %u must be either owned or kept or on a ticket", name, i);
    if (ticket &&
        ts_names_find(&pool->seqs.tickets, seq->tenant, pool->seqs.lives[seq->life].ticket) != i)
        wrong(c, "%s: the ticket of sequence %u leads elsewhere", name, i);
    if (seq->life != TS_NONE &&
        (dying || seq->owner != TS_NONE || seq->life >= pool->seqs.num_lives ||
         pool->seqs.lives[seq->life].seq != i))
        wrong(c, "%s: sequence %u has the life of another, or should have none", name, i);
    if (seq->life != TS_NONE && seq->step != TS_NONE &&
        pool->seqs.lives[seq->life].end_ms != UINT64_MAX)
        wrong(c, "%s: the time of sequence %u ends during its step", name, i);
    if (seq->name != NULL && ts_names_find(&pool->seqs.names, seq->tenant, seq->name) != i)
        wrong(c, "%s: the name of sequence %u leads elsewhere", name, i);
    if (seq->owner != TS_NONE &&
        (seq->owner >= c->e->num_sessions || !c->e->sessions[seq->owner].live))
        wrong(c, "%s: sequence %u belongs to session %u, which is gone", name, i, seq->owner);
    if (!dying && seq->step != TS_NONE &&
        (seq->step >= c->e->num_steps || !c->e->steps[seq->step].live))
        wrong(c, "%s: sequence %u is in step %u, which is gone", name, i, seq->step);
    c->checked += 1 + seq->num_blocks;
}

/* The sequence's own tail block: an open step may have put a copy in its place. */
static uint32_t own_tail(const ts_engine *e, const ts_sequence *seq, uint32_t index)
{
    uint32_t tail = seq->blocks[seq->num_blocks - 1];
    if (seq->step >= e->num_steps)
        return tail;
    const ts_step *step = &e->steps[seq->step];
    for (uint32_t i = 0; i < step->num_seqs; i++)
        if (step->seqs[i].seq == index && step->seqs[i].original != TS_NONE)
            return step->seqs[i].original;
    return tail;
}

/* What tenants are charged with: sequences, table entries, pinned blocks. */
static void check_shares(checker *c, const ts_engine_pool *pool, uint32_t index)
{
    const ts_pool_books *books = &pool->books;
    ts_pool_tenant *counted = calloc(books->num_tenants + 1, sizeof *counted);
    uint32_t *pins = ts_large_array_new(books->num_blocks, sizeof *pins), tickets = 0;
    ts_large_array_pages(pins, books->num_blocks, sizeof *pins, true);
    for (uint32_t i = 0; counted != NULL && pins != NULL && i < pool->seqs.count; i++) {
        const ts_sequence *seq = &pool->seqs.all[i];
        if (seq->tenant == TS_NONE)
            continue;
        ts_pool_tenant *t = &counted[seq->tenant];
        t->tickets += ts_sequence_has_ticket(&pool->seqs, seq);
        bool pinned = seq->name != NULL || (seq->step == TS_SEQUENCE_DYING && seq->known_step != 0);
        t->sequences++;
        t->entries += seq->num_blocks;
        for (uint32_t b = 0; pinned && b < seq->num_blocks; b++) {
            uint32_t block = b + 1 < seq->num_blocks ? seq->blocks[b] : own_tail(c->e, seq, i);
            t->pinned += pins[block]++ == 0;
        }
    }
    for (uint32_t i = 0; counted != NULL && i < c->e->num_steps; i++) {
        const ts_step *step = &c->e->steps[i];
        for (uint32_t j = 0; step->live && step->pool == index && j < step->num_seqs; j++)
            counted[pool->seqs.all[step->seqs[j].seq].tenant].entries +=
                step->seqs[j].reserved + (step->seqs[j].original != TS_NONE);
    }
    for (uint32_t t = 0; counted != NULL && pins != NULL && t < books->num_tenants; t++) {
        const ts_pool_tenant *x = &counted[t], *y = &books->tenants[t];
        tickets += x->tickets;
        if (x->tickets != y->tickets)
            wrong(c, "%s: tenant %u has %u tickets; the count says %u", pool->config.name, t,
                  x->tickets, y->tickets);
        if (x->sequences != y->sequences || x->entries != y->entries || x->pinned != y->pinned)
            wrong(
                c,
                "%s: tenant %u has %u sequences, %llu table entries, %u pinned blocks; the counts "
                "say %u, %llu, %u",
                pool->config.name, t, x->sequences, (unsigned long long)x->entries, x->pinned,
                y->sequences, (unsigned long long)y->entries, y->pinned);
    }
    if (counted != NULL && pins != NULL && tickets != pool->seqs.tickets.count)
        wrong(c, "%s: %u tickets; the table has %u", pool->config.name, tickets,
              pool->seqs.tickets.count);
    for (uint32_t b = 0; pins != NULL && b < books->num_blocks; b++)
        if (pins[b] != books->pins[b])
            wrong(c, "%s: block %u is pinned %u times; the count says %u", pool->config.name, b,
                  pins[b], books->pins[b]);
    free(counted);
    ts_large_array_free(pins, books->num_blocks, sizeof *pins);
}

/* Names in order, and the heap of lives. */
static void check_names_and_lives(checker *c, const ts_engine_pool *pool)
{
    const ts_sequences *seqs = &pool->seqs;
    const char *name = pool->config.name;
    uint32_t names = 0, lives = 0;
    for (const ts_name_node *n = seqs->order.first[0]; n != NULL; n = n->next[0], names++) {
        const ts_name_node *next = n->next[0];
        if (ts_names_find(&seqs->names, n->tenant, n->name) == TS_NONE)
            wrong(c, "%s: nothing is kept as '%s' of tenant %u", name, n->name, n->tenant);
        if (next != NULL && (next->tenant < n->tenant ||
                             (next->tenant == n->tenant && strcmp(n->name, next->name) >= 0)))
            wrong(c, "%s: the names '%s' and '%s' are out of order", name, n->name, next->name);
    }
    if (names != seqs->kept)
        wrong(c, "%s: %u names in order; %u are kept", name, names, seqs->kept);
    for (uint32_t i = 0; i < seqs->count; i++)
        lives += seqs->all[i].tenant != TS_NONE && seqs->all[i].life != TS_NONE;
    for (uint32_t i = 1; i < seqs->num_lives; i++)
        if (seqs->lives[i].end_ms < seqs->lives[(i - 1) / 2].end_ms)
            wrong(c, "%s: life %u ends before the one above it", name, i);
    if (lives != seqs->num_lives)
        wrong(c, "%s: the time of %u sequences ends; the count says %u", name, lives,
              seqs->num_lives);
}

static void check_runs(checker *c, const ts_step *step, uint32_t index)
{
    if (step->aborted && step->in_flight == 0 && !c->e->sessions[step->session].closing)
        wrong(c, "step %u is aborted, and nothing of it is in flight, but it hasn't ended", index);
    const uint32_t last = c->e->sessions[step->session].stream_number;
    const uint32_t others = (step->copying ? 1u : 0u) + (step->quarantined ? 1u : 0u);
    if (step->in_flight < others + step->num_stream_runs)
        wrong(c, "step %u has %u runs on a stream, and %u of all in flight", index,
              step->num_stream_runs, step->in_flight);
    for (uint32_t i = 0; i < step->num_stream_runs; i++) {
        const uint32_t number = step->stream_runs[i].number;
        if ((int32_t)(last - number) < 0 ||
            (i > 0 && (int32_t)(number - step->stream_runs[i - 1].number) <= 0))
            wrong(c, "step %u has run number %u; the session's last is %u", index, number, last);
    }
}

static void check_pool(checker *c, uint32_t index)
{
    const ts_engine_pool *pool = &c->e->pools[index];
    uint32_t *expected = ts_large_array_new(pool->books.num_blocks, sizeof *expected);
    ts_large_array_pages(expected, pool->books.num_blocks, sizeof *expected, true);
    if (expected == NULL) {
        wrong(c, "%s: no memory to check %u blocks", pool->config.name, pool->books.num_blocks);
        return;
    }
    uint32_t live = 0, kept = 0;
    check_shares(c, pool, index);
    check_names_and_lives(c, pool);
    for (uint32_t i = 0; i < pool->seqs.count; i++) {
        if (pool->seqs.all[i].tenant == TS_NONE)
            continue;
        live++;
        kept += pool->seqs.all[i].name != NULL;
        check_sequence(c, pool, i, expected);
    }
    for (uint32_t i = 0; i < c->e->num_steps; i++) {
        const ts_step *step = &c->e->steps[i];
        if (!step->live || step->pool != index)
            continue;
        c->checked++;
        check_runs(c, step, i);
        for (uint32_t j = 0; j < step->num_seqs; j++) {
            const ts_step_seq *part = &step->seqs[j];
            const ts_sequence *seq = &pool->seqs.all[part->seq];
            if (seq->tenant == TS_NONE || seq->step != i || seq->length != part->start)
                wrong(c, "%s: step %u holds sequence %u, which isn't in it", pool->config.name, i,
                      part->seq);
            for (uint32_t b = 0; b < part->reserved; b++)
                expected[seq->blocks[seq->num_blocks + b]]++;
            if (part->original != TS_NONE)
                expected[part->original]++;
        }
    }
    if (live != pool->seqs.live || kept != pool->seqs.kept || kept != pool->seqs.names.count)
        wrong(c, "%s: %u live and %u kept sequences; the counts say %u, %u and %u names",
              pool->config.name, live, kept, pool->seqs.live, pool->seqs.kept,
              pool->seqs.names.count);
    char why[256];
    if (ts_pool_check(&pool->books, expected, why, sizeof why) != TS_OK)
        wrong(c, "%s: %s", pool->config.name, why);
    c->checked += pool->books.num_blocks;
    ts_large_array_free(expected, pool->books.num_blocks, sizeof *expected);
}

static void check_session(checker *c, uint32_t index)
{
    const ts_session *s = &c->e->sessions[index];
    uint64_t sequences = 0, blocks = 0;
    uint32_t steps = 0;
    for (uint32_t p = 0; p < c->e->num_pools; p++) {
        const ts_sequences *seqs = &c->e->pools[p].seqs;
        for (uint32_t i = s->owned[p]; i != TS_NONE; i = seqs->all[i].next) {
            if (seqs->all[i].owner != index || seqs->all[i].tenant != s->tenant) {
                wrong(c, "session %u lists sequence %u, which isn't its own", index, i);
                break;
            }
            sequences++;
            blocks += seqs->all[i].num_blocks;
        }
    }
    for (uint32_t i = s->step_list; i != TS_NONE; i = c->e->steps[i].next, steps++)
        for (uint32_t j = 0; j < c->e->steps[i].num_seqs; j++)
            blocks +=
                c->e->steps[i].seqs[j].reserved + (c->e->steps[i].seqs[j].original != TS_NONE);
    /* A closing session's sequences are freed without keeping its books. */
    if (sequences != s->sequences || steps != s->steps || (blocks != s->blocks && !s->closing))
        wrong(c,
              "session %u has %llu sequences, %u steps, %llu blocks; the counts say %u, %u, %llu",
              index, (unsigned long long)sequences, steps, (unsigned long long)blocks, s->sequences,
              s->steps, (unsigned long long)s->blocks);
    c->checked++;
}

/* Walks a list of waiting sessions; how many there are. */
static uint32_t check_list(checker *c, const ts_wait_list *list, ts_wait_kind kind, uint32_t of)
{
    uint32_t count = 0, last = TS_NONE;
    for (uint32_t i = list->first; i != TS_NONE; i = c->e->sessions[i].wait.next, count++) {
        const ts_session *s = &c->e->sessions[i];
        if (!s->live || s->closing || s->wait.kind != kind || s->wait.prev != last ||
            (kind == TS_WAIT_CLAIM ? s->wait.claim : s->wait.pool) != of) {
            wrong(c, "session %u is in a list of waiting ones, and doesn't wait there", i);
            return count;
        }
        last = i;
    }
    if (last != list->last)
        wrong(c, "a list of waiting sessions ends with %u; it says %u", last, list->last);
    return count;
}

/* Claims, and who waits for them or for room. */
static void check_waits(checker *c)
{
    const ts_engine *e = c->e;
    uint32_t live = 0, listed = 0, in_rooms = 0, waiting = 0, woken = 0, found = 0, by_sequence = 0,
             in_pools = 0;
    uint64_t ids = 0, charged = 0;
    for (uint32_t i = 0; i < e->claims.count; i++) {
        const ts_claim *claim = &e->claims.all[i];
        if (!claim->live)
            continue;
        const ts_sequence *seq = &e->pools[claim->pool].seqs.all[claim->seq];
        live++;
        listed += check_list(c, &claim->waiters, TS_WAIT_CLAIM, i);
        ids += claim->end - claim->from + TS_CLAIM_COST;
        if (seq->tenant == TS_NONE || seq->claim != i ||
            (seq->owner != claim->session && (seq->owner != TS_NONE || claim->ids != NULL)) ||
            claim->at >= claim->end || claim->at > seq->known ||
            (claim->ids == NULL && seq->step == TS_NONE))
            wrong(c, "claim %u isn't its sequence's", i);
        uint32_t at = e->claims.buckets[(claim->hash ^ claim->pool) % TS_CLAIM_BUCKETS];
        while (at != 0 && at != i + 1)
            at = e->claims.all[at - 1].next;
        if (at == 0)
            wrong(c, "claim %u isn't in its bucket", i);
    }
    for (uint32_t i = 0; i < TS_CLAIM_BUCKETS; i++)
        for (uint32_t at = e->claims.buckets[i]; at != 0; at = e->claims.all[at - 1].next)
            found++;
    for (uint32_t p = 0; p < e->num_pools; p++) {
        if (!ts_engine_has_pool(e, p))
            continue;
        in_pools += e->pools[p].waiting;
        in_rooms += check_list(c, &e->pools[p].room, TS_WAIT_ROOM, p);
        for (uint32_t i = 0; i < e->pools[p].seqs.count; i++)
            by_sequence += e->pools[p].seqs.all[i].tenant != TS_NONE &&
                           e->pools[p].seqs.all[i].claim != TS_NONE;
    }
    for (uint32_t i = 0; i < e->num_sessions; i++) {
        const ts_wait *w = &e->sessions[i].wait;
        waiting += e->sessions[i].live && w->kind != TS_WAIT_NONE;
        /* Who waited for a claim that has ended, or come to `until`, is woken. */
        listed += w->kind == TS_WAIT_CLAIM && w->claim == TS_NONE && w->woken;
        woken += w->woken;
    }
    for (uint32_t i = e->woken.first; i != TS_NONE; i = e->sessions[i].wait.next_woken, woken--)
        if (!e->sessions[i].wait.woken)
            wrong(c, "session %u is among the woken, and isn't", i);
    for (uint32_t t = 0; t < e->num_tenants; t++)
        charged += e->tenant_claim_ids[t];
    if (live != e->claims.live || live != found || live != by_sequence || ids != charged ||
        in_rooms != e->waiting_for_room || listed + in_rooms != waiting || in_pools != waiting ||
        woken != 0)
        wrong(c,
              "%u claims (%u in buckets, %u of sequences) of %llu ids, %u sessions wait for them "
              "and %u for room; the counts say %u, %llu, %u for room and %u in all",
              live, found, by_sequence, (unsigned long long)ids, listed, in_rooms, e->claims.live,
              (unsigned long long)charged, e->waiting_for_room, waiting);
    c->checked += live;
}

uint64_t ts_invariants_check(const ts_engine *e, void (*problem)(void *arg, const char *sentence),
                             void *arg)
{
    checker c = {.e = e, .problem = problem, .arg = arg};
    uint32_t live = 0, pools = 0;
    for (uint32_t i = 0; i < e->num_pools; i++)
        if (ts_engine_has_pool(e, i)) {
            pools++;
            check_pool(&c, i);
        }
    for (uint32_t i = 0; i < e->num_sessions; i++)
        if (e->sessions[i].live) {
            live++;
            check_session(&c, i);
        }
    check_waits(&c);
    if (live != e->live_sessions)
        wrong(&c, "%u live sessions; the count says %u", live, e->live_sessions);
    if (pools != e->live_pools)
        wrong(&c, "%u pools; the count says %u", pools, e->live_pools);
    return c.checked;
}
