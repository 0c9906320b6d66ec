#define _GNU_SOURCE
#include "fake_gpu.h"

#include "attention.h"
#include "test_point.h"
#include "unconst.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OPS_MAX 256

typedef struct op {
    enum { OP_WAIT, OP_ATTEND, OP_COPIES, OP_SIGNAL } kind;
    uint32_t *word, value;
    ts_attention_call call;
    ts_attention_seq *seqs;
    ts_block_copy *copies;
    unsigned char *base;
    size_t block_bytes;
    uint32_t num_copies;
} op;

struct ts_gpu_launch {
    ts_gpu *gpu;
    bool taken;
    uint32_t epoch, ended;  /* of all launches'; of the last that ended here */
    ts_gpu_position behind; /* epoch 0: nobody */
    op ops[OPS_MAX];
    uint32_t num_ops;
    void (*done)(void *arg, ts_status status, const char *why);
    void *arg;
    pthread_t thread;
    bool joinable;
};

struct ts_gpu {
    ts_gpu_info info;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    ts_gpu_launch launches[TS_GPU_LAUNCHES];
    uint32_t epochs;
    uint32_t asked, adopted,
        reads; /* how often it was asked for memory, to take it over, and read */
    fake_gpu_log log;
    bool shut, at_gate, broken, refuses_waits;
    fake_gpu_lack lack;
};

ts_gpu *fake_gpu_new(void)
{
    ts_gpu *g = calloc(1, sizeof *g);
    snprintf(g->info.name, sizeof g->info.name, "a fake");
    g->info.total_bytes = FAKE_GPU_BYTES;
    g->info.vmm = true;
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        g->launches[i].gpu = g;
    return g;
}

