/* Kept sequences: put under names, found by them, and told about. */
#include "claim_ops.h"
#include "engine_internal.h"

#include <string.h>

/* The sequence that the tenant keeps under the name; NULL: it keeps none, or its time is over. */
static ts_sequence *find_kept(const ts_engine *e, uint32_t pool, const ts_session *s,
                              const char *name)
{
    const ts_sequences *seqs = &e->pools[pool].seqs;
    const uint32_t index = ts_names_find(&seqs->names, s->tenant, name);
    if (index == TS_NONE || ts_sequence_is_over(seqs, &seqs->all[index], e->now_ms))
        return NULL;
    return &seqs->all[index];
}

/* The name is forgotten; the sequence becomes the session's own. */
static void forget(ts_engine *e, ts_session *s, const ts_command *c, ts_sequence *seq,
                   ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    if (seq->name == NULL)
        return ts_refuse(answer, TS_ENOENT, "sequence %llx has no name to forget",
                         (unsigned long long)c->seq_keep.seq);
    if (!ts_engine_check_owned(e, s, c->pool, seq->num_blocks, answer))
        return;
    ts_sequence_own(&pool->seqs, &pool->books, seq, TS_NONE, (uint32_t)(s - e->sessions),
                    &s->owned[c->pool]);
    s->blocks += seq->num_blocks;
    s->sequences++;
}

/* Whether the sequence may be kept in place of `old` (NULL: of none); else the answer refuses. */
static bool check_keep(ts_engine *e, const ts_session *s, const ts_command *c,
                       const ts_sequence *seq, const ts_sequence *old, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const char *name = c->seq_keep.name;
    const uint64_t old_id =
        old == NULL ? 0 : ts_sequence_id(&pool->seqs, ts_sequence_index(&pool->seqs, old));
    if (old != NULL && !ts_sequence_is_over(&pool->seqs, old, e->now_ms)) {
        if (!c->seq_keep.replace)
            ts_refuse(answer, TS_EEXIST, "sequence %llx is already kept as '%s'",
                      (unsigned long long)old_id, name);
        else if (old->step != TS_NONE)
            ts_refuse(answer, TS_EBUSY,
                      "sequence %llx, which is kept as '%s', is in open step %llx",
                      (unsigned long long)old_id, name, (unsigned long long)e->steps[old->step].id);
    }
    if (answer->status != TS_OK)
        return false;
    if (c->seq_keep.ttl_ms > 0 && ts_sequences_reserve_life(&pool->seqs) != TS_OK) {
        ts_refuse(answer, TS_ENOMEM, "no memory for a time to live");
        return false;
    }
    /* What the old one alone has pinned makes room. */
    if (old != NULL)
        ts_sequence_pin(&pool->books, old, TS_NONE, false);
    bool fits =
        ts_engine_check_pinned(e, s, c->pool, ts_sequence_unpinned(&pool->books, seq), answer);
    if (old != NULL)
        ts_sequence_pin(&pool->books, old, TS_NONE, true);
    return fits;
}

/* Puts the sequence under the name. False: out of memory, and the answer refuses. */
static bool keep(ts_engine *e, ts_session *s, const ts_command *c, ts_sequence *seq,
                 ts_sequence *old, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const uint32_t tail = ts_engine_replaced_tail(e, c->pool, seq);
    const bool owned = seq->name == NULL;
    uint32_t entries = TS_COMMAND_ENTRIES;
    if (old != NULL) {
        ts_sequence_replace(&pool->seqs, &pool->books, old, seq, tail, &s->owned[c->pool]);
        ts_engine_free_sequence(e, c->pool, old, &entries);
    } else if (ts_sequence_keep(&pool->seqs, &pool->books, seq, tail, c->seq_keep.name,
                                &s->owned[c->pool]) != TS_OK) {
        ts_refuse(answer, TS_ENOMEM, "no memory for the name '%s'", c->seq_keep.name);
        return false;
    }
    ts_claims_end_of(e, c->pool, ts_sequence_index(&pool->seqs, seq));
    if (owned) {
        s->blocks -= seq->num_blocks;
        s->sequences--;
    }
    return true;
}

