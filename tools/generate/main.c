/*
 * ts-generate: a worker. Loads a byte-level Llama model, keeps its keys and values in TinyServe and
 * has the daemon attend; writes what it generates to stdout as it comes.
 */
#define _GNU_SOURCE
#include "model.h"
#include "standard_output.h"
#include "tinyserve_version.h"
#include "wait_option.h"

#include <argp.h>
#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

const char *argp_program_version = "ts-generate " TS_VERSION;

#define LOGITS_TOLERANCE 1e-3f

enum {
    OPT_PREFIX_OF = 256,
    OPT_KEEP,
    OPT_VERIFY,
    OPT_PROMPT_FILE,
    OPT_KERNEL,
    OPT_TRANSPORT,
    OPT_EXEC,
    OPT_NO_CACHE,
    OPT_WAIT
};

typedef struct options {
    const char *socket, *pool, *folder, *prefix_of, *keep, *verify, *prompt_file, *kernel;
    char *prompt;
    uint32_t tokens, wait_ms;
    ts_transport transport;
    ts_exec exec;
    bool no_cache;
} options;

static const struct argp_option argp_options[] = {
    {"socket", 's', "URL", 0, "The daemon (default: TINYSERVE_URL, the user's or the system's)", 0},
    {"pool", 'P', "NAME", 0, "The pool to use (default: tiny)", 0},
    {"model", 'm', "FOLDER", 0,
     "config.json and model.safetensors (default: tools/model, or what is installed)", 0},
    {"prompt", 'p', "TEXT", 0, "Text to go on from", 0},
    {"prompt-file", OPT_PROMPT_FILE, "FILE", 0, "The prompt is this file's contents", 0},
    {"tokens", 'n', "N", 0, "How many bytes to generate (default: 192)", 0},
    {"prefix-of", OPT_PREFIX_OF, "NAME", 0,
     "Share the keys and values of the sequence kept under NAME, which holds the prompt's "
     "beginning",
     0},
    {"kernel", OPT_KERNEL, "NAME", 0, "On a GPU: attend with this kernel (default: the pool's)", 0},
    {"transport", OPT_TRANSPORT, "ring|messages|auto", 0,
     "How steps reach the daemon: a ring in shared memory, or messages (default: auto, which is "
     "the "
     "ring if there is one)",
     0},
    {"exec", OPT_EXEC, "daemon|local|auto", 0,
     "Who attends: the daemon (default), this process over the mapped pool, or whichever is "
     "quicker",
     0},
    {"no-cache", OPT_NO_CACHE, NULL, 0,
     "Compute the whole prompt, whatever of it is in the pool, and leave nothing to be found", 0},
    {"keep", OPT_KEEP, "NAME", 0, "Keep the sequence under NAME when done", 0},
    TS_WAIT_OPTION(OPT_WAIT),
    {"verify", OPT_VERIFY, "FILE:INDEX", 0,
     "Take the prompt from this reference and compare what comes of it, bytes and logits", 0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    options *o = state->input;
    char *end;
    switch (key) {
    case 's':
        o->socket = arg;
        return 0;
    case 'P':
        o->pool = arg;
        return 0;
    case 'm':
        o->folder = arg;
        return 0;
    case 'p':
        o->prompt = arg;
        return 0;
    case 'n': {
        unsigned long n = strtoul(arg, &end, 10);
        if (end == arg || *end != '\0' || arg[0] == '-' || n > 1u << 20)
            argp_error(state, "--tokens %s: a number up to 1048576 is needed", arg);
        o->tokens = (uint32_t)n;
        return 0;
    }
    case OPT_WAIT:
        o->wait_ms = ts_wait_option(arg, state);
        return 0;
    case OPT_PROMPT_FILE:
        o->prompt_file = arg;
        return 0;
    case OPT_PREFIX_OF:
        o->prefix_of = arg;
        return 0;
    case OPT_KERNEL:
        o->kernel = arg;
        return 0;
    case OPT_TRANSPORT:
        o->transport = strcmp(arg, "ring") == 0       ? TS_TRANSPORT_RING
                       : strcmp(arg, "messages") == 0 ? TS_TRANSPORT_MESSAGES
                                                      : TS_TRANSPORT_AUTO;
        if (o->transport == TS_TRANSPORT_AUTO && strcmp(arg, "auto") != 0)
            argp_error(state, "--transport %s: ring, messages or auto are possible", arg);
        return 0;
    case OPT_EXEC:
        o->exec = strcmp(arg, "local") == 0  ? TS_EXEC_LOCAL
                  : strcmp(arg, "auto") == 0 ? TS_EXEC_AUTO
                                             : TS_EXEC_DAEMON;
        if (o->exec == TS_EXEC_DAEMON && strcmp(arg, "daemon") != 0)
            argp_error(state, "--exec %s: daemon, local or auto are possible", arg);
        return 0;
    case OPT_NO_CACHE:
        o->no_cache = true;
        return 0;
    case OPT_KEEP:
        o->keep = arg;
        return 0;
    case OPT_VERIFY:
        o->verify = arg;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "'%s' is not an option; the prompt goes behind --prompt", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp argp = {
    argp_options,
    parse,
    NULL,
    "Generates text with a tiny language model whose KV cache lives in "
    "tinyserved.",
    NULL,
    NULL,
    NULL};

/* What is generated, and what it is compared with. */
typedef struct job {
    uint8_t *tokens; /* bos and prompt, then what was generated */
    uint32_t *ids;   /* the same, for the pool */
    float *logits;   /* of the last token that was computed */
    uint32_t prompt, total;
    json_t *reference; /* NULL: nothing to compare with */
    uint32_t shared;   /* tokens that were there already */
    float worst_logit;
    uint32_t wrong;
    double prompt_s, answer_s; /* until the prompt was computed, and what came after took */
    double longest_s;          /* of the steps, the daemon's restarts included */
} job;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "ts-generate: %s: %s\n", what, why);
    return EXIT_FAILURE;
}

/* The entry FILE:INDEX of a reference, or NULL with a message on stderr. */
static json_t *load_reference(const char *where)
{
    char path[1024];
    json_error_t error;
    snprintf(path, sizeof path, "%s", where);
    char *colon = strrchr(path, ':');
    if (colon == NULL) {
        fail(where, "FILE:INDEX is needed");
        return NULL;
    }
    *colon = '\0';
    json_t *all = json_load_file(path, 0, &error);
    if (all == NULL) {
        fail(path, error.text);
        return NULL;
    }
    char *end;
    const unsigned long index = strtoul(colon + 1, &end, 10);
    const bool is_number = end != colon + 1 && *end == '\0' && colon[1] != '-';
    json_t *entry = is_number ? json_array_get(json_object_get(all, "prompts"), index) : NULL;
    json_incref(entry);
    json_decref(all);
    if (entry == NULL)
        fail(where, "the file has no such prompt");
    return entry;
}

static char *read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    char *text = malloc(1 << 20);
    *bytes = f != NULL && text != NULL ? fread(text, 1, 1 << 20, f) : 0;
    if (f == NULL || text == NULL || ferror(f)) {
        fail(path, strerror(errno));
        free(text);
        text = NULL;
    }
    if (f != NULL)
        fclose(f);
    return text;
}

