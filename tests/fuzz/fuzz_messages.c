/*
 * Fuzz target: requests into the service and its engine, as the transport hands them over: through
 * the queue, run here where the engine is idle and by its own thread where it isn't. An input is a
 * list of requests: bytes to be unpacked as they are, or fields to build a request of, by hand or
 * by its description, which may name ids and tickets that earlier answers gave, or let time go on.
 * After each input the engine's books must agree.
 */
#include "fuzz_input.h"
#include "fuzz_service.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

typedef struct known {
    uint64_t seqs[8], steps[4];
    uint8_t ticket[TS_TICKET_BYTES]; /* the last */
} known;

static void learn(known *k, const Tspb__Reply *r, uint32_t at)
{
    if (r == NULL)
        return;
    if (r->body_case == TSPB__REPLY__BODY_SEQS)
        for (size_t i = 0; i < r->seqs->n_seqs && i < 3; i++)
            k->seqs[(at + i) % 8] = r->seqs->seqs[i];
    if (r->body_case == TSPB__REPLY__BODY_TICKET)
        memcpy(k->ticket, r->ticket->ticket.data, sizeof k->ticket);
    if (r->body_case == TSPB__REPLY__BODY_STEP_BEGUN && r->step_begun->step != 0)
        k->steps[at % 4] = r->step_begun->step;
}

/* Ids of 64 tokens, of an alphabet of two, one in sixteen unknown. */
static void fill_tokens(fuzz_input *in, uint32_t *tokens)
{
    uint32_t bits = fuzz_take(in, 4), unknown = fuzz_take(in, 1);
    for (uint32_t i = 0; i < 64; i++)
        tokens[i] = i % 16 == unknown ? TS_TOKEN_UNKNOWN : bits >> i % 32 & 1;
}

static const char *const names[] = {"", "a", "b", "fuzz", "nope"};

/* What one_described points to. */
typedef struct lists {
    uint64_t ids[4];
    uint32_t numbers[4], tokens[64];
} lists;

/* A field of any message; messages in it stay away. */
static void fill_field(fuzz_input *in, known *k, lists *l, const ProtobufCFieldDescriptor *f,
                       unsigned char *message)
{
    void *at = message + f->offset;
    const bool many = f->label == PROTOBUF_C_LABEL_REPEATED;
    size_t count = fuzz_take(in, 1) % 5;
    if (many && f->type == PROTOBUF_C_TYPE_UINT32)
        *(void **)at = strcmp(f->name, "tokens") == 0 ? l->tokens : l->numbers;
    else if (many && (f->type == PROTOBUF_C_TYPE_FIXED64 || f->type == PROTOBUF_C_TYPE_UINT64))
        *(void **)at = l->ids;
    else if (many)
        return;
    else if (f->type == PROTOBUF_C_TYPE_FIXED64)
        *(uint64_t *)at =
            strcmp(f->name, "step") == 0 ? fuzz_id(in, k->steps, 4) : l->ids[count % 4];
    else if (f->type == PROTOBUF_C_TYPE_UINT64)
        *(uint64_t *)at = fuzz_number(in);
    else if (f->type == PROTOBUF_C_TYPE_UINT32 || f->type == PROTOBUF_C_TYPE_INT32)
        *(uint32_t *)at = fuzz_number(in);
    else if (f->type == PROTOBUF_C_TYPE_FLOAT)
        *(float *)at = (float)fuzz_number(in);
    else if (f->type == PROTOBUF_C_TYPE_BOOL)
        *(protobuf_c_boolean *)at = count & 1;
    else if (f->type == PROTOBUF_C_TYPE_STRING)
        *(const char **)at = names[count];
    else if (f->type == PROTOBUF_C_TYPE_BYTES)
        *(ProtobufCBinaryData *)at = (ProtobufCBinaryData){count * 4, (uint8_t *)l->tokens};
    if (many)
        *(size_t *)(void *)(message + f->quantifier_offset) = count > 4 ? 4 : count;
}