void ts_engine_seq_keep(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const char *name = c->seq_keep.name;
    const bool forgets = name[0] == '\0';
    const size_t bytes = strlen(name);
    if (bytes > TS_NAME_BYTES_MAX)
        return ts_refuse_beyond(answer, TS_EINVAL, bytes, TS_NAME_BYTES_MAX,
                                "a name of %zu bytes; the limit is %u", bytes, TS_NAME_BYTES_MAX);
    /* A step is its session's; a sequence in it may not become another's. */
    ts_sequence *seq = ts_engine_sequence(e, c->pool, s, c->seq_keep.seq, forgets, answer);
    if (seq == NULL)
        return;
    if (forgets)
        return forget(e, s, c, seq, answer);
    const uint32_t taken = ts_names_find(&pool->seqs.names, s->tenant, name);
    const bool has_it = taken == ts_sequence_index(&pool->seqs, seq);
    ts_sequence *old = taken == TS_NONE || has_it ? NULL : &pool->seqs.all[taken];
    if (!check_keep(e, s, c, seq, old, answer) || (!has_it && !keep(e, s, c, seq, old, answer)))
        return;
    if (c->seq_keep.ttl_ms > 0)
        ts_sequence_set_life(&pool->seqs, seq, c->seq_keep.ttl_ms, e->now_ms);
    else
        ts_sequence_end_life(&pool->seqs, &pool->books, seq);
}

void ts_engine_seq_attach(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const ts_sequence *seq = find_kept(e, c->pool, s, c->seq_keep.name);
    if (seq == NULL)
        return ts_refuse(answer, TS_ENOENT, "uid %u keeps no sequence '%.127s' in pool '%s'",
                         e->tenants[s->tenant], c->seq_keep.name, pool->config.name);
    if (!ts_engine_grow((void **)&e->out_ids, &e->out_ids_capacity, 1, sizeof *e->out_ids))
        return ts_refuse(answer, TS_ENOMEM, "no memory for an answer");
    ts_sequence_refresh_life(&pool->seqs, seq, e->now_ms);
    e->out_ids[0] = ts_sequence_id(&pool->seqs, ts_sequence_index(&pool->seqs, seq));
    answer->seqs.seqs = e->out_ids;
    answer->seqs.count = 1;
    answer->seqs.length = seq->length;
}

void ts_engine_seq_list(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    const ts_sequences *seqs = &e->pools[c->pool].seqs;
    const char *prefix = c->seq_list.prefix, *after = c->seq_list.after;
    const size_t prefix_bytes = strlen(prefix);
    uint32_t limit = c->seq_list.limit, count = 0, looked_at = 0;
    limit = limit == 0 || limit > TS_LIST_MAX ? TS_LIST_MAX : limit;
    if (!ts_engine_grow((void **)&e->out_names, &e->out_names_capacity, limit,
                        sizeof *e->out_names) ||
        !ts_engine_grow((void **)&e->out_ids, &e->out_ids_capacity, 2ull * limit,
                        sizeof *e->out_ids) ||
        !ts_engine_grow((void **)&e->out_words, &e->out_words_capacity, 2ull * limit,
                        sizeof *e->out_words))
        return ts_refuse(answer, TS_ENOMEM, "no memory for an answer of %u sequences", limit);
    uint64_t *ids = e->out_ids, *left = ids + limit;
    uint32_t *lengths = e->out_words, *blocks = lengths + limit;
    const bool goes_on = strcmp(after, prefix) >= 0 && after[0] != '\0';
    const ts_name_node *node =
        ts_name_order_from(&seqs->order, s->tenant, goes_on ? after : prefix, goes_on);
    answer->kept.next = "";
    for (; node != NULL && strncmp(node->name, prefix, prefix_bytes) == 0;
         node = ts_name_order_next(node)) {
        const ts_sequence *seq = find_kept(e, c->pool, s, node->name);
        if (looked_at == limit) {
            answer->kept.next = after;
            break;
        }
        looked_at++;
        after = node->name;
        if (seq == NULL) /* its time is over */
            continue;
        e->out_names[count] = node->name;
        ids[count] = ts_sequence_id(seqs, ts_sequence_index(seqs, seq));
        left[count] = ts_sequence_left_ms(seqs, seq, e->now_ms);
        lengths[count] = seq->length;
        blocks[count++] = seq->num_blocks;
    }
    answer->kept.names = e->out_names;
    answer->kept.seqs = ids;
    answer->kept.left_ms = left;
    answer->kept.lengths = lengths;
    answer->kept.blocks = blocks;
    answer->kept.count = count;
}
