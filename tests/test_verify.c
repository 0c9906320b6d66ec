/*
 * `verify = restart`: the daemon that takes over holds its memory against checksums. What somebody
 * has changed behind its back is found and forgotten, and whatever the last daemon was at when it
 * died, what is right is never taken for wrong.
 */
#define _GNU_SOURCE
#include "restart_steps.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>

#define TOKENS 48u /* three blocks */
#define ON_GPU                                                                                     \
    "p:layers=2,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=512,slab=2M,"             \
    "device=cuda:0,provider=cuda-vmm,model=m,client_write=all"
#define OTHER                                                                                      \
    "q:layers=2,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=512,slab=64K,"            \
    "device=host,client_write=all"

/* ---- what was changed is found ---- */

/* A daemon that stops, and what is changed before it is killed; NULL: nothing. */
typedef struct spoiler {
    const daemon_process *d;
    float *at;
} spoiler;

static void *spoil(void *arg)
{
    const spoiler *s = arg;
    const pid_t pid = await_stopped(s->d);
    if (s->at != NULL)
        s->at[0] += 1;
    assert_int_equal(kill(pid, SIGKILL), 0);
    return NULL;
}

/* A new sequence in a step of TOKENS tokens with these ids, whose K and V the worker writes. */
static ts_step *begin_sequence(ts_client *c, ts_pool *p, const uint32_t *ids, ts_seq *seq)
{
    ts_step *step;
    DO(ts_seq_create(p, 1, seq));
    DO(ts_step_begin(
        p, seq, &(uint32_t){TOKENS}, 1,
        &(ts_step_options){.size = sizeof(ts_step_options), .tokens = ids, .no_run = true}, &step));
    return step;
}

/* Writes the step, and commits it. */
static void write_step(ts_client *c, ts_pool *p, ts_step *step, rng *r, float **second)
{
    uint64_t slots[TOKENS];
    ts_step_slots(step, 0, slots);
    for (uint32_t i = 0; i < TOKENS * LAYERS; i++) {
        ts_kv kv;
        DO(ts_slot_kv(p, slots[i / LAYERS], i % LAYERS, &kv));
        fill(r, kv.k, DIM);
        fill(r, kv.v, DIM);
        if (i / LAYERS == BLOCK)
            *second = kv.v; /* of the second block */
    }
    DO(ts_step_commit(step, NULL));
}

static ts_seq write_sequence(ts_client *c, ts_pool *p, const uint32_t *ids, rng *r, float **second)
{
    ts_seq seq;
    write_step(c, p, begin_sequence(c, p, ids, &seq), r, second);
    return seq;
}

/* What status says of the last restart. The caller frees it. */
static Tspb__Reply *get_status(ts_client *c)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    DO(ts_call(c, &request, &reply));
    return reply;
}

/* kill_at: where the daemon that checks is killed, too; NULL: nowhere. `wrong`: blocks that the
 * last daemon finds. */
static void find(const char *pool, const char *kill_at, uint32_t wrong)
{
    daemon_process d;
    pthread_t thread;
    rng r = {3};
    float *second;
    uint32_t ids[2][TOKENS], length;
    for (uint32_t i = 0; i < TOKENS; i++) {
        ids[0][i] = i;
        ids[1][i] = i + 1000;
    }
    setenv("TS_TEST_STOP", "summed:6", 1); /* when all blocks of both have their checksum */
    setenv("TS_TEST_DEATHS", "1", 1);
    start_with(&d, pool, kill_at, "verify=restart");
    unsetenv("TS_TEST_DEATHS");
    unsetenv("TS_TEST_STOP");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    ts_seq seqs[2] = {write_sequence(c, p, ids[0], &r, &second)};
    spoiler s = {&d, second};
    assert_int_equal(pthread_create(&thread, NULL, spoil, &s), 0);
    seqs[1] = write_sequence(c, p, ids[1], &r, &second);
    assert_int_equal(pthread_join(thread, NULL), 0);
    DO(ts_seq_lengths(p, &seqs[1], 1, &length));
    assert_int_equal(length, TOKENS);
    assert_int_equal(ts_client_restarts(c), 1);
    assert_int_equal(ts_seq_lengths(p, &seqs[0], 1, &length), TS_ENOENT);
    /* What hung from the wrong block is forgotten with it, and nothing else. */
    const uint32_t counts[] = {TOKENS, TOKENS};
    uint32_t found[2];
    ts_seq again[2];
    DO(ts_seq_match(p, ids[0], counts, 2, NULL, again, found));
    assert_int_equal(found[0], BLOCK);
    assert_int_equal(found[1], TOKENS - 1);
    Tspb__Reply *reply = get_status(c);
    const Tspb__RestartStatus *told = reply->status_reply->restart;
    assert_true(told->checked && told->verify == TSPB__RESTART_STATUS__VERIFY__RESTART);
    assert_int_equal(told->full_blocks, wrong == 1 ? 6 : 4);
    assert_int_equal(told->checked_blocks, wrong == 1 ? 6 : 4);
    assert_int_equal(told->wrong_blocks, wrong);
    assert_int_equal(told->lost_sequences, wrong);
    assert_int_equal(told->all_wrong_blocks, 1);
    assert_int_equal(told->all_lost_sequences, 1);
    assert_int_equal(told->unsummed_pools, 0);
    tspb__reply__free_unpacked(reply, NULL);
    finish(&d, c, p);
}

