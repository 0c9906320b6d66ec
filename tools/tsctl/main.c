/* tsctl: what the operator asks a running tinyserved. */
#define _GNU_SOURCE
#include "doctor.h"
#include "options.h"

#include "error.h"
#include "namespace_text.h"
#include "plain_text.h"
#include "standard_output.h"
#include "tinyserve_version.h"
#include "unconst.h"
#include "wait_option.h"

#include <argp.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

const char *argp_program_version = "tsctl " TS_VERSION;

enum { OPT_COLOR = 256, OPT_WAIT, OPT_TENANT, OPT_NAMESPACE, OPT_EMPTY };

static const struct argp_option argp_options[] = {
    {"socket", 's', "URL", 0, "The daemon (default: TINYSERVE_URL, the user's or the system's)", 0},
    {"pool", 'P', "NAME", 0, "Which pool (needed where there are several)", 0},
    {"json", 'j', NULL, 0, "Write JSON", 0},
    {"watch", 'w', "SECONDS", OPTION_ARG_OPTIONAL, "Repeat, every SECONDS (default 1)", 0},
    TS_WAIT_OPTION(OPT_WAIT),
    {"cells", 'c', "N", 0, "Cells of the map (default 1024)", 0},
    {"color", OPT_COLOR, "WHEN", 0, "auto (default), always or never", 0},
    {"yes", 'y', NULL, 0, "Don't ask before something is ended or freed", 0},
    {"tenant", OPT_TENANT, "UID", 0, "Whose prefixes cache drop forgets (default: everybody's)", 0},
    {"namespace", OPT_NAMESPACE, "NAME", 0, "In which namespace it does (default: in all)", 0},
    {"empty", OPT_EMPTY, NULL, 0, "After restart, begin with nothing: all that is stored is lost",
     0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    options *o = state->input;
    char *end;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &o->plan;
        return 0;
    case 's':
        o->url = arg;
        return 0;
    case 'P':
        o->pool = arg;
        return 0;
    case 'j':
        o->json = true;
        return 0;
    case 'w':
        o->watch = true;
        o->interval = arg == NULL ? 1.0 : strtod(arg, &end);
        if (arg != NULL && (*end != '\0' || !(o->interval >= 0.1 && o->interval <= 3600)))
            argp_error(state, "--watch=%s: 0.1 to 3600 seconds are possible", arg);
        return 0;
    case OPT_WAIT:
        o->wait_ms = ts_wait_option(arg, state);
        return 0;
    case 'c': {
        unsigned long n = strtoul(arg, &end, 10);
        if (*end != '\0' || n < 1 || n > 8192)
            argp_error(state, "--cells %s: 1 to 8192 are possible", arg);
        o->cells = (uint32_t)n;
        o->has_cells = true;
        return 0;
    }
    case OPT_COLOR:
        if (strcmp(arg, "always") == 0)
            o->style.color = true;
        else if (strcmp(arg, "never") == 0)
            o->style.color = false;
        else if (strcmp(arg, "auto") != 0)
            argp_error(state, "--color %s: auto, always or never", arg);
        return 0;
    case OPT_TENANT: {
        errno = 0;
        unsigned long long n = strtoull(arg, &end, 10);
        if (errno != 0 || end == arg || *end != '\0' || arg[0] == '-' || n > UINT32_MAX)
            argp_error(state, "--tenant %s: not a uid", arg);
        o->has_tenant = true;
        o->tenant = (uint32_t)n;
        return 0;
    }
    case OPT_NAMESPACE:
        if (!ts_namespace_read(arg, o->space, &o->space_bytes))
            argp_error(state, "--namespace %s: 1 to 64 bytes, as text or as hex:6d6f64656c", arg);
        return 0;
    case OPT_EMPTY:
        o->empty = true;
        return 0;
    case 'y':
        o->yes = true;
        return 0;
    case ARGP_KEY_ARG:
        if (o->num_words == WORDS_MAX)
            argp_error(state, "one command at a time: '%s' is too many", arg);
        o->words[o->num_words++] = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "no command is given, as in: tsctl status");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {{&plan_argp, 0, NULL, 0}, {0}};

static const struct argp argp = {
    argp_options,
    parse,
    "COMMAND",
    "Shows what a running tinyserved does, and for operators changes it.\v"
    "Commands (a pool's name may follow pools, seqs, frag, map, cache, top, cache\n"
    "drop and seq free ID):\n"
    "  status     the daemon and its pools\n"
    "  pools      the pools alone, or one of them\n"
    "  sessions   connected workers\n"
    "  seqs       sequences of a pool (* in an open step)\n"
    "  frag       fragmentation: efficiency, sharing, histograms, tenants\n"
    "  map        a picture of a pool's blocks\n"
    "  cache      what the prefix cache found and evicted, largest namespaces\n"
    "  check      hold the daemon's books against each other\n"
    "  top        all of it, live; q ends it\n"
    "  doctor     socket, limits, versions and MPS: what is wrong, and what to do\n"
    "  plan       how many sequences of a model fit; needs no daemon, but --model,\n"
    "             --memory and --tokens\n"
    "  session kick ID   end a session: its sequences, except kept ones, are freed\n"
    "  seq free ID       free a sequence, whosever it is\n"
    "  pool create NAME KEY=VALUE ...   make a pool, by the configuration's keys\n"
    "  pool delete NAME                 end one that no session has open\n"
    "  pool resize NAME SIZE            give one more memory, or less\n"
    "  cache drop        forget cached prefixes: all, --tenant's or --namespace's\n"
    "  drain [off]       take no new sessions but operators', or take all again\n"
    "  restart           end the daemon: the next one has all that is stored, or\n"
    "                    with --empty nothing\n"
    "\n"
    "The last eight are for operators. They ask before they destroy or refuse\n"
    "something.\n"
    "Exit status: 0 fine, 1 refused, or check or doctor found problems, 2 usage,\n"
    "3 no daemon.",
    children,
    NULL,
    NULL};

void tsctl_print_json(const options *o, json_t *value)
{
    json_dumpf(value, stdout, o->watch ? JSON_COMPACT : JSON_INDENT(2));
    putchar('\n');
    json_decref(value);
}

ts_status tsctl_ask(ts_client *c, Tspb__Request *request, Tspb__Reply__BodyCase expected,
                    Tspb__Reply **reply)
{
    ts_status status = ts_call(c, request, reply);
    if (status == TS_OK && (*reply)->body_case != expected)
        status = ts_fail(c, TS_EPROTO, "the daemon answered something else");
    else if (status == TS_OK && !ts_text_escape_all(&(*reply)->base)) /* other people's names */
        status = ts_fail(c, TS_ENOMEM, "no memory for the answer");
    else
        return status;
    tspb__reply__free_unpacked(*reply, NULL);
    *reply = NULL;
    return status;
}

/* Moves the pool of this name to the front and frees the others, if there is a name; false: there
 * is none of it. */
static bool keep_pool(Tspb__StatusReply *r, const char *name)
{
    if (name[0] == '\0')
        return true;
    for (size_t i = 0; i < r->n_pools; i++)
        if (strcmp(r->pools[i]->name, name) == 0) {
            Tspb__PoolSummary *it = r->pools[i];
            r->pools[i] = r->pools[0];
            r->pools[0] = it;
            while (r->n_pools > 1)
                tspb__pool_summary__free_unpacked(r->pools[--r->n_pools], NULL);
            return true;
        }
    return false;
}

static int do_status(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_STATUS_REPLY, &reply);
    if (*ts != TS_OK)
        return EXIT_REFUSED;
    bool pools = strcmp(o->words[0], "pools") == 0;
    if (pools && !keep_pool(reply->status_reply, o->pool)) {
        *ts = tsctl_no_pool(c, reply->status_reply, o->pool);
        tspb__reply__free_unpacked(reply, NULL);
        return EXIT_REFUSED;
    }
    if (o->json)
        tsctl_print_json(o, pools ? json_pools(reply->status_reply)
                                  : json_status(reply->status_reply));
    else if (pools)
        text_pools(reply->status_reply, &o->style);
    else
        text_status(reply->status_reply, &o->style);
    tspb__reply__free_unpacked(reply, NULL);
    return EXIT_SUCCESS;
}

