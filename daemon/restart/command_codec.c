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

#define BODY(member) (uint32_t)sizeof(((ts_command *)0)->member)
#define AT(member) (uint16_t) offsetof(ts_command, member)

/* Of each command: its struct, and where in it the pointers are. */
static const struct shape {
    uint32_t body_bytes, num_arrays;
    uint16_t at[TS_COMMAND_ARRAYS];
} shapes[] = {
    [TS_OP_SESSION_OPEN] = {BODY(session_open), 1, {AT(session_open.program)}},
    [TS_OP_SESSION_CLOSE] = {BODY(session_close), 0, {0}},
    [TS_OP_EXCHANGE_OPEN] = {BODY(exchange_open), 0, {0}},
    [TS_OP_POOL_OPEN] = {BODY(pool_open), 1, {AT(pool_open.name)}},
    [TS_OP_SEQ_CREATE] = {BODY(seq_create), 1, {AT(seq_create.space.bytes)}},
    [TS_OP_SEQ_FORK] = {BODY(seq_fork), 0, {0}},
    [TS_OP_SEQ_FREE] = {BODY(seq_batch), 2, {AT(seq_batch.seqs), AT(seq_batch.lengths)}},
    [TS_OP_SEQ_SELECT] = {BODY(seq_select), 2, {AT(seq_select.seqs), AT(seq_select.from)}},
    [TS_OP_SEQ_TRUNCATE] = {BODY(seq_batch), 2, {AT(seq_batch.seqs), AT(seq_batch.lengths)}},
    [TS_OP_SEQ_KEEP] = {BODY(seq_keep), 1, {AT(seq_keep.name)}},
    [TS_OP_SEQ_ATTACH] = {BODY(seq_keep), 1, {AT(seq_keep.name)}},
    [TS_OP_SEQ_LENGTHS] = {BODY(seq_batch), 1, {AT(seq_batch.seqs)}},
    [TS_OP_SEQ_BLOCKS] = {BODY(seq_blocks), 0, {0}},
    [TS_OP_SEQ_MATCH] = {BODY(seq_match),
                         3,
                         {AT(seq_match.counts), AT(seq_match.tokens), AT(seq_match.space.bytes)}},
    [TS_OP_SEQ_TICKET] = {BODY(seq_ticket), 0, {0}},
    [TS_OP_SEQ_REDEEM] = {BODY(seq_redeem), 0, {0}},
    [TS_OP_SEQ_LIST] = {BODY(seq_list), 2, {AT(seq_list.prefix), AT(seq_list.after)}},
    [TS_OP_STEP_BEGIN] = {BODY(step_begin),
                          3,
                          {AT(step_begin.seqs), AT(step_begin.new_tokens), AT(step_begin.tokens)}},
    [TS_OP_STEP_RUN] = {BODY(step_run), 0, {0}},
    [TS_OP_STEP_COMMIT] = {BODY(step_end), 1, {AT(step_end.accepted)}},
    [TS_OP_STEP_ABORT] = {BODY(step_end), 1, {AT(step_end.accepted)}},
    [TS_OP_STEP_DONE] = {BODY(step_done), 0, {0}},
    [TS_OP_SLAB_GRANT] = {BODY(slab_grant), 0, {0}},
    [TS_OP_SEQ_REMOVE] = {BODY(seq_remove), 0, {0}},
    [TS_OP_POOL_ADD] = {BODY(pool_add), 1, {AT(pool_add.config)}},
    [TS_OP_POOL_RESIZE] = {BODY(pool_resize), 0, {0}},
    [TS_OP_POOL_QUOTAS] = {BODY(pool_quotas), 1, {AT(pool_quotas.config)}},
    [TS_OP_LIMITS] = {BODY(limits), 1, {AT(limits.limits)}},
    [TS_OP_DRAIN] = {BODY(drain), 0, {0}},
    [TS_OP_CACHE_DROP] = {BODY(cache_drop), 1, {AT(cache_drop.space.bytes)}},
    [TS_OP_CACHE_SET] = {BODY(cache_set), 0, {0}},
    [TS_OP_SLAB_LOST] = {BODY(slab_grant), 0, {0}},
    [TS_OP_BLOCK_LOST] = {BODY(block_lost), 0, {0}},
    [TS_OP_RESTARTED] = {BODY(restarted), 0, {0}},
    [TS_OP_SESSION_BACK] = {0, 0, {0}}, /* the last */
};

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

static uint64_t sum(const uint32_t *counts, uint32_t count)
{
    uint64_t all = 0;
    for (uint32_t i = 0; i < count; i++)
        all += counts[i];
    return all;
}

static uint64_t text_bytes(const char *text)
{
    return text == NULL ? 0 : strlen(text) + 1;
}

