/*
 * Begins of steps, and what makes sequences, whose answer didn't come in time. The daemon may have
 * begun such a step, or may yet do so, and its sequences would stay in an open step for as long as
 * the session lasts; new sequences would be nobody's. So the answer is still waited for, beside
 * what else the session does, and the step is aborted, or the sequences freed, before the next call
 * that finds the answer there.
 *
 * By messages the same request is sent again, in a context of its own: the daemon applies it once
 * and gives the first answer again. By the rings, which nothing else uses until then, the
 * completion comes to where the client would have looked for it.
 *
 * An abort without an answer is the daemon's to carry out; if it ends before that, the next one is
 * told of it when the session goes on.
 */
#include "unanswered.h"

#include "error.h"
#include "ring_client.h"
#include "rpc.h"

#include <nng/protocol/reqrep0/req.h>
#include <stdlib.h>
#include <string.h>

struct ts_unanswered {
    ts_unanswered *next;
    nng_ctx context;
    nng_aio *aio;
    bool sent;       /* the callback's */
    nng_msg *answer; /* NULL: none came */
    uint64_t call;
    uint32_t pool;   /* of the sequences that it may tell of */
    uint64_t *picks; /* of a selection: which sequence each pick is; NULL: all are new */
    atomic_bool done;
};

static void moved_on(void *arg)
{
    ts_unanswered *u = arg;
    int error = nng_aio_result(u->aio);
    if (error == 0 && !u->sent) {
        u->sent = true;
        nng_ctx_recv(u->context, u->aio);
        return;
    }
    if (error == 0)
        u->answer = nng_aio_get_msg(u->aio);
    else if (!u->sent)
        nng_msg_free(nng_aio_get_msg(u->aio));
    atomic_store(&u->done, true);
}

static void drop(ts_unanswered *u)
{
    nng_aio_stop(u->aio);
    nng_aio_free(u->aio); /* before the context: arrive.c, ts_hang_up */
    nng_ctx_close(u->context);
    if (u->answer != NULL)
        nng_msg_free(u->answer);
    free(u->picks);
    free(u);
}

/* Which sequence each pick is of, but for forks. NULL: there is no memory. */
static uint64_t *picks_of(const Tspb__SeqSelect *s)
{
    uint64_t *picks = calloc(s->n_from + 1, sizeof *picks);
    for (size_t i = 0; picks != NULL && i < s->n_from; i++)
        picks[i] = s->from[i] < s->n_seqs ? s->seqs[s->from[i]] : 0;
    return picks;
}

/* Moves those of the sequences that are new to the front; how many. */
static size_t leave_new(uint64_t *seqs, size_t count, const uint64_t *picks)
{
    size_t is_new = 0;
    for (size_t i = 0; i < count; i++)
        if (picks == NULL || seqs[i] != picks[i])
            seqs[is_new++] = seqs[i];
    return is_new;
}

static ts_status abort_step(ts_client *c, uint64_t step)
{
    Tspb__StepAbort abort = TSPB__STEP_ABORT__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    abort.step = step;
    request.body_case = TSPB__REQUEST__BODY_STEP_ABORT;
    request.step_abort = &abort;
    return ts_call_plain(c, &request);
}

/* Frees those of an answer's sequences that are new. */
static ts_status free_seqs(ts_client *c, uint32_t pool, uint64_t *seqs, size_t count,
                           const uint64_t *picks)
{
    Tspb__SeqFree body = TSPB__SEQ_FREE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    body.pool = pool;
    body.seqs = seqs;
    body.n_seqs = leave_new(seqs, count, picks);
    request.body_case = TSPB__REQUEST__BODY_SEQ_FREE;
    request.seq_free = &body;
    return body.n_seqs > 0 ? ts_call_plain(c, &request) : TS_OK;
}

/* What the call made was asked to be undone. A daemon that lives does it some time; the next one is
 * told of the call. */
static void note_undone(ts_client *c, ts_status status, uint64_t call)
{
    if (status == TS_ETIMEOUT || status == TS_ECONN)
        ts_give_up(c, TS_ECONN, call);
}

/* Undoes what the answer tells of. */
static void undo(ts_client *c, const ts_unanswered *u)
{
    ts_status status = TS_OK;
    Tspb__Reply *r = tspb__reply__unpack(NULL, nng_msg_len(u->answer), nng_msg_body(u->answer));
    if (r == NULL)
        return;
    if (r->status == TS_OK && r->body_case == TSPB__REPLY__BODY_STEP_BEGUN)
        status = abort_step(c, r->step_begun->step);
    else if (r->status == TS_OK && r->body_case == TSPB__REPLY__BODY_MATCHED)
        status = free_seqs(c, u->pool, r->matched->seqs, r->matched->n_seqs, NULL);
    else if (r->status == TS_OK && r->body_case == TSPB__REPLY__BODY_SEQS)
        status = free_seqs(c, u->pool, r->seqs->seqs, r->seqs->n_seqs, u->picks);
    note_undone(c, status, u->call);
    tspb__reply__free_unpacked(r, NULL);
}

