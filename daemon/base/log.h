/*
 * One line per event that an operator cares about: to systemd's journal where stderr leads there,
 * with its priority and with fields that say what it is about, else to stderr. Lines of one
 * kind are limited to TS_LOG_BURST in ten seconds (log_limit.h).
 *
 * Thread: any.
 */
#ifndef TS_LOG_H
#define TS_LOG_H

#include <stdint.h>

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

/* What a line is about, as the journal's fields TINYSERVE_POOL, TINYSERVE_SESSION (hexadecimal),
 * TINYSERVE_PEER_UID and TINYSERVE_PEER_PID. NULL, 0 and pid 0: not about one. */
typedef struct ts_log_about {
    const char *pool;
    uint64_t session;
    uint32_t uid, pid;
} ts_log_about;

void ts_log_on(ts_log_level level, const ts_log_about *about, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define ts_log(level, ...) ts_log_on(level, &(ts_log_about){0}, __VA_ARGS__)

#endif
