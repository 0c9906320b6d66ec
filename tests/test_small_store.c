/*
 * A store that takes less than there is, as systemd's where an operator lowers
 * FileDescriptorStoreMax=: systemd closes what is beyond it, whatever that is. The test is the
 * daemons' systemd. What is still there is taken over, no daemon fails for want of room, and the
 * log has the numbers.
 */
#define _GNU_SOURCE
#include "daemon_util.h"

#undef WATCHDOG_SECONDS
#include "store_util.h"

#define POOL                                                                                       \
    "p:layers=2,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=256,slab=64K,"            \
    "device=host,client_write=all"
#define SLAB_TOKENS 128u /* of 64 KiB */

typedef struct world {
    keeping_holder k;
    daemon_process d;
    char log[96];
} world;

static void start_daemon(world *w, const char *limit)
{
    w->d.pid = fork();
    assert_true(w->d.pid >= 0);
    if (w->d.pid != 0)
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    kept_pass(&w->k, limit);
    (void)!freopen(w->log, "w", stderr);
    execl(TS_DAEMON, TS_DAEMON, "--set", "threads=1", "--socket", w->d.url, "--pool", POOL, NULL);
    _exit(127);
}

/* Starts the first daemon, whose store takes `limit` descriptors. */
static void world_make(world *w, const char *limit)
{
    memset(w, 0, sizeof *w);
    snprintf(w->d.folder, sizeof w->d.folder, "/tmp/tinyserve-test.XXXXXX");
    assert_non_null(mkdtemp(w->d.folder));
    snprintf(w->d.url, sizeof w->d.url, "%s/s", w->d.folder);
    snprintf(w->d.handles, sizeof w->d.handles, "%s/s" TS_HANDLE_SUFFIX, w->d.folder);
    snprintf(w->log, sizeof w->log, "%s/log", w->d.folder);
    keeping_holder_make(&w->k, limit);
    start_daemon(w, limit);
}

static void kill_daemon(world *w)
{
    assert_int_equal(kill(w->d.pid, SIGKILL), 0);
    assert_int_equal(waitpid(w->d.pid, NULL, 0), w->d.pid);
    kept_settle(&w->k);
}

static void world_end(world *w)
{
    kill_daemon(w);
    (void)unlink(w->log);
    daemon_clean(&w->d);
    keeping_holder_end(&w->k);
}

static ts_status connect_with(const world *w, size_t exchange_bytes, ts_client **c)
{
    return ts_connect(&(ts_options){.size = sizeof(ts_options),
                                    .url = w->d.url,
                                    .wait_ms = 60000,
                                    .timeout_ms = 60000,
                                    .exchange_bytes = exchange_bytes},
                      c);
}

#define DO(call)                                                                                   \
    do {                                                                                           \
        ts_status done = (call);                                                                   \
        if (done != TS_OK)                                                                         \
            fail_msg("%s: %s: %s", #call, ts_status_name(done), ts_error(c));                      \
    } while (0)

/* Keeps a sequence of `slabs` slabs under the name. */
static void keep_sequence(ts_client *c, ts_pool *p, uint32_t slabs, const char *name)
{
    ts_seq seq;
    DO(ts_seq_create(p, 1, &seq));
    DO(ts_seq_append(p, &seq, &(uint32_t){slabs * SLAB_TOKENS}, 1, NULL));
    DO(ts_seq_keep(p, seq, name));
}

/* Tokens of what is kept under the name; 0: nothing is. */
static uint32_t kept_tokens(ts_pool *p, const char *name)
{
    ts_seq seq;
    uint32_t tokens = 0;
    const ts_status status = ts_seq_attach(p, name, &seq, &tokens);
    assert_true(status == TS_OK || status == TS_ENOENT);
    return tokens;
}

/* What the last daemon has said so far; the caller frees it. */
static char *said(const world *w)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *f = fopen(w->log, "r");
    assert_non_null(f);
    assert_true(getdelim(&text, &bytes, '\0', f) >= 0);
    (void)fclose(f);
    return text;
}

static void was_said(const world *w, const char *part)
{
    char *text = said(w);
    if (strstr(text, part) == NULL)
        fail_msg("'%s' is missing in:\n%s", part, text);
    free(text);
}

