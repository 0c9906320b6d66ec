/*
 * The books: what a restart finds is what there was. The model's random commands (model_world.h)
 * are put into books with snapshots at every turn. Now and then the daemon "dies": books are opened
 * from what the keeper has, and the state that they give must be, byte by byte, the one that there
 * was; the model goes on with it.
 */
#define _GNU_SOURCE
#include "keeper_util.h"
#include "model_waits.h"
#include "standstill.h"

#include "books.h"
#include "journal.h"
#include "snapshot.h"
#include "test_point.h"

#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

/* ---- a world with books ---- */

typedef struct shelf {
    keeper keeper;
    ts_books *books;
    ts_engine_limits limits;
    uint32_t entries;
    uint64_t journal_bytes;
} shelf;

static void noted(void *arg, const ts_engine *e, const ts_command *c, const ts_answer *answer)
{
    shelf *s = arg;
    ts_books_begin(s->books, c);
    ts_books_note(s->books, e, c, answer);
}

static ts_books_options options_of(shelf *s)
{
    return (ts_books_options){.keeper = {s, NULL, NULL, NULL},
                              .limits = &s->limits,
                              .entries = s->entries,
                              .journal_bytes = s->journal_bytes};
}

/* Opens books; the engine that they give. */
static ts_engine *open_books(shelf *s, ts_books_start *start)
{
    char why[256] = "";
    ts_engine *e;
    ts_books_options o = options_of(s);
    o.keeper = (ts_keeper){&s->keeper, take, keep, forget};
    if (ts_books_open(&o, &s->books, &e, start, why, sizeof why) != TS_OK)
        fail_msg("%s", why);
    return e;
}

/* The state's bytes, of which equal states have the same; the caller frees them. */
static unsigned char *bytes_of(const ts_engine *e, uint64_t *count)
{
    ts_answers none = {0};
    ts_record_writer w = {.plain = true};
    assert_true(ts_snapshot_write(e, &none, &w));
    unsigned char *bytes = malloc(w.bytes);
    w = (ts_record_writer){.at = bytes, .plain = true};
    assert_true(ts_snapshot_write(e, &none, &w));
    *count = w.bytes;
    return bytes;
}

/* What lies at the byte: the record's kind, its number, and the byte in it. */
static void say_where(const unsigned char *bytes, uint64_t count, uint64_t at)
{
    ts_record_reader r;
    uint32_t head[4]; /* type, bytes, count */
    assert_true(ts_records_open(&r, bytes, count));
    while (r.at < r.end) {
        const unsigned char *section = r.at + (-(uintptr_t)r.at & 7);
        memcpy(head, section, sizeof head);
        const uint64_t n = ts_records_next(&r, (ts_record)head[0]);
        const unsigned char *first = r.at;
        r.at += n * head[1];
        if (bytes + at < r.at)
            fail_msg("%s %llu of %llu differs at byte %llu", ts_record_types[head[0]].name,
                     (unsigned long long)(bytes + at - first) / head[1], (unsigned long long)n,
                     (unsigned long long)(bytes + at - first) % head[1]);
    }
}

static void assert_same_state(const ts_engine *a, const ts_engine *b)
{
    uint64_t na, nb;
    unsigned char *sa = bytes_of(a, &na), *sb = bytes_of(b, &nb);
    assert_int_equal(na, nb);
    for (uint64_t i = 0; i < na; i++)
        if (sa[i] != sb[i])
            say_where(sa, na, i);
    free(sa);
    free(sb);
}

/* The daemon dies, and another takes over. */
static void restart(world *w, shelf *s, ts_books_start *start)
{
    ts_engine *before = w->e;
    ts_answer answer; /* what only looks isn't in the journal, but goes on in time */
    run(w, (ts_command){.op = TS_OP_DRAIN}, &answer);
    ts_books_close(s->books);
    w->e = open_books(s, start);
    if (!start->restored)
        fail_msg("%s", start->why);
    assert_string_equal(start->why, "");
    assert_same_state(before, w->e);
    check_engine(w->e);
    ts_books_taken_over(s->books, TS_TAKEOVER_SERVES);
    ts_engine_free(before);
}

