/* The configuration by itself: what a file or a command line comes to, and what is wrong with it.
 */
#include "test_util.h"

#include "config.h"
#include "config_keys.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static ts_config c;

/* Reads the bytes as a file; the problems are in c. */
static ts_status read_bytes(const char *text, size_t bytes)
{
    char path[] = "/tmp/tinyserve-config.XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, bytes), (ssize_t)bytes);
    close(fd);
    ts_config_init(&c);
    const ts_status read = ts_config_read(&c, path), finished = ts_config_finish(&c);
    unlink(path);
    return read != TS_OK ? read : finished;
}

static ts_status read_text(const char *text)
{
    return read_bytes(text, strlen(text));
}

#define POOL "[pool p]\nlayers = 2\nkv_heads = 2\nhead_dim = 64\n"

static void a_pools_memory_becomes_blocks_and_slabs(void **state)
{
    (void)state;
    assert_int_equal(read_text(POOL "dtype = bf16\nblock_tokens = 16\nmemory = 8M\nslab = 4M\n"),
                     TS_OK);
    assert_int_equal(c.num_pools, 1);
    const ts_pool_config *p = &c.pools[0].pool;
    assert_string_equal(p->name, "p");
    assert_int_equal(p->geometry.dtype, TS_DTYPE_BF16);
    /* A block: 2 layers x K and V x 16 tokens x 2 heads x 64 elements x 2 bytes. */
    assert_int_equal(ts_geometry_block_bytes(&p->geometry), 16384);
    assert_int_equal(p->num_blocks, 512);
    assert_int_equal(p->slab_blocks, 256);
    assert_int_equal(p->max_blocks, 512);
}

static void a_pools_name_has_no_blank_at_either_end(void **state)
{
    (void)state;
    static const char *const wrong[] = {" y", "x ", " "};
    char text[256], told[128];
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        snprintf(told, sizeof told, "a pool's name neither begins nor ends with a blank: '%s'",
                 wrong[i]);
        snprintf(text, sizeof text, "[pool %s]\nlayers = 2\nkv_heads = 2\nhead_dim = 64\n",
                 wrong[i]);
        assert_int_equal(read_text(text), TS_EINVAL);
        assert_non_null(strstr(c.problems[0].text, told));
        ts_config_init(&c);
        snprintf(text, sizeof text, "%s:layers=2,kv_heads=2,head_dim=64,memory=8M", wrong[i]);
        assert_int_equal(ts_config_add_pool(&c, text), TS_EINVAL);
        assert_non_null(strstr(c.problems[0].text, told));
    }
    ts_config_init(&c);
    assert_int_equal(
        ts_config_add_pool(&c, "a b:layers=2,kv_heads=2,head_dim=64,memory=8M,device=host"), TS_OK);
    assert_string_equal(c.pools[0].pool.name, "a b");
}

/* Of a slab that is mapped for it, which a small container must have room for. */
static void a_slab_is_no_larger_than_what_its_pool_may_grow_to(void **state)
{
    (void)state;
    const ts_pool_config *p = &c.pools[0].pool;
    assert_int_equal(read_text(POOL "memory = 1M\ndevice = host\n"), TS_OK);
    assert_int_equal(p->num_blocks, 64);
    assert_int_equal(p->slab_blocks, 64);
    assert_int_equal(read_text(POOL "memory = 1M\nmemory_max = 256M\ndevice = host\n"), TS_OK);
    assert_int_equal(p->slab_blocks, 4096); /* 64M */
    assert_int_equal(read_text(POOL "memory = 1M\nmemory_max = 256M\nslab = 8192T\n"
                                    "device = host\n"),
                     TS_OK);
    assert_int_equal(p->slab_blocks, 16384);
    assert_int_equal(read_text(POOL "memory = 1M\ndevice = cuda:0\n"), TS_OK);
    assert_int_equal(p->slab_blocks, 64);
    /* Blocks of 1.5 KiB: 8 are whole pages. */
    assert_int_equal(read_text("[pool p]\nlayers = 3\nkv_heads = 1\nhead_dim = 64\ndtype = bf16\n"
                               "block_tokens = 2\nblocks = 11\ndevice = host\n"),
                     TS_OK);
    assert_int_equal(p->num_blocks, 11);
    assert_int_equal(p->slab_blocks, 16);
}

