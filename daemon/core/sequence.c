#include "sequence.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(ts_sequence) <= 88, "systemd/sizing.md says 88 bytes a sequence");

void ts_sequences_init(ts_sequences *s, uint32_t max, uint32_t block_tokens,
                       uint32_t first_generation)
{
    *s = (ts_sequences){.max = max,
                        .block_tokens = block_tokens,
                        .free_head = TS_NONE,
                        .dying = TS_NONE,
                        .first_generation = first_generation};
}

void ts_sequences_fini(ts_sequences *s)
{
    for (uint32_t i = 0; i < s->count; i++)
        free(s->all[i].blocks);
    free(s->all);
    ts_names_fini(&s->names);
    ts_name_order_fini(&s->order);
    ts_names_fini(&s->tickets);
    free(s->lives);
    *s = (ts_sequences){0};
}

/* Doubles an array from `least` elements on until it has `needed`; NULL: no memory for that, and
 * the array is as it was. */
static void *grow(void *array, size_t element_bytes, uint64_t least, uint64_t needed,
                  uint32_t *capacity)
{
    uint64_t more = *capacity == 0 ? least : *capacity;
    while (more < needed)
        more *= 2;
    void *grown = realloc(array, more * element_bytes);
    if (grown != NULL)
        *capacity = (uint32_t)more;
    return grown;
}

ts_status ts_sequences_reserve(ts_sequences *s, uint32_t count)
{
    if (count > s->max - s->live)
        return TS_EQUOTA;
    uint64_t needed = (uint64_t)s->live + count; /* free entries lie among the first s->count */
    if (needed <= s->capacity)
        return TS_OK;
    ts_sequence *grown = grow(s->all, sizeof *grown, 64, needed, &s->capacity);
    if (grown == NULL)
        return TS_ENOMEM;
    s->all = grown;
    return TS_OK;
}

static void owner_add(ts_sequences *s, uint32_t index, uint32_t *owned)
{
    ts_sequence *seq = &s->all[index];
    seq->prev = TS_NONE;
    seq->next = *owned;
    if (*owned != TS_NONE)
        s->all[*owned].prev = index;
    *owned = index;
}

static void owner_remove(ts_sequences *s, uint32_t index, uint32_t *owned)
{
    ts_sequence *seq = &s->all[index];
    if (seq->prev != TS_NONE)
        s->all[seq->prev].next = seq->next;
    else
        *owned = seq->next;
    if (seq->next != TS_NONE)
        s->all[seq->next].prev = seq->prev;
}

uint32_t ts_sequence_new(ts_sequences *s, ts_pool_books *pool, uint32_t tenant, uint32_t owner,
                         uint32_t space, uint32_t *owned)
{
    uint32_t index = s->free_head, generation = s->first_generation;
    if (index != TS_NONE) {
        s->free_head = s->all[index].next;
        generation = s->all[index].generation;
    } else {
        assert(s->count < s->capacity);
        index = s->count++;
    }
    s->all[index] = (ts_sequence){.generation = generation + 1,
                                  .tenant = tenant,
                                  .owner = owner,
                                  .step = TS_NONE,
                                  .life = TS_NONE,
                                  .space = space,
                                  .claim = TS_NONE};
    if (space != TS_NONE)
        ts_index_share_space(pool->index, space);
    owner_add(s, index, owned);
    s->live++;
    pool->tenants[tenant].sequences++;
    return index;
}

uint64_t ts_sequence_id(const ts_sequences *s, uint32_t index)
{
    return (uint64_t)s->all[index].generation << 32 | index;
}

uint32_t ts_sequence_index(const ts_sequences *s, const ts_sequence *seq)
{
    return (uint32_t)(seq - s->all);
}

ts_status ts_sequence_reserve(ts_sequence *seq, uint32_t blocks)
{
    if (blocks <= seq->capacity)
        return TS_OK;
    uint32_t *grown = grow(seq->blocks, sizeof *grown, 4, blocks, &seq->capacity);
    if (grown == NULL)
        return TS_ENOMEM;
    seq->blocks = grown;
    return TS_OK;
}

