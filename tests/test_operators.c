/* What operators do to pools, and who is an operator: the daemon and tsctl as programs. */
#define _GNU_SOURCE
#include "daemon_util.h"

#include "rpc.h"

/* 96 KiB a block, four to a slab. */
#define POOL_SMALL POOL_TINY ",slab=384K,client_write=all"

static daemon_process d;
static char text[4096];

static int tsctl(const char *format, ...)
{
    char command[1024], arguments[768];
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    snprintf(command, sizeof command, TS_CTL " --socket=%s %s 2>&1 </dev/null", d.url, arguments);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    size_t n = fread(text, 1, sizeof text - 1, f);
    text[n] = '\0';
    int status = pclose(f);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

#define SAYS(status, part, ...)                                                                    \
    do {                                                                                           \
        int got = tsctl(__VA_ARGS__);                                                              \
        if (got != (status) || strstr(text, part) == NULL)                                         \
            fail_msg("exit status %d, not %d, or '%s' is missing in:\n%s", got, status, part,      \
                     text);                                                                        \
    } while (0)

static void a_pool_is_made_and_deleted_while_the_daemon_runs(void **state)
{
    (void)state;
    daemon_start(&d, POOL_SMALL ",blocks=64");
    ts_client *c = connect_to(&d);
    ts_pool *p, *q, *none;
    SAYS(1, "there is a pool 'tiny' already",
         "pool create tiny layers=1 kv_heads=1 head_dim=32 blocks=4");
    SAYS(1, "there is a pool 'tiny' already", /* before its memory is looked for */
         "pool create tiny layers=1 kv_heads=1 head_dim=32 blocks=4 device=cuda:99");
    SAYS(1, "there is no key 'color' in a [pool]", "pool create b color=red");
    SAYS(1, "pool 'b': 'layers' is not key=value", "pool create b layers");
    SAYS(1, "pool 'b': give either memory or blocks",
         "pool create b layers=1 kv_heads=1 head_dim=32");
    SAYS(1, "pool 'b': memory_max is less than its memory",
         "pool create b layers=1 kv_heads=1 head_dim=32 memory=2M memory_max=1M");
    SAYS(1, "pool 'b': tenant_pinned = 100 bytes is less than a block, which has 4096",
         "pool create b layers=1 kv_heads=1 head_dim=32 dtype=fp32 memory=2M tenant_pinned=100");
    SAYS(1, "pool 'b': tenant_memory = 4095 bytes is less than a block, which has 4096",
         "pool create b layers=1 kv_heads=1 head_dim=32 dtype=fp32 memory=2M tenant_memory=4095");
    assert_int_equal(ts_pool_open(c, "b", 0, &none), TS_ENOENT);
    assert_string_equal(ts_error(c), "there is no pool 'b'; there is 'tiny'");

    /* A session that was there before uses it, beside the other. */
    SAYS(0, "",
         "pool create b layers=2 kv_heads=1 head_dim=32 dtype=fp32 blocks=8 client_write=all");
    assert_int_equal(ts_pool_open(c, "", 0, &none), TS_EINVAL);
    assert_string_equal(ts_error(c), "there are several pools: name one of 'tiny', 'b'");
    OK(ts_pool_open(c, "b", TS_POOL_WRITABLE, &p));
    OK(ts_pool_open(c, "tiny", TS_POOL_WRITABLE, &q));
    ts_seq seq, other;
    uint32_t n = 40;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_append(p, &seq, &n, 1, NULL));
    OK(ts_seq_create(q, 1, &other));
    OK(ts_seq_append(q, &other, &n, 1, NULL));
    OK(ts_seq_keep(p, seq, "kept"));
    SAYS(0, "0 problems", "check");
    SAYS(1, "pool 'b' is open in 1 session (", "--yes pool delete b");
    SAYS(2, "Delete pool b and its 1 kept sequences? Add --yes", "pool delete b");
    SAYS(1, "there is no pool 'c'; there are 'tiny', 'b'", "--yes pool delete c");
    OK(ts_seq_lengths(p, &seq, 1, &n));
    ts_pool_close(p);
    ts_pool_close(q);
    ts_disconnect(c);

    /* What a session has closed everywhere, and has nothing in, is not open in it. */
    ts_pool *once, *twice;
    c = connect_to(&d);
    OK(ts_pool_open(c, "tiny", 0, &q));
    SAYS(0, "", "pool create brief layers=1 kv_heads=1 head_dim=32 dtype=fp32 blocks=8");
    OK(ts_pool_open(c, "brief", 0, &once));
    OK(ts_pool_open(c, "brief", 0, &twice));
    OK(ts_seq_create(twice, 1, &seq));
    ts_pool_close(once);
    OK(ts_seq_lengths(twice, &seq, 1, &n));
    ts_pool_close(twice); /* its sequence stays */
    SAYS(1, "pool 'brief' is open in 1 session (", "--yes pool delete brief");
    OK(ts_pool_open(c, "brief", 0, &once));
    n = 1;
    ts_step *step;
    OK(ts_step_begin(once, &seq, &n, 1, NULL, &step));
    OK(ts_step_abort(step));
    OK(ts_seq_free(once, &seq, 1));
    ts_pool_close(once);
    SAYS(0, "", "--yes pool delete brief");
    OK(ts_seq_create(q, 1, &seq)); /* and the session goes on */
    ts_pool_close(q);
    ts_disconnect(c);

    /* Gone, with what was kept; its place is taken by the next, which knows nothing of it. */
    c = connect_to(&d);
    OK(ts_pool_open(c, "tiny", 0, &q));
    SAYS(0, "", "--yes pool delete b");
    OK(ts_pool_open(c, NULL, 0, &p)); /* the only one */
    ts_pool_close(p);
    OK(ts_pool_open(c, "", 0, &p));
    assert_int_equal(ts_pool_geometry(p, 0)->layers, 6);
    ts_pool_close(p);
    SAYS(0, "0 problems", "check");
    assert_int_equal(ts_pool_open(c, "b", 0, &none), TS_ENOENT);
    SAYS(0, "{\n  \"created_pool\": \"c\"\n}\n",
         "--json pool create c layers=1 kv_heads=2 head_dim=64 dtype=fp32 blocks=4");
    OK(ts_pool_open(c, "c", 0, &p));
    assert_int_equal(ts_pool_geometry(p, 0)->kv_heads, 2);
    assert_int_equal(ts_pool_geometry(q, 0)->layers, 6);
    uint32_t tokens;
    assert_int_equal(ts_seq_attach(p, "kept", &seq, &tokens), TS_ENOENT);
    SAYS(0, "0 problems", "check");
    ts_pool_close(p);
    ts_pool_close(q);
    ts_disconnect(c);
    SAYS(0, "", "--yes pool delete tiny");
    assert_string_equal(text, ""); /* for people: it is done */
    SAYS(0, "{\n  \"deleted_pool\": \"c\"\n}\n", "--json --yes pool delete c");
    SAYS(0, "0 problems", "check");
    SAYS(0, "[]", "--json pools");
    daemon_stop(&d);
}

