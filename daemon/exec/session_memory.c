#define _GNU_SOURCE
#include "session_memory.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static ts_status new_exchange(ts_exchange **out, char *why, size_t why_bytes)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        snprintf(why, why_bytes, "no memory for an exchange");
        return TS_ENOMEM;
    }
    (*out)->users = 1;
    (*out)->fd = (*out)->kept_fd = -1;
    (*out)->shared.fd = -1;
    return TS_OK;
}

static ts_status keep_or_free(ts_exchange **x, ts_status status)
{
    if (status != TS_OK) {
        free(*x);
        *x = NULL;
    }
    return status;
}

ts_status ts_exchange_take(ts_filling *filling, ts_exchange **out, char *why, size_t why_bytes)
{
    void *base;
    uint64_t bytes;
    int fd;
    *out = NULL;
    const bool outlives = filling->outlives;
    ts_status status = ts_filling_take(filling, "the exchange", &base, &bytes,
                                       outlives ? &fd : NULL, why, why_bytes);
    if (status != TS_OK)
        return status;
    status = new_exchange(out, why, why_bytes);
    if (status != TS_OK) {
        munmap(base, bytes);
        if (outlives)
            close(fd);
        return status;
    }
    if (outlives)
        (*out)->kept_fd = fd;
    (*out)->host = base;
    (*out)->bytes = bytes;
    return TS_OK;
}

ts_status ts_exchange_adopt(int fd, uint64_t bytes, ts_exchange **out, char *why, size_t why_bytes)
{
    struct stat about;
    *out = NULL;
    if (fstat(fd, &about) != 0 || (uint64_t)about.st_size != bytes || !ts_filled_is_whole(fd)) {
        snprintf(why, why_bytes, "of %llu bytes %lld are there", (unsigned long long)bytes,
                 (long long)about.st_blocks * 512);
        close(fd);
        return TS_EINVAL;
    }
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED || new_exchange(out, why, why_bytes) != TS_OK) {
        snprintf(why, why_bytes, "mapping %llu bytes: %s", (unsigned long long)bytes,
                 strerror(errno));
        if (base != MAP_FAILED)
            munmap(base, bytes);
        close(fd);
        return TS_ENOMEM;
    }
    (*out)->host = base;
    (*out)->bytes = bytes;
    (*out)->kept_fd = fd;
    return TS_OK;
}

ts_status ts_exchange_adopt_device(ts_gpu *gpu, int fd, uint64_t bytes, uint64_t *held,
                                   ts_exchange **out, char *why, size_t why_bytes)
{
    ts_status status = new_exchange(out, why, why_bytes);
    if (status != TS_OK) {
        close(fd);
        return status;
    }
    ts_exchange *x = *out;
    status = ts_gpu_shared_adopt(gpu, fd, bytes, held, &x->shared, why, why_bytes);
    x->gpu = gpu;
    x->there = x->shared.base;
    x->bytes = x->shared.bytes;
    x->fd = x->shared.fd;
    return keep_or_free(out, status);
}

int ts_exchange_descriptor(const ts_exchange *x)
{
    return x->kept_fd >= 0 ? x->kept_fd : x->fd;
}

ts_status ts_exchange_device_new(ts_gpu *gpu, bool vmm, uint64_t bytes, uint64_t *held,
                                 ts_exchange **out, char *why, size_t why_bytes)
{
    ts_status status = new_exchange(out, why, why_bytes);
    if (status != TS_OK)
        return status;
    ts_exchange *x = *out;
    status = ts_gpu_shared_new(gpu, vmm, bytes, held, &x->shared, why, why_bytes);
    x->gpu = gpu;
    x->there = x->shared.base;
    x->bytes = x->shared.bytes;
    x->fd = x->shared.fd;
    return keep_or_free(out, status);
}

ts_status ts_exchange_import(ts_gpu *gpu, const uint8_t *handle, uint64_t offset, uint64_t bytes,
                             ts_exchange **out, char *why, size_t why_bytes)
{
    ts_status status = new_exchange(out, why, why_bytes);
    if (status != TS_OK)
        return status;
    ts_exchange *x = *out;
    status = ts_gpu_shared_import(gpu, handle, offset, bytes, &x->shared, why, why_bytes);
    x->gpu = gpu;
    x->there = x->shared.base;
    x->bytes = bytes;
    return keep_or_free(out, status);
}

ts_status ts_exchange_reach(ts_exchange *x, ts_gpu *gpu, char *why, size_t why_bytes)
{
    if (x->gpu == gpu)
        return TS_OK;
    if (x->gpu != NULL) { /* pinned memory is one GPU's too: it is simplest, and enough */
        snprintf(why, why_bytes, "the exchange is used with cuda:%u; the pool is on cuda:%u",
                 ts_gpu_get_info(x->gpu)->ordinal, ts_gpu_get_info(gpu)->ordinal);
        return TS_EINVAL;
    }
    void *there;
    ts_status status = ts_gpu_pin(gpu, x->host, x->bytes, &there, why, why_bytes);
    if (status != TS_OK)
        return status;
    x->gpu = gpu;
    x->there = there;
    return TS_OK;
}

void ts_exchange_release(ts_exchange *x)
{
    if (x == NULL || --x->users > 0)
        return;
    if (x->kept_fd >= 0)
        close(x->kept_fd);
    if (x->host == NULL) {
        ts_gpu_shared_free(&x->shared); /* its descriptor too */
    } else {
        if (x->gpu != NULL)
            ts_gpu_unpin_unmap(x->gpu, x->host, x->bytes);
        else
            munmap(x->host, x->bytes);
    }
    free(x);
}

