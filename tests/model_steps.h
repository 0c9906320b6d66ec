/* The naive model of test_model.c: steps. */
#ifndef TS_MODEL_STEPS_H
#define TS_MODEL_STEPS_H

#include "model_world.h"

/* References to the block from all sequences' tables, without asking the pool. */
static uint32_t count_refs(const world *w, uint32_t block)
{
    uint32_t refs = 0;
    const ts_sequences *all = &w->e->pools[0].seqs;
    for (uint32_t i = 0; i < all->count; i++) {
        if (all->all[i].tenant == TS_NONE)
            continue;
        for (uint32_t b = 0; b < all->all[i].num_blocks; b++)
            refs += all->all[i].blocks[b] == block;
    }
    for (uint32_t i = 0; i < w->e->num_steps; i++) {
        const ts_step *step = &w->e->steps[i];
        for (uint32_t j = 0; step->live && j < step->num_seqs; j++) {
            refs += step->seqs[j].original == block;
            for (uint32_t b = 0; b < step->seqs[j].reserved; b++)
                refs += step->seqs[j].table[ts_blocks_for(step->seqs[j].start, BLOCK_TOKENS) + b] ==
                        block;
        }
    }
    return refs;
}

/* Blocks the uid could get: in slabs that hold nobody else's block. */
static uint32_t count_available(const world *w, uint32_t uid)
{
    uint32_t available = 0;
    for (uint32_t slab = 0; slab * SLAB_BLOCKS < NUM_BLOCKS; slab++) {
        uint32_t free_blocks = 0, used = 0;
        for (uint32_t b = slab * SLAB_BLOCKS; b < (slab + 1) * SLAB_BLOCKS && b < NUM_BLOCKS; b++)
            if (count_refs(w, b) == 0)
                free_blocks++;
            else
                used++;
        uint32_t tenant = w->e->pools[0].books.slabs[slab].tenant;
        if (used == 0 || w->e->tenants[tenant] == uid)
            available += free_blocks;
    }
    return available;
}

