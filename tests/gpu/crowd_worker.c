/*
 * A worker of bench_workers.py's crowds in C: it has no interpreter, and sleeps while the GPU
 * works, as many workers on few processors should. It reads and prints what a worker in Python
 * does.
 *
 *   crowd_worker [--spin]
 *
 * --spin: it spins while the GPU works, as PyTorch does.
 */
#define _GNU_SOURCE
#include "tinyserve.h"
#include "tinyserve_sequences.h"

#include <cuda.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define LAYERS 32u
#define HEADS 32u
#define KV_HEADS 8u
#define DIM 128u
#define BLOCK 16u
#define WARM 20u /* steps before those that are counted */
#define EXCHANGE ((size_t)16 << 20)
#define PLANE_WORDS (KV_HEADS * BLOCK * DIM / 2u) /* of 32 bits: of a block, K or V of a layer */

static void need(CUresult result, const char *what)
{
    const char *name = "?";
    if (result == CUDA_SUCCESS)
        return;
    cuGetErrorName(result, &name);
    fprintf(stderr, "%s: %s\n", what, name);
    exit(1);
}

#define CUDA(call) need((call), #call)

static void need_ok(const ts_client *c, ts_status status, const char *what)
{
    if (status == TS_OK)
        return;
    fprintf(stderr, "%s: %s: %s\n", what, ts_status_name(status), ts_error(c));
    exit(1);
}

#define OK(call) need_ok(w->client, (call), #call)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* What a worker is told to do, and what it has. */
typedef struct worker {
    ts_client *client;
    ts_pool *pool;
    ts_seq *seqs;
    uint32_t *ones; /* new tokens of each sequence */
    uint32_t count;
    CUstream stream;
    ts_frame *frame; /* NULL: steps are no frame's */
    CUgraphExec graph;
    double parts[5]; /* when each part of making it ready ended */
} worker;

/* When the parts of a step ended. */
typedef struct step_times {
    double begun, ran, waited, over;
    double processor, faults, switches; /* as in getrusage, of the thread */
} step_times;

static void note_spent(step_times *t)
{
    struct rusage used;
    getrusage(RUSAGE_THREAD, &used);
    t->processor = (double)used.ru_utime.tv_sec + (double)used.ru_utime.tv_usec * 1e-6 +
                   (double)used.ru_stime.tv_sec + (double)used.ru_stime.tv_usec * 1e-6;
    t->faults = (double)(used.ru_minflt + used.ru_majflt);
    t->switches = (double)used.ru_nivcsw;
}

static void *allocate(size_t count, size_t bytes)
{
    void *memory = calloc(count, bytes);
    if (memory == NULL) {
        fprintf(stderr, "no memory for %zu things of %zu bytes\n", count, bytes);
        exit(1);
    }
    return memory;
}

/* Numbers of 1 to 2 in bf16, two in a word: they are attended, and none is strange. */
static uint32_t next_pair(void)
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return 0x3f803f80u | (state >> 8 & 0x007f007fu);
}

/* Each plane gets other ones. */
static void fill_sequence(worker *w, ts_seq seq, uint32_t context)
{
    uint64_t *slots = allocate(context, sizeof *slots);
    OK(ts_seq_slots(w->pool, seq, 0, 0, context, slots));
    for (uint32_t i = 0; i < context; i += BLOCK)
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            ts_kv kv;
            OK(ts_slot_kv(w->pool, slots[i], layer, &kv));
            CUDA(cuMemsetD32Async((CUdeviceptr)kv.k, next_pair(), PLANE_WORDS, w->stream));
            CUDA(cuMemsetD32Async((CUdeviceptr)kv.v, next_pair(), PLANE_WORDS, w->stream));
        }
    CUDA(cuStreamSynchronize(w->stream));
    free(slots);
}

static const ts_step_options step_options = {
    .size = sizeof(ts_step_options), .heads = HEADS, .io_dtype = TS_DTYPE_BF16};

static void make_ready(worker *w, const char *url, const char *way, uint32_t steps,
                       uint32_t context)
{
    const ts_options options = {.size = sizeof(ts_options),
                                .url = url,
                                .exec =
                                    strcmp(way, "daemon") == 0 ? TS_EXEC_DAEMON : TS_EXEC_LOCAL};
    w->parts[0] = now();
    need_ok(w->client, ts_connect(&options, &w->client), "ts_connect");
    OK(ts_pool_open(w->client, "bench", TS_POOL_WRITABLE, &w->pool));
    OK(ts_exchange_device(w->pool, EXCHANGE));
    w->parts[1] = now();
    w->seqs = allocate(w->count, sizeof *w->seqs);
    w->ones = allocate(w->count, sizeof *w->ones);
    uint32_t *contexts = allocate(w->count, sizeof *contexts);
    for (uint32_t i = 0; i < w->count; i++) {
        w->ones[i] = 1;
        contexts[i] = context;
    }
    OK(ts_seq_create(w->pool, w->count, w->seqs));
    OK(ts_seq_append(w->pool, w->seqs, contexts, w->count, NULL));
    free(contexts);
    w->parts[2] = w->parts[3] = now(); /* mapping is a part of filling */
    for (uint32_t i = 0; i < w->count; i++)
        fill_sequence(w, w->seqs[i], context);
    if (strcmp(way, "graph") == 0)
        OK(ts_frame_new(w->pool,
                        &(ts_frame_options){.size = sizeof(ts_frame_options),
                                            .seqs = w->count,
                                            .tokens = (uint64_t)w->count * (context + WARM + steps),
                                            .step = &step_options},
                        &w->frame));
    w->parts[4] = now();
}

