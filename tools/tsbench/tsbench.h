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
} bench_options;

/* Each returns an exit status and appends rows to `rows`. */
int bench_rpc(const bench_options *o, json_t *rows);
int bench_alloc(const bench_options *o, json_t *rows);
int bench_attend(const bench_options *o, json_t *rows);
int bench_attend_gpu(const bench_options *o, json_t *rows); /* where there is CUDA */

/* The processes that bench_rpc starts: tsbench again, with one of these names as first argument. */
int rpc_echo_server(const char *url, size_t reply_bytes);
int rpc_client(int argc, char **argv);

double bench_now(void);                                      /* seconds */
double bench_percentile(double *values, size_t n, double p); /* sorts; p in 0..100 */

#endif
