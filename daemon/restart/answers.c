#include "answers.h"

#include "command_codec.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef struct ts_kept_answer {
    ts_stored_answer head;
    unsigned char *bytes; /* its arrays */
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

/* An array that an answer points to. */
typedef struct kept_array {
    uint16_t element_bytes;
    uint16_t answer_at; /* where ts_answer points to it; 0: nowhere */
    uint16_t count_at;  /* where the head has its length */
} kept_array;

#define KEPT_ARRAYS 3

/* What is kept of an operation's answer, beside that it was given. Places are in ts_answer, the
 * first one in ts_command; 0: nowhere. */
typedef struct answer_kind {
    uint16_t asked_at; /* how many the command asked for: the answer's count */
    uint16_t count_at, blocks_at, length_at; /* what the head has under these names */
    uint16_t made;                  /* which array, from 1 on, has new sequences; 0: none */
    kept_array arrays[KEPT_ARRAYS]; /* as they lie one behind the other */
    /* Puts the rest into the head, and back; false: what it refers to is gone. NULL: no more. */
    void (*keep)(const ts_command *c, const ts_answer *answer, ts_stored_answer *h);
    bool (*give)(const ts_stored_answer *h, const ts_engine *e, ts_command *c, ts_answer *answer);
} answer_kind;

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

static void keep_forks(const ts_command *c, const ts_answer *answer, ts_stored_answer *h)
{
    h->blocks = forks_of(c, answer, NULL);
}

static void keep_step(const ts_command *c, const ts_answer *answer, ts_stored_answer *h)
{
    (void)c;
    const ts_step *step = answer->begun.step;
    h->id = step == NULL || step->append ? 0 : step->id; /* an append ends when it has its copies */
}

static bool give_step(const ts_stored_answer *h, const ts_engine *e, ts_command *c,
                      ts_answer *answer)
{
    if (c->step_begin.append != (h->id == 0)) /* it isn't the same call */
        return false;
    answer->begun.step = h->id == 0 ? NULL : ts_engine_find_step(e, h->id);
    return h->id == 0 || answer->begun.step != NULL;
}

static void keep_ticket(const ts_command *c, const ts_answer *answer, ts_stored_answer *h)
{
    (void)answer;
    memcpy(h->ticket, c->seq_ticket.ticket, sizeof h->ticket);
}

static bool give_ticket(const ts_stored_answer *h, const ts_engine *e, ts_command *c,
                        ts_answer *answer)
{
    (void)e;
    (void)answer;
    memcpy(c->seq_ticket.ticket, h->ticket, sizeof h->ticket);
    return true;
}

static void keep_dropped(const ts_command *c, const ts_answer *answer, ts_stored_answer *h)
{
    (void)c;
    h->id = answer->dropped;
}

static bool give_dropped(const ts_stored_answer *h, const ts_engine *e, ts_command *c,
                         ts_answer *answer)
{
    (void)e;
    (void)c;
    answer->dropped = h->id;
    return true;
}

#define IN_ANSWER(member) (uint16_t) offsetof(ts_answer, member)
#define ARRAY(member, count)                                                                       \
    {                                                                                              \
        (uint16_t)sizeof(*((ts_answer *)0)->member), IN_ANSWER(member),                            \
            (uint16_t)offsetof(ts_stored_answer, count)                                            \
    }
#define IDS                                                                                        \
    .count_at = IN_ANSWER(seqs.count), .length_at = IN_ANSWER(seqs.length),                        \
    .arrays[0] = ARRAY(seqs.seqs, count)

#define ASKED(member) .asked_at = (uint16_t)offsetof(ts_command, member)

/* Of operations whose answers are ids, unless they have a row of their own. */
static const answer_kind new_ids = {IDS, .made = 1};

static const answer_kind kinds[TS_OP_COUNT] = {
    [TS_OP_SEQ_CREATE] = {ASKED(seq_create.count), IDS, .made = 1},
    [TS_OP_SEQ_FORK] = {ASKED(seq_fork.count), IDS, .made = 1},
    [TS_OP_SEQ_ATTACH] = {IDS},
    [TS_OP_SEQ_SELECT] = {ASKED(seq_select.picked), IDS, .made = 2,
                          .arrays[1] = {sizeof(uint64_t), 0, offsetof(ts_stored_answer, blocks)},
                          .keep = keep_forks},
    [TS_OP_SEQ_MATCH] = {ASKED(seq_match.count), .count_at = IN_ANSWER(matched.count), .made = 1,
                         .arrays = {ARRAY(matched.seqs, count), ARRAY(matched.lengths, count),
                                    ARRAY(matched.twins, count)}},
    [TS_OP_STEP_BEGIN] = {ASKED(step_begin.count), .count_at = IN_ANSWER(begun.num_seqs),
                          .blocks_at = IN_ANSWER(begun.num_blocks),
                          .arrays = {ARRAY(begun.starts, count), ARRAY(begun.counts, count),
                                     ARRAY(begun.blocks, blocks)},
                          .keep = keep_step, .give = give_step},
    [TS_OP_SEQ_TICKET] = {.keep = keep_ticket, .give = give_ticket},
    [TS_OP_CACHE_DROP] = {.keep = keep_dropped, .give = give_dropped},
};

static const answer_kind *kind_of(uint32_t op)
{
    static const answer_kind nothing;
    if (op >= TS_OP_COUNT)
        return &nothing;
    return ts_command_answers_ids(op) && kinds[op].count_at == 0 ? &new_ids : &kinds[op];
}

