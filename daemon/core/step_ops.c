/* The engine's commands for steps. */
#include "claim_ops.h"
#include "dtypes.h"
#include "engine_internal.h"
#include "wait_ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

ts_step *ts_engine_find_step(const ts_engine *e, uint64_t id)
{
    uint32_t index = (uint32_t)id;
    if (index >= e->num_steps || !e->steps[index].live || e->steps[index].id != id)
        return NULL;
    return &e->steps[index];
}

ts_step *ts_engine_own_step(ts_engine *e, const ts_session *s, uint64_t id, ts_answer *answer)
{
    ts_step *step = ts_engine_find_step(e, id);
    if (step == NULL || &e->sessions[step->session] != s || step->append) {
        ts_refuse(answer, TS_ENOENT, "the session has no open step %llx", (unsigned long long)id);
        return NULL;
    }
    return step;
}

/* An entry for a new step, linked into the session's list; TS_NONE if out of memory. */
static uint32_t step_new(ts_engine *e, ts_session *s, uint32_t num_seqs)
{
    ts_step_seq *seqs = malloc(num_seqs * sizeof *seqs);
    if (seqs == NULL)
        return TS_NONE;
    uint32_t index = e->free_step;
    uint64_t generation = e->limits.first_generation;
    if (index != TS_NONE) {
        e->free_step = e->steps[index].next;
        generation = e->steps[index].id >> 32;
    } else {
        /* Doubling; in-flight steps are told by id, so the array may move. */
        if ((e->num_steps & (e->num_steps - 1)) == 0) {
            size_t capacity = e->num_steps == 0 ? 1 : (size_t)e->num_steps * 2;
            ts_step *grown = realloc(e->steps, capacity * sizeof *grown);
            if (grown == NULL) {
                free(seqs);
                return TS_NONE;
            }
            e->steps = grown;
        }
        index = e->num_steps++;
    }
    generation = generation == UINT32_MAX ? 1 : generation + 1;
    e->steps[index] = (ts_step){
        .id = generation << 32 | index,
        .session = (uint32_t)(s - e->sessions),
        .prev = TS_NONE,
        .next = s->step_list,
        .live = true,
        .num_seqs = num_seqs,
        .seqs = seqs,
    };
    if (s->step_list != TS_NONE)
        e->steps[s->step_list].prev = index;
    s->step_list = index;
    s->steps++;
    e->live_steps++;
    return index;
}

static void step_free(ts_engine *e, ts_step *step)
{
    ts_session *s = &e->sessions[step->session];
    uint32_t index = (uint32_t)step->id;
    if (step->prev != TS_NONE)
        e->steps[step->prev].next = step->next;
    else
        s->step_list = step->next;
    if (step->next != TS_NONE)
        e->steps[step->next].prev = step->prev;
    s->steps--;
    e->live_steps--;
    free(step->seqs);
    step->seqs = NULL;
    free(step->stream_runs);
    step->stream_runs = NULL;
    step->live = false;
    step->next = e->free_step;
    e->free_step = index;
}

void ts_engine_step_settle(ts_engine *e, ts_step *step, const uint32_t *accepted, bool all)
{
    ts_engine_pool *pool = &e->pools[step->pool];
    ts_session *s = &e->sessions[step->session];
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        const ts_step_seq *part = &step->seqs[i];
        ts_sequence *seq = &pool->seqs.all[part->seq];
        uint32_t before = seq->num_blocks;
        uint32_t n = accepted != NULL ? accepted[i] : all ? part->new_tokens : 0;
        s->blocks -= part->reserved + (part->original != TS_NONE);
        ts_step_settle(&pool->seqs, &pool->books, part, n, step->class);
        if (seq->claim != TS_NONE)
            ts_claims_step_ended(e, step->pool, part->seq);
        ts_sequence_refresh_life(&pool->seqs, seq, e->now_ms);
        if (seq->owner == step->session)
            s->blocks += seq->num_blocks - before;
        e->tokens_committed += n;
    }
    pool->open_steps--;
    step_free(e, step);
}

void ts_engine_step_abort(ts_engine *e, ts_step *step)
{
    ts_engine_step_settle(e, step, NULL, false);
}

/* What a step takes. */
typedef struct needs {
    uint64_t tokens, blocks;
    uint64_t pinned; /* of the blocks: for kept sequences */
} needs;

