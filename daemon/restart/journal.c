#define _GNU_SOURCE
#include "journal.h"

#include "file_error.h"
#include "tinyserve_version.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define MAGIC "tsbooks"
#define FORMAT 2u
#define HEAD_BYTES 4096u
#define SKIP 0x80000000u /* in an entry's bytes: nothing follows up to the ring's end */

_Static_assert(sizeof(ts_journal_head) <= HEAD_BYTES, "the head has a page");

/* Before the command. */
typedef struct entry_head {
    uint32_t bytes, status;    /* bytes: of all of the entry */
    uint32_t digest, checksum; /* checksum: 0: its writer made none */
    uint64_t now_ms;
} entry_head;

/* Of all else in the entry; never 0. */
static uint32_t checksum_of(const entry_head *e, const unsigned char *entry)
{
    const size_t from = offsetof(entry_head, now_ms); /* with what is before it as the seed */
    const uint64_t seed = ((uint64_t)e->status << 32 | e->digest) + e->bytes;
    const uint32_t sum = (uint32_t)XXH3_64bits_withSeed(entry + from, e->bytes - from, seed);
    return sum == 0 ? 1 : sum;
}

static ts_status fail(ts_journal *j, ts_status status, const char *what, char *why,
                      size_t why_bytes)
{
    char error[TS_FILE_ERROR_BYTES];
    snprintf(why, why_bytes, "the journal: %s: %s", what, ts_file_error(errno, error));
    ts_journal_close(j);
    return status;
}

/* Maps the descriptor's `bytes`. */
static bool map(ts_journal *j, uint64_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, j->fd, 0);
    if (at == MAP_FAILED)
        return false;
    (void)madvise(at, bytes, MADV_DONTDUMP); /* prompts lie in it */
    j->head = at;
    j->capacity = bytes - HEAD_BYTES;
    j->ring = (unsigned char *)at + HEAD_BYTES;
    return true;
}