static world *world_with_books(shelf *s, uint64_t seed)
{
    world *w = calloc(1, sizeof *w);
    ts_books_start start;
    ts_engine_default_limits(&s->limits);
    w->e = open_books(s, &start);
    assert_false(start.restored);
    assert_string_equal(start.why, "");
    engine_applied = (applied_hook){noted, s};
    ts_pool_config config = {
        .name = "test",
        .geometry = {.layers = 2, .kv_heads = 1, .head_dim = 32, .block_tokens = BLOCK_TOKENS},
        .num_blocks = NUM_BLOCKS,
        .slab_blocks = SLAB_BLOCKS,
        .sequences_max = 1u << 24,
        .sequence_tokens_max = LENGTH_MAX,
        .tenant_blocks_max = UINT64_MAX,
        .client_write = TS_CLIENT_WRITE_ALL,
        .on_gpu = true, /* so slabs are sessions' own */
    };
    pool_add(w->e, &config);
    w->r.state = seed;
    return w;
}

static void world_end(world *w, shelf *s)
{
    engine_applied = (applied_hook){0};
    ts_books_close(s->books);
    keeper_end(&s->keeper);
    ts_engine_free(w->e);
    free(w);
}

static void what_a_restart_finds_is_what_there_was(void **state)
{
    (void)state;
    shelf s = {.entries = 37};
    world *w = world_with_books(&s, 20261128);
    ts_books_start start;
    uint64_t replayed = 0;
    uint32_t restarts = 0;
    for (uint32_t i = 1; i <= 100000; i++) {
        one_command(w);
        if (rng_below(&w->r, 500) == 0) {
            restart(w, &s, &start);
            replayed += start.entries;
            assert_int_equal(start.restarts, ++restarts);
        }
        if (i % 512 == 0)
            for (int q = 0; q < (int)SEQS; q++)
                if (w->seqs[q].live)
                    verify_seq(w, q);
    }
    assert_true(restarts > 100 && replayed > 1000);
    world_end(w, &s);
}

/* The journal takes a few commands alone, so that its end is passed often, and requests wait. */
static void a_full_journal_makes_commands_wait(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX, .journal_bytes = 8192};
    world *w = world_with_books(&s, 5);
    ts_books_start start;
    ts_books_figures f;
    for (uint32_t i = 1; i <= 20000; i++)
        one_command(w);
    ts_books_get_figures(s.books, &f);
    assert_true(f.snapshots > 100);
    restart(w, &s, &start);
    world_end(w, &s);
}

/* Where a command has no room in the journal: has the follower make room before anybody waits. */
static _Atomic(ts_books *) drained;
/* Has the follower do nothing before that. */
static atomic_bool follower_waits;
static sem_t no_room;

void ts_test_point(const char *name, unsigned what)
{
    (void)what;
    ts_books *books = drained;
    if (books != NULL && strcmp(name, "no room") == 0)
        ts_books_settle(books, NULL, 60000);
    if (follower_waits && strcmp(name, "follows") == 0)
        while (sem_wait(&no_room) != 0)
            ;
    if (follower_waits && strcmp(name, "no room") == 0)
        sem_post(&no_room);
}

/* Snapshots that there is no memory for, and how many were tried. */
static atomic_bool no_snapshots;
static atomic_uint tries;

bool ts_test_fails(const char *name)
{
    const bool fails = atomic_load(&no_snapshots) && strcmp(name, "snapshot") == 0;
    atomic_fetch_add(&tries, fails);
    return fails;
}

static void room_that_is_made_before_anybody_waits_for_it_is_seen(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX, .journal_bytes = 8192};
    world *w = world_with_books(&s, 5);
    ts_books_figures f;
    standstill_after(120);
    drained = s.books;
    for (uint32_t i = 1; i <= 2000; i++)
        one_command(w);
    drained = NULL;
    alarm(0);
    ts_books_get_figures(s.books, &f);
    assert_true(f.waits > 10);
    world_end(w, &s);
}

