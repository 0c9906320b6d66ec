#include "held_runs.h"

static ts_held_queue *queue_of(ts_held_runs *held, const ts_job *job)
{
    return job->signals != NULL ? &job->signals->held : &held->others;
}

static void list(ts_held_runs *held, ts_held_queue *q)
{
    q->prev = held->last;
    q->next = NULL;
    if (held->last != NULL)
        held->last->next = q;
    else
        held->first = q;
    held->last = q;
}

static void unlist(ts_held_runs *held, ts_held_queue *q)
{
    if (q->prev != NULL)
        q->prev->next = q->next;
    else
        held->first = q->next;
    if (q->next != NULL)
        q->next->prev = q->prev;
    else
        held->last = q->prev;
}

void ts_held_add(ts_held_runs *held, ts_job *job)
{
    ts_held_queue *q = queue_of(held, job);
    job->next = NULL;
    if (q->first == NULL) {
        list(held, q);
        q->first = job;
    } else {
        q->last->next = job;
    }
    q->last = job;
}

void ts_held_put_back(ts_held_runs *held, ts_job *jobs)
{
    ts_job *reversed = NULL;
    for (ts_job *next; jobs != NULL; jobs = next) {
        next = jobs->next;
        jobs->next = reversed;
        reversed = jobs;
    }
    for (ts_job *job = reversed, *next; job != NULL; job = next) {
        ts_held_queue *q = queue_of(held, job);
        next = job->next;
        job->next = q->first;
        if (q->first == NULL) {
            list(held, q);
            q->last = job;
        }
        q->first = job;
    }
}

void ts_held_take(ts_held_runs *held, ts_job *before, ts_job *job)
{
    ts_held_queue *q = queue_of(held, job);
    if (before != NULL)
        before->next = job->next;
    else
        q->first = job->next;
    if (job->next == NULL)
        q->last = before;
    if (q->first == NULL)
        unlist(held, q);
    job->next = NULL;
}

void ts_held_turn(ts_held_runs *held)
{
    ts_held_queue *q = held->first;
    if (q == held->last)
        return;
    unlist(held, q);
    list(held, q);
}
