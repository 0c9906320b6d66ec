#include "command_codec.h"

#include <string.h>
#include <xxhash.h>

#define ABSENT UINT64_MAX /* bytes of an array whose pointer is NULL */

/* What a command's bytes begin with. Its struct follows, and each of its arrays, from a multiple of
 * 8 on. */
typedef struct head {
    uint32_t op, pool;
    uint64_t session, call;
    uint32_t again, body_bytes;
    uint64_t array_bytes[TS_COMMAND_ARRAYS];
} head;

/* How many elements an array has, in which the command's own fields say it. */
typedef enum array_kind {
    NO_ARRAY,
    A_TEXT,   /* up to its NUL */
    A_STRUCT, /* one of them */
    A_LIST,   /* as many as a uint32_t says */
    A_SUM,    /* as many as the numbers of another array, of which a uint32_t says how many */
    A_SPACE,  /* a ts_space_name's bytes */
} array_kind;

typedef struct array {
    array_kind kind;
    uint16_t at; /* of the pointer to it, in the command */
    uint16_t element_bytes, count_at, counts_at;
} array;

#define AT(member) (uint16_t) offsetof(ts_command, member)
#define ELEMENT(member) (uint16_t)sizeof(*((ts_command *)0)->member)
#define TEXT(member)                                                                               \
    {                                                                                              \
        A_TEXT, AT(member), 1, 0, 0                                                                \
    }
#define STRUCT(member)                                                                             \
    {                                                                                              \
        A_STRUCT, AT(member), ELEMENT(member), 0, 0                                                \
    }
#define LIST(member, count)                                                                        \
    {                                                                                              \
        A_LIST, AT(member), ELEMENT(member), AT(count), 0                                          \
    }
#define SUM(member, counts, count)                                                                 \
    {                                                                                              \
        A_SUM, AT(member), ELEMENT(member), AT(count), AT(counts)                                  \
    }
#define SPACE(member)                                                                              \
    {                                                                                              \
        A_SPACE, AT(member.bytes), 1, AT(member.count), 0                                          \
    }
#define BODY(member) .body_bytes = (uint32_t)sizeof(((ts_command *)0)->member)
#define POINTS_TO(...) .arrays = {__VA_ARGS__}
#define IDS .answers_ids = true
#define LOOKS .only_looks = true

/* Of each command: its struct, what that points to, and what comes of it. */
static const struct shape {
    uint32_t body_bytes;
    array arrays[TS_COMMAND_ARRAYS];
    bool answers_ids, only_looks;
} shapes[TS_OP_COUNT] = {
#define OPERATION(name, needs, apply, ...) [TS_OP_##name] = {__VA_ARGS__},
#include "operations.inc.h"
#undef OPERATION
};

bool ts_command_is_known(uint32_t op)
{
    return op != TS_OP_NONE && op < TS_OP_COUNT;
}

bool ts_command_answers_ids(uint32_t op)
{
    return op < TS_OP_COUNT && shapes[op].answers_ids;
}

bool ts_command_only_looks(const ts_command *c)
{
    return shapes[c->op].only_looks || (c->op == TS_OP_SEQ_MATCH && c->seq_match.dry);
}

static void *member(ts_command *c, uint16_t at)
{
    return (unsigned char *)c + at;
}

static const void *pointer_at(const ts_command *c, uint16_t at)
{
    const void *pointer;
    memcpy(&pointer, (const unsigned char *)c + at, sizeof pointer);
    return pointer;
}

static uint32_t count_at(const ts_command *c, uint16_t at)
{
    uint32_t count;
    memcpy(&count, (const unsigned char *)c + at, sizeof count);
    return count;
}

/* How many elements of the array the command points to, whose pointer isn't NULL. */
static uint64_t elements_of(const ts_command *c, const array *a)
{
    const uint32_t *counts;
    uint64_t all = 0;
    size_t bytes;
    switch (a->kind) {
    case A_TEXT:
        return strlen(pointer_at(c, a->at)) + 1;
    case A_STRUCT:
        return 1;
    case A_LIST:
        return count_at(c, a->count_at);
    case A_SUM:
        counts = pointer_at(c, a->counts_at);
        for (uint32_t i = 0; i < count_at(c, a->count_at); i++)
            all += counts[i];
        return all;
    case A_SPACE:
        memcpy(&bytes, (const unsigned char *)c + a->count_at, sizeof bytes);
        return bytes;
    case NO_ARRAY:
        break;
    }
    return 0;
}

/* Bytes of each array, in the order of its shape. */
static void sizes_of(const ts_command *c, uint64_t bytes[TS_COMMAND_ARRAYS])
{
    const array *arrays = shapes[c->op].arrays;
    memset(bytes, 0, TS_COMMAND_ARRAYS * sizeof *bytes);
    for (uint32_t i = 0; i < TS_COMMAND_ARRAYS && arrays[i].kind != NO_ARRAY; i++)
        bytes[i] = pointer_at(c, arrays[i].at) == NULL
                       ? ABSENT
                       : elements_of(c, &arrays[i]) * arrays[i].element_bytes;
}

static uint64_t padded(uint64_t bytes)
{
    return bytes == ABSENT ? 0 : (bytes + 7) & ~(uint64_t)7;
}

size_t ts_command_bytes(const ts_command *c)
{
    const struct shape *shape = &shapes[c->op];
    uint64_t sizes[TS_COMMAND_ARRAYS], bytes = sizeof(head) + padded(shape->body_bytes);
    sizes_of(c, sizes);
    for (uint32_t i = 0; i < TS_COMMAND_ARRAYS && shape->arrays[i].kind != NO_ARRAY; i++)
        bytes += padded(sizes[i]);
    return bytes;
}

