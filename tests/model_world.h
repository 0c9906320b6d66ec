/* The naive model of test_model.c: its sequences, its steps, and each kind of command on them. */
#ifndef TS_MODEL_WORLD_H
#define TS_MODEL_WORLD_H

#include "engine_util.h"

#define BLOCK_TOKENS 3u
#define NUM_BLOCKS 61u
#define SLAB_BLOCKS 5u
#define UIDS 3u
#define SESSIONS 6u
#define SEQS 48u
#define STEPS 6u
#define LENGTH_MAX 40u
#define BATCH_MAX 5u

typedef struct model_seq {
    bool live;
    uint64_t id;
    uint32_t uid;
    int owner; /* slot of its session; -1: kept, or on a ticket */
    int name;  /* 0..7, or -1 */
    int step;  /* slot of the open step it is in, or -1 */
    uint32_t length, known;
    uint32_t tokens[LENGTH_MAX], ids[LENGTH_MAX];
    int space;       /* 1 or 2; 0: none */
    bool dropped;    /* its namespace was: nothing of it is found */
    uint32_t ticket; /* 0: it is on none */
    uint64_t ttl;    /* 0: its time has no end */
    uint64_t end;    /* of its time, unless it is in a step */
} model_seq;

typedef struct model_step {
    bool live, copying;
    uint64_t id;
    int session;
    uint32_t count;
    int seqs[BATCH_MAX];
    uint32_t new_tokens[BATCH_MAX], known[BATCH_MAX];
    uint32_t values[BATCH_MAX][LENGTH_MAX], ids[BATCH_MAX][LENGTH_MAX];
    ts_block_copy copies[BATCH_MAX];
    uint32_t num_copies;
} model_step;

/* What a session waits for: the command, to be given again. */
typedef struct model_wait {
    enum { WAITS_FOR_NOTHING, WAITS_FOR_MATCH, WAITS_FOR_ROOM } kind;
    uint32_t ids[LENGTH_MAX], count; /* of the prompt */
    int space;
    model_step step; /* of a begin: what it adds to which sequences */
    bool gives_ids;
} model_wait;

typedef struct world {
    ts_engine *e;
    rng r;
    uint64_t sessions[SESSIONS]; /* 0: closed */
    model_wait waits[SESSIONS];
    model_seq seqs[SEQS];
    model_step steps[STEPS];
    uint32_t memory[NUM_BLOCKS * BLOCK_TOKENS];
    uint32_t next_value;
    uint32_t next_ticket;
    uint64_t now;
    uint64_t done[27], refused; /* how often each kind of command succeeded */
    uint64_t matched;           /* tokens */
} world;

static uint32_t uid_of(int session)
{
    return (uint32_t)session % UIDS;
}

static void wipe_slab(void *arg, uint32_t pool, uint32_t slab)
{
    (void)pool;
    world *w = arg;
    for (uint32_t b = slab * SLAB_BLOCKS; b < (slab + 1) * SLAB_BLOCKS && b < NUM_BLOCKS; b++)
        for (uint32_t t = 0; t < BLOCK_TOKENS; t++)
            w->memory[b * BLOCK_TOKENS + t] = 0;
}

static ts_status run(world *w, ts_command c, ts_answer *answer)
{
    c.now_ms = w->now;
    ts_status status = apply_with(w->e, &c, answer, wipe_slab, w);
    w->refused += status != TS_OK;
    assert_true(status == TS_NEED_SWEEP || (status == TS_OK) == (answer->message[0] == '\0'));
    return status;
}

static const ts_space_name spaces[] = {{NULL, 0}, {"one", 3}, {"t\0w", 3}};

/* What the token at the end of these ids comes to. */
static uint32_t value_of(uint32_t uid, int space, const uint32_t *ids, uint32_t count)
{
    uint64_t h = uid * 977u + (uint64_t)space;
    for (uint32_t i = 0; i < count; i++)
        h = (h ^ (ids[i] + 1)) * 1099511628211u + 14695981039346656037u;
    return (uint32_t)(h >> 32) | 0x80000000u;
}

/* A session slot that is open and doesn't wait, or -1. */
static int pick_session(world *w)
{
    int i = (int)rng_below(&w->r, SESSIONS);
    return w->sessions[i] != 0 && w->waits[i].kind == WAITS_FOR_NOTHING ? i : -1;
}

static int pick_seq(world *w)
{
    int i = (int)rng_below(&w->r, SEQS);
    return w->seqs[i].live ? i : -1;
}

static int free_slot(world *w)
{
    for (int i = 0; i < (int)SEQS; i++)
        if (!w->seqs[i].live)
            return i;
    return -1;
}

