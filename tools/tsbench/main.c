/* tsbench: measures the service's parts beside the machine's own limits. */
#define _GNU_SOURCE
#include "standard_output.h"
#include "tinyserve_version.h"
#include "tsbench.h"

#include <argp.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

const char *argp_program_version = "tsbench " TS_VERSION;

typedef struct arguments {
    bench_options options;
    const char *what;
} arguments;

static const struct argp_option argp_options[] = {
    {"json", 'j', NULL, 0, "Write JSON: the machine, the date, the command and the figures", 0},
    {"daemon", 'd', "PATH", 0, "tinyserved to measure (default: beside tsbench, or in PATH)", 0},
    {"threads", 't', "N", 0, "Kernel threads of attend (default: all processors)", 0},
    {"size", 'g', "GIB", 0, "Cache that attend reads, beyond the last-level cache (default 1)", 0},
    {"device", 'D', "DEVICE", 0, "host (the default) or cuda:N: where attend runs", 0},
    {"kernel", 'k', "NAME", 0, "Kernel of attend on a GPU (default auto)", 0},
    {"all-kernels", 'a', NULL, 0, "Every kernel in turn", 0},
    {"shape", 's', "TEXT", 0,
     "The shape that attend measures, such as '100 x 777, 28/4/128 bf16, 4 new', or those of its "
     "own whose name has this",
     0},
    {"append", 'A', NULL, 0, "Attend on a GPU writes the new tokens' K and V too", 0},
    {"layers", 'l', "N", 0, "Layers of attend's cache on a GPU (default: what no cache holds)", 0},
    {"in-order", 'i', NULL, 0, "Attend's blocks on a GPU lie in order, not at random", 0},
    {"runs", 'r', "N", 0, "Attend's sequences on a GPU are N workers', joined in one launch", 0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    arguments *a = state->input;
    char *end;
    switch (key) {
    case 'j':
        a->options.json = true;
        return 0;
    case 'd':
        a->options.daemon = arg;
        return 0;
    case 't': {
        unsigned long n = strtoul(arg, &end, 10);
        if (*end != '\0' || n > 1024)
            argp_error(state, "--threads %s: 0 to 1024 are possible", arg);
        a->options.threads = (uint32_t)n;
        return 0;
    }
    case 'g':
        a->options.gib = strtod(arg, &end);
        if (*end != '\0' || !(a->options.gib >= 0.01 && a->options.gib <= 1024))
            argp_error(state, "--size %s: 0.01 to 1024 GiB are possible", arg);
        return 0;
    case 'D':
        a->options.on_gpu = strncmp(arg, "cuda:", 5) == 0;
        a->options.ordinal = a->options.on_gpu ? (uint32_t)strtoul(arg + 5, &end, 10) : 0;
        if (a->options.on_gpu ? arg[5] == '\0' || *end != '\0' : strcmp(arg, "host") != 0)
            argp_error(state, "--device %s: host and cuda:N are possible", arg);
        return 0;
    case 'k':
        a->options.kernel = ts_kernel_find(arg);
        if (a->options.kernel == TS_KERNEL_COUNT)
            argp_error(state, "--kernel %s: there is no such kernel", arg);
        return 0;
    case 'a':
        a->options.all_kernels = true;
        return 0;
    case 's':
        a->options.shape = arg;
        return 0;
    case 'A':
        a->options.append = true;
        return 0;
    case 'i':
        a->options.in_order = true;
        return 0;
    case 'l': {
        unsigned long n = strtoul(arg, &end, 10);
        if (*end != '\0' || n == 0 || n > TS_LAYERS_MAX)
            argp_error(state, "--layers %s: 1 to %u are possible", arg, TS_LAYERS_MAX);
        a->options.layers = (uint32_t)n;
        return 0;
    }
    case 'r': {
        unsigned long n = strtoul(arg, &end, 10);
        if (*end != '\0' || n == 0 || n > 1024)
            argp_error(state, "--runs %s: 1 to 1024 are possible", arg);
        a->options.runs = (uint32_t)n;
        return 0;
    }
    case ARGP_KEY_ARG:
        if (state->arg_num > 0)
            argp_error(state, "one benchmark at a time: '%s' is too many", arg);
        a->what = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "which benchmark?");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp argp = {
    argp_options,
    parse,
    "BENCHMARK",
    "Measures TinyServe on this machine.\v"
    "Benchmarks:\n"
    "  rpc      round trips through a daemon, and through a bare NNG echo\n"
    "  step     decode steps through rings and messages, and bare round trips\n"
    "  cache    matches by token ids, what ids cost a step, and eviction\n"
    "  alloc    appends, forks and frees inside the engine\n"
    "  restart  what outliving the daemon costs, and how long taking over takes\n"
    "  attend   kernels of the processor or of a GPU, and the memory's read rate\n\n"
    "A shape: COUNT x TOKENS or COUNT x LEAST-MOST [+ more of these],\n"
    "HEADS/KV_HEADS/HEAD_DIM fp32|fp16|bf16|fp8 [nhd|hnd] [, N new | , all new]\n"
    "[, N shared]; tsbench(1) explains it",
    NULL,
    NULL,
    NULL};

double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_percentile(double *values, size_t n, double p)
{
    qsort(values, n, sizeof *values, compare);
    size_t i = (size_t)((double)n * p / 100.0);
    return values[i < n ? i : n - 1];
}

/* tinyserved in the build tree or where both are installed, else whatever PATH has. */
static const char *find_daemon(char *buffer, size_t bytes)
{
    static const char *const places[] = {"../daemon/tinyserved", "../sbin/tinyserved",
                                         "tinyserved"};
    char self[512];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0)
        return "tinyserved";
    self[n] = '\0';
    const char *folder = dirname(self);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        snprintf(buffer, bytes, "%s/%s", folder, places[i]);
        if (access(buffer, X_OK) == 0)
            return buffer;
    }
    return "tinyserved";
}

