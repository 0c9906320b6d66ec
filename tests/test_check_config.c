/* tinyserved --check-config and its refusal to start: what is said of which configuration. */
#define _GNU_SOURCE
#include "daemon_util.h"

#include "command_util.h"

#include <fcntl.h>

/* Writes a configuration and expects tinyserved --check-config to say all of this (status 2; @ is
 * the file), or to accept. */
static void expect_config(const char *config, const char *const *complaints)
{
    char path[] = "/tmp/tinyserve-config.XXXXXX", text[16384];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, config, strlen(config)), (ssize_t)strlen(config));
    close(fd);
    int status = run(text, sizeof text, TS_DAEMON " --check-config --config %s", path);
    unlink(path);
    if (status != (complaints == NULL ? 0 : 2))
        fail_msg("status %d, and %s", status, text);
    for (; complaints != NULL && *complaints != NULL; complaints++) {
        char expected[512];
        snprintf(expected, sizeof expected, "error: %s%s", **complaints == '@' ? path : "",
                 *complaints + (**complaints == '@'));
        assert_has(text, expected);
    }
}
#define EXPECT(config, ...) expect_config(config, (const char *const[]){__VA_ARGS__, NULL})

static void a_wrong_configuration_is_refused_with_file_line_and_reason(void **state)
{
    (void)state;
#define POOL "[pool p]\nlayers = 2\nkv_heads = 1\nhead_dim = 64\n"
    expect_config(POOL "memory = 1M\n", NULL);
    expect_config(POOL "memory = 1M\nlayout = hnd\ndtype = fp16\nclient_write = all\n", NULL);
    expect_config(POOL "  memory = 1M # as much\n\n\tlayout = hnd ; so\n#x\n;y\n[daemon]# z\n",
                  NULL);
    EXPECT(POOL "memory = 1Q\n",
           "@:5: memory = 1Q: not a size such as 512M, 4G or a number of bytes");
    EXPECT(POOL "memory = -1\n", "@:5: memory = -1: the limits are 1..9223372036854775807\n");
    EXPECT(POOL "memory = 99999999999999999999G\n",
           "@:5: memory = 99999999999999999999G: the limits are 1..9223372036854775807\n");
    EXPECT(POOL "memory = 99999999999T\n",
           "@:5: memory = 99999999999T: the limits are 1..9223372036854775807\n");
    EXPECT(POOL "memory = --1\n", "@:5: memory = --1: not a size");
    EXPECT("[daemon]\nthreads = -1\n", "@:2: threads = -1: the limits are 0..1024\n");
    EXPECT("[daemon]\nthreads = 99999999999999999999\n",
           "@:2: threads = 99999999999999999999: the limits are 0..1024\n");
    EXPECT("[daemon]\nthreds = 2\n" POOL,
           "@:2: there is no key 'threds' in [daemon]: is 'threads' meant?\n");
    EXPECT("[pool p]\nheaddim = 2\n",
           "@:2: there is no key 'headdim' in a [pool]: is 'head_dim' meant?\n");
    EXPECT("[pool p]\nspeed = 2\n", "@:2: there is no key 'speed' in a [pool]\n");
    EXPECT(
        "[pool p]\na-name-that-is-longer-than-that-of-any-key-by-far = 2\n",
        "@:2: there is no key 'a-name-that-is-longer-than-that-of-any-key-by-far' in a [pool]\n");
    EXPECT("\n[deamon]\nthreads = 2\n",
           "@:2: there is no section [deamon]; known are [daemon] and [pool NAME]");
    EXPECT("[daemon]\nthreads = 2000\n", "@:2: threads = 2000: the limits are 0..1024");
    EXPECT("[daemon]\nsocket_mode = 777\n", "@:2: socket_mode = 777: the limits are 600..666");
    EXPECT("[daemon]\nsocket = here\n", "@:2: socket = here: an absolute path");
    EXPECT("[daemon]\nlog_level = loud\n",
           "@:2: log_level = loud: known are error, warning, info, debug");
    EXPECT("[pool p]\nlayers = 300\n", "@:2: layers = 300: the limits are 1..256");
    EXPECT("[pool p]\nhead_dim = 16\n", "@:2: head_dim = 16: the limits are 32..256");
    EXPECT("[pool p]\ndtype = int4\n", "@:2: dtype = int4: known are fp32, fp16, bf16");
    EXPECT("[pool p]\ndevice = gpu\n", "@:2: device = gpu: known are auto, host and cuda:N");
    EXPECT("[pool p]\ndevice = cuda:0x\n", "@:2: device = cuda:0x: known are");
    EXPECT("[pool p]\nkernel = v9\n",
           "@:2: kernel = v9: known are auto, v1, v2, v3, v4, v5, tile, mma, wgmma");
    EXPECT(POOL "memory = 1M\ndevice = host\nprovider = cuda-vmm\n",
           "@:7: pool 'p': provider = cuda-vmm can't be used with device = host");
    EXPECT(POOL "memory = 1M\ndevice = cuda:0\nprovider = host\n",
           "@:7: pool 'p': provider = host can't be used with device = cuda:0");
    EXPECT(POOL "memory = 1M\nprovider = host\nkernel = v1\n",
           "@:7: pool 'p': kernel = v1 runs on a GPU, and the pool is in host memory");
    EXPECT("[daemon]\nsubmit_seconds = 0\n", "@:2: submit_seconds = 0: the limits are 1..3600");
    EXPECT("nonsense\n", "@:1: neither a [section] nor key = value");
    EXPECT("threads = 1\n",
           "@:1: 'threads' stands before the first section; known are [daemon] and [pool NAME]");
    EXPECT(POOL, "@:1: pool 'p': give either memory or blocks");
    EXPECT(POOL "memory = 1M\nblocks = 3\n", "@:6: pool 'p': give either memory or blocks");
    EXPECT(POOL "memory = 1K\n", "@:5: pool 'p': 0 blocks of 8192 bytes");
    EXPECT("[daemon]\n", "no pool is configured");
    EXPECT("[daemon]\nsocket = \n" POOL "memory = 1M\n", "@:2: socket = : an absolute path");
    char text[4096];
    assert_int_equal(run(text, sizeof text, TS_DAEMON " --check-config --config /nowhere"), 2);
    assert_has(text, "/nowhere: No such file or directory\n");
    if (access("/etc/tinyserve/tinyserved.conf", F_OK) != 0) { /* no daemon is installed here */
        assert_int_equal(run(text, sizeof text, TS_DAEMON " --check-config"), 2);
        assert_has(
            text,
            "/etc/tinyserve/tinyserved.conf: No such file or directory; --config names another "
            "file, --pool a pool without one\n");
    }
    assert_int_equal(run(text, sizeof text, TS_DAEMON " --check-config --pool p:layers=1,x=2"), 2);
    assert_has(text, "pool 'p': there is no key 'x' in a [pool]");
    assert_int_equal(run(text, sizeof text, TS_DAEMON " --check-config --pool p:layers=0"), 2);
    assert_has(text, "error: pool 'p': layers = 0: the limits are 1..256\n");
    assert_int_equal(run(text, sizeof text, TS_DAEMON " --check-config --config ''"), 2);
    assert_has(text, "error: --config names no file\n");
    /* More devices than any machine has, or none at all. */
    assert_int_equal(run(text, sizeof text,
                         TS_DAEMON
                         " --socket /tmp/tinyserve-test-none --pool p:layers=1,kv_heads=1,"
                         "head_dim=32,blocks=4,device=cuda:1000 2>&1"),
                     1);
    assert_has(text, "pool 'p': device = cuda:1000: this machine has ");
}

