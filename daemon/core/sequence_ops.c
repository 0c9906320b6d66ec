/* Sequences: made, forked, freed, cut, and told about. */
#include "claim_ops.h"
#include "engine_internal.h"

#include <assert.h>
#include <string.h>

/*
 * The sequence with this id if the session may use it: one that it owns, or one that its tenant
 * keeps; with to_change, only one that is in no open step. Else NULL, and the answer refuses.
 */
ts_sequence *ts_engine_sequence(ts_engine *e, uint32_t pool, const ts_session *s, uint64_t id,
                                bool to_change, ts_answer *answer)
{
    ts_sequence *seq = ts_sequence_find(&e->pools[pool].seqs, id);
    /* A foreign id is as good as none, and so is that of one on a ticket, or whose time is over. */
    if (seq == NULL || seq->tenant != s->tenant ||
        ts_sequence_has_ticket(&e->pools[pool].seqs, seq) ||
        ts_sequence_is_over(&e->pools[pool].seqs, seq, e->now_ms)) {
        ts_refuse(answer, TS_ENOENT, "there is no sequence %llx in pool '%s'",
                  (unsigned long long)id, e->pools[pool].config.name);
        return NULL;
    }
    if (seq->owner != TS_NONE && seq->owner != (uint32_t)(s - e->sessions)) {
        ts_refuse(answer, TS_EPERM, "sequence %llx belongs to session %llx and is not kept",
                  (unsigned long long)id, (unsigned long long)ts_engine_session_id(e, seq->owner));
        return NULL;
    }
    if (to_change && seq->step == TS_SEQUENCE_MARKED) {
        ts_refuse(answer, TS_EINVAL, "sequence %llx is in the batch twice", (unsigned long long)id);
        return NULL;
    }
    if (to_change && seq->step != TS_NONE) {
        ts_refuse(answer, TS_EBUSY, "sequence %llx is in open step %llx", (unsigned long long)id,
                  (unsigned long long)e->steps[seq->step].id);
        return NULL;
    }
    return seq;
}

static bool check_batch(const ts_engine *e, uint32_t count, ts_answer *answer)
{
    if (count >= 1 && count <= e->limits.batch)
        return true;
    ts_refuse_beyond(answer, TS_EINVAL, count, e->limits.batch,
                     "a batch of %u sequences; the limits are 1..%u", count, e->limits.batch);
    return false;
}

bool ts_engine_reserve_sequences(ts_engine *e, ts_session *s, uint32_t pool, uint32_t count,
                                 ts_answer *answer)
{
    ts_sequences *seqs = &e->pools[pool].seqs;
    if (!check_batch(e, count, answer))
        return false;
    if (s->sequences > e->limits.session_sequences ||
        count > e->limits.session_sequences - s->sequences) {
        ts_refuse_more(answer, TS_EQUOTA, s->sequences, count, e->limits.session_sequences,
                       "the session owns %u sequences; %u more would pass its limit of %u",
                       s->sequences, count, e->limits.session_sequences);
        return false;
    }
    const ts_pool_config *config = &e->pools[pool].config;
    uint32_t theirs = e->pools[pool].books.tenants[s->tenant].sequences;
    uint32_t most = config->tenant_sequences_max;
    if (most != 0 && (theirs > most || count > most - theirs)) {
        ts_refuse_more(answer, TS_EQUOTA, theirs, count, most,
                       "uid %u has %u sequences in pool '%s'; %u more would pass its limit of %u "
                       "(tenant_sequences)",
                       e->tenants[s->tenant], theirs, config->name, count, most);
        if (ts_engine_frees_more(e, pool))
            answer->status = TS_NEED_SWEEP;
        return false;
    }
    ts_status status = ts_sequences_reserve(seqs, count);
    if (status == TS_EQUOTA && ts_engine_frees_more(e, pool)) {
        answer->status = TS_NEED_SWEEP;
        return false;
    }
    if (status == TS_EQUOTA)
        ts_refuse_more(answer, status, seqs->live, count, seqs->max,
                       "pool '%s' has %u sequences; %u more would pass its limit of %u",
                       e->pools[pool].config.name, seqs->live, count, seqs->max);
    else if (status != TS_OK ||
             !ts_engine_grow((void **)&e->out_ids, &e->out_ids_capacity, count, sizeof *e->out_ids))
        ts_refuse(answer, TS_ENOMEM, "no memory for %u sequences more", count);
    return answer->status == TS_OK;
}

