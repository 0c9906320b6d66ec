#include "codec.h"

#include "plain_text.h"
#include "unconst.h"

#include <stdio.h>
#include <string.h>

static bool counts_agree(const char *what, size_t a, size_t b, ts_answer *answer)
{
    if (a == b)
        return true;
    ts_refuse(answer, TS_EINVAL, "%zu sequences, but %zu %s", a, b, what);
    return false;
}

/* Whether there is an id for each token that the counts add up to. */
static bool ids_agree(const uint32_t *counts, size_t num_counts, size_t num_ids, ts_answer *answer)
{
    uint64_t tokens = 0;
    for (size_t i = 0; i < num_counts; i++)
        tokens += counts[i];
    if (tokens == num_ids)
        return true;
    ts_refuse(answer, TS_EINVAL, "%llu tokens, but %zu token ids", (unsigned long long)tokens,
              num_ids);
    return false;
}

bool ts_decode_kernel(const char *name, ts_kernel *kernel, ts_answer *answer)
{
    *kernel = name[0] == '\0' ? TS_KERNEL_AUTO : ts_kernel_find(name);
    if (*kernel != TS_KERNEL_COUNT)
        return true;
    char known[64] = "";
    for (int i = 0; i < TS_KERNEL_COUNT; i++) {
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i == 0 ? "" : ", ",
                 ts_kernel_name((ts_kernel)i));
    }
    ts_refuse(answer, TS_EINVAL, "there is no kernel '%.32s'; known are %s", name, known);
    return false;
}

bool ts_decode_plain(const Tspb__Request *r, ts_answer *answer)
{
    const char *string, *field = NULL;
    char shown[160];
    if (r->body_case != TSPB__REQUEST__BODY_SESSION_OPEN)
        field = ts_text_find_not_plain(&r->base, &string);
    if (field != NULL)
        ts_refuse(answer, TS_EINVAL,
                  "%s '%s' has control characters, or isn't UTF-8: it must be plain text", field,
                  ts_text_escape(string, shown, sizeof shown));
    return field == NULL;
}

static bool decode_exchange_open(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__ExchangeOpen *m = r->exchange_open;
    (void)answer;
    c->exchange_open.bytes = m->bytes;
    return true;
}

static bool decode_pool_open(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__PoolOpen *m = r->pool_open;
    (void)answer;
    c->pool_open.name = m->name;
    c->pool_open.writable = m->writable;
    return true;
}

static bool decode_pool_close(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__PoolClose *m = r->pool_close;
    (void)answer;
    c->pool = m->pool;
    return true;
}

static bool decode_seq_create(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqCreate *m = r->seq_create;
    (void)answer;
    c->pool = m->pool;
    c->seq_create.count = m->count;
    c->seq_create.space = (ts_space_name){m->space.data, m->space.len};
    return true;
}

static bool decode_seq_fork(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqFork *m = r->seq_fork;
    (void)answer;
    c->pool = m->pool;
    c->seq_fork.parent = m->parent;
    c->seq_fork.count = m->count;
    c->seq_fork.length = m->length;
    c->seq_fork.has_length = m->has_length;
    return true;
}

static bool decode_seq_free(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqFree *m = r->seq_free;
    (void)answer;
    c->pool = m->pool;
    c->seq_batch.seqs = m->seqs;
    c->seq_batch.count = (uint32_t)m->n_seqs;
    c->seq_batch.forget = m->forget;
    return true;
}

static bool decode_seq_select(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqSelect *m = r->seq_select;
    (void)answer;
    c->pool = m->pool;
    c->seq_select.seqs = m->seqs;
    c->seq_select.count = (uint32_t)m->n_seqs;
    c->seq_select.from = m->from;
    c->seq_select.picked = (uint32_t)m->n_from;
    return true;
}

static bool decode_pool_room(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    (void)answer;
    c->pool = r->pool_room->pool;
    return true;
}

static bool decode_seq_truncate(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqTruncate *m = r->seq_truncate;
    c->pool = m->pool;
    c->seq_batch.seqs = m->seqs;
    c->seq_batch.lengths = m->lengths;
    c->seq_batch.by_counts = m->by_counts;
    c->seq_batch.count = (uint32_t)m->n_seqs;
    return counts_agree("lengths", m->n_seqs, m->n_lengths, answer);
}