static int do_sessions(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__ListSessions body = TSPB__LIST_SESSIONS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    json_t *list = json_array();
    if (!o->json)
        text_sessions_head();
    request.body_case = TSPB__REQUEST__BODY_LIST_SESSIONS;
    request.list_sessions = &body;
    for (bool more = true; more;) {
        *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_SESSION_LIST, &reply);
        if (*ts != TS_OK) {
            json_decref(list);
            return EXIT_REFUSED;
        }
        const Tspb__SessionList *l = reply->session_list;
        if (o->json)
            json_sessions(list, l);
        else
            text_sessions(l, &o->style);
        more = l->more && l->n_sessions > 0;
        if (more)
            body.after = l->sessions[l->n_sessions - 1]->session;
        tspb__reply__free_unpacked(reply, NULL);
    }
    if (o->json)
        tsctl_print_json(o, list);
    else
        json_decref(list);
    return EXIT_SUCCESS;
}

static int do_seqs(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__ListSeqs body = TSPB__LIST_SEQS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    json_t *list = json_array();
    bool first = true;
    body.pool = ts_unconst(o->pool);
    request.body_case = TSPB__REQUEST__BODY_LIST_SEQS;
    request.list_seqs = &body;
    do {
        *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_SEQ_LIST, &reply);
        if (*ts != TS_OK) {
            json_decref(list);
            return EXIT_REFUSED;
        }
        if (first && !o->json)
            text_seqs_head();
        first = false;
        if (o->json)
            json_seqs(list, reply->seq_list);
        else
            text_seqs(reply->seq_list, &o->style);
        body.after = reply->seq_list->next;
        tspb__reply__free_unpacked(reply, NULL);
    } while (body.after != 0);
    if (o->json)
        tsctl_print_json(o, list);
    else
        json_decref(list);
    return EXIT_SUCCESS;
}

