/* The host kernels over caches that no processor cache holds, beside a plain read of the same
 * memory by the same threads. */
#define _GNU_SOURCE
#include "attention.h"
#include "convert.h"
#include "memory.h"
#include "shape.h"
#include "tsbench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REPEATS 9
#define CHUNKS 64u
#define BLOCK_TOKENS 16u
#define FILLINGS (sizeof fillings / sizeof *fillings)

/* Without --shape, as many sequences of each as fill the cache. */
static const struct filling {
    const char *tokens, *rest; /* NULL: one sequence has all */
} fillings[] = {
    {"2048", "32/32/64 fp32"},     {"4096", "32/8/128 fp32"},     {"2048", "32/32/128 bf16"},
    {"4096", "32/8/128 bf16"},     {"4096", "32/8/128 bf16 hnd"}, {"4096", "32/8/128 fp16"},
    {"4096", "32/8/128 fp8_e4m3"}, {NULL, "32/8/128 bf16"},
};

static size_t cache_bytes(const bench_options *o)
{
    return (size_t)(o->gib * (1u << 30)) / (1u << 20) * (1u << 20);
}

typedef struct memory {
    unsigned char *bytes;
    size_t size;
    uint64_t sums[CHUNKS];
} memory;

typedef uint64_t words __attribute__((vector_size(64), aligned(8)));

/* The sum of `bytes` (a multiple of 256) at `at`, by the widest loads that this processor has: the
 * rate of plain reading. */
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static uint64_t
read_bytes(const unsigned char *at, size_t bytes)
{
    words a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < bytes; i += 256) {
        const words *w = (const words *)(const void *)(at + i);
        a += w[0];
        b += w[1];
        c += w[2];
        d += w[3];
    }
    a += b + c + d;
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

static void read_chunk(void *arg, uint32_t chunk, uint32_t thread)
{
    (void)thread;
    memory *m = arg;
    size_t bytes = m->size / CHUNKS / 256 * 256;
    m->sums[chunk] = read_bytes(m->bytes + chunk * bytes, bytes);
}

/* Finite values of the type in every element: small numbers of either sign. */
static void fill(memory *m, ts_dtype dtype)
{
    uint64_t x = 88172645463325252u;
    float row[1024];
    const size_t count = sizeof row / sizeof *row, bytes = count * ts_dtype_bytes(dtype);
    for (size_t at = 0; at + bytes <= m->size; at += bytes) {
        for (size_t i = 0; i < count; i++) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            row[i] = (float)(int32_t)x * 0x1p-31f;
        }
        ts_store_elements(m->bytes + at, dtype, 0, (uint32_t)count, row);
    }
}

/* ||out - reference|| / ||reference|| of the sequence's last query tokens. */
static double error_of(const ts_attention_call *call, const ts_attention_seq *seq)
{
    const size_t row = (size_t)call->heads * call->geometry.head_dim;
    const uint32_t rows = seq->q_tokens < 4 ? seq->q_tokens : 4, skip = seq->q_tokens - rows;
    const float *out = (const float *)seq->out + skip * row;
    double *ref = malloc(rows * row * sizeof *ref), diff = 0, norm = 0;
    ts_attention_seq last = *seq;
    last.q_tokens = rows;
    last.q = (const float *)seq->q + skip * row;
    if (ref == NULL || ts_attention_reference(call, &last, ref, NULL) != TS_OK) {
        free(ref);
        return NAN;
    }
    for (size_t i = 0; i < rows * row; i++) {
        double d = out[i] - ref[i];
        diff += d * d;
        norm += ref[i] * ref[i];
    }
    free(ref);
    return sqrt(diff / norm);
}

typedef struct setup {
    ts_attention_call call;
    ts_attention_seq *seqs;
    uint32_t *order, *tables; /* the cache's blocks; each sequence's, one after the other */
    float *q, *out;
    size_t kv_bytes; /* that attending reads, shared ones once */
} setup;

