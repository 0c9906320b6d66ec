/*
 * Launches, copies of blocks, and both memory providers of a GPU. Needs one; exits with 77 where
 * there is none.
 */
#include "device_problem.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static void copying_blocks_moves_every_byte_and_no_other(void **state)
{
    (void)state;
    static const size_t sizes[] = {36, 48, 66, 4096, 98304};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t bytes = sizes[i];
        unsigned char *host = malloc(6 * bytes), *back = malloc(6 * bytes), *device;
        for (size_t j = 0; j < 6 * bytes; j++)
            host[j] = (unsigned char)(j * 7 + j / 251);
        CUDA_OK(cudaMalloc((void **)&device, 6 * bytes));
        to_device(device, host, 6 * bytes);
        ts_block_copy copies[] = {{.src = 4, .dst = 1}, {.src = 0, .dst = 5}};
        ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
        assert_int_equal(ts_gpu_launch_copies(l, device, bytes, copies, 2), TS_OK);
        assert_int_equal(ts_gpu_launch_finish(l, NULL, NULL), TS_OK);
        CUDA_OK(cudaDeviceSynchronize());
        CUDA_OK(cudaMemcpy(back, device, 6 * bytes, cudaMemcpyDeviceToHost));
        memcpy(host + bytes, host + 4 * bytes, bytes);
        memcpy(host + 5 * bytes, host, bytes);
        assert_memory_equal(back, host, 6 * bytes);
        CUDA_OK(cudaFree(device));
        free(host);
        free(back);
    }
}

/* A page of pinned words, which are 0; *device: where the device finds them. */
static uint32_t *words_new(uint32_t **device)
{
    void *words = NULL;
    assert_int_equal(posix_memalign(&words, 4096, 4096), 0);
    memset(words, 0, 4096);
    OK(ts_gpu_pin(gpu, words, 4096, (void **)device, why, sizeof why));
    return words;
}

static void words_free(uint32_t *words)
{
    CUDA_OK(cudaHostUnregister(words));
    free(words);
}

/* A launch that waits for a word goes on when the host writes it, and its signal comes after. */
static void a_launch_waits_for_its_word_and_signals(void **state)
{
    (void)state;
    uint32_t *device, *words = words_new(&device);
    sem_t done;
    sem_init(&done, 0, 0);
    ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
    assert_int_equal(ts_gpu_launch_wait(l, &device[0], 5), TS_OK);
    assert_int_equal(ts_gpu_launch_signal(l, (ts_gpu_signal[]){{&device[16], 9}}, 1), TS_OK);
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    assert_int_equal(sem_trywait(&done), -1);
    assert_int_equal(__atomic_load_n(&words[16], __ATOMIC_ACQUIRE), 0);
    __atomic_store_n(&words[0], 5, __ATOMIC_RELEASE);
    while (sem_wait(&done) != 0)
        ;
    assert_int_equal(__atomic_load_n(&words[16], __ATOMIC_ACQUIRE), 9);
    words_free(words);
}

/* Few signals and many, by whatever way, are all told behind what was queued before. */
static void any_number_of_signals_is_told(void **state)
{
    (void)state;
    enum { MOST = 200 };
    uint32_t *device, *words = words_new(&device);
    sem_t done;
    sem_init(&done, 0, 0);
    static const uint32_t counts[] = {0, 1, 2, 3, 64, 65, 66, MOST};
    for (uint32_t round = 1; round <= sizeof counts / sizeof *counts; round++) {
        const uint32_t count = counts[round - 1];
        ts_gpu_signal signals[MOST];
        for (uint32_t i = 0; i < MOST; i++)
            signals[i] = (ts_gpu_signal){&device[16 + i], round};
        ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
        OK(ts_gpu_launch_wait(l, &device[0], round));
        OK(ts_gpu_launch_signal(l, signals, count));
        OK(ts_gpu_launch_finish(l, post, &done));
        for (uint32_t i = 0; i < MOST; i++)
            assert_true(__atomic_load_n(&words[16 + i], __ATOMIC_ACQUIRE) < round);
        __atomic_store_n(&words[0], round, __ATOMIC_RELEASE);
        while (sem_wait(&done) != 0)
            ;
        for (uint32_t i = 0; i < MOST; i++)
            assert_int_equal(__atomic_load_n(&words[16 + i], __ATOMIC_ACQUIRE) == round, i < count);
    }
    words_free(words);
}

/* Launches whose ends their signals tell end in any order, each behind its signals, and are free
 * again then. */
