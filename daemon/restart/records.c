#include "records.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define F(type, member)                                                                            \
    {                                                                                              \
#member, (uint32_t)offsetof(type, member), sizeof(((type *)0)->member)                     \
    }

#define S(member) F(ts_engine_limits, member)
static const ts_field limits_fields[] = {
    S(sessions),
    S(tenant_sessions),
    S(session_sequences),
    S(session_steps),
    S(step_runs),
    S(session_blocks),
    S(batch),
    S(step_tokens),
    S(exchange_bytes),
    S(first_generation),
    S(hash_seed),
};
#undef S
#define S(member) F(ts_engine, member)
static const ts_field engine_fields[] = {
    S(num_pools),     S(live_pools),   S(present_tenants),  S(num_tenants),      S(num_sessions),
    S(live_sessions), S(free_session), S(draining),         S(num_steps),        S(free_step),
    S(live_steps),    S(woken),        S(tokens_committed), S(waiting_for_room), S(now_ms),
    S(wants_sweep),   S(closing),      S(wrong_blocks),     S(lost_sequences),
};
#undef S
#define S(member) F(ts_pool_config, member)
static const ts_field config_fields[] = {
    S(name),
    S(geometry),
    S(num_blocks),
    S(slab_blocks),
    S(max_blocks),
    S(sequences_max),
    S(sequence_tokens_max),
    S(tenant_blocks_max),
    S(tenant_sequences_max),
    S(tenant_entries_max),
    S(tenant_pinned_max),
    S(client_write),
    S(cache),
    S(model),
    S(warp_groups),
    S(on_gpu),
    S(mps),
    S(kernel),
    S(device),
    S(memory),
    S(device_name),
    S(device_uuid),
};
#undef S
#define S(member) F(ts_engine_pool, member)
static const ts_field pool_fields[] = {
    S(open_steps), S(waiting), S(room), S(room_turn), S(asked_tokens), S(found_tokens),
};
#undef S
#define S(member) F(ts_pool_books, member)
static const ts_field books_fields[] = {
    S(num_blocks),  S(slab_blocks), S(num_slabs),    S(max_blocks),  S(used),
    S(shared),      S(ungranted),   S(empty),        S(num_empty),   S(cached),
    S(idle_oldest), S(idle_newest), S(empty_blocks), S(idle_blocks), S(evicted),
    S(ages),        S(age_sum),     S(now_s),        S(num_tenants),
};
#undef S
#define S(member) F(ts_slab, member)
static const ts_field slab_fields[] = {
    S(tenant),    S(generation), S(used),       S(cached),     S(touched),    S(free_head),
    S(blocks),    S(avail_prev), S(avail_next), S(empty_prev), S(empty_next), S(idle_prev),
    S(idle_next), S(home),       S(home_prev),  S(home_next),
};
#undef S
#define S(member) F(ts_pool_tenant, member)
static const ts_field tenant_fields[] = {
    S(avail),         S(slabs),        S(free),         S(used),       S(cached),  S(cached_oldest),
    S(cached_newest), S(empty_blocks), S(idle_blocks),  S(sequences),  S(tickets), S(pinned),
    S(entries),       S(asked_tokens), S(found_tokens), S(avail_last), S(nobodys), S(homes),
};
#undef S
#define S(member) F(ts_sequences, member)
static const ts_field sequences_fields[] = {
    S(count), S(max),          S(live),      S(kept), S(free_head), S(first_generation),
    S(dying), S(block_tokens), S(num_lives),
};
#undef S
#define S(member) F(ts_sequence, member)
static const ts_field sequence_fields[] = {
    S(num_blocks), S(length), S(generation),       S(tenant),        S(owner), S(step),
    S(prev),       S(next),   S(unchanged_prefix), S(known_step),    S(space), S(known),
    S(claim),      S(life),   S(forgets),          S(borrowed_tail),
};
#undef S
#define S(member) F(ts_life, member)
static const ts_field life_fields[] = {S(end_ms), S(ttl_ms), S(seq)};
#undef S
#define S(member) F(ts_prefix_index, member)
static const ts_field index_fields[] = {
    S(num_blocks), S(block_tokens),  S(seed),       S(count), S(bucket_mask), S(num_spaces),
    S(free_space), S(retired_space), S(next_space), S(off),   S(num_tenants),
};
#undef S
#define S(member) F(ts_index_node, member)
static const ts_field node_fields[] = {
    S(parent), S(first_child), S(older), S(newer), S(hash), S(next_in_chain), S(space),
};
#undef S
#define S(member) F(ts_index_space, member)
static const ts_field space_fields[] = {
    S(tenant),       S(first_child),  S(seed), S(users),   S(next_free), S(blocks),
    S(asked_tokens), S(found_tokens), S(live), S(retired), S(name),
};
#undef S
#define S(member) F(ts_session, member)
static const ts_field session_fields[] = {
    S(generation),
    S(live),
    S(closing),
    S(away),
    S(tenant),
    S(pid),
    S(process_started),
    S(program),
    S(token),
    S(nonce),
    S(call),
    S(exchange_bytes),
    S(exchanges),
    S(exchange),
    S(stream_number),
    S(sequences),
    S(blocks),
    S(steps),
    S(step_list),
    S(opened_pools),
    S(writable_pools),
    S(claims),
    S(newest_claim),
    S(wait),
    S(next_free),
    S(in_closing),
    S(next_closing),
};
#undef S
#define S(member) F(ts_step, member)
static const ts_field step_fields[] = {
    S(id),        S(call),   S(session), S(pool),         S(prev),      S(next),
    S(in_flight), S(live),   S(append),  S(copying),      S(crashes),   S(heads),
    S(io_dtype),  S(scale),  S(kernel),  S(class),        S(by_worker), S(quarantined),
    S(tokens),    S(layers), S(failed),  S(failed_layer), S(num_seqs),  S(num_stream_runs),
    S(aborted),
};
#undef S
#define S(member) F(ts_step_seq, member)
static const ts_field step_seq_fields[] = {
    S(seq), S(start), S(new_tokens), S(reserved), S(original), S(known),
};
#undef S
#define S(member) F(ts_layer_run, member)
#define ARRAY(flag, name) S(name),
#define NUMBER(type, name, place, most, what) S(name),
static const ts_field run_fields[] = {
    S(q),     S(k),      S(v), S(out), TS_RUN_ARRAYS(ARRAY) TS_RUN_NUMBERS(NUMBER) S(layer),
    S(flags), S(number),
};
#undef NUMBER
#undef ARRAY
#undef S
#define S(member) F(ts_claims, member)
static const ts_field claims_fields[] = {
    S(count), S(live), S(free_head), S(looked_ms), S(buckets),
};
#undef S
#define S(member) F(ts_claim, member)
static const ts_field claim_fields[] = {
    S(from),   S(end),  S(at),   S(pool),  S(space), S(seq),           S(session), S(prompt),
    S(parent), S(hash), S(next), S(older), S(newer), S(idle_since_ms), S(waiters), S(live),
};
#undef S
#define S(member) F(ts_stored_name, member)
static const ts_field name_fields[] = {S(tenant), S(value), S(bytes)};
#undef S
#define S(member) F(ts_stored_answer, member)
static const ts_field answer_fields[] = {
    S(session), S(call), S(id), S(bytes), S(op), S(pool), S(count), S(length), S(blocks), S(ticket),
};
#undef S

