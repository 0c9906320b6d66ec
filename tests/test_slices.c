/* Attention bit by bit: the same bits as in one go, long jobs make way, dropped ones end. */
#include "attention_util.h"

#include "host_executor.h"

#include <semaphore.h>

/* ---- one call, with pauses ---- */

typedef struct pauses {
    uint32_t asked, every;
} pauses;

/* Each `every`th time that one of the threads asks. */
static bool sometimes(void *arg)
{
    pauses *p = arg;
    return __atomic_add_fetch(&p->asked, 1, __ATOMIC_RELAXED) % p->every == 0;
}

static shape shape_of(ts_dtype dtype, uint32_t heads, uint32_t kv_heads)
{
    return (shape){.dtype = dtype,
                   .io = dtype,
                   .heads = heads,
                   .kv_heads = kv_heads,
                   .head_dim = 64,
                   .block_tokens = 16,
                   .layers = 1};
}

/* The shape's call once in one go and once with pauses, in how many turns. */
static uint32_t compare(shape s, const uint32_t (*lengths)[2], uint32_t num_seqs, uint32_t threads,
                        uint32_t every)
{
    problem whole, cut;
    rng r = {17}, again = {17};
    problem_new(&whole, s, lengths, num_seqs, &r);
    problem_new(&cut, s, lengths, num_seqs, &again);
    for (uint32_t i = 0; i < num_seqs; i++)
        assert_true(whole.seqs[i].k != NULL); /* new K and V are written too */
    ts_attention *a = ts_attention_new(threads, TS_ISA_AUTO);
    assert_int_equal(ts_attention_run(a, &whole.call), TS_OK);
    pauses p = {.every = every};
    ts_attention_task *task = ts_attention_task_new(a, &cut.call);
    assert_non_null(task);
    uint32_t turns = 0;
    for (bool done = false; !done; turns++)
        assert_int_equal(ts_attention_task_run(task, sometimes, &p, &done), TS_OK);
    ts_attention_task_free(task);
    assert_memory_equal(whole.out, cut.out, whole.q_elements * ts_dtype_bytes(s.io));
    assert_memory_equal(whole.cache, cut.cache, whole.cache_bytes);
    ts_attention_free(a);
    problem_free(&whole);
    problem_free(&cut);
    return turns;
}

static void a_call_with_pauses_has_the_bits_of_one_without(void **state)
{
    (void)state;
    static const uint32_t lengths[][3][2] = {
        {{40, 40}, {3000, 17}, {5, 1}},
        {{700, 600}, {64, 0}, {300, 300}},
        {{4097, 1}, {2500, 1}, {1, 1}},
    };
    const shape s = shape_of(TS_DTYPE_FP16, 8, 2);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        assert_true(compare(s, lengths[i], 3, 1, 2) > 2);
        assert_true(compare(s, lengths[i], 3, 3, 5) > 1);
    }
}

static void a_call_of_several_windows_has_the_bits_of_its_rows_alone(void **state)
{
    (void)state;
    enum { N = 3600 };
    const shape s = shape_of(TS_DTYPE_FP32, 8, 1);
#ifdef __SANITIZE_THREAD__
    skip(); /* it has one thread */
#endif
    problem p;
    rng r = {3};
    problem_new(&p, s, (const uint32_t[][2]){{N, N}}, 1, &r);
    ts_attention *a = ts_attention_new(1, TS_ISA_AUTO);
    assert_true(ts_attention_work(&p.call) > 64.0 * (double)TS_ITEM_WORK); /* of one window */
    assert_int_equal(ts_attention_run(a, &p.call), TS_OK);
    const size_t row = 8 * 64 * sizeof(float);
    float out[8 * 64];
    for (uint32_t t = 0; t < N; t += 199) { /* its K and V are there */
        ts_attention_seq one = p.seqs[0];
        ts_attention_call call = p.call;
        one.q = p.q + t * row;
        one.k = one.v = NULL;
        one.out = out;
        one.kv_tokens = t + 1;
        one.q_tokens = 1;
        call.seqs = &one;
        assert_int_equal(ts_attention_run(a, &call), TS_OK);
        assert_memory_equal(out, p.out + t * row, row);
    }
    ts_attention_free(a);
    problem_free(&p);
}

static void a_dropped_call_skips_what_is_left(void **state)
{
    (void)state;
    const shape s = shape_of(TS_DTYPE_FP32, 2, 1);
    problem p;
    rng r = {3};
    bool dropped = false;
    problem_new(&p, s, (const uint32_t[][2]){{2000, 2000}}, 1, &r);
    poison(&p);
    p.seqs[0].dropped = &dropped;
    ts_attention *a = ts_attention_new(1, TS_ISA_AUTO);
    ts_attention_task *task = ts_attention_task_new(a, &p.call);
    pauses soon = {.every = 20}; /* after the 8 pieces of new tokens, and some items */
    bool done = true;
    assert_int_equal(ts_attention_task_run(task, sometimes, &soon, &done), TS_OK);
    assert_false(done);
    dropped = true;
    assert_int_equal(ts_attention_task_run(task, NULL, NULL, &done), TS_OK);
    assert_true(done);
    assert_false(isnan(get(p.out, TS_DTYPE_FP32, 0)));
    assert_true(isnan(get(p.out, TS_DTYPE_FP32, p.q_elements - 1)));
    ts_attention_task_free(task);
    ts_attention_free(a);
    problem_free(&p);
}

/* ---- jobs ---- */

typedef struct told_job {
    ts_job job;
    ts_attention_seq seq;
    sem_t done;
    uint32_t *order, place; /* a counter of all, and its value when this one was done */
} told_job;

