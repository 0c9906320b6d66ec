/* What doctor asks the machine: limits, memory, GPUs. Everything is read below a root, for tests.
 */
#define _GNU_SOURCE
#include "doctor.h"

#include "mps.h"
#include "plain_text.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define WORKER_DESCRIPTORS 256u     /* that leave a worker room for an engine's own */
#define CONNECTION_DESCRIPTORS 8u   /* of the daemon, for each worker */
#define COMFORTABLE_CONNECTIONS 64u /* workers that it should have room for */
#define MAPPINGS_BESIDE 4096u       /* of a worker: its libraries, heap, stacks */

/* Reads a small file; false: there is none. */
static bool read_file(const char *root, const char *path, char *text, size_t bytes)
{
    char whole[PATH_MAX];
    snprintf(whole, sizeof whole, "%s%s", root, path);
    FILE *f = fopen(whole, "re");
    if (f == NULL)
        return false;
    const size_t length = fread(text, 1, bytes - 1, f);
    text[length] = '\0';
    (void)fclose(f);
    return true;
}

/* The number behind this word; UINT64_MAX: "unlimited" or "max"; false: there is none. */
static bool number_after(const char *text, const char *word, uint64_t *n)
{
    const char *at = strstr(text, word);
    char *end;
    if (at == NULL)
        return false;
    at += strlen(word) + strspn(at + strlen(word), " \t:");
    if (strncmp(at, "unlimited", 9) == 0 || strncmp(at, "max", 3) == 0) {
        *n = UINT64_MAX;
        return true;
    }
    *n = strtoull(at, &end, 10);
    return end != at;
}

static bool number_in(const char *root, const char *path, uint64_t *n)
{
    char text[64];
    return read_file(root, path, text, sizeof text) && number_after(text, "", n);
}

/* What /proc says of the daemon; false: it isn't to be seen from here. */
static bool of_daemon(const char *root, uint64_t pid, const char *file, char *text, size_t bytes)
{
    char path[64], name[64];
    snprintf(path, sizeof path, "/proc/%llu/comm", (unsigned long long)pid);
    if (pid == 0 || !read_file(root, path, name, sizeof name) ||
        strncmp(name, "tinyserved", strlen("tinyserved")) != 0)
        return false;
    snprintf(path, sizeof path, "/proc/%llu/%s", (unsigned long long)pid, file);
    return read_file(root, path, text, bytes);
}

void doctor_descriptors(findings *f, const char *root, const doctor_facts *facts)
{
    char text[4096], shown[24];
    uint64_t daemon;
    struct rlimit own;
    if (getrlimit(RLIMIT_NOFILE, &own) == 0) {
        const bool few = own.rlim_cur < WORKER_DESCRIPTORS;
        doctor_found(f, few ? FINDING_WARNING : FINDING_OK, "descriptors",
                     "a worker that is started here may open %llu files",
                     (unsigned long long)own.rlim_cur);
        if (few)
            doctor_advise(f, "ulimit -n %u, or LimitNOFILE= in the worker's unit",
                          WORKER_DESCRIPTORS);
    }
    if (!of_daemon(root, facts->pid, "limits", text, sizeof text) ||
        !number_after(text, "Max open files", &daemon))
        return;
    const uint64_t wanted =
        facts->host_slabs + (uint64_t)COMFORTABLE_CONNECTIONS * CONNECTION_DESCRIPTORS;
    if (daemon == UINT64_MAX)
        snprintf(shown, sizeof shown, "any number of");
    else
        snprintf(shown, sizeof shown, "%llu", (unsigned long long)daemon);
    doctor_found(f, daemon < wanted ? FINDING_FAULT : FINDING_OK, "descriptors",
                 "the daemon may open %s files; its slabs in host memory take %llu", shown,
                 (unsigned long long)facts->host_slabs);
    if (daemon < wanted)
        doctor_advise(f,
                      "at least %llu: LimitNOFILE= in the daemon's unit (systemctl edit "
                      "tinyserved), or ulimit -n before it is started; or a larger `slab`",
                      (unsigned long long)wanted);
}

/* A worker maps each slab on its own. */
static void mappings(findings *f, const char *root, const doctor_facts *facts)
{
    uint64_t most;
    if (facts->slabs == 0 || !number_in(root, "/proc/sys/vm/max_map_count", &most))
        return;
    const bool few = most < facts->slabs + MAPPINGS_BESIDE;
    doctor_found(f, few ? FINDING_FAULT : FINDING_OK, "mappings",
                 "a process may have %llu mappings; the pools have %llu slabs",
                 (unsigned long long)most, (unsigned long long)facts->slabs);
    if (few)
        doctor_advise(f, "sysctl vm.max_map_count=%llu, or a larger `slab`",
                      (unsigned long long)(facts->slabs + MAPPINGS_BESIDE) * 2);
}

