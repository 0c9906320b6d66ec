#include "parked.h"

#include "clock.h"

#define WOKEN_PER_TURN 32 /* woken sessions that go on before other work has its turn */

static uint64_t parked_bytes(const ts_service *s, uint32_t uid)
{
    uint64_t bytes = 0;
    for (const ts_parked *p = s->parked; p != NULL; p = p->next)
        bytes += p->connection->uid == uid ? p->bytes : 0;
    return bytes;
}

/* Whether the session has waited since before the daemon was restarted: it is asked again by
 * whoever waited then. */
static bool waits_since_before(const ts_service *s, const ts_connection *c)
{
    const ts_session *session = ts_engine_session(s->exec.engine, c->session);
    return session != NULL && session->wait.kind != TS_WAIT_NONE;
}

bool ts_parked_prepare(const ts_service *s, const ts_connection *c, const ts_parked *p,
                       uint32_t wait_ms, ts_command *command, ts_answer *answer)
{
    const bool before = p->deadline_ms != 0;
    /* What waited until it had to wait for a sweep has left its place to what waits now. */
    command->again = (before || waits_since_before(s, c)) && c->parked == NULL;
    if (wait_ms == 0)
        return true;
    if (wait_ms > TS_WAIT_MS_MAX) {
        ts_refuse_beyond(answer, TS_EINVAL, wait_ms, TS_WAIT_MS_MAX,
                         "a wait of %u ms; the limit is %u", wait_ms, TS_WAIT_MS_MAX);
        return false;
    }
    if (s->exec.engine->draining || s->ending) {
        ts_refuse(answer, TS_EBUSY, "the daemon %s: nothing waits",
                  s->ending ? "ends" : "is being drained");
        return false;
    }
    const bool wait = !before || (command->again && ts_now_ms() < p->deadline_ms);
    if (command->op == TS_OP_SEQ_MATCH)
        command->seq_match.wait = wait;
    else
        command->step_begin.wait = wait;
    const uint64_t bytes = before ? 0 : parked_bytes(s, c->uid);
    if (p->bytes + bytes > TS_PARKED_BYTES)
        ts_refuse_more(answer, TS_EQUOTA, bytes, p->bytes, TS_PARKED_BYTES,
                       "a request of %zu bytes may not wait: those of uid %u that do have %llu, "
                       "and the limit is %u",
                       p->bytes, c->uid, (unsigned long long)bytes, TS_PARKED_BYTES);
    return answer->status == TS_OK;
}

void ts_parked_alarm(ts_work *work, void *service)
{
    (void)work;
    ts_service *s = service;
    const uint64_t now_ms = ts_now_ms();
    ts_answer answer;
    for (ts_parked *p = s->parked, *next; p != NULL; p = next) {
        next = p->next;
        if (p->deadline_ms <= now_ms)
            (void)ts_service_go_on(s, p->connection, true);
    }
    ts_exec_apply(&s->exec, &(ts_command){.op = TS_OP_SWEEP}, &answer);
    ts_service_end_quarantines(s, now_ms);
    s->look_ms = 0;
    ts_service_set_alarm(s);
}

void ts_parked_add(ts_service *s, ts_connection *c, ts_parked *p, uint32_t wait_ms)
{
    if (p->deadline_ms == 0) {
        p->since_ms = ts_now_ms();
        p->deadline_ms = p->since_ms + wait_ms;
    }
    c->parked = p;
    p->connection = c;
    p->next = s->parked;
    p->at = &s->parked;
    if (s->parked != NULL)
        s->parked->at = &p->next;
    s->parked = p;
    ts_service_set_alarm(s);
}

uint64_t ts_parked_longest_ms(const ts_service *s)
{
    const uint64_t now_ms = ts_now_ms();
    uint64_t since_ms = now_ms;
    for (const ts_parked *p = s->parked; p != NULL; p = p->next)
        since_ms = p->since_ms < since_ms ? p->since_ms : since_ms;
    return now_ms - since_ms;
}

void ts_parked_wake(ts_service *s)
{
    uint64_t id;
    for (int i = 0; i < WOKEN_PER_TURN && (id = ts_engine_woken(s->exec.engine)) != 0; i++) {
        ts_connection *c = ts_service_connection_of(s, id);
        ts_answer answer;
        if (c == NULL || !ts_service_go_on(s, c, false))
            ts_exec_apply(&s->exec, &(ts_command){.op = TS_OP_WAIT_END, .session = id}, &answer);
    }
    ts_exec_look_for_woken(&s->exec);
}

void ts_parked_hurry_all(ts_service *s)
{
    while (s->parked != NULL)
        (void)ts_service_go_on(s, s->parked->connection, true);
}