void ts_sequence_share(const ts_sequences *s, ts_pool_books *pool, const ts_sequence *parent,
                       uint32_t length, uint32_t tail, ts_sequence *child)
{
    assert(child->length == 0 && length <= parent->length);
    child->num_blocks = ts_blocks_for(length, s->block_tokens);
    child->length = length;
    child->known = parent->known < length ? parent->known : length;
    assert(child->num_blocks <= child->capacity);
    if (child->num_blocks > 0)
        memcpy(child->blocks, parent->blocks, child->num_blocks * sizeof *child->blocks);
    if (tail != TS_NONE && child->num_blocks == parent->num_blocks)
        child->blocks[child->num_blocks - 1] = tail;
    child->borrowed_tail = pool->index != NULL && length % s->block_tokens != 0 &&
                           ts_index_has(pool->index, child->blocks[child->num_blocks - 1]);
    for (uint32_t i = 0; i < child->num_blocks; i++)
        ts_pool_ref(pool, child->blocks[i]);
    pool->tenants[child->tenant].entries += child->num_blocks;
}

void ts_sequence_take_match(const ts_sequences *s, ts_pool_books *pool, ts_sequence *seq,
                            const uint32_t *blocks, uint32_t length)
{
    assert(seq->length == 0 && ts_blocks_for(length, s->block_tokens) <= seq->capacity);
    seq->num_blocks = ts_blocks_for(length, s->block_tokens);
    seq->length = seq->known = length;
    seq->borrowed_tail = length % s->block_tokens != 0;
    for (uint32_t i = 0; i < seq->num_blocks; i++) {
        seq->blocks[i] = blocks[i];
        ts_pool_ref(pool, blocks[i]);
    }
    pool->tenants[seq->tenant].entries += seq->num_blocks;
}

/* The sequence's entry becomes a block of the index with the same tokens. */
static void replace_entry(ts_pool_books *pool, ts_sequence *seq, uint32_t entry, uint32_t block)
{
    uint32_t own = seq->blocks[entry];
    ts_pool_ref(pool, block);
    if (seq->name != NULL) {
        ts_pool_unpin(pool, seq->tenant, own);
        ts_pool_pin(pool, seq->tenant, block);
    }
    seq->blocks[entry] = block;
    ts_pool_unref(pool, own);
    ts_sequence_changed(seq, entry);
}

void ts_sequence_index_blocks(const ts_sequences *s, ts_pool_books *pool, ts_sequence *seq,
                              uint32_t first, uint8_t class)
{
    if (pool->index == NULL || seq->space == TS_NONE)
        return;
    for (uint32_t i = first; i > 0 && ts_index_has(pool->index, seq->blocks[i - 1]) &&
                             ts_pool_raise_class(pool, seq->blocks[i - 1], class);
         i--)
        ;
    for (uint32_t i = first; i < seq->known / s->block_tokens; i++) {
        uint32_t block = seq->blocks[i];
        if (ts_index_has(pool->index, block)) {
            (void)ts_pool_raise_class(pool, block, class);
            continue;
        }
        if (i > 0 && !ts_index_has(pool->index, seq->blocks[i - 1]))
            return; /* a block before it was not indexed: nor is what follows */
        ts_index_parent parent =
            i == 0 ? ts_index_root(seq->space) : ts_index_block(seq->blocks[i - 1]);
        uint32_t there = ts_index_find(pool->index, parent, ts_index_ids(pool->index, block));
        if (there != TS_NO_BLOCK)
            replace_entry(pool, seq, i, there);
        else if (!ts_index_add(pool->index, parent, block))
            return;
        (void)ts_pool_raise_class(pool, seq->blocks[i], class);
    }
}