static bool decode_seq_keep(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqKeep *m = r->seq_keep;
    (void)answer;
    c->pool = m->pool;
    c->seq_keep.seq = m->seq;
    c->seq_keep.name = m->name;
    c->seq_keep.ttl_ms = m->ttl_ms;
    c->seq_keep.replace = m->replace;
    return true;
}

/* The ticket's bytes are drawn by whoever applies the command. */
static bool decode_seq_ticket(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqTicket *m = r->seq_ticket;
    (void)answer;
    c->pool = m->pool;
    c->seq_ticket.seq = m->seq;
    c->seq_ticket.ttl_ms = m->ttl_ms;
    return true;
}

static bool decode_seq_redeem(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqRedeem *m = r->seq_redeem;
    c->pool = m->pool;
    if (m->ticket.len != sizeof c->seq_redeem.ticket) {
        ts_refuse(answer, TS_EINVAL, "a ticket of %zu bytes; it has %zu", m->ticket.len,
                  sizeof c->seq_redeem.ticket);
        return false;
    }
    memcpy(c->seq_redeem.ticket, m->ticket.data, m->ticket.len);
    return true;
}

static bool decode_list_kept(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__ListKept *m = r->list_kept;
    (void)answer;
    c->pool = m->pool;
    c->seq_list.prefix = m->prefix;
    c->seq_list.after = m->after;
    c->seq_list.limit = m->limit;
    return true;
}

static bool decode_seq_attach(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqAttach *m = r->seq_attach;
    (void)answer;
    c->pool = m->pool;
    c->seq_keep.name = m->name;
    return true;
}

static bool decode_seq_lengths(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqLengths *m = r->seq_lengths;
    (void)answer;
    c->pool = m->pool;
    c->seq_batch.seqs = m->seqs;
    c->seq_batch.count = (uint32_t)m->n_seqs;
    return true;
}

static bool decode_seq_blocks(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqBlocks *m = r->seq_blocks;
    (void)answer;
    c->pool = m->pool;
    c->seq_blocks.seq = m->seq;
    c->seq_blocks.first = m->first;
    c->seq_blocks.count = m->count;
    return true;
}

static bool decode_seq_match(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__SeqMatch *m = r->seq_match;
    c->pool = m->pool;
    c->seq_match.tokens = m->tokens;
    c->seq_match.counts = m->counts;
    c->seq_match.count = (uint32_t)m->n_counts;
    c->seq_match.space = (ts_space_name){m->space.data, m->space.len};
    c->seq_match.dry = m->dry;
    c->seq_match.wait = m->wait_ms > 0;
    return ids_agree(m->counts, m->n_counts, m->n_tokens, answer);
}

static bool decode_step_begin(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__StepBegin *m = r->step_begin;
    c->pool = m->pool;
    c->step_begin.seqs = m->seqs;
    c->step_begin.new_tokens = m->new_tokens;
    c->step_begin.count = (uint32_t)m->n_seqs;
    c->step_begin.heads = m->heads;
    c->step_begin.io_dtype = m->io_dtype;
    c->step_begin.scale = m->scale;
    c->step_begin.append = m->append;
    c->step_begin.wait = m->wait_ms > 0;
    c->step_begin.priority = m->priority;
    c->step_begin.tokens = m->n_tokens > 0 ? m->tokens : NULL;
    return ts_decode_kernel(m->kernel, &c->step_begin.kernel, answer) &&
           counts_agree("new_tokens", m->n_seqs, m->n_new_tokens, answer) &&
           (m->n_tokens == 0 || ids_agree(m->new_tokens, m->n_new_tokens, m->n_tokens, answer));
}