/* Whether there is room for the step, if found tails that nobody else uses are written in place. */
static bool has_room(const world *w, int session, const model_step *step)
{
    uint32_t needed = 0, can_save = 0;
    for (uint32_t i = 0; i < step->count; i++) {
        const model_seq *s = &w->seqs[step->seqs[i]];
        const ts_sequence *real = ts_sequence_find(&w->e->pools[0].seqs, s->id);
        needed += (s->length + step->new_tokens[i] + BLOCK_TOKENS - 1) / BLOCK_TOKENS -
                  (s->length + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        if (s->length % BLOCK_TOKENS != 0 && step->new_tokens[i] > 0) {
            uint32_t tail = real->blocks[s->length / BLOCK_TOKENS];
            bool shared =
                count_refs(w, tail) > 1 || !ts_index_is_leaf(w->e->pools[0].books.index, tail);
            needed += shared || real->borrowed_tail;
            can_save += !shared && real->borrowed_tail;
        }
    }
    return needed - can_save <= count_available(w, uid_of(session));
}

/* What the model expects of a begin but for the room. `ids` gets the sequences', `given` the
 * tokens'. Counts those whose ids will be known. */
static ts_status expect_begin(const world *w, int session, model_step *step, uint64_t *ids,
                              uint32_t *given)
{
    uint32_t tokens = 0, num_given = 0;
    ts_status expected = TS_OK;
    for (uint32_t i = 0; i < step->count; i++) {
        const model_seq *s = &w->seqs[step->seqs[i]];
        bool leading = s->known == s->length;
        ids[i] = s->id;
        step->known[i] = 0;
        for (uint32_t t = 0; t < step->new_tokens[i]; t++) {
            given[num_given++] = step->ids[i][t];
            leading = leading && step->ids[i][t] != TS_TOKEN_UNKNOWN;
            step->known[i] += leading;
        }
        ts_status one = s->live ? expected_use(w, session, step->seqs[i], true) : TS_ENOENT;
        for (uint32_t j = 0; j < i && one == TS_OK; j++)
            if (step->seqs[j] == step->seqs[i])
                one = TS_EINVAL; /* twice */
        if (one == TS_OK && s->length + step->new_tokens[i] > LENGTH_MAX)
            one = TS_EINVAL;
        if (one == TS_OK && s->space == 0 && step->new_tokens[i] > 0 &&
            step->ids[i][0] != TS_TOKEN_UNKNOWN)
            one = TS_EINVAL; /* it has no namespace */
        tokens += step->new_tokens[i];
        if (expected == TS_OK)
            expected = one;
    }
    return expected == TS_OK && tokens == 0 ? TS_EINVAL : expected;
}

/* A place for a step, or NULL. */
static model_step *free_step(world *w)
{
    for (int i = 0; i < (int)STEPS; i++)
        if (!w->steps[i].live)
            return &w->steps[i];
    return NULL;
}

/* The begin of the session's wait; it may wait (still) if it says so. */
static void try_begin(world *w, int session, bool wait, bool again)
{
    ts_answer answer;
    model_wait *m = &w->waits[session];
    model_step *step = free_step(w);
    model_step planned = m->step;
    uint64_t ids[BATCH_MAX];
    uint32_t given[BATCH_MAX * 8];
    ts_status expected = expect_begin(w, session, &planned, ids, given);
    bool short_of_room = expected == TS_OK && !has_room(w, session, &planned);
    const bool others_wait = w->e->pools[0].room.first != TS_NONE;
    ts_command c = {.op = TS_OP_STEP_BEGIN,
                    .session = w->sessions[session],
                    .again = again,
                    .step_begin = {.seqs = ids,
                                   .new_tokens = planned.new_tokens,
                                   .count = planned.count,
                                   .heads = 1,
                                   .tokens = m->gives_ids ? given : NULL,
                                   .wait = wait,
                                   .priority = (int32_t)(planned.new_tokens[0] % 3) - 1}};
    m->kind = WAITS_FOR_NOTHING;
    ts_status status = run(w, c, &answer);
    if (status == TS_NEED_SWEEP) { /* what is over makes room */
        assert_true((short_of_room || others_wait) && ts_engine_sweeps(w->e));
        assert_int_equal(sweep_all(w->e), 1);
        short_of_room = !has_room(w, session, &planned);
        status = run(w, c, &answer);
        w->done[18]++;
    }
    if (status == TS_WAITS) {
        assert_true(wait && expected == TS_OK && (short_of_room || others_wait));
        m->kind = WAITS_FOR_ROOM;
        w->done[21]++;
        return;
    }
    if (expected == TS_OK && (short_of_room || (others_wait && status == TS_ENOSPC)))
        expected = TS_ENOSPC; /* what others wait for isn't to be had */
    assert_int_equal(status, expected);
    if (status != TS_OK)
        return;
    w->done[22] += again;
    *step = planned;
    step->session = session;
    step->live = true;
    step->id = answer.begun.step->id;
    step->copying = answer.begun.num_copies > 0;
    step->num_copies = answer.begun.num_copies;
    memcpy(step->copies, answer.begun.copies,
           answer.begun.num_copies * sizeof *answer.begun.copies);
    for (uint32_t i = 0; i < step->count; i++)
        w->seqs[step->seqs[i]].step = (int)(step - w->steps);
    w->done[4]++;
}

static void op_begin(world *w, int session)
{
    model_wait *m = &w->waits[session];
    m->step = (model_step){.count = 1 + rng_below(&w->r, BATCH_MAX)};
    m->gives_ids = rng_below(&w->r, 4) != 0;
    for (uint32_t i = 0; i < m->step.count; i++) {
        int seq = pick_seq(w);
        /* Prefer what the session may use: most batches should be good ones. */
        for (int tries = 0; tries < 12 && (seq < 0 || expected_use(w, session, seq, true)); tries++)
            seq = pick_seq(w);
        if (seq < 0 || free_step(w) == NULL)
            return;
        m->step.seqs[i] = seq;
        m->step.new_tokens[i] = rng_below(&w->r, 8);
        for (uint32_t t = 0; t < m->step.new_tokens[i]; t++) {
            bool unknown = !m->gives_ids || w->seqs[seq].space == 0 || rng_below(&w->r, 30) == 0;
            m->step.ids[i][t] = unknown ? TS_TOKEN_UNKNOWN : rng_below(&w->r, 2);
        }
        if (w->seqs[seq].space == 0 && m->gives_ids && m->step.new_tokens[i] > 0 &&
            rng_below(&w->r, 100) == 0)
            m->step.ids[i][0] = 1; /* it has no namespace */
    }
    try_begin(w, session, rng_below(&w->r, 3) == 0, false);
}

/* What token t of the step's sequence i comes to. */
static uint32_t value_in(world *w, const model_step *step, uint32_t i, uint32_t t)
{
    const model_seq *s = &w->seqs[step->seqs[i]];
    uint32_t ids[LENGTH_MAX];
    if (t >= step->known[i])
        return ++w->next_value;
    memcpy(ids, s->ids, s->length * sizeof *ids);
    memcpy(ids + s->length, step->ids[i], (t + 1) * sizeof *ids);
    return value_of(s->uid, s->space, ids, s->length + t + 1);
}

/* Makes a step's copies and writes its tokens into their slots, as kernels would. */
static void write_step(world *w, model_step *step)
{
    if (step->copying) {
        for (uint32_t c = 0; c < step->num_copies; c++)
            memcpy(&w->memory[step->copies[c].dst * BLOCK_TOKENS],
                   &w->memory[step->copies[c].src * BLOCK_TOKENS], BLOCK_TOKENS * sizeof(uint32_t));
        assert_int_equal(step_done(w->e, step->id, TS_NONE), TS_OK);
        step->copying = false;
    }
    const ts_step *real = ts_engine_find_step(w->e, step->id);
    for (uint32_t i = 0; i < step->count; i++)
        for (uint32_t t = 0; t < step->new_tokens[i]; t++) {
            uint32_t at = real->seqs[i].start + t;
            step->values[i][t] = value_in(w, step, i, t);
            w->memory[real->seqs[i].table[at / BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS] =
                step->values[i][t];
        }
}

static void op_end(world *w)
{
    model_step *step = &w->steps[rng_below(&w->r, STEPS)];
    if (!step->live || w->waits[step->session].kind != WAITS_FOR_NOTHING)
        return;
    uint64_t session = w->sessions[step->session];
    if (step->copying && rng_below(&w->r, 4) == 0) {
        assert_int_equal(step_end(w->e, session, TS_OP_STEP_COMMIT, step->id, NULL, 0), TS_EBUSY);
        return;
    }
    write_step(w, step);
    bool commit = rng_below(&w->r, 4) != 0;
    uint32_t accepted[BATCH_MAX];
    bool all = rng_below(&w->r, 2);
    for (uint32_t i = 0; i < step->count; i++)
        accepted[i] = !commit ? 0
                      : all   ? step->new_tokens[i]
                              : rng_below(&w->r, step->new_tokens[i] + 1);
    assert_int_equal(commit ? step_end(w->e, session, TS_OP_STEP_COMMIT, step->id,
                                       all ? NULL : accepted, step->count)
                            : step_end(w->e, session, TS_OP_STEP_ABORT, step->id, NULL, 0),
                     TS_OK);
    for (uint32_t i = 0; i < step->count; i++) {
        model_seq *s = &w->seqs[step->seqs[i]];
        memcpy(s->tokens + s->length, step->values[i], accepted[i] * sizeof(uint32_t));
        memcpy(s->ids + s->length, step->ids[i], accepted[i] * sizeof(uint32_t));
        s->known += accepted[i] < step->known[i] ? accepted[i] : step->known[i];
        s->length += accepted[i];
        s->step = -1;
        refresh(w, s);
        verify_seq(w, step->seqs[i]);
    }
    step->live = false;
    w->done[commit ? 5 : 6]++;
}

#endif