static uint32_t blocks_of(uint32_t tokens)
{
    return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

/* What the shape's sequences take: blocks of the cache, entries of all tables, query rows. */
static void add_up(const bench_shape *s, size_t *blocks, size_t *entries, size_t *rows,
                   uint32_t *num_seqs)
{
    *blocks = *entries = *rows = 0;
    *num_seqs = 0;
    for (uint32_t g = 0; g < s->num_groups; g++)
        for (uint32_t i = 0; i < s->groups[g].count; i++) {
            const uint32_t tokens = bench_group_tokens(&s->groups[g], i);
            *entries += blocks_of(tokens);
            *blocks += blocks_of(tokens) - (i > 0 ? s->shared / BLOCK_TOKENS : 0);
            *rows += s->new_tokens == 0 ? tokens : s->new_tokens;
            ++*num_seqs;
        }
}

static ts_geometry geometry_of(const bench_shape *s)
{
    return (ts_geometry){.layers = 1,
                         .kv_heads = s->kv_heads,
                         .head_dim = s->head_dim,
                         .block_tokens = BLOCK_TOKENS,
                         .dtype = s->dtype,
                         .layout = s->layout};
}

/* Blocks of a sequence lie anywhere. */
static void shuffle(uint32_t *order, size_t count)
{
    uint64_t x = 1;
    for (size_t i = 0; i < count; i++)
        order[i] = (uint32_t)i;
    for (size_t i = count; i-- > 1;) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        size_t j = (x >> 33) % (i + 1);
        uint32_t t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
}

static bool prepare(setup *u, const bench_shape *s, const memory *m)
{
    const size_t row = (size_t)s->heads * s->head_dim;
    size_t blocks, entries, rows;
    uint32_t n;
    add_up(s, &blocks, &entries, &rows, &n);
    *u = (setup){.seqs = calloc(n, sizeof *u->seqs),
                 .order = malloc(blocks * sizeof *u->order),
                 .tables = malloc(entries * sizeof *u->tables),
                 .q = malloc(rows * row * sizeof *u->q),
                 .out = malloc(rows * row * sizeof *u->out)};
    if (u->seqs == NULL || u->order == NULL || u->tables == NULL || u->q == NULL || u->out == NULL)
        return false;
    shuffle(u->order, blocks);
    for (size_t i = 0; i < rows * row; i++)
        u->q[i] = (float)((i * 2654435761u >> 16) % 2000) * 1e-3f - 1.0f;
    memset(u->out, 0xff, rows * row * sizeof *u->out);
    uint32_t *table = u->tables, *next = u->order, seq = 0;
    size_t first = 0;
    for (uint32_t g = 0; g < s->num_groups; g++) {
        const uint32_t *shared_with = table;
        for (uint32_t i = 0; i < s->groups[g].count; i++) {
            const uint32_t tokens = bench_group_tokens(&s->groups[g], i);
            const uint32_t shared = i > 0 ? s->shared / BLOCK_TOKENS : 0;
            const uint32_t own = blocks_of(tokens) - shared;
            const uint32_t q_tokens = s->new_tokens == 0 ? tokens : s->new_tokens;
            memcpy(table, shared_with, shared * sizeof *table);
            memcpy(table + shared, next, own * sizeof *table);
            u->seqs[seq++] = (ts_attention_seq){.blocks = table,
                                                .kv_tokens = tokens,
                                                .q_tokens = q_tokens,
                                                .q = u->q + first * row,
                                                .out = u->out + first * row};
            table += shared + own;
            next += own;
            first += q_tokens;
        }
    }
    u->call = (ts_attention_call){.geometry = geometry_of(s),
                                  .base = m->bytes,
                                  .heads = s->heads,
                                  .variant.scale = 1.0f / sqrtf((float)s->head_dim),
                                  .seqs = u->seqs,
                                  .num_seqs = n};
    /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): it is all in *u */
    u->kv_bytes = blocks * ts_geometry_block_bytes(&u->call.geometry);
    return true;
}

static void release(setup *u)
{
    free(u->seqs);
    free(u->order);
    free(u->tables);
    free(u->q);
    free(u->out);
}

static int measure(const bench_options *o, const bench_shape *s, memory *m, ts_threads *threads,
                   ts_attention *a, json_t *rows)
{
    setup u;
    double read[REPEATS], attend[REPEATS];
    if (!prepare(&u, s, m) || ts_attention_run(a, &u.call) != TS_OK) {
        fprintf(stderr, "tsbench: no memory\n");
        release(&u);
        return 1;
    }
    double error = error_of(&u.call, &u.seqs[u.call.num_seqs / 2]);
    if (!(error <= 1e-5)) {
        fprintf(stderr, "tsbench: the result is wrong (relative error %g): nothing was measured\n",
                error);
        release(&u);
        return 1;
    }
    for (int i = 0; i < REPEATS; i++) { /* by turns: what the machine does beside hits both */
        double t = bench_now();
        ts_threads_run(threads, CHUNKS, read_chunk, m);
        read[i] = bench_now() - t;
        t = bench_now();
        (void)ts_attention_run(a, &u.call);
        attend[i] = bench_now() - t;
    }
    /* NOLINTNEXTLINE(bugprone-integer-division): what is read of each chunk */
    double read_rate = (double)(m->size / CHUNKS / 256 * 256 * CHUNKS) * 1e-9 /
                       bench_percentile(read, REPEATS, 50);
    double ms = bench_percentile(attend, REPEATS, 50) * 1e3;
    double rate = (double)u.kv_bytes * 1e-6 / ms;
    double slow = (double)u.kv_bytes * 1e-9 / attend[REPEATS - 1];
    if (!o->json)
        printf("%-40s %9.3f %8.1f %8.1f %8.1f %8.2f %9.1e\n", s->name, ms, read_rate, rate, slow,
               rate / read_rate, error);
    json_array_append_new(
        rows, json_pack("{s:s, s:s, s:i, s:f, s:f, s:f, s:f, s:f, s:f}", "shape", s->name, "kernel",
                        ts_isa_name(ts_attention_isa(a)), "threads", ts_attention_threads(a), "ms",
                        ms, "read_GB_s", read_rate, "attend_GB_s", rate, "attend_slowest_GB_s",
                        slow, "ratio", rate / read_rate, "relative_error", error));
    release(&u);
    return 0;
}

