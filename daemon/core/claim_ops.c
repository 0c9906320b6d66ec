#include "claim_ops.h"

#include "engine_internal.h"
#include "wait_ops.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static uint32_t *bucket_of(ts_engine *e, const ts_claim *c)
{
    return &e->claims.buckets[(c->hash ^ c->pool) % TS_CLAIM_BUCKETS];
}

static ts_sequence *sequence_of(const ts_engine *e, const ts_claim *c)
{
    return &e->pools[c->pool].seqs.all[c->seq];
}

/* The ids of the claim's block that begins with token `at`. */
static const uint32_t *ids_at(const ts_engine *e, const ts_claim *c, uint32_t at)
{
    if (c->ids != NULL)
        return c->ids + (at - c->from);
    const uint32_t block = at / e->pools[c->pool].seqs.block_tokens;
    return ts_index_ids(e->pools[c->pool].books.index, sequence_of(e, c)->blocks[block]);
}

/* ---- the table ---- */

static void unlink_claim(ts_engine *e, const ts_claim *c)
{
    uint32_t *at = bucket_of(e, c), number = (uint32_t)(c - e->claims.all) + 1;
    while (*at != number)
        at = &e->claims.all[*at - 1].next;
    *at = c->next;
}

/* Puts it where the block that comes next is found. False: that can't be told. */
static bool link_claim(ts_engine *e, ts_claim *c)
{
    const ts_prefix_index *x = e->pools[c->pool].books.index;
    const uint32_t each = x->block_tokens;
    const ts_sequence *seq = sequence_of(e, c);
    if (c->at > 0 && !ts_index_has(x, seq->blocks[c->at / each - 1]))
        return false;
    c->parent =
        c->at == 0 ? ts_index_root(c->space) : ts_index_block(seq->blocks[c->at / each - 1]);
    c->hash = ts_index_hash(x, c->parent, ids_at(e, c, c->at));
    uint32_t *bucket = bucket_of(e, c);
    c->next = *bucket;
    *bucket = (uint32_t)(c - e->claims.all) + 1;
    return true;
}

static void wake_waiters(ts_engine *e, ts_claim *c, uint32_t there)
{
    for (uint32_t i = c->waiters.first, next; i != TS_NONE; i = next) {
        ts_wait *w = &e->sessions[i].wait;
        next = w->next;
        if (w->until > there)
            continue;
        ts_waits_remove(e, &c->waiters, i);
        w->claim = TS_NONE;
        ts_waits_wake(e, i);
    }
}

/* What the tenant is charged for the claim. */
static uint32_t cost(uint32_t from, uint32_t end)
{
    return end - from + TS_CLAIM_COST;
}

/* Ends a claim that isn't in the table any more. */
static void give_up(ts_engine *e, ts_claim *c)
{
    ts_session *s = &e->sessions[c->session];
    wake_waiters(e, c, UINT32_MAX);
    sequence_of(e, c)->claim = TS_NONE;
    s->claims--;
    e->tenant_claim_ids[s->tenant] -= cost(c->from, c->end);
    if (c->newer != TS_NONE)
        e->claims.all[c->newer].older = c->older;
    else
        s->newest_claim = c->older;
    if (c->older != TS_NONE)
        e->claims.all[c->older].newer = c->newer;
    free(c->ids);
    c->ids = NULL;
    c->live = false;
    c->next = e->claims.free_head;
    e->claims.free_head = (uint32_t)(c - e->claims.all);
    e->claims.live--;
}

static void end_claim(ts_engine *e, ts_claim *c)
{
    unlink_claim(e, c);
    give_up(e, c);
}