#define TYPE(type, fields)                                                                         \
    {                                                                                              \
#type, sizeof(type), sizeof(fields) / sizeof *(fields), fields, false                      \
    }
#define ONE(type, fields)                                                                          \
    {                                                                                              \
#type, sizeof(type), sizeof(fields) / sizeof *(fields), fields, true                       \
    }

const ts_record_type ts_record_types[TS_RECORDS] = {
    [TS_RECORD_WORD] = {"uint32_t", sizeof(uint32_t), 0, NULL, false},
    [TS_RECORD_BYTE] = {"uint8_t", 1, 0, NULL, false},
    [TS_RECORD_LONG] = {"uint64_t", sizeof(uint64_t), 0, NULL, false},
    [TS_RECORD_LIMITS] = TYPE(ts_engine_limits, limits_fields),
    [TS_RECORD_ENGINE] = ONE(ts_engine, engine_fields),
    [TS_RECORD_POOL_CONFIG] = TYPE(ts_pool_config, config_fields),
    [TS_RECORD_POOL] = ONE(ts_engine_pool, pool_fields),
    [TS_RECORD_BOOKS] = ONE(ts_pool_books, books_fields),
    [TS_RECORD_SLAB] = TYPE(ts_slab, slab_fields),
    [TS_RECORD_TENANT] = TYPE(ts_pool_tenant, tenant_fields),
    [TS_RECORD_SEQUENCES] = ONE(ts_sequences, sequences_fields),
    [TS_RECORD_SEQUENCE] = TYPE(ts_sequence, sequence_fields),
    [TS_RECORD_LIFE] = TYPE(ts_life, life_fields),
    [TS_RECORD_INDEX] = ONE(ts_prefix_index, index_fields),
    [TS_RECORD_NODE] = TYPE(ts_index_node, node_fields),
    [TS_RECORD_SPACE] = TYPE(ts_index_space, space_fields),
    [TS_RECORD_SESSION] = TYPE(ts_session, session_fields),
    [TS_RECORD_STEP] = TYPE(ts_step, step_fields),
    [TS_RECORD_STEP_SEQ] = TYPE(ts_step_seq, step_seq_fields),
    [TS_RECORD_CLAIMS] = ONE(ts_claims, claims_fields),
    [TS_RECORD_CLAIM] = TYPE(ts_claim, claim_fields),
    [TS_RECORD_NAME] = TYPE(ts_stored_name, name_fields),
    [TS_RECORD_ANSWER] = TYPE(ts_stored_answer, answer_fields),
    [TS_RECORD_RUN] = TYPE(ts_layer_run, run_fields),
};