static uint32_t word_at(const void *of, uint16_t at)
{
    uint32_t word = 0;
    if (at != 0)
        memcpy(&word, (const unsigned char *)of + at, sizeof word);
    return word;
}

static void put_word(ts_answer *answer, uint16_t at, uint32_t word)
{
    if (at != 0)
        memcpy((unsigned char *)answer + at, &word, sizeof word);
}

/* Bytes of a kept answer's first `arrays` arrays. */
static uint64_t bytes_of(const ts_stored_answer *h, uint32_t arrays)
{
    const answer_kind *kind = kind_of(h->op);
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < arrays; i++)
        bytes += (uint64_t)kind->arrays[i].element_bytes * word_at(h, kind->arrays[i].count_at);
    return bytes;
}

static ts_stored_answer head_of(const ts_command *c, const ts_answer *answer)
{
    const ts_caller by = caller_of(c);
    const answer_kind *kind = kind_of(c->op);
    ts_stored_answer h = {.session = by.session,
                          .call = by.call,
                          .op = c->op,
                          .pool = c->pool,
                          .count = word_at(answer, kind->count_at),
                          .blocks = word_at(answer, kind->blocks_at),
                          .length = word_at(answer, kind->length_at)};
    if (kind->keep != NULL)
        kind->keep(c, answer, &h);
    h.bytes = bytes_of(&h, KEPT_ARRAYS);
    return h;
}

/* The arrays' bytes, in one piece; NULL: out of memory. */
static unsigned char *pack(const ts_stored_answer *h, const ts_command *c, const ts_answer *answer)
{
    const answer_kind *kind = kind_of(h->op);
    unsigned char *packed = malloc(h->bytes + 1);
    for (uint32_t i = 0; packed != NULL && i < KEPT_ARRAYS; i++) {
        const void *from = NULL;
        const uint64_t at = bytes_of(h, i), bytes = bytes_of(h, i + 1) - at;
        if (kind->arrays[i].answer_at != 0)
            memcpy(&from, (const unsigned char *)answer + kind->arrays[i].answer_at, sizeof from);
        if (bytes > 0 && kind->arrays[i].answer_at != 0)
            memcpy(packed + at, from, bytes);
        else if (bytes > 0) /* an answer doesn't tell a selection's forks from the others */
            (void)forks_of(c, answer, (uint64_t *)(void *)(packed + at));
    }
    return packed;
}

/* Gives the answer again; false: what it refers to is gone. */
static bool unpack(const ts_kept_answer *kept, const ts_engine *e, ts_command *c, ts_answer *answer)
{
    const ts_stored_answer *h = &kept->head;
    const answer_kind *kind = kind_of(h->op);
    *answer = (ts_answer){.status = TS_OK};
    put_word(answer, kind->count_at, h->count);
    put_word(answer, kind->blocks_at, h->blocks);
    put_word(answer, kind->length_at, h->length);
    for (uint32_t i = 0; i < KEPT_ARRAYS; i++) {
        const void *array = kept->bytes + bytes_of(h, i);
        if (kind->arrays[i].answer_at != 0)
            memcpy((unsigned char *)answer + kind->arrays[i].answer_at, &array, sizeof array);
    }
    return kind->give == NULL || kind->give(h, e, c, answer);
}

bool ts_answers_note(ts_answers *t, const ts_command *c, const ts_answer *answer)
{
    const uint32_t index = (uint32_t)caller_of(c).session;
    if (!is_kept(c) || answer->status != TS_OK || index >= t->max)
        return true;
    ts_kept_answer *kept = &t->all[index];
    if (kept->head.session == caller_of(c).session && kept->head.call > caller_of(c).call)
        return true; /* it was given up before the one whose answer is kept, which may come again */
    const ts_stored_answer h = head_of(c, answer);
    unsigned char *bytes = pack(&h, c, answer);
    if (bytes == NULL)
        return false;
    free(kept->bytes);
    *kept = (ts_kept_answer){h, bytes};
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
    /* A client that reuses a number for something else isn't told what has no room in its ring. */
    const uint16_t asked_at = kind_of(h->op)->asked_at;
    if (asked_at != 0 && word_at(c, asked_at) != h->count)
        return false;
    return unpack(kept, e, c, answer);
}

const uint64_t *ts_answers_find_made(const ts_answers *t, uint64_t session, uint64_t call,
                                     uint32_t *pool, uint32_t *count)
{
    const uint32_t index = (uint32_t)session;
    if (call == 0 || index >= t->max)
        return NULL;
    const ts_kept_answer *kept = &t->all[index];
    const ts_stored_answer *h = &kept->head;
    const answer_kind *kind = kind_of(h->op);
    if (h->session != session || h->call != call || kind->made == 0)
        return NULL;
    *pool = h->pool;
    *count = word_at(h, kind->arrays[kind->made - 1].count_at);
    const void *made = kept->bytes + bytes_of(h, kind->made - 1u);
    return *count == 0 ? NULL : made;
}

bool ts_answers_find_order(const ts_answers *t, const ts_caller *by, ts_op op, ts_answer *answer)
{
    const uint32_t index = (uint32_t)by->session;
    if (by->call == 0 || index >= t->max)
        return false;
    const ts_kept_answer *kept = &t->all[index];
    const ts_stored_answer *h = &kept->head;
    return h->session == by->session && h->call == by->call && h->op == (uint32_t)op &&
           unpack(kept, NULL, NULL, answer);
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
             h.bytes == bytes_of(&h, KEPT_ARRAYS);
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
