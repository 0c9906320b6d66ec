#define _GNU_SOURCE
#include "http.h"

#include "clock.h"
#include "http_address.h"
#include "log.h"
#include "metrics.h"
#include "page.h"
#include "plain_text.h"
#include "report.h"
#include "stats.h"

#include <errno.h>
#include <fcntl.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <unistd.h>

/* What a browser may do with an answer that isn't the page. */
#define NOTHING "default-src 'none'; frame-ancestors 'none'"
#define REST_MS 100 /* that the listener isn't looked at when there are no descriptors */
#define TEXT "text/plain; charset=utf-8"

typedef struct route {
    const char *path, *type;
    char *(*text)(ts_service *service); /* NULL: the page */
    bool needs_figures;                 /* of all pools */
} route;

/* Where sessions are spread over daemons, one that drains isn't to get any. */
static char *health(ts_service *s)
{
    return s->exec.engine->draining ? NULL : strdup("ok\n");
}

static const route routes[] = {
    {"/", "text/html; charset=utf-8", NULL, false},
    {"/stats.json", "application/json", ts_stats_json, true},
    {"/metrics", "text/plain; version=0.0.4; charset=utf-8", ts_metrics_text, false},
    {"/healthz", TEXT, health, false},
};

#define ROUTES (sizeof routes / sizeof *routes)

/* What the engine's owner is asked for, by all who want it at that time. HTTP's thread owns all but
 * `text`, `took_ns` and `next_answered`, which are the engine's owner's until it puts the question
 * among the answered ones. */
typedef struct question {
    ts_work work;
    ts_pool_stats_waiter waiter; /* for the figures that the route needs */
    ts_http *http;
    const route *route;
    char *text; /* the answer; NULL: there is none (yet) */
    uint64_t took_ns;
    struct question *next_answered;
    uint32_t users; /* connections that wait for it, or send it */
    bool answered;
} question;

/* A route's questions. The next one begins when the last is answered and has rested for REST times
 * as long as the engine took over it, so that no flood of requests holds the engine. */
#define REST 10u
#define REST_MS_MAX 1000u
typedef struct turn {
    question *asked; /* the engine has it; NULL: none */
    question *next;  /* gathers those who ask meanwhile; NULL: nobody has */
    uint64_t next_ms;
} turn;

/* A connection. */
typedef struct place {
    int fd; /* libmicrohttpd's, which closes it; -1: the place is free */
    uint64_t start_ms;
    struct MHD_Connection *connection; /* suspended until its question is answered */
    question *question;
    bool too_late; /* the engine has not answered in time */
    bool shut;     /* its time was up */
} place;

struct ts_http {
    ts_service *service;
    char hosts[512];
    struct MHD_Daemon *daemon;
    pthread_t thread;
    int listener, stop, answered; /* the last two are eventfds */
    int spare;                    /* given up to turn a connection away when there are no others */
    place places[TS_HTTP_CONNECTIONS];
    place *next_place; /* of the connection that is being added */
    turn turns[ROUTES];
    bool stopping; /* nothing is asked any more */
    pthread_mutex_t lock;
    question *answered_questions; /* under the lock */
};

/* ---- answers ---- */

