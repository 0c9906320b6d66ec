/* Matching: finding the longest stored beginning of a prompt, and a sequence that shares it. */
#include "claim_ops.h"
#include "engine_internal.h"

#include <string.h>

/* One prompt, and what was found of it. */
typedef struct prompt {
    const uint32_t *tokens;
    uint32_t count;
    bool own;              /* look for claims (claims.h) of the session's own, not of others' */
    ts_claim_found *claim; /* NULL: don't look for claims */
} prompt;

/*
 * The blocks that hold the longest stored beginning of the prompt, at most all but its last token:
 * whole ones, and one of which a part agrees. Returns the tokens; *blocks has room.
 */
static uint32_t find_prefix(const ts_engine *e, const ts_session *s, uint32_t pool, uint32_t space,
                            const prompt *p, uint32_t *blocks)
{
    const ts_prefix_index *x = e->pools[pool].books.index;
    const uint32_t each = x->block_tokens, most = p->count - 1, *tokens = p->tokens;
    ts_index_parent parent = ts_index_root(space);
    uint32_t found = 0, agree;
    for (; p->count - found >= each; found += each) {
        const uint32_t hash = ts_index_hash(x, parent, tokens + found);
        if (p->claim != NULL)
            ts_claims_look(e, s, p->own, pool, parent, hash, found, tokens + found, most - found,
                           p->claim);
        uint32_t block = ts_index_find_hashed(x, parent, hash, tokens + found);
        if (block == TS_NO_BLOCK)
            break;
        *blocks++ = block;
        if (most - found < each) /* the prompt's last block, of which its last token isn't taken */
            return most;
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
static bool check_prompts(const ts_engine *e, const ts_command *c, uint64_t *entries,
                          ts_answer *answer)
{
    const ts_pool_config *config = &e->pools[c->pool].config;
    uint64_t tokens = 0;
    *entries = 0;
    if (c->seq_match.count == 0 || c->seq_match.count > e->limits.batch) {
        ts_refuse_beyond(answer, TS_EINVAL, c->seq_match.count, e->limits.batch,
                         "a match of %u prompts; the limits are 1..%u", c->seq_match.count,
                         e->limits.batch);
        return false;
    }
    for (uint32_t i = 0; i < c->seq_match.count; i++) {
        uint32_t n = c->seq_match.counts[i];
        if (n == 0 || n > config->sequence_tokens_max) {
            ts_refuse_beyond(answer, TS_EINVAL, n, config->sequence_tokens_max,
                             "prompt %u has %u tokens; the limits are 1..%u", i, n,
                             config->sequence_tokens_max);
            return false;
        }
        tokens += n;
        *entries += ts_blocks_for(n, config->geometry.block_tokens);
    }
    if (tokens <= e->limits.step_tokens && *entries <= TS_COMMAND_ENTRIES)
        return true;
    ts_refuse(answer, TS_EINVAL,
              "prompts of %llu tokens and %llu blocks; the limits of one call are %u and %u",
              (unsigned long long)tokens, (unsigned long long)*entries, e->limits.step_tokens,
              TS_COMMAND_ENTRIES);
    return false;
}

/* Makes the sequences of what was found: lengths[i] tokens of each, in blocks one after another. */
static void make_sequences(ts_engine *e, ts_session *s, const ts_command *c, uint32_t space,
                           const uint32_t *lengths, const uint32_t *blocks, ts_answer *answer)
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
            return ts_refuse(answer, TS_ENOMEM, "no memory for a block table of %u entries", n);
        }
        ts_sequence_take_match(&pool->seqs, &pool->books, seq, blocks, lengths[i]);
        s->blocks += n;
        blocks += n;
    }
    for (uint32_t i = 0; i < count; i++) {
        pool->asked_tokens += c->seq_match.counts[i];
        pool->found_tokens += lengths[i];
        pool->books.tenants[s->tenant].asked_tokens += c->seq_match.counts[i];
        pool->books.tenants[s->tenant].found_tokens += lengths[i];
        pool->books.index->spaces[space].asked_tokens += c->seq_match.counts[i];
        pool->books.index->spaces[space].found_tokens += lengths[i];
    }
    answer->matched.seqs = e->out_ids;
}

/* Looks all prompts up: their lengths and, one after another, their blocks. With `wait` the first
 * that would share more with another session's claim than it found is in *claim. */