/* ---- what is wrong with what is found ---- */

/* Some of the model's commands, and the daemon's death. */
static world *die_after(shelf *s, uint32_t commands)
{
    world *w = world_with_books(s, 3);
    for (uint32_t i = 0; i < commands; i++)
        one_command(w);
    ts_books_close(s->books);
    s->books = NULL;
    return w;
}

static void clean_up(world *w, shelf *s, ts_engine *e)
{
    ts_engine_free(w->e);
    w->e = e;
    world_end(w, s);
}

/* Changes a byte of what is kept under the name. */
static void spoil(shelf *s, const char *name, uint64_t at)
{
    unsigned char byte;
    const int fd = take(&s->keeper, name);
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &byte, 1, (off_t)at), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
    close(fd);
}

/* An index of another size than the pool's, with arrays of the one in the heap and of the other
 * not, isn't taken over, and what was made for it is freed. */
static void a_snapshot_whose_index_has_another_size_isnt_read(void **state)
{
    (void)state;
    ts_engine *e = engine_new(1u << 18, 1u << 10, BLOCK_TOKENS, TS_CLIENT_WRITE_ALL);
    ts_prefix_index *x = e->pools[0].books.index;
    const uint32_t blocks = x->num_blocks, mask = x->bucket_mask;
    for (int turn = 0; turn < 3; turn++) {
        char why[160] = "";
        ts_answers none = {0}, answers = {0};
        ts_record_writer w = {0};
        x->num_blocks = turn == 1 ? 16 : blocks;
        assert_true(ts_snapshot_write(e, &none, &w));
        unsigned char *bytes = malloc(w.bytes);
        w = (ts_record_writer){.at = bytes};
        x->bucket_mask = turn == 2 ? 15 : mask;
        assert_true(ts_snapshot_write(e, &none, &w));
        x->num_blocks = blocks;
        x->bucket_mask = mask;
        ts_engine *read;
        assert_int_equal(ts_snapshot_read(bytes, w.bytes, &read, &answers, why, sizeof why),
                         turn == 0 ? TS_OK : TS_EPROTO);
        assert_int_equal(read != NULL, turn == 0);
        assert_int_equal(why[0] == '\0', turn == 0);
        ts_engine_free(read);
        ts_answers_fini(&answers);
        free(bytes);
    }
    ts_engine_free(e);
}

static void a_journal_of_another_format_is_set_aside(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX};
    ts_books_start start;
    world *w = die_after(&s, 100);
    spoil(&s, "journal", offsetof(ts_journal_head, format));
    ts_engine *e = open_books(&s, &start);
    assert_false(start.restored);
    assert_non_null(strstr(start.why, "the journal is of format 3"));
    assert_int_equal(e->num_pools, 0);
    assert_true(place_of(&s.keeper, "failed.journal") < KEPT_MAX);
    assert_true(place_of(&s.keeper, "failed.books.a") < KEPT_MAX);
    assert_true(place_of(&s.keeper, "journal") < KEPT_MAX); /* anew */
    clean_up(w, &s, e);
}

/* The first entry tells of something else, and has no checksum. */
static void spoil_digest(shelf *s)
{
    const int fd = take(&s->keeper, "journal");
    assert_int_equal(pwrite(fd, &(uint32_t){0}, 4, 4096 + 12), 4);
    close(fd);
    spoil(s, "journal", 4096 + 8);
}

static void a_snapshot_that_was_changed_is_set_aside(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX};
    ts_books_start start;
    world *w = die_after(&s, 100);
    spoil(&s, "books.a", 5000);
    ts_engine *e = open_books(&s, &start);
    assert_false(start.restored);
    assert_non_null(strstr(start.why, "checksum"));
    assert_int_equal(e->num_pools, 0);
    assert_true(place_of(&s.keeper, "failed.journal") < KEPT_MAX);
    assert_true(place_of(&s.keeper, "failed.books.a") < KEPT_MAX);
    assert_true(place_of(&s.keeper, "journal") < KEPT_MAX); /* anew */
    clean_up(w, &s, e);
}