/* Takes the text, which was malloc'ed; NULL: there was no memory for it. */
static enum MHD_Result answer(struct MHD_Connection *connection, unsigned status, const char *type,
                              const char *policy, char *text)
{
    const struct {
        const char *name, *value;
    } headers[] = {{"Content-Type", type},
                   {"Content-Security-Policy", policy},
                   {"Cache-Control", "no-store"},
                   {"X-Content-Type-Options", "nosniff"},
                   {"Referrer-Policy", "no-referrer"},
                   {"Connection", "close"},
                   {"Allow", status == MHD_HTTP_METHOD_NOT_ALLOWED ? "GET, HEAD" : NULL}};
    if (text == NULL)
        return MHD_NO; /* ends the connection */
    struct MHD_Response *response =
        MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE);
    if (response == NULL) {
        free(text);
        return MHD_NO;
    }
    enum MHD_Result result = MHD_YES;
    for (size_t i = 0; i < sizeof headers / sizeof *headers && result == MHD_YES; i++)
        if (headers[i].value != NULL)
            result = MHD_add_response_header(response, headers[i].name, headers[i].value);
    if (result == MHD_YES)
        result = MHD_queue_response(connection, status, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result answer_error(struct MHD_Connection *connection, unsigned status,
                                    const char *sentence)
{
    char *text = NULL;
    if (asprintf(&text, "%s\n", sentence) < 0)
        text = NULL;
    return answer(connection, status, TEXT, NOTHING, text);
}

/* The page itself: the script and the style that are in it may run, and nothing else. */
static enum MHD_Result answer_page(struct MHD_Connection *connection, const route *r)
{
    unsigned char random[(sizeof TS_PAGE_NONCE - 1) / 2];
    char nonce[sizeof TS_PAGE_NONCE], policy[256];
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random)
        return answer_error(connection, MHD_HTTP_SERVICE_UNAVAILABLE, "there is no randomness");
    for (size_t i = 0; i < sizeof random; i++)
        snprintf(nonce + 2 * i, 3, "%02x", random[i]);
    snprintf(policy, sizeof policy,
             "default-src 'none'; script-src 'nonce-%s'; style-src 'nonce-%s'; connect-src 'self'; "
             "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
             nonce, nonce);
    return answer(connection, MHD_HTTP_OK, r->type, policy, ts_page_with(nonce));
}

static enum MHD_Result refuse_host(struct MHD_Connection *connection, const char *host)
{
    char shown[256], sentence[512];
    snprintf(sentence, sizeof sentence,
             "This was asked of %s%s%s. The daemon answers to addresses, to localhost and to the "
             "names in metrics_hosts of its configuration.",
             host == NULL ? "no host" : "'",
             host == NULL ? "" : ts_text_escape(host, shown, sizeof shown),
             host == NULL ? "" : "'");
    return answer_error(connection, MHD_HTTP_FORBIDDEN, sentence);
}

/* ---- questions ---- */

static void answer_question(ts_work *work, void *service);

/* The figures that the question waited for are there, or some of them. */
static void figures_ready(ts_pool_stats_waiter *waiter, void *service)
{
    answer_question(&((question *)((char *)waiter - offsetof(question, waiter)))->work, service);
}

/* On the engine's owner. */
static void answer_question(ts_work *work, void *service)
{
    question *q = (question *)work;
    ts_http *h = q->http;
    uint64_t one = 1;
    if (q->route->needs_figures && !ts_report_http_ready(service, &q->waiter))
        return; /* it is asked again */
    const uint64_t began = ts_now_ns();
    q->text = q->route->text(service);
    q->took_ns = ts_now_ns() - began;
    pthread_mutex_lock(&h->lock);
    q->next_answered = h->answered_questions;
    h->answered_questions = q;
    /* Within the lock: once it is free, the question and all of `h` may go. */
    if (write(h->answered, &one, sizeof one) != (ssize_t)sizeof one)
        ts_log(TS_LOG_ERROR, "HTTP's thread can't be told of an answer: %s", strerror(errno));
    pthread_mutex_unlock(&h->lock);
}

/* One user less. */
static void release(ts_http *h, question *q)
{
    turn *t = &h->turns[q->route - routes];
    if (--q->users > 0 || t->asked == q)
        return;
    if (t->next == q)
        t->next = NULL;
    free(q->text);
    free(q);
}

/* Asks what may be asked now. This thread has others' time to keep, so it leaves the work to
 * others.
 */
static void ask_next(ts_http *h)
{
    const uint64_t now = ts_now_ms();
    for (size_t i = 0; i < ROUTES && !h->stopping; i++) {
        turn *t = &h->turns[i];
        if (t->asked != NULL || t->next == NULL || now < t->next_ms)
            continue;
        t->asked = t->next;
        t->next = NULL;
        ts_queue_put(&h->service->exec.queue, &t->asked->work);
    }
}