/* Writes the block that holds the sequence's token and reads it back by the same mapping. */
static void touch(ts_pool *p, ts_seq seq, uint32_t token)
{
    uint64_t slot;
    void *base;
    OK(ts_seq_slots(p, seq, 0, token, 1, &slot));
    OK(ts_pool_map(p, &slot, 1, 0, &base));
    const ts_geometry *g = ts_pool_geometry(p, 0);
    unsigned char *at = (unsigned char *)base + slot / g->block_tokens * ts_geometry_block_bytes(g);
    memset(at, 0x5a, 64);
    assert_int_equal(at[63], 0x5a);
}

static void a_pool_grows_and_shrinks_under_its_workers(void **state)
{
    (void)state;
    daemon_start(&d, POOL_SMALL ",blocks=6,memory_max=2016K"); /* 21 blocks: 5 slabs and a bit */
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    assert_int_equal(ts_pool_blocks(p), 21);
    SAYS(0, "\"blocks\": 8,", "--json pools"); /* whole slabs */
    SAYS(0, "\"max_blocks\": 21", "--json pools");
    ts_seq seqs[2];
    uint32_t eight = 8 * 16, one = 1;
    OK(ts_seq_create(p, 2, seqs));
    OK(ts_seq_append(p, seqs, &eight, 1, NULL));
    assert_int_equal(ts_seq_append(p, seqs + 1, &one, 1, NULL), TS_ENOSPC);

    /* More, under a session that has it open. */
    SAYS(1,
         "memory = 2112K: that is 22 blocks of 98304 bytes; pool 'tiny' may have 1 to 21, its "
         "memory_max",
         "pool resize tiny 2112K");
    SAYS(1,
         "memory = 999T: that is 11173625856 blocks of 98304 bytes; pool 'tiny' may have 1 to 21",
         "pool resize tiny 999T");
    SAYS(1, "memory = 1K: that is 0 blocks", "pool resize tiny 1K");
    SAYS(1, "memory = much: not a size", "pool resize tiny much");
    SAYS(1, "there is no pool 'other'", "pool resize other 1M");
    SAYS(0, "pool tiny has 12 blocks of 98304 bytes in 3 slabs", "pool resize tiny 900K");
    SAYS(0,
         "pool tiny still has 12 blocks of 98304 bytes in 3 slabs: it has whole slabs of 4 blocks",
         "pool resize tiny 1000K");
    OK(ts_seq_append(p, seqs + 1, &one, 1, NULL));
    touch(p, seqs[1], 0);
    SAYS(0, "pool tiny has 21 blocks of 98304 bytes in 6 slabs", "pool resize tiny 2016K");
    uint32_t more = 12 * 16;
    OK(ts_seq_append(p, seqs + 1, &more, 1, NULL)); /* the last block's slab has only one */
    touch(p, seqs[1], 12 * 16);
    SAYS(0, "0 problems", "check");

    /* Less, as far as nothing lies there. */
    SAYS(1, "pool 'tiny' can't have 8 blocks: block 8 is in use, and blocks don't move",
         "pool resize tiny 768K");
    OK(ts_seq_free(p, seqs + 1, 1));
    SAYS(0, "\"pool\": \"tiny\",\n  \"blocks\": 8,\n  \"block_bytes\": 98304,\n  \"slabs\": 2\n}",
         "-j pool resize tiny 768K");
    SAYS(0, "0 problems", "check");
    OK(ts_seq_create(p, 1, seqs + 1));
    assert_int_equal(ts_seq_append(p, seqs + 1, &one, 1, NULL), TS_ENOSPC);

    /* And more again: other memory, which is mapped anew and is 0. */
    SAYS(0, "pool tiny has 12 blocks", "pool resize tiny 1152K");
    OK(ts_seq_append(p, seqs + 1, &one, 1, NULL));
    uint64_t slot;
    void *base;
    OK(ts_seq_slots(p, seqs[1], 0, 0, 1, &slot));
    OK(ts_pool_map(p, &slot, 1, 0, &base));
    const ts_geometry *g = ts_pool_geometry(p, 0);
    const unsigned char *at =
        (unsigned char *)base + slot / g->block_tokens * ts_geometry_block_bytes(g);
    for (int i = 0; i < 64; i++)
        assert_int_equal(at[i], 0);
    touch(p, seqs[1], 0);
    touch(p, seqs[0], 7 * 16);
    SAYS(0, "0 problems", "check");
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void a_group_of_operators_is_configured(void **state)
{
    (void)state;
    if (getuid() != 0)
        skip();
    static const char *const more[] = {"--set", "socket_mode=0666", "--set", "operators=games",
                                       NULL};
    daemon_start_with(&d, POOL_TINY ",blocks=64", more);
    char command[1024];
    snprintf(command, sizeof command, "%s --socket=%s drain off",
             ctl_of_others(&d, "--reuid 65534 --regid games"), d.url);
    assert_int_equal(system(command), 0);
    snprintf(command, sizeof command,
             "%s --socket=%s drain off 2>&1 | grep -q "
             "'uid 65534 is no operator: root, uid 0 and group games are'",
             ctl_of_others(&d, "--reuid 65534 --regid 65534"), d.url);
    assert_int_equal(system(command), 0);
    snprintf(command, sizeof command,
             "%s --socket=%s --yes restart --empty 2>&1 | grep -q 'uid 65534 is no operator'",
             ctl_of_others(&d, "--reuid 65534 --regid 65534"), d.url);
    assert_int_equal(system(command), 0);
    ctl_of_others_remove(&d);
    daemon_stop(&d);
    assert_int_equal(system(TS_DAEMON " --set operators=nosuchgroup --pool " POOL_TINY
                                      ",blocks=1 --check-config 2>&1 | grep -q "
                                      "\"operators = nosuchgroup: there is no group "
                                      "'nosuchgroup'\""),
                     0);
}

static void a_restart_that_would_lose_everything_is_refused_unless_that_is_wanted(void **state)
{
    (void)state;
    int status;
    daemon_start(&d, POOL_TINY ",blocks=64");
    SAYS(2, "Restart the daemon? Workers wait", "restart");
    SAYS(2, "lose all that is stored? Add --yes", "restart --empty");
    SAYS(2, "--empty is for restart", "--empty status");
    SAYS(1,
         "nobody holds the daemon's memory: a restart loses all that is stored, and only one "
         "with --empty is allowed to",
         "--yes restart");
    SAYS(0, "store    nobody: what is stored ends with the daemon", "status");
    /* Nobody starts this one again: tsctl would wait, so the order comes from here. */
    ts_client *c = connect_to(&d);
    Tspb__AdminRestart body = TSPB__ADMIN_RESTART__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_RESTART;
    request.admin_restart = &body;
    body.empty = true;
    body.pid = (uint64_t)d.pid + 1; /* the order was another daemon's, and came again */
    OK(ts_call_plain(c, &request));
    SAYS(0, "0 problems", "check");
    body.pid = (uint64_t)d.pid;
    const ts_status answer = ts_call_plain(c, &request);
    assert_true(answer == TS_OK || answer == TS_ECONN);
    assert_int_equal(waitpid(d.pid, &status, 0), d.pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 4);
    ts_disconnect(c);
    assert_int_equal(rmdir(d.folder), 0);
    alarm(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_pool_is_made_and_deleted_while_the_daemon_runs),
        cmocka_unit_test(a_pool_grows_and_shrinks_under_its_workers),
        cmocka_unit_test(a_group_of_operators_is_configured),
        cmocka_unit_test(a_restart_that_would_lose_everything_is_refused_unless_that_is_wanted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