static void an_entry_that_gives_something_else_stops_the_take_over(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX};
    ts_books_start start;
    world *w = die_after(&s, 100);
    spoil_digest(&s);
    ts_engine *e = open_books(&s, &start);
    assert_false(start.restored);
    assert_non_null(strstr(start.why, "where it gave"));
    clean_up(w, &s, e);
}

static void three_attempts_that_fail_are_enough(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX};
    ts_books_start start;
    world *w = die_after(&s, 100);
    ts_engine *e = NULL;
    for (uint32_t i = 0; i < 10;
         i++) { /* killed before it serves, or without a device: no reason */
        ts_engine_free(e);
        e = open_books(&s, &start);
        assert_true(start.restored);
        if (i % 2 == 0)
            ts_books_taken_over(s.books, TS_TAKEOVER_WAITS);
        ts_books_close(s.books);
    }
    for (uint32_t i = 0; i < 4; i++) {
        ts_engine_free(e);
        e = open_books(&s, &start);
        assert_int_equal(start.failed, i < 3 ? i : 3);
        assert_int_equal(start.restored, i < 3);
        if (i == 1) /* it says so itself; the others crash */
            ts_books_taken_over(s.books, TS_TAKEOVER_FAILED);
        else if (i < 3)
            *ts_books_crash_word(s.books) = SIGSEGV;
        if (i < 3)
            ts_books_close(s.books);
    }
    assert_non_null(strstr(start.why, "3 attempts"));
    clean_up(w, &s, e);
}

/* Whoever ends in order leaves a snapshot that has all: no command is applied anew, and a call that
 * is repeated is answered as it was. */
static void books_that_were_settled_leave_nothing_to_apply(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX};
    ts_books_start start;
    world *w = world_with_books(&s, 4);
    const uint64_t session = session_new(w->e, 1000);
    ts_command create = {
        .op = TS_OP_SEQ_CREATE, .session = session, .call = 7, .seq_create = {.count = 2}};
    ts_answer answer, again;
    for (uint32_t i = 0; i < 1000; i++)
        one_command(w);
    run(w, create, &answer);
    assert_int_equal(answer.status, TS_OK);
    const uint64_t seqs[2] = {answer.seqs.seqs[0], answer.seqs.seqs[1]};
    ts_books_settle(s.books, w->e, 60000);
    ts_books_close(s.books);
    ts_engine *before = w->e;
    w->e = open_books(&s, &start);
    assert_true(start.restored);
    assert_int_equal(start.entries, 0);
    assert_same_state(before, w->e);
    ts_engine_free(before);
    assert_true(ts_books_answered(s.books, w->e, &create, &again));
    assert_int_equal(again.seqs.count, 2);
    assert_memory_equal(again.seqs.seqs, seqs, sizeof seqs);
    ts_books_settle(s.books, w->e, 60000); /* there is nothing more to be had of it */
    world_end(w, &s);
}

/* Whether the books know the order, and nothing like it. */
static bool knows(const shelf *s, const ts_command *c)
{
    ts_answer answer;
    const ts_caller by =
        c->op == TS_OP_SESSION_CLOSE ? c->session_close.by : (ts_caller){c->session, c->call};
    const ts_caller later = {by.session, by.call + 1}, other = {by.session + (1ull << 32), by.call};
    assert_false(ts_books_ordered(s->books, &later, c->op, &answer));
    assert_false(ts_books_ordered(s->books, &other, c->op, &answer));
    assert_false(ts_books_ordered(s->books, &by, TS_OP_SEQ_REMOVE, &answer));
    return ts_books_ordered(s->books, &by, c->op, &answer) && answer.status == TS_OK;
}