static void a_launchs_end_is_seen_behind_its_signals(void **state)
{
    (void)state;
    uint32_t *device, *words = words_new(&device);
    sem_t done[3];
    for (uint32_t round = 1; round <= 100; round++) { /* more often than there are launches */
        for (uint32_t i = 0; i < 3; i++) {
            sem_init(&done[i], 0, 0);
            ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
            OK(ts_gpu_launch_wait(l, &device[i], round));
            OK(ts_gpu_launch_signal(l, (ts_gpu_signal[]){{&device[16 + i], round}}, 1));
            OK(ts_gpu_launch_finish(l, post, &done[i]));
        }
        for (uint32_t n = 0; n < 3; n++) {
            const uint32_t i = (round + n) % 3;
            for (uint32_t later = n; later < 3; later++)
                assert_int_equal(sem_trywait(&done[(round + later) % 3]), -1);
            __atomic_store_n(&words[i], round, __ATOMIC_RELEASE);
            while (sem_wait(&done[i]) != 0)
                ;
            assert_int_equal(__atomic_load_n(&words[16 + i], __ATOMIC_ACQUIRE), round);
        }
    }
    words_free(words);
}

/* A launch starts after the one that it is queued behind, and one that is queued behind what is
 * done starts at once. */
static void a_launch_follows_the_one_before_it(void **state)
{
    (void)state;
    uint32_t *device, *words = words_new(&device);
    sem_t done;
    sem_init(&done, 0, 0);
    ts_gpu_position position = {0};
    for (uint32_t round = 1; round <= 100; round++) {
        for (uint32_t i = 0; i < 4; i++) {
            ts_gpu_launch *l = ts_gpu_launch_take(gpu, i == 3 ? NULL : &position);
            ts_gpu_signal signal = {i == 3 ? &device[48] : &device[16],
                                    i == 3 ? round : round * 2 + i - 2};
            if (i == 0)
                OK(ts_gpu_launch_wait(l, &device[0], round));
            else
                OK(ts_gpu_launch_signal(l, &signal, 1));
            OK(ts_gpu_launch_finish(l, post, &done));
        }
        while (sem_wait(&done) != 0) /* the one that is queued behind nothing */
            ;
        assert_int_equal(__atomic_load_n(&words[48], __ATOMIC_ACQUIRE), round);
        assert_int_equal(__atomic_load_n(&words[16], __ATOMIC_ACQUIRE), round * 2 - 2);
        __atomic_store_n(&words[0], round, __ATOMIC_RELEASE);
        for (int i = 0; i < 3; i++)
            while (sem_wait(&done) != 0)
                ;
        assert_int_equal(__atomic_load_n(&words[16], __ATOMIC_ACQUIRE), round * 2);
    }
    words_free(words);
}

/* Runs of one plan in one launch, which attend into the same place. */
enum { RUNS_MOST = 70, ROUNDS = 20 };

/* Whoever sees a run's word sees what was attended: all of it, in each of many rounds. Every third
 * run has one word alone, and the one after it none. */
static void tell_runs(device_problem *d, ts_kernel kernel, uint32_t num_runs)
{
    uint32_t *device, *words = words_new(&device);
    unsigned char *expected = malloc(d->q_bytes);
    ts_gpu_plan *plan;
    ts_gpu_run runs[RUNS_MOST];
    sem_t done;
    sem_init(&done, 0, 0);
    run(d, &d->call, kernel);
    memcpy(expected, d->p.out, d->q_bytes);
    OK(ts_gpu_plan_new(gpu, &d->call.geometry, d->call.heads, d->call.io_dtype, kernel, d->seqs,
                       d->call.num_seqs, &plan, why, sizeof why));
    for (uint32_t round = 1; round <= ROUNDS; round++) {
        poison_device(d);
        for (uint32_t i = 0; i < num_runs; i++)
            runs[i] = (ts_gpu_run){.plan = plan,
                                   .q = d->q,
                                   .k = d->k,
                                   .v = d->v,
                                   .out = d->out,
                                   .scales = d->seqs[0].scales,
                                   .words = {i % 3 == 2 ? NULL : &device[16 + 2 * i],
                                             i % 3 == 0 ? &device[17 + 2 * i] : NULL},
                                   .number = round * 100 + i};
        ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
        OK(ts_gpu_launch_wait(l, &device[0], round));
        if (ts_gpu_launch_attend(l, d->call.base, &d->call.variant, runs, num_runs) != TS_OK)
            fail_msg("%s", ts_gpu_launch_why(l));
        OK(ts_gpu_launch_finish(l, post, &done));
        for (uint32_t i = 0; i < 2 * num_runs; i++)
            assert_true(__atomic_load_n(&words[16 + i], __ATOMIC_ACQUIRE) < round * 100);
        __atomic_store_n(&words[0], round, __ATOMIC_RELEASE);
        while (__atomic_load_n(&words[17], __ATOMIC_ACQUIRE) != round * 100)
            sched_yield();
        CUDA_OK(cudaMemcpy(d->p.out, d->out, d->q_bytes, cudaMemcpyDeviceToHost));
        assert_memory_equal(d->p.out, expected, d->q_bytes);
        while (sem_wait(&done) != 0)
            ;
        for (uint32_t i = 0; i < num_runs; i++) {
            assert_int_equal(words[16 + 2 * i], i % 3 == 2 ? 0 : round * 100 + i);
            assert_int_equal(words[17 + 2 * i], i % 3 == 0 ? round * 100 + i : 0);
        }
    }
    ts_gpu_plan_free(plan);
    free(expected);
    words_free(words);
}

