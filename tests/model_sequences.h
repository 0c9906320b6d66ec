/* The naive model of test_model.c: sequences that are cut, freed, selected, kept and handed on. */
#ifndef TS_MODEL_SEQUENCES_H
#define TS_MODEL_SEQUENCES_H

#include "model_world.h"

static void op_truncate_or_free(world *w, int session, bool truncate)
{
    ts_answer answer;
    int seqs[BATCH_MAX];
    uint64_t ids[BATCH_MAX];
    uint32_t lengths[BATCH_MAX], count = 1 + rng_below(&w->r, 2);
    const bool by_counts = truncate && rng_below(&w->r, 2), forget = rng_below(&w->r, 2);
    ts_status expected = TS_OK;
    for (uint32_t i = 0; i < count; i++) {
        seqs[i] = pick_seq(w);
        if (seqs[i] < 0)
            return;
        ids[i] = w->seqs[seqs[i]].id;
        lengths[i] = rng_below(&w->r, w->seqs[seqs[i]].length + 2);
        ts_status one = expected_use(w, session, seqs[i], true);
        for (uint32_t j = 0; j < i && one == TS_OK; j++)
            if (seqs[j] == seqs[i])
                one = TS_EINVAL;
        if (one == TS_OK && truncate && lengths[i] > w->seqs[seqs[i]].length)
            one = TS_EINVAL;
        if (expected == TS_OK)
            expected = one;
    }
    ts_status status = run(w,
                           (ts_command){.op = truncate ? TS_OP_SEQ_TRUNCATE : TS_OP_SEQ_FREE,
                                        .session = w->sessions[session],
                                        .seq_batch = {.seqs = ids,
                                                      .lengths = lengths,
                                                      .count = count,
                                                      .by_counts = by_counts,
                                                      .forget = forget}},
                           &answer);
    assert_int_equal(status, expected);
    for (uint32_t i = 0; status == TS_OK && i < count; i++) {
        model_seq *s = &w->seqs[seqs[i]];
        if (truncate) {
            s->length = by_counts ? s->length - lengths[i] : lengths[i];
            s->known = s->known < s->length ? s->known : s->length;
            verify_seq(w, seqs[i]);
        } else {
            s->live = false;
            assert_null(ts_sequence_find(&w->e->pools[0].seqs, s->id));
        }
    }
    w->done[truncate ? 7 : 8] += status == TS_OK;
}

/* Some go on, several times perhaps, and the others are freed. */
static void op_select(world *w, int session)
{
    ts_answer answer;
    int seqs[BATCH_MAX], forks[BATCH_MAX] = {0}, num_forks = 0;
    uint64_t ids[BATCH_MAX];
    uint32_t from[BATCH_MAX], uses[BATCH_MAX] = {0};
    const uint32_t count = 1 + rng_below(&w->r, 3), picked = 1 + rng_below(&w->r, BATCH_MAX);
    ts_status expected = TS_OK;
    for (uint32_t i = 0; i < picked; i++) {
        from[i] = rng_below(&w->r, count + (rng_below(&w->r, 20) == 0));
        if (from[i] >= count)
            expected = TS_EINVAL;
        else
            num_forks += uses[from[i]]++ > 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        seqs[i] = pick_seq(w);
        for (int tries = 0; tries < 12 && (seqs[i] < 0 || expected_use(w, session, seqs[i], true));
             tries++)
            seqs[i] = pick_seq(w);
        if (seqs[i] < 0)
            return;
        ids[i] = w->seqs[seqs[i]].id;
        ts_status one = expected_use(w, session, seqs[i], true);
        for (uint32_t j = 0; j < i && one == TS_OK; j++)
            if (seqs[j] == seqs[i])
                one = TS_EINVAL;
        if (expected == TS_OK)
            expected = one;
    }
    for (int i = 0, slot = 0; i < num_forks; i++, slot++) {
        while (slot < (int)SEQS && w->seqs[slot].live)
            slot++;
        if (slot == (int)SEQS)
            return;
        forks[i] = slot;
    }
    ts_status status = run(
        w,
        (ts_command){.op = TS_OP_SEQ_SELECT,
                     .session = w->sessions[session],
                     .seq_select = {.seqs = ids, .count = count, .from = from, .picked = picked}},
        &answer);
    assert_int_equal(status, expected);
    if (status != TS_OK)
        return;
    bool seen[BATCH_MAX] = {false};
    for (uint32_t i = 0; i < picked; i++) {
        model_seq *parent = &w->seqs[seqs[from[i]]];
        refresh(w, parent);
        if (!seen[from[i]]) {
            assert_true(answer.seqs.seqs[i] == parent->id);
            seen[from[i]] = true;
            continue;
        }
        const int slot = forks[--num_forks];
        w->seqs[slot] = *parent;
        w->seqs[slot].id = answer.seqs.seqs[i];
        w->seqs[slot].owner = session;
        w->seqs[slot].name = w->seqs[slot].step = -1;
        w->seqs[slot].ttl = 0;
        verify_seq(w, slot);
    }
    for (uint32_t i = 0; i < count; i++)
        if (uses[i] == 0)
            w->seqs[seqs[i]].live = false;
    w->done[24]++;
}

