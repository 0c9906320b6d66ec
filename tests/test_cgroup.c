/* What memory cgroups allow, read from a file system that the test has made. */
#define _GNU_SOURCE
#include "test_util.h"

#include "cgroup.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)

static char root[64];

static void put(const char *folder, const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s%s/%s", root, folder, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static void put_mib(const char *folder, const char *name, uint64_t mib)
{
    char text[32];
    snprintf(text, sizeof text, "%llu\n", (unsigned long long)(mib * MIB));
    put(folder, name, text);
}

static void each_cgroup_up_to_the_root_is_asked(void **state)
{
    (void)state;
    char path[128], why[256];
    snprintf(root, sizeof root, "/tmp/tinyserve-cgroup.XXXXXX");
    assert_non_null(mkdtemp(root));
    snprintf(path, sizeof path, "%s/a", root);
    assert_int_equal(mkdir(path, 0755), 0);
    snprintf(path, sizeof path, "%s/a/b", root);
    assert_int_equal(mkdir(path, 0755), 0);
    assert_true(ts_cgroup_allows_at(root, "/a/b", UINT64_MAX / 2, why, sizeof why)); /* no limits */
    put("/a/b", "memory.max", "max\n");
    put_mib("/a/b", "memory.current", 900);
    put_mib("/a", "memory.max", 1000);
    put_mib("/a", "memory.current", 900);
    /* 100 are left, of which 64 are the margin. */
    assert_true(ts_cgroup_allows_at(root, "/a/b", 36 * MIB, why, sizeof why));
    assert_false(ts_cgroup_allows_at(root, "/a/b", 36 * MIB + 1, why, sizeof why));
    assert_string_equal(why,
                        "37748737 bytes more, and 67108864 for all else, but the memory cgroup "
                        "/a uses 943718400 of 1048576000");
    /* Pages of files can be had back; shared memory, which they count too elsewhere, can't. */
    put("/a", "memory.stat",
        "anon 5\nfile 314572800\nshmem 209715200\ninactive_file 73400320\nactive_file 31457280\n");
    assert_true(ts_cgroup_allows_at(root, "/a/b", 136 * MIB, why, sizeof why));
    assert_false(ts_cgroup_allows_at(root, "/a/b", 136 * MIB + 1, why, sizeof why));
    put_mib("/a/b", "memory.max", 800); /* it was lowered meanwhile */
    assert_false(ts_cgroup_allows_at(root, "/a/b", 1, why, sizeof why));
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", root);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(each_cgroup_up_to_the_root_is_asked)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
