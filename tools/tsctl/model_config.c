#define _GNU_SOURCE
#include "model_config.h"

#include "dtypes.h"
#include "plain_text.h"

#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/* A file on its way into a model; the first problem is told. */
typedef struct reading {
    const json_t *text; /* the part that is about the text model */
    const char *path;
    char *why;
    size_t why_bytes;
    bool failed;
} reading;

__attribute__((format(printf, 2, 3))) static void refuse(reading *r, const char *format, ...)
{
    va_list args;
    if (r->failed)
        return;
    r->failed = true;
    int length = snprintf(r->why, r->why_bytes, "%s: ", r->path);
    if (length < 0 || (size_t)length >= r->why_bytes)
        return;
    va_start(args, format);
    vsnprintf(r->why + length, r->why_bytes - (size_t)length, format, args);
    va_end(args);
}

/* NULL: it isn't there, or null. */
static const json_t *get(const reading *r, const char *key)
{
    const json_t *value = json_object_get(r->text, key);
    return json_is_null(value) ? NULL : value;
}

/* The first of these keys that is there, in *key; 0: none is. */
static uint64_t number(reading *r, const char *const *keys, const char **key)
{
    for (*key = *keys; *keys != NULL; keys++) {
        const json_t *value = get(r, *keys);
        if (value == NULL)
            continue;
        *key = *keys;
        if (json_is_array(value))
            refuse(r, "%s differs from layer to layer; a pool's layers are alike", *keys);
        else if (!json_is_integer(value) || json_integer_value(value) < 1 ||
                 json_integer_value(value) > UINT32_MAX)
            refuse(r, "%s is not a whole number of 1 to %u", *keys, UINT32_MAX);
        else
            return (uint64_t)json_integer_value(value);
        return 0;
    }
    return 0;
}

#define NUMBER(r, key, ...) number(r, (const char *const[]){__VA_ARGS__, NULL}, key)

/* The same of what is only told: 0 for anything that isn't a number above it. */
static uint64_t fact(const reading *r, const char *key)
{
    const json_int_t value = json_integer_value(get(r, key));
    return value > 0 ? (uint64_t)value : 0;
}

static void text_of(const json_t *value, char *to, size_t bytes)
{
    to[0] = '\0';
    if (json_is_string(value))
        ts_text_escape(json_string_value(value), to, bytes);
}

/* Layers that keep something other than K and V of equal heads. */
static void check_layers(reading *r)
{
    static const struct {
        const char *key, *why;
    } others[] = {
        {"kv_lora_rank", "its attention stores a latent row instead of K and V for each head"},
        {"layers_block_type", "some of its layers keep a state instead of K and V"},
        {"hybrid_override_pattern", "some of its layers keep a state instead of K and V"},
        {"attn_layer_period", "some of its layers keep a state instead of K and V"},
        {"full_attention_interval", "some of its layers keep a state instead of K and V"},
        {"ssm_cfg", "its layers keep a state instead of K and V"},
        {"block_configs", "its layers differ from each other; a pool's layers are alike"},
    };
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (get(r, others[i].key) != NULL)
            refuse(r, "no pool can hold this model's cache: %s (%s)", others[i].why, others[i].key);
    if (json_is_true(get(r, "is_encoder_decoder")))
        refuse(r, "no pool can hold this model's cache: it has an encoder, too "
                  "(is_encoder_decoder)");
    size_t layer;
    const json_t *type;
    json_array_foreach(get(r, "layer_types"), layer, type)
    {
        char name[64];
        text_of(type, name, sizeof name);
        if (strcmp(name, "full_attention") != 0 && strcmp(name, "sliding_attention") != 0 &&
            strcmp(name, "chunked_attention") != 0 && strcmp(name, "attention") != 0)
            refuse(r,
                   "no pool can hold this model's cache: layer %zu is '%s', which keeps no K and V",
                   layer, name);
    }
}

/* What must be as in other layers, if it is said at all. */
static void check_same(reading *r, const char *key, uint64_t other)
{
    const char *found;
    const uint64_t value = NUMBER(r, &found, key);
    if (value != 0 && value != other)
        refuse(r,
               "no pool can hold this model's cache: %s is %llu where other heads have %llu; a "
               "pool's are alike",
               key, (unsigned long long)value, (unsigned long long)other);
}

static uint64_t needed(reading *r, const char *key, uint64_t value)
{
    if (value == 0)
        refuse(r, "there is no %s: is it the config.json of a language model?", key);
    return value;
}