void ts_command_write(const ts_command *c, void *out)
{
    const struct shape *shape = &shapes[c->op];
    head *h = out; /* in place: to copy what was just written waits for it */
    h->op = c->op;
    h->pool = c->pool;
    h->session = c->session;
    h->call = c->call;
    h->again = c->again;
    h->body_bytes = shape->body_bytes;
    sizes_of(c, h->array_bytes);
    unsigned char *at = (unsigned char *)(h + 1);
    memcpy(at, &c->session_open, shape->body_bytes); /* where each of the structs begins */
    at += padded(shape->body_bytes);
    for (uint32_t i = 0; i < TS_COMMAND_ARRAYS && shape->arrays[i].kind != NO_ARRAY; i++) {
        if (h->array_bytes[i] != ABSENT)
            memcpy(at, pointer_at(c, shape->arrays[i].at), h->array_bytes[i]);
        at += padded(h->array_bytes[i]);
    }
}

/* A struct that may have been shorter when it was written. */
static const void *widen(const void *written, uint64_t bytes, void *room, size_t room_bytes)
{
    memset(room, 0, room_bytes);
    memcpy(room, written, bytes < room_bytes ? bytes : room_bytes);
    return room;
}

/* What the command points to once its array lies at `at`. */
static const void *target(const ts_command *c, const unsigned char *at, uint64_t bytes,
                          ts_command_room *room)
{
    if (bytes == ABSENT)
        return NULL;
    if (c->op == TS_OP_POOL_ADD || c->op == TS_OP_POOL_QUOTAS)
        return widen(at, bytes, &room->config, sizeof room->config);
    if (c->op == TS_OP_LIMITS)
        return widen(at, bytes, &room->limits, sizeof room->limits);
    return at;
}

/* Whether the array, of `bytes` bytes, is as long as the command's fields say; the arrays before it
 * were checked. */
static bool is_whole(const ts_command *c, const array *a, uint64_t bytes)
{
    const void *pointer = pointer_at(c, a->at);
    if (a->kind == A_STRUCT) /* a shorter one was widened */
        return pointer != NULL;
    if (pointer == NULL)
        return true;
    if (a->kind == A_TEXT)
        return memchr(pointer, '\0', bytes) != NULL;
    if (a->kind == A_SUM && pointer_at(c, a->counts_at) == NULL)
        return false;
    return elements_of(c, a) * a->element_bytes == bytes;
}

bool ts_command_read(const void *in, size_t bytes, ts_command_room *room, ts_command *c)
{
    const unsigned char *at = in;
    head h;
    if (bytes < sizeof h)
        return false;
    memcpy(&h, at, sizeof h);
    if (!ts_command_is_known(h.op) || h.body_bytes > shapes[h.op].body_bytes ||
        padded(h.body_bytes) > bytes - sizeof h)
        return false;
    *c = (ts_command){.op = (ts_op)h.op,
                      .session = h.session,
                      .pool = h.pool,
                      .again = h.again != 0,
                      .call = h.call};
    const struct shape *shape = &shapes[h.op];
    size_t left = bytes - sizeof h - padded(h.body_bytes);
    at += sizeof h;
    memcpy(&c->session_open, at, h.body_bytes);
    at += padded(h.body_bytes);
    for (uint32_t i = 0; i < TS_COMMAND_ARRAYS && shape->arrays[i].kind != NO_ARRAY; i++) {
        if (h.array_bytes[i] != ABSENT &&
            (h.array_bytes[i] > left || padded(h.array_bytes[i]) > left))
            return false;
        const void *pointer = target(c, at, h.array_bytes[i], room);
        memcpy(member(c, shape->arrays[i].at), &pointer, sizeof pointer);
        if (!is_whole(c, &shape->arrays[i], h.array_bytes[i]))
            return false;
        at += padded(h.array_bytes[i]);
        left -= padded(h.array_bytes[i]);
    }
    return true;
}

static uint64_t mix(uint64_t hash, const void *bytes, size_t count)
{
    return bytes == NULL ? hash : XXH3_64bits_withSeed(bytes, count, hash);
}

uint32_t ts_command_digest(const ts_command *c, const ts_answer *answer)
{
    uint64_t h = mix(c->op, &answer->status, sizeof answer->status);
    if (answer->status != TS_OK)
        return (uint32_t)h;
    if (shapes[c->op].answers_ids)
        h = mix(h, answer->seqs.seqs, answer->seqs.count * sizeof *answer->seqs.seqs);
    switch ((int)c->op) { /* the others have none */
    case TS_OP_SESSION_OPEN:
        h = mix(h, &answer->session, sizeof answer->session);
        break;
    case TS_OP_POOL_OPEN:
    case TS_OP_POOL_ADD:
        h = mix(h, &answer->pool, sizeof answer->pool);
        break;
    case TS_OP_SEQ_MATCH:
        h = mix(h, answer->matched.seqs,
                answer->matched.seqs == NULL
                    ? 0
                    : answer->matched.count * sizeof *answer->matched.seqs);
        h = mix(h, answer->matched.lengths,
                answer->matched.count * sizeof *answer->matched.lengths);
        break;
    case TS_OP_STEP_BEGIN:
        h = mix(h, answer->begun.blocks, answer->begun.num_blocks * sizeof *answer->begun.blocks);
        h = answer->begun.step == NULL
                ? h
                : mix(h, &answer->begun.step->id, sizeof answer->begun.step->id);
        break;
    default:
        break;
    }
    return (uint32_t)h;
}