/* Milliseconds until something may be asked; -1: nobody waits for that. */
static int until_next(const ts_http *h)
{
    const uint64_t now = ts_now_ms();
    uint64_t next = UINT64_MAX;
    for (size_t i = 0; i < ROUTES; i++) {
        const turn *t = &h->turns[i];
        if (t->asked == NULL && t->next != NULL && t->next_ms < next)
            next = t->next_ms;
    }
    return next == UINT64_MAX ? -1 : next <= now ? 0 : (int)(next - now);
}

/* Goes on with the connections whose questions are answered. */
static void take_answers(ts_http *h)
{
    uint64_t count;
    if (read(h->answered, &count, sizeof count) < 0 && errno != EAGAIN)
        ts_log(TS_LOG_ERROR, "HTTP's eventfd can't be read: %s", strerror(errno));
    pthread_mutex_lock(&h->lock);
    question *q = h->answered_questions;
    h->answered_questions = NULL;
    pthread_mutex_unlock(&h->lock);
    for (question *next; q != NULL; q = next) {
        turn *t = &h->turns[q->route - routes];
        const uint64_t rest_ms =
            q->took_ns / 1000000 * REST + q->took_ns % 1000000 * REST / 1000000;
        next = q->next_answered;
        q->answered = true;
        q->users++; /* this function */
        t->asked = NULL;
        t->next_ms = ts_now_ms() + (rest_ms < REST_MS_MAX ? rest_ms : REST_MS_MAX);
        for (uint32_t i = 0; i < TS_HTTP_CONNECTIONS; i++)
            if (h->places[i].question == q && !h->places[i].too_late)
                MHD_resume_connection(h->places[i].connection);
        release(h, q);
    }
}

/* The engine's owner has a question still. */
static bool is_asked(const ts_http *h)
{
    for (size_t i = 0; i < ROUTES; i++)
        if (h->turns[i].asked != NULL)
            return true;
    return false;
}

static place *place_of(struct MHD_Connection *connection)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    return info->socket_context;
}

static enum MHD_Result ask(ts_http *h, struct MHD_Connection *connection, const route *r,
                           void **state)
{
    place *p = place_of(connection);
    turn *t = &h->turns[r - routes];
    if (t->next == NULL) {
        t->next = malloc(sizeof *t->next);
        if (t->next == NULL)
            return MHD_NO;
        *t->next = (question){
            .work.run = answer_question, .waiter.ready = figures_ready, .http = h, .route = r};
    }
    t->next->users++;
    p->connection = connection;
    p->question = t->next;
    *state = p;
    MHD_suspend_connection(connection);
    ask_next(h);
    return MHD_YES;
}

/* libmicrohttpd calls this when it has a request's head, and once more when the connection is
 * resumed. */
static enum MHD_Result handle(void *http, struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, const char *upload,
                              size_t *upload_bytes, void **state)
{
    ts_http *h = http;
    const place *p = *state; /* NULL: it hasn't asked yet */
    const route *found = NULL;
    (void)version;
    (void)upload;
    (void)upload_bytes;
    if (p != NULL && p->too_late)
        return answer_error(connection, MHD_HTTP_SERVICE_UNAVAILABLE,
                            "the daemon's engine doesn't answer");
    if (p != NULL && p->question->text == NULL)
        return answer_error(connection, MHD_HTTP_SERVICE_UNAVAILABLE,
                            p->question->route->text == health
                                ? "the daemon is being drained: it takes no new sessions"
                                : "the daemon has no memory for the answer");
    if (p != NULL)
        return answer(connection, MHD_HTTP_OK, p->question->route->type, NOTHING,
                      strdup(p->question->text));
    const char *host = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Host");
    if (host == NULL || !ts_http_host_allowed(host, h->hosts))
        return refuse_host(connection, host);
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++)
        if (strcmp(url, routes[i].path) == 0)
            found = &routes[i];
    if (found == NULL)
        return answer_error(connection, MHD_HTTP_NOT_FOUND,
                            "There are /, /stats.json, /metrics and /healthz.");
    if (strcmp(method, MHD_HTTP_METHOD_GET) != 0 && strcmp(method, MHD_HTTP_METHOD_HEAD) != 0)
        return answer_error(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "Only GET and HEAD are.");
    return found->text == NULL ? answer_page(connection, found) : ask(h, connection, found, state);
}