static void all_problems_of_a_configuration_are_told_at_once_in_order(void **state)
{
    (void)state;
    EXPECT("[daemon]\nthreads = many\nnonsense\nthreads = 2\n[pool p]\nlayers = 2\nlayers = 3\n"
           "more nonsense\n[pool p]\nlayers = 4\n[pool q]\nkv_heads = 1\n[daemon]\n[pol]\nx = 1\n",
           "@:2: threads = many: not a number; the limits are 0..1024",
           "@:3: neither a [section] nor key = value", "@:4: threads is given twice: in line 2 too",
           "@:5: pool 'p': kv_heads is missing: it is 1..1024",
           "@:5: pool 'p': head_dim is missing: it is 32..256",
           "@:7: layers is given twice: in line 6 too", "@:8: neither a [section] nor key = value",
           "@:9: section [pool p] is given twice: in line 5 too",
           "@:11: pool 'q': layers is missing: it is 1..256",
           "@:11: pool 'q': give either memory or blocks",
           "@:13: section [daemon] is given twice: in line 1 too",
           "@:14: there is no section [pol]; known are");
    char config[8192] = "[daemon]\n", text[16384];
    for (int i = 0; i < 40; i++)
        strcat(config, "nonsense\nx = 1\n");
    int fd = open("/tmp/tinyserve-config-long", O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_int_equal(write(fd, config, strlen(config)), (ssize_t)strlen(config));
    close(fd);
    assert_int_equal(
        run(text, sizeof text, TS_DAEMON " --check-config --config /tmp/tinyserve-config-long"), 2);
    unlink("/tmp/tinyserve-config-long");
    assert_has(text, "error: and 41 problems more\n");
    assert_int_equal(
        run(text, sizeof text,
            TS_DAEMON " --check-config --pool p:layers=1,layers=2 --pool p:kv_heads=1,head_dim=64,"
                      "memory=1M"),
        2);
    assert_has(text, "pool 'p': layers is given twice");
    assert_has(text, "pool 'p' is given twice on the command line");
}

static void what_this_machine_lacks_is_refused(void **state)
{
    (void)state;
    EXPECT(POOL "memory = 90T\nblock_tokens = 256\ndevice = host\n",
           "@:5: pool 'p': 90.0 TiB are asked for in "
           "host memory; this machine has ");
    EXPECT(POOL "memory = 1M\ndevice = cuda:999\n",
           "@:6: pool 'p': device = cuda:999: this machine has ");
    /* Three fifths of it fit; twice as much doesn't. */
    long long most = (long long)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE) / 5 * 3;
    char config[512], text[4096];
    const char *half = "device = host\nblock_tokens = 256\nmemory = ";
    snprintf(config, sizeof config, POOL "%s%lld\n", half, most);
    expect_config(config, NULL);
    snprintf(config, sizeof config,
             POOL "%s%lld\n[pool q]\nlayers = 2\nkv_heads = 1\nhead_dim = 64\n%s%lld\n", half, most,
             half, most);
    EXPECT(config, "@:14: pool 'q': ");
    assert_int_equal(run(text, sizeof text,
                         TS_DAEMON " --socket /tmp/tinyserve-test-none --pool p:layers=2,"
                                   "kv_heads=1,head_dim=64,block_tokens=256,memory=90T,"
                                   "device=host"),
                     1);
    assert_has(text, "pool 'p': 90.0 TiB are asked for in host memory; this machine has ");
}