/* Bytes of each array, in the order of its shape. */
static void sizes_of(const ts_command *c, uint64_t bytes[TS_COMMAND_ARRAYS])
{
    const uint64_t word = sizeof(uint32_t), id = sizeof(uint64_t);
    switch ((int)c->op) { /* the others have none */
    case TS_OP_SESSION_OPEN:
        bytes[0] = text_bytes(c->session_open.program);
        break;
    case TS_OP_POOL_OPEN:
        bytes[0] = text_bytes(c->pool_open.name);
        break;
    case TS_OP_SEQ_CREATE:
        bytes[0] = c->seq_create.space.count;
        break;
    case TS_OP_SEQ_MATCH:
        bytes[0] = c->seq_match.count * word;
        bytes[1] = sum(c->seq_match.counts, c->seq_match.count) * word;
        bytes[2] = c->seq_match.space.count;
        break;
    case TS_OP_SEQ_FREE:
    case TS_OP_SEQ_LENGTHS:
        bytes[0] = c->seq_batch.count * id;
        bytes[1] = 0;
        break;
    case TS_OP_SEQ_TRUNCATE:
        bytes[0] = c->seq_batch.count * id;
        bytes[1] = c->seq_batch.count * word;
        break;
    case TS_OP_SEQ_SELECT:
        bytes[0] = c->seq_select.count * id;
        bytes[1] = c->seq_select.picked * word;
        break;
    case TS_OP_SEQ_KEEP:
    case TS_OP_SEQ_ATTACH:
        bytes[0] = text_bytes(c->seq_keep.name);
        break;
    case TS_OP_SEQ_LIST:
        bytes[0] = text_bytes(c->seq_list.prefix);
        bytes[1] = text_bytes(c->seq_list.after);
        break;
    case TS_OP_STEP_BEGIN:
        bytes[0] = c->step_begin.count * id;
        bytes[1] = c->step_begin.count * word;
        bytes[2] = c->step_begin.tokens == NULL
                       ? 0
                       : sum(c->step_begin.new_tokens, c->step_begin.count) * word;
        break;
    case TS_OP_STEP_COMMIT:
    case TS_OP_STEP_ABORT:
        bytes[0] = c->step_end.count * word;
        break;
    case TS_OP_POOL_ADD:
    case TS_OP_POOL_QUOTAS:
        bytes[0] = sizeof(ts_pool_config);
        break;
    case TS_OP_LIMITS:
        bytes[0] = sizeof(ts_engine_limits);
        break;
    case TS_OP_CACHE_DROP:
        bytes[0] = c->cache_drop.space.count;
        break;
    default:
        break;
    }
    for (uint32_t i = 0; i < shapes[c->op].num_arrays; i++)
        if (pointer_at(c, shapes[c->op].at[i]) == NULL)
            bytes[i] = ABSENT;
}

static uint64_t padded(uint64_t bytes)
{
    return bytes == ABSENT ? 0 : (bytes + 7) & ~(uint64_t)7;
}

size_t ts_command_bytes(const ts_command *c)
{
    uint64_t sizes[TS_COMMAND_ARRAYS], bytes = sizeof(head) + padded(shapes[c->op].body_bytes);
    sizes_of(c, sizes);
    for (uint32_t i = 0; i < shapes[c->op].num_arrays; i++)
        bytes += padded(sizes[i]);
    return bytes;
}

void ts_command_write(const ts_command *c, void *out)
{
    const struct shape *shape = &shapes[c->op];
    unsigned char *at = out;
    head h = {.op = c->op,
              .pool = c->pool,
              .session = c->session,
              .call = c->call,
              .again = c->again,
              .body_bytes = shape->body_bytes};
    sizes_of(c, h.array_bytes);
    memcpy(at, &h, sizeof h);
    at += sizeof h;
    memcpy(at, &c->session_open, h.body_bytes); /* where each of the structs begins */
    at += padded(h.body_bytes);
    for (uint32_t i = 0; i < shape->num_arrays; i++) {
        if (h.array_bytes[i] != ABSENT)
            memcpy(at, pointer_at(c, shape->at[i]), h.array_bytes[i]);
        at += padded(h.array_bytes[i]);
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

bool ts_command_read(const void *in, size_t bytes, ts_command_room *room, ts_command *c)
{
    const unsigned char *at = in;
    head h;
    if (bytes < sizeof h)
        return false;
    memcpy(&h, at, sizeof h);
    if (h.op == 0 || h.op >= sizeof shapes / sizeof *shapes ||
        h.body_bytes > shapes[h.op].body_bytes || padded(h.body_bytes) > bytes - sizeof h)
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
    for (uint32_t i = 0; i < shape->num_arrays; i++) {
        if (h.array_bytes[i] != ABSENT &&
            (h.array_bytes[i] > left || padded(h.array_bytes[i]) > left))
            return false;
        const void *pointer = target(c, at, h.array_bytes[i], room);
        memcpy(member(c, shape->at[i]), &pointer, sizeof pointer);
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
    switch ((int)c->op) { /* the others have none */
    case TS_OP_SESSION_OPEN:
        h = mix(h, &answer->session, sizeof answer->session);
        break;
    case TS_OP_POOL_OPEN:
    case TS_OP_POOL_ADD:
        h = mix(h, &answer->pool, sizeof answer->pool);
        break;
    case TS_OP_SEQ_CREATE:
    case TS_OP_SEQ_FORK:
    case TS_OP_SEQ_SELECT:
    case TS_OP_SEQ_ATTACH:
    case TS_OP_SEQ_REDEEM:
        h = mix(h, answer->seqs.seqs, answer->seqs.count * sizeof *answer->seqs.seqs);
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

bool ts_command_only_looks(const ts_command *c)
{
    return c->op == TS_OP_POOL_ROOM || c->op == TS_OP_SEQ_LENGTHS || c->op == TS_OP_SEQ_BLOCKS ||
           c->op == TS_OP_SEQ_LIST || (c->op == TS_OP_SEQ_MATCH && c->seq_match.dry);
}