/* Checks everything about the batch but the space, marks its sequences and adds up the tokens and
 * blocks. Returns how many were marked; the answer refuses if that is not all. */
static uint32_t mark_batch(ts_engine *e, ts_session *s, const ts_command *c, needs *n,
                           ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const uint32_t *ids = c->step_begin.tokens;
    uint32_t i = 0;
    for (; i < c->step_begin.count; i++) {
        uint64_t id = c->step_begin.seqs[i];
        uint32_t new_tokens = c->step_begin.new_tokens[i];
        ts_sequence *seq = ts_engine_sequence(e, c->pool, s, id, true, answer);
        if (seq == NULL)
            return i;
        if (new_tokens > pool->config.sequence_tokens_max - seq->length) {
            ts_refuse_more(
                answer, TS_EINVAL, seq->length, new_tokens, pool->config.sequence_tokens_max,
                "%u new tokens for sequence %llx of %u; the pool's limit is %u tokens a sequence",
                new_tokens, (unsigned long long)id, seq->length, pool->config.sequence_tokens_max);
            return i;
        }
        if (ids != NULL && new_tokens > 0 && *ids != TS_TOKEN_UNKNOWN && seq->space == TS_NONE &&
            !pool->books.index->off) {
            ts_refuse(answer, TS_EINVAL,
                      "token ids for sequence %llx, which has no namespace: name one when it is "
                      "made, or set model = in pool '%s'",
                      (unsigned long long)id, pool->config.name);
            return i;
        }
        if (ids != NULL)
            ids += new_tokens;
        uint32_t more = ts_step_blocks(&pool->seqs, &pool->books, seq, new_tokens);
        if (ts_sequence_reserve(seq, seq->num_blocks + more) != TS_OK) {
            ts_refuse(answer, TS_ENOMEM, "no memory for a block table of %u entries",
                      seq->num_blocks + more);
            return i;
        }
        n->blocks += more;
        n->tokens += new_tokens;
        n->pinned += seq->name != NULL ? more : 0;
        seq->step = TS_SEQUENCE_MARKED;
    }
    return i;
}

/* Whether the blocks can be had at all, sweeping and evicting included. */
static bool room_for(const ts_engine *e, const ts_session *s, uint32_t index, uint64_t blocks)
{
    const ts_engine_pool *pool = &e->pools[index];
    return pool->books.tenants[s->tenant].used + blocks <= pool->config.tenant_blocks_max &&
           blocks <= ts_pool_available(&pool->books, s->tenant);
}

/* Where room is short, tails that the sequence alone uses are to be written in place: the cache
 * loses them, and what the batch takes fits. */
static void save_copies(ts_engine *e, const ts_session *s, const ts_command *c, needs *n)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    if (room_for(e, s, c->pool, n->blocks))
        return;
    for (int pass = 0; pass < 2; pass++) {
        uint64_t saved = 0;
        for (uint32_t i = 0; i < c->step_begin.count; i++) {
            ts_sequence *seq = &pool->seqs.all[(uint32_t)c->step_begin.seqs[i]];
            if (!seq->borrowed_tail || c->step_begin.new_tokens[i] == 0)
                continue;
            uint32_t tail = seq->blocks[seq->num_blocks - 1];
            if (ts_pool_refs(&pool->books, tail) > 1 || !ts_index_is_leaf(pool->books.index, tail))
                continue;
            saved++;
            if (pass == 1) {
                seq->step = TS_SEQUENCE_IN_PLACE;
                n->pinned -= seq->name != NULL;
            }
        }
        if (saved == 0 || !room_for(e, s, c->pool, n->blocks - saved))
            return;
        if (pass == 1)
            n->blocks -= saved;
    }
}

/* Whether the tenant may have the blocks, what is cached counted as free. False: the answer
 * refuses, or the session waits for room, or it is TS_NEED_SWEEP: more comes free. */