static void a_block_that_was_changed_is_forgotten(void **state)
{
    (void)state;
    find(POOL, NULL, 1);
}

static void a_block_that_was_changed_on_a_gpu_is_forgotten(void **state)
{
    (void)state;
    setenv("TS_TEST_FAKE_GPU", "1", 1);
    find(ON_GPU, NULL, 1);
    unsetenv("TS_TEST_FAKE_GPU");
}

/* The daemon that checks is killed before it has said what it found: the next one finds it again,
 * or has the figures. Its first command tells sessions to come back, its second forgets the block.
 */
static void what_a_check_found_outlives_the_daemon_that_found_it(void **state)
{
    (void)state;
    find(POOL, "applying:1", 1);
    find(POOL, "applying:2", 1);
    find(POOL, "applied:2", 1);
    find(POOL, "published:2", 0);
}

/* The daemon dies before it has copied the block that a begun step shares with another sequence.
 * The step's sequence has a wrong block, too, and isn't left with it. */
static void a_wrong_block_is_lost_with_a_step_that_waits_for_its_copies(void **state)
{
    (void)state;
    daemon_process d;
    pthread_t thread;
    rng r = {3};
    float *second;
    ts_seq fork;
    ts_step *step;
    uint32_t length;
    setenv("TS_TEST_STOP", "summed:3", 1);
    setenv("TS_TEST_DEATHS", "1", 1);
    start_with(&d, POOL, "running:1", "verify=restart"); /* at the second daemon's copy */
    unsetenv("TS_TEST_DEATHS");
    unsetenv("TS_TEST_STOP");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    spoiler s = {&d, NULL};
    assert_int_equal(pthread_create(&thread, NULL, spoil, &s), 0);
    const ts_seq seq = write_sequence(c, p, NULL, &r, &second);
    assert_int_equal(pthread_join(thread, NULL), 0);
    const ts_step_options no_run = {.size = sizeof(ts_step_options), .no_run = true};
    DO(ts_step_begin(p, &seq, &(uint32_t){1}, 1, &no_run, &step));
    DO(ts_step_commit(step, NULL));
    DO(ts_seq_fork(p, seq, 1, &fork));
    second[0] += 1;
    assert_int_equal(ts_step_begin(p, &fork, &(uint32_t){1}, 1, &no_run, &step), TS_ENOENT);
    assert_int_equal(ts_client_restarts(c), 2);
    assert_int_equal(ts_seq_lengths(p, &fork, 1, &length), TS_ENOENT);
    assert_int_equal(ts_seq_lengths(p, &seq, 1, &length), TS_ENOENT);
    Tspb__Reply *reply = get_status(c);
    assert_int_equal(reply->status_reply->restart->wrong_blocks, 1);
    assert_int_equal(reply->status_reply->restart->lost_sequences, 2);
    tspb__reply__free_unpacked(reply, NULL);
    finish(&d, c, p);
}

/* ---- what is right is never taken for wrong ---- */

/* The GPU is lost at a read, before (0) or after the daemon's death: whoever reads a block's memory
 * then knows nothing of it. */