/* The kernel, unless it can't attend this. */
static void tell_runs_of(device_problem *d, ts_kernel kernel, uint32_t num_runs)
{
    if (ts_kernel_check(kernel, &d->call.geometry, warp_groups(), why, sizeof why) == TS_OK)
        tell_runs(d, kernel, num_runs);
}

static void runs_words_are_told_when_all_is_done(void **state)
{
    (void)state;
    /* Few rows, some more, many, prefill, new tokens alone, and a mix that takes several kernels.
     */
    static const uint32_t batches[][3][2] = {
        {{1000, 1}, {33, 1}, {4000, 1}}, {{1000, 4}, {700, 3}, {333, 4}},
        {{1000, 8}, {700, 7}, {333, 8}}, {{300, 300}, {200, 70}, {90, 90}},
        {{1, 1}, {2, 1}, {3, 1}},        {{1000, 1}, {300, 300}, {700, 8}}};
    static const struct {
        ts_dtype dtype, io;
        uint32_t head_dim;
    } shapes[] = {{TS_DTYPE_BF16, TS_DTYPE_BF16, 64},
                  {TS_DTYPE_BF16, TS_DTYPE_BF16, 128},
                  {TS_DTYPE_FP16, TS_DTYPE_FP16, 256},
                  {TS_DTYPE_FP8_E4M3, TS_DTYPE_BF16, 128},
                  {TS_DTYPE_FP32, TS_DTYPE_FP32, 128}};
    static const ts_kernel kernels[] = {TS_KERNEL_AUTO, TS_KERNEL_V5, TS_KERNEL_MMA, TS_KERNEL_V3};
    static const uint32_t counts[] = {1, 2, 28, 29, RUNS_MOST};
    rng r = {17};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
            device_problem d;
            device_problem_new(&d,
                               (shape){.dtype = shapes[s].dtype,
                                       .io = shapes[s].io,
                                       .heads = 8,
                                       .kv_heads = 2,
                                       .head_dim = shapes[s].head_dim,
                                       .block_tokens = 16,
                                       .layers = 1},
                               batches[b], 3, &r);
            OK(ts_gpu_load(gpu, &d.call.geometry, why, sizeof why));
            /* The first shape by every kernel, in any number; others by the best. */
            for (size_t k = 0; k < (s == 0 ? sizeof kernels / sizeof *kernels : 1); k++)
                for (size_t n = s == 0 ? 0 : 1; n < (s == 0 ? sizeof counts / sizeof *counts : 2);
                     n++)
                    tell_runs_of(&d, kernels[k], counts[n]);
            device_problem_free(&d);
        }
}

/* Ends the wait of a launch if that takes too long. */
typedef struct rescue {
    pthread_mutex_t lock;
    pthread_cond_t over;
    bool done, needed;
    uint32_t *word;
} rescue;

static void *rescue_main(void *arg)
{
    rescue *r = arg;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 5;
    pthread_mutex_lock(&r->lock);
    while (!r->done && !r->needed)
        if (pthread_cond_timedwait(&r->over, &r->lock, &until) != 0) {
            r->needed = true;
            __atomic_store_n(r->word, 1, __ATOMIC_RELEASE);
        }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* Whether `work` comes to its end while a launch waits for a worker. */
static bool while_a_launch_waits(const char *what, void (*work)(device_problem *d),
                                 device_problem *d)
{
    uint32_t *device, *words = words_new(&device);
    sem_t done;
    sem_init(&done, 0, 0);
    ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
    assert_int_equal(ts_gpu_launch_wait(l, device, 1), TS_OK);
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    rescue r = {.lock = PTHREAD_MUTEX_INITIALIZER, .over = PTHREAD_COND_INITIALIZER, .word = words};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, rescue_main, &r), 0);
    work(d);
    pthread_mutex_lock(&r.lock);
    r.done = true;
    pthread_cond_signal(&r.over);
    pthread_mutex_unlock(&r.lock);
    pthread_join(thread, NULL);
    if (r.needed)
        print_error("%s waited for the launch that waits\n", what);
    __atomic_store_n(words, 1, __ATOMIC_RELEASE);
    while (sem_wait(&done) != 0)
        ;
    words_free(words);
    return !r.needed;
}

