#include "log.h"

#include "clock.h"
#include "log_limit.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* With the limit below, the daemon's only state outside its service struct; `journal` is set before
 * threads start. */
static atomic_int shown = TS_LOG_INFO;
static bool journal;

void ts_log_show(ts_log_level level)
{
    atomic_store(&shown, level);
}

void ts_log_init(ts_log_level level)
{
    ts_log_show(level);
    journal = getenv("JOURNAL_STREAM") != NULL;
}

ts_log_verdict ts_log_limit_ask(ts_log_limit *limit, const void *kind, uint64_t now_ms,
                                uint32_t *left_out)
{
    *left_out = 0;
    uint32_t i = 0;
    while (i < TS_LOG_KINDS && limit->kinds[i].kind != NULL && limit->kinds[i].kind != kind)
        i++;
    if (i == TS_LOG_KINDS) /* there are fewer formats than that */
        return TS_LOG_WRITE;
    if (limit->kinds[i].kind == NULL || now_ms - limit->kinds[i].start_ms >= TS_LOG_WINDOW_MS) {
        *left_out = limit->kinds[i].left_out;
        limit->kinds[i].kind = kind;
        limit->kinds[i].start_ms = now_ms;
        limit->kinds[i].lines = limit->kinds[i].left_out = 0;
    }
    limit->kinds[i].lines++;
    if (limit->kinds[i].lines < TS_LOG_BURST)
        return TS_LOG_WRITE;
    if (limit->kinds[i].lines == TS_LOG_BURST)
        return TS_LOG_WRITE_LAST;
    limit->kinds[i].left_out++;
    return TS_LOG_LEAVE_OUT;
}

static void write_line(ts_log_level level, const char *line)
{
    char prefix[32] = "tinyserved: ";
    if (journal)
        snprintf(prefix, sizeof prefix, "<%d>", (int)level);
    else if (level <= TS_LOG_WARNING)
        snprintf(prefix, sizeof prefix,
                 "tinyserved: %s: ", level == TS_LOG_ERROR ? "error" : "warning");
    fprintf(stderr, "%s%s\n", prefix, line); /* one call: lines of several threads don't mix */
}

void ts_log(ts_log_level level, const char *format, ...)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static ts_log_limit limit;
    char line[1024];
    uint32_t left_out;
    if ((int)level > atomic_load_explicit(&shown, memory_order_relaxed))
        return;
    pthread_mutex_lock(&lock);
    ts_log_verdict verdict = ts_log_limit_ask(&limit, format, ts_now_ms(), &left_out);
    pthread_mutex_unlock(&lock);
    if (left_out > 0) {
        snprintf(line, sizeof line, "%u lines like the next were left out", left_out);
        write_line(level, line);
    }
    if (verdict == TS_LOG_LEAVE_OUT)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    write_line(level, line);
    if (verdict == TS_LOG_WRITE_LAST)
        write_line(level, "more lines like the last are left out for up to 10 seconds");
}