static bool prepare(const options *o, const model *m, job *j)
{
    const char *prompt = o->prompt;
    size_t bytes = prompt == NULL ? 0 : strlen(prompt);
    uint32_t tokens = o->tokens;
    char *read = NULL;
    if (o->verify != NULL) {
        j->reference = load_reference(o->verify);
        if (j->reference == NULL)
            return false;
        prompt = json_string_value(json_object_get(j->reference, "prompt"));
        bytes = prompt == NULL ? 0 : strlen(prompt);
        tokens = (uint32_t)json_array_size(json_object_get(j->reference, "output_ids"));
    } else if (o->prompt_file != NULL) {
        prompt = read = read_file(o->prompt_file, &bytes);
        if (read == NULL)
            return false;
    }
    bool ok = bytes + 1 + tokens <= m->positions;
    if (!ok)
        fprintf(stderr,
                "ts-generate: %zu bytes of prompt and %u to generate; the model has %u positions\n",
                bytes, tokens, m->positions);
    j->prompt = (uint32_t)bytes + 1;
    j->total = j->prompt + tokens;
    j->tokens = calloc(ok ? j->total : 1, 1);
    j->ids = calloc(ok ? j->total : 1, sizeof *j->ids);
    j->logits = malloc(m->vocab * sizeof *j->logits);
    if (ok && (j->tokens == NULL || j->ids == NULL || j->logits == NULL)) {
        fprintf(stderr, "ts-generate: no memory for %u tokens\n", j->total);
        ok = false;
    }
    if (ok) {
        j->tokens[0] = (uint8_t)m->bos;
        if (bytes > 0)
            memcpy(j->tokens + 1, prompt, bytes);
        for (uint32_t i = 0; i < j->prompt; i++)
            j->ids[i] = j->tokens[i];
    }
    free(read);
    return ok;
}

