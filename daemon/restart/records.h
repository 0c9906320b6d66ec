/*
 * Records of a snapshot: structs of the engine as they lie in memory, with a table of their fields
 * by name, so that a later version reads what an earlier one wrote: a field that the earlier one
 * didn't have is 0, and one that the later one doesn't have is left out.
 *
 * A struct's pointers are in no table, and mean nothing in a record that was read: what they point
 * to is stored apart, and whoever reads sets them. Records of which there is one (`in_place`) are
 * read into a struct that is there: all but their fields stays as it is.
 *
 * Thread: any, one at a time for each writer and reader.
 */
#ifndef TS_RECORDS_H
#define TS_RECORDS_H

#include "engine.h"

/* What a record is of. The numbers are part of what is stored: new ones come last. */
typedef enum ts_record {
    TS_RECORD_WORD, /* uint32_t; what has no fields */
    TS_RECORD_BYTE,
    TS_RECORD_LONG, /* uint64_t */
    TS_RECORD_LIMITS,
    TS_RECORD_ENGINE,
    TS_RECORD_POOL_CONFIG,
    TS_RECORD_POOL,
    TS_RECORD_BOOKS,
    TS_RECORD_SLAB,
    TS_RECORD_TENANT,
    TS_RECORD_SEQUENCES,
    TS_RECORD_SEQUENCE,
    TS_RECORD_LIFE,
    TS_RECORD_INDEX,
    TS_RECORD_NODE,
    TS_RECORD_SPACE,
    TS_RECORD_SESSION,
    TS_RECORD_STEP,
    TS_RECORD_STEP_SEQ,
    TS_RECORD_CLAIMS,
    TS_RECORD_CLAIM,
    TS_RECORD_NAME,
    TS_RECORD_ANSWER,
    TS_RECORD_RUN,
    TS_RECORDS
} ts_record;

/* A name of a table of names, as it is stored: its bytes, with their end, come after. */
typedef struct ts_stored_name {
    uint32_t tenant, value, bytes;
} ts_stored_name;

/* An answer (answers.h), as it is stored. */
typedef struct ts_stored_answer {
    uint64_t session, call, id, bytes; /* ... of what it points to, which comes after */
    uint32_t op, pool, count, length, blocks;
    uint8_t ticket[TS_TICKET_BYTES];
} ts_stored_answer;

typedef struct ts_field {
    const char *name;
    uint32_t offset, bytes;
} ts_field;

typedef struct ts_record_type {
    const char *name;
    uint32_t bytes, num_fields;
    const ts_field *fields;
    bool in_place;
} ts_record_type;

extern const ts_record_type ts_record_types[TS_RECORDS];

/* Bytes that are written. With `at` NULL they are only counted. With `plain` only fields are
 * written, and 0 between them: the same state gives the same bytes. */
typedef struct ts_record_writer {
    unsigned char *at;
    uint64_t bytes;
    bool plain;
} ts_record_writer;

/* Writes the tables; first of all. */
void ts_records_begin(ts_record_writer *writer);

/* Writes `count` records that lie one after another; or each alone, after their number. */
void ts_records_put(ts_record_writer *writer, ts_record type, const void *records, uint64_t count);
void ts_records_put_count(ts_record_writer *writer, ts_record type, uint64_t count);
void ts_records_put_more(ts_record_writer *writer, ts_record type, const void *records,
                         uint64_t count);

typedef struct ts_record_reader {
    const unsigned char *at, *end;
    uint32_t bytes[TS_RECORDS]; /* of a stored record */
    bool same[TS_RECORDS];      /* it is stored as it lies in memory here */
    const unsigned char *fields[TS_RECORDS];
    uint32_t num_fields[TS_RECORDS];
    const char *why; /* what is wrong; NULL: nothing so far */
} ts_record_reader;

/* Reads the tables. False: they can't be, and reader->why is set, as by what follows. */
bool ts_records_open(ts_record_reader *reader, const void *bytes, uint64_t count);

/* Whether whoever wrote it knew of the type. */
bool ts_records_has(const ts_record_reader *reader, ts_record type);

/* How many records of the type come next; 0 after an error. */
uint64_t ts_records_next(ts_record_reader *reader, ts_record type);

/* Reads that many of them, or as many at a time. False after an error. */
bool ts_records_get(ts_record_reader *reader, ts_record type, void *records, uint64_t count);

/* Reads exactly `count` records. False: there are more or fewer, or an error came before. */
bool ts_records_get_all(ts_record_reader *reader, ts_record type, void *records, uint64_t count);

#endif