static bool decode_step_run(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__StepRun *m = r->step_run;
    (void)answer;
    ts_layer_run *run = &c->step_run.run;
    c->step_run.step = m->step;
    *run = (ts_layer_run){
        .q = m->q, .k = m->k, .v = m->v, .out = m->out, .layer = m->layer, .number = m->number};
#define NUMBER(type, name, place, most, what) run->name = m->name;
#define ARRAY(flag, name)                                                                          \
    run->name = m->name;                                                                           \
    run->flags |= m->has_##name ? TS_RUN_##flag : 0u;
#define SWITCH(flag, name) run->flags |= m->name ? TS_RUN_##flag : 0u;
    TS_RUN_NUMBERS(NUMBER)
    TS_RUN_ARRAYS(ARRAY)
    TS_RUN_SWITCHES(SWITCH)
#undef NUMBER
#undef ARRAY
#undef SWITCH
    return true;
}

static bool decode_step_commit(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__StepCommit *m = r->step_commit;
    (void)answer;
    c->step_end.step = m->step;
    c->step_end.accepted = m->n_accepted > 0 ? m->accepted : NULL;
    c->step_end.count = (uint32_t)m->n_accepted;
    return true;
}

static bool decode_step_abort(const Tspb__Request *r, ts_command *c, ts_answer *answer)
{
    const Tspb__StepAbort *m = r->step_abort;
    (void)answer;
    c->step_end.step = m->step;
    return true;
}

static void encode_pool(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                        Tspb__Reply *reply, ts_reply_body *body)
{
    const ts_engine_pool *pool = &e->pools[answer->pool];
    const ts_pool_config *config = &pool->config;
    Tspb__PoolOpened *p = &body->pool_opened;
    (void)c;
    tspb__pool_opened__init(p);
    p->pool = answer->pool;
    p->layers = config->geometry.layers;
    p->kv_heads = config->geometry.kv_heads;
    p->head_dim = config->geometry.head_dim;
    p->block_tokens = config->geometry.block_tokens;
    p->dtype = config->geometry.dtype;
    p->layout = config->geometry.layout;
    p->num_blocks = config->num_blocks;
    p->max_blocks = pool->books.max_blocks;
    p->slab_blocks = config->slab_blocks;
    p->memory = ts_unconst(config->memory);
    p->kernel = ts_unconst(ts_kernel_name(config->kernel));
    p->device = ts_unconst(config->device);
    p->sequence_tokens_max = config->sequence_tokens_max;
    if (config->on_gpu) {
        p->device_uuid.data = ts_unconst(config->device_uuid);
        p->device_uuid.len = sizeof config->device_uuid;
    }
    reply->body_case = TSPB__REPLY__BODY_POOL_OPENED;
    reply->pool_opened = p;
}

static void encode_seqs(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                        Tspb__Reply *reply, ts_reply_body *body)
{
    (void)e;
    (void)c;
    tspb__seqs__init(&body->seqs);
    body->seqs.seqs = ts_unconst(answer->seqs.seqs);
    body->seqs.n_seqs = answer->seqs.count;
    body->seqs.length = answer->seqs.length;
    reply->body_case = TSPB__REPLY__BODY_SEQS;
    reply->seqs = &body->seqs;
}

static void encode_ticket(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                          Tspb__Reply *reply, ts_reply_body *body)
{
    (void)e;
    (void)answer;
    tspb__ticket__init(&body->ticket);
    body->ticket.ticket.data = ts_unconst(c->seq_ticket.ticket);
    body->ticket.ticket.len = sizeof c->seq_ticket.ticket;
    reply->body_case = TSPB__REPLY__BODY_TICKET;
    reply->ticket = &body->ticket;
}

static void encode_kept(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                        Tspb__Reply *reply, ts_reply_body *body)
{
    (void)e;
    (void)c;
    Tspb__KeptList *m = &body->kept_list;
    tspb__kept_list__init(m);
    m->names = ts_unconst(answer->kept.names);
    m->seqs = ts_unconst(answer->kept.seqs);
    m->lengths = ts_unconst(answer->kept.lengths);
    m->blocks = ts_unconst(answer->kept.blocks);
    m->left_ms = ts_unconst(answer->kept.left_ms);
    m->n_names = m->n_seqs = m->n_lengths = m->n_blocks = m->n_left_ms = answer->kept.count;
    m->next = ts_unconst(answer->kept.next);
    reply->body_case = TSPB__REPLY__BODY_KEPT_LIST;
    reply->kept_list = m;
}