ts_sequence *ts_engine_new_sequence(ts_engine *e, ts_session *s, uint32_t pool, uint32_t space,
                                    uint32_t i)
{
    ts_sequences *seqs = &e->pools[pool].seqs;
    uint32_t index = ts_sequence_new(seqs, &e->pools[pool].books, s->tenant,
                                     (uint32_t)(s - e->sessions), space, &s->owned[pool]);
    s->sequences++;
    e->out_ids[i] = ts_sequence_id(seqs, index);
    return &seqs->all[index];
}

ts_space_name ts_engine_space_name(const ts_engine_pool *pool, const ts_space_name *name)
{
    const char *model = pool->config.model;
    return name->count > 0 ? *name : (ts_space_name){model, strlen(model)};
}

static bool check_space_name(const ts_space_name *name, ts_answer *answer)
{
    if (name->count > TS_NAMESPACE_BYTES_MAX)
        ts_refuse_beyond(answer, TS_EINVAL, name->count, TS_NAMESPACE_BYTES_MAX,
                         "a namespace of %zu bytes; the limit is %u", name->count,
                         TS_NAMESPACE_BYTES_MAX);
    return answer->status == TS_OK;
}

bool ts_engine_find_space(const ts_engine *e, uint32_t pool, const ts_session *s,
                          const ts_space_name *name, uint32_t *space, ts_answer *answer)
{
    const ts_prefix_index *x = e->pools[pool].books.index;
    if (!check_space_name(name, answer))
        return false;
    *space = ts_index_find_space(x, s->tenant, name->bytes, name->count);
    return true;
}

bool ts_engine_use_space(ts_engine *e, uint32_t pool, const ts_session *s,
                         const ts_space_name *name, uint32_t *space, ts_answer *answer)
{
    ts_engine_pool *p = &e->pools[pool];
    const ts_space_name used = ts_engine_space_name(p, name);
    *space = TS_NONE;
    if (!check_space_name(&used, answer))
        return false;
    if (used.count == 0)
        return true;
    ts_status status = ts_index_use_space(p->books.index, s->tenant, used.bytes, used.count, space);
    uint32_t unused = TS_NO_BLOCK;
    if (status == TS_EQUOTA)
        unused = ts_index_unused_space(p->books.index, s->tenant);
    if (unused != TS_NO_BLOCK) {
        ts_index_retire(p->books.index, unused);
        status = ts_index_use_space(p->books.index, s->tenant, used.bytes, used.count, space);
    }
    if (status == TS_EQUOTA)
        ts_refuse_more(answer, status, TS_NAMESPACES_MAX, 1, TS_NAMESPACES_MAX,
                       "uid %u has sequences in %u namespaces of pool '%s'; that is the limit",
                       e->tenants[s->tenant], TS_NAMESPACES_MAX, p->config.name);
    else if (status != TS_OK)
        ts_refuse(answer, status, "no memory for a namespace");
    return status == TS_OK;
}

void ts_engine_seq_create(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    uint32_t space;
    if (!ts_engine_reserve_sequences(e, s, c->pool, c->seq_create.count, answer) ||
        !ts_engine_use_space(e, c->pool, s, &c->seq_create.space, &space, answer))
        return;
    for (uint32_t i = 0; i < c->seq_create.count; i++)
        (void)ts_engine_new_sequence(e, s, c->pool, space, i);
    if (space != TS_NONE) /* the sequences use it now */
        ts_index_leave_space(e->pools[c->pool].books.index, space);
    answer->seqs.seqs = e->out_ids;
    answer->seqs.count = c->seq_create.count;
    answer->seqs.length = 0;
}

