/* Selection: some sequences go on, several times perhaps, and the others go. */
#include "engine_internal.h"

#include <stdlib.h>
#include <string.h>

/* What a selection comes to. */
typedef struct selection {
    uint32_t forks, given_up;           /* losers of the session's own: a kept one isn't its */
    uint64_t fork_blocks, loser_blocks; /* entries of block tables */
    uint64_t given_up_blocks;
    uint32_t *uses,
        *first;        /* of each sequence: how often it is picked, and which pick is the first */
    uint32_t **tables; /* of each pick that is a fork */
} selection;

static uint64_t more(uint64_t wanted, uint64_t given_up)
{
    return wanted > given_up ? wanted - given_up : 0;
}

/* Looks all up, marks them, and counts. Returns how many were marked; the answer refuses if that is
 * not all. */
static uint32_t mark(ts_engine *e, ts_session *s, const ts_command *c, selection *x,
                     ts_answer *answer)
{
    const uint32_t count = c->seq_select.count;
    uint32_t marked = 0;
    for (uint32_t i = 0; i < c->seq_select.picked; i++) {
        if (c->seq_select.from[i] >= count) {
            ts_refuse(answer, TS_EINVAL, "pick %u is sequence %u of a selection of %u", i,
                      c->seq_select.from[i], count);
            return 0;
        }
        const uint32_t from = c->seq_select.from[i];
        if (x->uses[from]++ == 0)
            x->first[from] = i;
        else
            x->forks++;
    }
    for (; marked < count; marked++) {
        ts_sequence *seq =
            ts_engine_sequence(e, c->pool, s, c->seq_select.seqs[marked], true, answer);
        if (seq == NULL)
            break;
        seq->step = TS_SEQUENCE_MARKED;
        if (x->uses[marked] > 1)
            x->fork_blocks += (uint64_t)(x->uses[marked] - 1) * seq->num_blocks;
        x->loser_blocks += x->uses[marked] == 0 ? seq->num_blocks : 0;
        if (x->uses[marked] == 0 && seq->owner != TS_NONE) {
            x->given_up++;
            x->given_up_blocks += seq->num_blocks;
        }
    }
    return marked;
}

/* Whether the quotas allow it, what is given up counted; makes room for ids. */
static bool check(ts_engine *e, ts_session *s, const ts_command *c, const selection *x,
                  ts_answer *answer)
{
    if (x->fork_blocks > TS_COMMAND_ENTRIES || x->loser_blocks > TS_COMMAND_ENTRIES) {
        ts_refuse(answer, TS_EINVAL,
                  "a selection that makes %llu block table entries and gives up %llu; one call "
                  "makes and gives up to %u",
                  (unsigned long long)x->fork_blocks, (unsigned long long)x->loser_blocks,
                  TS_COMMAND_ENTRIES);
        return false;
    }
    const uint32_t sequences = (uint32_t)more(x->forks, x->given_up);
    if (!ts_engine_check_entries(e, s, c->pool, more(x->fork_blocks, x->given_up_blocks), answer) ||
        (sequences > 0 && !ts_engine_reserve_sequences(e, s, c->pool, sequences, answer)))
        return false;
    if (!ts_engine_grow((void **)&e->out_ids, &e->out_ids_capacity, c->seq_select.picked,
                        sizeof *e->out_ids))
        ts_refuse(answer, TS_ENOMEM, "no memory for an answer of %u sequences",
                  c->seq_select.picked);
    return answer->status == TS_OK;
}

static uint32_t capacity_of(const ts_sequence *parent)
{
    return parent->num_blocks < 4 ? 4 : parent->num_blocks;
}

static bool make_tables(ts_engine *e, const ts_command *c, selection *x, ts_answer *answer)
{
    for (uint32_t i = 0; i < c->seq_select.picked; i++) {
        const uint32_t from = c->seq_select.from[i];
        if (x->first[from] == i)
            continue;
        const ts_sequence *parent =
            ts_sequence_find(&e->pools[c->pool].seqs, c->seq_select.seqs[from]);
        x->tables[i] = malloc(capacity_of(parent) * sizeof **x->tables);
        if (x->tables[i] == NULL)
            ts_refuse(answer, TS_ENOMEM, "no memory for %u block tables", x->forks);
    }
    return answer->status == TS_OK;
}

static void carry_out(ts_engine *e, ts_session *s, const ts_command *c, selection *x)
{
    ts_engine_pool *pool = &e->pools[c->pool];
    const uint64_t *seqs = c->seq_select.seqs;
    uint32_t entries = TS_COMMAND_ENTRIES;
    for (uint32_t i = 0; i < c->seq_select.count; i++)
        if (x->uses[i] == 0)
            ts_engine_free_sequence(e, c->pool, ts_sequence_find(&pool->seqs, seqs[i]), &entries);
    for (uint32_t i = 0; i < c->seq_select.picked; i++) {
        const uint64_t id = seqs[c->seq_select.from[i]];
        const ts_sequence *picked = ts_sequence_find(&pool->seqs, id);
        e->out_ids[i] = id;
        ts_sequence_refresh_life(&pool->seqs, picked, e->now_ms);
        if (x->tables[i] == NULL)
            continue;
        const uint32_t space = picked->space;
        ts_sequence *child = ts_engine_new_sequence(e, s, c->pool, space, i);
        const ts_sequence *parent = ts_sequence_find(&pool->seqs, id);
        child->blocks = x->tables[i];
        child->capacity = capacity_of(parent);
        x->tables[i] = NULL;
        ts_sequence_share(&pool->seqs, &pool->books, parent, parent->length, TS_NONE, child);
        s->blocks += child->num_blocks;
    }
}

void ts_engine_seq_select(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    const uint32_t count = c->seq_select.count, picked = c->seq_select.picked;
    if (count == 0 || count > e->limits.batch || picked == 0 || picked > e->limits.batch)
        return ts_refuse_beyond(answer, TS_EINVAL, count > picked ? count : picked, e->limits.batch,
                                "a selection of %u of %u sequences; the limits are 1..%u", picked,
                                count, e->limits.batch);
    selection x = {.uses = calloc(count, sizeof *x.uses),
                   .first = calloc(count, sizeof *x.first),
                   .tables = calloc(picked, sizeof *x.tables)};
    const bool has_room = x.uses != NULL && x.first != NULL && x.tables != NULL;
    uint32_t marked = 0;
    if (has_room)
        marked = mark(e, s, c, &x, answer);
    else
        ts_refuse(answer, TS_ENOMEM, "no memory for a selection of %u sequences", count);
    for (uint32_t i = 0; i < marked; i++)
        ts_sequence_find(&e->pools[c->pool].seqs, c->seq_select.seqs[i])->step = TS_NONE;
    if (has_room && answer->status == TS_OK && check(e, s, c, &x, answer) &&
        make_tables(e, c, &x, answer)) {
        carry_out(e, s, c, &x);
        answer->seqs.seqs = e->out_ids;
        answer->seqs.count = picked;
    }
    for (uint32_t i = 0; x.tables != NULL && i < picked; i++)
        free(x.tables[i]);
    free(x.tables);
    free(x.uses);
    free(x.first);
}
