/* The host kernels over caches that no processor cache holds, beside a plain read of the same
 * memory by the same threads. */
#define _GNU_SOURCE
#include "tsbench.h"

#include "attention.h"
#include "memory.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REPEATS 9
#define CHUNKS 64u

typedef struct shape {
    ts_dtype dtype;
    ts_layout layout;
    uint32_t heads, kv_heads, head_dim, tokens;
} shape;

static const shape shapes[] = {
    {TS_DTYPE_FP32, TS_LAYOUT_NHD, 32, 32, 64, 2048},
    {TS_DTYPE_FP32, TS_LAYOUT_NHD, 32, 8, 128, 4096},
    {TS_DTYPE_BF16, TS_LAYOUT_NHD, 32, 32, 128, 2048},
    {TS_DTYPE_BF16, TS_LAYOUT_NHD, 32, 8, 128, 4096},
    {TS_DTYPE_BF16, TS_LAYOUT_HND, 32, 8, 128, 4096},
    {TS_DTYPE_FP16, TS_LAYOUT_NHD, 32, 8, 128, 4096},
    {TS_DTYPE_FP8_E4M3, TS_LAYOUT_NHD, 32, 8, 128, 4096},
    {TS_DTYPE_BF16, TS_LAYOUT_NHD, 32, 8, 128, 0}, /* one sequence that fills the cache */
};

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

/* ||out - reference|| / ||reference|| of one sequence. */
static double error_of(const ts_attention_call *call, const ts_attention_seq *seq)
{
    size_t n = (size_t)call->heads * call->geometry.head_dim;
    double *ref = malloc(n * sizeof *ref), diff = 0, norm = 0;
    if (ref == NULL || ts_attention_reference(call, seq, ref, NULL) != TS_OK) {
        free(ref);
        return NAN;
    }
    for (size_t i = 0; i < n; i++) {
        double d = ((const float *)seq->out)[i] - ref[i];
        diff += d * d;
        norm += ref[i] * ref[i];
    }
    free(ref);
    return sqrt(diff / norm);
}

typedef struct setup {
    ts_attention_call call;
    ts_attention_seq *seqs;
    uint32_t *blocks;
    float *q, *out;
} setup;

static bool prepare(setup *u, const shape *s, const memory *m)
{
    ts_geometry g = {.layers = 1,
                     .kv_heads = s->kv_heads,
                     .head_dim = s->head_dim,
                     .block_tokens = 16,
                     .dtype = s->dtype,
                     .layout = s->layout};
    uint32_t all = (uint32_t)(m->size / ts_geometry_block_bytes(&g));
    uint32_t per_seq = s->tokens == 0 ? all : s->tokens / 16, n = all / per_seq;
    size_t row = (size_t)s->heads * s->head_dim;
    *u = (setup){.seqs = calloc(n, sizeof *u->seqs),
                 .blocks = malloc(all * sizeof *u->blocks),
                 .q = malloc(n * row * sizeof *u->q),
                 .out = malloc(n * row * sizeof *u->out)};
    if (n == 0 || u->seqs == NULL || u->blocks == NULL || u->q == NULL || u->out == NULL)
        return false;
    uint64_t x = 1;
    for (uint32_t i = 0; i < all; i++)
        u->blocks[i] = i;
    for (uint32_t i = all - 1; i > 0; i--) { /* blocks of a sequence lie anywhere */
        x = x * 6364136223846793005u + 1442695040888963407u;
        uint32_t j = (uint32_t)((x >> 33) % (i + 1)), t = u->blocks[i];
        u->blocks[i] = u->blocks[j];
        u->blocks[j] = t;
    }
    for (size_t i = 0; i < n * row; i++)
        u->q[i] = (float)((i * 2654435761u >> 16) % 2000) * 1e-3f - 1.0f;
    memset(u->out, 0xff, n * row * sizeof *u->out);
    for (uint32_t i = 0; i < n; i++)
        u->seqs[i] = (ts_attention_seq){.blocks = u->blocks + (size_t)i * per_seq,
                                        .kv_tokens = per_seq * 16,
                                        .q_tokens = 1,
                                        .q = u->q + i * row,
                                        .out = u->out + i * row};
    u->call = (ts_attention_call){.geometry = g,
                                  .base = m->bytes,
                                  .heads = s->heads,
                                  .variant.scale = 1.0f / sqrtf((float)s->head_dim),
                                  .seqs = u->seqs,
                                  .num_seqs = n};
    return true;
}

