#include "step.h"

#include <assert.h>

/* Whether new tokens would be written into a block that others have too. */
static bool writes_shared_tail(const ts_sequences *seqs, const ts_pool_books *pool,
                               const ts_sequence *seq, uint32_t new_tokens)
{
    return new_tokens > 0 && seq->length % seqs->block_tokens != 0 &&
           ts_pool_refs(pool, seq->blocks[seq->num_blocks - 1]) > 1;
}

uint32_t ts_step_blocks(const ts_sequences *seqs, const ts_pool_books *pool, const ts_sequence *seq,
                        uint32_t new_tokens)
{
    return ts_blocks_for((uint64_t)seq->length + new_tokens, seqs->block_tokens) - seq->num_blocks +
           writes_shared_tail(seqs, pool, seq, new_tokens);
}

void ts_step_take(ts_sequences *seqs, ts_pool_books *pool, ts_step_seq *part, uint32_t step)
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
        *tail = ts_pool_take(pool, seq->tenant);
        ts_sequence_changed(seq, seq->num_blocks - 1);
    }
    for (uint32_t i = 0; i < part->reserved; i++)
        seq->blocks[seq->num_blocks + i] = ts_pool_take(pool, seq->tenant);
    pool->tenants[seq->tenant].entries += part->reserved + (part->original != TS_NONE);
    part->table = seq->blocks;
    seq->step = step;
}

void ts_step_settle(ts_sequences *seqs, ts_pool_books *pool, const ts_step_seq *part,
                    uint32_t accepted)
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
}