/* As they are stored. */
typedef struct stored_type {
    uint32_t bytes, num_fields;
} stored_type;
typedef struct stored_field {
    char name[24];
    uint32_t offset, bytes;
} stored_field;
typedef struct stored_head { /* of records */
    uint32_t type, bytes;
    uint64_t count;
} stored_head;

static uint64_t padded(uint64_t bytes)
{
    return (bytes + 7) & ~(uint64_t)7;
}

/* ---- writing ---- */

static void put(ts_record_writer *w, const void *bytes, uint64_t count)
{
    if (w->at != NULL && count > 0)
        memcpy(w->at + w->bytes, bytes, count);
    w->bytes += count;
}

/* What comes next begins at a multiple of 8. */
static void align(ts_record_writer *w)
{
    static const unsigned char zeros[8];
    put(w, zeros, padded(w->bytes) - w->bytes);
}

void ts_records_begin(ts_record_writer *w)
{
    const uint32_t types[2] = {TS_RECORDS, 0};
    put(w, types, sizeof types);
    for (uint32_t i = 0; i < TS_RECORDS; i++) {
        const ts_record_type *t = &ts_record_types[i];
        put(w, &(stored_type){t->bytes, t->num_fields}, sizeof(stored_type));
        for (uint32_t j = 0; j < t->num_fields; j++) {
            stored_field f = {.offset = t->fields[j].offset, .bytes = t->fields[j].bytes};
            snprintf(f.name, sizeof f.name, "%s", t->fields[j].name);
            put(w, &f, sizeof f);
        }
    }
}

void ts_records_put_count(ts_record_writer *w, ts_record type, uint64_t count)
{
    align(w);
    put(w, &(stored_head){type, ts_record_types[type].bytes, count}, sizeof(stored_head));
}

void ts_records_put_more(ts_record_writer *w, ts_record type, const void *records, uint64_t count)
{
    const ts_record_type *t = &ts_record_types[type];
    if (t->num_fields == 0 || (!w->plain && !t->in_place))
        return put(w, records, count * t->bytes);
    for (uint64_t i = 0; i < count; i++) {
        const unsigned char *record = (const unsigned char *)records + i * t->bytes;
        unsigned char *to = w->at == NULL ? NULL : w->at + w->bytes;
        if (to != NULL)
            memset(to, 0, t->bytes);
        for (uint32_t j = 0; to != NULL && j < t->num_fields; j++)
            memcpy(to + t->fields[j].offset, record + t->fields[j].offset, t->fields[j].bytes);
        w->bytes += t->bytes;
    }
}

void ts_records_put(ts_record_writer *w, ts_record type, const void *records, uint64_t count)
{
    ts_records_put_count(w, type, count);
    ts_records_put_more(w, type, records, count);
}

/* ---- reading ---- */

static bool fail(ts_record_reader *r, const char *why)
{
    if (r->why == NULL)
        r->why = why;
    return false;
}

/* The next `count` bytes, or NULL. */
static const unsigned char *take(ts_record_reader *r, uint64_t count)
{
    const unsigned char *at = r->at;
    if (r->why != NULL || count > (uint64_t)(r->end - at)) {
        fail(r, "it is cut off");
        return NULL;
    }
    r->at += count;
    return at;
}