static bool may_have(ts_engine *e, ts_session *s, const ts_command *c, uint64_t blocks,
                     ts_answer *answer)
{
    const ts_engine_pool *pool = &e->pools[c->pool];
    const ts_pool_books *books = &pool->books;
    const ts_pool_tenant *tenant = &books->tenants[s->tenant];
    const uint64_t most = pool->config.tenant_blocks_max;
    const bool is_small = blocks <= c->step_begin.count;
    const uint64_t withheld = ts_waits_withheld(e, s, c->pool, blocks, is_small);
    const uint64_t all_available = ts_pool_available(books, s->tenant);
    const uint64_t available =
        all_available - (withheld < all_available ? withheld : all_available);
    const bool over = tenant->used + blocks > most;
    if (!over && available >= blocks)
        return true;
    if (c->step_begin.wait && blocks <= most && blocks <= books->num_blocks) {
        ts_waits_for_room(e, s, c->pool, (uint32_t)blocks);
        ts_refuse(answer, TS_WAITS, "it waits for room");
    } else if (ts_engine_frees_more(e, c->pool) || e->closing != TS_NONE) {
        answer->status = TS_NEED_SWEEP;
    } else if (over) {
        ts_refuse_more(answer, TS_EQUOTA, tenant->used, blocks, most,
                       "uid %u uses %u blocks of pool '%s'; %llu more would pass its limit of %llu",
                       e->tenants[s->tenant], tenant->used, pool->config.name,
                       (unsigned long long)blocks, (unsigned long long)most);
    } else {
        ts_refuse(answer, TS_ENOSPC,
                  "%llu blocks are needed, but pool '%s' has %llu free for uid %u (of %u)",
                  (unsigned long long)blocks, pool->config.name, (unsigned long long)available,
                  e->tenants[s->tenant], books->num_blocks);
        answer->amounts = (ts_amounts){.needed = blocks,
                                       .free = available,
                                       .limit = books->num_blocks,
                                       .cached = tenant->cached,
                                       .pinned = tenant->pinned,
                                       .others = books->used - tenant->used};
    }
    return false;
}

/*
 * Makes room for `blocks` blocks by evicting cached ones: the tenant's own, and others' where that
 * empties whole slabs. True: the tenant needs new slabs as well, which it may not get
 * (no_new_slabs). False: it has the blocks, or the answer refuses and nothing was evicted, or it is
 * TS_NEED_SWEEP, since more must be evicted than one command may.
 */
static bool make_room(ts_engine *e, ts_session *s, const ts_command *c, uint64_t blocks,
                      ts_answer *answer)
{
    ts_pool_books *books = &e->pools[c->pool].books;
    const ts_pool_tenant *tenant = &books->tenants[s->tenant];
    const uint64_t most = e->pools[c->pool].config.tenant_blocks_max;
    const bool no_new_slabs = c->step_begin.no_new_slabs;
    if (!may_have(e, s, c, blocks, answer))
        return false;
    if (no_new_slabs && (uint64_t)tenant->free + tenant->cached < blocks)
        return true; /* evicting doesn't help */
    uint32_t budget = TS_SWEEP_ENTRIES;
    uint64_t all = (uint64_t)tenant->used + tenant->cached + blocks;
    if (all > most) /* what is cached counts too, and goes */
        ts_pool_evict(books, s->tenant, all - most, TS_EVICT_LIMIT, &budget);
    /* Beyond its share its own content goes first: the room of others isn't filled with it. */
    const uint32_t share = books->num_slabs / e->present_tenants;
    const bool has_share = tenant->slabs >= share;
    if (tenant->free < blocks && (has_share || no_new_slabs))
        ts_pool_evict(books, s->tenant, blocks - tenant->free, TS_EVICT_ROOM, &budget);
    uint64_t grantable = ts_pool_grantable(books, s->tenant);
    /* Another tenant's content, beyond that one's share, goes before one's own within it. */
    while (budget > 0 && tenant->free + grantable < blocks && !has_share &&
           ts_pool_empty_other(books, s->tenant, share, true, &budget))
        grantable = ts_pool_grantable(books, s->tenant);
    if (tenant->free + grantable < blocks)
        ts_pool_evict(books, s->tenant, blocks - tenant->free - grantable, TS_EVICT_ROOM, &budget);
    while (budget > 0 && tenant->free + grantable < blocks &&
           ts_pool_empty_other(books, s->tenant, share, false, &budget))
        grantable = ts_pool_grantable(books, s->tenant);
    if (budget == 0) {
        ts_engine_go_on_later(e, answer);
        return false;
    }
    return tenant->free < blocks;
}