/* ---- signals ---- */

ts_status ts_signals_new(ts_signals_page **out, char *why, size_t why_bytes)
{
    ts_signals_page *p = calloc(1, sizeof *p);
    *out = p;
    if (p == NULL) {
        snprintf(why, why_bytes, "no memory for a page of signals");
        return TS_ENOMEM;
    }
    void *host;
    ts_status status =
        ts_memory_shared_new("tinyserve-signals", TS_SIGNALS_BYTES, &p->fd, &host, why, why_bytes);
    if (status != TS_OK) {
        free(p);
        *out = NULL;
        return status;
    }
    p->users = 1;
    p->host = host;
    return TS_OK;
}

ts_status ts_signals_adopt(int fd, uint32_t last_number, ts_signals_page **out, char *why,
                           size_t why_bytes)
{
    struct stat about;
    ts_signals_page *p = *out = calloc(1, sizeof *p);
    void *host = MAP_FAILED;
    const bool whole = fstat(fd, &about) == 0 && about.st_size == TS_SIGNALS_BYTES;
    if (p != NULL && whole)
        host = mmap(NULL, TS_SIGNALS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (host == MAP_FAILED) {
        snprintf(why, why_bytes,
                 whole ? "no memory for a page of signals"
                       : "the page of signals has other than its size");
        close(fd);
        free(p);
        *out = NULL;
        return whole ? TS_ENOMEM : TS_EINVAL;
    }
    p->users = 1;
    p->fd = fd;
    p->host = host;
    p->outlives = true;
    p->last_number = last_number;
    /* The worker's own word: it is what its stream waits for. Beyond what was asked for it can't
     * be, unless the worker wrote it. */
    const uint32_t completed = __atomic_load_n(&p->host->completed, __ATOMIC_ACQUIRE);
    p->first_done = (int32_t)(completed - last_number) > 0 ? last_number : completed;
    __atomic_add_fetch(&p->host->daemons, 1, __ATOMIC_RELEASE);
    return TS_OK;
}

bool ts_signals_had_completed(const ts_signals_page *p, uint32_t number)
{
    return (int32_t)(p->first_done - number) >= 0;
}

bool ts_signals_had_late(const ts_signals_page *p, uint32_t number)
{
    const uint32_t late = __atomic_load_n(&p->host->late, __ATOMIC_ACQUIRE);
    return late != 0 && (int32_t)(late - number) >= 0;
}

bool ts_signals_posted(const ts_signals_page *p, uint32_t number, ts_posted_run *run)
{
    if (number == 0 || __atomic_load_n(&p->host->posted.number, __ATOMIC_ACQUIRE) != number)
        return false;
    *run = p->host->posted; /* its own words are checked as a ring entry's are */
    run->run.number = number;
    run->run.flags |= TS_RUN_ON_STREAM;
    return true;
}

uint32_t ts_signals_open_runs(const ts_signals_page *p)
{
    return p->last_number - p->first_done;
}

void ts_signals_give_up(ts_signals_page *p)
{
    if (p == NULL)
        return;
    p->first_done = p->last_number;
    if (p->done != NULL)
        __atomic_store_n(p->done, p->first_done, __ATOMIC_RELEASE);
    __atomic_store_n(&p->host->completed, p->last_number, __ATOMIC_RELEASE);
}

ts_status ts_signals_reach(ts_signals_page *p, ts_gpu *gpu, ts_done_words *words, char *why,
                           size_t why_bytes)
{
    if (p->gpu == gpu)
        return TS_OK;
    if (p->gpu != NULL) {
        snprintf(why, why_bytes, "the session orders runs on cuda:%u; the pool is on cuda:%u",
                 ts_gpu_get_info(p->gpu)->ordinal, ts_gpu_get_info(gpu)->ordinal);
        return TS_EINVAL;
    }
    void *there;
    uint32_t *done, *done_there;
    if (!ts_done_words_take(words, &done, &done_there)) {
        snprintf(why, why_bytes, "all words of cuda:%u for sessions with runs on streams are taken",
                 ts_gpu_get_info(gpu)->ordinal);
        return TS_ENOMEM;
    }
    ts_status status = ts_gpu_pin(gpu, p->host, TS_SIGNALS_BYTES, &there, why, why_bytes);
    if (status != TS_OK) {
        ts_done_words_give(words, done);
        return status;
    }
    p->gpu = gpu;
    p->there = there;
    p->words = words;
    p->done = done;
    p->done_there = done_there;
    __atomic_store_n(p->done, p->first_done, __ATOMIC_RELEASE);
    return TS_OK;
}

void ts_signals_release_waiters(ts_signals_page *p)
{
    if (p != NULL)
        __atomic_store_n(&p->host->submitted, __atomic_load_n(&p->last_number, __ATOMIC_ACQUIRE),
                         __ATOMIC_RELEASE);
}

void ts_signals_release(ts_signals_page *p)
{
    if (p == NULL || --p->users > 0)
        return;
    if (p->gpu != NULL) {
        ts_gpu_unpin_unmap(p->gpu, p->host, TS_SIGNALS_BYTES);
        ts_done_words_give(p->words, p->done);
    } else {
        munmap(p->host, TS_SIGNALS_BYTES);
    }
    close(p->fd);
    free(p);
}