/* False, and the answer refuses, if the session's block tables would get too long. */
static bool check_session_entries(const ts_engine *e, const ts_session *s, uint32_t pool,
                                  uint64_t more, ts_answer *answer)
{
    const ts_engine_pool *p = &e->pools[pool];
    uint64_t most = e->limits.session_blocks;
    if (most == 0)
        most = TS_ENTRIES_PER_BLOCK * (uint64_t)p->books.max_blocks;
    if (s->blocks > most || more > most - s->blocks) {
        ts_refuse_more(answer, TS_EQUOTA, s->blocks, more, most,
                       "the session refers to %llu blocks; %llu more would pass its limit of %llu "
                       "(session_blocks)",
                       (unsigned long long)s->blocks, (unsigned long long)more,
                       (unsigned long long)most);
        return false;
    }
    return true;
}

bool ts_engine_check_owned(const ts_engine *e, const ts_session *s, uint32_t pool, uint32_t blocks,
                           ts_answer *answer)
{
    if (s->sequences >= e->limits.session_sequences)
        ts_refuse_more(answer, TS_EQUOTA, s->sequences, 1, e->limits.session_sequences,
                       "the session owns %u sequences; the limit is %u", s->sequences,
                       e->limits.session_sequences);
    return answer->status == TS_OK && check_session_entries(e, s, pool, blocks, answer);
}

/* The session's block tables, and all of its tenant's in the pool. */
bool ts_engine_check_entries(const ts_engine *e, const ts_session *s, uint32_t pool, uint64_t more,
                             ts_answer *answer)
{
    const ts_engine_pool *p = &e->pools[pool];
    if (!check_session_entries(e, s, pool, more, answer))
        return false;
    uint64_t all = p->books.tenants[s->tenant].entries, most = p->config.tenant_entries_max;
    if (most == 0 || (all <= most && more <= most - all))
        return true;
    ts_refuse_more(
        answer, TS_EQUOTA, all, more, most,
        "the block tables of uid %u in pool '%s' have %llu entries; %llu more would pass its "
        "limit of %llu (tenant_entries)",
        e->tenants[s->tenant], p->config.name, (unsigned long long)all, (unsigned long long)more,
        (unsigned long long)most);
    if (ts_engine_frees_more(e, pool))
        answer->status = TS_NEED_SWEEP;
    return false;
}

/* The same for what the tenant's kept sequences refer to. */
bool ts_engine_check_pinned(const ts_engine *e, const ts_session *s, uint32_t pool, uint64_t more,
                            ts_answer *answer)
{
    const ts_engine_pool *p = &e->pools[pool];
    uint64_t pinned = p->books.tenants[s->tenant].pinned, most = p->config.tenant_pinned_max;
    if (more == 0 || most == 0 || pinned + more <= most)
        return true;
    ts_refuse_more(
        answer, TS_EQUOTA, pinned, more, most,
        "kept sequences of uid %u refer to %llu blocks of pool '%s'; %llu more would pass "
        "its limit of %llu (tenant_pinned)",
        e->tenants[s->tenant], (unsigned long long)pinned, p->config.name, (unsigned long long)more,
        (unsigned long long)most);
    if (ts_engine_frees_more(e, pool))
        answer->status = TS_NEED_SWEEP;
    return false;
}

uint32_t ts_engine_replaced_tail(const ts_engine *e, uint32_t pool, const ts_sequence *seq)
{
    if (seq->step == TS_NONE)
        return TS_NONE;
    const ts_step *step = &e->steps[seq->step];
    uint32_t index = ts_sequence_index(&e->pools[pool].seqs, seq), i = 0;
    while (step->seqs[i].seq != index)
        i++;
    return step->seqs[i].original;
}