/* Any request that there is, of the fields that its description has. */
static Tspb__Reply *call_described(fuzz_input *in, uint32_t pipe, known *k, uint64_t id)
{
    const ProtobufCMessageDescriptor *d = &tspb__request__descriptor;
    const ProtobufCFieldDescriptor *request = &d->fields[fuzz_take(in, 1) % d->n_fields];
    const ProtobufCMessageDescriptor *body = request->descriptor;
    Tspb__Request r = TSPB__REQUEST__INIT;
    _Alignas(16) unsigned char message[512];
    lists l;
    if (request->type != PROTOBUF_C_TYPE_MESSAGE)
        return NULL;
    assert(body->sizeof_message <= sizeof message);
    protobuf_c_message_init(body, (ProtobufCMessage *)(void *)message);
    fill_tokens(in, l.tokens);
    for (uint32_t i = 0; i < 4; i++) {
        l.ids[i] = fuzz_id(in, k->seqs, 8);
        l.numbers[i] = fuzz_number(in);
    }
    for (unsigned i = 0; i < body->n_fields; i++)
        fill_field(in, k, &l, &body->fields[i], message);
    r.request_id = id;
    r.body_case = (Tspb__Request__BodyCase)request->id;
    *(void **)(void *)((unsigned char *)&r + request->offset) = message;
    return fuzz_call(pipe, &r);
}

/* A request that is built by hand, and what it points to. */
typedef struct built {
    fuzz_input *in;
    uint32_t pipe;
    known *k;
    Tspb__Request request;
    uint64_t ids[4];
    uint32_t numbers[4], tokens[64];
    uint32_t count; /* 0 to 4 */
    union {
        Tspb__SeqCreate seq_create;
        Tspb__SeqFork seq_fork;
        Tspb__SeqFree seq_free;
        Tspb__SeqTruncate seq_truncate;
        Tspb__SeqKeep seq_keep;
        Tspb__SeqAttach seq_attach;
        Tspb__SeqTicket seq_ticket;
        Tspb__SeqRedeem seq_redeem;
        Tspb__ListKept list_kept;
        Tspb__SeqBlocks seq_blocks;
        Tspb__SeqMatch seq_match;
        Tspb__StepBegin step_begin;
        Tspb__StepRun step_run;
        Tspb__StepCommit step_commit;
        Tspb__StepAbort step_abort;
        Tspb__ExchangeOpen exchange_open;
        Tspb__PoolMap pool_map;
        Tspb__PoolOpen pool_open;
        Tspb__PoolClose pool_close;
    } body;
} built;

