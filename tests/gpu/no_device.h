/*
 * A device that isn't there, for programs that make plans and look at them: what plans ask of one.
 * One for a program.
 */
#ifndef TS_NO_DEVICE_H
#define TS_NO_DEVICE_H

#include "test_util.h"

#include "plan.h"

#include <stdlib.h>

static char why[256];
static ts_gpu gpu;

ts_status ts_gpu_enter(ts_gpu *g, char *w, size_t bytes)
{
    (void)g, (void)w, (void)bytes;
    return TS_OK;
}

ts_status ts_gpu_fail(cudaError_t error, const char *what, size_t n, char *w, size_t bytes)
{
    (void)error, (void)what, (void)n, (void)w, (void)bytes;
    return TS_EDEVICE;
}

ts_status ts_gpu_function_find(ts_gpu *g, const ts_gpu_kernel *kernel, size_t *shared, char *w,
                               size_t bytes)
{
    (void)g, (void)w, (void)bytes;
    *shared = kernel->bytes;
    return TS_OK;
}

void ts_gpu_free_later(ts_gpu *g, void *device)
{
    (void)g, (void)device;
}

/* Its host side has no more bytes than were asked for: a sanitizer sees what is beyond. */
ts_status ts_gpu_buffer_take(ts_gpu *g, size_t n, ts_gpu_buffer **out, char *w, size_t bytes)
{
    (void)g, (void)w, (void)bytes;
    const size_t align = _Alignof(plan_head);
    ts_gpu_buffer *buffer = calloc(1, sizeof *buffer);
    buffer->host = aligned_alloc(align, (n + align - 1) / align * align);
    buffer->is_there = true;
    *out = buffer;
    return TS_OK;
}

ts_status ts_gpu_buffer_upload(ts_gpu *g, ts_gpu_buffer *b, size_t n, char *w, size_t bytes)
{
    (void)g, (void)b, (void)n, (void)w, (void)bytes;
    return TS_OK;
}

void ts_gpu_buffer_give_back(ts_gpu *g, ts_gpu_buffer *b)
{
    (void)g;
    if (b != NULL)
        free(b->host);
    free(b);
}

static int make_gpu(void **state)
{
    (void)state;
    gpu.info.shared_bytes = 227 << 10;
    gpu.info.l2_bytes = 50 << 20;
    gpu.info.processors = 132;
    gpu.team_tokens = 0;
    return 0;
}

#endif
