/*
 * The books: what a restart finds is what there was. The model's random commands (model_world.h)
 * are put into books with snapshots at every turn. Now and then the daemon "dies": books are opened
 * from what the keeper has, and the state that they give must be, byte by byte, the one that there
 * was; the model goes on with it.
 */
#define _GNU_SOURCE
#include "model_waits.h"

#include "books.h"
#include "snapshot.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- a keeper: what is kept lives while the test does ---- */

#define KEPT_MAX 8

typedef struct keeper {
    char names[KEPT_MAX][32];
    int fds[KEPT_MAX]; /* with a name */
} keeper;

static int place_of(const keeper *k, const char *name)
{
    int i = 0;
    while (i < KEPT_MAX && strcmp(k->names[i], name) != 0)
        i++;
    return i;
}

static int take(void *arg, const char *name)
{
    const keeper *k = arg;
    const int i = place_of(k, name);
    return i == KEPT_MAX ? -1 : fcntl(k->fds[i], F_DUPFD_CLOEXEC, 0);
}

static ts_status keep(void *arg, const char *name, int fd, char *why, size_t why_bytes)
{
    keeper *k = arg;
    (void)why;
    (void)why_bytes;
    assert_int_equal(place_of(k, name), KEPT_MAX);
    const int i = place_of(k, "");
    assert_true(i < KEPT_MAX);
    snprintf(k->names[i], sizeof k->names[i], "%s", name);
    k->fds[i] = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return TS_OK;
}

static void forget(void *arg, const char *name)
{
    keeper *k = arg;
    const int i = place_of(k, name);
    if (i == KEPT_MAX || name[0] == '\0')
        return;
    close(k->fds[i]);
    k->names[i][0] = '\0';
}

static void keeper_end(keeper *k)
{
    for (int i = 0; i < KEPT_MAX; i++)
        if (k->names[i][0] != '\0')
            close(k->fds[i]);
}

/* ---- a world with books ---- */

typedef struct shelf {
    keeper keeper;
    ts_books *books;
    ts_engine_limits limits;
    uint32_t entries;
    uint64_t journal_bytes;
} shelf;

static void noted(void *arg, const ts_engine *e, const ts_command *c, const ts_answer *a)
{
    shelf *s = arg;
    ts_books_begin(s->books, c);
    ts_books_note(s->books, e, c, a);
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
    ts_answer a; /* what only looks isn't in the journal, but goes on in time */
    run(w, (ts_command){.op = TS_OP_DRAIN}, &a);
    ts_books_close(s->books);
    w->e = open_books(s, start);
    if (!start->restored)
        fail_msg("%s", start->why);
    assert_string_equal(start->why, "");
    assert_same_state(before, w->e);
    check_engine(w->e);
    ts_books_serve(s->books);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_a_restart_finds_is_what_there_was),
        cmocka_unit_test(a_full_journal_makes_commands_wait),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