static void settle_ring(ts_client *c)
{
    ts_ring_completion done;
    if (!c->ring_unanswered || !ts_ring_take_late(c, &done))
        return;
    const bool made = done.tag == c->ring_tag && done.status == TS_OK;
    uint64_t *picks = c->unanswered_picks;
    ts_status status = TS_OK;
    c->unanswered_picks = NULL; /* first: what follows are calls, too */
    c->ring_unanswered = false;
    if (made && c->unanswered_seqs > 0)
        status = free_seqs(c, c->unanswered_pool, c->rings->batch_seqs, c->unanswered_seqs, picks);
    else if (made && done.step != 0)
        status = abort_step(c, done.step);
    note_undone(c, status, c->ring_call);
    free(picks);
}

static void settle(ts_client *c)
{
    settle_ring(c);
    for (ts_unanswered **at = &c->unanswered; *at != NULL;) {
        ts_unanswered *u = *at;
        /* Without an answer its connection has ended: the next daemon is to be told of it. */
        if (!atomic_load(&u->done) || u->answer == NULL) {
            at = &u->next;
            continue;
        }
        *at = u->next;
        undo(c, u);
        drop(u);
        at = &c->unanswered; /* which the call may have changed */
    }
}

void ts_unanswered_by_message(ts_client *c, const Tspb__Request *request, uint32_t pool)
{
    nng_msg *message;
    ts_unanswered *u = calloc(1, sizeof *u);
    if (u == NULL)
        return; /* the step ends with the session */
    const bool selects = request->body_case == TSPB__REQUEST__BODY_SEQ_SELECT;
    if (selects && (u->picks = picks_of(request->seq_select)) == NULL)
        goto no_aio;
    if (nng_aio_alloc(&u->aio, moved_on, u) != 0)
        goto no_aio;
    if (nng_ctx_open(&u->context, c->socket) != 0)
        goto no_context;
    if (nng_msg_alloc(&message, tspb__request__get_packed_size(request)) != 0)
        goto no_message;
    tspb__request__pack(request, nng_msg_body(message));
    nng_ctx_set_ms(u->context, NNG_OPT_REQ_RESENDTIME, -1);
    nng_aio_set_timeout(u->aio, NNG_DURATION_INFINITE);
    nng_aio_set_msg(u->aio, message);
    c->settle = settle;
    u->pool = pool;
    u->call = request->request_id;
    u->next = c->unanswered;
    c->unanswered = u;
    nng_ctx_send(u->context, u->aio);
    return;
no_message:
    nng_ctx_close(u->context);
no_context:
    nng_aio_free(u->aio);
no_aio:
    free(u->picks);
    free(u);
}

void ts_unanswered_by_ring(ts_client *c, uint32_t pool, uint32_t seqs)
{
    if (c->ring_late_ms == 0)
        return; /* the daemon itself has answered so */
    c->settle = settle;
    c->unanswered_pool = pool;
    c->unanswered_seqs = seqs;
    c->ring_unanswered = true;
}

void ts_unanswered_select_by_ring(ts_client *c, uint32_t pool, const Tspb__SeqSelect *selection)
{
    uint64_t *picks = picks_of(selection);
    if (picks == NULL)
        return; /* the forks end with the session */
    ts_unanswered_by_ring(c, pool, (uint32_t)selection->n_from);
    if (c->ring_unanswered)
        c->unanswered_picks = picks;
    else
        free(picks);
}

void ts_unanswered_abort(ts_client *c, uint64_t step)
{
    if (c->num_unaborted == c->room_unaborted && c->room_unaborted < TS_ABORTED_STEPS_MOST) {
        const uint32_t room = c->room_unaborted == 0 ? 16 : c->room_unaborted * 2;
        uint64_t *larger = realloc(c->unaborted, room * sizeof *larger);
        if (larger == NULL)
            return; /* the step ends with the session */
        c->unaborted = larger;
        c->room_unaborted = room;
    }
    if (c->num_unaborted == c->room_unaborted) /* a daemon that lives has carried out the oldest */
        memmove(c->unaborted, c->unaborted + 1, --c->num_unaborted * sizeof *c->unaborted);
    c->unaborted[c->num_unaborted++] = step;
}

void ts_unanswered_close(ts_client *c)
{
    free(c->unanswered_picks);
    c->unanswered_picks = NULL;
    c->ring_unanswered = false;
    while (c->unanswered != NULL) {
        ts_unanswered *u = c->unanswered;
        c->unanswered = u->next;
        drop(u);
    }
}

uint32_t ts_unanswered_calls(const ts_client *c, uint64_t *calls, uint32_t most)
{
    uint32_t count = 0;
    if (c->ring_unanswered && count < most)
        calls[count++] = c->ring_call;
    for (const ts_unanswered *u = c->unanswered; u != NULL && count < most; u = u->next)
        calls[count++] = u->call;
    return count;
}