/* Whether the blocks can be had: quotas first, then the pool. */
static void check_space(ts_engine *e, ts_session *s, const ts_command *c, needs *n,
                        ts_answer *answer)
{
    save_copies(e, s, c, n);
    uint64_t tokens = n->tokens, blocks = n->blocks;
    if (tokens == 0)
        return ts_refuse(answer, TS_EINVAL,
                         "a step of %u sequences has 0 new tokens; it needs at least 1",
                         c->step_begin.count);
    if (tokens > e->limits.step_tokens)
        return ts_refuse_beyond(answer, TS_EINVAL, tokens, e->limits.step_tokens,
                                "a step of %llu new tokens; the limit is %u",
                                (unsigned long long)tokens, e->limits.step_tokens);
    if (blocks > TS_COMMAND_ENTRIES)
        return ts_refuse_beyond(answer, TS_EINVAL, blocks, TS_COMMAND_ENTRIES,
                                "a step that takes %llu blocks; the limit is %u",
                                (unsigned long long)blocks, TS_COMMAND_ENTRIES);
    if (!ts_engine_check_entries(e, s, c->pool, blocks, answer) ||
        !ts_engine_check_pinned(e, s, c->pool, n->pinned, answer))
        return;
    if (!make_room(e, s, c, blocks, answer))
        return;
    answer->status = TS_NEED_SLABS;
    answer->need.pool = c->pool;
    answer->need.tenant = s->tenant;
}

static bool check_form(const ts_engine *e, const ts_session *s, const ts_command *c,
                       ts_answer *answer)
{
    const ts_geometry *g = &e->pools[c->pool].config.geometry;
    uint32_t heads = c->step_begin.heads;
    char why[160];
    if (c->step_begin.count == 0 || c->step_begin.count > e->limits.batch)
        ts_refuse_beyond(answer, TS_EINVAL, c->step_begin.count, e->limits.batch,
                         "a step of %u sequences; the limits are 1..%u", c->step_begin.count,
                         e->limits.batch);
    else if (heads % g->kv_heads != 0 || heads > TS_HEADS_MAX)
        ts_refuse_beyond(answer, TS_EINVAL, heads, TS_HEADS_MAX,
                         "%u query heads; they must be a multiple of the pool's %u KV heads, "
                         "at most %u",
                         heads, g->kv_heads, TS_HEADS_MAX);
    else if (ts_dtype_io_check(c->step_begin.io_dtype, g->dtype, why, sizeof why) != TS_OK)
        ts_refuse(answer, TS_EINVAL, "%s", why);
    else if (!isfinite(c->step_begin.scale) || c->step_begin.scale < 0)
        ts_refuse(answer, TS_EINVAL, "a scale of %g; it must be finite and not negative",
                  (double)c->step_begin.scale);
    else if (c->step_begin.kernel != TS_KERNEL_AUTO && !e->pools[c->pool].config.on_gpu)
        ts_refuse(answer, TS_EINVAL, "kernel %s runs on a GPU; pool '%s' is on %s",
                  ts_kernel_name(c->step_begin.kernel), e->pools[c->pool].config.name,
                  e->pools[c->pool].config.device);
    else if (ts_kernel_check(c->step_begin.kernel, g, e->pools[c->pool].config.warp_groups,
                             answer->message, sizeof answer->message) != TS_OK)
        answer->status = TS_EINVAL;
    else if (c->step_begin.append && !(s->writable_pools >> c->pool & 1))
        ts_refuse(answer, TS_EPERM,
                  "an append leaves K and V to the session, which didn't open pool '%s' to write",
                  e->pools[c->pool].config.name);
    else if (heads == 0 && !(s->writable_pools >> c->pool & 1))
        ts_refuse(
            answer, TS_EPERM,
            "a step with no_run leaves K and V to the session, which didn't open pool '%s' to "
            "write",
            e->pools[c->pool].config.name);
    else if (c->step_begin.priority < -1 || c->step_begin.priority > 1)
        ts_refuse(answer, TS_EINVAL, "a priority of %d; the limits are -1..1",
                  c->step_begin.priority);
    else if (s->steps >= e->limits.session_steps)
        ts_refuse_more(answer, TS_EQUOTA, s->steps, 1, e->limits.session_steps,
                       "the session has %u open steps; the limit is %u", s->steps,
                       e->limits.session_steps);
    return answer->status == TS_OK;
}