static void release(setup *u)
{
    free(u->seqs);
    free(u->blocks);
    free(u->q);
    free(u->out);
}

static int measure(const bench_options *o, const shape *s, memory *m, ts_threads *threads,
                   ts_attention *a, json_t *rows)
{
    setup u;
    double read[REPEATS], attend[REPEATS];
    bool ready = prepare(&u, s, m);
    char name[64];
    if (ready)
        snprintf(name, sizeof name, "%u x %u, %u/%u/%u %s %s", u.call.num_seqs, u.seqs[0].kv_tokens,
                 s->heads, s->kv_heads, s->head_dim, ts_dtype_name(s->dtype),
                 s->layout == TS_LAYOUT_NHD ? "nhd" : "hnd");
    if (ready && o->shape != NULL && strstr(name, o->shape) == NULL) {
        release(&u);
        return 0;
    }
    if (!ready || ts_attention_run(a, &u.call) != TS_OK) {
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
    size_t kv = (size_t)u.call.num_seqs * u.seqs[0].kv_tokens / 16 *
                ts_geometry_block_bytes(&u.call.geometry);
    for (int i = 0; i < REPEATS; i++) { /* by turns: what the machine does beside hits both */
        double t = bench_now();
        ts_threads_run(threads, CHUNKS, read_chunk, m);
        read[i] = bench_now() - t;
        t = bench_now();
        (void)ts_attention_run(a, &u.call);
        attend[i] = bench_now() - t;
    }
    double read_rate = (double)(m->size / CHUNKS / 256 * 256 * CHUNKS) * 1e-9 /
                       bench_percentile(read, REPEATS, 50);
    double rate = (double)kv * 1e-9 / bench_percentile(attend, REPEATS, 50);
    double slow = (double)kv * 1e-9 / attend[REPEATS - 1];
    if (!o->json)
        printf("%-36s %8.1f %8.1f %8.1f %8.2f %9.1e\n", name, read_rate, rate, slow,
               rate / read_rate, error);
    json_array_append_new(rows, json_pack("{s:s, s:s, s:i, s:f, s:f, s:f, s:f, s:f}", "shape", name,
                                          "kernel", ts_isa_name(ts_attention_isa(a)), "threads",
                                          ts_attention_threads(a), "read_GB_s", read_rate,
                                          "attend_GB_s", rate, "attend_slowest_GB_s", slow, "ratio",
                                          rate / read_rate, "relative_error", error));
    release(&u);
    return 0;
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
    memory m = {.size = (size_t)(o->gib * (1u << 30)) / (1u << 20) * (1u << 20)};
    ts_threads *threads = ts_threads_new(o->threads);
    ts_attention *a = ts_attention_new(o->threads, TS_ISA_AUTO);
    ts_memory *slab = NULL; /* as a pool has it */
    char why[256] = "no memory or threads";
    int code = 1;
    if (threads == NULL || a == NULL ||
        ts_memory_host_new(1, m.size, &slab, why, sizeof why) != TS_OK ||
        ts_memory_renew(slab, 0, true, why, sizeof why) != TS_OK) {
        fprintf(stderr, "tsbench: %s\n", why);
        goto out;
    }
    m.bytes = slab->base;
    if (!o->json)
        printf("decode, %u threads, %s, %.2f GiB of cache, blocks of 16 in random order; GB/s, "
               "medians of %d\n%-36s %8s %8s %8s %8s %9s\n",
               ts_attention_threads(a), ts_isa_name(ts_attention_isa(a)), o->gib, REPEATS, "",
               "read", "attend", "slowest", "ratio", "error");
    code = 0;
    for (size_t i = 0; code == 0 && i < sizeof shapes / sizeof *shapes; i++) {
        if (i == 0 || shapes[i].dtype != shapes[i - 1].dtype)
            fill(&m, shapes[i].dtype);
        code = measure(o, &shapes[i], &m, threads, a, rows);
    }
out:
    ts_memory_free(slab);
    ts_attention_free(a);
    ts_threads_free(threads);
    return code;
}
