#include "plan.h"

#include "dtypes.h"
#include "model_config.h"
#include "plain_text.h"
#include "tsctl.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    OPT_MODEL = 512,
    OPT_MEMORY,
    OPT_TOKENS,
    OPT_SHARED,
    OPT_GPUS,
    OPT_SPLIT,
    OPT_DTYPE,
    OPT_BLOCK
};

static const struct argp_option argp_options[] = {
    {0, 0, NULL, 0, "Of plan:", 1},
    {"model", OPT_MODEL, "FILE", 0, "The model's config.json, or its folder", 1},
    {"memory", OPT_MEMORY, "SIZE", 0, "The pool's memory on one GPU, as in 60G", 1},
    {"tokens", OPT_TOKENS, "N", 0, "Tokens of a sequence", 1},
    {"shared", OPT_SHARED, "N", 0, "The first N of them are the same in all (default 0)", 1},
    {"gpus", OPT_GPUS, "N", 0, "GPUs of the node (default 1)", 1},
    {"tensor-parallel", OPT_SPLIT, "N", 0, "GPUs that share one model's heads (default 1)", 1},
    {"dtype", OPT_DTYPE, "TYPE", 0, "fp32, fp16, bf16 or fp8_e4m3 (default: the model's)", 1},
    {"block-tokens", OPT_BLOCK, "N", 0, "Tokens of a block (default: what fits best)", 1},
    {0},
};

static const uint32_t lengths[] = {8, 16, 32, 64, 128}; /* of blocks, that are shown */
enum { LENGTHS = sizeof lengths / sizeof *lengths };

#define NAME_LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
#define SEQUENCE_TOKENS_PRESET 1048576u /* of the key sequence_tokens */
#define SEQUENCE_TOKENS_MAX (1u << 30)
#define BLOCKS_MAX INT32_MAX

/* What a pool of one block length holds. */
typedef struct pool_plan {
    ts_geometry geometry;
    uint64_t block_bytes, padding_bytes; /* of a block */
    uint64_t blocks;                     /* of the pool */
    uint64_t sequence_blocks;            /* of one sequence, shared ones included */
    uint64_t shared_blocks;              /* that all have in common */
    uint64_t sequences;
} pool_plan;

static const char size_suffixes[] = "KMGT"; /* each is 1024 of the one before */

/* A whole number, with a suffix of sizes if `size`; complains as argp does. */
static uint64_t read_number(const char *name, const char *arg, bool size, uint64_t least,
                            uint64_t most, struct argp_state *state)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(arg, &end, 10);
    const char *suffix = *end == '\0' || !size ? NULL : strchr(size_suffixes, *end);
    const unsigned shift = suffix == NULL ? 0 : 10 * (unsigned)(suffix - size_suffixes + 1);
    if (suffix != NULL)
        end++;
    if (errno != 0 || arg[0] < '0' || arg[0] > '9' || *end != '\0' || n > UINT64_MAX >> shift ||
        n << shift < least || n << shift > most)
        argp_error(state, "--%s %s: a whole number of %llu to %llu%s is needed", name, arg,
                   (unsigned long long)least, (unsigned long long)most,
                   size ? ", or with K, M, G or T behind it," : "");
    return n << shift;
}

