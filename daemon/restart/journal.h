/*
 * The journal: the commands that were applied since a snapshot, in memory that outlives the daemon.
 *
 * It is a memfd: a page with a head, and a ring of entries. An entry is written when its command
 * has been applied and before anybody is told: nobody knows of what isn't in the journal. It is
 * *published* by one release store of the ring's end. Entries stay until a snapshot has what they
 * did.
 *
 * Positions count bytes from the first entry ever; they don't wrap around.
 *
 * Thread: one writes, and one reads what is published.
 */
#ifndef TS_JOURNAL_H
#define TS_JOURNAL_H

#include "command_codec.h"

#define TS_EPOCH_BYTES 16u
#define TS_AREAS 2u /* for snapshots: the older one stays until the newer one is whole */

/* A snapshot that is whole. */
typedef struct ts_journal_snapshot {
    uint64_t position; /* in the journal, from which it goes on */
    uint64_t bytes, checksum;
    uint32_t area; /* where it lies */
    uint32_t pad;
} ts_journal_snapshot;

/* Why nothing is taken over. */
typedef enum ts_discard {
    TS_DISCARD_NOT,
    TS_DISCARD_ORDERED,
    TS_DISCARD_BEHIND /* commands are in neither journal nor snapshot */
} ts_discard;

typedef struct ts_journal_head {
    char magic[8];
    uint32_t format;
    uint32_t taking_over;          /* 1: an attempt to take over is under way */
    char version[32];              /* of the daemon that wrote last */
    uint8_t epoch[TS_EPOCH_BYTES]; /* random, of each start with nothing */
    uint64_t capacity;             /* of the ring, in bytes */
    uint64_t head;                 /* what is published ends here; atomic */
    uint32_t snapshots;            /* that were ever whole; the last is at snapshots % 2; atomic */
    uint32_t restarts;             /* that took over what there was */
    uint32_t attempts;             /* to take over that failed since one succeeded */
    uint32_t op;                   /* that is being applied; 0: none is */
    uint64_t session, call;        /* ... for whom */
    uint64_t suspect_session, suspect_call; /* that was being applied at the last death */
    uint32_t suspect_op, deaths;            /* ... and at how many in a row */
    uint64_t died_ms;                       /* when that was found; of the clock since boot */
    uint32_t crash;   /* the signal by which the daemon ended itself; 0: none */
    uint32_t discard; /* the next daemon begins with nothing: ts_discard */
    ts_journal_snapshot snapshot[2];
} ts_journal_head;

typedef struct ts_journal {
    int fd;
    ts_journal_head *head;
    unsigned char *ring;
    uint64_t
        capacity;   /* the head's: who reads doesn't look at what the writer writes all the time */
    uint64_t first; /* position that the last snapshot covers; atomic: the writer looks at it */
} ts_journal;

/* A new one, with an epoch and no snapshot. capacity: a multiple of 4096. */
ts_status ts_journal_new(ts_journal *journal, uint64_t capacity, char *why, size_t why_bytes);

/* One that an earlier daemon wrote. The descriptor is the journal's until that is closed, also on
 * an error: then the journal has nothing else. TS_EPROTO: it is none, or of a format that this
 * version doesn't know. */
ts_status ts_journal_open(ts_journal *journal, int fd, char *why, size_t why_bytes);

void ts_journal_close(ts_journal *journal);

/* Writes and publishes what came of a command at now_ms. False: there is no room until a later
 * snapshot. */
bool ts_journal_put(ts_journal *journal, const ts_command *command, uint64_t now_ms,
                    ts_status status, uint32_t digest);

/* Whether the command could ever be put. */
bool ts_journal_fits(const ts_journal *journal, const ts_command *command);

/* Bytes published that the last snapshot doesn't cover. */
uint64_t ts_journal_used(const ts_journal *journal);

typedef struct ts_journal_entry {
    ts_command command; /* with its time */
    ts_status status;
    uint32_t digest;
    ts_command_room room;
} ts_journal_entry;

/* The position at which what is published ends now. */
uint64_t ts_journal_end(const ts_journal *journal);

/* Reads the entry at *position, which is before `end`, and moves *position on. TS_EPROTO: what
 * lies there is none. */
ts_status ts_journal_get(const ts_journal *journal, uint64_t end, uint64_t *position,
                         ts_journal_entry *entry);

/* The last snapshot; NULL: there is none. */
const ts_journal_snapshot *ts_journal_last(const ts_journal *journal);

/* The snapshot is whole: from now on it is the last. */
void ts_journal_snapshot_made(ts_journal *journal, const ts_journal_snapshot *snapshot);

#endif