static int do_frag(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__PoolStats body = TSPB__POOL_STATS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    body.pool = ts_unconst(o->pool);
    request.body_case = TSPB__REQUEST__BODY_POOL_STATS;
    request.pool_stats = &body;
    *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_POOL_STATS_REPLY, &reply);
    if (*ts != TS_OK)
        return EXIT_REFUSED;
    if (o->json)
        tsctl_print_json(o, json_frag(reply->pool_stats_reply));
    else
        text_frag(reply->pool_stats_reply, &o->style);
    tspb__reply__free_unpacked(reply, NULL);
    return EXIT_SUCCESS;
}

static int do_map(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__PoolMap body = TSPB__POOL_MAP__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    body.pool = ts_unconst(o->pool);
    body.cells = o->cells;
    request.body_case = TSPB__REQUEST__BODY_POOL_MAP;
    request.pool_map = &body;
    *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_POOL_MAP_REPLY, &reply);
    if (*ts != TS_OK)
        return EXIT_REFUSED;
    if (o->json)
        tsctl_print_json(o, json_map(reply->pool_map_reply));
    else
        text_map(reply->pool_map_reply, &o->style);
    tspb__reply__free_unpacked(reply, NULL);
    return EXIT_SUCCESS;
}

static int do_check(ts_client *c, const options *o, ts_status *ts)
{
    Tspb__Check body = TSPB__CHECK__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    request.body_case = TSPB__REQUEST__BODY_CHECK;
    request.check = &body;
    *ts = tsctl_ask(c, &request, TSPB__REPLY__BODY_CHECK_REPLY, &reply);
    if (*ts != TS_OK)
        return EXIT_REFUSED;
    if (o->json)
        tsctl_print_json(o, json_check(reply->check_reply));
    else
        text_check(reply->check_reply);
    int code = reply->check_reply->n_problems == 0 ? EXIT_SUCCESS : EXIT_REFUSED;
    tspb__reply__free_unpacked(reply, NULL);
    return code;
}

static int do_top(ts_client *c, const options *o, ts_status *ts)
{
    if (!isatty(0) || !isatty(1)) {
        fputs("tsctl: top needs a terminal; elsewhere there is --watch\n", stderr);
        return EXIT_USAGE;
    }
    *ts = top_run(c, o->pool, o->watch ? o->interval : 1);
    return *ts == TS_OK ? EXIT_SUCCESS : EXIT_REFUSED;
}