static void compare_logits(job *j, const float *logits, uint32_t vocab)
{
    json_t *expected = json_object_get(j->reference, "last_prompt_logits");
    for (uint32_t i = 0; i < vocab; i++) {
        float d = fabsf(logits[i] - (float)json_number_value(json_array_get(expected, i)));
        if (!(d <= j->worst_logit))
            j->worst_logit = d;
    }
}

static void compare_byte(job *j, uint32_t at)
{
    json_t *ids = json_object_get(j->reference, "output_ids");
    j->wrong += json_integer_value(json_array_get(ids, at - j->prompt)) != j->tokens[at];
}

static ts_status start_sequence(const options *o, const model *m, ts_pool *pool, job *j,
                                ts_seq *seq)
{
    char space[32];
    int bytes = snprintf(space, sizeof space, "generate:%016llx", (unsigned long long)m->digest);
    /* What others compute of this prompt just now isn't computed here, too. */
    const ts_seq_options model = {
        .size = sizeof model, .space = space, .space_bytes = (size_t)bytes, .wait_ms = 60000};
    if (o->no_cache && o->prefix_of == NULL)
        return ts_seq_create(pool, 1, seq);
    if (o->prefix_of == NULL)
        return ts_seq_match(pool, j->ids, &j->prompt, 1, &model, seq, &j->shared);
    ts_seq parent;
    ts_status status = ts_seq_attach(pool, o->prefix_of, &parent, &j->shared);
    if (status != TS_OK)
        return status;
    if (j->shared > j->prompt - 1) /* the last token of the prompt is computed: its logits count */
        j->shared = j->prompt - 1;
    return ts_seq_fork_at(pool, parent, j->shared, 1, seq);
}

/* Adds `count` tokens from number `at` on. */
static ts_status forward(const options *o, const model *m, ts_pool *pool, ts_seq seq, const job *j,
                         uint32_t at, uint32_t count, float *logits)
{
    ts_step *step;
    ts_step_options options = {.size = sizeof(ts_step_options),
                               .heads = m->heads,
                               .kernel = o->kernel,
                               .tokens = o->no_cache ? NULL : j->ids + at};
    ts_status status = ts_step_begin(pool, &seq, &count, 1, &options, &step);
    if (status != TS_OK)
        return status;
    status = model_forward(m, j->tokens + at, step, logits);
    if (status == TS_OK)
        status = ts_step_commit(step, NULL);
    if (status != TS_OK)
        (void)ts_step_abort(step);
    return status;
}

static uint32_t most_likely(const float *logits, uint32_t vocab)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* Computes the prompt and generates, a byte after the other, which are printed. */
static ts_status generate(const options *o, const model *m, ts_pool *pool, job *j)
{
    ts_seq seq;
    const double start = now();
    double prefilled = start;
    ts_status status = start_sequence(o, m, pool, j, &seq);
    for (uint32_t at = j->shared; status == TS_OK && at < j->total;) {
        const uint32_t count = at < j->prompt ? j->prompt - at : 1;
        if (at + count >= j->total && j->total > j->prompt)
            break; /* the last byte need not be computed further */
        const double begun = now();
        status = forward(o, m, pool, seq, j, at, count, j->logits);
        if (now() - begun > j->longest_s)
            j->longest_s = now() - begun;
        if (status != TS_OK)
            break;
        at += count;
        if (at == j->prompt) {
            prefilled = now();
            if (j->reference != NULL)
                compare_logits(j, j->logits, m->vocab);
        }
        if (at == j->total)
            break;
        j->ids[at] = most_likely(j->logits, m->vocab);
        j->tokens[at] = (uint8_t)j->ids[at];
        if (j->reference != NULL)
            compare_byte(j, at);
        putchar((int)j->ids[at]);
        fflush(stdout);
    }
    j->prompt_s = prefilled - start;
    j->answer_s = now() - prefilled;
    return status == TS_OK && o->keep != NULL ? ts_seq_keep(pool, seq, o->keep) : status;
}

