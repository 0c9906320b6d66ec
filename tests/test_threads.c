/* What is shared between threads: the kernels' team of threads, the batch that joins jobs, and the
 * engine's queue. */
#include "test_util.h"

#include "clock.h"
#include "host_executor.h"
#include "threads.h"
#include "work_queue.h"

#include <math.h>
#include <semaphore.h>
#include <stdatomic.h>

#define ITEMS 37u

typedef struct counts {
    uint32_t items[ITEMS];
    uint32_t threads[8][64]; /* a cache line each: scratch that only its thread touches */
} counts;

static void count_item(void *arg, uint32_t item, uint32_t thread)
{
    counts *c = arg;
    c->items[item]++;
    c->threads[thread][0]++;
}

static void every_item_runs_once_in_every_round(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= 5; n += 2) {
        ts_threads *t = ts_threads_new(n);
        assert_non_null(t);
        assert_int_equal(ts_threads_count(t), n);
        counts c = {0};
        for (int round = 0; round < 2000; round++)
            ts_threads_run(t, round % 3 == 0 ? 1 : ITEMS, count_item, &c);
        uint32_t total = 0;
        for (uint32_t i = 0; i < ITEMS; i++)
            assert_int_equal(c.items[i], i == 0 ? 2000 : 1333);
        for (uint32_t i = 0; i < 8; i++)
            total += c.threads[i][0];
        assert_int_equal(total, 2000 + 36 * 1333);
        ts_threads_run(t, 0, count_item, &c);
        ts_threads_free(t);
    }
}

/* One bit for each thread that took an item of the round. */
static void note_thread(void *arg, uint32_t item, uint32_t thread)
{
    atomic_fetch_or((atomic_uint *)arg, 1u << thread);
    for (uint32_t i = 0; i < 20 * (item % 8); i++)
        ts_pause();
}

static void no_more_threads_take_part_than_are_wanted(void **state)
{
    (void)state;
    ts_threads *t = ts_threads_new(5);
    assert_non_null(t);
    for (uint32_t round = 0; round < 3000; round++) { /* by turns all: they are awake, then */
        atomic_uint seen = 0;
        const uint32_t at_most = round % 2 == 0 ? 5 : 1 + round / 2 % 3;
        const ts_threads_work work = {
            .fn = note_thread, .arg = &seen, .items = ITEMS, .at_most = at_most};
        assert_int_equal(ts_threads_run_from(t, &work, 0), ITEMS);
        assert_in_range(__builtin_popcount(seen), 1, at_most);
        assert_true(at_most > 1 || seen == 1); /* the caller */
    }
    ts_threads_free(t);
}

/* ---- the batch ---- */

enum { JOBS = 400, PRODUCERS = 2 };

typedef struct counted_job {
    ts_job job;
    uint32_t done;
    sem_t *all;
    float q[2 * 32], out[2 * 32];
    ts_attention_seq seq;
} counted_job;

static void on_done(ts_job *job)
{
    counted_job *j = (counted_job *)job;
    j->done++;
    sem_post(j->all);
}

typedef struct producer {
    ts_host_executor *batch;
    counted_job *jobs;
} producer;

static void *produce(void *arg)
{
    producer *p = arg;
    for (int i = 0; i < JOBS; i++)
        ts_host_executor_submit(p->batch, &p->jobs[i].job);
    return NULL;
}

