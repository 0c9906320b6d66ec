/*
 * One line per event that an operator cares about, to stderr; with a priority prefix that systemd's
 * journal understands when it listens there. Of each kind of line so many in ten seconds
 * (log_limit.h).
 *
 * Thread: any.
 */
#ifndef TS_LOG_H
#define TS_LOG_H

typedef enum ts_log_level {
    TS_LOG_ERROR = 3,
    TS_LOG_WARNING = 4,
    TS_LOG_INFO = 6,
    TS_LOG_DEBUG = 7
} ts_log_level;

/* What is more detailed than `level` is dropped. Before other threads start. */
void ts_log_init(ts_log_level level);

/* The same at any time. */
void ts_log_show(ts_log_level level);

void ts_log(ts_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