/* A sequence's block table has a limit. A length that was asked for isn't cut silently; the default
 * is. */
static void a_sequences_tokens_are_as_many_as_its_blocks_hold(void **state)
{
    (void)state;
    assert_int_equal(read_text(POOL "block_tokens = 16\nmemory = 1M\nsequence_tokens = 4194304\n"),
                     TS_OK);
    assert_int_equal(c.pools[0].pool.sequence_tokens_max, 4194304);
    assert_int_equal(read_text(POOL "block_tokens = 16\nmemory = 1M\nsequence_tokens = 4194305\n"),
                     TS_EINVAL);
    assert_int_equal(c.problems[0].line, 7);
    assert_string_equal(c.problems[0].text,
                        "pool 'p': sequence_tokens = 4194305: with blocks of 16 tokens the limit "
                        "is 4194304, 262144 blocks");
    assert_int_equal(read_text(POOL "block_tokens = 1\nmemory = 1M\n"), TS_OK);
    assert_int_equal(c.pools[0].pool.sequence_tokens_max, 262144);
}

/* A pool that an operator makes is looked at by itself. */
static void pools_are_finished_without_the_daemons_keys(void **state)
{
    (void)state;
    ts_config_init(&c);
    assert_int_equal(ts_config_finish_pools(&c), TS_OK); /* none */
    assert_int_equal(ts_config_add_pool(&c, "p:layers=1,kv_heads=1,head_dim=32,blocks=4"), TS_OK);
    assert_int_equal(ts_config_finish_pools(&c), TS_OK);
    assert_int_equal(c.pools[0].pool.num_blocks, 4);
    ts_config_init(&c);
    assert_int_equal(ts_config_add_pool(&c, "p:layers=1,kv_heads=1,head_dim=32"), TS_OK);
    assert_int_equal(ts_config_finish_pools(&c), TS_EINVAL);
}

static void a_byte_order_mark_is_no_part_of_the_first_section(void **state)
{
    (void)state;
    assert_int_equal(read_text("\xef\xbb\xbf[daemon]\nthreads = 3\n" POOL "memory = 1M\n"), TS_OK);
    assert_int_equal(c.threads, 3);
    assert_int_equal(read_text("\xef\xbb\xbf[daemon]\nthreads = none\n" POOL "memory = 1M\n"),
                     TS_EINVAL);
    assert_int_equal(c.num_problems, 1);
    assert_int_equal(c.problems[0].line, 2);
    /* A second one is, and then inih sees a section where there is none. */
    assert_int_equal(
        read_text("\xef\xbb\xbf\xef\xbb\xbf[daemon]\nthreads = 3\n" POOL "memory = 1M"), TS_EINVAL);
    assert_int_equal(c.problems[0].line, 2);
    assert_string_equal(
        c.problems[0].text,
        "'threads' stands before the first section; known are [daemon] and [pool NAME]");
}

static void a_nul_byte_is_told_and_what_is_behind_it_is_read(void **state)
{
    static const char text[] =
        POOL "memory = 1M\nlayout\0 = hnd\ndtype = \0int4\n[daemon]\nx = 1\n";
    (void)state;
    assert_int_equal(read_bytes(text, sizeof text - 1), TS_EINVAL);
    assert_int_equal(c.num_problems, 3);
    assert_int_equal(c.problems[0].line, 6);
    assert_string_equal(c.problems[0].text, "a NUL byte: the file must be text in UTF-8");
    assert_int_equal(c.problems[1].line, 7); /* int4 */
    assert_int_equal(c.problems[2].line, 9); /* x */
    assert_int_equal(read_bytes("\0", 1), TS_EINVAL);
    assert_int_equal(c.problems[0].line, 1);
}

