/*
 * How many lines of one kind the log takes: TS_LOG_BURST in TS_LOG_WINDOW_MS, so that a worker
 * which connects and leaves in a loop doesn't fill the journal. A kind is a format, told by its
 * address.
 *
 * Locking: the caller's.
 */
#ifndef TS_LOG_LIMIT_H
#define TS_LOG_LIMIT_H

#include <stdint.h>

#define TS_LOG_BURST 50u
#define TS_LOG_WINDOW_MS 10000u
#define TS_LOG_KINDS 64u

typedef struct ts_log_limit {
    struct {
        const void *kind; /* NULL: free */
        uint64_t start_ms;
        uint32_t lines, left_out;
    } kinds[TS_LOG_KINDS];
} ts_log_limit;

typedef enum ts_log_verdict {
    TS_LOG_WRITE,
    TS_LOG_WRITE_LAST, /* say that others like it are left out for a while */
    TS_LOG_LEAVE_OUT
} ts_log_verdict;

/* *left_out: lines of this kind that were left out in its last window, to be told now. */
ts_log_verdict ts_log_limit_ask(ts_log_limit *limit, const void *kind, uint64_t now_ms,
                                uint32_t *left_out);

#endif