static void read_heads(reading *r, ts_geometry *g)
{
    const char *key;
    uint64_t layers = NUMBER(r, &key, "num_hidden_layers", "n_layer", "num_layers", "n_layers");
    g->layers = (uint32_t)needed(r, "num_hidden_layers", layers);
    uint64_t heads = NUMBER(r, &key, "num_attention_heads", "n_head", "n_heads");
    (void)needed(r, "num_attention_heads", heads);
    uint64_t kv = NUMBER(r, &key, "num_key_value_heads", "num_kv_heads", "n_head_kv");
    const bool one = json_is_true(get(r, "multi_query")) &&
                     !json_is_true(get(r, "new_decoder_architecture")); /* Falcon, GPTBigCode */
    g->kv_heads = (uint32_t)(one ? 1 : kv != 0 ? kv : heads);
    uint64_t dim = NUMBER(r, &key, "head_dim", "kv_channels");
    if (dim == 0) {
        uint64_t hidden = NUMBER(r, &key, "hidden_size", "n_embd", "d_model");
        (void)needed(r, "hidden_size", hidden);
        if (heads != 0 && hidden % heads != 0)
            refuse(r, "%s is %llu, which %llu heads can't share, and there is no head_dim", key,
                   (unsigned long long)hidden, (unsigned long long)heads);
        dim = heads == 0 ? 0 : hidden / heads;
    }
    g->head_dim = (uint32_t)dim;
    check_same(r, "v_head_dim", dim);
    check_same(r, "global_head_dim", dim);
    check_same(r, "num_global_key_value_heads", g->kv_heads);
}

TS_KNOWS_DTYPES(4);
static void read_dtype(reading *r, model_config *m)
{
    static const struct {
        const char *name;
        ts_dtype dtype;
    } types[] = {{"float32", TS_DTYPE_FP32},
                 {"float16", TS_DTYPE_FP16},
                 {"bfloat16", TS_DTYPE_BF16},
                 {"float8_e4m3fn", TS_DTYPE_FP8_E4M3}};
    char name[48];
    m->geometry.dtype = TS_DTYPE_BF16;
    text_of(get(r, "dtype") != NULL ? get(r, "dtype") : get(r, "torch_dtype"), name, sizeof name);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(name, types[i].name) == 0) {
            m->geometry.dtype = types[i].dtype;
            m->dtype_given = true;
        }
}

static void read_model(reading *r, const json_t *all, model_config *m)
{
    static const char *const parts[] = {"text_config", "language_config", "llm_config"};
    char type[sizeof m->type * 2];
    text_of(json_array_get(json_object_get(all, "architectures"), 0), m->architecture,
            sizeof m->architecture);
    r->text = all;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) /* of a model that sees, too */
        if (json_is_object(json_object_get(all, parts[i])) && get(r, "num_hidden_layers") == NULL)
            r->text = json_object_get(all, parts[i]);
    text_of(json_object_get(all, "model_type"), type, sizeof type);
    snprintf(m->type, sizeof m->type, "%.*s", (int)sizeof m->type - 1, type);
    check_layers(r);
    read_heads(r, &m->geometry);
    read_dtype(r, m);
    if (!m->dtype_given) { /* beside a part, the type may be said for all */
        const json_t *part = r->text;
        r->text = all;
        read_dtype(r, m);
        r->text = part;
    }
    m->positions = fact(r, "max_position_embeddings");
    m->sharing = fact(r, "num_kv_shared_layers");
    if (!json_is_false(get(r, "use_sliding_window")))
        m->window = fact(r, "sliding_window");
}

ts_status model_config_read(const char *path, model_config *m, char *why, size_t why_bytes)
{
    char file[PATH_MAX];
    struct stat about;
    json_error_t error;
    *m = (model_config){0};
    const bool folder = stat(path, &about) == 0 && S_ISDIR(about.st_mode);
    if ((size_t)snprintf(file, sizeof file, "%s%s", path, folder ? "/config.json" : "") >=
            sizeof file ||
        stat(file, &about) != 0) {
        snprintf(why, why_bytes, "%s: %s", file, strerror(errno));
        return TS_ENOENT;
    }
    json_t *all = json_load_file(file, 0, &error);
    if (!json_is_object(all)) {
        json_decref(all);
        snprintf(why, why_bytes, "%s is no JSON object: %s in line %d", file,
                 all == NULL ? error.text : "another value", all == NULL ? error.line : 1);
        return TS_EINVAL;
    }
    reading r = {.path = file, .why = why, .why_bytes = why_bytes};
    read_model(&r, all, m);
    json_decref(all);
    if (!r.failed) {
        char problem[160];
        m->geometry.block_tokens = 16; /* to be checked with the rest */
        if (ts_geometry_check(&m->geometry, problem, sizeof problem) != TS_OK)
            refuse(&r, "no pool can hold this model's cache: %s", problem);
        m->geometry.block_tokens = 0;
    }
    return r.failed ? TS_EINVAL : TS_OK;
}