/* A claim of tokens from..end of the session's sequence, which has none; NULL: there is no room. */
static ts_claim *new_claim(ts_engine *e, ts_session *s, uint32_t pool, uint32_t seq, uint32_t from,
                           uint32_t end)
{
    ts_claims *all = &e->claims;
    if (s->claims == TS_CLAIM_SESSION_CLAIMS ||
        cost(from, end) > TS_CLAIM_TENANT_IDS - e->tenant_claim_ids[s->tenant])
        return NULL;
    uint32_t index = all->free_head;
    if (index != TS_NONE)
        all->free_head = all->all[index].next;
    else if (ts_engine_grow((void **)&all->all, &all->capacity, all->count + 1, sizeof *all->all))
        index = all->count++;
    else
        return NULL;
    all->all[index] = (ts_claim){.from = from,
                                 .end = end,
                                 .at = from,
                                 .pool = pool,
                                 .space = e->pools[pool].seqs.all[seq].space,
                                 .seq = seq,
                                 .session = (uint32_t)(s - e->sessions),
                                 .older = s->claims > 0 ? s->newest_claim : TS_NONE,
                                 .newer = TS_NONE,
                                 .waiters = {TS_NONE, TS_NONE},
                                 .live = true};
    if (s->claims++ > 0)
        all->all[s->newest_claim].newer = index;
    s->newest_claim = index;
    e->tenant_claim_ids[s->tenant] += cost(from, end);
    all->live++;
    e->pools[pool].seqs.all[seq].claim = index;
    return &all->all[index];
}

/* ---- looking, and waiting ---- */

/* How many of `count` ids agree with the claim's from token `at` on. */
static uint32_t agreeing(const ts_engine *e, const ts_claim *c, uint32_t at, const uint32_t *ids,
                         uint32_t count)
{
    const uint32_t each = e->pools[c->pool].seqs.block_tokens;
    uint32_t same = 0;
    while (at + same < c->end && same < count) {
        const uint32_t *theirs = ids_at(e, c, at + same);
        uint32_t n = count - same < each ? count - same : each, i = 0;
        while (i < n && theirs[i] == ids[same + i])
            i++;
        same += i;
        if (i < each)
            break;
    }
    return same;
}

void ts_claims_look(const ts_engine *e, const ts_session *s, bool own, uint32_t pool,
                    ts_index_parent parent, uint32_t hash, uint32_t at, const uint32_t *ids,
                    uint32_t count, ts_claim_found *found)
{
    const uint32_t session = (uint32_t)(s - e->sessions), each = e->pools[pool].seqs.block_tokens;
    uint32_t i = e->claims.buckets[(hash ^ pool) % TS_CLAIM_BUCKETS];
    for (uint32_t looked = 0; i != 0 && looked < TS_CLAIM_CHAIN_MAX; looked++) {
        const ts_claim *c = &e->claims.all[i - 1];
        i = c->next;
        if (c->hash != hash || c->parent != parent || c->pool != pool || c->at != at ||
            (c->session == session) != own)
            continue;
        /* A part of a block is found when the block is whole. */
        uint32_t same = at + agreeing(e, c, at, ids, count);
        uint32_t until = (uint32_t)ts_blocks_for(same, each) * each;
        if (same > found->tokens)
            *found = (ts_claim_found){(uint32_t)(c - e->claims.all), same, until};
    }
}

void ts_claims_wait(ts_engine *e, ts_session *s, const ts_claim_found *found)
{
    const uint32_t session = (uint32_t)(s - e->sessions);
    ts_claim *c = &e->claims.all[found->claim];
    s->wait = (ts_wait){
        .kind = TS_WAIT_CLAIM, .pool = c->pool, .claim = found->claim, .until = found->until};
    ts_waits_add(e, &c->waiters, session);
    e->pools[c->pool].waiting++;
    for (uint32_t i = s->claims > 0 ? s->newest_claim : TS_NONE; i != TS_NONE;) {
        c = &e->claims.all[i];
        i = c->older;
        if (sequence_of(e, c)->step == TS_NONE)
            end_claim(e, c);
    }
}

/* ---- making, advancing, ending ---- */

