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
    else if (many && f->type == PROTOBUF_C_TYPE_FIXED64)
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

static void one_built(fuzz_input *in, uint32_t pipe, known *k, uint64_t id)
{
    Tspb__Request r = TSPB__REQUEST__INIT;
    Tspb__SeqCreate create = TSPB__SEQ_CREATE__INIT;
    Tspb__SeqFork fork = TSPB__SEQ_FORK__INIT;
    Tspb__SeqFree release = TSPB__SEQ_FREE__INIT;
    Tspb__SeqTruncate truncate = TSPB__SEQ_TRUNCATE__INIT;
    Tspb__SeqKeep keep = TSPB__SEQ_KEEP__INIT;
    Tspb__SeqAttach attach = TSPB__SEQ_ATTACH__INIT;
    Tspb__SeqTicket ticket = TSPB__SEQ_TICKET__INIT;
    Tspb__SeqRedeem redeem = TSPB__SEQ_REDEEM__INIT;
    Tspb__ListKept list = TSPB__LIST_KEPT__INIT;
    Tspb__SeqBlocks blocks = TSPB__SEQ_BLOCKS__INIT;
    Tspb__SeqMatch match = TSPB__SEQ_MATCH__INIT;
    Tspb__StepBegin begin = TSPB__STEP_BEGIN__INIT;
    Tspb__StepRun run = TSPB__STEP_RUN__INIT;
    Tspb__StepCommit commit = TSPB__STEP_COMMIT__INIT;
    Tspb__StepAbort drop = TSPB__STEP_ABORT__INIT;
    Tspb__ExchangeOpen exchange = TSPB__EXCHANGE_OPEN__INIT;
    Tspb__PoolMap map = TSPB__POOL_MAP__INIT;
    Tspb__PoolOpen open = TSPB__POOL_OPEN__INIT;
    Tspb__PoolClose close = TSPB__POOL_CLOSE__INIT;
    uint64_t ids[4];
    uint32_t numbers[4], count = fuzz_take(in, 1) % 5;
    uint32_t kind = fuzz_take(in, 1) % 18, tokens[64];
    for (uint32_t i = 0; i < 4; i++) {
        ids[i] = fuzz_id(in, k->seqs, 8);
        numbers[i] = fuzz_number(in);
    }
    r.request_id = id;
    switch (kind) {
    case 0:
        create.count = count;
        r.body_case = TSPB__REQUEST__BODY_SEQ_CREATE;
        r.seq_create = &create;
        break;
    case 1:
        fork.parent = ids[0];
        fork.count = count;
        fork.length = numbers[0];
        fork.has_length = numbers[1] & 1;
        r.body_case = TSPB__REQUEST__BODY_SEQ_FORK;
        r.seq_fork = &fork;
        break;
    case 2:
        release.seqs = ids;
        release.n_seqs = count > 4 ? 4 : count;
        r.body_case = TSPB__REQUEST__BODY_SEQ_FREE;
        r.seq_free = &release;
        break;
    case 3:
        truncate.seqs = ids;
        truncate.lengths = numbers;
        truncate.n_seqs = count > 4 ? 4 : count;
        truncate.n_lengths = numbers[3] == 1 ? 1 : truncate.n_seqs;
        r.body_case = TSPB__REQUEST__BODY_SEQ_TRUNCATE;
        r.seq_truncate = &truncate;
        break;
    case 4:
        keep.seq = ids[0];
        keep.name = (char *)names[numbers[0] % 5];
        keep.ttl_ms = numbers[1];
        keep.replace = numbers[2] & 1;
        r.body_case = TSPB__REQUEST__BODY_SEQ_KEEP;
        r.seq_keep = &keep;
        break;
    case 5:
        attach.name = (char *)names[numbers[0] % 5];
        r.body_case = TSPB__REQUEST__BODY_SEQ_ATTACH;
        r.seq_attach = &attach;
        break;
    case 6:
        blocks.seq = ids[0];
        blocks.first = numbers[0];
        blocks.count = numbers[1];
        r.body_case = TSPB__REQUEST__BODY_SEQ_BLOCKS;
        r.seq_blocks = &blocks;
        break;
    case 7:
    case 8:
        begin.seqs = ids;
        begin.new_tokens = numbers;
        begin.n_seqs = begin.n_new_tokens = count > 4 ? 4 : count;
        begin.heads = fuzz_number(in);
        begin.io_dtype = fuzz_take(in, 1) % 5;
        begin.append = fuzz_take(in, 1) & 1;
        if (kind == 8) { /* with ids, of an alphabet of two */
            fill_tokens(in, tokens);
            begin.tokens = tokens;
            for (uint32_t i = 0; i < begin.n_seqs; i++)
                begin.n_tokens += numbers[i] %= 16;
        }
        r.body_case = TSPB__REQUEST__BODY_STEP_BEGIN;
        r.step_begin = &begin;
        break;
    case 9:
        run.step = fuzz_id(in, k->steps, 4);
        run.layer = fuzz_number(in) % 4;
        run.q = fuzz_number(in) * 64ull;
        run.k = fuzz_number(in) * 64ull;
        run.v = fuzz_number(in) * 64ull;
        run.out = fuzz_number(in) * 64ull;
        run.has_sinks = run.has_alibi = run.has_lse = fuzz_take(in, 1) & 1;
        run.sinks = run.alibi = run.lse = run.scales = fuzz_number(in) * 64ull;
        run.has_scales = fuzz_take(in, 1) & 1;
#define NUMBER(type, name, place, most, what) run.name = (type)fuzz_number(in);
        TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
        run.on_stream = numbers[0] == 1;
        run.number = numbers[1];
        r.body_case = TSPB__REQUEST__BODY_STEP_RUN;
        r.step_run = &run;
        break;
    case 10:
        commit.step = fuzz_id(in, k->steps, 4);
        commit.accepted = numbers;
        commit.n_accepted = count > 4 ? 4 : count;
        r.body_case = TSPB__REQUEST__BODY_STEP_COMMIT;
        r.step_commit = &commit;
        break;
    case 11:
        drop.step = fuzz_id(in, k->steps, 4);
        r.body_case = TSPB__REQUEST__BODY_STEP_ABORT;
        r.step_abort = &drop;
        break;
    case 12:
        if (numbers[0] & 1) {
            close.pool = numbers[1];
            r.body_case = TSPB__REQUEST__BODY_POOL_CLOSE;
            r.pool_close = &close;
        } else {
            open.name = (char *)names[3];
            open.writable = numbers[1] & 1;
            r.body_case = TSPB__REQUEST__BODY_POOL_OPEN;
            r.pool_open = &open;
        }
        break;
    case 13:
        fill_tokens(in, tokens);
        match.tokens = tokens;
        match.counts = numbers;
        match.n_counts = count > 4 ? 4 : count;
        for (uint32_t i = 0; i < match.n_counts; i++)
            match.n_tokens += numbers[i] %= 17;
        match.n_tokens -= match.n_tokens > 0 && fuzz_take(in, 1) == 255;
        match.dry = ids[0] & 1;
        match.space.data = (uint8_t *)tokens;
        match.space.len = fuzz_take(in, 1) < 240 ? 0 : numbers[3] % 80;
        r.body_case = TSPB__REQUEST__BODY_SEQ_MATCH;
        r.seq_match = &match;
        break;
    case 14:
        ticket.seq = ids[0];
        ticket.ttl_ms = numbers[0];
        r.body_case = TSPB__REQUEST__BODY_SEQ_TICKET;
        r.seq_ticket = &ticket;
        break;
    case 15:
        redeem.ticket.data = k->ticket;
        redeem.ticket.len = numbers[0] < 30 ? sizeof k->ticket : numbers[0] % sizeof k->ticket;
        k->ticket[0] ^= numbers[1] == 1;
        r.body_case = TSPB__REQUEST__BODY_SEQ_REDEEM;
        r.seq_redeem = &redeem;
        break;
    case 16:
        fuzz_wait(numbers[0]);
        list.prefix = (char *)names[numbers[1] % 5];
        list.after = (char *)names[numbers[2] % 5];
        list.limit = numbers[3];
        r.body_case = TSPB__REQUEST__BODY_LIST_KEPT;
        r.list_kept = &list;
        break;
    default:
        if (numbers[0] & 1) {
            exchange.bytes = fuzz_number(in) * 4096ull;
            fuzz_give_exchange(pipe, exchange.bytes % (2 << 20));
            r.body_case = TSPB__REQUEST__BODY_EXCHANGE_OPEN;
            r.exchange_open = &exchange;
        } else {
            map.pool = (char *)names[3];
            map.cells = numbers[1];
            r.body_case = TSPB__REQUEST__BODY_POOL_MAP;
            r.pool_map = &map;
        }
    }
    Tspb__Reply *reply = fuzz_call(pipe, &r);
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