/* Drops the last `count` entries of the table. */
static void drop_entries(ts_pool_books *pool, ts_sequence *seq, uint32_t count)
{
    pool->tenants[seq->tenant].entries -= count;
    for (; count > 0; count--) {
        uint32_t block = seq->blocks[--seq->num_blocks];
        if (seq->name != NULL || (seq->step == TS_SEQUENCE_DYING && seq->known_step != 0))
            ts_pool_unpin(pool, seq->tenant, block);
        if (seq->forgets && ts_pool_refs(pool, block) == 1 && ts_index_has(pool->index, block) &&
            ts_index_is_leaf(pool->index, block))
            ts_pool_forget(pool, block);
        ts_pool_unref(pool, block);
    }
}

void ts_sequence_truncate(const ts_sequences *s, ts_pool_books *pool, ts_sequence *seq,
                          uint32_t length)
{
    assert(length <= seq->length && seq->step == TS_NONE);
    uint32_t before = seq->num_blocks, blocks = ts_blocks_for(length, s->block_tokens);
    ts_sequence_changed(seq, blocks);
    drop_entries(pool, seq, seq->num_blocks - blocks);
    seq->length = length;
    seq->known = seq->known < length ? seq->known : length;
    seq->borrowed_tail = seq->borrowed_tail && blocks == before;
}

void ts_sequence_pin(ts_pool_books *pool, const ts_sequence *seq, uint32_t tail, bool pin)
{
    for (uint32_t i = 0; i < seq->num_blocks; i++)
        (pin ? ts_pool_pin : ts_pool_unpin)(
            pool, seq->tenant, tail != TS_NONE && i + 1 == seq->num_blocks ? tail : seq->blocks[i]);
}

static void remove_name(ts_sequences *s, ts_sequence *seq)
{
    ts_name_order_remove(&s->order, seq->tenant, seq->name);
    ts_names_remove(&s->names, seq->tenant, seq->name);
    seq->name = NULL;
    s->kept--;
}

static void forget_name(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq, uint32_t tail)
{
    ts_sequence_pin(pool, seq, tail, false);
    remove_name(s, seq);
}

/* The place is free for another sequence. */
static void give_up(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq)
{
    free(seq->blocks);
    if (seq->space != TS_NONE)
        ts_index_leave_space(pool->index, seq->space);
    pool->tenants[seq->tenant].sequences--;
    seq->blocks = NULL;
    seq->capacity = 0;
    seq->tenant = TS_NONE;
    s->live--;
    if (seq->generation < UINT32_MAX) { /* an entry whose generations are used up is retired */
        seq->next = s->free_head;
        s->free_head = ts_sequence_index(s, seq);
    }
}

void ts_sequence_free(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq, uint32_t *owned)
{
    uint32_t index = ts_sequence_index(s, seq);
    seq->step = TS_NONE;
    ts_sequence_truncate(s, pool, seq, 0);
    ts_sequence_end_life(s, pool, seq);
    if (seq->name != NULL)
        forget_name(s, pool, seq, TS_NONE);
    else if (owned != NULL)
        owner_remove(s, index, owned);
    give_up(s, pool, seq);
}

void ts_sequence_doom(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq, uint32_t *owned)
{
    uint32_t index = ts_sequence_index(s, seq);
    ts_sequence_end_life(s, pool, seq);
    seq->known_step = seq->name != NULL; /* from now on: its blocks are pinned still */
    if (seq->name != NULL)
        remove_name(s, seq);
    else if (owned != NULL)
        owner_remove(s, index, owned);
    seq->owner = TS_NONE;
    seq->step = TS_SEQUENCE_DYING;
    seq->length = 0;
    if (seq->generation < UINT32_MAX)
        seq->generation++; /* its id leads nowhere */
    seq->next = s->dying;
    s->dying = index;
}

