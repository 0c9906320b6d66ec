/* The commands: what each needs to be there, and who carries it out. */
#include "claim_ops.h"
#include "engine_internal.h"
#include "wait_ops.h"

#include <string.h>

/* What is looked up, and refused if it isn't there, before a command is carried out. */
typedef enum needs { NOTHING, SESSION, POOL /* a session that has opened it */ } needs;

static const struct operation {
    needs needs;
    ts_engine_op *apply; /* NULL: there is no such command */
} operations[TS_OP_COUNT] = {
#define OPERATION(name, needs, apply, ...) [TS_OP_##name] = {needs, ts_engine_##apply},
#include "operations.inc.h"
#undef OPERATION
};

/* Whether the session may wait for what the command asks for: it waits for one thing at a time. */
static bool may_wait(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    const bool wait = (c->op == TS_OP_SEQ_MATCH && c->seq_match.wait) ||
                      (c->op == TS_OP_STEP_BEGIN && c->step_begin.wait);
    /* It keeps its place if it still is what waits there: the client may have changed it. */
    const bool keeps =
        c->op == TS_OP_STEP_BEGIN && s->wait.kind == TS_WAIT_ROOM && s->wait.pool == c->pool;
    if (c->again && !keeps)
        ts_waits_end(e, s);
    else if (c->again)
        ts_waits_answered(e, s);
    else if (wait && s->wait.kind != TS_WAIT_NONE)
        ts_refuse(answer, TS_EBUSY, "the session waits already, in another call");
    return answer->status == TS_OK;
}

static bool is_final(ts_status status)
{
    return status != TS_WAITS && status != TS_NEED_SLABS && status != TS_NEED_SWEEP;
}

static void set_time(ts_engine *e, uint64_t now_ms)
{
    const uint32_t was_s = (uint32_t)(e->now_ms / 1000);
    if (now_ms > e->now_ms)
        e->now_ms = now_ms;
    const uint32_t now_s = (uint32_t)(e->now_ms / 1000);
    for (uint32_t i = 0; i < e->num_pools && now_s != was_s; i++)
        e->pools[i].books.now_s = now_s;
}

void ts_engine_apply(ts_engine *e, const ts_command *c, ts_answer *answer)
{
    memset(answer, 0, sizeof *answer);
    if ((size_t)c->op >= TS_OP_COUNT || operations[c->op].apply == NULL)
        return ts_refuse(answer, TS_EINVAL, "there is no command %d", (int)c->op);
    const struct operation *operation = &operations[c->op];
    set_time(e, c->now_ms);
    ts_session *s = NULL;
    if (operation->needs != NOTHING && (s = ts_engine_session(e, c->session)) == NULL)
        return ts_refuse(answer, TS_ENOENT, "there is no session %llx: open one first",
                         (unsigned long long)c->session);
    if (operation->needs == POOL && (c->pool >= e->num_pools || !(s->opened_pools >> c->pool & 1)))
        return ts_refuse(answer, TS_ENOENT, "the session has not opened a pool %u", c->pool);
    if (s != NULL && !may_wait(e, s, c, answer))
        return;
    operation->apply(e, s, c, answer);
    if (c->again && s != NULL && is_final(answer->status))
        ts_waits_end(e, s);
    if (s != NULL && c->call > s->call && answer->status == TS_OK) /* one may be late */
        s->call = c->call;
    if (c->again && s != NULL && answer->status == TS_NEED_SWEEP && s->wait.kind == TS_WAIT_ROOM &&
        c->step_begin.wait) { /* it goes on bit by bit in its place, so nobody takes its room */
        ts_waits_wake(e, (uint32_t)(s - e->sessions));
        ts_refuse(answer, TS_WAITS, "it waits for room");
    }
    if (e->waiting_for_room > 0)
        ts_waits_look_for_room(e);
}

void ts_engine_wait_end(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)c;
    (void)answer;
    ts_waits_end(e, s);
}
