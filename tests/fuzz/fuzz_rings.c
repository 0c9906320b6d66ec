/*
 * Fuzz target: what a client writes into the memory of its rings (proto/rings.h), which the
 * daemon's thread reads. An input is a list of a client's actions: entries with fields of its
 * choice, any bytes at any place of the memory, counts that can't be, the doorbell, and new rings
 * in place of the old ones. The daemon completes exactly what it has taken, keeps its books, and
 * has let all rings go when their connection has ended.
 */
#define _GNU_SOURCE
#include "fuzz_input.h"
#include "fuzz_service.h"
#include "ring_server.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ACTIONS_MAX 100

typedef struct client {
    uint32_t pipe;
    ts_rings_memory *shared; /* NULL: no rings */
    size_t bytes;
    int doorbell;  /* the daemon's own */
    uint32_t tail; /* submissions */
    uint32_t head; /* completions */
    uint64_t seqs[8], steps[4];
    uint32_t num_steps;
} client;

/* ---- the rings' life ---- */

typedef struct new_rings {
    client *c;
    uint32_t magic, version, max_blocks, max_slabs, max_ids;
    uint64_t bytes, allocated;
} new_rings;

/* The client's part of making rings, and then the daemon's. */
static void make_rings(void *arg)
{
    const new_rings *n = arg;
    client *c = n->c;
    char why[256];
    ts_connection *connection = ts_service_connection(&fuzz_service, c->pipe);
    ts_filling *f = &connection->memory.new_rings;
    const uint32_t head[] = {n->magic, n->version, n->max_blocks, n->max_slabs, n->max_ids};
    if (ts_filling_new(f, n->bytes, why, sizeof why) != TS_OK)
        abort();
    void *shared = mmap(NULL, n->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, f->fd, 0);
    if (shared == MAP_FAILED || fallocate(f->fd, 0, 0, (off_t)n->allocated) != 0)
        abort();
    memcpy(shared, head, sizeof head);
    if (ts_ring_new(fuzz_service.rings, connection, why, sizeof why) != TS_OK) {
        munmap(shared, n->bytes);
        return;
    }
    if (c->shared != NULL)
        munmap(c->shared, c->bytes);
    c->shared = shared;
    c->bytes = n->bytes;
    c->doorbell = connection->ring->doorbell;
    c->tail = c->head = 0;
}

static void open_rings(client *c, fuzz_input *in)
{
    uint32_t odd = fuzz_take(in, 1);
    new_rings n = {.c = c,
                   .magic = TS_RING_MAGIC,
                   .version = TS_PROTOCOL,
                   .max_blocks = odd < 128 ? 256 : odd,
                   .max_slabs = odd < 128 ? 64 : odd % 64,
                   .max_ids = odd < 128 ? 64 : odd % 32};
    n.bytes = n.allocated = ts_rings_bytes(n.max_blocks, n.max_slabs, n.max_ids);
    if (odd >= 250)
        n.max_blocks = fuzz_take(in, 4);
    else if (odd >= 245)
        n.max_slabs = fuzz_take(in, 4);
    else if (odd == 229)
        n.max_ids = fuzz_take(in, 4);
    else if (odd >= 240)
        n.allocated -= 4096;
    else if (odd >= 235)
        n.version = fuzz_number(in);
    else if (odd >= 230)
        n.magic = fuzz_number(in);
    fuzz_as_owner(make_rings, &n);
}

/* Nothing is left that the daemon would take now, and nothing that it has taken is under way. */
static bool is_quiet(void *arg)
{
    client *c = arg;
    ts_connection *connection = ts_service_connection(&fuzz_service, c->pipe);
    const ts_ring *r = connection->ring;
    if (fuzz_service.exec.live_jobs != NULL || atomic_load(&r->queued))
        return false;
    uint32_t taken = atomic_load(&r->taken);
    if (r->posted != taken)
        abort(); /* one completion for each submission */
    if (atomic_load(&r->closed))
        return true;
    uint32_t tail = r->shared->submissions.tail, head = r->shared->completions.head;
    return !atomic_load(&r->blocked) && (tail == taken || taken - head == TS_RING_ENTRIES);
}