/* Room for what the answer will point to: three arrays of words and the copies. */
static bool reserve_answer(ts_engine *e, uint32_t count, uint64_t blocks)
{
    /* A sequence's touched blocks are those it takes, and its tail. */
    return ts_engine_grow((void **)&e->out_words, &e->out_words_capacity, 3ull * count + blocks,
                          sizeof *e->out_words) &&
           ts_engine_grow((void **)&e->out_copies, &e->out_copies_capacity, count,
                          sizeof *e->out_copies);
}

void ts_engine_step_copies(const ts_engine *e, const ts_step *step, ts_block_copy *copies,
                           uint32_t *count)
{
    const uint32_t block_tokens = e->pools[step->pool].seqs.block_tokens;
    *count = 0;
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        const ts_step_seq *part = &step->seqs[i];
        if (part->original != TS_NONE)
            copies[(*count)++] = (ts_block_copy){
                .src = part->original,
                .dst = part->table[ts_first_touched(part->start, part->new_tokens, block_tokens)]};
    }
}

static void fill_answer(ts_engine *e, const ts_step *step, ts_answer *answer)
{
    const ts_engine_pool *pool = &e->pools[step->pool];
    uint32_t block_tokens = pool->seqs.block_tokens;
    uint32_t *starts = e->out_words, *counts = starts + step->num_seqs;
    uint32_t *blocks = counts + step->num_seqs;
    answer->begun.step = step;
    answer->begun.starts = starts;
    answer->begun.counts = counts;
    answer->begun.blocks = blocks;
    answer->begun.num_seqs = step->num_seqs;
    answer->begun.copies = e->out_copies;
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        const ts_step_seq *part = &step->seqs[i];
        uint32_t first = ts_first_touched(part->start, part->new_tokens, block_tokens);
        uint32_t end = ts_blocks_for((uint64_t)part->start + part->new_tokens, block_tokens);
        starts[i] = part->start;
        counts[i] = end - first;
        for (uint32_t b = first; b < end; b++)
            blocks[answer->begun.num_blocks++] = part->table[b];
    }
    ts_engine_step_copies(e, step, e->out_copies, &answer->begun.num_copies);
}

/* Makes the step that was checked, of the sequences that were marked; NULL: the answer refuses. */
static ts_step *make_step(ts_engine *e, ts_session *s, const ts_command *c, const needs *n,
                          ts_answer *answer)
{
    const ts_pool_config *config = &e->pools[c->pool].config;
    uint32_t index = TS_NONE;
    if (reserve_answer(e, c->step_begin.count, n->blocks))
        index = step_new(e, s, c->step_begin.count);
    if (index == TS_NONE) {
        ts_refuse(answer, TS_ENOMEM, "no memory for a step of %u sequences", c->step_begin.count);
        return NULL;
    }
    ts_step *step = &e->steps[index];
    step->pool = c->pool;
    step->call = c->call;
    step->append = c->step_begin.append;
    step->heads = c->step_begin.heads;
    step->io_dtype = (ts_dtype)c->step_begin.io_dtype;
    step->scale = c->step_begin.scale > 0 ? c->step_begin.scale
                                          : 1.0f / sqrtf((float)config->geometry.head_dim);
    step->kernel = c->step_begin.kernel != TS_KERNEL_AUTO ? c->step_begin.kernel : config->kernel;
    step->tokens = (uint32_t)n->tokens;
    step->by_worker =
        config->on_gpu && (c->step_begin.by_worker || step->heads == 0) && !step->append;
    step->class = (uint8_t)(c->step_begin.priority + (int)TS_CLASS_NORMAL);
    return step;
}