/* Each of an operator's orders is known to have been carried out, whether it is in the journal or
 * in a snapshot; one that was refused isn't, and nobody's neither. */
static void an_operators_last_order_is_known(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX};
    ts_books_start start;
    world *w = world_with_books(&s, 4);
    ts_answer answer;
    (void)session_new(w->e, 1002); /* the first place, where no answer is kept */
    const uint64_t session = session_new(w->e, 1000);
    ts_pool_config made = w->e->pools[0].config;
    strcpy(made.name, "made");
    ts_command orders[] = {
        {.op = TS_OP_POOL_ADD, .pool_add.config = &made},
        {.op = TS_OP_POOL_RESIZE, .pool_resize.num_blocks = made.num_blocks},
        {.op = TS_OP_CACHE_DROP},
        {.op = TS_OP_POOL_REMOVE},
        {.op = TS_OP_DRAIN},
        {.op = TS_OP_SESSION_CLOSE},
    };
    uint32_t pool = 0;
    for (uint32_t i = 0; i < sizeof orders / sizeof *orders; i++) {
        ts_command *c = &orders[i];
        c->pool = pool;
        c->session = session;
        c->call = 10 + i;
        if (c->op == TS_OP_SESSION_CLOSE) {
            c->session_close.by = (ts_caller){session, c->call};
            c->session = session_new(w->e, 1001);
            c->call = 0;
        }
        run(w, *c, &answer);
        if (answer.status != TS_OK)
            fail_msg("operation %d: %s", (int)c->op, answer.message);
        pool = c->op == TS_OP_POOL_ADD ? answer.pool : pool;
        restart(w, &s, &start);
        assert_true(start.entries > 1); /* that one is restart's own */
        assert_true(knows(&s, c));
        ts_books_settle(s.books, w->e, 60000);
        restart(w, &s, &start);
        assert_int_equal(start.entries, 1);
        assert_true(knows(&s, c));
    }
    assert_false(knows(&s, &orders[0])); /* the last alone is */
    ts_command refused = {.op = TS_OP_POOL_RESIZE, .session = session, .call = 20};
    run(w, refused, &answer);
    assert_int_equal(answer.status, TS_EINVAL);
    run(w, (ts_command){.op = TS_OP_DRAIN}, &answer);
    restart(w, &s, &start);
    assert_false(knows(&s, &refused));
    assert_false(ts_books_ordered(s.books, &(ts_caller){0}, (ts_op)0, &answer));
    world_end(w, &s);
}

/* The first daemon died before it had a pool. */
static void books_without_a_pool_are_taken_over(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX};
    ts_books_start start;
    ts_engine_default_limits(&s.limits);
    ts_engine_free(open_books(&s, &start));
    ts_books_close(s.books);
    ts_engine *e = open_books(&s, &start);
    assert_true(start.restored);
    ts_engine_free(e);
    ts_books_close(s.books);
    keeper_end(&s.keeper);
}

static void what_is_given_up_on_purpose_is_gone(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX};
    ts_books_start start;
    world *w = world_with_books(&s, 3);
    ts_books_discard(s.books);
    ts_books_close(s.books);
    ts_engine *e = open_books(&s, &start);
    assert_false(start.restored);
    assert_string_equal(start.why, "");
    assert_int_equal(place_of(&s.keeper, "failed.journal"), KEPT_MAX);
    clean_up(w, &s, e);
}

/* A world whose journal is full, and which has no memory for snapshots. */
static world *fall_behind(shelf *s)
{
    ts_books_figures f;
    world *w = world_with_books(s, 7);
    standstill_after(120);
    atomic_store(&no_snapshots, true);
    do {
        one_command(w);
        ts_books_get_figures(s->books, &f);
    } while (!f.behind);
    for (uint32_t i = 0; i < 500; i++) /* nobody waits for memory */
        one_command(w);
    return w;
}

static bool are_behind(const shelf *s)
{
    ts_books_figures f;
    ts_books_get_figures(s->books, &f);
    return f.behind;
}