static void lose_gpu(uint32_t deaths, uint32_t at)
{
    daemon_process d;
    pthread_t thread;
    rng r = {3};
    float *second;
    uint32_t length;
    char text[24], log[64] = "/tmp/tinyserve-log.XXXXXX";
    snprintf(text, sizeof text, "read:%u:%u", at, deaths);
    close(mkstemp(log));
    setenv("TS_TEST_LOG", log, 1);
    setenv("TS_TEST_GPU_BREAKS", text, 1);
    if (deaths > 0)
        setenv("TS_TEST_STOP", "summed:6", 1);
    start_with(&d, ON_GPU, NULL, "verify=restart");
    unsetenv("TS_TEST_STOP");
    unsetenv("TS_TEST_GPU_BREAKS");
    unsetenv("TS_TEST_LOG");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    spoiler s = {&d, NULL};
    if (deaths > 0)
        assert_int_equal(pthread_create(&thread, NULL, spoil, &s), 0);
    const ts_seq seqs[2] = {write_sequence(c, p, NULL, &r, &second),
                            write_sequence(c, p, NULL, &r, &second)};
    if (deaths > 0)
        assert_int_equal(pthread_join(thread, NULL), 0);
    do
        for (uint32_t i = 0; i < 2; i++) {
            DO(ts_seq_lengths(p, &seqs[i], 1, &length));
            assert_int_equal(length, TOKENS);
        }
    while (ts_client_restarts(c) == 0); /* until it has seen that its device is lost */
    Tspb__Reply *reply = get_status(c);
    const Tspb__RestartStatus *told = reply->status_reply->restart;
    assert_string_equal(told->cause, deaths > 0 ? "signal 9, then status 1" : "status 3");
    assert_int_equal(told->checked_blocks, deaths > 0 ? 6 : at - 1); /* it was read up to there */
    assert_int_equal(told->wrong_blocks, 0);
    tspb__reply__free_unpacked(reply, NULL);
    finish(&d, c, p);
    char *said = read_log(log);
    if (deaths > 0)
        assert_non_null(strstr(said, "the pools can't be taken over: pool 'p': block "));
    if (deaths > 0)
        assert_non_null(strstr(said, " can't be read to be checked: cudaErrorFake; what is stored "
                                     "stays, and it is tried again"));
    free(said);
}

static void a_block_that_cannot_be_read_is_not_taken_for_wrong(void **state)
{
    (void)state;
    setenv("TS_TEST_FAKE_GPU", "1", 1);
    for (uint32_t at = 1; at <= 6; at += STRIDE)
        for (uint32_t deaths = 0; deaths < 2; deaths++)
            lose_gpu(deaths, at);
    unsetenv("TS_TEST_FAKE_GPU");
}

/* A worker writes what it has appended when it likes: no block with some of it is checked. */
static void what_was_appended_may_be_written_late(void **state)
{
    (void)state;
    daemon_process d;
    pthread_t thread;
    rng r = {3};
    ts_seq seqs[2];
    uint64_t slots[BLOCK / 2];
    ts_kv kv;
    uint32_t length;
    setenv("TS_TEST_STOP", "summed:1", 1); /* of the second sequence's block */
    start_with(&d, POOL, NULL, "verify=restart");
    unsetenv("TS_TEST_STOP");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    DO(ts_seq_create(p, 2, seqs));
    DO(ts_seq_append(p, &seqs[0], &(uint32_t){BLOCK / 2}, 1, slots));
    DO(ts_slot_kv(p, slots[0], 0, &kv));
    one_step(c, p, &seqs[0], (uint32_t[]){BLOCK / 2}, 1, NULL, &r, NULL);
    spoiler s = {&d, kv.k};
    assert_int_equal(pthread_create(&thread, NULL, spoil, &s), 0);
    one_step(c, p, &seqs[1], (uint32_t[]){BLOCK}, 1, NULL, &r, NULL);
    assert_int_equal(pthread_join(thread, NULL), 0);
    for (uint32_t i = 0; i < 2; i++) {
        DO(ts_seq_lengths(p, &seqs[i], 1, &length));
        assert_int_equal(length, BLOCK);
    }
    assert_int_equal(ts_client_restarts(c), 1);
    finish(&d, c, p);
}

/* ---- a pool that has another's name and place ---- */

/* Waits until the daemon's read of a GPU's block, which the FIFO is for, has come to it; the read
 * goes on when what is returned is closed. */
