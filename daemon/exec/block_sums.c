#include "block_sums.h"

#include "clock.h"
#include "memory.h"
#include "stored_memory.h"
#include "test_point.h"
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>
#include <xxhash.h>

#define QUEUE 65536u /* blocks that wait for their checksum; of more than these none is made */

/* Where a pool's blocks lie. */
typedef struct place {
    const ts_memory *memory;
    ts_gpu *gpu; /* NULL: in host memory */
    size_t block_bytes;
    uint32_t slab_blocks;
} place;

typedef struct pool_sums {
    place place;
    uint64_t *sums;     /* stored, by block; 0: it has none. Atomic */
    uint32_t *versions; /* by block: how often it was to be written anew. Under the lock */
    bool *appended;     /* by block: the worker may write some of it when it likes */
    uint32_t count;     /* blocks; 0: the pool has no checksums */
    uint32_t life;      /* other pools had the place before */
} pool_sums;

typedef struct full_block {
    uint32_t pool, block, version, life;
} full_block;

/* A sequence of a step that is about to be committed. */
typedef struct committed {
    uint32_t seq, start; /* its index, and tokens before the step */
} committed;

struct ts_block_sums {
    const ts_engine *engine;
    ts_store *store;
    pool_sums pools[TS_POOLS_MAX];
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    full_block queue[QUEUE]; /* under the lock, as what follows up to `stop` */
    uint32_t head, tail;     /* which only grow */
    uint32_t lives;          /* of pools, so far */
    uint32_t reading_block;
    uint32_t reading; /* the pool of the block that the thread reads; TS_NONE: it reads none */
    bool stop;
    committed *committed; /* of the command that is being applied */
    uint32_t num_committed, capacity, committed_pool;
};

/* ---- one checksum ---- */

static place place_of(const ts_engine *e, uint32_t pool, const ts_memory *memory, ts_gpu *gpu)
{
    const ts_pool_config *c = &e->pools[pool].config;
    return (place){memory, gpu, ts_geometry_block_bytes(&c->geometry), c->slab_blocks};
}

/* 0: it can't be read, with a sentence. *copy: room for a block, made where it is NULL and the pool
 * is on a GPU. */
static uint64_t sum_of(const place *p, uint32_t block, unsigned char **copy, char *why,
                       size_t why_bytes)
{
    const unsigned char *at = p->memory->base +
                              (size_t)(block / p->slab_blocks) * p->memory->slab_bytes +
                              (size_t)(block % p->slab_blocks) * p->block_bytes;
    if (p->gpu != NULL) {
        if (*copy == NULL && (*copy = malloc(p->block_bytes)) == NULL) {
            snprintf(why, why_bytes, "no memory for a copy of its %zu bytes", p->block_bytes);
            return 0;
        }
        if (ts_gpu_read(p->gpu, at, p->block_bytes, *copy, why, why_bytes) != TS_OK)
            return 0;
        at = *copy;
    }
    const uint64_t sum = XXH3_64bits(at, p->block_bytes);
    return sum == 0 ? 1 : sum;
}

/* ---- the thread ---- */

/* Makes the next checksum. Under the lock, which is open meanwhile. */
static void make_next(ts_block_sums *s)
{
    const full_block b = s->queue[s->head++ % QUEUE];
    const pool_sums *p = &s->pools[b.pool];
    if (p->life != b.life || b.block >= p->count || p->versions[b.block] != b.version)
        return;
    const place at = p->place;
    s->reading = b.pool;
    s->reading_block = b.block;
    pthread_mutex_unlock(&s->lock);
    unsigned char *copy = NULL;
    char why[TS_GPU_WHY_BYTES]; /* a GPU that can't be read is lost, which others say */
    const uint64_t sum = sum_of(&at, b.block, &copy, why, sizeof why);
    free(copy);
    pthread_mutex_lock(&s->lock);
    s->reading = TS_NONE;
    if (p->count > 0 && p->versions[b.block] == b.version)
        __atomic_store_n(&p->sums[b.block], sum, __ATOMIC_RELEASE);
    ts_point("summed", 0);
    pthread_cond_broadcast(&s->changed);
}

