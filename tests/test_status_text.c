/* What `tsctl status` prints of a daemon with GPUs, as its reply tells of them. */
#define _GNU_SOURCE
#include "test_util.h"

#include "tsctl.h"
#include "unconst.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* What the call prints. The caller frees it. */
static char *printed(const Tspb__StatusReply *r)
{
    char *text = calloc(1, 8192);
    FILE *file = tmpfile();
    const style plain = {0};
    assert_non_null(text);
    assert_non_null(file);
    fflush(stdout);
    int before = dup(1);
    assert_int_equal(dup2(fileno(file), 1), 1);
    text_status(r, &plain);
    fflush(stdout);
    assert_int_equal(dup2(before, 1), 1);
    close(before);
    rewind(file);
    assert_true(fread(text, 1, 8191, file) > 0);
    fclose(file);
    return text;
}

static void each_gpu_without_mps_is_named_once(void **state)
{
    (void)state;
    static const char *const devices[] = {"cuda:1", "host", "cuda:0", "cuda:1", "cuda:2"};
    enum { POOLS = sizeof devices / sizeof *devices };
    Tspb__PoolSummary pools[POOLS], *list[POOLS];
    Tspb__StatusReply r = TSPB__STATUS_REPLY__INIT;
    for (uint32_t i = 0; i < POOLS; i++) {
        tspb__pool_summary__init(&pools[i]);
        pools[i].name = (char *)"p";
        pools[i].device = ts_unconst(devices[i]);
        pools[i].mps = i == 2; /* cuda:0 */
        list[i] = &pools[i];
    }
    r.version = r.kernel = (char *)"x";
    r.n_pools = POOLS;
    r.pools = list;
    char *text = printed(&r);
    static const char *const wanted =
        "  cuda:1: MPS is off, and the GPU is handed from process to process: see tsctl doctor\n"
        "  cuda:2: MPS is off, and the GPU is handed from process to process: see tsctl doctor\n"
        "POOL ";
    assert_non_null(strstr(text, wanted));
    assert_null(strstr(text, "cuda:0:"));
    assert_null(strstr(text, "host:"));
    free(text);
}

static void what_outlives_the_daemon_is_told(void **state)
{
    (void)state;
    Tspb__PoolSummary pools[2], *list[2];
    Tspb__RestartStatus restart = TSPB__RESTART_STATUS__INIT;
    Tspb__StatusReply r = TSPB__STATUS_REPLY__INIT;
    for (uint32_t i = 0; i < 2; i++) {
        tspb__pool_summary__init(&pools[i]);
        pools[i].name = (char *)(i == 0 ? "old" : "new");
        pools[i].device = (char *)"host";
        pools[i].memory = (char *)(i == 0 ? "cuda-ipc" : "cuda-vmm");
        list[i] = &pools[i];
    }
    r.version = r.kernel = (char *)"x";
    r.n_pools = 2;
    r.pools = list;
    char *text = printed(&r); /* an older daemon says nothing of it */
    assert_null(strstr(text, "store"));
    free(text);

    r.restart = &restart;
    text = printed(&r);
    assert_non_null(strstr(text, "  store    nobody: what is stored ends with the daemon\nPOOL "));
    free(text);

    restart = (Tspb__RestartStatus)TSPB__RESTART_STATUS__INIT;
    restart.holder = TSPB__RESTART_STATUS__HOLDER__SYSTEMD;
    restart.journaled = restart.took_over = true;
    restart.journal_bytes = 64u << 20;
    restart.journal_used_bytes = 3u << 20;
    restart.snapshot_bytes = 5u << 20;
    restart.snapshot_seconds = 0.0625;
    restart.restarts = 7;
    restart.seconds = 0.125;
    restart.sequences = 12;
    restart.entries = 34;
    restart.awaited_sessions = 2;
    restart.cause = (char *)"signal 11";
    text = printed(&r);
    assert_non_null(strstr(
        text, "  store    held by systemd\n"
              "  store    pool old's memory (cuda-ipc) ends with the daemon\n"
              "  journal  3.0 MiB of 64.0 MiB in use; the last snapshot: 5.0 MiB in 0.062 s\n"
              "  restarts 7; the last (signal 11, SIGSEGV) took 0.125 s: 12 sequences,\n"
              "           34 commands done again, 2 sessions yet to come back\nPOOL "));
    free(text);

    static const char *const causes[][2] = {
        {"status 3", "(status 3, a GPU failed)"},
        {"status 4", "(status 4, tsctl restart)"},
        {"unknown", "(unknown)"},
        {"", "(cause unknown)"},
        {"signal 9, then status 2", "(signal 9, SIGKILL, then status 2)"},
        {"status 3, then unknown", "(status 3, a GPU failed, then unknown)"},
        {"signal 999", "(signal 999)"}};
    restart.holder = TSPB__RESTART_STATUS__HOLDER__SUPERVISOR;
    for (size_t i = 0; i < sizeof causes / sizeof *causes; i++) {
        restart.cause = ts_unconst(causes[i][0]);
        text = printed(&r);
        assert_non_null(strstr(text, causes[i][1]));
        assert_non_null(strstr(text, "  store    held by a supervisor\n"));
        free(text);
    }
    assert_null(strstr(text = printed(&r), "BEHIND"));
    free(text);
    restart.behind = true;
    text = printed(&r);
    assert_non_null(strstr(text, "  BEHIND: the journal is full, and there is no memory for a "
                                 "snapshot:\n    a restart would begin with nothing\n"));
    free(text);
    restart.took_over = restart.behind = false;
    restart.failure = (char *)"a journal of version 9";
    text = printed(&r);
    assert_null(strstr(text, "restarts"));
    assert_non_null(strstr(text, "could not be taken over:\n    a journal of version 9\n"));
    free(text);
}