static void a_checked_configuration_says_what_each_pool_holds(void **state)
{
    (void)state;
    char text[4096];
    assert_int_equal(run(text, sizeof text,
                         TS_DAEMON " --check-config --pool " POOL_TINY
                                   ",device=host,blocks=64,memory_max=100M"),
                     0);
    assert_has(text, "682 blocks of 96.0 KiB (63.9 MiB) in slabs of 63.9 MiB: up to 10912 tokens, "
                     "and 17056 when it has grown");
    assert_int_equal(run(text, sizeof text,
                         TS_DAEMON " --check-config --pool " POOL_TINY ",device=host,blocks=64"),
                     0);
    assert_has(text, "64 blocks of 96.0 KiB (6.0 MiB) in one slab of 6.0 MiB, so for one user at a "
                     "time: up to 1024 tokens");
    assert_int_equal(run(text, sizeof text, TS_DAEMON " --frob"), 2);
    assert_int_equal(run(text, sizeof text, TS_DAEMON " word"), 2);
}

/* Every key of the shipped configuration is taken out of its comment. */
static void the_shipped_configuration_is_edited_by_uncommenting(void **state)
{
    (void)state;
    char text[16384];
    const char *uncomment = "sed -E 's/^# ([a-z_]+ =)/\\1/' " TS_EXAMPLE_CONFIG;
    assert_int_equal(
        run(text, sizeof text, TS_DAEMON " --check-config --config " TS_EXAMPLE_CONFIG), 0);
    assert_has(text, "pool 'llama-8b' on auto: bf16, 32 layers");
    assert_int_equal(run(text, sizeof text,
                         "%s > /tmp/tinyserve-uncommented; " TS_DAEMON
                         " --check-config --config /tmp/tinyserve-uncommented; s=$?; rm "
                         "/tmp/tinyserve-uncommented; exit $s",
                         uncomment),
                     0);
    assert_has(text, "pool 'llama-8b' on auto: bf16, 32 layers");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_wrong_configuration_is_refused_with_file_line_and_reason),
        cmocka_unit_test(all_problems_of_a_configuration_are_told_at_once_in_order),
        cmocka_unit_test(what_this_machine_lacks_is_refused),
        cmocka_unit_test(a_checked_configuration_says_what_each_pool_holds),
        cmocka_unit_test(the_shipped_configuration_is_edited_by_uncommenting),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
