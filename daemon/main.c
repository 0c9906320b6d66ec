/* tinyserved: reads its configuration, starts everything, waits for a signal, stops everything. */
#define _GNU_SOURCE
#include "clock.h"
#include "fd_server.h"
#include "handle_wire.h"
#include "handover.h"
#include "http.h"
#include "nng_server.h"
#include "pool_memory.h"
#include "pool_stats_cache.h"
#include "reload.h"
#include "request.h"
#include "ring_server.h"
#include "server.h"
#include "socket_path.h"
#include "socket_place.h"
#include "standard_output.h"
#include "store_wire.h"
#include "supervisor.h"
#include "takeover.h"
#include "thread_first.h"
#include "tinyserve_version.h"

#include <argp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#ifdef TS_HAVE_SYSTEMD
#include <systemd/sd-daemon.h>
#endif

#define OWN_FDS 192u /* threads' and sockets' own, the pools' and HTTP's */
/* Descriptors that a connection may take: its own and its process's, one of the handle socket, its
 * exchange's, its rings', the doorbells of 3 rings and its signals'; and where memory outlives the
 * daemon, the exchange's again and the store's duplicate of it. */
#define CONNECTION_FDS 9u
#define KEPT_CONNECTION_FDS 11u
#define CONNECTIONS_MAX 65536u
#define KEY_BYTES 64 /* of a key of the configuration, and more: a longer one is unknown anyway */

const char *argp_program_version = "tinyserved " TS_VERSION;

enum { OPT_POOL = 256, OPT_CHECK, OPT_SUPERVISE };
enum { EXIT_USAGE = 2, EXIT_DEVICE = 3 };

typedef struct options {
    const char *config_path;
    bool config_given, check, supervise;
    const char *pools[TS_POOLS_MAX];
    uint32_t num_pools;
    char keys[32][KEY_BYTES]; /* argv stays as it is, for a daemon that is supervised */
    const char *values[32];
    uint32_t num_keys;
} options;

static const struct argp_option argp_options[] = {
    {"config", 'c', "FILE", 0, "Configuration (default " TS_CONFIG_DEFAULT ")", 0},
    {"socket", 's', "PATH", 0,
     "Listen at this Unix socket (default " TS_SYSTEM_SOCKET "; without root the user's own)", 0},
    {"set", 'S', "KEY=VALUE", 0, "Override a key of the [daemon] section", 0},
    {"pool", OPT_POOL, "NAME:KEY=VALUE,...", 0, "Add a pool, with the keys of a [pool] section", 0},
    {"check-config", OPT_CHECK, NULL, 0, "Check the configuration, print its pools and exit", 0},
    {"supervise", OPT_SUPERVISE, NULL, 0,
     "Start the daemon as a child, hold its memory, and start it again when it dies", 0},
    {0},
};