static void ring_doorbell(client *c)
{
    uint64_t one = 1;
    if (write(c->doorbell, &one, sizeof one) != sizeof one)
        abort();
    fuzz_await(is_quiet, c);
}

/* Takes the completions, and learns of the steps that were begun. */
static void take_completions(client *c)
{
    uint32_t tail = c->shared->completions.tail;
    if (tail - c->head > TS_RING_ENTRIES) /* what was scribbled: it isn't the daemon's */
        c->head = tail - TS_RING_ENTRIES;
    for (; c->head != tail; c->head++) {
        const ts_ring_completion *done = &c->shared->completed[c->head % TS_RING_ENTRIES];
        if (done->status == TS_OK && done->step != 0)
            c->steps[c->num_steps++ % 4] = done->step;
    }
    c->shared->completions.head = c->head;
}

static void close_rings(client *c)
{
    if (c->shared != NULL)
        munmap(c->shared, c->bytes);
    c->shared = NULL;
}

/* ---- what is written ---- */

static void write_begin(client *c, fuzz_input *in, ts_ring_entry *entry)
{
    ts_rings_memory *m = c->shared;
    uint32_t count = fuzz_take(in, 1), odd = fuzz_take(in, 1);
    entry->begin.pool = odd == 255 ? fuzz_take(in, 4) : 0;
    entry->begin.count = count < 240 ? count % 5 : fuzz_take(in, 4);
    entry->begin.heads = odd < 200 ? 2 : odd;
    entry->begin.io_dtype = odd < 250 ? 0 : odd - 250;
    entry->begin.wait_ms = odd & 16 ? 1 + (odd >> 6) : 0;
    entry->begin.priority = (int32_t)(odd >> 3) % 4 - 1;
    entry->begin.scale = odd % 8 == 7 ? (float)fuzz_number(in) : 0;
    entry->begin.flags = (odd & 1 ? TS_RING_TABLES : 0u) | (odd & 4 ? TS_RING_TOKENS : 0u);
    if (odd == 201)
        memset(entry->begin.kernel, 'x', sizeof entry->begin.kernel);
    for (uint32_t i = 0; i < entry->begin.count && i < 8; i++) {
        m->batch_seqs[i] = fuzz_id(in, c->seqs, 8);
        m->batch_words[i] = fuzz_number(in);
        m->batch_known_step[i] = odd & 2 ? fuzz_id(in, c->steps, 4) : 0;
    }
}

static void write_run(fuzz_input *in, ts_layer_run *run)
{
    uint32_t odd = fuzz_take(in, 1);
    run->layer = fuzz_take(in, 1) % 3;
    run->k = 1 << 13;
    run->v = 2 << 13;
    run->out = 3 << 13;
    if (odd < 128)
        return;
    run->q = fuzz_number(in) * 64ull;
    run->k = fuzz_number(in) * 64ull;
    run->v = fuzz_number(in) * 64ull;
    run->out = fuzz_number(in) * 64ull;
    run->sinks = run->alibi = run->lse = run->scales = fuzz_number(in) * 64ull;
    run->flags = odd % 64 | (odd & 64 ? TS_RUN_POSTED : 0u);
#define NUMBER(type, name, place, most, what) run->name = (type)fuzz_number(in);
    TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
    run->number = fuzz_number(in);
}

static void write_seqs(client *c, fuzz_input *in, ts_ring_entry *entry)
{
    ts_rings_memory *m = c->shared;
    uint32_t count = fuzz_take(in, 1), odd = fuzz_take(in, 1);
    entry->seqs.pool = odd == 255 ? fuzz_take(in, 4) : 0;
    entry->seqs.count = count < 240 ? count % 5 : fuzz_take(in, 4);
    entry->seqs.parent = fuzz_id(in, c->seqs, 8);
    entry->seqs.length = fuzz_number(in);
    entry->seqs.flags = odd & 15;
    entry->seqs.wait_ms = odd & 16 ? 1 + (odd >> 6) : 0;
    entry->seqs.space_bytes = odd < 200 ? 0 : fuzz_number(in);
    for (uint32_t i = 0; i < entry->seqs.count && i < 8; i++) {
        m->batch_seqs[i] = fuzz_id(in, c->seqs, 8);
        m->batch_words[i] = fuzz_number(in);
    }
}