static void *sums_main(void *arg)
{
    ts_block_sums *s = arg;
    prctl(PR_SET_NAME, "checksums");
    pthread_mutex_lock(&s->lock);
    while (!s->stop)
        if (s->head != s->tail)
            make_next(s);
        else
            pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* ---- pools ---- */

ts_block_sums *ts_block_sums_new(const ts_engine *engine, ts_store *store)
{
    ts_block_sums *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->engine = engine;
    s->store = store;
    s->reading = TS_NONE;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    if (pthread_create(&s->thread, NULL, sums_main, s) == 0)
        return s;
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
    return NULL;
}

/* The pool has the checksums in `memory`, which are the books' from now on. */
static ts_status keep(ts_block_sums *s, uint32_t pool, const place *at, uint64_t *memory,
                      uint32_t count, char *why, size_t why_bytes)
{
    uint32_t *versions = calloc(count, sizeof *versions);
    bool *appended = calloc(count, sizeof *appended);
    if (versions == NULL || appended == NULL) {
        munmap(memory, count * sizeof *memory);
        free(versions);
        free(appended);
        snprintf(why, why_bytes, "no memory for the checksums of %u blocks", count);
        return TS_ENOMEM;
    }
    pthread_mutex_lock(&s->lock);
    s->pools[pool] = (pool_sums){*at, memory, versions, appended, count, ++s->lives};
    pthread_mutex_unlock(&s->lock);
    return TS_OK;
}

ts_status ts_block_sums_add(ts_block_sums *s, uint32_t pool, const ts_memory *of, ts_gpu *gpu,
                            char *why, size_t why_bytes)
{
    const place at = place_of(s->engine, pool, of, gpu);
    const uint32_t count = s->engine->pools[pool].books.max_blocks;
    void *memory;
    int fd;
    ts_status status =
        ts_memory_shared_new("checksums", count * sizeof(uint64_t), &fd, &memory, why, why_bytes);
    if (status != TS_OK)
        return status;
    status = ts_stored_sums_put(s->store, pool, fd, why, why_bytes);
    close(fd);
    if (status == TS_OK)
        return keep(s, pool, &at, memory, count, why, why_bytes);
    munmap(memory, count * sizeof(uint64_t));
    return status;
}

/* Whether a full block is to be there again, by block: those of sequences and those that are
 * cached. NULL: out of memory. */
static bool *find_full(const ts_engine *e, uint32_t pool)
{
    const ts_engine_pool *p = &e->pools[pool];
    bool *full = calloc(p->books.max_blocks, sizeof *full);
    if (full == NULL)
        return NULL;
    for (uint32_t i = 0; i < p->seqs.count; i++) {
        const ts_sequence *seq = &p->seqs.all[i];
        if (seq->tenant == TS_NONE || seq->step == TS_SEQUENCE_DYING)
            continue;
        for (uint32_t k = 0; k < seq->length / p->seqs.block_tokens; k++)
            full[seq->blocks[k]] = true;
    }
    for (uint32_t block = 0; block < p->books.max_blocks; block++)
        full[block] = full[block] || ts_pool_is_cached(&p->books, block);
    return full;
}

/* How many these are; 0 also where there is no memory to count them. */
static uint32_t count_full(const ts_engine *e, uint32_t pool)
{
    bool *full = find_full(e, pool);
    uint32_t count = 0;
    for (uint32_t block = 0; full != NULL && block < e->pools[pool].books.max_blocks; block++)
        count += full[block];
    free(full);
    return count;
}

/* What the threads that look at blocks share. */
typedef struct look {
    place place;
    const uint64_t *sums;
    const uint32_t *blocks; /* to be looked at */
    bool *wrong;            /* by place in `blocks` */
    unsigned char **copies; /* each thread's own */
    atomic_flag failed;     /* a block couldn't be read: the first, whose thread says why */
    uint32_t unread;        /* TS_NONE: none */
    char why[TS_GPU_WHY_BYTES];
} look;

static void look_at(void *arg, uint32_t item, uint32_t thread)
{
    look *l = arg;
    const uint32_t block = l->blocks[item];
    char why[TS_GPU_WHY_BYTES];
    const uint64_t sum = sum_of(&l->place, block, &l->copies[thread], why, sizeof why);
    l->wrong[item] = sum != l->sums[block];
    if (sum != 0 || atomic_flag_test_and_set(&l->failed))
        return;
    l->unread = block;
    memcpy(l->why, why, sizeof l->why);
}

/* Looks at the `num` blocks: of those that are wrong, *num of them, first in `blocks`. */
static ts_status look_at_all(const place *at, const uint64_t *sums, uint32_t *blocks, uint32_t *num,
                             char *why, size_t why_bytes)
{
    ts_threads *threads = ts_threads_new(0);
    const uint32_t team = threads == NULL ? 0 : ts_threads_count(threads);
    look l = {.place = *at,
              .sums = sums,
              .blocks = blocks,
              .failed = ATOMIC_FLAG_INIT,
              .unread = TS_NONE,
              .wrong = calloc(*num + 1ull, sizeof *l.wrong),
              .copies = calloc(team + 1ull, sizeof *l.copies)};
    const bool can = threads != NULL && l.copies != NULL && l.wrong != NULL;
    uint32_t wrong = 0;
    if (can)
        ts_threads_run(threads, *num, look_at, &l);
    else
        snprintf(why, why_bytes, "no memory or threads to check %u blocks", *num);
    for (uint32_t i = 0; can && i < *num; i++)
        if (l.wrong[i])
            blocks[wrong++] = blocks[i];
    for (uint32_t i = 0; l.copies != NULL && i < team; i++)
        free(l.copies[i]);
    free(l.copies);
    free(l.wrong);
    ts_threads_free(threads);
    *num = wrong;
    if (!can || l.unread == TS_NONE)
        return can ? TS_OK : TS_ENOMEM;
    snprintf(why, why_bytes, "block %u can't be read to be checked: %.120s", l.unread, l.why);
    return l.place.gpu != NULL ? TS_EDEVICE : TS_ENOMEM;
}

/* Looks at the full blocks that have a checksum; the others have none from now on. *wrong: which
 * are wrong, the caller's to free. These keep theirs until they are written anew: a daemon that
 * dies before it has forgotten them leaves it to the next to find them. */
static ts_status compare(const ts_engine *e, uint32_t pool, const place *at, uint64_t *sums,
                         uint32_t **wrong, ts_blocks_checked *c, char *why, size_t why_bytes)
{
    const uint32_t count = e->pools[pool].books.max_blocks;
    bool *full = find_full(e, pool);
    uint32_t num = 0, *some = calloc(count, sizeof *some);
    *wrong = some;
    if (full == NULL || some == NULL) {
        free(full);
        snprintf(why, why_bytes, "no memory to check %u blocks", count);
        return TS_ENOMEM;
    }
    for (uint32_t block = 0; block < count; block++) {
        c->blocks += full[block];
        if (full[block] && sums[block] != 0)
            some[num++] = block;
        else
            sums[block] = 0;
    }
    free(full);
    c->checked = num;
    const ts_status status = look_at_all(at, sums, some, &num, why, why_bytes);
    if (status != TS_OK)
        return status;
    c->wrong = num;
    return TS_OK;
}

/* Who wrote what is in a block that isn't full isn't known: it may have been appended. */
static void note_tails(pool_sums *p, const ts_sequences *seqs)
{
    for (uint32_t i = 0; i < seqs->count; i++) {
        const ts_sequence *seq = &seqs->all[i];
        if (seq->tenant != TS_NONE && seq->step != TS_SEQUENCE_DYING &&
            seq->length % seqs->block_tokens != 0)
            p->appended[seq->blocks[seq->length / seqs->block_tokens]] = true;
    }
}

ts_status ts_block_sums_take(ts_block_sums *s, uint32_t pool, const ts_memory *of, ts_gpu *gpu,
                             ts_blocks_checked *c, uint32_t **wrong, char *why, size_t why_bytes)
{
    const uint64_t began_ns = ts_now_ns();
    const place at = place_of(s->engine, pool, of, gpu);
    const uint32_t count = s->engine->pools[pool].books.max_blocks;
    const size_t bytes = count * sizeof(uint64_t);
    const int fd = ts_stored_sums_take(s->store, pool);
    *c = (ts_blocks_checked){.block_bytes = at.block_bytes};
    *wrong = NULL;
    if (fd < 0) {
        c->blocks = count_full(s->engine, pool);
        return ts_block_sums_add(s, pool, of, gpu, why, why_bytes);
    }
    const off_t has = lseek(fd, 0, SEEK_END);
    uint64_t *sums = has == (off_t)bytes
                         ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                         : MAP_FAILED;
    close(fd);
    if (sums == MAP_FAILED) {
        snprintf(why, why_bytes, "the checksums of %u blocks can't be mapped", count);
        ts_stored_sums_forget(s->store, pool); /* later blocks mustn't be held against them */
        return TS_ENOMEM;
    }
    ts_status status = keep(s, pool, &at, sums, count, why, why_bytes);
    if (status != TS_OK) {
        ts_stored_sums_forget(s->store, pool);
        return status;
    }
    status = compare(s->engine, pool, &at, sums, wrong, c, why, why_bytes);
    c->seconds = (double)(ts_now_ns() - began_ns) * 1e-9;
    if (status == TS_OK) {
        note_tails(&s->pools[pool], &s->engine->pools[pool].seqs);
        return TS_OK;
    }
    free(*wrong);
    *wrong = NULL;
    if (status != TS_EDEVICE) /* else the next daemon goes on with them */
        ts_block_sums_remove(s, pool);
    return status;
}

void ts_block_sums_remove(ts_block_sums *s, uint32_t pool)
{
    if (s == NULL || s->pools[pool].count == 0)
        return;
    pthread_mutex_lock(&s->lock);
    const pool_sums gone = s->pools[pool];
    s->pools[pool].count = 0; /* nothing more of it is read */
    while (s->reading == pool)
        pthread_cond_wait(&s->changed, &s->lock);
    s->pools[pool] = (pool_sums){0};
    pthread_mutex_unlock(&s->lock);
    munmap(gone.sums, gone.count * sizeof *gone.sums);
    free(gone.versions);
    free(gone.appended);
    ts_stored_sums_forget(s->store, pool);
}

uint32_t ts_block_sums_waiting(ts_block_sums *s)
{
    if (s == NULL)
        return 0;
    pthread_mutex_lock(&s->lock);
    const uint32_t waiting = s->tail - s->head + (s->reading != TS_NONE);
    pthread_mutex_unlock(&s->lock);
    return waiting;
}

bool ts_block_sums_keeps(const ts_block_sums *s, uint32_t pool)
{
    return s != NULL && s->pools[pool].count > 0;
}

/* ---- what commands change ---- */

/* The block is to be written anew. Under the lock. */
static void spoil(pool_sums *p, uint32_t block)
{
    p->versions[block]++;
    __atomic_store_n(&p->sums[block], 0, __ATOMIC_RELEASE);
}

void ts_block_sums_leave_slab(ts_block_sums *s, uint32_t pool, uint32_t slab)
{
    if (s == NULL || s->pools[pool].count == 0)
        return;
    pool_sums *p = &s->pools[pool];
    const uint32_t blocks = p->place.slab_blocks;
    pthread_mutex_lock(&s->lock);
    for (uint32_t b = slab * blocks; b < (slab + 1) * blocks && b < p->count; b++)
        spoil(p, b);
    while (s->reading == pool && s->reading_block / blocks == slab)
        pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

void ts_block_sums_before(ts_block_sums *s, const ts_command *c)
{
    if (s == NULL)
        return;
    s->num_committed = 0;
    if (c->op != TS_OP_STEP_COMMIT)
        return;
    const ts_step *step = ts_engine_find_step(s->engine, c->step_end.step);
    if (step == NULL || s->pools[step->pool].count == 0)
        return;
    if (step->num_seqs > s->capacity) {
        committed *larger = realloc(s->committed, step->num_seqs * sizeof *larger);
        if (larger == NULL)
            return; /* these blocks have no checksum */
        s->committed = larger;
        s->capacity = step->num_seqs;
    }
    s->committed_pool = step->pool;
    for (uint32_t i = 0; i < step->num_seqs; i++)
        s->committed[s->num_committed++] = (committed){step->seqs[i].seq, step->seqs[i].start};
}

/* The blocks that the committed tokens have filled get their checksums some time. */
static void queue_full(ts_block_sums *s)
{
    const uint32_t pool = s->committed_pool;
    const ts_sequences *seqs = &s->engine->pools[pool].seqs;
    pool_sums *p = &s->pools[pool];
    pthread_mutex_lock(&s->lock);
    for (uint32_t i = 0; i < s->num_committed; i++) {
        const ts_sequence *seq = &seqs->all[s->committed[i].seq];
        for (uint32_t k = s->committed[i].start / seqs->block_tokens;
             k < seq->length / seqs->block_tokens && s->tail - s->head < QUEUE; k++) {
            const uint32_t block = seq->blocks[k];
            if (p->sums[block] == 0 && !p->appended[block])
                s->queue[s->tail++ % QUEUE] =
                    (full_block){pool, block, p->versions[block], p->life};
        }
    }
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

/* The sequence's tokens from `start` on are written to these blocks: by a step, or, appended, by
 * the worker when it likes. `original`: the block whose copy the first one is, or TS_NONE. */
static void spoil_written(pool_sums *p, const ts_sequence *seq, uint32_t start, uint32_t tokens,
                          uint32_t block_tokens, bool append, uint32_t original)
{
    for (uint32_t k = start / block_tokens; k <= (start + tokens - 1) / block_tokens; k++) {
        const uint32_t block = seq->blocks[k];
        const bool whole = k * block_tokens >= start; /* nothing of it is older */
        const bool before =
            !whole && p->appended[original != TS_NONE ? original : block]; /* which is its first */
        spoil(p, block);
        p->appended[block] = append || before;
    }
}

/* The blocks that the begun step's new tokens, or the appended ones, are written to. */
static void spoil_begun(ts_block_sums *s, const ts_command *c, const ts_answer *answer)
{
    const ts_sequences *seqs = &s->engine->pools[c->pool].seqs;
    const ts_step *step = answer->begun.step;
    pthread_mutex_lock(&s->lock);
    for (uint32_t i = 0; i < c->step_begin.count; i++) {
        const ts_sequence *seq = ts_sequence_find(seqs, c->step_begin.seqs[i]);
        const uint32_t tokens = c->step_begin.new_tokens[i];
        if (seq != NULL && tokens > 0)
            spoil_written(&s->pools[c->pool], seq, seq->length - (step == NULL ? tokens : 0),
                          tokens, seqs->block_tokens, step == NULL,
                          step == NULL ? TS_NONE : step->seqs[i].original);
    }
    pthread_mutex_unlock(&s->lock);
}

void ts_block_sums_after(ts_block_sums *s, const ts_command *c, const ts_answer *answer)
{
    if (s == NULL || answer->status != TS_OK)
        return;
    if (c->op == TS_OP_STEP_BEGIN && s->pools[c->pool].count > 0)
        spoil_begun(s, c, answer);
    else if (s->num_committed > 0)
        queue_full(s);
}

/* ---- the end ---- */

void ts_block_sums_free(ts_block_sums *s)
{
    if (s == NULL)
        return;
    pthread_mutex_lock(&s->lock);
    s->stop = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++) {
        if (s->pools[i].count > 0)
            munmap(s->pools[i].sums, s->pools[i].count * sizeof(uint64_t));
        free(s->pools[i].versions);
        free(s->pools[i].appended);
    }
    free(s->committed);
    free(s);
}