/* ---- connections ---- */

static void connection_event(void *http, struct MHD_Connection *connection, void **context,
                             enum MHD_ConnectionNotificationCode event)
{
    (void)connection;
    if (event == MHD_CONNECTION_NOTIFY_STARTED) {
        *context = ((ts_http *)http)->next_place;
        return;
    }
    place *p = *context;
    question *q = p->question;
    p->fd = -1;
    p->question = NULL;
    if (q != NULL)
        release(http, q);
}

static place *free_place(ts_http *h)
{
    for (uint32_t i = 0; i < TS_HTTP_CONNECTIONS; i++)
        if (h->places[i].fd < 0)
            return &h->places[i];
    return NULL;
}

static void add(ts_http *h, int fd, const struct sockaddr *address, socklen_t bytes)
{
    place *p = free_place(h);
    if (p == NULL) {
        MHD_run(h->daemon); /* one may have been closed by now */
        p = free_place(h);
    }
    if (p == NULL) {
        close(fd);
        return;
    }
    *p = (place){.fd = fd, .start_ms = ts_now_ms()};
    h->next_place = p;
    if (MHD_add_connection(h->daemon, fd, address, bytes) != MHD_YES)
        p->fd = -1; /* it has closed it */
}

/* False: connections are left in the queue, for there is no descriptor even to turn them away. */
static bool accept_all(ts_http *h)
{
    for (uint32_t i = 0; i < 2 * TS_HTTP_CONNECTIONS; i++) {
        struct sockaddr_storage address;
        socklen_t bytes = sizeof address;
        int fd =
            accept4(h->listener, (struct sockaddr *)&address, &bytes, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            add(h, fd, (const struct sockaddr *)&address, bytes);
        } else if (errno == EMFILE || errno == ENFILE) {
            /* Who stays in the queue would have this thread wake for ever. */
            if (h->spare >= 0)
                close(h->spare);
            fd = accept4(h->listener, NULL, NULL, SOCK_CLOEXEC);
            bool empty = fd < 0 && errno == EAGAIN; /* this is looked at after descriptors */
            if (fd >= 0)
                close(fd);
            h->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
            if (fd < 0)
                return empty;
        } else if (errno != ECONNABORTED && errno != EINTR) {
            break;
        }
    }
    return true;
}

/* Ends what has had its time. Returns how many milliseconds the next one has left; -1: there is
 * none. */
static int end_late_ones(ts_http *h)
{
    uint64_t now = ts_now_ms(), next = UINT64_MAX;
    for (uint32_t i = 0; i < TS_HTTP_CONNECTIONS; i++) {
        place *p = &h->places[i];
        if (p->fd < 0 || p->shut)
            continue;
        const question *q = p->question;
        bool waits = q != NULL && !q->answered && !p->too_late;
        uint64_t end = p->start_ms + (waits ? TS_HTTP_ENGINE_MS : TS_HTTP_REQUEST_MS);
        if (end > now) {
            next = end < next ? end : next;
        } else if (waits) {
            p->too_late = true;
            MHD_resume_connection(p->connection);
            next = now;
        } else { /* libmicrohttpd sees the end, and closes it */
            shutdown(p->fd, SHUT_RDWR);
            p->shut = true;
            next = now;
        }
    }
    return next == UINT64_MAX ? -1 : (int)(next - now);
}

static void *http_main(void *arg)
{
    prctl(PR_SET_NAME, "http");
    ts_http *h = arg;
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    struct pollfd fds[] = {{.fd = h->stop, .events = POLLIN},
                           {.fd = h->listener, .events = POLLIN},
                           {.fd = h->answered, .events = POLLIN},
                           {.fd = info->epoll_fd, .events = POLLIN}};
    for (bool rests = false;;) {
        int timeout = end_late_ones(h);
        MHD_UNSIGNED_LONG_LONG wanted;
        if (MHD_get_timeout(h->daemon, &wanted) == MHD_YES &&
            (timeout < 0 || wanted < (unsigned)timeout))
            timeout = (int)wanted;
        const int turn = until_next(h);
        if (turn >= 0 && (timeout < 0 || turn < timeout))
            timeout = turn;
        if (rests && (timeout < 0 || timeout > REST_MS))
            timeout = REST_MS;
        fds[1].events = rests ? 0 : POLLIN;
        rests = false;
        if (poll(fds, sizeof fds / sizeof *fds, timeout) < 0)
            continue;
        if (fds[0].revents != 0)
            return NULL;
        if (fds[1].revents != 0)
            rests = !accept_all(h);
        if (fds[2].revents != 0)
            take_answers(h);
        ask_next(h);
        MHD_run(h->daemon);
    }
}