typedef struct command {
    const char *words[2]; /* the second NULL: there is none */
    const char *rest;     /* what follows them, for messages */
    uint32_t least, most; /* words in all */
    command_fn run;
    bool takes_pool;                /* as the last word, if there are `most` */
    bool shows;                     /* and changes nothing: --watch may repeat it */
    int (*alone)(const options *o); /* in place of `run`: it connects by itself, or not at all */
} command;

static int do_plan(const options *o)
{
    return plan_run(&o->plan, o->json);
}

static const command commands[] = {
    {{"status"}, "", 1, 1, do_status, false, true, NULL},
    {{"pools"}, "[POOL]", 1, 2, do_status, true, true, NULL},
    {{"sessions"}, "", 1, 1, do_sessions, false, true, NULL},
    {{"seqs"}, "[POOL]", 1, 2, do_seqs, true, true, NULL},
    {{"frag"}, "[POOL]", 1, 2, do_frag, true, true, NULL},
    {{"map"}, "[POOL]", 1, 2, do_map, true, true, NULL},
    {{"cache", "drop"}, "[POOL]", 2, 3, do_cache_drop, true, false, NULL},
    {{"cache"}, "[POOL]", 1, 2, do_cache, true, true, NULL},
    {{"check"}, "", 1, 1, do_check, false, true, NULL},
    {{"top"}, "[POOL]", 1, 2, do_top, true, true, NULL},
    {{"session", "kick"}, "ID", 3, 3, do_kick, false, false, NULL},
    {{"seq", "free"}, "ID [POOL]", 3, 4, do_free, true, false, NULL},
    {{"pool", "create"}, "NAME KEY=VALUE ...", 4, WORDS_MAX, do_pool_create, false, false, NULL},
    {{"pool", "delete"}, "NAME", 3, 3, do_pool_delete, false, false, NULL},
    {{"pool", "resize"}, "NAME SIZE", 4, 4, do_pool_resize, false, false, NULL},
    {{"drain"}, "[off]", 1, 2, do_drain, false, false, NULL},
    {{"restart"}, "", 1, 1, do_restart, false, false, NULL},
    {{"doctor"}, "", 1, 1, NULL, false, false, doctor_run},
    {{"plan"}, "--model=FILE --memory=SIZE --tokens=N", 1, 1, NULL, false, false, do_plan}};

#define NUM_COMMANDS (sizeof commands / sizeof *commands)

/* Whether the command line begins with the command's words. */
static bool is_called(const command *c, const options *o)
{
    return strcmp(c->words[0], o->words[0]) == 0 &&
           (c->words[1] == NULL || (o->num_words > 1 && strcmp(c->words[1], o->words[1]) == 0));
}

static const command *find_command(const options *o)
{
    for (size_t i = 0; i < NUM_COMMANDS; i++)
        if (is_called(&commands[i], o) && o->num_words >= commands[i].least &&
            o->num_words <= commands[i].most)
            return &commands[i];
    return NULL;
}

static void print_usage(const char *before, const command *c)
{
    fprintf(stderr, "%s%s%s%s%s%s", before, c->words[0], c->words[1] == NULL ? "" : " ",
            c->words[1] == NULL ? "" : c->words[1], c->rest[0] == '\0' ? "" : " ", c->rest);
}

/* The command line is none: says how its command is used, or which commands there are, those of the
 * same first word alone if there are such. */
static void explain_commands(const options *o)
{
    size_t alike = 0;
    for (size_t i = 0; i < NUM_COMMANDS; i++) {
        if (is_called(&commands[i], o)) {
            print_usage("tsctl: it is used as: tsctl ", &commands[i]);
            fputc('\n', stderr);
            return;
        }
        alike += strcmp(commands[i].words[0], o->words[0]) == 0;
    }
    fputs("tsctl: there is no command '", stderr);
    for (uint32_t i = 0; i < o->num_words; i++)
        fprintf(stderr, "%s%s", i == 0 ? "" : " ", o->words[i]);
    const char *before = alike == 1 ? "'; there is " : "'; there are ";
    for (size_t i = 0; i < NUM_COMMANDS; i++)
        if (alike == 0 || strcmp(commands[i].words[0], o->words[0]) == 0) {
            print_usage(before, &commands[i]);
            before = ", ";
        }
    fputs(alike == 0 ? " (tsctl --help explains them)\n" : "\n", stderr);
}

