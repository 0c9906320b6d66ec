#include "log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* The daemon's only state outside its service struct; the second is set before threads start. */
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

void ts_log(ts_log_level level, const char *format, ...)
{
    if ((int)level > atomic_load_explicit(&shown, memory_order_relaxed))
        return;
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    char prefix[32] = "tinyserved: ";
    if (journal)
        snprintf(prefix, sizeof prefix, "<%d>", (int)level);
    else if (level <= TS_LOG_WARNING)
        snprintf(prefix, sizeof prefix,
                 "tinyserved: %s: ", level == TS_LOG_ERROR ? "error" : "warning");
    fprintf(stderr, "%s%s\n", prefix, line); /* one call: lines of several threads don't mix */
}
