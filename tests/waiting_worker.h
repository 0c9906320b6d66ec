/* Workers of an engine that match prompts, compute, and wait: what test_claims.c and test_waits.c
 * have in common. */
#ifndef TS_TEST_WAITING_WORKER_H
#define TS_TEST_WAITING_WORKER_H

#include "engine_util.h"
#include "wait_ops.h"

#include <string.h>

enum { BLOCK = 4, PROMPT = 64 };

static const ts_space_name model = {"m", 1};

/* A worker of one session, with what it has asked for. */
typedef struct worker {
    ts_engine *e;
    uint64_t session, seq, step;
    uint32_t has, computed; /* tokens of its sequence, and of them by itself */
    const uint32_t *ids;    /* of its prompt */
    uint32_t count;
} worker;

static inline worker worker_new(ts_engine *e, uint32_t uid, const uint32_t *ids, uint32_t count)
{
    return (worker){.e = e, .session = session_new(e, uid), .ids = ids, .count = count};
}

static inline ts_status ask(worker *w, bool wait, bool again)
{
    ts_answer answer;
    ts_command c = {
        .op = TS_OP_SEQ_MATCH,
        .session = w->session,
        .again = again,
        .seq_match = {
            .tokens = w->ids, .counts = &w->count, .count = 1, .space = model, .wait = wait}};
    if (apply(w->e, c, &answer) == TS_OK) {
        w->seq = answer.matched.seqs[0];
        w->has = answer.matched.lengths[0];
    }
    check_engine(w->e);
    return answer.status;
}

/* Applies the commands of woken sessions again, in their order, until nobody is woken; how many
 * were answered. */
static inline uint32_t go_on(ts_engine *e, worker *all, uint32_t count)
{
    uint32_t answered = 0;
    for (uint64_t id; (id = ts_engine_woken(e)) != 0;) {
        uint32_t i = 0;
        while (i < count && all[i].session != id)
            i++;
        assert_true(i < count);
        answered += ask(&all[i], true, true) == TS_OK;
        assert_true(ts_engine_woken(e) != id);
    }
    return answered;
}

static inline void open_step(worker *w, uint32_t n)
{
    w->step = step_of_ids(w->e, w->session, w->seq, w->ids + w->has, n);
    check_engine(w->e);
}

static inline void commit(worker *w, uint32_t n)
{
    assert_int_equal(step_end(w->e, w->session, TS_OP_STEP_COMMIT, w->step, NULL, 0), TS_OK);
    w->has += n;
    w->computed += n;
    check_engine(w->e);
}

static inline void compute(worker *w, uint32_t n)
{
    open_step(w, n);
    commit(w, n);
}

static inline void die(worker *w)
{
    ts_answer answer;
    assert_int_equal(
        apply(w->e, (ts_command){.op = TS_OP_SESSION_CLOSE, .session = w->session}, &answer),
        TS_OK);
    check_engine(w->e);
}

static inline void fill_ids(uint32_t *ids, uint32_t count, uint32_t first)
{
    for (uint32_t i = 0; i < count; i++)
        ids[i] = first + i;
}

#endif