static void submit(client *c, fuzz_input *in)
{
    ts_rings_memory *m = c->shared;
    ts_ring_entry *entry = &m->submitted[c->tail % TS_RING_ENTRIES];
    memset(entry, 0, sizeof *entry);
    entry->op = fuzz_take(in, 1) % (TS_RING_OPS + 1);
    entry->tag = c->tail;
    if (entry->op != TS_RING_BEGIN)
        entry->step = fuzz_id(in, c->steps, 4);
    if (entry->op == TS_RING_BEGIN)
        write_begin(c, in, entry);
    else if (entry->op == TS_RING_RUN)
        write_run(in, &entry->run);
    else if (entry->op >= TS_RING_SEQ_CREATE)
        write_seqs(c, in, entry);
    else if (entry->op == TS_RING_COMMIT) {
        uint32_t count = fuzz_take(in, 1);
        entry->commit.count = count < 240 ? count % 5 : fuzz_take(in, 4);
        for (uint32_t i = 0; i < 4; i++)
            m->batch_words[i] = fuzz_number(in);
    }
    m->submissions.tail = ++c->tail;
}

/* Any bytes, at any place but the last few. */
static void scribble(client *c, fuzz_input *in)
{
    uint32_t at = fuzz_take(in, 3) % c->bytes;
    size_t bytes = fuzz_take(in, 1) % 32;
    const uint8_t *what = fuzz_bytes(in, &bytes);
    if (bytes <= c->bytes - at)
        memcpy((uint8_t *)c->shared + at, what, bytes);
}

/* New ones, or such that share blocks with another. */
static void make_sequences(client *c, fuzz_input *in)
{
    uint32_t parent = fuzz_take(in, 1), count = 1 + fuzz_take(in, 1) % 3;
    uint64_t *seqs = c->seqs + fuzz_take(in, 1) % 6;
    if (parent < 64)
        fuzz_create(c->pipe, count, seqs);
    else
        fuzz_fork(c->pipe, c->seqs[parent % 8], count, seqs);
}

static void act(client *c, fuzz_input *in)
{
    uint32_t action = fuzz_take(in, 1) % 16;
    if (action == 0)
        open_rings(c, in);
    else if (action == 1)
        make_sequences(c, in);
    else if (c->shared == NULL)
        return;
    else if (action == 2)
        scribble(c, in);
    else if (action == 3)
        c->shared->submissions.tail = c->tail + fuzz_number(in);
    else if (action == 4)
        c->shared->completions.head = c->head + fuzz_number(in);
    else if (action == 5)
        c->shared->completions.sleeps = fuzz_take(in, 1);
    else if (action < 10) {
        ring_doorbell(c);
        take_completions(c);
    } else
        submit(c, in);
}

static bool all_are_gone(void *arg)
{
    (void)arg;
    return fuzz_service.exec.live_jobs == NULL && fuzz_service.rings != NULL &&
           ((ts_rings *)fuzz_service.rings)->all == NULL;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    fuzz_service_start();
    if (ts_rings_new(&fuzz_service, 0, 0) == NULL)
        abort();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {.at = data, .end = data + size}, none = {0};
    uint32_t how = fuzz_take(&in, 1);
    client c = {.pipe = fuzz_connect(1000, how & 1)};
    fuzz_create(c.pipe, 4, c.seqs);
    fuzz_give_exchange(c.pipe, 64 << 10);
    open_rings(&c, &none);
    for (uint32_t i = 0; in.at < in.end && i < ACTIONS_MAX; i++)
        act(&c, &in);
    fuzz_disconnect(c.pipe);
    fuzz_await(all_are_gone, NULL);
    close_rings(&c);
    fuzz_check_books();
    return 0;
}