static void whether_a_restart_checks_memory_is_told(void **state)
{
    (void)state;
    Tspb__RestartStatus restart = TSPB__RESTART_STATUS__INIT;
    Tspb__StatusReply r = TSPB__STATUS_REPLY__INIT;
    r.version = r.kernel = (char *)"x";
    r.restart = &restart;
    restart.holder = TSPB__RESTART_STATUS__HOLDER__SUPERVISOR;
    restart.journaled = true;
    char *text = printed(&r); /* an older daemon says nothing of it */
    assert_null(strstr(text, "verify"));
    free(text);
    restart.verify = TSPB__RESTART_STATUS__VERIFY__OFF;
    text = printed(&r);
    assert_non_null(strstr(text, "  verify   off: a restart doesn't check memory\n"));
    free(text);

    restart.verify = TSPB__RESTART_STATUS__VERIFY__RESTART;
    restart.unsummed_blocks = 5;
    restart.took_over = restart.checked = true;
    restart.full_blocks = 40;
    restart.checked_blocks = 38;
    restart.check_seconds = 0.125;
    text = printed(&r);
    assert_non_null(strstr(text, "  verify   restart: 5 blocks wait for their checksum\n"));
    assert_null(strstr(text, "no checksums"));
    assert_non_null(strstr(text, "yet to come back\n"
                                 "           38 of 40 full blocks were checked in 0.125 s\nPOOL "));
    free(text);
    restart.wrong_blocks = restart.all_wrong_blocks = 3;
    restart.lost_sequences = restart.all_lost_sequences = 2;
    restart.unsummed_pools = 1;
    text = printed(&r);
    assert_non_null(strstr(text, "  verify   1 pools have no checksums: see tsctl doctor\n"));
    assert_non_null(strstr(text, "checked in 0.125 s\n"
                                 "  LOST: 3 blocks, which didn't hold what was stored in them,\n"
                                 "    and the 2 sequences that had one\nPOOL "));
    free(text);
    restart.all_wrong_blocks = 7;
    restart.all_lost_sequences = 11;
    text = printed(&r);
    assert_non_null(strstr(text, "    and the 2 sequences that had one\n"
                                 "  LOST in all restarts: 7 such blocks, and 11 sequences that had "
                                 "one,\n    or a block in memory that was gone\nPOOL "));
    free(text);

    restart = (Tspb__RestartStatus)TSPB__RESTART_STATUS__INIT; /* nobody holds the memory */
    restart.verify = TSPB__RESTART_STATUS__VERIFY__RESTART;
    restart.unsummed_pools = 1;
    text = printed(&r);
    assert_non_null(
        strstr(text, "  verify   restart, in vain: nothing outlives the daemon\nPOOL "));
    free(text);
    restart.verify = TSPB__RESTART_STATUS__VERIFY__OFF;
    restart.unsummed_pools = 0;
    text = printed(&r);
    assert_null(strstr(text, "verify"));
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_gpu_without_mps_is_named_once),
        cmocka_unit_test(what_outlives_the_daemon_is_told),
        cmocka_unit_test(whether_a_restart_checks_memory_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
