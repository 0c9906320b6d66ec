#include "answers.h"

#include "command_codec.h"

#include <stdlib.h>
#include <string.h>

typedef struct ts_kept_answer {
    ts_stored_answer head;
    unsigned char *bytes; /* its arrays: ids first, a selection's with its new ones once more */
} ts_kept_answer;

bool ts_answers_init(ts_answers *t, uint32_t sessions)
{
    t->all = calloc(sessions, sizeof *t->all);
    t->max = t->all == NULL ? 0 : sessions;
    return t->all != NULL;
}

void ts_answers_fini(ts_answers *t)
{
    for (uint32_t i = 0; i < t->max; i++)
        free(t->all[i].bytes);
    free(t->all);
    *t = (ts_answers){0};
}

/* A session that an operator ends isn't who asks for its end. */
static ts_caller caller_of(const ts_command *c)
{
    return c->op == TS_OP_SESSION_CLOSE ? c->session_close.by : (ts_caller){c->session, c->call};
}

/* A run is done again; what only looks is looked up again; pools and exchanges are opened anew. */
static bool is_kept(const ts_command *c)
{
    return caller_of(c).call != 0 && c->op != TS_OP_STEP_RUN && c->op != TS_OP_EXCHANGE_OPEN &&
           c->op != TS_OP_POOL_OPEN && !ts_command_only_looks(c);
}

/* Bytes of the arrays of a kept answer. */
static uint64_t bytes_of(const ts_stored_answer *h)
{
    const uint64_t id = sizeof(uint64_t), word = sizeof(uint32_t);
    if (ts_command_answers_ids(h->op))
        return (h->count + (uint64_t)h->blocks) * id;
    if (h->op == TS_OP_SEQ_MATCH)
        return h->count * (id + 2 * word);
    return h->op == TS_OP_STEP_BEGIN ? (2ull * h->count + h->blocks) * word : 0;
}

/* Where they lie. */
typedef struct parts {
    uint64_t *ids;
    uint32_t *first, *second, *third;
} parts;

static parts parts_of(const ts_stored_answer *h, unsigned char *bytes)
{
    const uint64_t n = h->count, ids = n * sizeof(uint64_t), words = n * sizeof(uint32_t);
    parts p = {.ids = (uint64_t *)(void *)bytes};
    if (h->op == TS_OP_SEQ_MATCH) {
        p.first = (uint32_t *)(void *)(bytes + ids);
        p.second = (uint32_t *)(void *)(bytes + ids + words);
    } else if (h->op == TS_OP_STEP_BEGIN) {
        p.first = (uint32_t *)(void *)bytes;
        p.second = (uint32_t *)(void *)(bytes + words);
        p.third = (uint32_t *)(void *)(bytes + 2 * words);
    }
    return p;
}

static void copy(void *to, const void *from, uint64_t bytes)
{
    if (bytes > 0)
        memcpy(to, from, bytes);
}

/* Puts the new sequences of a selection into `made`, unless that is NULL; how many. */
static uint32_t forks_of(const ts_command *c, const ts_answer *answer, uint64_t *made)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < answer->seqs.count; i++) {
        const uint64_t seq = answer->seqs.seqs[i];
        if (seq == c->seq_select.seqs[c->seq_select.from[i]])
            continue;
        if (made != NULL)
            made[count] = seq;
        count++;
    }
    return count;
}

static ts_stored_answer head_of(const ts_command *c, const ts_answer *answer)
{
    const ts_caller by = caller_of(c);
    ts_stored_answer h = {.session = by.session, .call = by.call, .op = c->op, .pool = c->pool};
    if (ts_command_answers_ids(c->op)) {
        h.count = answer->seqs.count;
        h.length = answer->seqs.length;
        h.blocks = c->op == TS_OP_SEQ_SELECT ? forks_of(c, answer, NULL) : 0;
    } else if (c->op == TS_OP_SEQ_MATCH) {
        h.count = answer->matched.count;
    } else if (c->op == TS_OP_STEP_BEGIN) {
        h.id = answer->begun.step == NULL ? 0 : answer->begun.step->id;
        h.count = answer->begun.num_seqs;
        h.blocks = answer->begun.num_blocks;
    } else if (c->op == TS_OP_SEQ_TICKET) {
        memcpy(h.ticket, c->seq_ticket.ticket, sizeof h.ticket);
    } else if (c->op == TS_OP_CACHE_DROP) {
        h.id = answer->dropped;
    }
    h.bytes = bytes_of(&h);
    return h;
}

bool ts_answers_note(ts_answers *t, const ts_command *c, const ts_answer *answer)
{
    const uint32_t index = (uint32_t)caller_of(c).session;
    if (!is_kept(c) || answer->status != TS_OK || index >= t->max)
        return true;
    ts_kept_answer *kept = &t->all[index];
    const ts_stored_answer h = head_of(c, answer);
    unsigned char *bytes = malloc(h.bytes + 1);
    if (bytes == NULL)
        return false;
    free(kept->bytes);
    *kept = (ts_kept_answer){h, bytes};
    const parts p = parts_of(&h, bytes);
    const uint64_t n = h.count;
    if (ts_command_answers_ids(h.op)) {
        copy(p.ids, answer->seqs.seqs, n * sizeof *p.ids);
        if (c->op == TS_OP_SEQ_SELECT)
            (void)forks_of(c, answer, p.ids + n);
    } else if (h.op == TS_OP_SEQ_MATCH) {
        copy(p.ids, answer->matched.seqs, n * sizeof *p.ids);
        copy(p.first, answer->matched.lengths, n * sizeof *p.first);
        copy(p.second, answer->matched.twins, n * sizeof *p.second);
    } else if (h.op == TS_OP_STEP_BEGIN) {
        copy(p.first, answer->begun.starts, n * sizeof *p.first);
        copy(p.second, answer->begun.counts, n * sizeof *p.second);
        copy(p.third, answer->begun.blocks, h.blocks * sizeof *p.third);
    }
    return true;
}