TS_KNOWS_DTYPES(4); /* in the help and in the completion, too */
static int read_dtype(const char *arg, struct argp_state *state)
{
    for (int i = 0; ts_dtype_name((ts_dtype)i) != NULL; i++)
        if (strcmp(ts_dtype_name((ts_dtype)i), arg) == 0)
            return i;
    argp_error(state, "--dtype %s: known are fp32, fp16, bf16 and fp8_e4m3", arg);
    return -1;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    plan_options *p = state->input;
    switch (key) {
    case OPT_MODEL:
        p->model = arg;
        break;
    case OPT_MEMORY:
        p->memory = read_number("memory", arg, true, 1, 1ull << 50, state);
        break;
    case OPT_TOKENS:
        p->tokens = read_number("tokens", arg, false, 1, SEQUENCE_TOKENS_MAX, state);
        break;
    case OPT_SHARED:
        p->shared = read_number("shared", arg, false, 0, SEQUENCE_TOKENS_MAX, state);
        break;
    case OPT_GPUS:
        p->gpus = read_number("gpus", arg, false, 1, 64, state);
        break;
    case OPT_SPLIT:
        p->split = read_number("tensor-parallel", arg, false, 1, 64, state);
        break;
    case OPT_DTYPE:
        p->dtype = read_dtype(arg, state);
        break;
    case OPT_BLOCK:
        p->block_tokens = read_number("block-tokens", arg, false, 1, TS_BLOCK_TOKENS_MAX, state);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    p->given = true;
    return 0;
}

const struct argp plan_argp = {.options = argp_options, .parser = parse};

/* What one GPU's pool holds, with blocks of `block_tokens` tokens. */
static pool_plan work_out(const plan_options *o, const ts_geometry *model, uint32_t block_tokens)
{
    pool_plan p = {.geometry = *model};
    p.geometry.block_tokens = block_tokens;
    p.block_bytes = ts_geometry_block_bytes(&p.geometry);
    p.padding_bytes = p.block_bytes - ts_geometry_plane_bytes(&p.geometry) * 2 * model->layers;
    p.blocks = o->memory / p.block_bytes;
    p.sequence_blocks = (o->tokens + block_tokens - 1) / block_tokens;
    p.shared_blocks = o->shared / block_tokens; /* full ones alone are found again */
    if (p.shared_blocks == p.sequence_blocks)
        p.shared_blocks--; /* the last token is computed by each */
    const uint64_t own = p.sequence_blocks - p.shared_blocks;
    p.sequences = p.blocks > p.shared_blocks ? (p.blocks - p.shared_blocks) / own : 0;
    return p;
}

/* 16 tokens are what kernels are measured with. Where sequences are so short that their last blocks
 * waste more than a twentieth of the sequences, 8; where they take more blocks than a sequence may
 * have, more. */
static pool_plan recommend(const plan_options *o, const ts_geometry *model)
{
    if (o->block_tokens != 0)
        return work_out(o, model, (uint32_t)o->block_tokens);
    pool_plan usual = work_out(o, model, 16);
    const pool_plan half = work_out(o, model, 8);
    while (usual.sequence_blocks > TS_COMMAND_ENTRIES &&
           usual.geometry.block_tokens < TS_BLOCK_TOKENS_MAX)
        usual = work_out(o, model, usual.geometry.block_tokens * 2);
    return half.sequence_blocks <= TS_COMMAND_ENTRIES && half.sequences * 19 > usual.sequences * 20
               ? half
               : usual;
}

/* The part of the heads that one GPU has; false, and a sentence is printed: it has none. */
static bool split_heads(uint64_t gpus, uint64_t split, ts_geometry *g)
{
    if (gpus % split != 0) {
        fprintf(stderr, "tsctl: %llu GPUs can't be shared by models that take %llu each\n",
                (unsigned long long)gpus, (unsigned long long)split);
        return false;
    }
    if (g->kv_heads % split != 0 && split % g->kv_heads != 0) {
        fprintf(stderr, "tsctl: %u KV heads can't be shared by %llu GPUs\n", g->kv_heads,
                (unsigned long long)split);
        return false;
    }
    g->kv_heads = g->kv_heads > split ? g->kv_heads / (uint32_t)split : 1;
    return true;
}

static void print_stanza(const plan_options *o, const model_config *m, const pool_plan *p)
{
    const ts_geometry *g = &p->geometry;
    const bool plain = m->type[0] != '\0' && m->type[strspn(m->type, NAME_LETTERS)] == '\0';
    uint64_t size = o->memory;
    char unit[2] = "";
    for (const char *suffix = size_suffixes; *suffix != '\0' && size % 1024 == 0; suffix++) {
        size /= 1024;
        unit[0] = *suffix;
    }
    printf("\n[pool %s]\nlayers = %u\nkv_heads = %u\nhead_dim = %u\ndtype = %s\n"
           "block_tokens = %u\nmemory = %llu%s\n",
           plain ? m->type : "model", g->layers, g->kv_heads, g->head_dim, ts_dtype_name(g->dtype),
           g->block_tokens, (unsigned long long)size, unit);
    if (o->tokens > SEQUENCE_TOKENS_PRESET)
        printf("sequence_tokens = %llu\n", (unsigned long long)o->tokens);
}

static void print_notes(const plan_options *o, const model_config *m)
{
    if (!m->dtype_given && o->dtype < 0)
        puts("note         the file says no type; bf16 is assumed (--dtype)");
    if (m->positions != 0 && o->tokens > m->positions)
        printf("note         the model was made for %llu tokens at most\n",
               (unsigned long long)m->positions);
    if (m->window != 0 && o->tokens > m->window)
        printf("note         layers with a window of %llu tokens keep all tokens, too\n",
               (unsigned long long)m->window);
    if (m->sharing != 0)
        printf("note         %llu layers use K and V of earlier ones; an engine that stores none\n"
               "             for them needs a pool of fewer layers\n",
               (unsigned long long)m->sharing);
}

static void print_text(const plan_options *o, const model_config *m, const pool_plan *p)
{
    const ts_geometry *g = &p->geometry;
    const uint64_t models = o->gpus / o->split;
    char a[32], b[32];
    printf("model        %s: %u layers, %u KV heads of %u%s, %s\n",
           m->architecture[0] != '\0' ? m->architecture : m->type, g->layers, g->kv_heads,
           g->head_dim, o->split > 1 ? " on each GPU" : "", ts_dtype_name(g->dtype));
    printf(
        "a token      %s\n",
        ts_text_bytes(ts_geometry_plane_bytes(g) * 2 * g->layers / g->block_tokens, a, sizeof a));
    printf("a sequence   %llu tokens: %llu blocks of %u, %s", (unsigned long long)o->tokens,
           (unsigned long long)p->sequence_blocks, g->block_tokens,
           ts_text_bytes(p->sequence_blocks * p->block_bytes, a, sizeof a));
    if (p->shared_blocks > 0)
        printf("; %llu of the blocks are shared", (unsigned long long)p->shared_blocks);
    printf("\na pool       %s: %llu blocks of %s\n", ts_text_bytes(o->memory, a, sizeof a),
           (unsigned long long)p->blocks, ts_text_bytes(p->block_bytes, b, sizeof b));
    printf("             %llu sequence%s\n", (unsigned long long)p->sequences,
           p->sequences == 1 ? "" : "s");
    if (o->gpus > 1)
        printf("the node     %llu GPUs, a daemon and a pool on each: %llu sequences\n",
               (unsigned long long)o->gpus, (unsigned long long)(models * p->sequences));
    print_notes(o, m);
    puts("\nBLOCK OF        BYTES  PADDING     BLOCKS  SEQUENCES");
    for (int i = 0; i < LENGTHS; i++) {
        const pool_plan other = work_out(o, &m->geometry, lengths[i]);
        printf("%3u tokens %10s %7.1f%% %10llu %10llu%s\n", lengths[i],
               ts_text_bytes(other.block_bytes, a, sizeof a),
               100.0 * (double)other.padding_bytes / (double)other.block_bytes,
               (unsigned long long)other.blocks, (unsigned long long)other.sequences,
               lengths[i] == g->block_tokens ? " <" : "");
    }
    print_stanza(o, m, p);
}

static void print_json(const plan_options *o, const model_config *m, const pool_plan *p)
{
    const ts_geometry *g = &p->geometry;
    const uint64_t node = o->gpus / o->split * p->sequences;
    json_t *choices = json_array();
    for (int i = 0; i < LENGTHS; i++) {
        const pool_plan other = work_out(o, &m->geometry, lengths[i]);
        json_array_append_new(
            choices, json_pack("{s:I, s:I, s:I, s:I, s:I}", "block_tokens", (json_int_t)lengths[i],
                               "block_bytes", (json_int_t)other.block_bytes, "padding_bytes",
                               (json_int_t)other.padding_bytes, "blocks", (json_int_t)other.blocks,
                               "sequences", (json_int_t)other.sequences));
    }
    json_t *all =
        json_pack("{s:s, s:i, s:i, s:i, s:s, s:i, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o}",
                  "architecture", m->architecture, "layers", (int)g->layers, "kv_heads",
                  (int)g->kv_heads, "head_dim", (int)g->head_dim, "dtype", ts_dtype_name(g->dtype),
                  "block_tokens", (int)g->block_tokens, "block_bytes", (json_int_t)p->block_bytes,
                  "memory", (json_int_t)o->memory, "tokens", (json_int_t)o->tokens, "blocks",
                  (json_int_t)p->blocks, "sequence_blocks", (json_int_t)p->sequence_blocks,
                  "shared_blocks", (json_int_t)p->shared_blocks, "sequences",
                  (json_int_t)p->sequences, "node_sequences", (json_int_t)node, "choices", choices);
    json_dumpf(all, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(all);
}

int plan_run(const plan_options *given, bool json)
{
    plan_options o = *given;
    model_config m;
    char why[512], least[32];
    o.gpus = o.gpus == 0 ? o.split == 0 ? 1 : o.split : o.gpus;
    o.split = o.split == 0 ? 1 : o.split;
    if (o.model == NULL || o.memory == 0 || o.tokens == 0) {
        fputs("tsctl: plan needs --model FILE, --memory SIZE and --tokens N\n", stderr);
        return EXIT_USAGE;
    }
    if (o.shared > o.tokens) {
        fprintf(stderr, "tsctl: --shared %llu is more than --tokens %llu\n",
                (unsigned long long)o.shared, (unsigned long long)o.tokens);
        return EXIT_USAGE;
    }
    if (model_config_read(o.model, &m, why, sizeof why) != TS_OK) {
        fprintf(stderr, "tsctl: %s\n", why);
        return EXIT_REFUSED;
    }
    if (o.dtype >= 0)
        m.geometry.dtype = (ts_dtype)o.dtype;
    if (!split_heads(o.gpus, o.split, &m.geometry))
        return EXIT_USAGE;
    const pool_plan p = recommend(&o, &m.geometry);
    if (p.blocks > BLOCKS_MAX) {
        fprintf(stderr, "tsctl: --memory makes %llu blocks of %u tokens; a pool has %d at most\n",
                (unsigned long long)p.blocks, p.geometry.block_tokens, BLOCKS_MAX);
        return EXIT_REFUSED;
    }
    if (p.sequence_blocks > TS_COMMAND_ENTRIES) {
        fprintf(stderr, "tsctl: --tokens %llu makes %llu blocks of %u; a sequence has %u at most\n",
                (unsigned long long)o.tokens, (unsigned long long)p.sequence_blocks,
                p.geometry.block_tokens, TS_COMMAND_ENTRIES);
        return EXIT_REFUSED;
    }
    if (p.sequences == 0) {
        fprintf(stderr, "tsctl: not one sequence of %llu tokens fits: it takes %s\n",
                (unsigned long long)o.tokens,
                ts_text_bytes(p.sequence_blocks * p.block_bytes, least, sizeof least));
        return EXIT_REFUSED;
    }
    (json ? print_json : print_text)(&o, &m, &p);
    return EXIT_SUCCESS;
}