/* The least memory.max of the daemon's cgroup and those above it; UINT64_MAX: there is none. */
static uint64_t cgroup_limit(const char *root, uint64_t pid, char *at, size_t at_bytes)
{
    char text[4096], path[PATH_MAX];
    uint64_t least = UINT64_MAX, limit;
    at[0] = '\0';
    if (!of_daemon(root, pid, "cgroup", text, sizeof text))
        return least;
    char *group = strstr(text, "0::/");
    if (group == NULL)
        return least;
    group += 3;
    group[strcspn(group, "\n")] = '\0';
    for (;;) {
        snprintf(path, sizeof path, "/sys/fs/cgroup%.3000s/memory.max", group);
        if (number_in(root, path, &limit) && limit < least) {
            least = limit;
            snprintf(at, at_bytes, "%.200s", group[0] == '\0' ? "/" : group);
        }
        char *slash = strrchr(group, '/');
        if (slash == NULL)
            return least;
        *slash = '\0';
    }
}

static void memory(findings *f, const char *root, const doctor_facts *facts)
{
    char text[4096], group[256], pools[32], has[32];
    uint64_t kib;
    if (facts->host_bytes == 0)
        return;
    (void)ts_text_bytes(facts->host_bytes, pools, sizeof pools);
    if (read_file(root, "/proc/meminfo", text, sizeof text) &&
        number_after(text, "MemTotal", &kib)) {
        /* A pool's pages come when they are first written: too many, and the kernel kills. */
        const bool tight = facts->host_bytes > kib * 1024 / 10 * 9;
        doctor_found(f, tight ? FINDING_WARNING : FINDING_OK, "memory",
                     "pools in host memory have %s of the machine's %s", pools,
                     ts_text_bytes(kib * 1024, has, sizeof has));
        if (tight)
            doctor_advise(f, "leave a tenth to everything else: make `memory` smaller");
    }
    const uint64_t limit = cgroup_limit(root, facts->pid, group, sizeof group);
    if (limit == UINT64_MAX)
        return;
    const bool small = limit < facts->host_bytes;
    doctor_found(f, small ? FINDING_FAULT : FINDING_OK, "memory",
                 "the daemon's control group %s may use %s; its pools in host memory have %s",
                 group, ts_text_bytes(limit, has, sizeof has), pools);
    if (small)
        doctor_advise(f, "the kernel kills the daemon when they fill: raise MemoryMax= or the "
                         "container's limit, or make `memory` smaller");
}

static void gpus(findings *f, const char *root, const doctor_facts *facts)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/proc/driver/nvidia/version", root);
    const bool driver = access(path, F_OK) == 0;
    if (facts->on_gpu && facts->mps) {
        doctor_found(f, FINDING_OK, "MPS", "the daemon shares the GPU by MPS");
        if (!mps_runs())
            doctor_found(f, FINDING_WARNING, "MPS",
                         "a worker that is started here isn't told where MPS is"),
                doctor_advise(f, "set CUDA_MPS_PIPE_DIRECTORY as the daemon has it");
    } else if (facts->on_gpu) {
        doctor_found(f, FINDING_WARNING, "MPS",
                     "the daemon is no client of MPS: the GPU is handed from process to process, "
                     "which costs some 0.28 ms a layer");
        doctor_advise(f, mps_runs() ? "MPS runs now: restart the daemon, as MPS's own user"
                                    : "nvidia-cuda-mps-control -d, then restart the daemon and "
                                      "its workers; harmless to leave if workers attend "
                                      "themselves");
    } else if (driver && facts->pid != 0) {
        doctor_found(f, FINDING_WARNING, "GPU", "this machine has a GPU, and no pool is on one");
        doctor_advise(f, "if one should be: the daemon's log says why device = auto took host "
                         "memory (a build without CUDA, or a GPU that it may not open: the unit "
                         "tinyserved.service opens none, tinyserved@0.service does)");
    }
}

void doctor_machine(findings *f, const char *root, const doctor_facts *facts)
{
    doctor_descriptors(f, root, facts);
    mappings(f, root, facts);
    memory(f, root, facts);
    gpus(f, root, facts);
}