/* Takes the blocks of all the step's sequences. */
static void take_blocks(ts_engine *e, ts_session *s, const ts_command *c, ts_step *step)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    /* An append's K and V are written later: nobody is to find them. */
    const uint32_t *ids = step->append ? NULL : c->step_begin.tokens;
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        ts_step_seq *part = &step->seqs[i];
        ts_sequence *seq = &pool->seqs.all[(uint32_t)c->step_begin.seqs[i]];
        if (seq->step == TS_SEQUENCE_IN_PLACE)
            seq->borrowed_tail = false;
        part->seq = (uint32_t)c->step_begin.seqs[i];
        part->new_tokens = c->step_begin.new_tokens[i];
        ts_step_take(&pool->seqs, &pool->books, part, (uint32_t)(step - e->steps),
                     (uint32_t)(s - e->sessions), ids);
        if (seq->claim != TS_NONE || part->known > 0)
            ts_claims_step_begun(e, s, c->pool, part->seq, ids, part->known, part->new_tokens);
        ts_sequence_refresh_life(&pool->seqs, seq, e->now_ms);
        if (ids != NULL)
            ids += part->new_tokens;
        s->blocks += part->reserved + (part->original != TS_NONE);
    }
}

void ts_engine_step_begin(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    if (!check_form(e, s, c, answer))
        return;
    needs n = {0};
    ts_step *step = NULL;
    const uint32_t marked = mark_batch(e, s, c, &n, answer);
    if (answer->status == TS_OK)
        check_space(e, s, c, &n, answer);
    if (answer->status == TS_OK)
        step = make_step(e, s, c, &n, answer);
    if (step == NULL) {
        for (uint32_t i = 0; i < marked; i++)
            pool->seqs.all[(uint32_t)c->step_begin.seqs[i]].step = TS_NONE;
        return;
    }
    take_blocks(e, s, c, step);
    if (s->wait.kind == TS_WAIT_ROOM)
        pool->room_turn = s->tenant + 1;
    pool->open_steps++;
    fill_answer(e, step, answer);
    if (answer->begun.num_copies > 0) {
        step->in_flight = 1;
        step->copying = true;
    } else if (step->append) {
        ts_engine_step_settle(e, step, NULL, true);
        answer->begun.step = NULL;
    }
}

void ts_engine_step_end(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_step *step = ts_engine_own_step(e, s, c->step_end.step, answer);
    if (step == NULL)
        return;
    const ts_engine_pool *pool = &e->pools[step->pool];
    uint32_t layers = pool->config.geometry.layers;
    if (step->in_flight > 0 && c->op == TS_OP_STEP_ABORT && c->step_end.once_idle) {
        step->aborted = true;
        return;
    }
    if (step->in_flight > 0)
        return ts_refuse(answer, TS_EBUSY, "step %llx has %u runs in flight",
                         (unsigned long long)step->id, step->in_flight);
    if (c->op == TS_OP_STEP_ABORT)
        return ts_engine_step_abort(e, step);

    const uint32_t *accepted = c->step_end.accepted;
    uint64_t kept = 0;
    if (accepted != NULL && c->step_end.count != step->num_seqs)
        return ts_refuse_beyond(answer, TS_EINVAL, c->step_end.count, step->num_seqs,
                                "%u accepted counts for a step of %u sequences", c->step_end.count,
                                step->num_seqs);
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        uint32_t n = accepted != NULL ? accepted[i] : step->seqs[i].new_tokens;
        if (n > step->seqs[i].new_tokens)
            return ts_refuse_beyond(answer, TS_EINVAL, n, step->seqs[i].new_tokens,
                                    "%u tokens accepted of the %u that sequence %u of the "
                                    "step has",
                                    n, step->seqs[i].new_tokens, i);
        kept += n;
    }
    if (kept > 0 && step->failed != TS_OK)
        return ts_refuse(answer, step->failed, "the run of layer %u of step %llx failed: %s",
                         step->failed_layer, (unsigned long long)step->id,
                         ts_status_name(step->failed));
    /* Nobody may see a token whose K and V were not written in every layer. */
    if (kept > 0 && step->layers.count > 0 && step->layers.count < layers)
        return ts_refuse(answer, TS_EINVAL, "only %u of %u layers of step %llx were run",
                         step->layers.count, layers, (unsigned long long)step->id);
    if (kept > 0 && step->layers.count == 0 && !(s->writable_pools >> step->pool & 1))
        return ts_refuse(answer, TS_EPERM,
                         "no layer of step %llx was run, and the session didn't open pool '%s' to "
                         "write: its tokens have no K and V",
                         (unsigned long long)step->id, pool->config.name);
    ts_engine_step_settle(e, step, accepted, true);
}
