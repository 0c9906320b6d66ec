/*
 * A GPU's kernels beside its plain read rate, the kernels alone: no daemon. Each shape's K and V
 * lie in block-major blocks in random order, in as many layers as it takes to leave nothing of one
 * in any cache when its turn comes again. Results are checked against the float64 reference first.
 */
extern "C" {
#include "attention.h"
#include "convert.h"
#include "dtypes.h"
#include "gpu.h"
#include "shape.h"
#include "tsbench.h"
}

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

namespace
{

#define BLOCK_TOKENS 16u
#define ROTATED_BYTES ((size_t)3 << 30) /* of K and V in all layers, at least */
#define REPEATS 60

using shape = bench_shape;

const char *const shapes[] = {
    "64 x 1024-4096, 32/32/64 fp32",
    "64 x 4096, 32/8/128 bf16",
    "256 x 1024, 32/8/128 bf16",
    "1 x 131072, 32/8/128 bf16",
    "1 x 32768, 32/8/128 bf16",
    "1 x 8192, 32/8/128 bf16",
    "512 x 64-512 + 8 x 32768, 64/8/128 bf16",
    "64 x 4096, 128/1/128 bf16",
    "64 x 4096, 32/8/128 fp16",
    "64 x 4096, 32/8/128 bf16, 4 new",
    "64 x 4096, 32/8/128 bf16, 8 new",
    "64 x 4096, 32/8/128 fp8",
    "1 x 131072, 32/8/128 fp8",
    "64 x 9216, 8192 shared, 32/8/128 bf16",
    "4 x 4096, all new, 32/8/128 bf16",
    "8 x 8704, 512 new, 32/8/128 bf16",
    "8 x 8704, 512 new, 32/8/128 fp8",
};

/* q and out are of the cache's type; beside fp8 bf16. */
ts_dtype io_of(const shape *s)
{
    return s->dtype == TS_DTYPE_FP8_E4M3 ? TS_DTYPE_BF16 : s->dtype;
}

/* ---- the device's side ---- */

__device__ uint32_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return (uint32_t)(x >> 32);
}

TS_KNOWS_DTYPES(4);
/* Random numbers in -1..1, of the type. */
__global__ void fill(void *to, size_t n, ts_dtype dtype, uint64_t seed)
{
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
        float x = (float)(int32_t)mix(i * 0x9e3779b97f4a7c15ull + seed) * 0x1p-31f;
        if (dtype == TS_DTYPE_FP32)
            ((float *)to)[i] = x;
        else if (dtype == TS_DTYPE_FP16)
            ((__half *)to)[i] = __float2half_rn(x);
        else if (dtype == TS_DTYPE_FP8_E4M3)
            ((__nv_fp8_e4m3 *)to)[i] = __nv_fp8_e4m3(x);
        else
            ((__nv_bfloat16 *)to)[i] = __float2bfloat16_rn(x);
    }
}

#define READ_CHUNK ((size_t)512 * 16) /* 16-byte loads of a block at once: 16 of each thread */

/* Plain reading: 16-byte loads, many in flight. */
__global__ void __launch_bounds__(512) read_all(const uint4 *from, size_t n, uint32_t *sink)
{
    uint4 sum = make_uint4(0, 0, 0, 0);
    for (size_t at = blockIdx.x * READ_CHUNK; at + READ_CHUNK <= n; at += gridDim.x * READ_CHUNK) {
        uint4 x[16];
#pragma unroll
        for (int i = 0; i < 16; i++)
            x[i] = from[at + i * 512 + threadIdx.x];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            sum.x ^= x[i].x;
            sum.y ^= x[i].y;
            sum.z ^= x[i].z;
            sum.w ^= x[i].w;
        }
    }
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678)
        *sink = sum.x;
}

/* The same of `count` blocks, wherever they lie, `vectors` from the start of each; two at once. */
__global__ void __launch_bounds__(512)
    read_blocks(const unsigned char *base, size_t block_bytes, uint32_t vectors,
                const uint32_t *blocks, uint32_t count, uint32_t *sink)
{
    uint4 sum = make_uint4(0, 0, 0, 0);
    for (uint32_t pair = blockIdx.x; pair < (count + 1) / 2; pair += gridDim.x) {
        const unsigned char *first = base + blocks[pair * 2] * block_bytes;
        const unsigned char *second = base + blocks[min(pair * 2 + 1, count - 1)] * block_bytes;
        for (uint32_t v = threadIdx.x; v < vectors; v += 8 * 512) {
            uint4 x[16];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                uint32_t n = min(v + i % 8 * 512, vectors - 1); /* the last again */
                x[i] = *(const uint4 *)((i < 8 ? first : second) + (size_t)n * 16);
            }
#pragma unroll
            for (int i = 0; i < 16; i++) {
                sum.x ^= x[i].x;
                sum.y ^= x[i].y;
                sum.z ^= x[i].z;
                sum.w ^= x[i].w;
            }
        }
    }
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678)
        *sink = sum.x;
}