static bool may_use(const world *w, int session, int seq)
{
    const model_seq *s = &w->seqs[seq];
    return s->uid == uid_of(session) && (s->owner == -1 || s->owner == session);
}

/* What the model expects of using this sequence. */
static ts_status expected_use(const world *w, int session, int seq, bool change)
{
    const model_seq *s = &w->seqs[seq];
    if (s->uid != uid_of(session) || s->ticket != 0)
        return TS_ENOENT;
    if (!may_use(w, session, seq))
        return TS_EPERM;
    return change && s->step >= 0 ? TS_EBUSY : TS_OK;
}

/* The sequence is used, or its step ends: its time begins anew. */
static void refresh(const world *w, model_seq *s)
{
    s->end = w->now + s->ttl;
}

static void verify_seq(world *w, int seq)
{
    const model_seq *s = &w->seqs[seq];
    const ts_sequence *real = ts_sequence_find(&w->e->pools[0].seqs, s->id);
    assert_non_null(real);
    assert_int_equal(real->length, s->length);
    assert_int_equal(real->num_blocks, (s->length + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
    /* In an open step whose copies aren't made yet, the tail is read from the original. */
    uint32_t original = TS_NONE;
    if (s->step >= 0 && w->steps[s->step].copying) {
        const ts_step *step = ts_engine_find_step(w->e, w->steps[s->step].id);
        for (uint32_t i = 0; i < step->num_seqs; i++)
            if (w->steps[s->step].seqs[i] == seq)
                original = step->seqs[i].original;
    }
    for (uint32_t t = 0; t < s->length; t++) {
        uint32_t block = real->blocks[t / BLOCK_TOKENS];
        if (original != TS_NONE && t / BLOCK_TOKENS == real->num_blocks - 1)
            block = original;
        assert_int_equal(w->memory[block * BLOCK_TOKENS + t % BLOCK_TOKENS], s->tokens[t]);
    }
}

static void op_session(world *w)
{
    ts_answer answer;
    int i = (int)rng_below(&w->r, SESSIONS);
    if (w->sessions[i] == 0) {
        w->sessions[i] = session_new(w->e, uid_of(i));
        w->done[0]++;
        return;
    }
    if (rng_below(&w->r, 8) != 0) /* mostly leave it be */
        return;
    assert_int_equal(
        run(w, (ts_command){.op = TS_OP_SESSION_CLOSE, .session = w->sessions[i]}, &answer), TS_OK);
    for (int s = 0; s < (int)STEPS; s++) {
        model_step *step = &w->steps[s];
        if (!step->live || step->session != i)
            continue;
        if (step->copying) { /* the kernel finishes, then the engine lets go */
            for (uint32_t c = 0; c < step->num_copies; c++)
                memcpy(&w->memory[step->copies[c].dst * BLOCK_TOKENS],
                       &w->memory[step->copies[c].src * BLOCK_TOKENS],
                       BLOCK_TOKENS * sizeof(uint32_t));
            assert_int_equal(step_done(w->e, step->id, TS_NONE), TS_OK);
        }
        step->live = false;
        for (uint32_t j = 0; j < step->count; j++) {
            w->seqs[step->seqs[j]].step = -1;
            refresh(w, &w->seqs[step->seqs[j]]);
        }
    }
    for (int s = 0; s < (int)SEQS; s++)
        if (w->seqs[s].live && w->seqs[s].owner == i)
            w->seqs[s].live = false;
    w->sessions[i] = 0;
    w->waits[i].kind = WAITS_FOR_NOTHING;
    w->done[1]++;
}

static void op_create(world *w, int session)
{
    ts_answer answer;
    int slot = free_slot(w), space = (int)rng_below(&w->r, 3);
    if (slot < 0)
        return;
    assert_int_equal(run(w,
                         (ts_command){.op = TS_OP_SEQ_CREATE,
                                      .session = w->sessions[session],
                                      .seq_create = {.count = 1, .space = spaces[space]}},
                         &answer),
                     TS_OK);
    w->seqs[slot] = (model_seq){.live = true,
                                .id = answer.seqs.seqs[0],
                                .uid = uid_of(session),
                                .owner = session,
                                .name = -1,
                                .step = -1,
                                .space = space};
    w->done[2]++;
}

static void op_fork(world *w, int session)
{
    ts_answer answer;
    int slot = free_slot(w), parent = pick_seq(w);
    if (slot < 0 || parent < 0)
        return;
    model_seq *p = &w->seqs[parent];
    uint32_t length = rng_below(&w->r, 2) ? rng_below(&w->r, p->length + 2) : p->length;
    ts_status expected = expected_use(w, session, parent, false);
    if (expected == TS_OK && length > p->length)
        expected = TS_EINVAL;
    ts_status status = run(w,
                           (ts_command){.op = TS_OP_SEQ_FORK,
                                        .session = w->sessions[session],
                                        .seq_fork = {.parent = p->id,
                                                     .count = 1,
                                                     .length = length,
                                                     .has_length = length != p->length}},
                           &answer);
    assert_int_equal(status, expected);
    if (status != TS_OK)
        return;
    w->seqs[slot] = *p;
    w->seqs[slot].id = answer.seqs.seqs[0];
    w->seqs[slot].owner = session;
    w->seqs[slot].name = w->seqs[slot].step = -1;
    w->seqs[slot].ttl = 0;
    refresh(w, p);
    w->seqs[slot].length = length;
    w->seqs[slot].known = p->known < length ? p->known : length;
    verify_seq(w, slot);
    w->done[3]++;
}

/* A prompt: mostly the beginning of some sequence, and something more. Returns its tokens. */
static uint32_t make_prompt(world *w, uint32_t *ids)
{
    int like = pick_seq(w);
    uint32_t n = 1 + rng_below(&w->r, LENGTH_MAX), same = 0;
    if (like >= 0 && w->seqs[like].known > 0)
        same = rng_below(&w->r, w->seqs[like].known + 1);
    for (uint32_t i = 0; i < n; i++)
        ids[i] = i < same ? w->seqs[like].ids[i] : rng_below(&w->r, 2);
    return n;
}

/* Tokens of the prompt that live sequences hold in whole blocks. */
static uint32_t least_match(const world *w, uint32_t uid, int space, const uint32_t *ids,
                            uint32_t n)
{
    uint32_t least = 0;
    for (int i = 0; i < (int)SEQS; i++) {
        const model_seq *s = &w->seqs[i];
        uint32_t same = 0;
        while (s->live && !s->dropped && s->uid == uid && s->space == space && same < s->known &&
               same + 1 < n && s->ids[same] == ids[same])
            same++;
        if (same / BLOCK_TOKENS * BLOCK_TOKENS > least)
            least = same / BLOCK_TOKENS * BLOCK_TOKENS;
    }
    return least;
}

/* A match of the session's wait; it may wait (still) if it says so. */
static void try_match(world *w, int session, bool wait, bool again)
{
    ts_answer answer;
    model_wait *m = &w->waits[session];
    const int slot = free_slot(w);
    const uint32_t uid = uid_of(session), n = m->count;
    ts_command c = {
        .op = TS_OP_SEQ_MATCH,
        .session = w->sessions[session],
        .seq_match = {
            .tokens = m->ids, .counts = &n, .count = 1, .space = spaces[m->space], .dry = true}};
    assert_int_equal(run(w, c, &answer), TS_OK);
    assert_null(answer.matched.seqs);
    const uint32_t there = answer.matched.lengths[0];
    c.seq_match.dry = false;
    c.seq_match.wait = wait;
    c.again = again;
    m->kind = WAITS_FOR_NOTHING;
    const ts_status status = run(w, c, &answer);
    if (status == TS_WAITS) {
        m->kind = WAITS_FOR_MATCH;
        assert_true(wait);
        w->done[19]++;
        return;
    }
    assert_int_equal(status, TS_OK);
    assert_int_equal(answer.matched.lengths[0], there);
    assert_true(there < n && there >= least_match(w, uid, m->space, m->ids, n));
    model_seq *s = &w->seqs[slot];
    *s = (model_seq){.live = true,
                     .id = answer.matched.seqs[0],
                     .uid = uid,
                     .owner = session,
                     .name = -1,
                     .step = -1,
                     .length = there,
                     .known = there,
                     .space = m->space};
    memcpy(s->ids, m->ids, there * sizeof *m->ids);
    for (uint32_t i = 0; i < there; i++)
        s->tokens[i] = value_of(uid, m->space, m->ids, i + 1);
    verify_seq(w, slot);
    w->done[11]++;
    w->done[20] += again;
    w->matched += there;
}

static void op_match(world *w, int session)
{
    model_wait *m = &w->waits[session];
    if (free_slot(w) < 0)
        return;
    m->space = 1 + (int)rng_below(&w->r, 2);
    m->count = make_prompt(w, m->ids);
    const model_wait *other = &w->waits[rng_below(&w->r, SESSIONS)];
    if (other->count > 0 && other->space > 0 &&
        rng_below(&w->r, 2)) { /* or what another asked for */
        m->space = other->space;
        m->count = other->count;
        memmove(m->ids, other->ids, sizeof m->ids);
    }
    try_match(w, session, rng_below(&w->r, 2), false);
}

#endif
