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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_gpu_without_mps_is_named_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