/* An operator has namespaces forgotten, or switches the index off and on. */
static void op_drop(world *w)
{
    ts_answer answer;
    const uint32_t uid = rng_below(&w->r, UIDS);
    const int space = (int)rng_below(&w->r, 3); /* 0: all */
    const bool off = rng_below(&w->r, 4) == 0;
    if (rng_below(&w->r, 12) != 0) /* else little would ever be found */
        return;
    if (off) {
        for (int on = 0; on < 2; on++)
            assert_int_equal(
                run(w, (ts_command){.op = TS_OP_CACHE_SET, .cache_set.on = on}, &answer), TS_OK);
    } else {
        assert_int_equal(run(w,
                             (ts_command){.op = TS_OP_CACHE_DROP,
                                          .cache_drop = {.has_uid = true,
                                                         .uid = uid,
                                                         .has_space = space > 0,
                                                         .space = spaces[space]}},
                             &answer),
                         TS_OK);
    }
    for (int i = 0; i < (int)SEQS; i++) {
        model_seq *s = &w->seqs[i];
        if (off || (s->uid == uid && (space == 0 || s->space == space)))
            s->dropped = true;
    }
    w->done[off ? 26 : 25]++;
}

static const char *const names[] = {"a", "ab", "abc", "b", "c", "ca", "cab", "d"};

/* The uid's sequence of this name, or -1. */
static int named(const world *w, uint32_t uid, int name)
{
    for (int i = 0; i < (int)SEQS; i++)
        if (w->seqs[i].live && w->seqs[i].uid == uid && w->seqs[i].name == name)
            return i;
    return -1;
}

static void op_keep(world *w, int session)
{
    ts_answer answer;
    int seq = pick_seq(w), name = (int)rng_below(&w->r, 9) - 1; /* -1: forget */
    uint64_t ttl = rng_below(&w->r, 2) ? 1 + rng_below(&w->r, 400) : 0;
    bool replace = rng_below(&w->r, 3) != 0;
    if (seq < 0)
        return;
    model_seq *s = &w->seqs[seq];
    ts_status expected = expected_use(w, session, seq, name < 0);
    if (expected == TS_OK && name < 0 && s->name < 0)
        expected = TS_ENOENT;
    int old = name < 0 ? -1 : named(w, s->uid, name);
    if (old == seq)
        old = -1;
    if (expected == TS_OK && old >= 0)
        expected = !replace ? TS_EEXIST : w->seqs[old].step >= 0 ? TS_EBUSY : TS_OK;
    ts_status status = run(w,
                           (ts_command){.op = TS_OP_SEQ_KEEP,
                                        .session = w->sessions[session],
                                        .seq_keep = {.seq = s->id,
                                                     .name = name < 0 ? "" : names[name],
                                                     .ttl_ms = ttl,
                                                     .replace = replace}},
                           &answer);
    assert_int_equal(status, expected);
    if (status == TS_OK) {
        s->name = name;
        s->owner = name < 0 ? session : -1;
        s->ttl = name < 0 ? 0 : ttl;
        refresh(w, s);
        w->done[9]++;
        if (old >= 0) {
            w->seqs[old].live = false;
            assert_null(ts_sequence_find(&w->e->pools[0].seqs, w->seqs[old].id));
            w->done[12]++;
        }
    }
}

static void op_attach(world *w, int session)
{
    ts_answer answer;
    int name = (int)rng_below(&w->r, 8), found = named(w, uid_of(session), name);
    ts_status status = run(w,
                           (ts_command){.op = TS_OP_SEQ_ATTACH,
                                        .session = w->sessions[session],
                                        .seq_keep = {.name = names[name]}},
                           &answer);
    assert_int_equal(status, found < 0 ? TS_ENOENT : TS_OK);
    if (found < 0)
        return;
    assert_true(answer.seqs.seqs[0] == w->seqs[found].id);
    refresh(w, &w->seqs[found]);
    w->done[10]++;
}

