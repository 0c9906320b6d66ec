/* What tsctl doctor finds of a machine: files in a folder stand for /proc and /sys. */
#define _GNU_SOURCE
#include "doctor.h"

#include "test_util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define PID 4242u

static char root[64];

/* Of main.c, which isn't linked. */
void tsctl_print_json(const options *o, json_t *value)
{
    (void)o;
    json_decref(value);
}

ts_status tsctl_ask(ts_client *c, Tspb__Request *request, Tspb__Reply__BodyCase expected,
                    Tspb__Reply **reply)
{
    (void)c, (void)request, (void)expected, (void)reply;
    return TS_EINTERNAL;
}

static void write_file(const char *path, const char *text)
{
    char whole[256];
    snprintf(whole, sizeof whole, "%s%s", root, path);
    for (char *slash = strchr(whole + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        (void)mkdir(whole, 0700);
        *slash = '/';
    }
    FILE *f = fopen(whole, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0 && fclose(f) == 0);
}

static int make_root(void **state)
{
    (void)state;
    snprintf(root, sizeof root, "/tmp/tinyserve-doctor.XXXXXX");
    if (mkdtemp(root) == NULL)
        return -1;
    unsetenv("CUDA_MPS_PIPE_DIRECTORY");
    write_file("/proc/4242/comm", "tinyserved\n");
    write_file("/proc/4242/limits",
               "Limit                     Soft Limit           Hard Limit\n"
               "Max open files            1024                 4096     files\n");
    write_file("/proc/4242/cgroup", "0::/system.slice/tinyserved.service\n");
    write_file("/proc/sys/vm/max_map_count", "65530\n");
    write_file("/proc/meminfo", "MemTotal:       16777216 kB\nMemFree:  1 kB\n");
    return 0;
}

static int remove_root(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", root);
    return system(command);
}

/* The finding whose text has this part; fails if there is none. */
static const finding *find(const findings *f, const char *part)
{
    for (size_t i = 0; i < f->count; i++)
        if (strstr(f->all[i].text, part) != NULL)
            return &f->all[i];
    for (size_t i = 0; i < f->count; i++)
        print_error("%s: %s\n", f->all[i].about, f->all[i].text);
    fail_msg("nothing is found about '%s'", part);
    return NULL;
}

static void assert_found(const findings *f, const char *part, finding_level level,
                         const char *advice)
{
    const finding *one = find(f, part);
    assert_int_equal(one->level, level);
    if (advice == NULL)
        assert_string_equal(one->advice, "");
    else if (strstr(one->advice, advice) == NULL)
        fail_msg("'%s' is missing in: %s", advice, one->advice);
}

static findings look(doctor_facts facts)
{
    findings f = {.count = 0};
    doctor_machine(&f, root, &facts);
    return f;
}

static void a_daemon_with_room_for_all_is_fine(void **state)
{
    (void)state;
    const findings f =
        look((doctor_facts){.pid = PID, .host_bytes = 1ull << 30, .host_slabs = 16, .slabs = 16});
    assert_found(&f, "the daemon may open 1024 files; its slabs in host memory take 16", FINDING_OK,
                 NULL);
    assert_found(&f, "65530 mappings; the pools have 16 slabs", FINDING_OK, NULL);
    assert_found(&f, "pools in host memory have 1.0 GiB of the machine's 16.0 GiB", FINDING_OK,
                 NULL);
    for (size_t i = 0; i < f.count; i++)
        assert_int_equal(f.all[i].level, FINDING_OK);
}

static void too_few_descriptors_and_mappings_are_faults_with_the_number_that_is_needed(void **state)
{
    (void)state;
    findings f = look((doctor_facts){.pid = PID, .host_slabs = 512, .slabs = 512});
    assert_found(&f, "the daemon may open 1024 files", FINDING_OK, NULL); /* 512 + 64 * 8 */
    f = look((doctor_facts){.pid = PID, .host_slabs = 513, .slabs = 61434});
    assert_found(&f, "the daemon may open 1024 files", FINDING_FAULT, "at least 1025:");
    assert_found(&f, "61434 slabs", FINDING_OK, NULL);
    f = look((doctor_facts){.pid = PID, .slabs = 61435});
    assert_found(&f, "61435 slabs", FINDING_FAULT, "vm.max_map_count=131062");
    write_file("/proc/4242/limits", "Max open files            unlimited      unlimited  files\n");
    f = look((doctor_facts){.pid = PID, .host_slabs = 1000000});
    assert_found(&f, "any number of files", FINDING_OK, NULL);
    struct rlimit before, few = {100, 0};
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    few.rlim_max = before.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    f = look((doctor_facts){.pid = PID});
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_found(&f, "a worker that is started here may open 100 files", FINDING_WARNING,
                 "ulimit -n 256");
}

static void pools_beyond_the_machine_or_the_control_group_are_told(void **state)
{
    (void)state;
    const uint64_t bytes = 15ull << 30;
    findings f = look((doctor_facts){.pid = PID, .host_bytes = bytes});
    assert_found(&f, "15.0 GiB of the machine's 16.0 GiB", FINDING_WARNING, "leave a tenth");
    /* The least of the group and those above it counts. */
    write_file("/sys/fs/cgroup/system.slice/tinyserved.service/memory.max", "max\n");
    write_file("/sys/fs/cgroup/system.slice/memory.max", "8589934592\n");
    f = look((doctor_facts){.pid = PID, .host_bytes = bytes});
    assert_found(&f, "the daemon's control group /system.slice may use 8.0 GiB", FINDING_FAULT,
                 "raise MemoryMax=");
    f = look((doctor_facts){.pid = PID, .host_bytes = 8ull << 30});
    assert_found(&f, "/system.slice may use 8.0 GiB", FINDING_OK, NULL);
}

static void another_process_of_that_number_is_not_taken_for_the_daemon(void **state)
{
    (void)state;
    write_file("/proc/4242/comm", "bash\n"); /* the daemon's own numbers are another container's */
    const findings f = look((doctor_facts){.pid = PID, .host_slabs = 100000});
    for (size_t i = 0; i < f.count; i++)
        assert_null(strstr(f.all[i].text, "the daemon may open"));
}

static void a_gpu_without_mps_and_a_gpu_without_a_pool_are_told(void **state)
{
    (void)state;
    char folder[128];
    findings f = look((doctor_facts){.pid = PID, .on_gpu = true});
    assert_found(&f, "no client of MPS", FINDING_WARNING, "nvidia-cuda-mps-control -d");
    /* It runs, and the daemon isn't its client. */
    snprintf(folder, sizeof folder, "%s/mps", root);
    write_file("/mps/control", "");
    setenv("CUDA_MPS_PIPE_DIRECTORY", folder, 1);
    f = look((doctor_facts){.pid = PID, .on_gpu = true});
    assert_found(&f, "no client of MPS", FINDING_WARNING, "MPS runs now: restart the daemon");
    f = look((doctor_facts){.pid = PID, .on_gpu = true, .mps = true});
    assert_found(&f, "shares the GPU by MPS", FINDING_OK, NULL);
    setenv("CUDA_MPS_PIPE_DIRECTORY", "/nowhere", 1);
    f = look((doctor_facts){.pid = PID, .on_gpu = true, .mps = true});
    assert_found(&f, "isn't told where MPS is", FINDING_WARNING, "CUDA_MPS_PIPE_DIRECTORY");
    write_file("/proc/driver/nvidia/version", "NVRM\n");
    f = look((doctor_facts){.pid = PID});
    assert_found(&f, "has a GPU, and no pool is on one", FINDING_WARNING, "device = auto");
}

static void a_socket_that_is_none_or_open_to_all_is_told(void **state)
{
    (void)state;
    char path[128];
    findings f = {.count = 0};
    snprintf(path, sizeof path, "%s/s", root);
    doctor_socket(&f, path);
    assert_found(&f, "there is no ", FINDING_FAULT, "start the daemon");
    write_file("/s", "");
    f.count = 0;
    doctor_socket(&f, path);
    assert_found(&f, "is no socket", FINDING_FAULT, "TINYSERVE_URL");
    f.count = 0;
    doctor_socket(&f, "");
    assert_found(&f, "the daemon's address is empty", FINDING_FAULT, "name a socket");
}

/* Whether anything is found about verify; *f is what is found. */
static bool verify_is_told(Tspb__RestartStatus *restart, findings *f)
{
    Tspb__StatusReply r = TSPB__STATUS_REPLY__INIT;
    bool told = false;
    r.restart = restart;
    f->count = 0;
    doctor_store(f, &r);
    for (size_t i = 0; i < f->count; i++)
        told = told || strcmp(f->all[i].about, "verify") == 0;
    return told;
}

static void memory_that_was_wrong_and_is_not_checked_is_told(void **state)
{
    (void)state;
    findings f;
    Tspb__RestartStatus s = TSPB__RESTART_STATUS__INIT;
    s.verify = TSPB__RESTART_STATUS__VERIFY__OFF;
    assert_false(verify_is_told(&s, &f)); /* no fault, whoever holds the memory */
    s.verify = TSPB__RESTART_STATUS__VERIFY__RESTART;
    s.unsummed_pools = 2;
    assert_true(verify_is_told(&s, &f));
    assert_found(&f, "verify = restart is in vain", FINDING_WARNING, "set verify = off");
    s.holder = TSPB__RESTART_STATUS__HOLDER__SYSTEMD;
    s.journaled = true;
    assert_true(verify_is_told(&s, &f));
    assert_found(&f, "2 pools have no checksums", FINDING_WARNING, "FileDescriptorStoreMax=");
    s.unsummed_pools = 0;
    s.checked = true;
    s.full_blocks = 9;
    s.checked_blocks = 8;
    s.unsummed_blocks = 1;
    assert_false(verify_is_told(&s, &f));
    s.wrong_blocks = 3;
    s.lost_sequences = 1;
    assert_true(verify_is_told(&s, &f));
    assert_found(&f,
                 "the last restart found 3 blocks that didn't hold what was stored in them; 1 "
                 "sequences are lost",
                 FINDING_WARNING, "nvidia-smi -q -d ECC");
}

static void books_that_are_behind_are_a_fault(void **state)
{
    (void)state;
    findings f = {0};
    Tspb__RestartStatus s = TSPB__RESTART_STATUS__INIT;
    Tspb__StatusReply r = TSPB__STATUS_REPLY__INIT;
    r.restart = &s;
    s.holder = TSPB__RESTART_STATUS__HOLDER__SYSTEMD;
    s.journaled = true;
    doctor_store(&f, &r);
    assert_int_equal(f.count, 1);
    assert_int_equal(f.all[0].level, FINDING_OK);
    s.behind = true;
    f.count = 0;
    doctor_store(&f, &r);
    assert_found(&f, "a restart would begin with nothing", FINDING_FAULT, "MemoryMax=");
}

int main(void)
{
#define IN_ROOT(test) cmocka_unit_test_setup_teardown(test, make_root, remove_root)
    const struct CMUnitTest tests[] = {
        IN_ROOT(a_daemon_with_room_for_all_is_fine),
        IN_ROOT(too_few_descriptors_and_mappings_are_faults_with_the_number_that_is_needed),
        IN_ROOT(pools_beyond_the_machine_or_the_control_group_are_told),
        IN_ROOT(another_process_of_that_number_is_not_taken_for_the_daemon),
        IN_ROOT(a_gpu_without_mps_and_a_gpu_without_a_pool_are_told),
        IN_ROOT(a_socket_that_is_none_or_open_to_all_is_told),
        cmocka_unit_test(memory_that_was_wrong_and_is_not_checked_is_told),
        cmocka_unit_test(books_that_are_behind_are_a_fault),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
