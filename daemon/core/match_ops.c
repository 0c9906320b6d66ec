/* Matching: finding the longest stored beginning of a prompt, and a sequence that shares it. */
#include "engine_internal.h"

#include <string.h>

/*
 * The blocks that hold the longest stored beginning of the prompt, at most all but its last token:
 * whole ones, and one of which a part agrees. Returns the tokens; *blocks has room.
 */
static uint32_t find_prefix(const ts_prefix_index *x, uint32_t space, const uint32_t *tokens,
                            uint32_t count, uint32_t *blocks)
{
    const uint32_t each = x->block_tokens, most = count - 1;
    ts_index_parent parent = ts_index_root(space);
    uint32_t found = 0, agree;
    for (; most - found >= each; found += each) {
        uint32_t block = ts_index_find(x, parent, tokens + found);
        if (block == TS_NO_BLOCK)
            break;
        *blocks++ = block;
        parent = ts_index_block(block);
    }
    if (found == most)
        return found;
    uint32_t part = ts_index_find_part(x, parent, tokens + found, most - found, &agree);
    if (part == TS_NO_BLOCK)
        return found;
    *blocks = part;
    return found + agree;
}

/* Checks the prompts' sizes. *entries: block table entries that they may come to. */
static bool check_prompts(const ts_engine *e, const ts_command *c, uint64_t *entries, ts_answer *a)
{
    const ts_pool_config *config = &e->pools[c->pool].config;
    uint64_t tokens = 0;
    *entries = 0;
    if (c->seq_match.count == 0 || c->seq_match.count > e->limits.batch) {
        ts_refuse(a, TS_EINVAL, "a match of %u prompts; the limits are 1..%u", c->seq_match.count,
                  e->limits.batch);
        return false;
    }
    for (uint32_t i = 0; i < c->seq_match.count; i++) {
        uint32_t n = c->seq_match.counts[i];
        if (n == 0 || n > config->sequence_tokens_max) {
            ts_refuse(a, TS_EINVAL, "prompt %u has %u tokens; the limits are 1..%u", i, n,
                      config->sequence_tokens_max);
            return false;
        }
        tokens += n;
        *entries += ts_blocks_for(n, config->geometry.block_tokens);
    }
    if (tokens <= e->limits.step_tokens && *entries <= TS_COMMAND_ENTRIES)
        return true;
    ts_refuse(a, TS_EINVAL,
              "prompts of %llu tokens and %llu blocks; the limits of one call are %u and %u",
              (unsigned long long)tokens, (unsigned long long)*entries, e->limits.step_tokens,
              TS_COMMAND_ENTRIES);
    return false;
}

/* Makes the sequences of what was found: lengths[i] tokens of each, in blocks one after another. */
static void make_sequences(ts_engine *e, ts_session *s, const ts_command *c, uint32_t space,
                           const uint32_t *lengths, const uint32_t *blocks, ts_answer *a)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const uint32_t count = c->seq_match.count;
    for (uint32_t i = 0; i < count; i++) {
        ts_sequence *seq = ts_engine_new_sequence(e, s, c->pool, space, i);
        uint32_t n = ts_blocks_for(lengths[i], pool->seqs.block_tokens);
        if (ts_sequence_reserve(seq, n) != TS_OK) {
            for (uint32_t j = 0; j <= i; j++) {
                seq = ts_sequence_find(&pool->seqs, e->out_ids[j]);
                s->blocks -= seq->num_blocks;
                s->sequences--;
                ts_sequence_free(&pool->seqs, &pool->books, seq, &s->owned[c->pool]);
            }
            return ts_refuse(a, TS_ENOMEM, "no memory for a block table of %u entries", n);
        }
        ts_sequence_take_match(&pool->seqs, &pool->books, seq, blocks, lengths[i]);
        s->blocks += n;
        blocks += n;
    }
    for (uint32_t i = 0; i < count; i++) {
        pool->asked_tokens += c->seq_match.counts[i];
        pool->found_tokens += lengths[i];
    }
    a->matched.seqs = e->out_ids;
}

void ts_engine_seq_match(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *a)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const uint32_t count = c->seq_match.count;
    uint64_t entries, taken = 0;
    uint32_t space;
    if (!check_prompts(e, c, &entries, a) ||
        (!c->seq_match.dry && !ts_engine_reserve_sequences(e, s, c->pool, count, a)))
        return;
    if (!ts_engine_grow((void **)&e->out_words, &e->out_words_capacity, count + entries,
                        sizeof *e->out_words))
        return ts_refuse(a, TS_ENOMEM, "no memory for an answer of %u prompts", count);
    const ts_space_name name = ts_engine_space_name(pool, &c->seq_match.space);
    if (name.count == 0)
        return ts_refuse(a, TS_EINVAL,
                         "a match without a namespace: give one, or set model of pool '%s'",
                         pool->config.name);
    if (!c->seq_match.dry ? !ts_engine_use_space(e, c->pool, s, &name, &space, a)
                          : !ts_engine_find_space(e, c->pool, s, &name, &space, a))
        return;
    uint32_t *lengths = e->out_words, *blocks = lengths + count;
    const uint32_t *tokens = c->seq_match.tokens;
    for (uint32_t i = 0; i < count; tokens += c->seq_match.counts[i++]) {
        lengths[i] = space == TS_NONE ? 0
                                      : find_prefix(pool->books.index, space, tokens,
                                                    c->seq_match.counts[i], blocks + taken);
        taken += ts_blocks_for(lengths[i], pool->seqs.block_tokens);
    }
    a->matched.lengths = lengths;
    a->matched.count = count;
    if (!c->seq_match.dry && ts_engine_check_entries(e, s, c->pool, taken, a))
        make_sequences(e, s, c, space, lengths, blocks, a);
    if (space != TS_NONE && !c->seq_match.dry) /* the sequences use it now */
        ts_index_leave_space(pool->books.index, space);
}
