#include "step.h"

#include <assert.h>
#include <string.h>

/* Whether the block must not be written: others refer to it, or what hangs from it in the index. */
static bool is_shared(const ts_pool_books *pool, const ts_sequence *seq, uint32_t block)
{
    return ts_pool_refs(pool, block) > 1 ||
           (pool->index != NULL && (!ts_index_is_leaf(pool->index, block) || seq->borrowed_tail));
}

/* Whether new tokens would be written into a block that others have too. */
static bool writes_shared_tail(const ts_sequences *seqs, const ts_pool_books *pool,
                               const ts_sequence *seq, uint32_t new_tokens)
{
    return new_tokens > 0 && seq->length % seqs->block_tokens != 0 &&
           is_shared(pool, seq, seq->blocks[seq->num_blocks - 1]);
}

uint32_t ts_step_blocks(const ts_sequences *seqs, const ts_pool_books *pool, const ts_sequence *seq,
                        uint32_t new_tokens)
{
    return ts_blocks_for((uint64_t)seq->length + new_tokens, seqs->block_tokens) - seq->num_blocks +
           writes_shared_tail(seqs, pool, seq, new_tokens);
}

/* Stores the ids of the new tokens; how many from the first on are known. */
static uint32_t store_ids(const ts_sequences *seqs, const ts_pool_books *pool,
                          const ts_sequence *seq, const ts_step_seq *part, const uint32_t *ids)
{
    uint32_t n = 0;
    if (ids == NULL || pool->index == NULL || seq->known != seq->length)
        return 0;
    for (uint32_t at = part->start; n < part->new_tokens && ids[n] != TS_TOKEN_UNKNOWN; n++, at++)
        ts_index_ids(pool->index, seq->blocks[at / seqs->block_tokens])[at % seqs->block_tokens] =
            ids[n];
    return n;
}

void ts_step_take(ts_sequences *seqs, ts_pool_books *pool, ts_step_seq *part, uint32_t step,
                  uint32_t session, const uint32_t *ids)
{
    ts_sequence *seq = &seqs->all[part->seq];
    part->start = seq->length;
    part->original = TS_NONE;
    part->reserved = ts_blocks_for((uint64_t)seq->length + part->new_tokens, seqs->block_tokens) -
                     seq->num_blocks;
    assert(seq->num_blocks + part->reserved <= seq->capacity);
    if (writes_shared_tail(seqs, pool, seq, part->new_tokens)) {
        uint32_t *tail = &seq->blocks[seq->num_blocks - 1];
        part->original = *tail;
        *tail = ts_pool_take(pool, seq->tenant, session);
        if (pool->index != NULL)
            memcpy(ts_index_ids(pool->index, *tail), ts_index_ids(pool->index, part->original),
                   seqs->block_tokens * sizeof *ids);
        ts_sequence_changed(seq, seq->num_blocks - 1);
    } else if (pool->index != NULL && part->new_tokens > 0 &&
               seq->length % seqs->block_tokens != 0 &&
               ts_index_has(pool->index, seq->blocks[seq->num_blocks - 1])) {
        ts_pool_forget(pool, seq->blocks[seq->num_blocks - 1]); /* it will be written */
    }
    for (uint32_t i = 0; i < part->reserved; i++)
        seq->blocks[seq->num_blocks + i] = ts_pool_take(pool, seq->tenant, session);
    pool->tenants[seq->tenant].entries += part->reserved + (part->original != TS_NONE);
    part->table = seq->blocks;
    part->known = store_ids(seqs, pool, seq, part, ids);
    seq->step = step;
}

void ts_step_settle(ts_sequences *seqs, ts_pool_books *pool, const ts_step_seq *part,
                    uint32_t accepted, uint8_t class)
{
    ts_sequence *seq = &seqs->all[part->seq];
    assert(accepted <= part->new_tokens && seq->length == part->start);
    uint32_t all = seq->num_blocks + part->reserved;
    uint32_t kept = ts_blocks_for((uint64_t)seq->length + accepted, seqs->block_tokens);
    for (uint32_t i = kept; i < all; i++)
        ts_pool_unref(pool, seq->blocks[i]);
    for (uint32_t i = seq->num_blocks; seq->name != NULL && i < kept; i++)
        ts_pool_pin(pool, seq->tenant, seq->blocks[i]);
    pool->tenants[seq->tenant].entries -= all - kept + (part->original != TS_NONE);
    ts_sequence_changed(seq, kept);
    if (part->original != TS_NONE) {
        uint32_t *tail = &seq->blocks[seq->num_blocks - 1];
        uint32_t dropped = accepted > 0 ? part->original : *tail;
        if (accepted == 0) {
            *tail = part->original;
            ts_sequence_changed(seq, seq->num_blocks - 1);
        } else if (seq->name != NULL) {
            ts_pool_unpin(pool, seq->tenant, part->original);
            ts_pool_pin(pool, seq->tenant, *tail);
        }
        ts_pool_unref(pool, dropped);
    }
    seq->num_blocks = kept;
    seq->length += accepted;
    seq->step = TS_NONE;
    seq->borrowed_tail = seq->borrowed_tail && accepted == 0;
    if (part->known > 0) {
        seq->known += accepted < part->known ? accepted : part->known;
        ts_sequence_index_blocks(seqs, pool, seq, part->start / seqs->block_tokens, class);
    }
}
