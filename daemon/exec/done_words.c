#define _GNU_SOURCE
#include "done_words.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

struct ts_done_words {
    ts_gpu *gpu;
    uint32_t *here, *there;
    size_t bytes;
    uint32_t users; /* who made them, and each word that is taken */
    uint32_t num_free;
    uint32_t free[]; /* which are */
};

ts_status ts_done_words_new(ts_gpu *gpu, uint32_t count, ts_done_words **out, char *why,
                            size_t why_bytes)
{
    const size_t bytes = (count * sizeof(uint32_t) + 4095) / 4096 * 4096;
    ts_done_words *w = *out = malloc(sizeof *w + count * sizeof *w->free);
    void *here = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *there;
    ts_status status = TS_ENOMEM;
    if (w == NULL || here == MAP_FAILED)
        snprintf(why, why_bytes, "no memory for %u words of sessions", count);
    else
        status = ts_gpu_pin(gpu, here, bytes, &there, why, why_bytes);
    if (status != TS_OK) {
        if (here != MAP_FAILED)
            munmap(here, bytes);
        free(w);
        *out = NULL;
        return status;
    }
    *w = (ts_done_words){
        .gpu = gpu, .here = here, .there = there, .bytes = bytes, .users = 1, .num_free = count};
    for (uint32_t i = 0; i < count; i++)
        w->free[i] = count - 1 - i;
    return TS_OK;
}

void ts_done_words_release(ts_done_words *w)
{
    if (w == NULL || --w->users > 0)
        return;
    ts_gpu_unpin_unmap(w->gpu, w->here, w->bytes);
    free(w);
}

bool ts_done_words_take(ts_done_words *w, uint32_t **word, uint32_t **there)
{
    if (w->num_free == 0)
        return false;
    const uint32_t i = w->free[--w->num_free];
    *word = w->here + i;
    *there = w->there + i;
    w->users++;
    return true;
}

void ts_done_words_give(ts_done_words *w, const uint32_t *word)
{
    w->free[w->num_free++] = (uint32_t)(word - w->here);
    ts_done_words_release(w);
}