ts_status ts_journal_new(ts_journal *j, uint64_t capacity, char *why, size_t why_bytes)
{
    const uint64_t bytes = HEAD_BYTES + capacity;
    *j = (ts_journal){.fd = memfd_create("tinyserve-journal", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
    if (j->fd < 0 || fchmod(j->fd, 0400) != 0 || ftruncate(j->fd, (off_t)bytes) != 0 ||
        fcntl(j->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 || !map(j, bytes))
        return fail(j, TS_ENOMEM, "making it", why, why_bytes);
    ts_journal_head *h = j->head;
    *h = (ts_journal_head){.magic = MAGIC, .format = FORMAT, .capacity = capacity};
    snprintf(h->version, sizeof h->version, "%s", TS_VERSION);
    if (getrandom(h->epoch, sizeof h->epoch, 0) != (ssize_t)sizeof h->epoch)
        return fail(j, TS_ENOMEM, "no randomness for its epoch", why, why_bytes);
    return TS_OK;
}

const ts_journal_snapshot *ts_journal_last(const ts_journal *j)
{
    const uint32_t snapshots = __atomic_load_n(&j->head->snapshots, __ATOMIC_ACQUIRE);
    return snapshots == 0 ? NULL : &j->head->snapshot[snapshots % 2];
}

ts_status ts_journal_open(ts_journal *j, int fd, char *why, size_t why_bytes)
{
    struct stat about;
    *j = (ts_journal){.fd = fd};
    if (fstat(fd, &about) != 0 || about.st_size < HEAD_BYTES) {
        snprintf(why, why_bytes, "the journal's file isn't one");
        return TS_EPROTO;
    }
    if (!map(j, (uint64_t)about.st_size)) {
        snprintf(why, why_bytes, "mapping the journal: %s", strerror(errno));
        return TS_ENOMEM;
    }
    const ts_journal_head *h = j->head;
    if (memcmp(h->magic, MAGIC, sizeof MAGIC) != 0 || h->format != FORMAT ||
        h->capacity != (uint64_t)about.st_size - HEAD_BYTES || h->capacity == 0 ||
        h->capacity % 8 != 0) {
        snprintf(why, why_bytes,
                 "the journal is of format %u, of version %.31s; version " TS_VERSION
                 " reads format %u",
                 h->format, h->version, FORMAT);
        munmap(j->head, (size_t)about.st_size);
        *j = (ts_journal){.fd = fd};
        return TS_EPROTO;
    }
    j->first = ts_journal_last(j) == NULL ? 0 : ts_journal_last(j)->position;
    return TS_OK;
}

void ts_journal_close(ts_journal *j)
{
    if (j->head != NULL)
        munmap(j->head, HEAD_BYTES + j->capacity);
    if (j->fd >= 0)
        close(j->fd);
    *j = (ts_journal){.fd = -1};
}

void ts_journal_snapshot_made(ts_journal *j, const ts_journal_snapshot *snapshot)
{
    const uint32_t snapshots = j->head->snapshots + 1;
    j->head->snapshot[snapshots % 2] = *snapshot;
    __atomic_store_n(&j->head->snapshots, snapshots, __ATOMIC_RELEASE);
    __atomic_store_n(&j->first, snapshot->position, __ATOMIC_RELEASE);
}

static uint64_t first_position(const ts_journal *j)
{
    return __atomic_load_n(&j->first, __ATOMIC_ACQUIRE);
}

uint64_t ts_journal_used(const ts_journal *j)
{
    return ts_journal_end(j) - first_position(j);
}

bool ts_journal_fits(const ts_journal *j, const ts_command *c)
{
    return sizeof(entry_head) + ts_command_bytes(c) <= j->capacity / 2;
}

bool ts_journal_put(ts_journal *j, const ts_command *c, uint64_t now_ms, ts_status status,
                    uint32_t digest)
{
    ts_journal_head *h = j->head;
    const uint64_t bytes = sizeof(entry_head) + ts_command_bytes(c);
    uint64_t at = h->head % j->capacity, end = h->head + bytes;
    const bool skips = bytes > j->capacity - at;
    if (skips)
        end += j->capacity - at;
    if (end - first_position(j) > j->capacity)
        return false;
    if (skips) {
        const uint32_t skip = SKIP;
        memcpy(j->ring + at, &skip, sizeof skip);
        at = 0;
    }
    entry_head *e = (entry_head *)(void *)(j->ring + at);
    e->bytes = (uint32_t)bytes;
    e->status = (uint32_t)status;
    e->digest = digest;
    e->now_ms = now_ms;
    ts_command_write(c, e + 1);
    e->checksum = checksum_of(e, j->ring + at);
    __atomic_store_n(&h->head, end, __ATOMIC_RELEASE);
    return true;
}

uint64_t ts_journal_end(const ts_journal *j)
{
    return __atomic_load_n(&j->head->head, __ATOMIC_ACQUIRE);
}

ts_status ts_journal_get(const ts_journal *j, uint64_t end, uint64_t *position,
                         ts_journal_entry *entry)
{
    uint32_t bytes;
    uint64_t at = *position % j->capacity;
    if (*position % 8 != 0)
        return TS_EPROTO;
    memcpy(&bytes, j->ring + at, sizeof bytes);
    if (bytes == SKIP) {
        *position += j->capacity - at;
        at = 0;
        memcpy(&bytes, j->ring, sizeof bytes);
    }
    entry_head e;
    if (bytes < sizeof e || bytes % 8 != 0 || bytes > j->capacity - at || *position > end ||
        bytes > end - *position)
        return TS_EPROTO;
    memcpy(&e, j->ring + at, sizeof e);
    if (e.checksum != 0 && e.checksum != checksum_of(&e, j->ring + at))
        return TS_EPROTO;
    if (!ts_command_read(j->ring + at + sizeof e, bytes - sizeof e, &entry->room, &entry->command))
        return TS_EPROTO;
    entry->command.now_ms = e.now_ms;
    entry->status = (ts_status)e.status;
    entry->digest = e.digest;
    *position += bytes;
    return TS_OK;
}