void fake_gpu_free(ts_gpu *g)
{
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        if (g->launches[i].joinable)
            pthread_join(g->launches[i].thread, NULL);
    pthread_cond_destroy(&g->changed);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

fake_gpu_log fake_gpu_read(ts_gpu *g)
{
    pthread_mutex_lock(&g->lock);
    fake_gpu_log log = g->log;
    pthread_mutex_unlock(&g->lock);
    return log;
}

static void set(ts_gpu *g, bool *what, bool value)
{
    pthread_mutex_lock(&g->lock);
    *what = value;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

void fake_gpu_await_waiting(ts_gpu *g, uint32_t count)
{
    pthread_mutex_lock(&g->lock);
    while (g->log.waiting != count)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

void fake_gpu_await_refused(ts_gpu *g, uint32_t count)
{
    pthread_mutex_lock(&g->lock);
    while (g->log.refused < count)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

void fake_gpu_await_idle(ts_gpu *g)
{
    pthread_mutex_lock(&g->lock);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        while (g->launches[i].taken)
            pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

void fake_gpu_let_lack(ts_gpu *g, fake_gpu_lack lack)
{
    pthread_mutex_lock(&g->lock);
    g->lack = lack;
    pthread_mutex_unlock(&g->lock);
}

static bool lacks(ts_gpu *g, fake_gpu_lack what)
{
    pthread_mutex_lock(&g->lock);
    bool it_does = g->lack == what;
    g->log.lacked += it_does;
    pthread_mutex_unlock(&g->lock);
    return it_does;
}

void fake_gpu_shut_gate(ts_gpu *g)
{
    set(g, &g->shut, true);
}

void fake_gpu_open_gate(ts_gpu *g)
{
    set(g, &g->shut, false);
}

void fake_gpu_await_at_gate(ts_gpu *g)
{
    pthread_mutex_lock(&g->lock);
    while (!g->at_gate)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

void fake_gpu_break(ts_gpu *g)
{
    set(g, &g->broken, true);
}

/* ---- a device that is lost ---- */

/* TS_TEST_GPU_BREAKS=WHAT:N or WHAT:N:DEATHS: a daemon under a supervisor loses its device at its
 * Nth launch, memory, adopt (of a slab) or read, or a later one. That is the first daemon, or the
 * one before which DEATHS others died. */
static bool breaks_at(const char *what, uint32_t count)
{
    const char *wanted = getenv("TS_TEST_GPU_BREAKS"), *told = getenv("TINYSERVE_DEATHS");
    uint32_t at, deaths = 0;
    char name[16];
    return wanted != NULL && sscanf(wanted, "%15[^:]:%u:%u", name, &at, &deaths) >= 2 &&
           strcmp(name, what) == 0 && count >= at &&
           deaths == (told == NULL ? 0 : (uint32_t)atoi(told));
}

/* The device is read, or asked for memory; *count is how often it was. */
static ts_status use(ts_gpu *g, const char *what, uint32_t *count, char *why, size_t why_bytes)
{
    pthread_mutex_lock(&g->lock);
    ++*count;
    g->broken = g->broken || breaks_at(what, *count);
    pthread_mutex_unlock(&g->lock);
    return ts_gpu_health(g, why, why_bytes);
}

ts_status fake_gpu_ask_for_memory(ts_gpu *g, char *why, size_t why_bytes)
{
    return use(g, "memory", &g->asked, why, why_bytes);
}

ts_status fake_gpu_ask_to_adopt(ts_gpu *g, char *why, size_t why_bytes)
{
    return use(g, "adopt", &g->adopted, why, why_bytes);
}

/* TS_TEST_GPU_READ_WAITS=PATH: where PATH.N is a FIFO, the Nth read waits until its writer has
 * closed it. */
static void wait_to_read(ts_gpu *g)
{
    const char *path = getenv("TS_TEST_GPU_READ_WAITS");
    char name[128], byte;
    pthread_mutex_lock(&g->lock);
    snprintf(name, sizeof name, "%s.%u", path == NULL ? "" : path, g->reads);
    pthread_mutex_unlock(&g->lock);
    int fd = path == NULL ? -1 : open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    (void)!read(fd, &byte, 1);
    close(fd);
}

/* ---- kernels/gpu/gpu.h ---- */

const ts_gpu_info *ts_gpu_get_info(const ts_gpu *g)
{
    return &g->info;
}

uint32_t ts_gpu_count(char *why, size_t why_bytes)
{
    snprintf(why, why_bytes, "a fake is found where TS_TEST_FAKE_GPU is set");
    return getenv("TS_TEST_FAKE_GPU") != NULL;
}

ts_status ts_gpu_open(uint32_t ordinal, ts_gpu **out, char *why, size_t why_bytes)
{
    *out = NULL;
    if (ordinal >= ts_gpu_count(why, why_bytes))
        return TS_EDEVICE;
    *out = fake_gpu_new();
    return TS_OK;
}

ts_status ts_gpu_read(ts_gpu *g, const void *device, size_t bytes, void *host, char *why,
                      size_t why_bytes)
{
    ts_status status = use(g, "read", &g->reads, why, why_bytes);
    wait_to_read(g);
    if (status == TS_OK)
        memcpy(host, device, bytes);
    return status;
}

ts_status ts_gpu_load(ts_gpu *g, const ts_geometry *geometry, char *why, size_t why_bytes)
{
    (void)geometry;
    return ts_gpu_health(g, why, why_bytes);
}

void ts_gpu_close(ts_gpu *g)
{
    fake_gpu_free(g);
}

ts_status ts_gpu_health(ts_gpu *g, char *why, size_t why_bytes)
{
    pthread_mutex_lock(&g->lock);
    bool broken = g->broken;
    pthread_mutex_unlock(&g->lock);
    snprintf(why, why_bytes, "%s", broken ? "cudaErrorFake" : "");
    return broken ? TS_EDEVICE : TS_OK;
}

void fake_gpu_refuse_waits(ts_gpu *g, bool refuses)
{
    set(g, &g->refuses_waits, refuses);
}

bool ts_gpu_may_wait(ts_gpu *g)
{
    pthread_mutex_lock(&g->lock);
    bool may = !g->refuses_waits;
    pthread_mutex_unlock(&g->lock);
    return may;
}

ts_gpu_launch *ts_gpu_launch_take(ts_gpu *g, ts_gpu_position *position)
{
    ts_gpu_launch *l = NULL;
    pthread_mutex_lock(&g->lock);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES && l == NULL; i++)
        if (!g->launches[i].taken)
            l = &g->launches[i];
    if (l != NULL) {
        l->taken = true;
        l->num_ops = 0;
        l->epoch = ++g->epochs;
        l->behind = position != NULL ? *position : (ts_gpu_position){0};
        if (position != NULL)
            *position = (ts_gpu_position){(uint32_t)(l - g->launches), l->epoch};
    } else {
        g->log.refused++;
        pthread_cond_broadcast(&g->changed);
    }
    pthread_mutex_unlock(&g->lock);
    if (l != NULL && l->joinable)
        pthread_join(l->thread, NULL);
    if (l != NULL)
        l->joinable = false;
    return l;
}

static op *add(ts_gpu_launch *l)
{
    if (l->num_ops == OPS_MAX)
        abort();
    op *o = &l->ops[l->num_ops++];
    memset(o, 0, sizeof *o);
    return o;
}

ts_status ts_gpu_launch_wait(ts_gpu_launch *l, const uint32_t *word, uint32_t value)
{
    *add(l) = (op){.kind = OP_WAIT, .word = ts_unconst(word), .value = value};
    pthread_mutex_lock(&l->gpu->lock);
    l->gpu->log.words++;
    pthread_mutex_unlock(&l->gpu->lock);
    return TS_OK;
}

ts_status ts_gpu_launch_signal(ts_gpu_launch *l, const ts_gpu_signal *signals, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        *add(l) = (op){.kind = OP_SIGNAL, .word = signals[i].word, .value = signals[i].value};
    return TS_OK;
}

struct ts_gpu_plan {
    ts_geometry geometry;
    uint32_t heads, num_seqs;
    ts_dtype io_dtype;
    ts_kernel kernel;
    ts_attention_seq *seqs;
    uint32_t *tables;
};

/* Entries of a sequence's block table that a plan takes: none without new tokens. */
static uint32_t table_entries(const ts_geometry *g, const ts_attention_seq *s)
{
    return s->q_tokens == 0 ? 0 : (s->kv_tokens + g->block_tokens - 1) / g->block_tokens;
}

ts_status ts_gpu_plan_new(ts_gpu *g, const ts_geometry *geometry, uint32_t heads, ts_dtype io_dtype,
                          ts_kernel kernel, const ts_attention_seq *seqs, uint32_t num_seqs,
                          ts_gpu_plan **out, char *why, size_t why_bytes)
{
    if (lacks(g, FAKE_LACKS_PLANS)) {
        snprintf(why, why_bytes, "no memory for a plan");
        return TS_ENOMEM;
    }
    ts_gpu_plan *p = malloc(sizeof *p);
    size_t entries = 0;
    for (uint32_t i = 0; i < num_seqs; i++)
        entries += table_entries(geometry, &seqs[i]);
    *p = (ts_gpu_plan){.geometry = *geometry,
                       .heads = heads,
                       .io_dtype = io_dtype,
                       .num_seqs = num_seqs,
                       .kernel = kernel,
                       .seqs = malloc(num_seqs * sizeof *seqs),
                       .tables = malloc(entries * sizeof(uint32_t))};
    uint32_t *table = p->tables;
    for (uint32_t i = 0; i < num_seqs; i++) {
        uint32_t count = table_entries(geometry, &seqs[i]);
        if (count > 0)
            memcpy(table, seqs[i].blocks, count * sizeof *table);
        p->seqs[i] = (ts_attention_seq){
            .blocks = table, .kv_tokens = seqs[i].kv_tokens, .q_tokens = seqs[i].q_tokens};
        table += count;
    }
    pthread_mutex_lock(&g->lock);
    g->log.plans++;
    pthread_mutex_unlock(&g->lock);
    *out = p;
    return TS_OK;
}

void ts_gpu_expect_company(ts_gpu *g, uint32_t sessions)
{
    pthread_mutex_lock(&g->lock);
    g->log.company = sessions;
    pthread_mutex_unlock(&g->lock);
}

ts_status ts_gpu_plan_renew(ts_gpu *g, const ts_geometry *geometry, uint32_t heads,
                            ts_dtype io_dtype, ts_kernel kernel, const ts_attention_seq *seqs,
                            uint32_t num_seqs, ts_gpu_plan **plan, char *why, size_t why_bytes)
{
    if (*plan != NULL) {
        pthread_mutex_lock(&g->lock);
        g->log.renewals++;
        pthread_mutex_unlock(&g->lock);
    }
    ts_gpu_plan_free(*plan);
    *plan = NULL;
    return ts_gpu_plan_new(g, geometry, heads, io_dtype, kernel, seqs, num_seqs, plan, why,
                           why_bytes);
}

void ts_gpu_plan_free(ts_gpu_plan *p)
{
    if (p == NULL)
        return;
    free(p->seqs);
    free(p->tables);
    free(p);
}

ts_status ts_gpu_launch_attend(ts_gpu_launch *l, unsigned char *base,
                               const ts_attention_variant *variant, const ts_gpu_run *runs,
                               uint32_t num_runs)
{
    ts_gpu *g = l->gpu;
    if (lacks(g, FAKE_LACKS_SCRATCH))
        return TS_ENOMEM;
    op *o = add(l);
    uint32_t total = 0;
    for (uint32_t i = 0; i < num_runs; i++)
        total += runs[i].plan->num_seqs;
    o->kind = OP_ATTEND;
    o->seqs = malloc(total * sizeof *o->seqs);
    o->call = (ts_attention_call){.geometry = runs[0].plan->geometry,
                                  .base = base,
                                  .heads = runs[0].plan->heads,
                                  .io_dtype = runs[0].plan->io_dtype,
                                  .variant = *variant,
                                  .seqs = o->seqs,
                                  .num_seqs = total};
    ts_attention_seq *to = o->seqs;
    for (uint32_t i = 0; i < num_runs; i++) {
        const ts_gpu_run *r = &runs[i];
        size_t row = 0, bytes = o->call.geometry.head_dim * ts_dtype_bytes(o->call.io_dtype);
        size_t q_bytes = bytes * o->call.heads, k_bytes = bytes * o->call.geometry.kv_heads;
        for (uint32_t j = 0; j < r->plan->num_seqs; j++) {
            *to = r->plan->seqs[j];
            to->layer = r->layer;
            to->q = (const unsigned char *)r->q + row * q_bytes;
            to->k = r->k == NULL ? NULL : (const unsigned char *)r->k + row * k_bytes;
            to->v = (const unsigned char *)r->v + row * k_bytes;
            to->out = (unsigned char *)r->out + row * q_bytes;
            to->sinks = r->sinks;
            to->scales = r->scales;
            to->alibi = r->alibi;
            to->lse = r->lse == NULL ? NULL : r->lse + row * o->call.heads;
            row += to->q_tokens;
            to++;
        }
    }
    pthread_mutex_lock(&g->lock);
    while (g->shut) {
        g->at_gate = true;
        pthread_cond_broadcast(&g->changed);
        pthread_cond_wait(&g->changed, &g->lock);
    }
    g->at_gate = false;
    g->log.sequences = total;
    g->log.kernel = runs[0].plan->kernel;
    pthread_mutex_unlock(&g->lock);
    for (uint32_t word = 0; word < 2; word++)
        for (uint32_t i = 0; i < num_runs; i++)
            if (runs[i].words[word] != NULL)
                (void)ts_gpu_launch_signal(l, &(ts_gpu_signal){runs[i].words[word], runs[i].number},
                                           1);
    return TS_OK;
}

ts_status ts_gpu_launch_copies(ts_gpu_launch *l, unsigned char *base, size_t block_bytes,
                               const ts_block_copy *copies, uint32_t num_copies)
{
    op *o = add(l);
    *o =
        (op){.kind = OP_COPIES, .base = base, .block_bytes = block_bytes, .num_copies = num_copies};
    o->copies = malloc(num_copies * sizeof *copies);
    memcpy(o->copies, copies, num_copies * sizeof *copies);
    return TS_OK;
}

static bool reached(const op *o)
{
    return (int32_t)(__atomic_load_n(o->word, __ATOMIC_ACQUIRE) - o->value) >= 0;
}

static void count_waiting(ts_gpu *g, int change)
{
    pthread_mutex_lock(&g->lock);
    g->log.waiting += (uint32_t)change;
    if (g->log.waiting > g->log.most_waiting)
        g->log.most_waiting = g->log.waiting;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

static void run(ts_attention *attention, op *o)
{
    switch (o->kind) {
    case OP_WAIT:
        while (!reached(o))
            sched_yield();
        break;
    case OP_ATTEND:
        if (ts_attention_run(attention, &o->call) != TS_OK)
            abort();
        free(o->seqs);
        break;
    case OP_COPIES:
        ts_attention_copy_blocks(attention, o->base, o->block_bytes, o->copies, o->num_copies);
        free(o->copies);
        break;
    case OP_SIGNAL:
        __atomic_store_n(o->word, o->value, __ATOMIC_RELEASE);
        ts_point("signalled", 0); /* the worker's word, or the daemon's own */
        break;
    }
}

/* Whether what the launch is queued behind isn't over. */
static bool is_behind(ts_gpu_launch *l)
{
    pthread_mutex_lock(&l->gpu->lock);
    bool behind = l->behind.epoch != 0 && l->gpu->launches[l->behind.slot].ended < l->behind.epoch;
    pthread_mutex_unlock(&l->gpu->lock);
    return behind;
}

/* Whether the device is lost, by a launch or before, and launches do nothing. */
static bool breaks_now(ts_gpu *g)
{
    pthread_mutex_lock(&g->lock);
    g->broken = g->broken || breaks_at("launch", g->log.launches);
    const bool broken = g->broken && getenv("TS_TEST_GPU_BREAKS") != NULL;
    pthread_mutex_unlock(&g->lock);
    return broken;
}

static void *launch_main(void *arg)
{
    ts_gpu_launch *l = arg;
    ts_gpu *g = l->gpu;
    ts_attention *attention = ts_attention_new(1, TS_ISA_PORTABLE);
    bool waits = is_behind(l);
    if (waits)
        count_waiting(g, 1);
    pthread_mutex_lock(&g->lock);
    while (l->behind.epoch != 0 && g->launches[l->behind.slot].ended < l->behind.epoch)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
    const bool is_lost = breaks_now(g);
    for (uint32_t i = 0; i < l->num_ops && !is_lost; i++) {
        if (l->ops[i].kind == OP_WAIT && !reached(&l->ops[i]) && !waits) {
            waits = true;
            count_waiting(g, 1);
        }
        if (l->ops[i].kind != OP_WAIT && waits) {
            waits = false;
            count_waiting(g, -1);
        }
        run(attention, &l->ops[i]);
    }
    if (waits) /* for a worker, and then there was nothing to do */
        count_waiting(g, -1);
    ts_attention_free(attention);
    void (*done)(void *, ts_status, const char *) = l->done;
    void *done_arg = l->arg;
    pthread_mutex_lock(&g->lock);
    bool broken = g->broken;
    l->taken = false;
    l->ended = l->epoch;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
    if (done != NULL)
        done(done_arg, broken ? TS_EDEVICE : TS_OK, broken ? "cudaErrorFake" : "");
    return NULL;
}

ts_status ts_gpu_launch_finish(ts_gpu_launch *l,
                               void (*done)(void *arg, ts_status status, const char *why),
                               void *arg)
{
    l->done = done;
    l->arg = arg;
    pthread_mutex_lock(&l->gpu->lock);
    l->gpu->log.launches++;
    pthread_mutex_unlock(&l->gpu->lock);
    l->joinable = true;
    if (pthread_create(&l->thread, NULL, launch_main, l) != 0)
        abort();
    return TS_OK;
}

void *ts_gpu_launch_stream(ts_gpu_launch *l)
{
    (void)l;
    return NULL;
}

const char *ts_gpu_launch_why(const ts_gpu_launch *l)
{
    (void)l;
    return "no memory for partial results"; /* FAKE_LACKS_SCRATCH */
}