void ts_claims_add_prompt(ts_engine *e, ts_session *s, uint32_t pool, uint32_t seq,
                          const uint32_t *ids, uint32_t count, uint32_t prompt)
{
    const uint32_t each = e->pools[pool].seqs.block_tokens;
    const uint32_t from = e->pools[pool].seqs.all[seq].length / each * each;
    const uint32_t end = count / each * each;
    if (end <= from)
        return;
    const ts_sequence *q = &e->pools[pool].seqs.all[seq];
    const ts_index_parent parent =
        from == 0 ? ts_index_root(q->space) : ts_index_block(q->blocks[from / each - 1]);
    if (ts_index_find(e->pools[pool].books.index, parent, ids + from) != TS_NO_BLOCK)
        return; /* of its last block it takes all but a token */
    uint32_t *copy = malloc((end - from) * sizeof *copy);
    ts_claim *c = copy == NULL ? NULL : new_claim(e, s, pool, seq, from, end);
    if (c == NULL) {
        free(copy);
        return;
    }
    memcpy(copy, ids + from, (end - from) * sizeof *copy);
    c->ids = copy;
    c->prompt = prompt;
    if (!link_claim(e, c))
        give_up(e, c);
}

void ts_claims_step_begun(ts_engine *e, ts_session *s, uint32_t pool, uint32_t seq,
                          const uint32_t *ids, uint32_t known, uint32_t count)
{
    const ts_sequence *q = &e->pools[pool].seqs.all[seq];
    const uint32_t each = e->pools[pool].seqs.block_tokens, start = q->length;
    if (q->claim != TS_NONE) {
        ts_claim *c = &e->claims.all[q->claim];
        c->idle_since_ms = 0;
        uint32_t n = start >= c->end ? 0 : c->end - start;
        n = n < count ? n : count;
        if (known < n || (n > 0 && memcmp(ids, c->ids + (start - c->from), n * sizeof *ids) != 0))
            end_claim(e, c);
        return;
    }
    /* A step of single tokens isn't what anybody waits for. */
    const uint32_t from = start / each * each, end = (start + known) / each * each;
    if (e->pools[pool].books.index->off || q->space == TS_NONE || known < each || end <= from ||
        q->known != start)
        return;
    ts_claim *c = new_claim(e, s, pool, seq, from, end);
    if (c != NULL && !link_claim(e, c))
        give_up(e, c);
}

void ts_claims_step_ended(ts_engine *e, uint32_t pool, uint32_t seq)
{
    const ts_sequence *q = &e->pools[pool].seqs.all[seq];
    if (q->claim == TS_NONE)
        return;
    const uint32_t each = e->pools[pool].seqs.block_tokens;
    ts_claim *c = &e->claims.all[q->claim];
    const uint32_t there = q->known / each * each;
    if (c->ids == NULL || q->known < q->length || there >= c->end) {
        end_claim(e, c); /* whoever waits finds what there is */
        return;
    }
    if (there <= c->at)
        return;
    unlink_claim(e, c);
    c->at = there;
    if (!link_claim(e, c))
        give_up(e, c);
    else
        wake_waiters(e, c, there);
}

void ts_claims_end_of(ts_engine *e, uint32_t pool, uint32_t seq)
{
    const uint32_t claim = e->pools[pool].seqs.all[seq].claim;
    if (claim != TS_NONE)
        end_claim(e, &e->claims.all[claim]);
}

void ts_claims_end_all(ts_engine *e, const ts_session *s)
{
    while (s->claims > 0)
        end_claim(e, &e->claims.all[s->newest_claim]);
}

void ts_claims_end_idle(ts_engine *e)
{
    if (e->now_ms - e->claims.looked_ms < TS_CLAIM_IDLE_MS / 8)
        return;
    e->claims.looked_ms = e->now_ms;
    for (uint32_t i = 0; i < e->claims.count && e->claims.live > 0; i++) {
        ts_claim *c = &e->claims.all[i];
        if (!c->live || sequence_of(e, c)->step != TS_NONE)
            continue;
        if (c->idle_since_ms == 0)
            c->idle_since_ms = e->now_ms;
        else if (e->now_ms - c->idle_since_ms >= TS_CLAIM_IDLE_MS)
            end_claim(e, c);
    }
}

void ts_engine_forget_claims(ts_engine *e)
{
    for (uint32_t i = 0; i < e->claims.count; i++)
        free(e->claims.all[i].ids);
    free(e->claims.all);
}
