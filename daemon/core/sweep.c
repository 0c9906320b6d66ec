/* What is freed bit by bit: sessions that close, sequences whose time is over or that have no
 * owner, removed pools. */
#include "claim_ops.h"
#include "engine_internal.h"

#include <stdlib.h>

#define END_ENTRIES 16u /* of block tables: what ending a sequence costs beside its own */

static void grave_free(ts_engine *e)
{
    ts_engine_grave *grave = e->graves;
    e->graves = grave->next;
    ts_sequences_fini(&grave->seqs);
    free(grave);
}

void ts_engine_forget_graves(ts_engine *e)
{
    while (e->graves != NULL)
        grave_free(e);
}

void ts_engine_bury(ts_engine *e, ts_sequences *seqs)
{
    ts_engine_grave *grave = malloc(sizeof *grave);
    if (grave == NULL) /* then it takes as long as it takes */
        return ts_sequences_fini(seqs);
    *grave = (ts_engine_grave){.next = e->graves, .seqs = *seqs};
    e->graves = grave;
}

bool ts_engine_frees_more(const ts_engine *e, uint32_t pool)
{
    const ts_sequences *seqs = &e->pools[pool].seqs;
    return seqs->dying != TS_NONE || ts_sequences_first_over(seqs, e->now_ms) != NULL;
}

bool ts_engine_ends_by(const ts_engine *e, uint64_t now_ms)
{
    bool ends = false;
    for (uint32_t i = 0; i < e->num_pools && !ends; i++)
        ends =
            ts_engine_has_pool(e, i) && ts_sequences_first_over(&e->pools[i].seqs, now_ms) != NULL;
    return ends;
}

static bool has_retired(const ts_pool_books *books)
{
    uint32_t near = TS_NO_BLOCK;
    return books->index != NULL && ts_index_retired_leaf(books->index, &near) != TS_NO_BLOCK;
}

void ts_engine_go_on_later(ts_engine *e, ts_answer *answer)
{
    e->wants_sweep = true;
    ts_refuse(answer, TS_NEED_SWEEP, "it goes on bit by bit");
}

bool ts_engine_sweeps(const ts_engine *e)
{
    bool sweeps = e->wants_sweep || e->closing != TS_NONE || e->graves != NULL;
    for (uint32_t i = 0; i < e->num_pools && !sweeps; i++)
        sweeps = ts_engine_has_pool(e, i) &&
                 (ts_engine_frees_more(e, i) || has_retired(&e->pools[i].books));
    return sweeps;
}

/* Ends what of the pool has had its time; how many of the entries are left over. */
static uint32_t end_lives(ts_engine *e, uint32_t pool, uint32_t entries)
{
    ts_sequence *seq;
    while (entries > 0 &&
           (seq = ts_sequences_first_over(&e->pools[pool].seqs, e->now_ms)) != NULL) {
        ts_engine_free_sequence(e, pool, seq, &entries);
        entries -= entries < END_ENTRIES ? entries : END_ENTRIES;
    }
    return entries;
}

void ts_engine_sweep(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)s;
    (void)c;
    (void)answer;
    uint32_t left = TS_SWEEP_ENTRIES;
    e->wants_sweep = false;
    ts_claims_end_idle(e);
    while (left > 0 && e->closing != TS_NONE) {
        ts_session *closing = &e->sessions[e->closing];
        e->closing = closing->next_closing;
        closing->in_closing = false;
        left = ts_engine_reclaim(e, closing, left); /* which puts it back if that isn't enough */
    }
    for (uint32_t i = 0; i < e->num_pools && left > 0; i++)
        if (ts_engine_has_pool(e, i)) {
            left = end_lives(e, i, left);
            if (e->pools[i].books.index != NULL)
                ts_pool_drop_retired(&e->pools[i].books, &left);
            left = ts_sequences_sweep(&e->pools[i].seqs, &e->pools[i].books, left);
        }
    while (left > 0 && e->graves != NULL) {
        left = ts_sequences_free_some(&e->graves->seqs, left);
        if (left > 0)
            grave_free(e);
    }
}