static uint64_t find_all(const ts_engine *e, const ts_session *s, const ts_command *c,
                         uint32_t space, bool wait, uint32_t *lengths, uint32_t *blocks,
                         ts_claim_found *claim)
{
    const uint32_t count = c->seq_match.count, each = e->pools[c->pool].seqs.block_tokens;
    uint64_t taken = 0;
    prompt p = {.tokens = c->seq_match.tokens};
    for (uint32_t i = 0; i < count; p.tokens += c->seq_match.counts[i++]) {
        ts_claim_found found = {.claim = TS_NONE};
        p.count = c->seq_match.counts[i];
        p.claim = wait && claim->claim == TS_NONE ? &found : NULL;
        lengths[i] = space == TS_NONE ? 0 : find_prefix(e, s, c->pool, space, &p, blocks + taken);
        if (found.claim != TS_NONE && found.tokens > lengths[i])
            *claim = found;
        taken += ts_blocks_for(lengths[i], each);
    }
    return taken;
}

/* The sequences that were made are going to get the rest of their prompts; a prompt that shares
 * what it lacks with an earlier one is its twin. */
static void claim_rests(ts_engine *e, ts_session *s, const ts_command *c, uint32_t space,
                        const uint32_t *lengths, uint32_t *twins, uint32_t *unused)
{
    prompt p = {.tokens = c->seq_match.tokens, .own = true};
    const uint32_t first = e->claims.live;
    for (uint32_t i = 0; i < c->seq_match.count; p.tokens += c->seq_match.counts[i++]) {
        ts_claim_found found = {.claim = TS_NONE};
        twins[i] = i;
        p.count = c->seq_match.counts[i];
        p.claim = &found;
        if (e->claims.live > first)
            (void)find_prefix(e, s, c->pool, space, &p, unused);
        const ts_claim *claim = found.claim == TS_NONE ? NULL : &e->claims.all[found.claim];
        if (claim != NULL && found.tokens > lengths[i] && claim->prompt < i &&
            claim->seq == (uint32_t)e->out_ids[claim->prompt]) /* of this match */
            twins[i] = claim->prompt;
        else
            ts_claims_add_prompt(e, s, c->pool, (uint32_t)e->out_ids[i], p.tokens, p.count, i);
    }
}

void ts_engine_seq_match(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const uint32_t count = c->seq_match.count;
    const bool dry = c->seq_match.dry, wait = c->seq_match.wait && !dry;
    ts_claim_found claim = {.claim = TS_NONE};
    uint64_t entries;
    uint32_t space;
    if (!check_prompts(e, c, &entries, answer) ||
        (!dry && !ts_engine_reserve_sequences(e, s, c->pool, count, answer)))
        return;
    if (!ts_engine_grow((void **)&e->out_words, &e->out_words_capacity, 2ull * count + entries,
                        sizeof *e->out_words))
        return ts_refuse(answer, TS_ENOMEM, "no memory for an answer of %u prompts", count);
    const ts_space_name name = ts_engine_space_name(pool, &c->seq_match.space);
    if (name.count == 0)
        return ts_refuse(answer, TS_EINVAL,
                         "a match without a namespace: give one, or set model of pool '%s'",
                         pool->config.name);
    if (!dry ? !ts_engine_use_space(e, c->pool, s, &name, &space, answer)
             : !ts_engine_find_space(e, c->pool, s, &name, &space, answer))
        return;
    uint32_t *lengths = e->out_words, *twins = lengths + count, *blocks = twins + count;
    const bool look = wait && space != TS_NONE && !pool->books.index->off;
    const uint64_t taken =
        find_all(e, s, c, space, look && e->claims.live > 0, lengths, blocks, &claim);
    answer->matched.lengths = lengths;
    answer->matched.count = count;
    if (claim.claim != TS_NONE) {
        ts_claims_wait(e, s, &claim);
        ts_refuse(answer, TS_WAITS, "it waits for what is being computed");
    } else if (!dry && ts_engine_check_entries(e, s, c->pool, taken, answer)) {
        make_sequences(e, s, c, space, lengths, blocks, answer);
        if (look && answer->status == TS_OK)
            claim_rests(e, s, c, space, lengths, twins, blocks);
        else
            for (uint32_t i = 0; i < count; i++)
                twins[i] = i;
        answer->matched.twins = twins;
    }
    if (space != TS_NONE && !dry) /* the sequences use it now */
        ts_index_leave_space(pool->books.index, space);
}
