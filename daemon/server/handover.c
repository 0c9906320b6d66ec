#include "handover.h"

#include "handle_wire.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#define LEAVE_MS 2000u
#define SETTLE_MS 10000u /* for the books' last snapshot */

/* Where a crash is noted for the next daemon. */
static volatile uint32_t *crash_word;

void ts_handover_note(int number)
{
    if (crash_word != NULL)
        *crash_word = (uint32_t)number;
}

static void on_crash(int number)
{
    ts_handover_note(number);
    (void)raise(number); /* whose handler is the default one again */
}

void ts_handover_note_crashes(ts_books *books)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
    crash_word = ts_books_crash_word(books);
    for (size_t i = 0; crash_word != NULL && i < sizeof signals / sizeof *signals; i++)
        (void)sigaction(signals[i],
                        &(struct sigaction){.sa_handler = on_crash, .sa_flags = SA_RESETHAND},
                        NULL);
}

void ts_handover_leave(const ts_config *c, ts_store *store, int code)
{
    static const char *const suffixes[] = {"", TS_HANDLE_SUFFIX, ".lock"};
    char path[128];
    if (!ts_store_barrier(store, LEAVE_MS))
        ts_log(TS_LOG_WARNING, "whoever holds the memory hasn't said within %u ms that it does",
               LEAVE_MS);
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        snprintf(path, sizeof path, "%s%s", c->socket, suffixes[i]);
        (void)unlink(path);
    }
    _exit(code);
}

typedef struct last_work {
    ts_work work; /* first */
    const ts_config *config;
    ts_store *store;
    int code;
} last_work;

static void leave_in_turn(ts_work *work, void *service)
{
    const last_work *last = (const last_work *)work;
    const ts_service *s = service;
    ts_books_settle(s->exec.books, s->exec.engine, SETTLE_MS);
    ts_handover_leave(last->config, last->store, last->code);
}

void ts_handover_leave_in_turn(ts_service *s, const ts_config *c, ts_store *store, int code)
{
    last_work last = {.work.run = leave_in_turn, .config = c, .store = store, .code = code};
    ts_queue_put(&s->exec.queue, &last.work);
    (void)poll(NULL, 0, SETTLE_MS + LEAVE_MS + 1000); /* it ends the process */
    ts_log(TS_LOG_WARNING, "the engine's turn hasn't come: what is stored needs the journal");
    ts_handover_leave(c, store, code);
}
