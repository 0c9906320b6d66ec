#define _GNU_SOURCE
#include "model.h"

#include "unconst.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define LANES 4

typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

/* ---- loading ---- */

typedef struct file {
    const unsigned char *bytes;
    size_t size, data; /* where the tensors' bytes begin */
    json_t *header;
} file;

static float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, u = (uint32_t)(h & 0x7fffu) << 13;
    float scale = 0x1p112f, f; /* moves the exponent; exact, subnormals included */
    memcpy(&f, &u, sizeof f);
    f *= scale;
    memcpy(&u, &f, sizeof u);
    u |= sign;
    memcpy(&f, &u, sizeof f);
    return f;
}

static bool open_file(const char *folder, file *f, char *why, size_t why_bytes)
{
    char path[1024];
    struct stat st;
    uint64_t header_bytes;
    json_error_t error;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0) {
        snprintf(why, why_bytes, "%s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return false;
    }
    f->size = (size_t)st.st_size;
    void *bytes = mmap(NULL, f->size > 0 ? f->size : 1, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (bytes == MAP_FAILED) {
        snprintf(why, why_bytes, "%s: %s", path, strerror(errno));
        return false;
    }
    f->bytes = bytes;
    if (f->size < 8 || (memcpy(&header_bytes, bytes, 8), header_bytes > f->size - 8)) {
        snprintf(why, why_bytes, "%s: not a safetensors file of %zu bytes", path, f->size);
        return false;
    }
    f->data = 8 + header_bytes;
    f->header = json_loadb((const char *)bytes + 8, header_bytes, 0, &error);
    if (f->header == NULL)
        snprintf(why, why_bytes, "%s: its header: %s", path, error.text);
    return f->header != NULL;
}

/* The named tensor of rows x columns fp16 (columns 1 for a vector) as floats, or NULL. */
static float *tensor(const file *f, const char *name, size_t rows, size_t columns, char *why,
                     size_t why_bytes)
{
    json_t *t = json_object_get(f->header, name);
    json_t *shape = json_object_get(t, "shape"), *range = json_object_get(t, "data_offsets");
    const char *dtype = json_string_value(json_object_get(t, "dtype"));
    size_t dims = json_array_size(shape);
    size_t n0 = (size_t)json_integer_value(json_array_get(shape, 0));
    size_t n1 = dims == 2 ? (size_t)json_integer_value(json_array_get(shape, 1)) : 1;
    size_t from = (size_t)json_integer_value(json_array_get(range, 0));
    size_t to = (size_t)json_integer_value(json_array_get(range, 1));
    if (dtype == NULL || strcmp(dtype, "F16") != 0 || n0 != rows || n1 != columns || from > to ||
        to > f->size - f->data || to - from != rows * columns * 2) {
        snprintf(why, why_bytes,
                 "tensor %s: F16 of %zu x %zu is needed, the file has %s of %zu x %zu", name, rows,
                 columns, dtype == NULL ? "none" : dtype, n0, n1);
        return NULL;
    }
    float *out = malloc(rows * columns * sizeof *out);
    if (out == NULL) {
        snprintf(why, why_bytes, "no memory for tensor %s", name);
        return NULL;
    }
    const unsigned char *from_bytes = f->bytes + f->data + from;
    for (size_t i = 0; i < rows * columns; i++) {
        uint16_t h;
        memcpy(&h, from_bytes + 2 * i, sizeof h);
        out[i] = half_to_float(h);
    }
    return out;
}

static bool load_config(model *m, const char *folder, char *why, size_t why_bytes)
{
    char path[1024];
    json_error_t error;
    snprintf(path, sizeof path, "%s/config.json", folder);
    json_t *c = json_load_file(path, 0, &error);
    if (c == NULL) {
        snprintf(why, why_bytes, "%s: %s", path, error.text);
        return false;
    }
    const struct {
        const char *key;
        uint32_t *value;
    } numbers[] = {
        {"vocab_size", &m->vocab},
        {"hidden_size", &m->hidden},
        {"intermediate_size", &m->intermediate},
        {"num_hidden_layers", &m->layers},
        {"num_attention_heads", &m->heads},
        {"num_key_value_heads", &m->kv_heads},
        {"head_dim", &m->head_dim},
        {"max_position_embeddings", &m->positions},
    };
    bool ok = true;
    for (size_t i = 0; ok && i < sizeof numbers / sizeof *numbers; i++) {
        json_int_t n = json_integer_value(json_object_get(c, numbers[i].key));
        ok = n >= 1 && n <= 1 << 20;
        if (!ok)
            snprintf(why, why_bytes, "%s: %s is %lld; the limits are 1..1048576", path,
                     numbers[i].key, (long long)n);
        *numbers[i].value = (uint32_t)n;
    }
    if (ok && m->vocab != 256) {
        snprintf(why, why_bytes, "%s: vocab_size is %u; this program speaks bytes (256)", path,
                 m->vocab);
        ok = false;
    }
    if (ok && !json_is_true(json_object_get(c, "tie_word_embeddings"))) {
        snprintf(why, why_bytes, "%s: only models with tied embeddings can be loaded", path);
        ok = false;
    }
    m->bos = (int32_t)json_integer_value(json_object_get(c, "bos_token_id"));
    m->norm_eps = (float)json_number_value(json_object_get(c, "rms_norm_eps"));
    m->rope_theta = (float)json_number_value(json_object_get(c, "rope_theta"));
    json_decref(c);
    return ok;
}

static bool load_layer(model *m, const file *f, uint32_t i, char *why, size_t why_bytes)
{
    model_layer *l = &m->layer[i];
    size_t q = (size_t)m->heads * m->head_dim, kv = (size_t)m->kv_heads * m->head_dim;
    const struct {
        const char *name;
        float **to;
        size_t rows, columns;
    } tensors[] = {
        {"input_layernorm", &l->attention_norm, m->hidden, 1},
        {"post_attention_layernorm", &l->mlp_norm, m->hidden, 1},
        {"self_attn.q_proj", &l->q, q, m->hidden},
        {"self_attn.k_proj", &l->k, kv, m->hidden},
        {"self_attn.v_proj", &l->v, kv, m->hidden},
        {"self_attn.o_proj", &l->o, m->hidden, q},
        {"mlp.gate_proj", &l->gate, m->intermediate, m->hidden},
        {"mlp.up_proj", &l->up, m->intermediate, m->hidden},
        {"mlp.down_proj", &l->down, m->hidden, m->intermediate},
    };
    for (size_t t = 0; t < sizeof tensors / sizeof *tensors; t++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%u.%s.weight", i, tensors[t].name);
        *tensors[t].to = tensor(f, name, tensors[t].rows, tensors[t].columns, why, why_bytes);
        if (*tensors[t].to == NULL)
            return false;
    }
    return true;
}

model *model_load(const char *folder, char *why, size_t why_bytes)
{
    model *m = calloc(1, sizeof *m);
    file f = {0};
    if (m == NULL) {
        snprintf(why, why_bytes, "no memory for a model");
        return NULL;
    }
    bool ok = load_config(m, folder, why, why_bytes) && open_file(folder, &f, why, why_bytes);
    if (ok) {
        m->layer = calloc(m->layers, sizeof *m->layer);
        m->embeddings =
            tensor(&f, "model.embed_tokens.weight", m->vocab, m->hidden, why, why_bytes);
        m->final_norm = tensor(&f, "model.norm.weight", m->hidden, 1, why, why_bytes);
        ok = m->layer != NULL && m->embeddings != NULL && m->final_norm != NULL;
    }
    for (uint32_t i = 0; ok && i < m->layers; i++)
        ok = load_layer(m, &f, i, why, why_bytes);
    if (ok)
        m->digest = XXH3_64bits(f.bytes, f.size);
    json_decref(f.header);
    if (f.bytes != NULL)
        munmap(ts_unconst(f.bytes), f.size > 0 ? f.size : 1);
    if (!ok) {
        model_free(m);
        return NULL;
    }
    return m;
}

void model_free(model *m)
{
    if (m == NULL)
        return;
    for (uint32_t i = 0; m->layer != NULL && i < m->layers; i++) {
        model_layer *l = &m->layer[i];
        float *all[] = {l->attention_norm, l->mlp_norm, l->q,   l->k, l->v, l->o,
                        l->gate,           l->up,       l->down};
        for (size_t t = 0; t < sizeof all / sizeof *all; t++)
            free(all[t]);
    }
    free(m->layer);
    free(m->embeddings);
    free(m->final_norm);
    free(m);
}

/* ---- forward ---- */

static lanes load(const float *p)
{
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

static float sum(lanes v)
{
    float s = 0;
    for (int i = 0; i < LANES; i++)
        s += v[i];
    return s;
}

/* y[t][o] = sum over i of x[t][i] * w[o][i]; four tokens share each read of w. */
static void project(const float *x, const float *w, float *y, size_t tokens, size_t in, size_t out)
{
    for (size_t t = 0; t < tokens; t += 4) {
        size_t n = tokens - t < 4 ? tokens - t : 4;
        const float *rows[4];
        for (size_t j = 0; j < 4; j++)
            rows[j] = x + (t + (j < n ? j : n - 1)) * in;
        for (size_t o = 0; o < out; o++) {
            const float *row = w + o * in;
            lanes s[4][2] = {0};
            size_t i = 0;
            for (; i + 2 * LANES <= in; i += 2 * LANES)
                for (size_t j = 0; j < 4; j++) {
                    s[j][0] += load(row + i) * load(rows[j] + i);
                    s[j][1] += load(row + i + LANES) * load(rows[j] + i + LANES);
                }
            for (size_t j = 0; j < n; j++) {
                float total = sum(s[j][0] + s[j][1]);
                for (size_t k = i; k < in; k++)
                    total += row[k] * rows[j][k];
                y[(t + j) * out + o] = total;
            }
        }
    }
}

static void rms_norm(const float *x, const float *weight, float *y, size_t tokens, size_t n,
                     float eps)
{
    for (size_t t = 0; t < tokens; t++) {
        float square = 0;
        for (size_t i = 0; i < n; i++)
            square += x[t * n + i] * x[t * n + i];
        float scale = 1.0f / sqrtf(square / (float)n + eps);
        for (size_t i = 0; i < n; i++)
            y[t * n + i] = x[t * n + i] * scale * weight[i];
    }
}

static ts_status attention(const model *m, uint32_t layer, const float *x, ts_step *step, float *y)
{
    const model_layer *l = &m->layer[layer];
    size_t tokens = ts_step_tokens(step), q = (size_t)m->heads * m->head_dim;
    size_t kv = (size_t)m->kv_heads * m->head_dim;
    project(x, l->q, ts_step_q(step), tokens, m->hidden, q);
    project(x, l->k, ts_step_k(step), tokens, m->hidden, kv);
    project(x, l->v, ts_step_v(step), tokens, m->hidden, kv);
    const ts_run_options options = {.size = sizeof(ts_run_options), .rope_theta = m->rope_theta};
    ts_status status = ts_step_run_with(step, layer, &options);
    if (status == TS_OK)
        project(ts_step_out(step), l->o, y, tokens, q, m->hidden);
    return status;
}

static void mlp(const model *m, const model_layer *l, const float *x, float *gate, float *up,
                float *y, size_t tokens)
{
    project(x, l->gate, gate, tokens, m->hidden, m->intermediate);
    project(x, l->up, up, tokens, m->hidden, m->intermediate);
    for (size_t i = 0; i < tokens * m->intermediate; i++)
        gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    project(gate, l->down, y, tokens, m->intermediate, m->hidden);
}

ts_status model_forward(const model *m, const uint8_t *tokens, ts_step *step, float *logits)
{
    size_t n = ts_step_tokens(step), row = m->hidden;
    float *memory = malloc(n * (3 * row + 2 * (size_t)m->intermediate) * sizeof *memory);
    if (memory == NULL)
        return TS_ENOMEM;
    float *x = memory, *normed = x + n * row, *y = normed + n * row;
    float *gate = y + n * row, *up = gate + n * m->intermediate;
    for (size_t t = 0; t < n; t++)
        memcpy(x + t * row, m->embeddings + tokens[t] * row, row * sizeof *x);
    ts_status status = TS_OK;
    for (uint32_t i = 0; i < m->layers && status == TS_OK; i++) {
        const model_layer *l = &m->layer[i];
        rms_norm(x, l->attention_norm, normed, n, row, m->norm_eps);
        status = attention(m, i, normed, step, y);
        for (size_t j = 0; j < n * row; j++)
            x[j] += y[j];
        rms_norm(x, l->mlp_norm, normed, n, row, m->norm_eps);
        mlp(m, l, normed, gate, up, y, n);
        for (size_t j = 0; j < n * row; j++)
            x[j] += y[j];
    }
    if (status == TS_OK) {
        rms_norm(x + (n - 1) * row, m->final_norm, normed, 1, row, m->norm_eps);
        project(normed, m->embeddings, logits, 1, row, m->vocab);
    }
    free(memory);
    return status;
}