/* inih skips blanks of all kinds before a section, and all that is behind it. */
static void no_key_is_passed_over_silently(void **state)
{
    (void)state;
    assert_int_equal(read_text("\v\f[daemon]\nthreads = 3\n" POOL "memory = 1M\n"), TS_OK);
    assert_int_equal(c.threads, 3);
    assert_int_equal(read_text("[daemon] ; so\n[pool p] # too\nlayers = 2\nkv_heads = 2\n"
                               "head_dim = 64\nmemory = 1M\n"),
                     TS_OK);
    assert_int_equal(read_text("[daemon] threads = 3\n" POOL "memory = 1M\n"), TS_EINVAL);
    assert_int_equal(c.num_problems, 1);
    assert_int_equal(c.problems[0].line, 1);
    assert_string_equal(c.problems[0].text,
                        "'threads = 3' stands behind a section: it needs its own line");
    assert_int_equal(read_text("[daemon]\rthreads = 3\r" POOL "memory = 1M\n"), TS_EINVAL);
}

static void every_problem_is_told_with_its_line(void **state)
{
    (void)state;
    static const char *const expected[] = {
        "threads",
        "colour",
        "head_dim",
        "memory",
    };
    assert_int_equal(read_text("[daemon]\nthreads = many\ncolour = blue\n"
                               "[pool p]\nlayers = 2\nkv_heads = 2\nhead_dim = 64000\n"),
                     TS_EINVAL);
    assert_true(c.num_problems >= 4);
    static const uint32_t lines[] = {2, 3, 7, 4};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        bool found = false;
        for (uint32_t j = 0; j < c.num_problems; j++)
            found = found || (c.problems[j].line == lines[i] &&
                              strstr(c.problems[j].text, expected[i]) != NULL);
        assert_true(found);
    }
    for (uint32_t j = 1; j < c.num_problems; j++)
        assert_true(c.problems[j - 1].line <= c.problems[j].line);
}

static void a_key_or_a_pool_given_twice_is_a_problem(void **state)
{
    (void)state;
    assert_int_equal(read_text("[daemon]\nthreads = 1\nthreads = 2\n"), TS_EINVAL);
    assert_non_null(strstr(c.problems[0].text, "threads"));
    assert_int_equal(c.problems[0].line, 3);
    assert_int_equal(read_text(POOL "memory = 1M\n" POOL "memory = 1M\n"), TS_EINVAL);
    assert_non_null(strstr(c.problems[0].text, "p"));
}

static void a_comment_may_follow_a_value(void **state)
{
    (void)state;
    assert_int_equal(
        read_text("# first\n[daemon]\nthreads = 3 # of the kernels\n" POOL "memory = 8M\n"), TS_OK);
    assert_int_equal(c.threads, 3);
    assert_int_equal(read_text(POOL "memory = 8M\nmodel = a#b\t# c\n"), TS_OK);
    assert_string_equal(c.pools[0].pool.model, "a#b"); /* only behind a blank */
}

static void the_command_line_changes_what_the_file_says(void **state)
{
    (void)state;
    assert_int_equal(
        read_text("[daemon]\nmetrics_hosts = a\nsession_blocks = 7\n" POOL "memory = 8M\n"), TS_OK);
    assert_int_equal(ts_config_set(&c, "session_blocks", "8"), TS_OK);
    assert_int_equal(c.limits.session_blocks, 8);
    assert_string_equal(c.metrics_hosts, "a");
    assert_int_equal(ts_config_set(&c, "session_blocks", ""), TS_OK); /* none is a value, too */
    assert_int_equal(ts_config_set(&c, "metrics_hosts", ""), TS_OK);
    assert_int_equal(c.limits.session_blocks, 0);
    assert_string_equal(c.metrics_hosts, "");
    ts_config_init(&c);
    assert_int_equal(ts_config_set(&c, "threads", "5"), TS_OK);
    assert_int_equal(c.threads, 5);
    assert_int_equal(ts_config_set(&c, "threads", "-5"), TS_EINVAL);
    assert_int_equal(ts_config_set(&c, "thread", "5"), TS_EINVAL);
    assert_int_equal(
        ts_config_add_pool(&c, "q:layers=1,kv_heads=1,head_dim=32,blocks=8,block_tokens=4"), TS_OK);
    assert_int_equal(c.pools[0].blocks, 8);
    assert_int_equal(ts_config_add_pool(&c, "r:layers=1,heads=1"), TS_EINVAL);
}