static bool is_same(const ts_record_type *type, const stored_type *stored,
                    const unsigned char *fields)
{
    if (stored->bytes != type->bytes || stored->num_fields != type->num_fields)
        return false;
    for (uint32_t i = 0; i < type->num_fields; i++) {
        stored_field f;
        memcpy(&f, fields + i * sizeof f, sizeof f);
        f.name[sizeof f.name - 1] = '\0';
        if (strcmp(f.name, type->fields[i].name) != 0 || f.offset != type->fields[i].offset ||
            f.bytes != type->fields[i].bytes)
            return false;
    }
    return true;
}

bool ts_records_open(ts_record_reader *r, const void *bytes, uint64_t count)
{
    *r = (ts_record_reader){.at = bytes, .end = (const unsigned char *)bytes + count};
    uint32_t types[2];
    const unsigned char *at = take(r, sizeof types);
    if (at == NULL)
        return false;
    memcpy(types, at, sizeof types);
    if (types[0] > TS_RECORDS)
        return fail(r, "a later version wrote it");
    for (uint32_t i = 0; i < types[0]; i++) {
        stored_type t;
        if ((at = take(r, sizeof t)) == NULL)
            return false;
        memcpy(&t, at, sizeof t);
        if ((at = take(r, (uint64_t)t.num_fields * sizeof(stored_field))) == NULL)
            return false;
        r->bytes[i] = t.bytes;
        r->fields[i] = at;
        r->num_fields[i] = t.num_fields;
        r->same[i] = is_same(&ts_record_types[i], &t, at);
        for (uint32_t j = 0; j < t.num_fields; j++) {
            stored_field f;
            memcpy(&f, at + j * sizeof f, sizeof f);
            if (f.offset > t.bytes || f.bytes > t.bytes - f.offset)
                return fail(r, "a field lies outside its record");
        }
    }
    return true;
}

bool ts_records_has(const ts_record_reader *r, ts_record type)
{
    return r->bytes[type] > 0;
}

uint64_t ts_records_next(ts_record_reader *r, ts_record type)
{
    stored_head h;
    const unsigned char *at = take(r, (uint64_t)(-(uintptr_t)r->at & 7));
    at = at == NULL ? NULL : take(r, sizeof h);
    if (at == NULL)
        return 0;
    memcpy(&h, at, sizeof h);
    if (h.type != (uint32_t)type || h.bytes != r->bytes[type] ||
        (h.bytes > 0 && h.count > (uint64_t)(r->end - r->at) / h.bytes)) {
        fail(r, ts_record_types[type].name);
        return 0;
    }
    return h.count;
}

/* One record whose fields lie elsewhere, or are others. */
static void convert(const ts_record_reader *r, ts_record type, const unsigned char *stored,
                    unsigned char *record)
{
    const ts_record_type *t = &ts_record_types[type];
    if (!t->in_place)
        memset(record, 0, t->bytes);
    for (uint32_t i = 0; i < r->num_fields[type]; i++) {
        stored_field f;
        memcpy(&f, r->fields[type] + i * sizeof f, sizeof f);
        f.name[sizeof f.name - 1] = '\0';
        for (uint32_t j = 0; j < t->num_fields; j++)
            if (strcmp(f.name, t->fields[j].name) == 0)
                memcpy(record + t->fields[j].offset, stored + f.offset,
                       f.bytes < t->fields[j].bytes ? f.bytes : t->fields[j].bytes);
    }
}

bool ts_records_get(ts_record_reader *r, ts_record type, void *records, uint64_t count)
{
    const ts_record_type *t = &ts_record_types[type];
    const unsigned char *at = take(r, count * r->bytes[type]);
    if (at == NULL)
        return false;
    if (t->num_fields == 0 || (r->same[type] && !t->in_place)) {
        if (count > 0)
            memcpy(records, at, count * t->bytes);
        return true;
    }
    for (uint64_t i = 0; i < count; i++)
        convert(r, type, at + i * r->bytes[type], (unsigned char *)records + i * t->bytes);
    return true;
}

bool ts_records_get_all(ts_record_reader *r, ts_record type, void *records, uint64_t count)
{
    const uint64_t there = ts_records_next(r, type);
    if (r->why == NULL && there != count)
        return fail(r, ts_record_types[type].name);
    return r->why == NULL && ts_records_get(r, type, records, count);
}