static void run_layers(worker *w, ts_step *step)
{
    const ts_run_options options = {
        .size = sizeof(ts_run_options), .on_stream = true, .stream = w->stream};
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        OK(ts_step_run_with(step, layer, &options));
}

static step_times do_step(worker *w)
{
    step_times t;
    ts_step *step;
    if (w->frame != NULL)
        OK(ts_frame_begin(w->frame, w->seqs, w->count, NULL, &step));
    else
        OK(ts_step_begin(w->pool, w->seqs, w->ones, w->count, &step_options, &step));
    t.begun = now();
    if (w->frame != NULL && w->graph == NULL) {
        CUgraph graph;
        CUDA(cuStreamBeginCapture(w->stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
        run_layers(w, step);
        CUDA(cuStreamEndCapture(w->stream, &graph));
        CUDA(cuGraphInstantiate(&w->graph, graph, 0));
        CUDA(cuGraphDestroy(graph));
    }
    if (w->graph != NULL)
        CUDA(cuGraphLaunch(w->graph, w->stream));
    else
        run_layers(w, step);
    t.ran = now();
    CUDA(cuStreamSynchronize(w->stream));
    t.waited = now();
    OK(ts_step_commit(step, NULL));
    t.over = now();
    note_spent(&t);
    return t;
}

static void print(json_t *what)
{
    json_dumpf(what, stdout, JSON_COMPACT | JSON_REAL_PRECISION(12));
    printf("\n");
    fflush(stdout);
    json_decref(what);
}

static void read_line(char *line, size_t bytes)
{
    if (fgets(line, (int)bytes, stdin) == NULL)
        exit(0);
}

static void print_times(double began, const step_times *first, const step_times *steps,
                        uint32_t count)
{
    json_t *times = json_pack("[f]", began), *spent = json_array();
    json_array_append_new(
        spent, json_pack("[f, f, f, i]", first->processor, first->faults, first->switches, 0));
    for (uint32_t i = 0; i < count; i++) {
        const step_times *s = &steps[i];
        json_array_append_new(times,
                              json_pack("[f, f, f, f]", s->begun, s->ran, s->waited, s->over));
        json_array_append_new(spent,
                              json_pack("[f, f, f, i]", s->processor, s->faults, s->switches, 0));
    }
    print(json_pack("[o, o]", times, spent));
}

/* One order: a line, an array of the daemon's address, the way, sequences, steps, and tokens. */
static void obey(const char *line, CUstream stream)
{
    const char *url, *way;
    int count, steps, context;
    json_error_t error;
    json_t *order = json_loads(line, 0, &error);
    if (order == NULL ||
        json_unpack(order, "[s, s, i, i, i]", &url, &way, &count, &steps, &context) != 0 ||
        count < 1 || steps < 1 || context < 1) {
        fprintf(stderr, "not an order: %s\n", line);
        exit(1);
    }
    worker w = {.count = (uint32_t)count, .stream = stream};
    make_ready(&w, url, way, (uint32_t)steps, (uint32_t)context);
    for (uint32_t i = 0; i < WARM; i++)
        (void)do_step(&w);
    json_t *took = json_array();
    for (uint32_t i = 1; i < 5; i++)
        json_array_append_new(took, json_real(w.parts[i] - w.parts[i - 1]));
    json_array_append_new(took, json_real(now() - w.parts[4]));
    print(took);
    char next[16];
    read_line(next, sizeof next);
    step_times *times = allocate((size_t)steps, sizeof *times), first;
    const double began = now();
    note_spent(&first);
    for (int i = 0; i < steps; i++)
        times[i] = do_step(&w);
    print_times(began, &first, times, (uint32_t)steps);
    read_line(next, sizeof next); /* its end is not to hold up the others */
    if (w.graph != NULL)
        CUDA(cuGraphExecDestroy(w.graph));
    ts_frame_free(w.frame);
    ts_pool_close(w.pool);
    ts_disconnect(w.client);
    free(times);
    free(w.seqs);
    free(w.ones);
    json_decref(order);
    printf("closed\n");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    CUdevice device;
    CUcontext context;
    CUstream stream;
    const bool spins = argc > 1 && strcmp(argv[1], "--spin") == 0;
    if (argc > 1 + spins) {
        fprintf(stderr, "crowd_worker [--spin]\n");
        return 2;
    }
    CUDA(cuInit(0));
    CUDA(cuDeviceGet(&device, 0));
    CUDA(
        cuDevicePrimaryCtxSetFlags(device, spins ? CU_CTX_SCHED_SPIN : CU_CTX_SCHED_BLOCKING_SYNC));
    CUDA(cuDevicePrimaryCtxRetain(&context, device));
    CUDA(cuCtxSetCurrent(context));
    CUDA(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    printf("started\n");
    fflush(stdout);
    char line[4096];
    for (;;) {
        read_line(line, sizeof line);
        obey(line, stream);
    }
}