static void wait_launch(ts_gpu_launch *l)
{
    sem_t done;
    sem_init(&done, 0, 0);
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    while (sem_wait(&done) != 0)
        ;
}

/* By each kernel, for the first time in this process: what a first launch has to wait for shows. */
static void do_attend(device_problem *d)
{
    for (int kernel = TS_KERNEL_AUTO; kernel < TS_KERNEL_COUNT; kernel++)
        if (ts_kernel_check((ts_kernel)kernel, &d->call.geometry, warp_groups(), why, sizeof why) ==
            TS_OK)
            attend(&d->call, (ts_kernel)kernel);
}

/* A plan and partial results larger than what is kept for them from the start. */
static void do_attend_much(device_problem *d)
{
    enum { MANY = 300000 };
    uint32_t *blocks = malloc(MANY * sizeof *blocks);
    for (uint32_t i = 0; i < MANY; i++)
        blocks[i] = d->seqs[0].blocks[0];
    ts_attention_seq one = d->seqs[0];
    one.blocks = blocks;
    one.kv_tokens = MANY * d->call.geometry.block_tokens;
    ts_attention_call call = d->call;
    call.seqs = &one;
    call.num_seqs = 1;
    attend(&call, TS_KERNEL_AUTO);
    free(blocks);
}

static void do_copies(device_problem *d)
{
    ts_block_copy copy = {.src = 0, .dst = 1};
    ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
    assert_int_equal(ts_gpu_launch_copies(l, d->memory->base, 4096, &copy, 1), TS_OK);
    wait_launch(l);
}

static void do_pin(device_problem *d)
{
    (void)d;
    void *there,
        *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    OK(ts_gpu_pin(gpu, page, 4096, &there, why, sizeof why));
    ts_gpu_unpin_unmap(gpu, page, 4096);
}

static uint64_t held; /* bytes of shared memory that the device doesn't have back yet */

static uint64_t now_held(void)
{
    return __atomic_load_n(&held, __ATOMIC_ACQUIRE);
}

static void do_share_vmm(device_problem *d)
{
    (void)d;
    ts_gpu_shared shared;
    OK(ts_gpu_shared_new(gpu, true, 4096, &held, &shared, why, sizeof why));
    assert_int_equal(now_held(), ts_gpu_get_info(gpu)->granularity);
    ts_gpu_shared_free(&shared);
    assert_int_equal(now_held(), 0);
}

static void do_share_malloc(device_problem *d)
{
    (void)d;
    ts_gpu_shared shared;
    OK(ts_gpu_shared_new(gpu, false, 4096, &held, &shared, why, sizeof why));
    ts_gpu_shared_free(&shared);
    assert_int_equal(now_held(), 4096); /* deferred: a launch waits */
}

static void do_renew(device_problem *d)
{
    int fd;
    OK(ts_memory_renew(d->memory, 0, why, sizeof why));
    OK(ts_memory_export(d->memory, 0, false, &fd, why, sizeof why));
    close(fd);
}

static void nothing_waits_for_a_launch_that_waits_for_a_worker(void **state)
{
    (void)state;
    static const uint32_t lengths[][2] = {{100, 1}, {50, 50}};
    static const struct {
        const char *what;
        void (*work)(device_problem *d);
    } works[] = {
        {"attending", do_attend},
        {"copying blocks", do_copies},
        {"attending with large tables", do_attend_much},
        {"pinning host memory", do_pin},
        {"sharing VMM memory", do_share_vmm},
        {"sharing cudaMalloc memory", do_share_malloc},
        {"renewing and exporting a slab", do_renew},
    };
    bool all = true;
    rng r = {3};
    device_problem d;
    device_problem_new(&d,
                       (shape){.dtype = TS_DTYPE_FP16,
                               .io = TS_DTYPE_FP32,
                               .heads = 2,
                               .kv_heads = 1,
                               .head_dim = 256,
                               .block_tokens = 16,
                               .layers = 1},
                       lengths, 2, &r);
    OK(ts_gpu_load(gpu, &d.call.geometry, why, sizeof why));
    for (size_t i = 0; i < sizeof works / sizeof *works; i++)
        all &= while_a_launch_waits(works[i].what, works[i].work, &d);
    assert_true(all);
    while (now_held() != 0) /* what was deferred is done by now, or soon */
        sched_yield();
    device_problem_free(&d);
}