static void sizes_are_read_with_their_units(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes; /* 0: refused */
    } sizes[] = {
        {"4096", 4096}, {"1K", 1024}, {"3M", 3u << 20}, {"2G", 2ull << 30}, {"1T", 1ull << 40},
        {"", 0},        {"G", 0},     {"-1", 0},        {"1X", 0},          {"99999999999G", 0},
        {" 1", 0},      {"+1", 0},    {"1KB", 0},       {"17179869185G", 0}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char why[200];
        uint64_t bytes = 0;
        const ts_status status = ts_config_memory(sizes[i].text, &bytes, why, sizeof why);
        assert_int_equal(status, sizes[i].bytes == 0 ? TS_EINVAL : TS_OK);
        if (status == TS_OK)
            assert_int_equal(bytes, sizes[i].bytes);
    }
}

static void a_key_is_read_as_what_it_is(void **state)
{
    (void)state;
    ts_config_init(&c);
    assert_int_equal(ts_config_set(&c, "idle_seconds", "7"), TS_OK);
    assert_int_equal(c.idle_ms, 7000);
    assert_int_equal(ts_config_set(&c, "log_level", "debug"), TS_OK);
    assert_int_equal(c.log_level, TS_LOG_DEBUG);
    assert_int_equal(ts_config_set(&c, "log_level", "chatty"), TS_EINVAL);
    assert_non_null(strstr(c.problems[0].text, "known are error, warning, info, debug"));
    assert_int_equal(ts_config_set(&c, "socket_mode", "0600"), TS_OK);
    assert_int_equal(c.socket_mode, 0600);
    assert_int_equal(ts_config_set(&c, "socket", "ipc:///run/x"), TS_OK);
    assert_string_equal(c.socket, "/run/x");
    assert_int_equal(ts_config_set(&c, "socket", "run/x"), TS_EINVAL);
    assert_int_equal(ts_config_set(&c, "metrics", "off"), TS_OK);
    assert_string_equal(c.metrics, "");
    assert_int_equal(ts_config_set(&c, "metrics", "9470"), TS_EINVAL);
}

/* The default of such a key follows from others, and an empty value asks for it. */
static void a_key_with_a_default_of_its_own_may_be_empty(void **state)
{
    (void)state;
    assert_int_equal(
        read_text("[daemon]\nsessions = 400\ntenant_sessions =\n" POOL "memory = 8M\n"), TS_OK);
    assert_int_equal(c.limits.tenant_sessions, 100); /* a quarter of `sessions` */
    assert_int_equal(read_text("[daemon]\nsessions =\n" POOL "memory = 8M\n"), TS_EINVAL);
}

static void there_is_a_limit_to_pools_and_each_is_told_once(void **state)
{
    (void)state;
    char text[128];
    ts_config_init(&c);
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++) {
        snprintf(text, sizeof text, "p%u:layers=1,kv_heads=1,head_dim=32,blocks=8", i);
        assert_int_equal(ts_config_add_pool(&c, text), TS_OK);
    }
    assert_int_equal(ts_config_add_pool(&c, "one:blocks=8"), TS_EINVAL);
    assert_int_equal(c.num_pools, TS_POOLS_MAX);
    snprintf(text, sizeof text, "the limit is %u", TS_POOLS_MAX);
    assert_non_null(strstr(c.problems[0].text, text));
    assert_int_equal(ts_config_add_pool(&c, "p3:blocks=8"), TS_EINVAL);
    assert_string_equal(c.problems[1].text, "pool 'p3' is given twice on the command line");
}

