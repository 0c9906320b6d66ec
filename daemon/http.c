#define _GNU_SOURCE
#include "http.h"

#include "http_address.h"
#include "metrics.h"
#include "page.h"
#include "stats.h"

#include <nng/nng.h>
#include <nng/supplemental/http/http.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* Handlers can be called a little longer than the server lives: the last of them frees this. */
struct ts_http {
    ts_service *service;
    nng_http_server *server;
    atomic_bool stopping;
    atomic_uint asking; /* calls of `asked` that may use the service */
    atomic_uint users;  /* handlers, and who started it */
};

typedef struct route {
    const char *path, *type;
    char *(*text)(ts_service *service); /* NULL: the page */
} route;

/* A request that the engine's owner is to answer. */
typedef struct page {
    ts_work work;
    nng_aio *aio;
    const route *route;
} page;

/* Where sessions are spread over daemons, one that drains isn't to get any. */
static char *health(ts_service *s)
{
    return s->draining ? NULL : strdup("ok\n");
}

static const route routes[] = {
    {"/", "text/html; charset=utf-8", NULL},
    {"/stats.json", "application/json", ts_stats_json},
    {"/metrics", "text/plain; version=0.0.4; charset=utf-8", ts_metrics_text},
    {"/healthz", "text/plain; charset=utf-8", health},
};

/* What a browser may do with an answer that isn't the page. */
#define NOTHING "default-src 'none'; frame-ancestors 'none'"

/* Answers with the text, or with an error of HTTP's. */
static void answer(nng_aio *aio, uint16_t status, const char *type, const char *policy,
                   const char *text)
{
    nng_http_res *res;
    int error = status == 200 ? nng_http_res_alloc(&res) : nng_http_res_alloc_error(&res, status);
    if (error == 0 && status == 200) {
        error = nng_http_res_copy_data(res, text, strlen(text));
        if (error == 0)
            error = nng_http_res_set_header(res, "Content-Type", type);
        if (error == 0)
            error = nng_http_res_set_header(res, "Cache-Control", "no-store");
        if (error == 0)
            error = nng_http_res_set_header(res, "X-Content-Type-Options", "nosniff");
        if (error == 0)
            error = nng_http_res_set_header(res, "Content-Security-Policy", policy);
        if (error == 0)
            error = nng_http_res_set_header(res, "Referrer-Policy", "no-referrer");
        if (error != 0)
            nng_http_res_free(res);
    }
    if (error == 0)
        nng_aio_set_output(aio, 0, res);
    nng_aio_finish(aio, error);
}

static void answer_page(ts_work *work, void *service)
{
    page *p = (page *)work;
    char *text = p->route->text(service);
    answer(p->aio, text != NULL ? 200 : 503, p->route->type, NOTHING, text);
    free(text);
    free(p);
}

/* The page itself: the script and the style that are in it may run, and nothing else. */
static void answer_html(nng_aio *aio, const route *r)
{
    unsigned char random[(sizeof TS_PAGE_NONCE - 1) / 2];
    char nonce[sizeof TS_PAGE_NONCE], policy[256];
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random)
        return answer(aio, 503, NULL, NULL, NULL);
    for (size_t i = 0; i < sizeof random; i++)
        snprintf(nonce + 2 * i, 3, "%02x", random[i]);
    snprintf(policy, sizeof policy,
             "default-src 'none'; script-src 'nonce-%s'; style-src 'nonce-%s'; connect-src 'self'; "
             "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
             nonce, nonce);
    char *text = ts_page_with(nonce);
    answer(aio, text != NULL ? 200 : 503, r->type, policy, text);
    free(text);
}

static void release(void *http)
{
    ts_http *h = http;
    if (atomic_fetch_sub(&h->users, 1) == 1)
        free(h);
}

static void ask(ts_http *h, nng_aio *aio)
{
    nng_http_req *req = nng_aio_get_input(aio, 0);
    const char *host = nng_http_req_get_header(req, "Host");
    const char *uri = nng_http_req_get_uri(req);
    const route *found = NULL;
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        size_t n = strlen(routes[i].path);
        if (strncmp(uri, routes[i].path, n) == 0 && (uri[n] == '\0' || uri[n] == '?'))
            found = &routes[i];
    }
    if (host == NULL || !ts_http_host_allowed(host, ""))
        return answer(aio, 403, NULL, NULL, NULL);
    if (found != NULL && found->text == NULL)
        return answer_html(aio, found);
    page *p = found == NULL ? NULL : malloc(sizeof *p);
    if (p == NULL)
        return answer(aio, found == NULL ? 404 : 503, NULL, NULL, NULL);
    *p = (page){.work.run = answer_page, .aio = aio, .route = found};
    ts_queue_run(&h->service->queue, &p->work, h->service);
}

static void asked(nng_aio *aio)
{
    ts_http *h = nng_http_handler_get_data(nng_aio_get_input(aio, 1));
    atomic_fetch_add(&h->asking, 1);
    if (atomic_load(&h->stopping))
        answer(aio, 503, NULL, NULL, NULL);
    else
        ask(h, aio);
    atomic_fetch_sub(&h->asking, 1);
}

ts_status ts_http_start(ts_service *service, const char *address, ts_http **out, char *why,
                        size_t why_bytes)
{
    ts_http *h = calloc(1, sizeof *h);
    char text[96];
    nng_url *url = NULL;
    *out = h;
    if (h == NULL) {
        snprintf(why, why_bytes, "no memory to listen at http://%s", address);
        return TS_ENOMEM;
    }
    h->service = service;
    atomic_store(&h->users, 1);
    snprintf(text, sizeof text, "http://%s", address);
    int error = nng_url_parse(&url, text);
    if (error == 0)
        error = nng_http_server_hold(&h->server, url);
    for (size_t i = 0; i < sizeof routes / sizeof *routes && error == 0; i++) {
        nng_http_handler *handler;
        error = nng_http_handler_alloc(&handler, routes[i].path, asked);
        if (error != 0)
            break;
        error = nng_http_handler_set_method(handler, "GET");
        if (error == 0)
            error = nng_http_handler_set_data(handler, h, release);
        atomic_fetch_add(&h->users, error == 0);
        if (error == 0)
            error = nng_http_server_add_handler(h->server, handler);
        if (error != 0)
            nng_http_handler_free(handler);
    }
    if (error == 0)
        error = nng_http_server_start(h->server);
    if (url != NULL)
        nng_url_free(url);
    if (error == 0)
        return TS_OK;
    snprintf(why, why_bytes, "listening at http://%s failed: %s", address, nng_strerror(error));
    if (h->server != NULL)
        nng_http_server_release(h->server);
    release(h);
    *out = NULL;
    return TS_ECONN;
}

void ts_http_stop(ts_http *h)
{
    if (h == NULL)
        return;
    atomic_store(&h->stopping, true);
    while (atomic_load(&h->asking) > 0)
        sched_yield();
    ts_queue_flush(&h->service->queue); /* pages that were asked for */
    nng_http_server_stop(h->server);
    nng_http_server_release(h->server);
    release(h);
}