static void jobs_of_many_are_joined_and_each_is_done_once_with_its_own_result(void **state)
{
    (void)state;
    static const uint32_t block = 0;
    ts_geometry g = {.layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = 4};
    static float cache[2 * 4 * 32];
    for (int i = 0; i < 4 * 32; i++)
        /* NOLINTNEXTLINE(bugprone-integer-division): the token */
        cache[4 * 32 + i] = (float)(i / 32); /* V of token t is t everywhere; K is 0 */
    ts_attention *a = ts_attention_new(2, TS_ISA_AUTO);
    ts_host_executor *batch = ts_host_executor_new(a);
    assert_non_null(batch);
    sem_t all;
    sem_init(&all, 0, 0);
    counted_job *jobs = calloc(JOBS * PRODUCERS, sizeof *jobs);
    for (int i = 0; i < JOBS * PRODUCERS; i++) {
        counted_job *j = &jobs[i];
        j->all = &all;
        j->seq = (ts_attention_seq){.blocks = &block,
                                    .kv_tokens = 1 + (uint32_t)i % 4,
                                    .q_tokens = 1,
                                    .q = j->q,
                                    .out = j->out};
        j->job = (ts_job){.geometry = g,
                          .base = (unsigned char *)cache,
                          .seqs = &j->seq,
                          .num_seqs = 1,
                          .heads = 1 + (uint32_t)i % 2, /* two kinds that can't be joined */
                          .variant.scale = 1.0f,
                          .done = on_done};
    }
    pthread_t threads[PRODUCERS];
    producer producers[PRODUCERS];
    for (int i = 0; i < PRODUCERS; i++) {
        producers[i] = (producer){.batch = batch, .jobs = jobs + i * JOBS};
        assert_int_equal(pthread_create(&threads[i], NULL, produce, &producers[i]), 0);
    }
    for (int i = 0; i < JOBS * PRODUCERS; i++)
        while (sem_wait(&all) != 0)
            ;
    for (int i = 0; i < PRODUCERS; i++)
        pthread_join(threads[i], NULL);
    uint64_t runs, launches;
    ts_host_executor_counts(batch, &runs, &launches);
    assert_int_equal(runs, JOBS * PRODUCERS);
    assert_true(launches <= runs);
    ts_host_executor_free(batch);
    for (int i = 0; i < JOBS * PRODUCERS; i++) {
        assert_int_equal(jobs[i].done, 1);
        assert_int_equal(jobs[i].job.status, TS_OK);
        for (int d = 0; d < 32 * (1 + i % 2); d++) /* the mean of tokens 0..i % 4 */
            assert_true(fabsf(jobs[i].out[d] - 0.5f * (float)(i % 4)) < 1e-6f);
    }
    free(jobs);
    sem_destroy(&all);
    ts_attention_free(a);
}

/* Four sequences of one call, the second of which is long enough to be cut and merged. */
enum { TOLD = 4, LONG_TOKENS = 4096, TOLD_DIM = 32, TOLD_BLOCK = 4 };

typedef struct told {
    float out[TOLD][TOLD_DIM];
    uint32_t count, seqs[TOLD];
    uint32_t undone[TOLD]; /* sequences not written yet when each was told of: by one thread */
    uint32_t threads;
    bool drops; /* the last one, when the first is told of */
    bool dropped;
} told;

static bool is_written(const told *t, uint32_t seq)
{
    return t->out[seq][0] == t->out[seq][0]; /* not NaN */
}

static void note_told(void *arg, uint32_t seq)
{
    told *t = arg;
    for (uint32_t i = 0; i < TOLD && t->threads == 1; i++)
        t->undone[t->count] += !is_written(t, i);
    assert_true(t->dropped || is_written(t, seq));
    t->seqs[t->count++] = seq;
    if (t->drops)
        __atomic_store_n(&t->dropped, true, __ATOMIC_RELAXED);
}

static void run_told(told *t, uint32_t threads)
{
    t->threads = threads;
    static uint32_t table[LONG_TOKENS / TOLD_BLOCK]; /* all of it is block 0 */
    static float cache[2 * TOLD_BLOCK * TOLD_DIM], q[TOLD_DIM];
    ts_attention_seq seqs[TOLD];
    for (uint32_t i = 0; i < TOLD; i++) {
        seqs[i] = (ts_attention_seq){.blocks = table,
                                     .kv_tokens = i == 1 ? LONG_TOKENS : 8,
                                     .q_tokens = 1,
                                     .q = q,
                                     .out = t->out[i],
                                     .dropped = i == TOLD - 1 ? &t->dropped : NULL};
        for (uint32_t d = 0; d < TOLD_DIM; d++)
            t->out[i][d] = NAN;
    }
    ts_attention_call call = {
        .geometry = {.layers = 1, .kv_heads = 1, .head_dim = TOLD_DIM, .block_tokens = TOLD_BLOCK},
        .base = (unsigned char *)cache,
        .heads = 1,
        .variant.scale = 1.0f,
        .seqs = seqs,
        .num_seqs = TOLD,
        .seq_done = note_told,
        .seq_done_arg = t};
    ts_attention *a = ts_attention_new(threads, TS_ISA_AUTO);
    assert_non_null(a);
    assert_int_equal(ts_attention_run(a, &call), TS_OK);
    ts_attention_free(a);
}