static void on_done(ts_job *job)
{
    told_job *j = (told_job *)job;
    j->place = __atomic_add_fetch(j->order, 1, __ATOMIC_RELAXED);
    sem_post(&j->done);
}

static void await(told_job *j)
{
    while (sem_wait(&j->done) != 0)
        ;
}

enum { LONG = 60000, HEADS = 16 }; /* minutes of work */

static const ts_geometry tiny = {
    .layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = 65536, .dtype = TS_DTYPE_FP32};
static const uint32_t block_zero;

typedef struct world {
    ts_attention *attention;
    ts_host_executor *executor;
    unsigned char *cache;
    float *rows;
    uint32_t order;
} world;

static void world_new(world *w)
{
    w->order = 0;
    w->attention = ts_attention_new(1, TS_ISA_AUTO);
    w->executor = ts_host_executor_new(w->attention);
    w->cache = calloc(1, ts_geometry_block_bytes(&tiny));
    w->rows = calloc((size_t)LONG * HEADS * 32 * 2, sizeof *w->rows);
    assert_true(w->executor != NULL && w->cache != NULL && w->rows != NULL);
}

static void world_free(world *w)
{
    ts_host_executor_free(w->executor);
    ts_attention_free(w->attention);
    free(w->cache);
    free(w->rows);
}

static void submit(world *w, told_job *j, uint32_t tokens, uint32_t tenant, uint32_t session)
{
    sem_init(&j->done, 0, 0);
    j->order = &w->order;
    j->seq = (ts_attention_seq){.blocks = &block_zero,
                                .kv_tokens = tokens,
                                .q_tokens = tokens,
                                .q = w->rows,
                                .out = w->rows + (size_t)LONG * HEADS * 32,
                                .dropped = &j->job.dropped};
    j->job = (ts_job){.geometry = tiny,
                      .base = w->cache,
                      .seqs = &j->seq,
                      .num_seqs = 1,
                      .heads = HEADS,
                      .variant.scale = 1.0f,
                      .tenant = tenant,
                      .session = session,
                      .done = on_done};
    ts_host_executor_submit(w->executor, &j->job);
}

static void a_long_job_makes_way_and_ends_when_it_is_dropped(void **state)
{
    (void)state;
    world w;
    static told_job hog, quick[20];
    world_new(&w);
    submit(&w, &hog, LONG, 0, 1);
    for (int i = 0; i < 20; i++) {
        submit(&w, &quick[i], 8, 0, 2);
        await(&quick[i]); /* while the long one goes on */
        assert_int_equal(quick[i].job.status, TS_OK);
        assert_int_equal(quick[i].place, i + 1);
    }
    assert_true(ts_host_executor_pauses(w.executor) >= 1);
    ts_job_drop(&hog.job);
    await(&hog);
    assert_int_equal(hog.job.status, TS_ECONN);
    assert_non_null(strstr(hog.job.why, "the run was dropped"));
    world_free(&w);
}

/* How often long jobs made way until a tenant's only job, which takes some turns, was done beside
 * `sessions` sessions of another's. */
static uint64_t pauses_beside(uint32_t sessions)
{
    world w;
    static told_job hogs[30], other;
    world_new(&w);
    for (uint32_t i = 0; i < sessions; i++)
        submit(&w, &hogs[i], LONG, 0, i);
    submit(&w, &other, 1500, 1, 77);
    await(&other);
    assert_int_equal(other.job.status, TS_OK);
    assert_int_equal(other.place, 1);
    uint64_t pauses = ts_host_executor_pauses(w.executor);
    for (uint32_t i = 0; i < sessions; i++)
        ts_job_drop(&hogs[i].job);
    for (uint32_t i = 0; i < sessions; i++)
        await(&hogs[i]);
    world_free(&w);
    return pauses;
}

static void a_tenant_with_many_sessions_has_no_more_turns_than_another(void **state)
{
    (void)state;
    uint64_t one = pauses_beside(1), many = pauses_beside(30);
    assert_true(one > 1);
    if (many > 5 * one) /* 15 times as many, were all sessions treated alike */
        fail_msg("%llu pauses beside one session, %llu beside thirty", (unsigned long long)one,
                 (unsigned long long)many);
}

static void many_copies_make_way_too(void **state)
{
    (void)state;
    enum { COPIES = 20000 };
    world w;
    static told_job quick, copies;
    static ts_block_copy list[COPIES];
    world_new(&w);
    unsigned char *blocks = calloc(3, ts_geometry_block_bytes(&tiny));
    assert_non_null(blocks);
    for (uint32_t i = 0; i < COPIES; i++)
        list[i] = (ts_block_copy){.src = 0, .dst = 1 + i % 2}; /* 16 MiB each: 300 GB */
    sem_init(&copies.done, 0, 0);
    copies.order = &w.order;
    copies.job = (ts_job){.geometry = tiny,
                          .base = blocks,
                          .copies = list,
                          .num_copies = COPIES,
                          .session = 5,
                          .done = on_done};
    ts_host_executor_submit(w.executor, &copies.job);
    submit(&w, &quick, 8, 0, 2);
    await(&quick);
    assert_int_equal(quick.place, 1);
    ts_job_drop(&copies.job);
    await(&copies);
    assert_int_equal(copies.job.status, TS_ECONN);
    world_free(&w);
    free(blocks);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_call_with_pauses_has_the_bits_of_one_without),
        cmocka_unit_test(a_call_of_several_windows_has_the_bits_of_its_rows_alone),
        cmocka_unit_test(a_dropped_call_skips_what_is_left),
        cmocka_unit_test(a_long_job_makes_way_and_ends_when_it_is_dropped),
        cmocka_unit_test(a_tenant_with_many_sessions_has_no_more_turns_than_another),
        cmocka_unit_test(many_copies_make_way_too),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