/* As many sequences as fill `bytes` of cache. */
static bool fill_cache(const struct filling *f, size_t bytes, bench_shape *out, char *why,
                       size_t why_bytes)
{
    char text[sizeof out->name];
    snprintf(text, sizeof text, "1 x 1, %s", f->rest);
    if (!bench_shape_parse(text, out, why, why_bytes))
        return false;
    const ts_geometry g = geometry_of(out);
    const size_t tokens = bytes / ts_geometry_block_bytes(&g) * BLOCK_TOKENS;
    const size_t each = f->tokens == NULL ? tokens : strtoul(f->tokens, NULL, 10);
    snprintf(text, sizeof text, "%zu x %zu, %s", tokens / each, each, f->rest);
    return bench_shape_parse(text, out, why, why_bytes);
}

/* The shapes to be measured; 0, and a sentence. */
static uint32_t choose_shapes(const bench_options *o, bench_shape *shapes, char *why,
                              size_t why_bytes)
{
    uint32_t count = 0;
    if (o->shape != NULL && bench_shape_is(o->shape))
        return bench_shape_parse(o->shape, &shapes[0], why, why_bytes) ? 1 : 0;
    for (size_t i = 0; i < FILLINGS; i++) {
        bench_shape *s = &shapes[count];
        if (!fill_cache(&fillings[i], cache_bytes(o), s, why, why_bytes))
            return 0;
        count += o->shape == NULL || strstr(s->name, o->shape) != NULL;
    }
    if (count == 0)
        snprintf(why, why_bytes,
                 "no shape has '%.80s' in its name; a shape is such as "
                 "'64 x 4096, 32/8/128 bf16'",
                 o->shape);
    return count;
}

/* The whole run, by a cache that all of the shapes fit into. */
static int measure_all(const bench_options *o, const bench_shape *shapes, uint32_t count,
                       json_t *rows, char *why, size_t why_bytes)
{
    memory m = {.size = cache_bytes(o)};
    for (uint32_t i = 0; i < count; i++) {
        const ts_geometry g = geometry_of(&shapes[i]);
        size_t blocks, entries, q_rows;
        uint32_t n;
        add_up(&shapes[i], &blocks, &entries, &q_rows, &n);
        const size_t bytes = blocks * ts_geometry_block_bytes(&g);
        m.size = bytes > m.size ? (bytes + 4095) / 4096 * 4096 : m.size;
    }
    ts_threads *threads = ts_threads_new(o->threads);
    ts_attention *a = ts_attention_new(o->threads, TS_ISA_AUTO);
    ts_memory *slab = NULL; /* as a pool has it */
    int code = 1;
    if (threads == NULL || a == NULL)
        snprintf(why, why_bytes, "no memory or threads");
    else if (ts_memory_host_new(1, m.size, &slab, why, why_bytes) == TS_OK &&
             ts_memory_renew(slab, 0, why, why_bytes) == TS_OK) {
        m.bytes = slab->base;
        code = 0;
        if (!o->json)
            printf(
                "%u threads, %s, %.2f GiB of cache, blocks of %u in random order; medians of %d; "
                "rates in GB/s\n%-40s %9s %8s %8s %8s %8s %9s\n",
                ts_attention_threads(a), ts_isa_name(ts_attention_isa(a)),
                (double)m.size / (1u << 30), BLOCK_TOKENS, REPEATS, "", "ms", "read", "attend",
                "slowest", "ratio", "error");
    }
    for (uint32_t i = 0; code == 0 && i < count; i++) {
        if (i == 0 || shapes[i].dtype != shapes[i - 1].dtype)
            fill(&m, shapes[i].dtype);
        code = measure(o, &shapes[i], &m, threads, a, rows);
    }
    ts_memory_free(slab);
    ts_attention_free(a);
    ts_threads_free(threads);
    return code;
}

int bench_attend(const bench_options *o, json_t *rows)
{
    if (o->on_gpu) {
#ifdef TS_HAVE_CUDA
        return bench_attend_gpu(o, rows);
#else
        fprintf(stderr, "tsbench: --device cuda:%u: built without CUDA\n", o->ordinal);
        return 1;
#endif
    }
    bench_shape shapes[FILLINGS];
    char why[256] = "";
    const uint32_t count = choose_shapes(o, shapes, why, sizeof why);
    const int code = count == 0 ? 1 : measure_all(o, shapes, count, rows, why, sizeof why);
    if (code != 0 && why[0] != '\0')
        fprintf(stderr, "tsbench: %s\n", why);
    return code;
}