static const struct benchmark {
    const char *name;
    int (*run)(const bench_options *o, json_t *rows);
} benchmarks[] = {{"rpc", bench_rpc},     {"step", bench_step},       {"cache", bench_cache},
                  {"alloc", bench_alloc}, {"restart", bench_restart}, {"attend", bench_attend}};

/* NULL, and it is told: there is none of this name. */
static const struct benchmark *find_benchmark(const char *name)
{
    const size_t count = sizeof benchmarks / sizeof *benchmarks;
    for (size_t i = 0; i < count; i++)
        if (strcmp(benchmarks[i].name, name) == 0)
            return &benchmarks[i];
    fprintf(stderr, "tsbench: there is no benchmark '%s'; there are ", name);
    for (size_t i = 0; i < count; i++)
        fprintf(stderr, "%s%s", benchmarks[i].name,
                i + 2 < count   ? ", "
                : i + 1 < count ? " and "
                                : "\n");
    return NULL;
}

/* What this program is when a benchmark starts it; argv[1] is its name. */
static const struct part {
    const char *name;
    int (*run)(int argc, char **argv);
} parts[] = {{"rpc-echo", rpc_echo_server},
             {"rpc-client", rpc_client},
             {"step-client", step_client},
             {"cache-client", cache_client},
             {"restart-client", restart_client}};

int main(int argc, char **argv)
{
    for (size_t i = 0; argc > 2 && i < sizeof parts / sizeof *parts; i++)
        if (strcmp(argv[1], parts[i].name) == 0)
            return parts[i].run(argc, argv);
    char path[1024];
    arguments a = {.options = {.gib = 1.0, .runs = 1}};
    argp_err_exit_status = 2;
    ts_output_begin();
    argp_parse(&argp, argc, argv, 0, NULL, &a);
    const struct benchmark *benchmark = find_benchmark(a.what);
    if (benchmark == NULL)
        return 2;
    bool for_gpu = a.options.kernel != TS_KERNEL_AUTO || a.options.all_kernels ||
                   a.options.append || a.options.layers != 0 || a.options.in_order ||
                   a.options.runs > 1;
    if (for_gpu && !(a.options.on_gpu && benchmark->run == bench_attend)) {
        fprintf(stderr,
                "tsbench: --kernel, --all-kernels, --append, --layers, --in-order and --runs are "
                "for attend --device cuda:N\n");
        return 2;
    }
    if (a.options.shape != NULL && benchmark->run != bench_attend) {
        fprintf(stderr, "tsbench: --shape is for attend\n");
        return 2;
    }
    if (a.options.daemon == NULL)
        a.options.daemon = find_daemon(path, sizeof path);
    double load = 0;
    (void)getloadavg(&load, 1); /* 0 where it isn't known */
    json_t *rows = json_array();
    const int code = benchmark->run(&a.options, rows);
    if (a.options.json && code == 0) {
        json_t *report = bench_report(a.what, argc, argv, load, rows);
        json_dumpf(report, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(5));
        putchar('\n');
        json_decref(report);
    }
    json_decref(rows);
    return code;
}
