/*
 * The books: the part of the daemon's state that outlives it. A journal and two areas for
 * snapshots, each a memfd that a *keeper* holds (in the daemon: store.h), and a thread that
 * follows: it applies what is in the journal to a copy of the engine, compares what comes of it
 * with what came of it before, and writes the snapshots. So a snapshot holds up nobody, and what a
 * restart would do is done all the time.
 *
 * The order, on which all depends: a command is applied, then written to the journal; only then is
 * anybody told, or anything done that the engine asks for.
 *
 * Where there is no memory for a snapshot, it is tried again every TS_BOOKS_RETRY_MS. Once the
 * journal is full meanwhile, commands go on without it, and the books are *behind*: the next daemon
 * would begin with nothing, until a snapshot has all again.
 *
 * Thread: the engine's owner of the moment (work_queue.h), but for ts_books_open and
 * ts_books_close.
 */
#ifndef TS_BOOKS_H
#define TS_BOOKS_H

#include "answers.h"
#include "journal.h"

#define TS_BOOKS_RETRY_MS 5000u /* by the commands' clock */

typedef struct ts_books ts_books;

/* Who holds descriptors. */
typedef struct ts_keeper {
    void *arg;
    /* The descriptor that was kept under the name, the caller's from now on; -1: none was. */
    int (*take)(void *arg, const char *name);
    /* Keeps a duplicate of the descriptor. TS_ENOSPC: there is no room, whatever else goes for it.
     */
    ts_status (*keep)(void *arg, const char *name, int fd, char *why, size_t why_bytes);
    void (*forget)(void *arg, const char *name);
} ts_keeper;

typedef struct ts_books_options {
    ts_keeper keeper;
    const ts_engine_limits *limits; /* of an engine that starts with nothing */
    uint64_t journal_bytes;         /* 0: 64 MiB */
    uint32_t entries;               /* in the journal, after which a snapshot is due; 0: as many as
                                     * take twice a snapshot's time to replay, 4096 at least */
} ts_books_options;

/* What a start found. */
typedef struct ts_books_start {
    bool restored;     /* what an earlier daemon left */
    bool discarded;    /* what was left, as an operator had ordered (ts_books_discard) */
    uint32_t restarts; /* that took over, this one included */
    uint32_t failed;   /* attempts to take over that failed before this one */
    uint64_t entries;  /* that were replayed */
    uint64_t snapshot_bytes, journal_bytes;
    double seconds;
    uint32_t last_op; /* that was being applied when the last daemon died; 0: none was */
    uint64_t last_session;
    int crash;       /* the signal by which the last daemon ended itself; 0: it was ended */
    uint32_t deaths; /* in a row at which the same was being applied */
    char why[256];   /* with TS_OK and not restored: why there was nothing to take over, or
                      * why what there was could not be; empty: there was nothing */
} ts_books_start;

/*
 * Takes over what the keeper has, or begins with nothing. *engine is the caller's, to be freed
 * after ts_books_close. What can't be taken over is kept under other names ("failed.journal", ...),
 * and begun anew; where there is no memory to read it, it stays. TS_ENOMEM and others: there are no
 * books, with a sentence; TS_ENOSPC: the keeper has no room for them, and none of them.
 */
ts_status ts_books_open(const ts_books_options *options, ts_books **books, ts_engine **engine,
                        ts_books_start *start, char *why, size_t why_bytes);

/* Ends the thread. What the keeper has stays. NULL is fine, as everywhere here. */
void ts_books_close(ts_books *books);

/* A command is about to be applied. */
void ts_books_begin(ts_books *books, const ts_command *command);

/* It was applied, and this came of it: it is in the journal, or in a snapshot, when this returns,
 * unless the books are behind. */
void ts_books_note(ts_books *books, const ts_engine *engine, const ts_command *command,
                   const ts_answer *answer);

/* Has a snapshot made that covers the whole journal, and waits for it, `ms` at most: the next
 * daemon, which may be of another version, has no command to apply. Thread: the engine's owner, who
 * applies nothing any more. */
void ts_books_settle(ts_books *books, const ts_engine *engine, uint32_t ms);

/* How an attempt to take over ended. Three that fail, or crash, are enough: then the next daemon
 * begins with nothing. One that was killed from outside doesn't count. */
typedef enum ts_takeover_end {
    TS_TAKEOVER_SERVES,
    TS_TAKEOVER_FAILED,
    TS_TAKEOVER_WAITS /* for a device or memory: nothing is wrong with the books */
} ts_takeover_end;

void ts_books_taken_over(ts_books *books, ts_takeover_end end);

/* Where a handler of SIGSEGV and the like notes the signal, so that the next daemon knows that this
 * one ended itself; NULL: nowhere. */
volatile uint32_t *ts_books_crash_word(ts_books *books);

/* Has the next daemon begin with nothing. */
void ts_books_discard(ts_books *books);

/* Whether the command repeats the last call of its session before a restart; *answer is what it was
 * answered. See answers.h. */
bool ts_books_answered(const ts_books *books, const ts_engine *engine, ts_command *command,
                       ts_answer *answer);

/* The *count new sequences that the session's last call before a restart made, if it was this one,
 * and their pool; NULL: none. */
const uint64_t *ts_books_made(const ts_books *books, uint64_t session, uint64_t call,
                              uint32_t *pool, uint32_t *count);

/* Whether the caller's last call before a restart was this operator's order, and was carried out;
 * *answer is what it was answered. */
bool ts_books_ordered(const ts_books *books, const ts_caller *by, ts_op op, ts_answer *answer);

typedef struct ts_books_figures {
    uint64_t journal_bytes, journal_used; /* the ring's, and what no snapshot covers */
    uint64_t snapshot_bytes;              /* the last one's */
    uint32_t snapshots;                   /* made by this daemon */
    double snapshot_seconds;              /* that the last one took, following included */
    uint64_t waits;                       /* for a snapshot, since the journal was full */
    bool behind;
    uint8_t epoch[TS_EPOCH_BYTES];
} ts_books_figures;

/* Any thread. */
void ts_books_get_figures(const ts_books *books, ts_books_figures *figures);

#endif