/* Nothing new is stored, and what there was is there; also after the limit is raised again. */
static void a_limit_below_what_is_stored_loses_nothing(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_client *c, *next;
    ts_pool *p;
    world_make(w, "64");
    OK(connect_with(w, 4096, &c));
    OK(ts_pool_open(c, "p", TS_POOL_WRITABLE, &p));
    keep_sequence(c, p, 3, "three");
    const uint32_t stored = kept_count(&w->k, "");
    assert_int_equal(stored, 7); /* the books' three, slabs, and an exchange */
    kill_daemon(w);
    start_daemon(w, "5");
    assert_int_equal(kept_tokens(p, "three"), 3 * SLAB_TOKENS);
    assert_int_equal(ts_client_restarts(c), 1);
    was_said(w, "the holder has 7 descriptors and takes 5, 6 of them for the daemon's books "
                "(FileDescriptorStoreMax= of the unit)");
    assert_int_equal(connect_with(w, 4096, &next), TS_ENOSPC);
    assert_non_null(strstr(ts_error(next), "the holder takes 5 descriptors, 6 of them for the "
                                           "daemon's books, and has 7"));
    ts_disconnect(next);
    OK(connect_with(w, 0, &next));
    ts_disconnect(next);
    kill_daemon(w);
    start_daemon(w, "64");
    assert_int_equal(kept_tokens(p, "three"), 3 * SLAB_TOKENS);
    OK(connect_with(w, 4096, &next));
    ts_disconnect(next);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

static const char *const books[] = {"journal", "books.a", "books.b"};

static void has_books(world *w)
{
    for (int i = 0; i < 3; i++)
        assert_int_not_equal(kept_file(&w->k, books[i]), 0);
}

/* A client that knows nothing of a daemon before. */
static ts_client *meet(world *w, ts_pool **p)
{
    ts_client *c;
    OK(connect_with(w, 0, &c));
    OK(ts_pool_open(c, "p", TS_POOL_WRITABLE, p));
    return c;
}

/* A daemon that begins with nothing finds room for its books among what is nobody's. */
static void books_that_begin_anew_find_room_in_a_full_store(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_pool *p;
    world_make(w, "64");
    ts_client *c = meet(w, &p);
    keep_sequence(c, p, 15, "fifteen");
    ts_pool_close(p);
    ts_disconnect(c);
    kill_daemon(w);
    for (int i = 1; i < 3; i++) { /* the snapshots are spoilt */
        const int fd = kept_open(&w->k, books[i]);
        const off_t bytes = lseek(fd, 0, SEEK_END);
        assert_true(i == 2 || pwrite(fd, "x", 1, bytes - 1) == 1);
        close(fd);
    }
    start_daemon(w, "14");
    c = meet(w, &p);
    was_said(w, "what the last daemon left can't be taken over: the snapshot's checksum is wrong");
    assert_int_equal(kept_tokens(p, "fifteen"), 0);
    has_books(w);
    await_kept(&w->k, "p0", 0);
    assert_int_equal(kept_count(&w->k, "failed."), 3); /* the evidence */
    keep_sequence(c, p, 1, "one");
    kill_daemon(w);
    start_daemon(w, "14");
    assert_int_equal(kept_tokens(p, "one"), SLAB_TOKENS);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

/* Evidence makes room for the books, too. */
static void books_come_before_the_evidence(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_pool *p;
    world_make(w, "64");
    ts_client *c = meet(w, &p);
    keep_sequence(c, p, 1, "one");
    ts_pool_close(p);
    ts_disconnect(c);
    kill_daemon(w);
    kept_drop(&w->k, "books.a");
    start_daemon(w, "4");
    c = meet(w, &p);
    was_said(w, "what the last daemon left can't be taken over: the snapshot isn't in the store");
    has_books(w);
    await_kept(&w->k, "", 3);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

/* What systemd has closed is what all depends on. */
static void a_lost_journal_is_told(void **state)
{
    (void)state;
    for (int areas = 0; areas < 2; areas++) { /* they are lost, too */
        world world, *w = &world;
        ts_pool *p;
        world_make(w, "64");
        ts_client *c = meet(w, &p);
        keep_sequence(c, p, 2, "two");
        ts_pool_close(p);
        ts_disconnect(c);
        kill_daemon(w);
        for (int i = 0; i < (areas ? 3 : 1); i++)
            kept_drop(&w->k, books[i]);
        start_daemon(w, "64");
        c = meet(w, &p);
        was_said(w, areas ? "the journal isn't in the store, and 2 other descriptors are: the "
                            "holder takes 64 (FileDescriptorStoreMax= of the unit)"
                          : "what the last daemon left can't be taken over: the journal isn't in "
                            "the store");
        assert_int_equal(kept_tokens(p, "two"), 0);
        assert_int_equal(kept_count(&w->k, "failed."), areas ? 0 : 2); /* the evidence */
        has_books(w);
        await_kept(&w->k, "p0", 0);
        ts_pool_close(p);
        ts_disconnect(c);
        world_end(w);
    }
}

/* Likewise where all that is left must make room for the books. */
static void a_lost_journal_is_told_where_nothing_else_has_room(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_pool *p;
    world_make(w, "64");
    ts_client *c = meet(w, &p);
    keep_sequence(c, p, 3, "three");
    ts_pool_close(p);
    ts_disconnect(c);
    kill_daemon(w);
    for (int i = 0; i < 3; i++)
        kept_drop(&w->k, books[i]);
    start_daemon(w, "3");
    c = meet(w, &p);
    was_said(w, "what the last daemon left can't be taken over: the journal isn't in the store, "
                "and 3 other descriptors are: the holder takes 3");
    has_books(w);
    await_kept(&w->k, "", 3);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

/* What an operator has given up isn't lost, and makes room. */
static void what_was_given_up_on_purpose_makes_room_for_the_books(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_pool *p;
    Tspb__AdminRestart restart = TSPB__ADMIN_RESTART__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    world_make(w, "64");
    ts_client *c = meet(w, &p);
    keep_sequence(c, p, 15, "fifteen");
    request.body_case = TSPB__REQUEST__BODY_ADMIN_RESTART;
    request.admin_restart = &restart;
    restart.pid = (uint64_t)w->d.pid;
    restart.empty = true;
    DO(ts_call_plain(c, &request));
    assert_int_equal(waitpid(w->d.pid, NULL, 0), w->d.pid);
    kept_settle(&w->k);
    start_daemon(w, "14");
    ts_pool_close(p);
    ts_disconnect(c);
    c = meet(w, &p);
    assert_int_equal(kept_tokens(p, "fifteen"), 0);
    has_books(w);
    await_kept(&w->k, "", 3);
    char *text = said(w);
    assert_null(strstr(text, "can't be taken over"));
    free(text);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

/* The place of the next snapshot is made anew, and where there is no room a session's exchange
 * makes it. */
static void a_lost_place_for_snapshots_is_made_anew(void **state)
{
    (void)state;
    for (int full = 0; full < 2; full++) {
        world world, *w = &world;
        ts_client *c, *other;
        ts_pool *p, *q;
        char limit[16] = "64";
        world_make(w, "64");
        c = meet(w, &p);
        keep_sequence(c, p, 2, "two");
        OK(connect_with(w, 4096, &other));
        OK(ts_pool_open(other, "p", TS_POOL_WRITABLE, &q));
        kill_daemon(w);
        kept_drop(&w->k, "books.b");
        if (full)
            snprintf(limit, sizeof limit, "%u", kept_count(&w->k, ""));
        for (int i = 0; i < 2; i++) {
            start_daemon(w, limit);
            assert_int_equal(kept_tokens(p, "two"), 2 * SLAB_TOKENS);
            has_books(w);
            if (i == 0)
                kill_daemon(w);
        }
        await_kept(&w->k, "x", full ? 0 : 1);
        ts_seq seq;
        assert_int_equal(ts_seq_create(q, 1, &seq), full ? TS_ECONN : TS_OK);
        check_daemon(c);
        ts_pool_close(p);
        ts_pool_close(q);
        ts_disconnect(other);
        ts_disconnect(c);
        world_end(w);
    }
}

/* A slab that is lost costs what lay in it, though its new memory finds no room. */
static void a_lost_slab_costs_no_other_in_a_full_store(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_pool *p;
    char limit[16];
    world_make(w, "64");
    ts_client *c = meet(w, &p);
    keep_sequence(c, p, 1, "first");
    keep_sequence(c, p, 1, "second");
    kill_daemon(w);
    kept_drop(&w->k, "p0.0.1");
    snprintf(limit, sizeof limit, "%u", kept_count(&w->k, ""));
    start_daemon(w, limit);
    assert_int_equal(kept_tokens(p, "first"), 0);
    assert_int_equal(kept_tokens(p, "second"), SLAB_TOKENS);
    was_said(w, "pool 'p': 1 sequences are lost: their memory is gone");
    was_said(w, "pool 'p', slab 0 isn't stored: what will lie there is lost at the next restart");
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

/* A daemon whose store was full gave the old memory of a slab for what another tenant was to have,
 * and was killed before it had granted that. The next one makes the slab's memory anew, and stores
 * it though there is an entry of that name. */
static void a_slab_that_was_to_change_hands_is_stored_again(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_seq seq;
    ts_pool *p;
    world_make(w, "64");
    ts_client *c = meet(w, &p);
    DO(ts_seq_create(p, 1, &seq));
    DO(ts_seq_append(p, &seq, &(uint32_t){SLAB_TOKENS}, 1, NULL));
    DO(ts_seq_free(p, &seq, 1));
    kill_daemon(w);
    kept_rename(&w->k, "p0.0.1", "p0.0.2");
    start_daemon(w, "64");
    keep_sequence(c, p, 1, "one");
    kill_daemon(w);
    start_daemon(w, "64");
    assert_int_equal(kept_tokens(p, "one"), SLAB_TOKENS);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

/* Not even the books have room: the daemon serves, and what is stored ends with it. */
static void a_store_that_is_too_small_for_the_books_is_none(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_pool *p;
    world_make(w, "2");
    ts_client *c = meet(w, &p);
    keep_sequence(c, p, 1, "one");
    was_said(w, "the holder takes 2 descriptors");
    was_said(w, "what is stored ends with the daemon");
    await_kept(&w->k, "", 0);
    assert_int_equal(kept_tokens(p, "one"), SLAB_TOKENS);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

/* Nor have books that were there. They are gone then: a later daemon would take over what has been
 * nobody's since. */
static void books_that_have_no_room_any_more_are_never_taken_over(void **state)
{
    (void)state;
    world world, *w = &world;
    ts_pool *p;
    world_make(w, "64");
    ts_client *c = meet(w, &p);
    Tspb__AdminDrain drain = TSPB__ADMIN_DRAIN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_DRAIN;
    request.admin_drain = &drain;
    DO(ts_call_plain(c, &request));
    assert_true(daemon_status(c).draining);
    ts_pool_close(p);
    ts_disconnect(c);
    kill_daemon(w);
    kept_drop(&w->k, "books.b");
    start_daemon(w, "2");
    c = meet(w, &p);
    was_said(w, "the books: 'books.b' can't be stored: the holder takes 2 descriptors");
    assert_false(daemon_status(c).draining);
    await_kept(&w->k, "", 0);
    ts_pool_close(p);
    ts_disconnect(c);
    kill_daemon(w);
    start_daemon(w, "64");
    c = meet(w, &p);
    assert_false(daemon_status(c).draining); /* an order of two daemons before */
    has_books(w);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    world_end(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_limit_below_what_is_stored_loses_nothing),
        cmocka_unit_test(books_that_begin_anew_find_room_in_a_full_store),
        cmocka_unit_test(books_come_before_the_evidence),
        cmocka_unit_test(a_lost_journal_is_told),
        cmocka_unit_test(a_lost_journal_is_told_where_nothing_else_has_room),
        cmocka_unit_test(what_was_given_up_on_purpose_makes_room_for_the_books),
        cmocka_unit_test(a_lost_place_for_snapshots_is_made_anew),
        cmocka_unit_test(a_lost_slab_costs_no_other_in_a_full_store),
        cmocka_unit_test(a_slab_that_was_to_change_hands_is_stored_again),
        cmocka_unit_test(a_store_that_is_too_small_for_the_books_is_none),
        cmocka_unit_test(books_that_have_no_room_any_more_are_never_taken_over),
    };
    cmocka_set_test_filter(getenv("TS_TEST_FILTER"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