static void note(void *arg, const char *key)
{
    strcat(arg, key);
    strcat(arg, " ");
}

static void a_reload_tells_which_keys_take_a_new_start(void **state)
{
    (void)state;
    static ts_config other;
    char differing[200] = "";
    ts_config_init(&c);
    ts_config_init(&other);
    assert_int_equal(ts_config_set(&other, "threads", "2"), TS_OK);
    assert_int_equal(ts_config_set(&other, "log_level", "debug"), TS_OK); /* this one reloads */
    ts_config_compare(&c, &other, note, differing);
    assert_string_equal(differing, "threads ");
}

static void every_key_has_help_and_values_that_it_can_read(void **state)
{
    (void)state;
    const ts_config_section *sections[] = {&ts_config_daemon, &ts_config_pools};
    static union {
        ts_config daemon;
        ts_config_pool pool;
    } section;
    for (size_t s = 0; s < 2; s++)
        for (uint32_t i = 0; i < sections[s]->num_keys; i++) {
            const ts_config_key *key = &sections[s]->keys[i];
            const char *values[] = {key->preset, key->shipped};
            char why[200] = "no help, a needless preset or no end of the sentence";
            bool ok = key->help != NULL && key->help[strlen(key->help) - 1] == '.' &&
                      (key->preset == NULL || (key->empty == NULL && !key->required));
            for (size_t v = 0; v < 2; v++)
                ok = ok && (values[v] == NULL || key->read(key, (char *)&section + key->offset,
                                                           values[v], why, sizeof why) == TS_OK);
            if (!ok)
                fail_msg("%s: %s", key->name, why);
        }
}

static void the_daemon_and_its_engine_have_the_same_default_limits(void **state)
{
    (void)state;
    ts_engine_limits limits;
    ts_engine_default_limits(&limits);
    ts_config_init(&c);
    assert_memory_equal(&c.limits, &limits, sizeof limits);
}

static void workers_keep_an_eighth_of_the_processors(void **state)
{
    (void)state;
    static const uint32_t wanted[][2] = {{1, 1},   {2, 2},   {7, 7},    {8, 7},
                                         {15, 14}, {16, 14}, {192, 168}};
    ts_config_init(&c);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        assert_int_equal(ts_config_threads(&c, wanted[i][0]), wanted[i][1]);
    assert_int_equal(ts_config_set(&c, "threads", "16"), TS_OK);
    assert_int_equal(ts_config_threads(&c, 16), 16);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_pools_memory_becomes_blocks_and_slabs),
        cmocka_unit_test(a_pools_name_has_no_blank_at_either_end),
        cmocka_unit_test(a_slab_is_no_larger_than_what_its_pool_may_grow_to),
        cmocka_unit_test(a_sequences_tokens_are_as_many_as_its_blocks_hold),
        cmocka_unit_test(pools_are_finished_without_the_daemons_keys),
        cmocka_unit_test(a_byte_order_mark_is_no_part_of_the_first_section),
        cmocka_unit_test(a_nul_byte_is_told_and_what_is_behind_it_is_read),
        cmocka_unit_test(no_key_is_passed_over_silently),
        cmocka_unit_test(every_problem_is_told_with_its_line),
        cmocka_unit_test(a_key_or_a_pool_given_twice_is_a_problem),
        cmocka_unit_test(a_comment_may_follow_a_value),
        cmocka_unit_test(the_command_line_changes_what_the_file_says),
        cmocka_unit_test(sizes_are_read_with_their_units),
        cmocka_unit_test(a_key_is_read_as_what_it_is),
        cmocka_unit_test(a_key_with_a_default_of_its_own_may_be_empty),
        cmocka_unit_test(there_is_a_limit_to_pools_and_each_is_told_once),
        cmocka_unit_test(a_reload_tells_which_keys_take_a_new_start),
        cmocka_unit_test(workers_keep_an_eighth_of_the_processors),
        cmocka_unit_test(every_key_has_help_and_values_that_it_can_read),
        cmocka_unit_test(the_daemon_and_its_engine_have_the_same_default_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