static void a_sequence_that_is_done_is_told_of_before_the_others_are(void **state)
{
    (void)state;
    told one = {0};
    run_told(&one, 1); /* in order, and none is cut */
    assert_int_equal(one.count, TOLD);
    for (uint32_t i = 0; i < TOLD; i++) {
        assert_int_equal(one.seqs[i], i);
        assert_int_equal(one.undone[i], TOLD - 1 - i);
    }
    told dropped = {.drops = true};
    run_told(&dropped, 1); /* what was dropped meanwhile isn't attended, but over */
    assert_int_equal(dropped.count, TOLD);
    assert_int_equal(dropped.undone[TOLD - 1], 1);
    assert_false(is_written(&dropped, TOLD - 1));
    for (uint32_t round = 0; round < 200; round++) {
        told many = {0};
        run_told(&many, 3);
        for (uint32_t i = 0; i < TOLD; i++)
            assert_true(is_written(&many, i));
        assert_in_range(many.count, 0, TOLD - 1); /* never of the one that is merged */
        for (uint32_t i = 0; i < many.count; i++)
            assert_int_not_equal(many.seqs[i], 1);
    }
}

/* Jobs of one launch, which are freed as soon as they are told. */
enum { JOINED = 5, JOINED_SEQS = 3, JOINED_TOKENS = 8 };

typedef struct joined_test joined_test;

typedef struct joined {
    ts_job job;
    joined_test *test;
    uint32_t number;
    ts_attention_seq seqs[JOINED_SEQS];
    uint32_t blocks[LONG_TOKENS / TOLD_BLOCK];
    float q[TOLD_DIM];
} joined;

struct joined_test {
    joined *jobs[JOINED]; /* NULL: told, and freed */
    float out[JOINED][JOINED_SEQS][TOLD_DIM];
    uint32_t told, order[JOINED], undone[JOINED]; /* jobs that have an unwritten row, at each */
    bool watches;                                 /* no other thread writes */
};

static bool is_whole(const joined_test *t, uint32_t job)
{
    const joined *j = t->jobs[job];
    for (uint32_t i = 0; i < j->job.num_seqs; i++)
        if (j->seqs[i].q_tokens > 0 && t->out[job][i][0] != t->out[job][i][0])
            return false;
    return true;
}

static void on_joined_done(ts_job *job)
{
    joined *j = (joined *)job;
    joined_test *t = j->test;
    assert_int_equal(job->status, job->dropped ? TS_ECONN : TS_OK);
    assert_true(job->dropped || is_whole(t, j->number));
    for (uint32_t i = 0; i < JOINED && t->watches; i++)
        t->undone[t->told] += t->jobs[i] != NULL && !is_whole(t, i);
    t->order[t->told++] = j->number;
    t->jobs[j->number] = NULL;
    memset(j, 0x5a, sizeof *j); /* what is still read of it goes wrong */
    free(j);
}

/* Job 0 is the longest; the second of its sequences, with several threads, is cut. Job 2 was
 * dropped, and job 3's first sequence has no query. */