static int await_read(const char *fifo)
{
    const int fd = open(fifo, O_WRONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(unlink(fifo), 0);
    return fd;
}

/* The checksums of three blocks wait in the queue when their pool is deleted; the next one of its
 * name has the same blocks, as often begun and not yet written, when their turn comes. */
static void a_pool_has_nothing_of_the_checksums_of_the_one_before_it(void **state)
{
    (void)state;
    daemon_process d;
    pthread_t thread;
    rng r = {3};
    float *second;
    ts_seq old, new, on_gpu[2];
    uint64_t old_slots[TOKENS], new_slots[TOKENS];
    uint32_t length;
    char folder[] = "/tmp/tinyserve-reads.XXXXXX", path[40], first[48], fourth[48];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/read", folder);
    snprintf(first, sizeof first, "%s.1", path);
    snprintf(fourth, sizeof fourth, "%s.4", path);
    assert_int_equal(mkfifo(first, 0600), 0);
    assert_int_equal(mkfifo(fourth, 0600), 0);
    setenv("TS_TEST_FAKE_GPU", "1", 1);
    setenv("TS_TEST_GPU_READ_WAITS", path, 1);
    setenv("TS_TEST_STOP", "summed:9", 1); /* six on the GPU, and the new pool's */
    start_with(&d, ON_GPU, NULL, "verify=restart");
    unsetenv("TS_TEST_STOP");
    unsetenv("TS_TEST_GPU_READ_WAITS");
    unsetenv("TS_TEST_FAKE_GPU");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    on_gpu[0] = write_sequence(c, p, NULL, &r, &second);
    int read = await_read(first);
    DO(ts_pool_create(c, OTHER));
    ts_pool *q = open_pool(c, "q", TS_POOL_WRITABLE);
    ts_step *step = begin_sequence(c, q, NULL, &old);
    ts_step_slots(step, 0, old_slots);
    write_step(c, q, step, &r, &second); /* these three wait for the read */
    on_gpu[1] = write_sequence(c, p, NULL, &r, &second);
    DO(ts_seq_free(q, &old, 1));
    ts_pool_close(q);
    DO(delete_pool(c, "q"));
    DO(ts_pool_create(c, OTHER));
    q = open_pool(c, "q", TS_POOL_WRITABLE);
    step = begin_sequence(c, q, NULL, &new);
    ts_step_slots(step, 0, new_slots);
    assert_memory_equal(new_slots, old_slots, sizeof new_slots);
    close(read);
    read = await_read(fourth); /* the old pool's had their turn */
    write_step(c, q, step, &r, &second);
    spoiler s = {&d, NULL};
    assert_int_equal(pthread_create(&thread, NULL, spoil, &s), 0);
    close(read);
    assert_int_equal(pthread_join(thread, NULL), 0);
    DO(ts_seq_lengths(q, &new, 1, &length));
    assert_int_equal(length, TOKENS);
    DO(ts_seq_lengths(p, on_gpu, 2, (uint32_t[2]){0}));
    assert_int_equal(ts_client_restarts(c), 1);
    check_daemon(c);
    ts_pool_close(p);
    ts_pool_close(q);
    ts_disconnect(c);
    stop(&d, false);
    assert_int_equal(rmdir(folder), 0);
}

/* A pool is filled, deleted and made anew, three times. */
static uint64_t make_anew(ts_client *c, int exchange, uint32_t *restarts)
{
    (void)exchange;
    rng r = {5};
    float *second;
    uint32_t length;
    for (uint32_t round = 0; round < 3; round++) {
        DO(ts_pool_create(c, OTHER));
        ts_pool *q = open_pool(c, "q", TS_POOL_WRITABLE);
        const ts_seq seq = write_sequence(c, q, NULL, &r, &second);
        DO(ts_seq_lengths(q, &seq, 1, &length));
        assert_int_equal(length, TOKENS);
        DO(ts_seq_free(q, &seq, 1));
        ts_pool_close(q);
        DO(delete_pool(c, "q"));
    }
    check_daemon(c);
    *restarts = ts_client_restarts(c);
    return 0; /* nothing that isn't checked above */
}

/* The work, with the daemon killed at this place, the third time that it comes there and later. */
static void over_deaths(uint64_t (*work)(ts_client *client, int exchange, uint32_t *restarts),
                        const char *place)
{
    const killed_workload w = {
        .pool = POOL, .setting = "verify=restart", .transport = TS_TRANSPORT_RING, .work = work};
    assert_true(kill_everywhere(&w, place, 3) > 0);
}

/* Wherever the daemon dies, of the old pool's checksums too. */
static void a_pool_may_be_made_anew_over_a_death(void **state)
{
    (void)state;
    over_deaths(make_anew, "stored");
    over_deaths(make_anew, "applied");
    over_deaths(make_anew, "published");
}

/* Each block has 8 MiB, so that reading it for its checksum takes longer than what follows. */
static void a_pool_may_go_while_its_blocks_are_read(void **state)
{
    (void)state;
    daemon_process d;
    ts_seq seq;
    start_with(&d, POOL, NULL, "verify=restart");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    for (uint32_t round = 0; round < 5; round++) {
        DO(ts_pool_create(c, "q:layers=256,kv_heads=4,head_dim=64,dtype=fp32,block_tokens=16,"
                             "blocks=3,device=host,client_write=all"));
        ts_pool *q = open_pool(c, "q", TS_POOL_WRITABLE);
        DO(ts_step_commit(begin_sequence(c, q, NULL, &seq), NULL));
        DO(ts_seq_free(q, &seq, 1));
        ts_pool_close(q);
        DO(delete_pool(c, "q"));
    }
    check_daemon(c);
    assert_int_equal(ts_client_restarts(c), 0);
    ts_disconnect(c);
    stop(&d, false);
}

/* Blocks that are filled, shared, cut and filled again, freed and taken again, appended to, and
 * found. All sequences must be as long as they should. */
static uint64_t fill_and_cut(ts_client *c, int exchange, uint32_t *restarts)
{
    (void)exchange;
    rng r = {5};
    ts_seq seqs[2], fork, found[1];
    uint32_t ids[64], length, matched;
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    for (uint32_t i = 0; i < 64; i++)
        ids[i] = i;
    for (uint32_t round = 0; round < 3; round++) { /* the same blocks, again and again */
        DO(ts_seq_create(p, 1, seqs));
        one_step(c, p, seqs, (uint32_t[]){64}, 1, NULL, &r, NULL);
        DO(ts_seq_free(p, seqs, 1));
    }
    DO(ts_seq_create(p, 2, seqs));
    one_step(c, p, seqs, (uint32_t[]){40, 24}, 2, ids, &r, NULL);
    DO(ts_seq_fork(p, seqs[0], 1, &fork));
    one_step(c, p, (ts_seq[]){fork, seqs[1]}, (uint32_t[]){9, 20}, 2, NULL, &r, NULL);
    DO(ts_seq_truncate(p, &fork, &(uint32_t){20}, 1));
    one_step(c, p, &fork, (uint32_t[]){30}, 1, NULL, &r, NULL);
    DO(ts_seq_free(p, &seqs[1], 1));
    DO(ts_seq_append(p, &seqs[0], &(uint32_t){20}, 1, NULL));
    one_step(c, p, &seqs[0], (uint32_t[]){10}, 1, NULL, &r, NULL);
    DO(ts_seq_match(p, ids, &(uint32_t){40}, 1, NULL, found, &matched));
    assert_int_equal(matched, 2 * BLOCK);
    one_step(c, p, found, (uint32_t[]){30}, 1, NULL, &r, NULL);
    const ts_seq all[] = {seqs[0], fork, found[0]};
    static const uint32_t lengths[] = {70, 50, 62};
    for (uint32_t i = 0; i < 3; i++) {
        DO(ts_seq_lengths(p, &all[i], 1, &length));
        assert_int_equal(length, lengths[i]);
    }
    check_daemon(c);
    *restarts = ts_client_restarts(c);
    ts_pool_close(p);
    return 0; /* nothing that isn't checked above */
}

static void what_is_right_is_never_taken_for_wrong(void **state)
{
    (void)state;
    over_deaths(fill_and_cut, "summed");
    over_deaths(fill_and_cut, "published");
    over_deaths(fill_and_cut, "applied");
}

int main(void)
{
    ignore_threads_left();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_block_that_was_changed_is_forgotten),
        cmocka_unit_test(a_block_that_was_changed_on_a_gpu_is_forgotten),
        cmocka_unit_test(what_a_check_found_outlives_the_daemon_that_found_it),
        cmocka_unit_test(a_wrong_block_is_lost_with_a_step_that_waits_for_its_copies),
        cmocka_unit_test(a_block_that_cannot_be_read_is_not_taken_for_wrong),
        cmocka_unit_test(a_pool_has_nothing_of_the_checksums_of_the_one_before_it),
        cmocka_unit_test(a_pool_may_be_made_anew_over_a_death),
        cmocka_unit_test(a_pool_may_go_while_its_blocks_are_read),
        cmocka_unit_test(what_was_appended_may_be_written_late),
        cmocka_unit_test(what_is_right_is_never_taken_for_wrong),
    };
    cmocka_set_test_filter(getenv("TS_TEST_FILTER"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
