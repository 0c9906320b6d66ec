/*
 * tsbench's parts: each benchmark checks its results before it times them, and measures what it is
 * compared with in the same run.
 */
#ifndef TSBENCH_H
#define TSBENCH_H

#include "gpu.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef struct bench_options {
    bool json;
    const char *daemon; /* path of tinyserved */
    uint32_t threads;   /* 0: all */
    double gib;         /* of cache that attend reads */
    bool on_gpu;        /* attend on cuda:ordinal */
    uint32_t ordinal;
    ts_kernel kernel;
    bool all_kernels;
    const char *shape; /* only those whose name has this; NULL: all */
    bool append;       /* attend writes the new tokens' K and V too */
    uint32_t layers;   /* of the cache; 0: so many that no cache holds what was read last */
    bool in_order;     /* the cache's blocks */
    uint32_t runs;     /* that the sequences are, of one launch */
} bench_options;

/* Each returns an exit status and appends rows to `rows`. */
int bench_rpc(const bench_options *o, json_t *rows);
int bench_alloc(const bench_options *o, json_t *rows);
int bench_attend(const bench_options *o, json_t *rows);
int bench_attend_gpu(const bench_options *o, json_t *rows); /* where there is CUDA */
int bench_step(const bench_options *o, json_t *rows);
int bench_restart(const bench_options *o, json_t *rows);
int bench_cache(const bench_options *o, json_t *rows);
bool bench_cache_crowd(const bench_options *o, json_t *rows);     /* a part of it */
bool bench_restart_workers(const bench_options *o, json_t *rows); /* a part of restart */

/* A run for --json: benchmark, version, date, machine and command, and the rows. The caller's.
 * load: the machine's load average before the run. */
json_t *bench_report(const char *benchmark, int argc, char *const *argv, double load, json_t *rows);

/* Processes that benchmarks start: tsbench again, with a name of one of these as first argument. */
int rpc_echo_server(int argc, char **argv);
int rpc_client(int argc, char **argv);
int step_client(int argc, char **argv);
int cache_client(int argc, char **argv);
int restart_client(int argc, char **argv);

/* Starts a program with these as its stdin and stdout (-1: as ours); 0 or less: it can't be. */
pid_t bench_start(char *const *argv, int in, int out);

/* Starts a daemon with one pool, and a key set if `set` isn't NULL; waits until it answers. */
pid_t bench_daemon(const bench_options *o, const char *socket, const char *pool, const char *set);

/* Starts `count` programs, argument list i (NULL at its end) at argvs + i * words; when each has
 * written a byte to its stdout, gives each one on its stdin. The seconds from then to the end of
 * the last; < 0: one failed. */
#define BENCH_TOGETHER_MAX 64u
double bench_together(uint32_t count, char *const *argvs, size_t words);

/* Sends the signal and waits for the end; 0 or less is fine. */
void bench_end(pid_t pid, int signal);

double bench_now(void);                                      /* seconds */
double bench_percentile(double *values, size_t n, double p); /* sorts; p in 0..100 */

#endif