/* ---- start and stop ---- */

static int listen_at(const ts_http_address *address)
{
    int one = 1;
    int fd =
        socket(address->socket.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP);
    if (fd < 0)
        return -1;
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0 &&
        bind(fd, (const struct sockaddr *)&address->socket, address->bytes) == 0 &&
        listen(fd, TS_HTTP_CONNECTIONS) == 0)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static void close_all(ts_http *h)
{
    if (h->daemon != NULL)
        MHD_stop_daemon(h->daemon);
    const int fds[] = {h->listener, h->stop, h->answered, h->spare};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

ts_status ts_http_start(ts_service *service, const char *text, const char *hosts, ts_http **out,
                        char *why, size_t why_bytes)
{
    ts_http_address address;
    ts_http *h = calloc(1, sizeof *h);
    *out = NULL;
    if (h == NULL || !ts_http_address_parse(text, &address)) {
        snprintf(why, why_bytes, "no memory to listen at http://%s", text);
        free(h);
        return TS_ENOMEM;
    }
    h->service = service;
    snprintf(h->hosts, sizeof h->hosts, "%s", hosts);
    pthread_mutex_init(&h->lock, NULL);
    for (uint32_t i = 0; i < TS_HTTP_CONNECTIONS; i++)
        h->places[i].fd = -1;
    h->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->answered = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    h->listener = listen_at(&address);
    const char *reason = strerror(errno);
    if (h->listener >= 0 && h->stop >= 0 && h->answered >= 0 && h->spare >= 0) {
        h->daemon = MHD_start_daemon(
            MHD_USE_EPOLL | MHD_USE_NO_LISTEN_SOCKET | MHD_ALLOW_SUSPEND_RESUME, 0, NULL, NULL,
            handle, h, MHD_OPTION_CONNECTION_LIMIT, TS_HTTP_CONNECTIONS,
            MHD_OPTION_NOTIFY_CONNECTION, connection_event, h, MHD_OPTION_END);
        reason = "libmicrohttpd doesn't start";
    }
    int error = h->daemon == NULL ? 0 : pthread_create(&h->thread, NULL, http_main, h);
    if (error != 0)
        reason = strerror(error);
    if (h->daemon != NULL && error == 0) {
        if (!ts_http_address_is_loopback(&address))
            ts_log(TS_LOG_WARNING, "http://%s can be read by everybody who can reach it", text);
        *out = h;
        return TS_OK;
    }
    snprintf(why, why_bytes, "listening at http://%s failed: %s", text, reason);
    close_all(h);
    return TS_ECONN;
}

void ts_http_stop(ts_http *h)
{
    if (h == NULL)
        return;
    uint64_t one = 1;
    if (write(h->stop, &one, sizeof one) != (ssize_t)sizeof one)
        ts_log(TS_LOG_ERROR, "HTTP's thread can't be told to stop: %s", strerror(errno));
    pthread_join(h->thread, NULL);
    h->stopping = true;
    do { /* each question is answered; one whose figures take longer goes on in each flush */
        ts_queue_flush(&h->service->exec.queue);
        take_answers(h);
    } while (is_asked(h));
    for (uint32_t i = 0; i < TS_HTTP_CONNECTIONS; i++) { /* none may be suspended when it stops */
        place *p = &h->places[i];
        if (p->fd < 0 || p->question == NULL || p->question->answered || p->too_late)
            continue;
        p->too_late = true;
        MHD_resume_connection(p->connection);
    }
    close_all(h);
}