/* Says what was computed, how fast, and by whom. */
static void report(const job *j, const ts_client *client)
{
    const uint32_t generated = j->total - j->prompt;
    if (generated > 0)
        putchar('\n');
    fflush(stdout);
    fprintf(stderr, "prompt: %u tokens, %u of them found, %u computed, ready after %.0f ms",
            j->prompt, j->shared, j->prompt - j->shared, j->prompt_s * 1e3);
    if (generated > 0)
        fprintf(stderr, "; generated: %u tokens, %.1f tokens/s by %s, attended by the %s",
                generated, (double)generated / j->answer_s,
                ts_client_transport(client) == TS_TRANSPORT_RING ? "ring" : "messages",
                ts_client_exec(client) == TS_EXEC_DAEMON ? "daemon" : "worker");
    fputc('\n', stderr);
    if (ts_client_restarts(client) > 0)
        fprintf(stderr, "restarts of the daemon: %u, waited %.0f ms at most\n",
                ts_client_restarts(client), j->longest_s * 1e3);
}

/* Whether the sequence can be kept under the name, before there is one: 0 is none. */
static ts_status check_name(ts_pool *pool, const char *name)
{
    const ts_status status = ts_seq_keep(pool, 0, name);
    return status == TS_ENOENT ? TS_OK : status;
}

static bool fits(const model *m, const ts_geometry *g)
{
    if (g->layers == m->layers && g->kv_heads == m->kv_heads && g->head_dim == m->head_dim)
        return true;
    fprintf(stderr,
            "ts-generate: the model has %u layers, %u KV heads of %u; the pool has %u, %u of %u\n",
            m->layers, m->kv_heads, m->head_dim, g->layers, g->kv_heads, g->head_dim);
    return false;
}

#define CHECKOUTS "tools/model"

/* The checkout's model, if this is the folder of one; or what is installed beside the program. */
static const char *default_folder(char *folder, size_t bytes)
{
    char program[PATH_MAX];
    const ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    if (access(CHECKOUTS "/config.json", R_OK) == 0 || length < 0)
        return CHECKOUTS;
    program[length] = '\0';
    for (int up = 0; up < 2; up++) /* of bin/ts-generate */
        if (strrchr(program, '/') != NULL)
            *strrchr(program, '/') = '\0';
    snprintf(folder, bytes, "%s/share/tinyserve/model", program);
    return access(folder, X_OK) == 0 ? folder : CHECKOUTS;
}

int main(int argc, char **argv)
{
    char folder[PATH_MAX + 32];
    options o = {.pool = "tiny", .folder = default_folder(folder, sizeof folder), .tokens = 192};
    argp_err_exit_status = 2;
    ts_output_begin();
    argp_parse(&argp, argc, argv, 0, NULL, &o);
    char why[512];
    job j = {0};
    ts_client *client = NULL;
    ts_pool *pool = NULL;
    int code = EXIT_FAILURE;
    model *m = model_load(o.folder, why, sizeof why);
    if (m == NULL)
        return fail(o.folder, why);
    if (!prepare(&o, m, &j))
        goto out;
    ts_status status = ts_connect(&(ts_options){.size = sizeof(ts_options),
                                                .url = o.socket,
                                                .wait_ms = o.wait_ms,
                                                .transport = o.transport,
                                                .exec = o.exec},
                                  &client);
    if (status == TS_OK)
        status =
            ts_pool_open(client, o.pool, o.exec != TS_EXEC_DAEMON ? TS_POOL_WRITABLE : 0, &pool);
    if (status == TS_OK && !fits(m, ts_pool_geometry(pool, 0)))
        goto out;
    if (status == TS_OK && o.keep != NULL)
        status = check_name(pool, o.keep);
    if (status == TS_OK)
        status = generate(&o, m, pool, &j);
    if (status != TS_OK) {
        fail(ts_status_name(status), ts_error(client));
        goto out;
    }
    report(&j, client);
    code = EXIT_SUCCESS;
    if (j.reference != NULL) {
        bool same = j.wrong == 0 && j.worst_logit <= LOGITS_TOLERANCE;
        fprintf(stderr, "%s: %u of %u bytes differ from the reference, logits by %.1e at most\n",
                same ? "verified" : "WRONG", j.wrong, j.total - j.prompt, (double)j.worst_logit);
        code = same ? EXIT_SUCCESS : EXIT_FAILURE;
    }
out:
    ts_pool_close(pool);
    ts_disconnect(client);
    json_decref(j.reference);
    free(j.tokens);
    free(j.ids);
    free(j.logits);
    model_free(m);
    return code;
}
