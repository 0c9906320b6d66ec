#include "log.h"

#include "clock.h"
#include "log_limit.h"
#include "plain_text.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#ifdef TS_HAVE_SYSTEMD
#define SD_JOURNAL_SUPPRESS_LOCATION
#include <systemd/sd-journal.h>
#endif

/* With the limit below, the daemon's only state outside its service struct; `journal` is set before
 * threads start. */
static atomic_int shown = TS_LOG_INFO;
static bool journal;

void ts_log_show(ts_log_level level)
{
    atomic_store(&shown, level);
}

/* Whether stderr is what the environment says leads to the journal (systemd.exec(5)). */
static bool leads_to_journal(void)
{
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long device, inode;
    struct stat st;
    return stream != NULL && sscanf(stream, "%llu:%llu", &device, &inode) == 2 &&
           fstat(STDERR_FILENO, &st) == 0 && device == st.st_dev && inode == st.st_ino;
}

void ts_log_init(ts_log_level level)
{
    ts_log_show(level);
    journal = leads_to_journal();
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

#ifdef TS_HAVE_SYSTEMD
static bool send_to_journal(ts_log_level level, const ts_log_about *about, const char *line)
{
    char fields[6][1100];
    struct iovec parts[6];
    int n = 0;
    snprintf(fields[n++], sizeof *fields, "MESSAGE=%s", line);
    snprintf(fields[n++], sizeof *fields, "PRIORITY=%d", (int)level);
    if (about->pool != NULL)
        snprintf(fields[n++], sizeof *fields, "TINYSERVE_POOL=%s", about->pool);
    if (about->session != 0)
        snprintf(fields[n++], sizeof *fields, "TINYSERVE_SESSION=%llx",
                 (unsigned long long)about->session);
    if (about->pid != 0) {
        snprintf(fields[n++], sizeof *fields, "TINYSERVE_PEER_UID=%u", about->uid);
        snprintf(fields[n++], sizeof *fields, "TINYSERVE_PEER_PID=%u", about->pid);
    }
    for (int i = 0; i < n; i++)
        parts[i] = (struct iovec){.iov_base = fields[i], .iov_len = strlen(fields[i])};
    return sd_journal_sendv(parts, n) == 0;
}
#else
static bool send_to_journal(ts_log_level level, const ts_log_about *about, const char *line)
{
    (void)level;
    (void)about;
    (void)line;
    return false;
}
#endif

static void write_line(ts_log_level level, const ts_log_about *about, const char *line)
{
    if (journal && send_to_journal(level, about, line))
        return;
    char prefix[32] = "tinyserved: ";
    if (journal)
        snprintf(prefix, sizeof prefix, "<%d>", (int)level);
    else if (level <= TS_LOG_WARNING)
        snprintf(prefix, sizeof prefix,
                 "tinyserved: %s: ", level == TS_LOG_ERROR ? "error" : "warning");
    fprintf(stderr, "%s%s\n", prefix, line); /* one call: lines of several threads don't mix */
}

void ts_log_on(ts_log_level level, const ts_log_about *about, const char *format, ...)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static ts_log_limit limit;
    char text[1024], line[1024];
    uint32_t left_out;
    if ((int)level > atomic_load_explicit(&shown, memory_order_relaxed))
        return;
    pthread_mutex_lock(&lock);
    ts_log_verdict verdict = ts_log_limit_ask(&limit, format, ts_now_ms(), &left_out);
    pthread_mutex_unlock(&lock);
    if (left_out > 0) {
        snprintf(line, sizeof line, "%u lines like the next were left out", left_out);
        write_line(level, about, line);
    }
    if (verdict == TS_LOG_LEAVE_OUT)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ts_text_escape(text, line, sizeof line); /* one line, whatever it tells of */
    write_line(level, about, line);
    if (verdict == TS_LOG_WRITE_LAST)
        write_line(level, about, "more lines like the last are left out for up to 10 seconds");
}