static void books_that_are_behind_are_not_taken_over(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX, .journal_bytes = 8192};
    ts_books_start start;
    world *w = fall_behind(&s);
    atomic_store(&no_snapshots, false);
    ts_books_close(s.books);
    ts_engine *e = open_books(&s, &start);
    alarm(0);
    assert_false(start.restored || start.discarded);
    assert_string_equal(start.why, "its journal was full, and it had no memory for a snapshot");
    assert_true(place_of(&s.keeper, "failed.journal") < KEPT_MAX);
    clean_up(w, &s, e);
}

static void books_that_are_behind_catch_up_when_there_is_memory(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX, .journal_bytes = 8192};
    ts_books_start start;
    ts_answer answer;
    const ts_command command = {.op = TS_OP_DRAIN};
    world *w = fall_behind(&s);
    const unsigned before = atomic_load(&tries);
    while (atomic_load(&tries) == before) /* until one was tried again, in vain */
        one_command(w);
    const uint64_t tried_ms = w->now;
    for (uint32_t i = 0; i < 100; i++) /* in no time */
        run(w, command, &answer);
    assert_int_equal(atomic_load(&tries), before + 1);
    atomic_store(&no_snapshots, false);
    run(w, command, &answer);
    assert_true(are_behind(&s));
    while (are_behind(&s))
        one_command(w);
    alarm(0);
    assert_true(w->now >= tried_ms + TS_BOOKS_RETRY_MS);
    for (uint32_t i = 0; i < 100; i++)
        one_command(w);
    restart(w, &s, &start);
    world_end(w, &s);
}

static void books_that_are_behind_are_settled_whole(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX, .journal_bytes = 8192};
    ts_books_start start;
    world *w = fall_behind(&s);
    atomic_store(&no_snapshots, false);
    ts_books_settle(s.books, w->e, 60000);
    alarm(0);
    assert_false(are_behind(&s));
    ts_books_close(s.books);
    ts_engine *before = w->e;
    w->e = open_books(&s, &start);
    assert_true(start.restored);
    assert_int_equal(start.entries, 0);
    assert_same_state(before, w->e);
    ts_engine_free(before);
    world_end(w, &s);
}

/* The follower comes to something else than the daemon did: the state itself is what counts. */
static void a_follower_that_differs_is_overruled(void **state)
{
    (void)state;
    shelf s = {.entries = 64};
    ts_books_start start;
    ts_books_figures f;
    world *w = world_with_books(&s, 3);
    spoil_digest(&s);
    do {
        one_command(w);
        ts_books_get_figures(s.books, &f);
    } while (f.snapshots < 3);
    restart(w, &s, &start);
    world_end(w, &s);
}

/* The same while a command waits for room in the journal. The snapshot has what it did: a restart
 * doesn't apply it again. */
static void what_a_snapshot_has_in_place_of_the_journal_is_applied_once(void **state)
{
    (void)state;
    shelf s = {.entries = UINT32_MAX, .journal_bytes = 8192};
    ts_books_start start;
    ts_books_figures f, before;
    ts_answer answer;
    uint64_t each;
    standstill_after(120);
    assert_int_equal(sem_init(&no_room, 0, 0), 0);
    atomic_store(&follower_waits, true);
    world *w = world_with_books(&s, 3);
    const uint64_t session = session_new(w->e, 1000);
    spoil_digest(&s);
    do { /* to the journal's end */
        ts_books_get_figures(s.books, &before);
        run(w, (ts_command){.op = TS_OP_DRAIN}, &answer);
        ts_books_get_figures(s.books, &f);
        each = f.journal_used - before.journal_used;
    } while (f.journal_bytes - f.journal_used >= each);
    assert_int_equal(f.waits, 0);
    run(w, (ts_command){.op = TS_OP_SEQ_CREATE, .session = session, .seq_create = {.count = 2}},
        &answer);
    assert_int_equal(answer.status, TS_OK);
    ts_books_get_figures(s.books, &f);
    assert_int_equal(f.waits, 1);
    atomic_store(&follower_waits, false);
    restart(w, &s, &start);
    alarm(0);
    world_end(w, &s);
}

