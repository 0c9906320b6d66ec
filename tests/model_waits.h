/* The naive model of test_model.c: who waits, and the choice of commands. */
#ifndef TS_MODEL_WAITS_H
#define TS_MODEL_WAITS_H

#include "model_sequences.h"
#include "model_steps.h"

/* Gives the session's command again; if the model has no place for what that makes, the session
 * waits no more. */
static void try_again(world *w, int session, bool wait)
{
    ts_answer answer;
    const bool room = w->waits[session].kind == WAITS_FOR_ROOM;
    if (room && free_step(w) != NULL)
        return try_begin(w, session, wait, true);
    if (!room && free_slot(w) >= 0)
        return try_match(w, session, wait, true);
    assert_int_equal(
        run(w, (ts_command){.op = TS_OP_WAIT_END, .session = w->sessions[session]}, &answer),
        TS_OK);
    w->waits[session].kind = WAITS_FOR_NOTHING;
}

/* Those that were woken give their commands again. */
static void go_on(world *w)
{
    for (uint64_t id; (id = ts_engine_woken(w->e)) != 0;) {
        int i = 0;
        while (i < (int)SESSIONS && w->sessions[i] != id)
            i++;
        assert_true(i < (int)SESSIONS && w->waits[i].kind != WAITS_FOR_NOTHING);
        try_again(w, i, true);
        assert_true(ts_engine_woken(w->e) != id);
    }
}

/* The time of a session that waits is over. */
static void op_give_up(world *w)
{
    int i = (int)rng_below(&w->r, SESSIONS);
    if (w->waits[i].kind == WAITS_FOR_NOTHING)
        return;
    try_again(w, i, false);
    assert_true(w->waits[i].kind == WAITS_FOR_NOTHING);
    w->done[23]++;
}

static void one_command(world *w)
{
    go_on(w);
    uint32_t kind = rng_below(&w->r, 128);
    int session = pick_session(w);
    if (kind >= 126)
        op_drop(w);
    else if (kind >= 116 && kind < 120)
        op_give_up(w);
    else if (kind < 4 || session < 0)
        op_session(w);
    else if (kind < 10)
        op_create(w, session);
    else if (kind < 16)
        op_match(w, session);
    else if (kind < 30)
        op_fork(w, session);
    else if (kind < 60)
        op_begin(w, session);
    else if (kind < 84)
        op_end(w);
    else if (kind < 90)
        op_truncate_or_free(w, session, true);
    else if (kind < 95)
        op_truncate_or_free(w, session, false);
    else if (kind < 103)
        op_keep(w, session);
    else if (kind < 106)
        op_attach(w, session);
    else if (kind < 109)
        op_ticket(w, session);
    else if (kind < 112)
        op_redeem(w, session);
    else if (kind >= 120)
        op_select(w, session);
    else
        op_clock(w, session);
}

#endif