static void encode_room(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                        Tspb__Reply *reply, ts_reply_body *body)
{
    (void)e;
    (void)c;
    Tspb__Room *r = &body->room;
    tspb__room__init(r);
    r->blocks = answer->room.blocks;
    r->available = answer->room.available;
    r->used = answer->room.used;
    r->cached = answer->room.cached;
    r->pinned = answer->room.pinned;
    r->limit = answer->room.limit;
    r->others = answer->room.others;
    r->sequences = answer->room.sequences;
    r->waiting = answer->room.waiting;
    r->asked_tokens = answer->room.asked_tokens;
    r->found_tokens = answer->room.found_tokens;
    reply->body_case = TSPB__REPLY__BODY_ROOM;
    reply->room = r;
}

static void encode_lengths(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                           Tspb__Reply *reply, ts_reply_body *body)
{
    (void)e;
    (void)c;
    tspb__lengths__init(&body->lengths);
    body->lengths.lengths = ts_unconst(answer->lengths.lengths);
    body->lengths.n_lengths = answer->lengths.count;
    reply->body_case = TSPB__REPLY__BODY_LENGTHS;
    reply->lengths = &body->lengths;
}

static void encode_matched(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                           Tspb__Reply *reply, ts_reply_body *body)
{
    (void)e;
    (void)c;
    tspb__matched__init(&body->matched);
    body->matched.seqs = ts_unconst(answer->matched.seqs);
    body->matched.n_seqs = answer->matched.seqs != NULL ? answer->matched.count : 0;
    body->matched.lengths = ts_unconst(answer->matched.lengths);
    body->matched.n_lengths = answer->matched.count;
    body->matched.twins = ts_unconst(answer->matched.twins);
    body->matched.n_twins = answer->matched.twins != NULL ? answer->matched.count : 0;
    reply->body_case = TSPB__REPLY__BODY_MATCHED;
    reply->matched = &body->matched;
}

static void encode_blocks(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                          Tspb__Reply *reply, ts_reply_body *body)
{
    (void)e;
    (void)c;
    tspb__blocks__init(&body->blocks);
    body->blocks.length = answer->blocks.length;
    body->blocks.blocks = ts_unconst(answer->blocks.blocks);
    body->blocks.n_blocks = answer->blocks.count;
    reply->body_case = TSPB__REPLY__BODY_BLOCKS;
    reply->blocks = &body->blocks;
}

static void encode_begun(const ts_engine *e, const ts_command *c, const ts_answer *answer,
                         Tspb__Reply *reply, ts_reply_body *body)
{
    (void)e;
    tspb__step_begun__init(&body->step_begun);
    body->step_begun.step = c->step_begin.append ? 0 : answer->begun.step->id;
    body->step_begun.starts = ts_unconst(answer->begun.starts);
    body->step_begun.n_starts = answer->begun.num_seqs;
    body->step_begun.counts = ts_unconst(answer->begun.counts);
    body->step_begun.n_counts = answer->begun.num_seqs;
    body->step_begun.blocks = ts_unconst(answer->begun.blocks);
    body->step_begun.n_blocks = answer->begun.num_blocks;
    body->step_begun.copied_blocks = answer->begun.num_copies;
    reply->body_case = TSPB__REPLY__BODY_STEP_BEGUN;
    reply->step_begun = &body->step_begun;
}