/* They are in the journal, then in a snapshot, and are over one after the other. */
static void runs_on_a_stream_are_what_they_were(void **state)
{
    (void)state;
    shelf s = {.entries = 2};
    world *w = world_with_books(&s, 3);
    ts_books_start start;
    ts_answer answer;
    const uint64_t session = session_new(w->e, 1000), seq = seq_new(w->e, session);
    uint32_t n = 3;
    run(w,
        (ts_command){.op = TS_OP_EXCHANGE_OPEN,
                     .session = session,
                     .exchange_open = {.bytes = 1 << 16,
                                       .source = {.place = TS_EXCHANGE_OF_CLIENT,
                                                  .offset = 4096,
                                                  .handle = "a handle"}}},
        &answer);
    assert_int_equal(begin(w->e, session, &seq, &n, 1, false, &answer), TS_OK);
    const uint64_t step = answer.begun.step->id;
    for (uint32_t number = 1; number <= 3; number++) {
        run(w,
            (ts_command){.op = TS_OP_STEP_RUN,
                         .session = session,
                         .step_run = {.step = step,
                                      .run = {.k = 4096,
                                              .v = 8192,
                                              .out = 12288,
                                              .scale = 0.5f,
                                              .layer = number % 2,
                                              .flags = TS_RUN_ON_STREAM,
                                              .number = number}}},
            &answer);
        assert_int_equal(answer.status, TS_OK);
    }
    for (uint32_t number = 1; number <= 3; number++) {
        restart(w, &s, &start);
        const ts_step *is = ts_engine_find_step(w->e, step);
        assert_int_equal(is->num_stream_runs, 4 - number);
        assert_int_equal(is->stream_runs[0].number, number);
        assert_int_equal(is->stream_runs[0].layer, number % 2);
        assert_true(is->stream_runs[0].scale == 0.5f);
        run(w,
            (ts_command){.op = TS_OP_STEP_DONE,
                         .step_done = {.step = step,
                                       .layer = number % 2,
                                       .on_stream = true,
                                       .number = number}},
            &answer);
    }
    const ts_session *is = ts_engine_session(w->e, session);
    assert_int_equal(is->stream_number, 3);
    assert_int_equal(is->exchange.offset, 4096);
    assert_string_equal((const char *)is->exchange.handle, "a handle");
    world_end(w, &s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_a_restart_finds_is_what_there_was),
        cmocka_unit_test(a_full_journal_makes_commands_wait),
        cmocka_unit_test(room_that_is_made_before_anybody_waits_for_it_is_seen),
        cmocka_unit_test(books_that_are_behind_are_not_taken_over),
        cmocka_unit_test(books_that_are_behind_catch_up_when_there_is_memory),
        cmocka_unit_test(books_that_are_behind_are_settled_whole),
        cmocka_unit_test(a_snapshot_that_was_changed_is_set_aside),
        cmocka_unit_test(a_snapshot_whose_index_has_another_size_isnt_read),
        cmocka_unit_test(a_journal_of_another_format_is_set_aside),
        cmocka_unit_test(an_entry_that_gives_something_else_stops_the_take_over),
        cmocka_unit_test(books_that_were_settled_leave_nothing_to_apply),
        cmocka_unit_test(an_operators_last_order_is_known),
        cmocka_unit_test(books_without_a_pool_are_taken_over),
        cmocka_unit_test(three_attempts_that_fail_are_enough),
        cmocka_unit_test(what_is_given_up_on_purpose_is_gone),
        cmocka_unit_test(a_follower_that_differs_is_overruled),
        cmocka_unit_test(what_a_snapshot_has_in_place_of_the_journal_is_applied_once),
        cmocka_unit_test(runs_on_a_stream_are_what_they_were),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