/* Keeps the stream busy while the host queues what is to be timed. */
__global__ void hold_up(uint64_t nanoseconds)
{
    uint64_t start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now - start < nanoseconds);
}

bool ok(cudaError_t error, const char *what)
{
    if (error != cudaSuccess)
        fprintf(stderr, "tsbench: %s: %s\n", what, cudaGetErrorString(error));
    return error == cudaSuccess;
}

/* ---- a problem ---- */

struct problem {
    ts_geometry g;
    const shape *s;
    uint32_t layers;
    std::vector<std::vector<uint32_t>> tables;
    std::vector<ts_attention_seq> seqs;
    size_t q_rows = 0, bytes = 0; /* K and V that one layer's attention reads at least */
    double flops = 0;
    unsigned char *cache = NULL, *q = NULL, *kv = NULL, *out = NULL;
    uint32_t *blocks = NULL, num_blocks = 0;             /* of all sequences, on the device */
    size_t cache_bytes = 0, io_bytes = 0, new_bytes = 0; /* of the new tokens' K, and of their V */

    ~problem()
    {
        (void)cudaFree(cache);
        (void)cudaFree(q);
        (void)cudaFree(kv);
        (void)cudaFree(out);
        (void)cudaFree(blocks);
    }
};

bool make_problem(problem &p, const shape *s, const bench_options *o)
{
    p.s = s;
    uint64_t random = 88172645463325252u;
    uint32_t blocks = 0;
    struct first_of {
        size_t seq;
        uint32_t tokens;
    };
    std::vector<first_of> firsts; /* whom a sequence shares its first tokens with */
    for (uint32_t at = 0; at < s->num_groups; at++)
        for (uint32_t i = 0; i < s->groups[at].count; i++) {
            const uint32_t n = bench_group_tokens(&s->groups[at], i);
            ts_attention_seq seq = {};
            seq.kv_tokens = n;
            seq.q_tokens = s->new_tokens == 0 ? n : s->new_tokens;
            p.seqs.push_back(seq);
            uint32_t shared = i == 0 ? 0 : s->shared; /* with the group's first */
            firsts.push_back(shared == 0 ? first_of{} : first_of{p.seqs.size() - 1 - i, shared});
            blocks += (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS - shared / BLOCK_TOKENS;
            p.q_rows += seq.q_tokens;
            p.bytes += 2ull * (n - shared) * s->kv_heads * s->head_dim * ts_dtype_bytes(s->dtype);
            for (uint32_t q = 0; q < seq.q_tokens; q++)
                p.flops += 4.0 * (n - seq.q_tokens + q + 1) * s->heads * s->head_dim;
        }
    p.layers = (uint32_t)(ROTATED_BYTES / p.bytes) + 1;
    p.layers = o->layers != 0 ? o->layers : p.layers < 2 ? 2 : p.layers > 128 ? 128 : p.layers;
    p.g = ts_geometry{};
    p.g.layers = p.layers;
    p.g.kv_heads = s->kv_heads;
    p.g.head_dim = s->head_dim;
    p.g.block_tokens = BLOCK_TOKENS;
    p.g.dtype = s->dtype;
    p.g.layout = s->layout;
    std::vector<uint32_t> order(blocks);
    for (uint32_t i = 0; i < blocks; i++)
        order[i] = i;
    for (uint32_t i = blocks - 1; i > 0 && !o->in_order; i--) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::swap(order[i], order[random % (i + 1)]);
    }
    auto next = order.begin();
    for (size_t i = 0; i < p.seqs.size(); i++) {
        uint32_t n = (p.seqs[i].kv_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        uint32_t shared = firsts[i].tokens / BLOCK_TOKENS;
        std::vector<uint32_t> table(next, next + (n - shared));
        if (shared != 0) {
            const std::vector<uint32_t> &first = p.tables[firsts[i].seq];
            table.insert(table.begin(), first.begin(), first.begin() + shared);
        }
        p.tables.push_back(table);
        next += n - shared;
    }
    for (size_t i = 0; i < p.seqs.size(); i++)
        p.seqs[i].blocks = p.tables[i].data();
    p.cache_bytes = blocks * ts_geometry_block_bytes(&p.g);
    p.io_bytes = p.q_rows * s->heads * s->head_dim * ts_dtype_bytes(io_of(s));
    p.new_bytes = p.io_bytes / s->heads * s->kv_heads;
    if (!ok(cudaMalloc((void **)&p.cache, p.cache_bytes), "memory for K and V") ||
        !ok(cudaMalloc((void **)&p.q, p.io_bytes), "memory for q") ||
        !ok(cudaMalloc((void **)&p.kv, 2 * p.new_bytes), "memory for new K and V") ||
        !ok(cudaMalloc((void **)&p.out, p.io_bytes), "memory for the output") ||
        !ok(cudaMalloc((void **)&p.blocks, blocks * sizeof *p.blocks), "memory for block tables") ||
        !ok(cudaMemcpy(p.blocks, order.data(), blocks * sizeof *p.blocks, cudaMemcpyHostToDevice),
            "block tables"))
        return false;
    p.num_blocks = blocks;
    fill<<<2048, 256>>>(p.cache, p.cache_bytes / ts_dtype_bytes(s->dtype), s->dtype, 1);
    fill<<<256, 256>>>(p.q, p.io_bytes / ts_dtype_bytes(io_of(s)), io_of(s), 2);
    fill<<<256, 256>>>(p.kv, 2 * p.new_bytes / ts_dtype_bytes(io_of(s)), io_of(s), 3);
    return ok(cudaDeviceSynchronize(), "filling");
}

/* ||out - reference|| / ||reference|| of one sequence in one layer; of long prefills, the last
 * query tokens. NaN where something fails. */
double error_of(const problem &p, size_t index, size_t first_row, uint32_t layer)
{
    const shape *s = p.s;
    ts_attention_seq seq = p.seqs[index];
    size_t block = ts_geometry_block_bytes(&p.g), plane = ts_geometry_plane_bytes(&p.g);
    size_t row = (size_t)s->heads * s->head_dim, e = ts_dtype_bytes(io_of(s));
    uint32_t rows = seq.q_tokens < 4 ? seq.q_tokens : 4, skip = seq.q_tokens - rows;
    ts_attention_call call = {};
    call.geometry = p.g;
    call.geometry.layers = 1;
    size_t part = ts_geometry_block_bytes(&call.geometry);
    std::vector<unsigned char> kv(p.tables[index].size() * part), q(rows * row * e),
        out(rows * row * e);
    std::vector<uint32_t> table(p.tables[index].size());
    for (size_t i = 0; i < table.size(); i++) {
        table[i] = (uint32_t)i;
        if (!ok(cudaMemcpy(kv.data() + i * part,
                           p.cache + p.tables[index][i] * block + layer * 2 * plane, 2 * plane,
                           cudaMemcpyDeviceToHost),
                "reading back"))
            return NAN;
    }
    size_t at = (first_row + skip) * row * e;
    if (!ok(cudaMemcpy(q.data(), p.q + at, q.size(), cudaMemcpyDeviceToHost), "reading back") ||
        !ok(cudaMemcpy(out.data(), p.out + at, out.size(), cudaMemcpyDeviceToHost), "reading back"))
        return NAN;
    call.base = kv.data();
    call.heads = s->heads;
    call.io_dtype = io_of(s);
    call.variant.scale = 1.0f / sqrtf((float)s->head_dim);
    seq.blocks = table.data();
    seq.q_tokens = rows;
    seq.q = q.data();
    std::vector<double> reference(rows * row);
    if (ts_attention_reference(&call, &seq, reference.data(), NULL) != TS_OK)
        return NAN;
    double diff = 0, norm = 0;
    for (size_t i = 0; i < reference.size(); i++) {
        double d = ts_element(out.data(), io_of(s), i) - reference[i];
        diff += d * d;
        norm += reference[i] * reference[i];
    }
    return sqrt(diff / norm);
}

/* The output is rounded to the type; so are weights on the way where tensor cores prefill. */
double limit_of(ts_dtype dtype)
{
    return dtype == TS_DTYPE_FP32 ? 1e-5 : dtype == TS_DTYPE_FP16 ? 1e-3 : 8e-3;
}

struct device {
    ts_gpu *gpu;
    ts_gpu_launch *launch;
    cudaStream_t stream;
    uint32_t *sink;
};

/* Milliseconds of each of `count` pieces of work, queued behind a kernel that holds the stream up
 * until all is queued. */
template <typename Work> bool time_each(const device &d, int count, double *ms, const Work &work)
{
    std::vector<cudaEvent_t> events(count * 2);
    bool good = true;
    for (cudaEvent_t &e : events)
        good = good && ok(cudaEventCreate(&e), "an event");
    if (good)
        hold_up<<<1, 1, 0, d.stream>>>(200000 + (uint64_t)count * 30000);
    for (int i = 0; i < count && good; i++) {
        good = ok(cudaEventRecord(events[i * 2], d.stream), "an event") && work(i) &&
               ok(cudaEventRecord(events[i * 2 + 1], d.stream), "an event");
    }
    good = good && ok(cudaStreamSynchronize(d.stream), "the kernels");
    for (int i = 0; i < count && good; i++) {
        float t = 0;
        good = ok(cudaEventElapsedTime(&t, events[i * 2], events[i * 2 + 1]), "an event");
        ms[i] = t;
    }
    for (cudaEvent_t &e : events)
        (void)cudaEventDestroy(e);
    return good;
}

/* The runs of one launch, each with a plan. */
struct planned_runs {
    std::vector<ts_gpu_run> runs;

    ~planned_runs()
    {
        for (ts_gpu_run &run : runs)
            ts_gpu_plan_free((ts_gpu_plan *)run.plan);
    }
};

/* The sequences become as many runs as were asked for, one behind the other. */
bool plan_runs(const bench_options *o, const device &d, const problem &p, ts_kernel kernel,
               planned_runs &to)
{
    char why[256];
    const shape *s = p.s;
    const size_t count = p.seqs.size(), num_runs = o->runs < count ? o->runs : count;
    const size_t q_bytes = p.io_bytes / p.q_rows, kv_bytes = p.new_bytes / p.q_rows;
    ts_gpu_expect_company(d.gpu, (uint32_t)num_runs);
    for (size_t i = 0, row = 0; i < num_runs; i++) {
        const size_t first = count * i / num_runs, end = count * (i + 1) / num_runs;
        ts_gpu_plan *plan;
        if (ts_gpu_plan_new(d.gpu, &p.g, s->heads, io_of(s), kernel, &p.seqs[first],
                            (uint32_t)(end - first), &plan, why, sizeof why) != TS_OK) {
            fprintf(stderr, "tsbench: %s\n", why);
            return false;
        }
        ts_gpu_run run = {};
        run.plan = plan;
        run.q = p.q + row * q_bytes;
        run.k = o->append ? p.kv + row * kv_bytes : NULL;
        run.v = p.kv + p.new_bytes + row * kv_bytes;
        run.out = p.out + row * q_bytes;
        to.runs.push_back(run);
        for (size_t n = first; n < end; n++)
            row += p.seqs[n].q_tokens;
    }
    return true;
}

bool measure(const bench_options *o, const device &d, const problem &p, ts_kernel kernel,
             json_t *rows)
{
    const shape *s = p.s;
    planned_runs planned;
    if (!plan_runs(o, d, p, kernel, planned))
        return false;
    ts_attention_variant variant = {};
    variant.scale = 1.0f / sqrtf((float)s->head_dim);
    auto attend = [&](int turn) {
        for (ts_gpu_run &run : planned.runs)
            run.layer = (uint32_t)turn % p.layers;
        bool good = ts_gpu_launch_attend(d.launch, p.cache, &variant, planned.runs.data(),
                                         (uint32_t)planned.runs.size()) == TS_OK;
        if (!good)
            fprintf(stderr, "tsbench: %s\n", ts_gpu_launch_why(d.launch));
        return good;
    };
    double read[5], floors[REPEATS], times[REPEATS], once = 0, error = 0;
    bool good = ok(cudaMemsetAsync(p.out, 0xff, p.io_bytes, d.stream), "poisoning") &&
                time_each(d, 1, &once, attend);
    size_t first = 0, longest = 0, longest_row = 0;
    for (size_t i = 0; i < p.seqs.size(); i++) {
        if (p.seqs[i].kv_tokens > p.seqs[longest].kv_tokens) {
            longest = i;
            longest_row = first;
        }
        first += p.seqs[i].q_tokens;
    }
    if (good)
        error = fmax(error_of(p, longest, longest_row, 0),
                     error_of(p, p.seqs.size() - 1, first - p.seqs.back().q_tokens, 0));
    if (good && !(error <= limit_of(s->dtype))) {
        fprintf(stderr, "tsbench: %s, %s: the result is wrong (relative error %g)\n", s->name,
                ts_kernel_name(kernel), error);
        good = false;
    }
    int repeats = once * REPEATS > 1000 ? (int)(1000 / once) : REPEATS;
    repeats = repeats < 3 ? 3 : repeats;
    auto plain = [&](int) {
        read_all<<<132 * 4, 512, 0, d.stream>>>((const uint4 *)p.cache, p.cache_bytes / 16, d.sink);
        return ok(cudaGetLastError(), "reading");
    };
    /* The blocks that one layer's attention reads, whole, in one launch. */
    const size_t part = 2 * ts_geometry_plane_bytes(&p.g);
    auto floor = [&](int turn) {
        read_blocks<<<132 * 3, 512, 0, d.stream>>>(
            p.cache + (uint32_t)turn % p.layers * part, ts_geometry_block_bytes(&p.g),
            (uint32_t)(part / 16), p.blocks, p.num_blocks, d.sink);
        return ok(cudaGetLastError(), "reading");
    };
    good = good && time_each(d, 5, read, plain) && time_each(d, repeats, floors, floor) &&
           time_each(d, repeats, times, attend);
    if (!good)
        return false;
    double read_rate = (double)p.cache_bytes * 1e-6 / bench_percentile(read, 5, 50);
    double ms = bench_percentile(times, (size_t)repeats, 50), least = times[0];
    double floor_us = bench_percentile(floors, (size_t)repeats, 50) * 1e3;
    double rate = (double)p.bytes * 1e-6 / ms, tflops = p.flops * 1e-9 / ms;
    if (!o->json)
        printf("%-40s %-5s %9.1f %9.1f %9.1f %6.0f %6.0f %6.2f %7.1f %9.1e\n", s->name,
               ts_kernel_name(kernel), ms * 1e3, least * 1e3, floor_us, rate, read_rate,
               rate / read_rate, tflops, error);
    fflush(stdout);
    json_array_append_new(rows, json_pack("{s:s, s:s, s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}",
                                          "shape", s->name, "kernel", ts_kernel_name(kernel),
                                          "device", ts_gpu_get_info(d.gpu)->name, "us", ms * 1e3,
                                          "us_least", least * 1e3, "us_floor", floor_us, "GB_s",
                                          rate, "read_GB_s", read_rate, "ratio", rate / read_rate,
                                          "TFLOP_s", tflops, "relative_error", error));
    return true;
}

int measure_all(const bench_options *o, const device &d, json_t *rows)
{
    char why[256];
    if (!o->json)
        printf("%s; the kernels alone, blocks of 16 in %s order; medians of %d\n"
               "floor: plain reading of the same blocks in one launch\n"
               "%-40s %-5s %9s %9s %9s %6s %6s %6s %7s %9s\n",
               ts_gpu_get_info(d.gpu)->name, o->in_order ? "their" : "random", REPEATS, "", "",
               "us", "least", "floor", "GB/s", "read", "ratio", "TFLOP/s", "error");
    bool any = false;
    for (const char *name : shapes) {
        const bool given = o->shape != NULL && bench_shape_is(o->shape);
        if (given ? any : o->shape != NULL && strstr(name, o->shape) == NULL)
            continue;
        any = true;
        shape s;
        if (!bench_shape_parse(given ? o->shape : name, &s, why, sizeof why)) {
            fprintf(stderr, "tsbench: %s\n", why);
            return 1;
        }
        problem p;
        if (!make_problem(p, &s, o))
            return 1;
        for (int k = TS_KERNEL_AUTO; k < TS_KERNEL_COUNT; k++) {
            ts_kernel kernel = (ts_kernel)k;
            if (o->all_kernels || kernel == o->kernel)
                if (ts_kernel_check(kernel, &p.g, ts_gpu_get_info(d.gpu)->warp_groups, why,
                                    sizeof why) == TS_OK &&
                    !measure(o, d, p, kernel, rows))
                    return 1;
        }
    }
    if (!any)
        fprintf(stderr, "tsbench: no shape has '%s' in its name\n", o->shape);
    return any ? 0 : 1;
}

} // namespace

extern "C" int bench_attend_gpu(const bench_options *o, json_t *rows)
{
    char why[256];
    device d = {};
    if (ts_gpu_open(o->ordinal, &d.gpu, why, sizeof why) != TS_OK) {
        fprintf(stderr, "tsbench: %s\n", why);
        return 1;
    }
    d.launch = ts_gpu_launch_take(d.gpu, NULL);
    d.stream = (cudaStream_t)ts_gpu_launch_stream(d.launch);
    int code = 1;
    if (ok(cudaMalloc((void **)&d.sink, sizeof *d.sink), "memory"))
        code = measure_all(o, d, rows);
    (void)cudaFree(d.sink);
    ts_gpu_close(d.gpu);
    return code;
}
