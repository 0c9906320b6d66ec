#define _GNU_SOURCE
#include "batch.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ts_batch {
    ts_attention *attention;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t filled;
    ts_job *head, **tail;    /* under the lock */
    bool stop;               /* under the lock */
    pthread_mutex_t running; /* held by the thread that uses what follows, and the attention */
    ts_attention_seq *seqs;  /* of a launch that joins jobs */
    size_t capacity;
    atomic_uint_fast64_t runs, launches;
};

static bool alike(const ts_job *a, const ts_job *b)
{
    return b->num_copies == 0 && a->base == b->base && a->heads == b->heads &&
           a->io_dtype == b->io_dtype && ts_attention_same_variant(&a->variant, &b->variant);
}

/* Runs `first` and all jobs like it that are linked behind it, as one call, and tells them. Returns
 * the others. */
static ts_job *launch(ts_batch *b, ts_job *first)
{
    ts_job *like = first, **like_tail = &first->next, **from = &first->next;
    size_t total = first->num_seqs;
    uint64_t jobs = 1;
    ts_job *rest = NULL, **rest_tail = &rest;
    for (ts_job *job = *from, *next; job != NULL; job = next) {
        next = job->next;
        job->next = NULL;
        if (alike(first, job)) {
            *like_tail = job;
            like_tail = &job->next;
            total += job->num_seqs;
            jobs++;
        } else {
            *rest_tail = job;
            rest_tail = &job->next;
        }
    }
    *like_tail = *rest_tail = NULL;

    ts_attention_call call = {
        .geometry = first->geometry,
        .base = first->base,
        .heads = first->heads,
        .io_dtype = first->io_dtype,
        .variant = first->variant,
        .seqs = first->seqs,
        .num_seqs = (uint32_t)total,
    };
    ts_status status = TS_OK;
    if (jobs > 1) {
        if (total > b->capacity) {
            free(b->seqs);
            b->seqs = malloc(total * sizeof *b->seqs);
            b->capacity = b->seqs == NULL ? 0 : total;
        }
        if (b->seqs == NULL)
            status = TS_ENOMEM;
        size_t at = 0;
        for (ts_job *job = like; job != NULL && status == TS_OK; job = job->next) {
            memcpy(b->seqs + at, job->seqs, job->num_seqs * sizeof *b->seqs);
            at += job->num_seqs;
        }
        call.seqs = b->seqs;
    }
    if (status == TS_OK)
        status = ts_attention_run(b->attention, &call);
    atomic_fetch_add_explicit(&b->runs, jobs, memory_order_relaxed);
    atomic_fetch_add_explicit(&b->launches, 1, memory_order_relaxed);
    for (ts_job *job = like, *next; job != NULL; job = next) {
        next = job->next;
        job->status = status;
        if (status != TS_OK)
            snprintf(job->why, sizeof job->why, "%s",
                     status == TS_ECONN ? "the daemon is stopping"
                                        : "no scratch memory for attention");
        job->done(job);
    }
    return rest;
}

bool ts_batch_try_run(ts_batch *b, ts_job *jobs)
{
    if (pthread_mutex_trylock(&b->running) != 0)
        return false;
    while (jobs != NULL)
        jobs = launch(b, jobs);
    pthread_mutex_unlock(&b->running);
    return true;
}

/* Puts jobs back, before those that came meanwhile. */
static void put_back(ts_batch *b, ts_job *jobs)
{
    ts_job **tail = &jobs;
    while (*tail != NULL)
        tail = &(*tail)->next;
    pthread_mutex_lock(&b->lock);
    *tail = b->head;
    if (b->head == NULL)
        b->tail = tail;
    b->head = jobs;
    pthread_mutex_unlock(&b->lock);
}

static void *batch_main(void *arg)
{
    ts_batch *b = arg;
    for (;;) {
        pthread_mutex_lock(&b->lock);
        while (b->head == NULL && !b->stop)
            pthread_cond_wait(&b->filled, &b->lock);
        ts_job *jobs = b->head;
        b->head = NULL;
        b->tail = &b->head;
        pthread_mutex_unlock(&b->lock);
        if (jobs == NULL)
            return NULL;
        /* Copies first: each is needed before its step's first run, which comes later. */
        pthread_mutex_lock(&b->running);
        ts_job *runs = NULL, **tail = &runs;
        for (ts_job *job = jobs, *next; job != NULL; job = next) {
            next = job->next;
            job->next = NULL;
            if (job->num_copies == 0) {
                *tail = job;
                tail = &job->next;
                continue;
            }
            ts_attention_copy_blocks(b->attention, job->base,
                                     ts_geometry_block_bytes(&job->geometry), job->copies,
                                     job->num_copies);
            job->status = TS_OK;
            job->done(job);
        }
        if (runs != NULL)
            runs = launch(b, runs);
        pthread_mutex_unlock(&b->running);
        if (runs != NULL)
            put_back(b, runs);
    }
}

ts_batch *ts_batch_new(ts_attention *attention)
{
    ts_batch *b = calloc(1, sizeof *b);
    if (b == NULL)
        return NULL;
    b->attention = attention;
    b->tail = &b->head;
    pthread_mutex_init(&b->lock, NULL);
    pthread_mutex_init(&b->running, NULL);
    pthread_cond_init(&b->filled, NULL);
    if (pthread_create(&b->thread, NULL, batch_main, b) != 0) {
        free(b);
        return NULL;
    }
    return b;
}

void ts_batch_free(ts_batch *b)
{
    if (b == NULL)
        return;
    pthread_mutex_lock(&b->lock);
    b->stop = true;
    pthread_cond_signal(&b->filled);
    pthread_mutex_unlock(&b->lock);
    pthread_join(b->thread, NULL);
    pthread_cond_destroy(&b->filled);
    pthread_mutex_destroy(&b->lock);
    pthread_mutex_destroy(&b->running);
    free(b->seqs);
    free(b);
}

void ts_batch_submit(ts_batch *b, ts_job *job)
{
    job->next = NULL;
    pthread_mutex_lock(&b->lock);
    *b->tail = job;
    b->tail = &job->next;
    pthread_cond_signal(&b->filled);
    pthread_mutex_unlock(&b->lock);
}

void ts_batch_counts(const ts_batch *b, uint64_t *runs, uint64_t *launches)
{
    *runs = atomic_load_explicit(&b->runs, memory_order_relaxed);
    *launches = atomic_load_explicit(&b->launches, memory_order_relaxed);
}