/* Makes the request one of this kind; its body, empty. */
#define BODY(b, Type, NAME, name)                                                                  \
    (b->body.name = (Tspb__##Type)TSPB__##NAME##__INIT,                                            \
     b->request.body_case = TSPB__REQUEST__BODY_##NAME, b->request.name = &b->body.name)

static void build_create(built *b)
{
    Tspb__SeqCreate *body = BODY(b, SeqCreate, SEQ_CREATE, seq_create);
    body->count = b->count;
}

static void build_fork(built *b)
{
    Tspb__SeqFork *body = BODY(b, SeqFork, SEQ_FORK, seq_fork);
    body->parent = b->ids[0];
    body->count = b->count;
    body->length = b->numbers[0];
    body->has_length = b->numbers[1] & 1;
}

static void build_free(built *b)
{
    Tspb__SeqFree *body = BODY(b, SeqFree, SEQ_FREE, seq_free);
    body->seqs = b->ids;
    body->n_seqs = b->count;
}

static void build_truncate(built *b)
{
    Tspb__SeqTruncate *body = BODY(b, SeqTruncate, SEQ_TRUNCATE, seq_truncate);
    body->seqs = b->ids;
    body->lengths = b->numbers;
    body->n_seqs = b->count;
    body->n_lengths = b->numbers[3] == 1 ? 1 : b->count;
}

static void build_keep(built *b)
{
    Tspb__SeqKeep *body = BODY(b, SeqKeep, SEQ_KEEP, seq_keep);
    body->seq = b->ids[0];
    body->name = (char *)names[b->numbers[0] % 5];
    body->ttl_ms = b->numbers[1];
    body->replace = b->numbers[2] & 1;
}

static void build_attach(built *b)
{
    Tspb__SeqAttach *body = BODY(b, SeqAttach, SEQ_ATTACH, seq_attach);
    body->name = (char *)names[b->numbers[0] % 5];
}

static void build_blocks(built *b)
{
    Tspb__SeqBlocks *body = BODY(b, SeqBlocks, SEQ_BLOCKS, seq_blocks);
    body->seq = b->ids[0];
    body->first = b->numbers[0];
    body->count = b->numbers[1];
}

static void build_begin(built *b)
{
    Tspb__StepBegin *body = BODY(b, StepBegin, STEP_BEGIN, step_begin);
    body->seqs = b->ids;
    body->new_tokens = b->numbers;
    body->n_seqs = body->n_new_tokens = b->count;
    body->heads = fuzz_number(b->in);
    body->io_dtype = fuzz_take(b->in, 1) % 5;
    body->append = fuzz_take(b->in, 1) & 1;
}

/* With ids, of an alphabet of two. */
static void build_begin_of_ids(built *b)
{
    build_begin(b);
    fill_tokens(b->in, b->tokens);
    b->body.step_begin.tokens = b->tokens;
    for (uint32_t i = 0; i < b->count; i++)
        b->body.step_begin.n_tokens += b->numbers[i] %= 16;
}

static void build_run(built *b)
{
    Tspb__StepRun *body = BODY(b, StepRun, STEP_RUN, step_run);
    body->step = fuzz_id(b->in, b->k->steps, 4);
    body->layer = fuzz_number(b->in) % 4;
    body->q = fuzz_number(b->in) * 64ull;
    body->k = fuzz_number(b->in) * 64ull;
    body->v = fuzz_number(b->in) * 64ull;
    body->out = fuzz_number(b->in) * 64ull;
    body->has_sinks = body->has_alibi = body->has_lse = fuzz_take(b->in, 1) & 1;
    body->sinks = body->alibi = body->lse = body->scales = fuzz_number(b->in) * 64ull;
    body->has_scales = fuzz_take(b->in, 1) & 1;
#define NUMBER(type, name, place, most, what) body->name = (type)fuzz_number(b->in);
    TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
    body->on_stream = b->numbers[0] == 1;
    body->number = b->numbers[1];
}

static void build_commit(built *b)
{
    Tspb__StepCommit *body = BODY(b, StepCommit, STEP_COMMIT, step_commit);
    body->step = fuzz_id(b->in, b->k->steps, 4);
    body->accepted = b->numbers;
    body->n_accepted = b->count;
}

static void build_abort(built *b)
{
    BODY(b, StepAbort, STEP_ABORT, step_abort)->step = fuzz_id(b->in, b->k->steps, 4);
}

static void build_close_or_open(built *b)
{
    if (b->numbers[0] & 1) {
        BODY(b, PoolClose, POOL_CLOSE, pool_close)->pool = b->numbers[1];
        return;
    }
    Tspb__PoolOpen *body = BODY(b, PoolOpen, POOL_OPEN, pool_open);
    body->name = (char *)names[3];
    body->writable = b->numbers[1] & 1;
}

static void build_match(built *b)
{
    Tspb__SeqMatch *body = BODY(b, SeqMatch, SEQ_MATCH, seq_match);
    fill_tokens(b->in, b->tokens);
    body->tokens = b->tokens;
    body->counts = b->numbers;
    body->n_counts = b->count;
    for (uint32_t i = 0; i < body->n_counts; i++)
        body->n_tokens += b->numbers[i] %= 17;
    body->n_tokens -= body->n_tokens > 0 && fuzz_take(b->in, 1) == 255;
    body->dry = b->ids[0] & 1;
    body->space.data = (uint8_t *)b->tokens;
    body->space.len = fuzz_take(b->in, 1) < 240 ? 0 : b->numbers[3] % 80;
}

static void build_ticket(built *b)
{
    Tspb__SeqTicket *body = BODY(b, SeqTicket, SEQ_TICKET, seq_ticket);
    body->seq = b->ids[0];
    body->ttl_ms = b->numbers[0];
}

static void build_redeem(built *b)
{
    Tspb__SeqRedeem *body = BODY(b, SeqRedeem, SEQ_REDEEM, seq_redeem);
    uint8_t *ticket = b->k->ticket;
    body->ticket.data = ticket;
    body->ticket.len = b->numbers[0] < 30 ? TS_TICKET_BYTES : b->numbers[0] % TS_TICKET_BYTES;
    ticket[0] ^= b->numbers[1] == 1;
}

static void build_list(built *b)
{
    Tspb__ListKept *body = BODY(b, ListKept, LIST_KEPT, list_kept);
    fuzz_wait(b->numbers[0]);
    body->prefix = (char *)names[b->numbers[1] % 5];
    body->after = (char *)names[b->numbers[2] % 5];
    body->limit = b->numbers[3];
}

static void build_exchange_or_map(built *b)
{
    if (b->numbers[0] & 1) {
        Tspb__ExchangeOpen *body = BODY(b, ExchangeOpen, EXCHANGE_OPEN, exchange_open);
        body->bytes = fuzz_number(b->in) * 4096ull;
        fuzz_give_exchange(b->pipe, body->bytes % (2 << 20));
        return;
    }
    Tspb__PoolMap *body = BODY(b, PoolMap, POOL_MAP, pool_map);
    body->pool = (char *)names[3];
    body->cells = b->numbers[1];
}

static void (*const builders[])(built *b) = {
    build_create,        build_fork,   build_free,
    build_truncate,      build_keep,   build_attach,
    build_blocks,        build_begin,  build_begin_of_ids,
    build_run,           build_commit, build_abort,
    build_close_or_open, build_match,  build_ticket,
    build_redeem,        build_list,   build_exchange_or_map,
};

/* One of those, with some ids and numbers for it. */
static void one_built(fuzz_input *in, uint32_t pipe, known *k, uint64_t id)
{
    built b = {.in = in, .pipe = pipe, .k = k, .request = TSPB__REQUEST__INIT};
    b.request.request_id = id;
    b.count = fuzz_take(in, 1) % 5;
    const uint32_t kind = fuzz_take(in, 1) % (sizeof builders / sizeof *builders);
    for (uint32_t i = 0; i < 4; i++) {
        b.ids[i] = fuzz_id(in, k->seqs, 8);
        b.numbers[i] = fuzz_number(in);
    }
    builders[kind](&b);
    Tspb__Reply *reply = fuzz_call(pipe, &b.request);
    learn(k, reply, (uint32_t)id);
    tspb__reply__free_unpacked(reply, NULL);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    fuzz_service_start();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {.at = data, .end = data + size};
    known k = {{0}, {0}, {0}};
    uint32_t uid = 1000 + fuzz_take(&in, 1) % 3;
    uint32_t pipe = fuzz_connect(uid, fuzz_take(&in, 1) & 1);
    for (uint64_t id = 1; in.at < in.end && id < 200; id++) {
        uint32_t kind = fuzz_take(&in, 1);
        if (kind < 200) {
            one_built(&in, pipe, &k, kind < 8 ? id - 1 : id);
            continue;
        }
        if (kind >= 224 && kind < 240) {
            Tspb__Reply *reply = call_described(&in, pipe, &k, id);
            learn(&k, reply, (uint32_t)id);
            tspb__reply__free_unpacked(reply, NULL);
            continue;
        }
        size_t bytes = fuzz_take(&in, 1);
        const uint8_t *packed = fuzz_bytes(&in, &bytes);
        Tspb__Request *message = tspb__request__unpack(NULL, bytes, packed);
        tspb__reply__free_unpacked(fuzz_call(pipe, message), NULL);
        tspb__request__free_unpacked(message, NULL);
    }
    fuzz_disconnect(pipe);
    fuzz_check_books();
    return 0;
}