/* The key is `bytes` of it. */
static void add_key(struct argp_state *state, options *o, const char *key, size_t bytes,
                    const char *value)
{
    if (o->num_keys == sizeof o->values / sizeof *o->values)
        argp_error(state, "more than %zu keys are set", sizeof o->values / sizeof *o->values);
    snprintf(o->keys[o->num_keys], KEY_BYTES, "%.*s", (int)bytes, key);
    o->values[o->num_keys++] = value;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    options *o = state->input;
    switch (key) {
    case 'c':
        o->config_path = arg;
        o->config_given = true;
        return 0;
    case 's':
        add_key(state, o, "socket", strlen("socket"), arg);
        return 0;
    case 'S': {
        const char *equals = strchr(arg, '=');
        if (equals == NULL)
            argp_error(state, "--set %s: KEY=VALUE is needed", arg);
        else
            add_key(state, o, arg, (size_t)(equals - arg), equals + 1);
        return 0;
    }
    case OPT_POOL:
        if (o->num_pools == TS_POOLS_MAX)
            argp_error(state, "more than %u pools", TS_POOLS_MAX);
        o->pools[o->num_pools++] = arg;
        return 0;
    case OPT_CHECK:
        o->check = true;
        return 0;
    case OPT_SUPERVISE: /* the child's arguments are those without it */
        o->supervise = true;
        state->argv[state->next - 1] = NULL;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "'%s' is not an option", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp argp = {argp_options,
                                 parse,
                                 NULL,
                                 "Owns the paged KV cache pools of this machine and runs attention "
                                 "for the worker processes that "
                                 "share them.",
                                 NULL,
                                 NULL,
                                 NULL};

static ts_status read_config(const options *o, ts_config *c)
{
    ts_config_init(c);
    /* Pools on the command line stand on their own: the default file is not needed then. */
    if ((o->config_given || o->num_pools == 0) && ts_config_read(c, o->config_path) == TS_ENOENT)
        return TS_ENOENT;
    for (uint32_t i = 0; i < o->num_keys; i++)
        (void)ts_config_set(c, o->keys[i], o->values[i]);
    for (uint32_t i = 0; i < o->num_pools; i++)
        (void)ts_config_add_pool(c, o->pools[i]);
    return ts_config_finish(c);
}

static void log_problems(const ts_config *c)
{
    char text[512];
    for (uint32_t i = 0; i < c->num_problems; i++)
        ts_log(TS_LOG_ERROR, "%s", ts_config_problem_text(c, i, text, sizeof text));
    if (c->problems_left_out > 0)
        ts_log(TS_LOG_ERROR, "and %u problems more", c->problems_left_out);
}

/* A GPU is lost: main ends the daemon, which can't do its work any more. */
static void device_failed(const char *why)
{
    ts_log(TS_LOG_ERROR, "%s: the daemon ends, to be started again", why);
    (void)kill(getpid(), SIGUSR1);
}

/* An operator wants the daemon to be started again. */
static void end_to_start_again(void)
{
    (void)kill(getpid(), SIGUSR2);
}

static void *engine_main(void *arg)
{
    const ts_service *s = arg;
    prctl(PR_SET_NAME, "engine");
    if (s->exec.num_gpus > 0)
        ts_thread_first();
    ts_service_run(arg);
    return NULL;
}

static void raise_file_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/*
 * What systemd hears while the daemon serves: that it is alive, if the engine still does its work,
 * and what it is doing.
 */
typedef struct heartbeat {
    ts_work work;
    atomic_bool out; /* the engine has it */
    char status[160];
} heartbeat;

static void beat(ts_work *work, void *service)
{
    heartbeat *h = (heartbeat *)work;
    const ts_engine *e = ((ts_service *)service)->exec.engine;
    uint64_t used = 0, blocks = 0;
    for (uint32_t i = 0; i < e->num_pools; i++) {
        used += e->pools[i].books.used;
        blocks += e->pools[i].books.num_blocks;
    }
    snprintf(h->status, sizeof h->status,
             "STATUS=%u sessions, %u open steps, %llu of %llu blocks used in %u pools",
             e->live_sessions, e->live_steps, (unsigned long long)used, (unsigned long long)blocks,
             e->live_pools);
    atomic_store(&h->out, false);
}

/* How often systemd is told, in nanoseconds; 0: there is nobody to tell. */
static uint64_t heartbeat_ns(void)
{
    uint64_t usec = 0;
#ifdef TS_HAVE_SYSTEMD
    if (getenv("NOTIFY_SOCKET") != NULL)
        usec = 10000000;
    uint64_t watchdog;
    if (sd_watchdog_enabled(0, &watchdog) > 0)
        usec = watchdog / 3;
#endif
    return usec * 1000;
}

/* SIGHUP: what is wrong with the file changes nothing. */
static void reload(ts_service *s, const options *o, ts_config *running)
{
    ts_config *next = malloc(sizeof *next);
    if (next == NULL)
        return ts_log(TS_LOG_ERROR, "no memory to read the configuration again");
    if (read_config(o, next) == TS_OK) {
        ts_reload(s, running, next);
    } else {
        log_problems(next);
        ts_log(TS_LOG_ERROR, "the configuration has problems: nothing was changed");
    }
    free(next);
}

/* Waits for one of the signals that end it. */
static int await_signal(ts_service *s, const sigset_t *signals, const options *o,
                        ts_config *running)
{
    static heartbeat h = {.work.run = beat};
    uint64_t every = heartbeat_ns();
    struct timespec interval = {.tv_sec = (time_t)(every / 1000000000),
                                .tv_nsec = (long)(every % 1000000000)};
    for (;;) {
        int number =
            every > 0 ? sigtimedwait(signals, NULL, &interval) : sigwaitinfo(signals, NULL);
        if (number == SIGHUP)
            reload(s, o, running);
        else if (number > 0)
            return number;
        if (every == 0 || atomic_load(&h.out)) /* an engine that is stuck stays silent */
            continue;
        if (h.status[0] != '\0')
            ts_store_notify(h.status);
        ts_store_notify("WATCHDOG=1");
        atomic_store(&h.out, true);
        ts_queue_put(&s->exec.queue, &h.work);
    }
}

/* Connections for which there are descriptors: beside them the daemon needs some of its own, and
 * one for each slab in host memory. */
static uint32_t connections_max(const ts_config *c, bool outlives)
{
    struct rlimit limit;
    uint64_t own = OWN_FDS, most = CONNECTIONS_MAX;
    const uint64_t each = outlives ? KEPT_CONNECTION_FDS : CONNECTION_FDS;
    for (uint32_t i = 0; i < c->num_pools; i++)
        own += (outlives ? 2u : 1u) * (c->pools[i].pool.max_blocks / c->pools[i].pool.slab_blocks);
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
        most = limit.rlim_cur > own ? (limit.rlim_cur - own) / each : 0;
    if (most < 4 * TS_OPERATOR_CONNECTIONS) {
        most = 4 * TS_OPERATOR_CONNECTIONS;
        ts_log(TS_LOG_WARNING,
               "the process may have %llu descriptors; %llu are wanted for %llu connections",
               (unsigned long long)limit.rlim_cur, (unsigned long long)(own + most * each),
               (unsigned long long)most);
    }
    return (uint32_t)(most < CONNECTIONS_MAX ? most : CONNECTIONS_MAX);
}

static void end_connection(void *server, uint32_t pipe, bool idle)
{
    ts_nng_server_end(server, pipe, idle);
}

/* For where ids begin, so that one from an earlier daemon names nothing, and for hashes. */
static uint64_t random_number(void)
{
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
        random = ts_now_ns();
    return random;
}

/* What serves, as far as it was started. */
typedef struct serving {
    ts_service *service;
    ts_nng_server *messages;
    ts_fd_server *handles;
    ts_http *http;
    pthread_t engine;
    bool engine_runs;
} serving;

/* What the service knows before it has anything. */
static void set_up(ts_service *s, ts_config *c)
{
    struct timespec now;
    s->started_ms = ts_now_ms();
    clock_gettime(CLOCK_REALTIME, &now);
    s->started_unix = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    s->message_bytes = c->message_bytes;
    s->admin_uid = getuid();
    s->operators = c->operators;
    s->http_shows_all = c->metrics_show == TS_METRICS_ALL;
    s->exec.submit_ms = c->submit_ms;
    s->exec.join_us = c->join_us;
    s->exec.verify = c->verify == TS_VERIFY_RESTART;
    s->exec.tenant_exchange_bytes = c->tenant_exchange_bytes;
    s->exec.device_failed = device_failed;
    s->restart = end_to_start_again;
    pthread_mutex_init(&s->operators_lock, NULL);
    c->limits.first_generation = (uint32_t)(random_number() >> 33);
    c->limits.hash_seed = random_number();
}

/* The engine, the kernels' threads, the rings and the pools. An error is in the log. */
static bool make_engine(ts_service *s, ts_config *c, ts_store *store)
{
    const uint32_t threads = ts_config_threads(c, ts_processors());
    const uint32_t join_us = ts_processors() < TS_RING_JOINS_PROCESSORS ? 0 : c->join_us;
    const bool made = ts_takeover_begin(s, store, c);
    ts_handover_note_crashes(s->exec.books);
    s->exec.attention = ts_attention_new(threads, c->kernel);
    if (s->exec.attention != NULL)
        s->exec.host = ts_host_executor_new(s->exec.attention);
    if (!made) /* which is in the log */
        return false;
    if (s->exec.host == NULL || ts_rings_new(s, c->spin_us, join_us) == NULL) {
        ts_log(TS_LOG_ERROR, "no memory or threads for %u sessions and %u kernel threads",
               c->limits.sessions, threads);
        return false;
    }
    if (ts_takeover_pools(s, c) != TS_OK)
        return false;
    if (s->exec.num_gpus > 0)
        ts_rings_go_first(s->rings);
    return true;
}

/* Starts what clients reach. A client that finds the last of it finds all. */
static ts_status start_servers(serving *v, const ts_config *c, char *why, size_t why_bytes)
{
    ts_service *s = v->service;
    char handles_path[112];
    snprintf(handles_path, sizeof handles_path, "%s" TS_HANDLE_SUFFIX, c->socket);
    ts_nng_server_options messages = {.path = c->socket,
                                      .mode = c->socket_mode,
                                      .connections_max = connections_max(c, s->exec.books != NULL),
                                      .tenant_connections_max = c->tenant_connections,
                                      .idle_ms = c->idle_ms,
                                      .message_bytes = c->message_bytes};
    ts_fd_server_options handles = {.path = handles_path,
                                    .mode = c->socket_mode,
                                    .connections_max = messages.connections_max,
                                    .tenant_connections_max = c->tenant_connections,
                                    .idle_ms = c->idle_ms};
    ts_status status = ts_nng_server_start(s, &messages, &v->messages, why, why_bytes);
    if (status != TS_OK)
        return status;
    s->end_connection = end_connection;
    s->end_connection_arg = v->messages;
    status = ts_fd_server_start(s, &handles, &v->handles, why, why_bytes);
    if (status == TS_OK && c->metrics[0] != '\0')
        status = ts_http_start(s, c->metrics, c->metrics_hosts, &v->http, why, why_bytes);
    return status == TS_OK ? ts_nng_server_listen(v->messages, why, why_bytes) : status;
}

/* Nothing is undone: the next daemon goes on with what is stored. */
static void __attribute__((noreturn))
leave_to_the_next(ts_service *s, const ts_config *c, ts_store *store, int code)
{
    if (code != EXIT_DEVICE)
        ts_handover_leave_in_turn(s, c, store, code);
    ts_handover_note(SIGUSR1); /* a run of it may be why */
    ts_handover_leave(c, store, code);
}

/* Serves until a signal; the exit status. */
static int serve_until_signal(serving *v, ts_config *c, const options *o, const sigset_t *signals)
{
    ts_service *s = v->service;
    char told[64];
    ts_log(TS_LOG_INFO, "version " TS_VERSION " listens at %s; kernels: %s, %u threads", c->socket,
           ts_isa_name(ts_attention_isa(s->exec.attention)),
           ts_attention_threads(s->exec.attention));
    ts_books_taken_over(s->exec.books, TS_TAKEOVER_SERVES);
    ts_store_notify("READY=1");
    const int number = await_signal(s, signals, o, c);
    const int code = number == SIGUSR1   ? EXIT_DEVICE
                     : number == SIGUSR2 ? TS_EXIT_AGAIN
                                         : EXIT_SUCCESS;
    if (code == EXIT_SUCCESS)
        ts_log(TS_LOG_INFO, "%s: stopping", strsignal(number));
    /* A supervisor that adopted this daemon can't wait for its status. */
    snprintf(told, sizeof told, "STOPPING=1\nEXIT_STATUS=%d", code);
    ts_store_notify(told);
    return code;
}

/* Ends the threads, then frees what they used. */
static void end_serving(serving *v, int code)
{
    ts_service *s = v->service;
    ts_http_stop(v->http);
    ts_nng_server_stop(v->messages);
    ts_fd_server_stop(v->handles);
    ts_rings_stop(s->rings);
    if (v->engine_runs)
        ts_service_stop(s); /* no job is begun after this */
    if (s->exec.attention != NULL)
        ts_attention_cancel(s->exec.attention);
    ts_host_executor_free(s->exec.host);
    ts_pool_memory_stop(&s->exec);
    ts_queue_close(&s->exec.queue);
    if (v->engine_runs)
        pthread_join(v->engine, NULL);
    if (code == EXIT_DEVICE)
        ts_rings_device_failed(s->rings);
    ts_nng_server_free(v->messages); /* clients see the connection end */
    ts_queue_drop(&s->exec.queue);   /* news of connections that nobody needs any more */
    if (s->exec.engine != NULL) {
        ts_service_close_connections(s);
        ts_rings_free(s->rings);
        ts_service_fini(s);
    }
    ts_queue_fini(&s->exec.queue);
    pthread_mutex_destroy(&s->operators_lock);
    free(s);
}

/* Returns the exit status. */
static int serve(ts_config *c, const options *o, ts_store *store, const sigset_t *signals)
{
    serving v = {.service = calloc(1, sizeof *v.service)};
    ts_service *s = v.service;
    char why[256] = "out of memory";
    int code = EXIT_FAILURE;
    if (s == NULL)
        return code;
    set_up(s, c);
    if (make_engine(s, c, store)) {
        const int error = pthread_create(&v.engine, NULL, engine_main, s);
        v.engine_runs = error == 0;
        if (error != 0)
            snprintf(why, sizeof why, "no thread for the engine: %s", strerror(error));
        if (v.engine_runs && s->started.restored)
            ts_reload_taken_over(s, c);
        if (v.engine_runs && start_servers(&v, c, why, sizeof why) == TS_OK) {
            code = serve_until_signal(&v, c, o, signals);
            if (s->exec.books != NULL)
                leave_to_the_next(s, c, store, code);
        } else {
            ts_log(TS_LOG_ERROR, "%s", why);
        }
    }
    if (s->exec.books != NULL && s->started.restored) /* so is what it took over */
        ts_handover_leave(c, store, code);
    end_serving(&v, code);
    return code;
}

/* Takes the socket's path, and serves. */
static int lock_and_serve(ts_config *c, const options *o, ts_store *store, const sigset_t *signals)
{
    char lock_path[128], handles_path[128], why[512];
    int lock, code = EXIT_FAILURE;
    if (ts_socket_folder_make(c->socket, c->socket_is_own, why, sizeof why) != TS_OK ||
        ts_socket_path_lock(c->socket, "tinyserved", lock_path, sizeof lock_path, &lock, why,
                            sizeof why) != TS_OK) {
        ts_log(TS_LOG_ERROR, "%s", why);
        return EXIT_FAILURE;
    }
    snprintf(handles_path, sizeof handles_path, "%s" TS_HANDLE_SUFFIX, c->socket);
    if (ts_socket_path_clear(c->socket, why, sizeof why) != TS_OK ||
        ts_socket_path_clear(handles_path, why, sizeof why) != TS_OK)
        ts_log(TS_LOG_ERROR, "%s", why);
    else
        code = serve(c, o, store, signals);
    (void)unlink(lock_path);
    close(lock);
    return code;
}

/* --supervise: the parent of a daemon. Returns the exit status. */
static int supervise(const ts_config *c, int argc, char **argv)
{
    ts_supervise_options options = TS_SUPERVISE_OPTIONS_INIT;
    char place[128], notify_path[128], lock_path[144], why[512];
    char **arguments = calloc((size_t)argc + 1, sizeof *arguments);
    int lock, code = EXIT_FAILURE, n = 0;
    if (arguments == NULL)
        return EXIT_FAILURE;
    for (int i = 0; i < argc; i++)
        if (argv[i] != NULL)
            arguments[n++] = argv[i];
    options.socket = c->socket;
    options.argv = arguments;
    snprintf(place, sizeof place, "%s" TS_STORE_SOCKET_SUFFIX, c->socket);
    snprintf(notify_path, sizeof notify_path, "%s" TS_NOTIFY_SOCKET_SUFFIX, c->socket);
    if (ts_socket_folder_make(c->socket, c->socket_is_own, why, sizeof why) != TS_OK ||
        ts_socket_path_lock(place, "supervisor (tinyserved --supervise)", lock_path,
                            sizeof lock_path, &lock, why, sizeof why) != TS_OK) {
        ts_log(TS_LOG_ERROR, "%s", why);
        free(arguments);
        return EXIT_FAILURE;
    }
    if (ts_socket_path_clear(place, why, sizeof why) != TS_OK ||
        ts_socket_path_clear(notify_path, why, sizeof why) != TS_OK)
        ts_log(TS_LOG_ERROR, "%s", why);
    else
        code = ts_supervise(&options);
    (void)unlink(lock_path);
    close(lock);
    free(arguments);
    return code;
}

int main(int argc, char **argv)
{
    options o = {.config_path = TS_CONFIG_DEFAULT};
    /* What ps and pkill call it: as a supervisor's child it would be "exe". */
    (void)prctl(PR_SET_NAME, program_invocation_short_name);
    argp_err_exit_status = EXIT_USAGE;
    ts_output_begin();
    argp_parse(&argp, argc, argv, 0, NULL, &o);
    /* A reload waits; what is to end a daemon that isn't one yet may do so. */
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGHUP);
    if (!o.check)
        pthread_sigmask(SIG_BLOCK, &signals, NULL);
    ts_config *c = malloc(sizeof *c);
    if (c == NULL)
        return EXIT_FAILURE;
    ts_status status = read_config(&o, c);
    if (o.check && status != TS_ENOENT)
        status = ts_pool_memory_check(c);
    ts_log_init(c->log_level);
    if (status != TS_OK) {
        log_problems(c);
        free(c);
        return EXIT_USAGE;
    }
    if (o.check) {
        for (uint32_t i = 0; i < c->num_pools; i++) {
            char text[320];
            ts_pool_memory_describe(&c->pools[i].pool, text, sizeof text);
            puts(text);
        }
        free(c);
        return EXIT_SUCCESS;
    }
    if (o.supervise) {
        int code = supervise(c, argc, argv);
        free(c);
        return code;
    }
    /* Every thread leaves these to main's sigwait. */
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGUSR1); /* device_failed */
    sigaddset(&signals, SIGUSR2); /* end_to_start_again */
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);          /* a limit on files' sizes refuses memory, and ends nobody */
    ts_store *store = ts_store_open(); /* with the first thread */
    raise_file_limit();
    int code = lock_and_serve(c, &o, store, &signals);
    ts_store_close(store);
    free(c);
    return code;
}