static void run_joined(joined_test *t, uint32_t threads)
{
    static float cache[2 * TOLD_BLOCK * TOLD_DIM];
    const uint32_t counts[JOINED] = {3, 1, 2, 3, 2};
    ts_job *first = NULL;
    for (uint32_t n = JOINED; n-- > 0;) {
        joined *j = t->jobs[n] = calloc(1, sizeof *j);
        assert_non_null(j);
        *j = (joined){.test = t, .number = n};
        for (uint32_t i = 0; i < counts[n]; i++) {
            j->seqs[i] = (ts_attention_seq){.blocks = j->blocks,
                                            .kv_tokens = JOINED_TOKENS,
                                            .q_tokens = n == 3 && i == 0 ? 0 : 1,
                                            .q = j->q,
                                            .out = t->out[n][i],
                                            .dropped = &j->job.dropped};
            for (uint32_t d = 0; d < TOLD_DIM; d++)
                t->out[n][i][d] = NAN;
        }
        if (n == 0)
            j->seqs[1].kv_tokens = LONG_TOKENS;
        j->job = (ts_job){.next = first,
                          .dropped = n == 2,
                          .geometry = {.layers = 1,
                                       .kv_heads = 1,
                                       .head_dim = TOLD_DIM,
                                       .block_tokens = TOLD_BLOCK},
                          .base = (unsigned char *)cache,
                          .seqs = j->seqs,
                          .num_seqs = counts[n],
                          .heads = 1,
                          .variant.scale = 1.0f,
                          .done = on_joined_done};
        first = &j->job;
    }
    t->watches = threads == 1;
    ts_attention *a = ts_attention_new(threads, TS_ISA_AUTO);
    ts_host_executor *executor = ts_host_executor_new(a);
    assert_non_null(executor);
    assert_true(ts_host_executor_try_run(executor, first));
    uint64_t runs, launches;
    ts_host_executor_counts(executor, &runs, &launches);
    assert_int_equal(runs, JOINED);
    assert_int_equal(launches, 1);
    assert_int_equal(t->told, JOINED);
    ts_host_executor_free(executor);
    ts_attention_free(a);
}

static void a_joined_job_is_told_when_its_own_sequences_are_done_the_shortest_first(void **state)
{
    (void)state;
    joined_test one = {0};
    run_joined(&one, 1);
    const uint32_t order[JOINED] = {1, 2, 3, 4, 0};  /* by work, and then as they came */
    const uint32_t undone[JOINED] = {4, 4, 2, 1, 0}; /* the dropped one never is whole */
    for (uint32_t i = 0; i < JOINED; i++) {
        assert_int_equal(one.order[i], order[i]);
        assert_int_equal(one.undone[i], undone[i]);
    }
    for (uint32_t round = 0; round < 300; round++) {
        joined_test many = {0};
        run_joined(&many, 3);
        assert_int_equal(many.order[JOINED - 1], 0); /* its cut sequence is merged last */
    }
}

static void what_is_cancelled_says_so(void **state)
{
    (void)state;
    static const uint32_t block = 0;
    static float cache[2 * 4 * 32], q[32], out[32];
    ts_attention *a = ts_attention_new(1, TS_ISA_AUTO);
    ts_attention_seq seq = {.blocks = &block, .kv_tokens = 1, .q_tokens = 1, .q = q, .out = out};
    ts_attention_call call = {
        .geometry = {.layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = 4},
        .base = (unsigned char *)cache,
        .heads = 1,
        .variant.scale = 1.0f,
        .seqs = &seq,
        .num_seqs = 1};
    assert_int_equal(ts_attention_run(a, &call), TS_OK);
    ts_attention_cancel(a);
    assert_int_equal(ts_attention_run(a, &call), TS_ECONN);
    ts_attention_free(a);
}

/* ---- the queue ---- */

enum { BRINGERS = 4, PIECES = 20000 };

typedef struct owned_state { /* plain memory: only the owner may touch it */
    uint32_t inside, overlaps, disorder, total, next[BRINGERS];
} owned_state;

typedef struct piece {
    ts_work work;
    uint32_t bringer, number;
} piece;

typedef struct bringer {
    ts_queue *queue;
    owned_state *state;
    piece *pieces;
} bringer;

static void run_piece(ts_work *work, void *arg)
{
    owned_state *s = arg;
    piece *p = (piece *)work;
    s->overlaps += s->inside++ != 0;
    s->disorder += s->next[p->bringer] != p->number;
    s->next[p->bringer] = p->number + 1;
    s->total++;
    s->inside--;
}