bool ts_answers_find(const ts_answers *t, const ts_engine *e, ts_command *c, ts_answer *answer)
{
    const uint32_t index = (uint32_t)c->session;
    if (!is_kept(c) || index >= t->max)
        return false;
    const ts_kept_answer *kept = &t->all[index];
    const ts_stored_answer *h = &kept->head;
    const ts_session *s = ts_engine_session(e, c->session);
    if (s == NULL || s->call != c->call || h->session != c->session || h->call != c->call ||
        h->op != (uint32_t)c->op || h->pool != c->pool)
        return false;
    const parts p = parts_of(h, kept->bytes);
    *answer = (ts_answer){.status = TS_OK};
    if (ts_command_answers_ids(h->op)) {
        answer->seqs.seqs = p.ids;
        answer->seqs.count = h->count;
        answer->seqs.length = h->length;
    } else if (h->op == TS_OP_SEQ_MATCH) {
        answer->matched.seqs = p.ids;
        answer->matched.lengths = p.first;
        answer->matched.twins = p.second;
        answer->matched.count = h->count;
    } else if (h->op == TS_OP_STEP_BEGIN) {
        answer->begun.step = h->id == 0 ? NULL : ts_engine_find_step(e, h->id);
        if (h->id != 0 && answer->begun.step == NULL)
            return false;
        answer->begun.starts = p.first;
        answer->begun.counts = p.second;
        answer->begun.blocks = p.third;
        answer->begun.num_seqs = h->count;
        answer->begun.num_blocks = h->blocks;
    } else if (h->op == TS_OP_SEQ_TICKET) {
        memcpy(c->seq_ticket.ticket, h->ticket, sizeof h->ticket);
    }
    return true;
}

const uint64_t *ts_answers_find_made(const ts_answers *t, uint64_t session, uint64_t call,
                                     uint32_t *pool, uint32_t *count)
{
    const uint32_t index = (uint32_t)session;
    if (call == 0 || index >= t->max)
        return NULL;
    const ts_stored_answer *h = &t->all[index].head;
    if (h->session != session || h->call != call ||
        (h->op != TS_OP_SEQ_CREATE && h->op != TS_OP_SEQ_FORK && h->op != TS_OP_SEQ_REDEEM &&
         h->op != TS_OP_SEQ_MATCH && h->op != TS_OP_SEQ_SELECT))
        return NULL;
    const uint64_t *ids = parts_of(h, t->all[index].bytes).ids;
    const bool selects = h->op == TS_OP_SEQ_SELECT;
    *pool = h->pool;
    *count = selects ? h->blocks : h->count;
    return *count == 0 ? NULL : ids + (selects ? h->count : 0);
}

bool ts_answers_find_order(const ts_answers *t, const ts_caller *by, ts_op op, ts_answer *answer)
{
    const uint32_t index = (uint32_t)by->session;
    if (by->call == 0 || index >= t->max)
        return false;
    const ts_stored_answer *h = &t->all[index].head;
    if (h->session != by->session || h->call != by->call || h->op != (uint32_t)op)
        return false;
    *answer = (ts_answer){.status = TS_OK};
    if (op == TS_OP_CACHE_DROP)
        answer->dropped = h->id;
    return true;
}

void ts_answers_write(const ts_answers *t, ts_record_writer *w)
{
    uint64_t count = 0;
    for (uint32_t i = 0; i < t->max; i++)
        count += t->all[i].head.call != 0;
    ts_records_put_count(w, TS_RECORD_ANSWER, count);
    for (uint32_t i = 0; i < t->max; i++)
        if (t->all[i].head.call != 0)
            ts_records_put_more(w, TS_RECORD_ANSWER, &t->all[i].head, 1);
    for (uint32_t i = 0; i < t->max; i++)
        if (t->all[i].head.call != 0)
            ts_records_put(w, TS_RECORD_BYTE, t->all[i].bytes, t->all[i].head.bytes);
}

bool ts_answers_read(ts_answers *t, ts_record_reader *r)
{
    const uint64_t count = ts_records_next(r, TS_RECORD_ANSWER);
    if (r->why != NULL || count > t->max)
        return false;
    uint32_t *order = malloc((count + 1) * sizeof *order);
    bool ok = order != NULL;
    for (uint64_t i = 0; i < count && ok; i++) {
        ts_stored_answer h;
        ok = ts_records_get(r, TS_RECORD_ANSWER, &h, 1) && (uint32_t)h.session < t->max &&
             h.bytes == bytes_of(&h);
        if (ok)
            t->all[order[i] = (uint32_t)h.session].head = h;
    }
    for (uint64_t i = 0; i < count && ok; i++) {
        ts_kept_answer *kept = &t->all[order[i]];
        kept->bytes = malloc(kept->head.bytes + 1);
        ok = kept->bytes != NULL &&
             ts_records_get_all(r, TS_RECORD_BYTE, kept->bytes, kept->head.bytes);
    }
    free(order);
    return ok;
}