/* The requests that are commands: what each becomes, and what answers it beside a status. */
static const struct message {
    ts_op op; /* 0: it is no such request */
    bool (*decode)(const Tspb__Request *request, ts_command *command, ts_answer *answer);
    void (*encode)(const ts_engine *engine, const ts_command *command, const ts_answer *answer,
                   Tspb__Reply *reply, ts_reply_body *body); /* NULL: a status alone */
} messages[] = {
    [TSPB__REQUEST__BODY_EXCHANGE_OPEN] = {TS_OP_EXCHANGE_OPEN, decode_exchange_open, NULL},
    [TSPB__REQUEST__BODY_POOL_OPEN] = {TS_OP_POOL_OPEN, decode_pool_open, encode_pool},
    [TSPB__REQUEST__BODY_POOL_CLOSE] = {TS_OP_POOL_CLOSE, decode_pool_close, NULL},
    [TSPB__REQUEST__BODY_SEQ_CREATE] = {TS_OP_SEQ_CREATE, decode_seq_create, encode_seqs},
    [TSPB__REQUEST__BODY_SEQ_FORK] = {TS_OP_SEQ_FORK, decode_seq_fork, encode_seqs},
    [TSPB__REQUEST__BODY_SEQ_FREE] = {TS_OP_SEQ_FREE, decode_seq_free, NULL},
    [TSPB__REQUEST__BODY_SEQ_SELECT] = {TS_OP_SEQ_SELECT, decode_seq_select, encode_seqs},
    [TSPB__REQUEST__BODY_POOL_ROOM] = {TS_OP_POOL_ROOM, decode_pool_room, encode_room},
    [TSPB__REQUEST__BODY_SEQ_TRUNCATE] = {TS_OP_SEQ_TRUNCATE, decode_seq_truncate, NULL},
    [TSPB__REQUEST__BODY_SEQ_KEEP] = {TS_OP_SEQ_KEEP, decode_seq_keep, NULL},
    [TSPB__REQUEST__BODY_SEQ_ATTACH] = {TS_OP_SEQ_ATTACH, decode_seq_attach, encode_seqs},
    [TSPB__REQUEST__BODY_SEQ_LENGTHS] = {TS_OP_SEQ_LENGTHS, decode_seq_lengths, encode_lengths},
    [TSPB__REQUEST__BODY_SEQ_BLOCKS] = {TS_OP_SEQ_BLOCKS, decode_seq_blocks, encode_blocks},
    [TSPB__REQUEST__BODY_SEQ_MATCH] = {TS_OP_SEQ_MATCH, decode_seq_match, encode_matched},
    [TSPB__REQUEST__BODY_SEQ_TICKET] = {TS_OP_SEQ_TICKET, decode_seq_ticket, encode_ticket},
    [TSPB__REQUEST__BODY_SEQ_REDEEM] = {TS_OP_SEQ_REDEEM, decode_seq_redeem, encode_seqs},
    [TSPB__REQUEST__BODY_LIST_KEPT] = {TS_OP_SEQ_LIST, decode_list_kept, encode_kept},
    [TSPB__REQUEST__BODY_STEP_BEGIN] = {TS_OP_STEP_BEGIN, decode_step_begin, encode_begun},
    [TSPB__REQUEST__BODY_STEP_RUN] = {TS_OP_STEP_RUN, decode_step_run, NULL},
    [TSPB__REQUEST__BODY_STEP_COMMIT] = {TS_OP_STEP_COMMIT, decode_step_commit, NULL},
    [TSPB__REQUEST__BODY_STEP_ABORT] = {TS_OP_STEP_ABORT, decode_step_abort, NULL},
};

/* NULL: the request is none of them. */
static const struct message *message_of(const Tspb__Request *r)
{
    const size_t index = (size_t)r->body_case;
    if (index >= sizeof messages / sizeof *messages || messages[index].op == 0)
        return NULL;
    return &messages[index];
}

bool ts_decode(const Tspb__Request *r, uint64_t session, ts_command *c, ts_answer *answer)
{
    const struct message *message = message_of(r);
    answer->status = TS_OK;
    if (message == NULL)
        return false;
    *c = (ts_command){.op = message->op, .session = session, .call = r->request_id};
    return message->decode(r, c, answer);
}

void ts_encode_status(const ts_answer *answer, Tspb__Reply *reply)
{
    reply->status = (uint32_t)answer->status;
    reply->message = ts_unconst(answer->message);
    reply->needed = answer->amounts.needed;
    reply->free = answer->amounts.free;
    reply->limit = answer->amounts.limit;
    reply->cached = answer->amounts.cached;
    reply->pinned = answer->amounts.pinned;
    reply->others = answer->amounts.others;
}

void ts_encode(const ts_engine *e, const Tspb__Request *r, const ts_command *c,
               const ts_answer *answer, Tspb__Reply *reply, ts_reply_body *body)
{
    const struct message *message = message_of(r);
    ts_encode_status(answer, reply);
    if (answer->status == TS_OK && message->encode != NULL)
        message->encode(e, c, answer, reply, body);
}
