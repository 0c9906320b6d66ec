#include "replica.h"

#include "snapshot.h"
#include "test_point.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <xxhash.h>

ts_status ts_replica_read(ts_replica *r, const ts_journal *j, const int areas[TS_AREAS], char *why,
                          size_t why_bytes)
{
    const ts_journal_snapshot *last = ts_journal_last(j);
    struct stat about;
    *r = (ts_replica){0};
    if (last == NULL || last->area >= TS_AREAS) {
        snprintf(why, why_bytes, "there is no snapshot that is whole");
        return TS_EPROTO;
    }
    const int fd = areas[last->area];
    if (fd < 0) {
        snprintf(why, why_bytes, "the snapshot isn't in the store");
        return TS_EPROTO;
    }
    if (fstat(fd, &about) != 0 || (uint64_t)about.st_size < last->bytes) {
        snprintf(why, why_bytes, "the snapshot has %lld bytes of %llu", (long long)about.st_size,
                 (unsigned long long)last->bytes);
        return TS_EPROTO;
    }
    void *at = ts_point_fails("reading the books")
                   ? MAP_FAILED
                   : mmap(NULL, last->bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (at == MAP_FAILED) {
        snprintf(why, why_bytes, "mapping the snapshot: %s", strerror(errno));
        return TS_ENOMEM;
    }
    ts_status status = TS_EPROTO;
    if (XXH3_64bits(at, last->bytes) != last->checksum)
        snprintf(why, why_bytes, "the snapshot's checksum is wrong");
    else
        status = ts_snapshot_read(at, last->bytes, &r->engine, &r->answers, why, why_bytes);
    munmap(at, last->bytes);
    r->position = last->position;
    return status;
}

/* Applies the entry at the replica's position, which is before `end`. */
static ts_status apply_next(ts_replica *r, const ts_journal *j, uint64_t end, char *why,
                            size_t why_bytes)
{
    ts_journal_entry entry;
    ts_answer answer;
    const ts_status status = ts_journal_get(j, end, &r->position, &entry);
    if (status != TS_OK) {
        snprintf(why, why_bytes, "what lies at position %llu of the journal is no entry",
                 (unsigned long long)r->position);
        return status;
    }
    ts_engine_apply(r->engine, &entry.command, &answer);
    const uint32_t digest = ts_command_digest(&entry.command, &answer);
    if (answer.status != entry.status || digest != entry.digest) {
        snprintf(why, why_bytes,
                 "operation %u of session %llx gives %s (%x) where it gave %s (%x): %.100s",
                 (unsigned)entry.command.op, (unsigned long long)entry.command.session,
                 ts_status_name(answer.status), digest, ts_status_name(entry.status), entry.digest,
                 answer.message);
        return answer.status == TS_ENOMEM ? TS_ENOMEM : TS_EPROTO;
    }
    if (ts_answers_note(&r->answers, &entry.command, &answer))
        return TS_OK;
    snprintf(why, why_bytes, "no memory for an answer");
    return TS_ENOMEM;
}

ts_status ts_replica_follow(ts_replica *r, const ts_journal *j, uint64_t *entries, char *why,
                            size_t why_bytes)
{
    /* The end is seldom looked at: each look takes its cache line from the writer. */
    for (uint64_t end; (end = ts_journal_end(j)) != r->position;)
        while (r->position != end) {
            const ts_status status = apply_next(r, j, end, why, why_bytes);
            if (status != TS_OK)
                return status;
            ++*entries;
        }
    return TS_OK;
}

void ts_replica_free(ts_replica *r)
{
    ts_answers_fini(&r->answers);
    ts_engine_free(r->engine);
    *r = (ts_replica){0};
}