/* The pool that the command line names, as an option or as the last word; false: as two. */
static bool settle_pool(const command *c, options *o)
{
    if (!c->takes_pool || o->num_words < c->most)
        return true;
    const char *word = o->words[o->num_words - 1];
    if (o->pool[0] != '\0' && strcmp(o->pool, word) != 0) {
        fprintf(stderr, "tsctl: which pool: '%s' or '%s'?\n", o->pool, word);
        return false;
    }
    o->pool = word;
    return true;
}

/* Runs it on the daemon, again and again if it is to be watched; an exit status. */
static int run_connected(const command *command, const options *o)
{
    ts_client *client;
    int code = EXIT_REFUSED;
    ts_options connection = {
        .size = sizeof(ts_options), .url = o->url, .program = "tsctl", .wait_ms = o->wait_ms};
    ts_status status = ts_connect(&connection, &client);
    if (status == TS_EINVAL) /* what --socket or TINYSERVE_URL names can be no daemon's */
        code = EXIT_USAGE;
    else if (status == TS_ETIMEOUT)
        code = EXIT_UNREACHABLE;
    while (status == TS_OK) {
        if (o->watch && !o->json && isatty(1) && command->run != do_top)
            fputs("\033[H\033[2J", stdout);
        code = command->run(client, o, &status);
        if (!o->watch || status != TS_OK || command->run == do_top)
            break;
        if (fflush(stdout) != 0)
            break; /* ts_output_close tells of it */
        struct timespec pause = {.tv_sec = (time_t)o->interval,
                                 .tv_nsec = (long)((o->interval - (time_t)o->interval) * 1e9)};
        nanosleep(&pause, NULL);
    }
    if (status != TS_OK) {
        char why[1024];
        fprintf(stderr, "tsctl: %s\n", ts_text_escape(ts_error(client), why, sizeof why));
    }
    if (status == TS_ECONN)
        code = EXIT_UNREACHABLE;
    ts_disconnect(client);
    return code;
}

/* What this command makes no use of; NULL: there is no such option. */
static const char *misplaced_option(const command *c, const options *o)
{
    if (c->run != do_cache_drop && (o->has_tenant || o->space_bytes > 0))
        return "--tenant and --namespace are for cache drop";
    if (c->run != do_restart && o->empty)
        return "--empty is for restart";
    if (c->alone != do_plan && o->plan.given)
        return "--model, --memory, --tokens, --shared, --gpus, --tensor-parallel, --dtype and "
               "--block-tokens are for plan";
    if (!c->shows && o->watch)
        return "--watch is for status, pools, sessions, seqs, frag, map, cache, check and top";
    if (!c->takes_pool && o->pool[0] != '\0')
        return "--pool is for pools, seqs, frag, map, cache, cache drop, top and seq free";
    if (c->run != do_map && o->has_cells)
        return "--cells is for map";
    return NULL;
}

int main(int argc, char **argv)
{
    options o = {.pool = "",
                 .cells = MAP_CELLS_DEFAULT,
                 .style = {.color = isatty(1)},
                 .plan = PLAN_OPTIONS_INIT};
    argp_err_exit_status = EXIT_USAGE;
    ts_output_begin();
    if (getenv("NO_COLOR") != NULL)
        o.style.color = false;
    argp_parse(&argp, argc, argv, 0, NULL, &o);
    text_start(&o.style);
    const command *command = find_command(&o);
    if (command == NULL) {
        explain_commands(&o);
        return EXIT_USAGE;
    }
    if (!settle_pool(command, &o))
        return EXIT_USAGE;
    const char *misplaced = misplaced_option(command, &o);
    if (misplaced != NULL) {
        fprintf(stderr, "tsctl: %s\n", misplaced);
        return EXIT_USAGE;
    }
    if (command->alone != NULL)
        return command->alone(&o);
    return run_connected(command, &o);
}