uint32_t ts_sequences_sweep(ts_sequences *s, ts_pool_books *pool, uint32_t entries)
{
    while (entries > 0 && s->dying != TS_NONE) {
        ts_sequence *seq = &s->all[s->dying];
        uint32_t count = seq->num_blocks < entries ? seq->num_blocks : entries;
        drop_entries(pool, seq, count);
        entries -= count;
        if (seq->num_blocks > 0)
            break;
        entries -= entries > 0; /* giving up costs too */
        s->dying = seq->next;
        give_up(s, pool, seq);
    }
    return entries;
}

uint32_t ts_sequences_free_some(ts_sequences *s, uint32_t count)
{
    for (; count > 0 && s->count > 0; count--)
        free(s->all[--s->count].blocks);
    return count;
}

uint32_t ts_sequence_unpinned(const ts_pool_books *pool, const ts_sequence *seq)
{
    uint32_t count = 0;
    for (uint32_t i = 0; seq->name == NULL && i < seq->num_blocks; i++)
        count += pool->pins[seq->blocks[i]] == 0;
    return count;
}

ts_status ts_sequence_keep(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq, uint32_t tail,
                           const char *name, uint32_t *owned)
{
    const char *kept;
    uint32_t index = ts_sequence_index(s, seq);
    if (ts_names_add(&s->names, seq->tenant, name, index, &kept) != TS_OK)
        return TS_ENOMEM;
    if (!ts_name_order_add(&s->order, seq->tenant, kept)) {
        ts_names_remove(&s->names, seq->tenant, name);
        return TS_ENOMEM;
    }
    if (seq->name != NULL)
        forget_name(s, pool, seq, tail);
    else
        owner_remove(s, index, owned);
    ts_sequence_pin(pool, seq, tail, true);
    seq->name = kept;
    seq->owner = TS_NONE;
    s->kept++;
    return TS_OK;
}

void ts_sequence_replace(ts_sequences *s, ts_pool_books *pool, ts_sequence *old, ts_sequence *seq,
                         uint32_t tail, uint32_t *owned)
{
    const uint32_t index = ts_sequence_index(s, seq);
    assert(old->name != NULL && old->step == TS_NONE && old != seq);
    ts_sequence_end_life(s, pool, old);
    ts_sequence_pin(pool, old, TS_NONE, false);
    if (seq->name != NULL)
        forget_name(s, pool, seq, tail);
    else
        owner_remove(s, index, owned);
    ts_sequence_pin(pool, seq, tail, true);
    ts_names_set(&s->names, seq->tenant, old->name, index);
    seq->name = old->name;
    seq->owner = TS_NONE;
    old->name = NULL; /* as many are kept as before */
}

void ts_sequence_own(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq, uint32_t tail,
                     uint32_t owner, uint32_t *owned)
{
    assert(seq->name != NULL);
    ts_sequence_end_life(s, pool, seq);
    forget_name(s, pool, seq, tail);
    seq->owner = owner;
    owner_add(s, ts_sequence_index(s, seq), owned);
}

ts_status ts_sequence_put_on_ticket(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq,
                                    const char *ticket, uint32_t *owned)
{
    const uint32_t index = ts_sequence_index(s, seq);
    const char *kept;
    assert(seq->life != TS_NONE && seq->name == NULL && seq->step == TS_NONE);
    if (ts_names_find(&s->tickets, seq->tenant, ticket) != TS_NONE)
        return TS_EEXIST;
    if (ts_names_add(&s->tickets, seq->tenant, ticket, index, &kept) != TS_OK)
        return TS_ENOMEM;
    s->lives[seq->life].ticket = kept;
    pool->tenants[seq->tenant].tickets++;
    owner_remove(s, index, owned);
    seq->owner = TS_NONE;
    if (seq->generation < UINT32_MAX)
        seq->generation++;
    return TS_OK;
}

void ts_sequence_take_off_ticket(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq,
                                 uint32_t owner, uint32_t *owned)
{
    ts_sequence_end_life(s, pool, seq);
    seq->owner = owner;
    owner_add(s, ts_sequence_index(s, seq), owned);
}