static void *bring(void *arg)
{
    bringer *b = arg;
    for (uint32_t i = 0; i < PIECES; i++)
        if (i % 3 == 0)
            ts_queue_put(b->queue, &b->pieces[i].work);
        else
            ts_queue_run(b->queue, &b->pieces[i].work, b->state);
    return NULL;
}

static void *take_all(void *arg)
{
    bringer *b = arg;
    for (ts_work *work; (work = ts_queue_take(b->queue)) != NULL;)
        for (ts_work *next; work != NULL; work = next) {
            next = work->next;
            work->run(work, b->state);
        }
    return NULL;
}

static void work_is_run_once_in_order_by_one_thread_at_a_time(void **state)
{
    (void)state;
    ts_queue queue;
    owned_state owned = {0};
    pthread_t threads[BRINGERS], taker;
    bringer bringers[BRINGERS];
    piece *pieces = calloc(BRINGERS * PIECES, sizeof *pieces);
    assert_non_null(pieces);
    ts_queue_init(&queue);
    for (uint32_t i = 0; i < BRINGERS * PIECES; i++)
        pieces[i] = (piece){.work.run = run_piece, .bringer = i / PIECES, .number = i % PIECES};
    for (uint32_t i = 0; i < BRINGERS; i++)
        bringers[i] = (bringer){&queue, &owned, pieces + (size_t)i * PIECES};
    assert_int_equal(pthread_create(&taker, NULL, take_all, &bringers[0]), 0);
    for (uint32_t i = 0; i < BRINGERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, bring, &bringers[i]), 0);
    for (uint32_t i = 0; i < BRINGERS; i++)
        pthread_join(threads[i], NULL);
    ts_queue_close(&queue);
    pthread_join(taker, NULL); /* what was put in before is done by now */
    assert_int_equal(owned.total, BRINGERS * PIECES);
    assert_int_equal(owned.overlaps, 0);
    assert_int_equal(owned.disorder, 0);

    /* Closed: work that comes too late is kept for ts_queue_drop, not run. */
    piece *late = calloc(1, sizeof *late);
    assert_non_null(late);
    late->work.run = run_piece;
    ts_queue_run(&queue, &late->work, &owned);
    assert_int_equal(owned.total, BRINGERS * PIECES);
    ts_queue_drop(&queue);
    ts_queue_fini(&queue);
    free(pieces);
}

static void an_idle_queue_runs_work_on_the_thread_that_brings_it(void **state)
{
    (void)state;
    ts_queue queue;
    owned_state owned = {0};
    piece first = {.work.run = run_piece}, second = {.work.run = run_piece, .number = 1};
    ts_queue_init(&queue);
    ts_queue_run(&queue, &first.work, &owned);
    assert_int_equal(owned.total, 1);
    ts_queue_put(&queue, &second.work);
    assert_int_equal(owned.total, 1);
    assert_ptr_equal(ts_queue_take(&queue), &second.work);
    piece third = {.work.run = run_piece, .number = 1};
    ts_queue_run(&queue, &third.work, &owned); /* the taker owns the engine until it asks again */
    assert_int_equal(owned.total, 1);
    assert_ptr_equal(ts_queue_take(&queue), &third.work);
    ts_queue_close(&queue);
    assert_null(ts_queue_take(&queue));
    ts_queue_fini(&queue);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_item_runs_once_in_every_round),
        cmocka_unit_test(no_more_threads_take_part_than_are_wanted),
        cmocka_unit_test(jobs_of_many_are_joined_and_each_is_done_once_with_its_own_result),
        cmocka_unit_test(a_sequence_that_is_done_is_told_of_before_the_others_are),
        cmocka_unit_test(a_joined_job_is_told_when_its_own_sequences_are_done_the_shortest_first),
        cmocka_unit_test(what_is_cancelled_says_so),
        cmocka_unit_test(work_is_run_once_in_order_by_one_thread_at_a_time),
        cmocka_unit_test(an_idle_queue_runs_work_on_the_thread_that_brings_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