void ts_engine_seq_fork(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    ts_sequence *parent = ts_engine_sequence(e, c->pool, s, c->seq_fork.parent, false, answer);
    if (parent == NULL)
        return;
    uint32_t count = c->seq_fork.count;
    uint32_t length = c->seq_fork.has_length ? c->seq_fork.length : parent->length;
    if (length > parent->length)
        return ts_refuse_beyond(answer, TS_EINVAL, length, parent->length,
                                "a fork at token %u of sequence %llx, which has %u", length,
                                (unsigned long long)c->seq_fork.parent, parent->length);
    uint32_t blocks = ts_blocks_for(length, pool->seqs.block_tokens);
    if (count > 1 && (uint64_t)blocks * count > TS_COMMAND_ENTRIES)
        return ts_refuse_beyond(
            answer, TS_EINVAL, (uint64_t)blocks * count, TS_COMMAND_ENTRIES,
            "%u forks of %u blocks each; one call makes up to %u block table entries", count,
            blocks, TS_COMMAND_ENTRIES);
    if (!check_batch(e, count, answer) ||
        !ts_engine_check_entries(e, s, c->pool, (uint64_t)blocks * count, answer) ||
        !ts_engine_reserve_sequences(e, s, c->pool, count, answer))
        return;
    parent = ts_sequence_find(&pool->seqs, c->seq_fork.parent); /* the table may have moved */
    uint32_t tail = ts_engine_replaced_tail(e, c->pool, parent);
    for (uint32_t i = 0; i < count; i++) {
        ts_sequence *child = ts_engine_new_sequence(e, s, c->pool, parent->space, i);
        if (ts_sequence_reserve(child, blocks) != TS_OK) {
            for (uint32_t j = 0; j <= i; j++) {
                child = ts_sequence_find(&pool->seqs, e->out_ids[j]);
                s->blocks -= child->num_blocks;
                s->sequences--;
                ts_sequence_free(&pool->seqs, &pool->books, child, &s->owned[c->pool]);
            }
            return ts_refuse(answer, TS_ENOMEM, "no memory for %u block tables of %u entries",
                             count, blocks);
        }
        ts_sequence_share(&pool->seqs, &pool->books, parent, length, tail, child);
        s->blocks += blocks;
    }
    ts_sequence_refresh_life(&pool->seqs, parent, e->now_ms);
    answer->seqs.seqs = e->out_ids;
    answer->seqs.count = count;
    answer->seqs.length = length;
}

void ts_engine_free_sequence(ts_engine *e, uint32_t pool, ts_sequence *seq, uint32_t *entries)
{
    uint32_t *owned = NULL;
    ts_claims_end_of(e, pool, ts_sequence_index(&e->pools[pool].seqs, seq));
    if (seq->owner != TS_NONE) {
        ts_session *owner = &e->sessions[seq->owner];
        owner->blocks -= seq->num_blocks;
        owner->sequences--;
        owned = &owner->owned[pool];
    }
    bool at_once = seq->num_blocks <= *entries;
    if (at_once)
        *entries -= seq->num_blocks;
    (at_once ? ts_sequence_free : ts_sequence_doom)(&e->pools[pool].seqs, &e->pools[pool].books,
                                                    seq, owned);
}

void ts_engine_seq_remove(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)s;
    uint64_t id = c->seq_remove.seq;
    uint32_t entries = TS_COMMAND_ENTRIES;
    ts_sequence *seq = ts_sequence_find(&e->pools[c->pool].seqs, id);
    if (seq == NULL)
        return ts_refuse(answer, TS_ENOENT, "pool '%s' has no sequence %llx",
                         e->pools[c->pool].config.name, (unsigned long long)id);
    if (seq->step != TS_NONE)
        return ts_refuse(answer, TS_EBUSY, "sequence %llx is in an open step",
                         (unsigned long long)id);
    ts_engine_free_sequence(e, c->pool, seq, &entries);
}

/* Some of a pool's blocks. */
typedef struct block_range {
    uint32_t first, count;
} block_range;

static bool is_in(const block_range *range, uint32_t block)
{
    return block >= range->first && block - range->first < range->count;
}

/* Whether the sequence, with what an open step reserved for it, has one of the blocks. */
static bool has_block_of(const ts_engine *e, uint32_t pool, uint32_t index,
                         const block_range *range)
{
    const ts_engine_pool *p = &e->pools[pool];
    const ts_sequence *seq = &p->seqs.all[index];
    uint32_t entries = seq->num_blocks;
    bool has = false;
    const ts_step *step = seq->step < e->num_steps ? &e->steps[seq->step] : NULL;
    for (uint32_t i = 0; step != NULL && i < step->num_seqs; i++)
        if (step->seqs[i].seq == index) {
            entries += step->seqs[i].reserved;
            has = step->seqs[i].original != TS_NONE && is_in(range, step->seqs[i].original);
        }
    for (uint32_t i = 0; i < entries && !has; i++)
        has = is_in(range, seq->blocks[i]);
    return has;
}