/* Page by page, and what is told is what the model has. */
static void op_list(world *w, int session)
{
    ts_answer answer;
    const char *prefix = rng_below(&w->r, 2) ? names[rng_below(&w->r, 8)] : "", *after = "";
    int name = 0;
    do {
        assert_int_equal(run(w,
                             (ts_command){.op = TS_OP_SEQ_LIST,
                                          .session = w->sessions[session],
                                          .seq_list = {.prefix = prefix,
                                                       .after = after,
                                                       .limit = 1 + rng_below(&w->r, 3)}},
                             &answer),
                         TS_OK);
        for (uint32_t i = 0; i < answer.kept.count; i++, name++) {
            while (strncmp(names[name], prefix, strlen(prefix)) != 0 ||
                   named(w, uid_of(session), name) < 0)
                name++;
            const model_seq *s = &w->seqs[named(w, uid_of(session), name)];
            assert_string_equal(answer.kept.names[i], names[name]);
            assert_true(answer.kept.seqs[i] == s->id);
            assert_int_equal(answer.kept.lengths[i], s->length);
            assert_int_equal(answer.kept.left_ms[i], s->ttl == 0    ? 0
                                                     : s->step >= 0 ? s->ttl
                                                                    : s->end - w->now);
            w->done[16]++;
        }
        for (int i = 0; i < 8; i++)
            if (strcmp(names[i], answer.kept.next) == 0)
                after = names[i]; /* the engine's own copy may go */
    } while (answer.kept.next[0] != '\0');
    for (; name < 8; name++) /* nobody was left out */
        assert_true(strncmp(names[name], prefix, strlen(prefix)) != 0 ||
                    named(w, uid_of(session), name) < 0);
}

static void op_ticket(world *w, int session)
{
    ts_answer answer;
    int seq = pick_seq(w);
    for (int tries = 0; tries < 6 && (seq < 0 || w->seqs[seq].owner != session); tries++)
        seq = pick_seq(w);
    if (seq < 0)
        return;
    model_seq *s = &w->seqs[seq];
    uint64_t ttl = rng_below(&w->r, 2) ? 1 + rng_below(&w->r, 400) : 0;
    ts_status expected = expected_use(w, session, seq, true);
    if (expected == TS_OK && s->name >= 0)
        expected = TS_EINVAL;
    ts_command c = {.op = TS_OP_SEQ_TICKET,
                    .session = w->sessions[session],
                    .seq_ticket = {.seq = s->id, .ttl_ms = ttl}};
    w->next_ticket++;
    memcpy(c.seq_ticket.ticket, &w->next_ticket, sizeof w->next_ticket);
    assert_int_equal(run(w, c, &answer), expected);
    if (expected != TS_OK)
        return;
    assert_null(ts_sequence_find(&w->e->pools[0].seqs, s->id));
    s->id = ts_sequence_id(&w->e->pools[0].seqs, (uint32_t)s->id); /* which nobody was told of */
    s->ticket = w->next_ticket;
    s->owner = -1;
    s->ttl = ttl == 0 ? TS_TICKET_MS : ttl;
    refresh(w, s);
    w->done[13]++;
}

/* Redeems a ticket that there is, or mostly not any more. */
static void op_redeem(world *w, int session)
{
    ts_answer answer;
    uint32_t ticket = w->next_ticket - rng_below(&w->r, 100);
    int found = -1;
    for (int tries = 0; tries < 20; tries++) {
        int i = pick_seq(w);
        if (i >= 0 && w->seqs[i].ticket != 0)
            ticket = w->seqs[i].ticket;
    }
    for (int i = 0; i < (int)SEQS; i++)
        if (w->seqs[i].live && w->seqs[i].ticket == ticket && ticket != 0 &&
            w->seqs[i].uid == uid_of(session))
            found = i;
    ts_command c = {.op = TS_OP_SEQ_REDEEM, .session = w->sessions[session]};
    memcpy(c.seq_redeem.ticket, &ticket, sizeof ticket);
    assert_int_equal(run(w, c, &answer), found < 0 ? TS_ENOENT : TS_OK);
    if (found < 0)
        return;
    model_seq *s = &w->seqs[found];
    assert_true(answer.seqs.seqs[0] == s->id);
    assert_int_equal(answer.seqs.length, s->length);
    s->ticket = 0;
    s->ttl = 0;
    s->owner = session;
    verify_seq(w, found);
    w->done[14]++;
}

/* Time goes on. What is over is gone for everybody, whether it is swept at once or not. */
static void op_clock(world *w, int session)
{
    ts_answer answer;
    w->now += rng_below(&w->r, 50);
    for (int i = 0; i < (int)SEQS; i++) {
        model_seq *s = &w->seqs[i];
        if (s->live && s->ttl > 0 && s->step < 0 && s->end <= w->now) {
            s->live = false;
            w->done[15]++;
        }
    }
    if (rng_below(&w->r, 2)) {
        assert_int_equal(run(w, (ts_command){.op = TS_OP_SWEEP}, &answer), TS_OK);
        w->done[17]++;
    } else {
        op_list(w, session);
    }
}

#endif