static void launches_run_out_and_come_back(void **state)
{
    (void)state;
    ts_gpu_launch *taken[TS_GPU_LAUNCHES];
    ts_gpu_position positions[TS_GPU_STREAM_SLOTS] = {0};
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++) { /* the later ones behind those before */
        if (i == TS_GPU_STREAM_SLOTS)
            assert_null(ts_gpu_launch_take(gpu, NULL));
        taken[i] = ts_gpu_launch_take(gpu, &positions[i % TS_GPU_STREAM_SLOTS]);
        assert_non_null(taken[i]);
    }
    assert_null(ts_gpu_launch_take(gpu, &positions[0]));
    sem_t done;
    sem_init(&done, 0, 0);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        assert_int_equal(ts_gpu_launch_finish(taken[i], post, &done), TS_OK);
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++)
        while (sem_wait(&done) != 0)
            ;
    assert_non_null(taken[0] = ts_gpu_launch_take(gpu, NULL));
    assert_int_equal(ts_gpu_launch_finish(taken[0], NULL, NULL), TS_OK);
    CUDA_OK(cudaDeviceSynchronize());
}

static void more_memory_than_there_is_is_refused_with_the_numbers(void **state)
{
    (void)state;
    ts_memory *m;
    const size_t bytes = (size_t)1 << 40;
    assert_int_equal(ts_memory_cuda_ipc_new(gpu, bytes, &m, why, sizeof why), TS_ENOMEM);
    assert_string_equal(
        why, "taking device memory of 1099511627776 bytes failed: cudaErrorMemoryAllocation");
    OK(ts_memory_cuda_vmm_new(gpu, 1, bytes, &m, why, sizeof why)); /* addresses alone */
    assert_int_equal(ts_memory_renew(m, 0, why, sizeof why), TS_ENOMEM);
    assert_string_equal(
        why, "taking device memory of 1099511627776 bytes failed: CUDA_ERROR_OUT_OF_MEMORY");
    ts_memory_free(m);
    OK(ts_gpu_health(gpu, why, sizeof why));
}

/* New memory is zero, whatever was in the old. */
static void a_renewed_slab_is_wiped(void **state)
{
    (void)state;
    ts_memory *m;
    const size_t bytes = ts_gpu_get_info(gpu)->granularity;
    unsigned char *host = malloc(bytes), *zero = calloc(1, bytes);
    OK(ts_memory_cuda_vmm_new(gpu, 3, bytes, &m, why, sizeof why));
    for (int round = 0; round < 2; round++) {
        OK(ts_memory_renew(m, 1, why, sizeof why));
        CUDA_OK(cudaMemcpy(host, m->base + bytes, bytes, cudaMemcpyDeviceToHost));
        assert_memory_equal(host, zero, bytes);
        CUDA_OK(cudaMemset(m->base + bytes, 0xab, bytes));
        CUDA_OK(cudaDeviceSynchronize()); /* it uses what is unmapped next */
    }
    ts_memory_free(m);
    free(host);
    free(zero);
}

static void v4_refuses_rows_that_are_no_whole_vectors_and_names_them(void **state)
{
    (void)state;
    ts_geometry g = {.layers = 1, .kv_heads = 1, .head_dim = 33, .block_tokens = 1};
    assert_int_equal(ts_kernel_check(TS_KERNEL_V4, &g, false, why, sizeof why), TS_EINVAL);
    assert_string_equal(why, "kernel v4 loads rows of K and V as 16-byte vectors; a row of "
                             "head_dim 33 in fp32 has 132 bytes");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(copying_blocks_moves_every_byte_and_no_other),
        cmocka_unit_test(a_launch_waits_for_its_word_and_signals),
        cmocka_unit_test(any_number_of_signals_is_told),
        cmocka_unit_test(a_launchs_end_is_seen_behind_its_signals),
        cmocka_unit_test(runs_words_are_told_when_all_is_done),
        cmocka_unit_test(a_launch_follows_the_one_before_it),
        cmocka_unit_test(nothing_waits_for_a_launch_that_waits_for_a_worker),
        cmocka_unit_test(launches_run_out_and_come_back),
        cmocka_unit_test(more_memory_than_there_is_is_refused_with_the_numbers),
        cmocka_unit_test(v4_refuses_rows_that_are_no_whole_vectors_and_names_them),
        cmocka_unit_test(a_renewed_slab_is_wiped),
    };
    return run_gpu_tests(tests, sizeof tests / sizeof *tests);
}