/* The sequence is in a step of a session that has ended, whose kernels may write to it yet: it goes
 * when the step does. Until then nobody finds it under its name. How many that loses. */
static uint64_t leave_to(ts_engine *e, uint32_t pool_index, ts_sequence *seq, uint32_t session)
{
    ts_engine_pool *pool = &e->pools[pool_index];
    ts_session *s = &e->sessions[session];
    if (seq->name == NULL) /* it was going anyway */
        return 0;
    ts_sequence_own(&pool->seqs, &pool->books, seq, ts_engine_replaced_tail(e, pool_index, seq),
                    session, &s->owned[pool_index]);
    s->blocks += seq->num_blocks;
    s->sequences++;
    return 1;
}

/* Frees the sequences that have one of the blocks; how many. */
static uint64_t free_users(ts_engine *e, uint32_t pool_index, const block_range *range)
{
    ts_engine_pool *pool = &e->pools[pool_index];
    uint64_t freed = 0;
    (void)ts_sequences_sweep(&pool->seqs, &pool->books, UINT32_MAX);
    for (uint32_t i = 0; i < pool->seqs.count; i++) {
        ts_sequence *seq = &pool->seqs.all[i];
        if (seq->tenant == TS_NONE || seq->step == TS_SEQUENCE_DYING ||
            !has_block_of(e, pool_index, i, range))
            continue;
        ts_step *step = seq->step == TS_NONE ? NULL : &e->steps[seq->step];
        if (step != NULL && step->in_flight > 0 && e->sessions[step->session].closing) {
            freed += leave_to(e, pool_index, seq, step->session);
            continue;
        }
        if (step != NULL) /* what is in flight the daemon before has left: it isn't done again */
            ts_engine_step_abort(e, step);
        uint32_t all = UINT32_MAX;
        ts_engine_free_sequence(e, pool_index, seq, &all);
        freed++;
    }
    return freed;
}

void ts_engine_slab_lost(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)s;
    const uint32_t slab = c->slab_grant.slab;
    ts_engine_pool *pool = &e->pools[c->pool];
    if (!ts_engine_has_pool(e, c->pool) || slab >= pool->books.ungranted)
        return ts_refuse(answer, TS_ENOENT, "there is no slab %u in pool %u", slab, c->pool);
    const uint32_t blocks = pool->books.slab_blocks;
    answer->dropped = free_users(e, c->pool, &(block_range){slab * blocks, blocks});
    e->lost_sequences += answer->dropped;
    /* Also what the step of an ended session has yet may not be found. */
    for (uint32_t i = 0; i < pool->books.slabs[slab].blocks; i++)
        ts_pool_drop_block(&pool->books, slab * blocks + i);
    pool->books.slabs[slab].generation++; /* whoever maps it maps it anew */
}

void ts_engine_block_lost(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)s;
    const uint32_t block = c->block_lost.block;
    ts_engine_pool *pool = &e->pools[c->pool];
    if (!ts_engine_has_pool(e, c->pool) || block >= pool->books.max_blocks)
        return ts_refuse(answer, TS_ENOENT, "there is no block %u in pool %u", block, c->pool);
    answer->dropped = free_users(e, c->pool, &(block_range){block, 1});
    e->wrong_blocks++;
    e->lost_sequences += answer->dropped;
    ts_pool_drop_block(&pool->books, block);
}

/* Tokens of sequence i of a SEQ_TRUNCATE afterwards. */
static uint32_t length_after(const ts_command *c, uint32_t i, const ts_sequence *seq)
{
    const uint32_t n = c->seq_batch.lengths[i];
    return c->seq_batch.by_counts ? seq->length - n : n;
}

/* SEQ_FREE and SEQ_TRUNCATE: the whole batch is checked, each sequence being marked, before any is
 * touched. */
void ts_engine_seq_change(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    uint32_t count = c->seq_batch.count, marked = 0, entries = TS_COMMAND_ENTRIES;
    uint64_t dropped = 0;
    if (!check_batch(e, count, answer))
        return;
    for (; marked < count; marked++) {
        uint64_t id = c->seq_batch.seqs[marked];
        ts_sequence *seq = ts_engine_sequence(e, c->pool, s, id, true, answer);
        if (seq == NULL)
            break;
        if (c->op == TS_OP_SEQ_TRUNCATE && c->seq_batch.lengths[marked] > seq->length) {
            ts_refuse_beyond(answer, TS_EINVAL, c->seq_batch.lengths[marked], seq->length,
                             "sequence %llx has %u tokens; it can't %s %u", (unsigned long long)id,
                             seq->length, c->seq_batch.by_counts ? "lose" : "be truncated to",
                             c->seq_batch.lengths[marked]);
            break;
        }
        seq->step = TS_SEQUENCE_MARKED;
        if (c->op == TS_OP_SEQ_TRUNCATE)
            dropped += seq->num_blocks -
                       ts_blocks_for(length_after(c, marked, seq), pool->seqs.block_tokens);
    }
    if (answer->status == TS_OK && count > 1 && dropped > TS_COMMAND_ENTRIES)
        ts_refuse_beyond(answer, TS_EINVAL, dropped, TS_COMMAND_ENTRIES,
                         "a truncation of %u sequences by %llu blocks; one call drops up to %u",
                         count, (unsigned long long)dropped, TS_COMMAND_ENTRIES);
    for (uint32_t i = 0; i < marked; i++) {
        ts_sequence *seq = ts_sequence_find(&pool->seqs, c->seq_batch.seqs[i]);
        seq->step = TS_NONE;
        if (answer->status != TS_OK)
            continue;
        if (c->op == TS_OP_SEQ_FREE) {
            seq->forgets = c->seq_batch.forget;
            ts_engine_free_sequence(e, c->pool, seq, &entries);
            continue;
        }
        uint32_t before = seq->num_blocks;
        const uint32_t length = length_after(c, i, seq);
        if (length < seq->length)
            ts_claims_end_of(e, c->pool, ts_sequence_index(&pool->seqs, seq));
        ts_sequence_truncate(&pool->seqs, &pool->books, seq, length);
        if (seq->name == NULL)
            s->blocks -= before - seq->num_blocks;
    }
}

void ts_engine_seq_lengths(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    uint32_t count = c->seq_batch.count;
    if (!check_batch(e, count, answer))
        return;
    if (!ts_engine_grow((void **)&e->out_words, &e->out_words_capacity, count,
                        sizeof *e->out_words))
        return ts_refuse(answer, TS_ENOMEM, "no memory for an answer of %u lengths", count);
    for (uint32_t i = 0; i < count; i++) {
        const ts_sequence *seq =
            ts_engine_sequence(e, c->pool, s, c->seq_batch.seqs[i], false, answer);
        if (seq == NULL)
            return;
        e->out_words[i] = seq->length;
    }
    answer->lengths.lengths = e->out_words;
    answer->lengths.count = count;
}

void ts_engine_seq_blocks(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    const ts_sequence *seq = ts_engine_sequence(e, c->pool, s, c->seq_blocks.seq, false, answer);
    if (seq == NULL)
        return;
    uint32_t first = c->seq_blocks.first, count = c->seq_blocks.count;
    if (first > seq->num_blocks || count > seq->num_blocks - first)
        return ts_refuse_beyond(answer, TS_EINVAL, (uint64_t)first + count, seq->num_blocks,
                                "blocks %u to %llu of sequence %llx, which has %u", first,
                                (unsigned long long)first + count,
                                (unsigned long long)c->seq_blocks.seq, seq->num_blocks);
    if (count == 0)
        count = seq->num_blocks - first;
    answer->blocks.length = seq->length;
    if (count == 0)
        return;
    answer->blocks.blocks = seq->blocks + first;
    answer->blocks.count = count;
    uint32_t tail = ts_engine_replaced_tail(e, c->pool, seq);
    if (tail == TS_NONE || first + count < seq->num_blocks)
        return;
    if (!ts_engine_grow((void **)&e->out_words, &e->out_words_capacity, count,
                        sizeof *e->out_words))
        return ts_refuse(answer, TS_ENOMEM, "no memory for an answer of %u blocks", count);
    memcpy(e->out_words, seq->blocks + first, count * sizeof *e->out_words);
    e->out_words[count - 1] = tail;
    answer->blocks.blocks = e->out_words;
}
