#define _GNU_SOURCE
#include "metrics.h"

#include "cache_figures.h"
#include "refusals.h"
#include "report.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void head(FILE *out, const char *name, const char *type, const char *help)
{
    fprintf(out, "# HELP tinyserve_%s %s\n# TYPE tinyserve_%s %s\n", name, help, name, type);
}

static void single(FILE *out, const char *name, const char *type, const char *help, double value)
{
    head(out, name, type, help);
    fprintf(out, "tinyserve_%s %.17g\n", name, value);
}

/* A label's value, with what the format escapes. */
static void label(FILE *out, const char *value)
{
    for (; *value != '\0'; value++)
        if (*value == '\n')
            fputs("\\n", out);
        else
            fprintf(out, *value == '\\' || *value == '"' ? "\\%c" : "%c", *value);
}

static void of_pool(FILE *out, const char *name, const Tspb__PoolSummary *p, const char *more,
                    uint64_t value)
{
    fprintf(out, "tinyserve_%s{pool=\"", name);
    label(out, p->name);
    fprintf(out, "\"%s} %llu\n", more, (unsigned long long)value);
}

static void write_refusal(void *arg, const char *operation, const char *pool, const char *status,
                          uint64_t count)
{
    FILE *out = arg;
    fprintf(out, "tinyserve_requests_refused_total{operation=\"%s\",pool=\"", operation);
    label(out, pool);
    fprintf(out, "\",status=\"%s\"} %llu\n", status, (unsigned long long)count);
}

static void write_evictions(FILE *out, const Tspb__StatusReply *r)
{
    char more[48];
    head(out, "evicted_blocks_total", "counter",
         "Cached blocks that were given up: for room that their tenant needed, at its limit, for "
         "others, as the pool became smaller, or dropped.");
    for (size_t i = 0; i < r->n_pools; i++)
        for (uint32_t j = 0; j < TS_CACHE_CAUSES; j++) {
            snprintf(more, sizeof more, ",cause=\"%s\"", ts_cache_causes[j]);
            of_pool(out, "evicted_blocks_total", r->pools[i], more,
                    r->pools[i]->evicted_by_cause[j]);
        }
    head(out, "evicted_block_age_seconds", "histogram",
         "Time for which no sequence had used a block when it was evicted.");
    for (size_t i = 0; i < r->n_pools; i++) {
        const Tspb__PoolSummary *p = r->pools[i];
        uint64_t count = 0;
        for (uint32_t j = 0; j < TS_CACHE_AGES; j++) {
            count += p->evicted_by_age[j];
            snprintf(more, sizeof more, ",le=\"%u\"", ts_cache_ages[j]);
            of_pool(out, "evicted_block_age_seconds_bucket", p, more, count);
        }
        count += p->evicted_by_age[TS_CACHE_AGES];
        of_pool(out, "evicted_block_age_seconds_bucket", p, ",le=\"+Inf\"", count);
        of_pool(out, "evicted_block_age_seconds_sum", p, "", p->evicted_age_sum_s);
        of_pool(out, "evicted_block_age_seconds_count", p, "", count);
    }
}

static void write_pools(FILE *out, const Tspb__StatusReply *r)
{
    head(out, "pool_blocks", "gauge",
         "Blocks of a pool: free, used by one sequence, shared by several, or cached, which make "
         "room when it is needed.");
    for (size_t i = 0; i < r->n_pools; i++) {
        const Tspb__PoolSummary *p = r->pools[i];
        of_pool(out, "pool_blocks", p, ",state=\"free\"",
                p->blocks - p->used_blocks - p->cached_blocks);
        of_pool(out, "pool_blocks", p, ",state=\"used\"", p->used_blocks - p->shared_blocks);
        of_pool(out, "pool_blocks", p, ",state=\"shared\"", p->shared_blocks);
        of_pool(out, "pool_blocks", p, ",state=\"cached\"", p->cached_blocks);
    }
    head(out, "prefix_query_tokens_total", "counter", "Tokens of the prompts that were matched.");
    for (size_t i = 0; i < r->n_pools; i++)
        of_pool(out, "prefix_query_tokens_total", r->pools[i], "", r->pools[i]->asked_tokens);
    head(out, "prefix_hit_tokens_total", "counter", "Of those, the tokens that were in the pool.");
    for (size_t i = 0; i < r->n_pools; i++)
        of_pool(out, "prefix_hit_tokens_total", r->pools[i], "", r->pools[i]->found_tokens);
    write_evictions(out, r);
    head(out, "pool_block_bytes", "gauge", "Size of a block of a pool.");
    for (size_t i = 0; i < r->n_pools; i++)
        of_pool(out, "pool_block_bytes", r->pools[i], "", r->pools[i]->block_bytes);
    head(out, "pool_sequences", "gauge", "Sequences in a pool, those kept by name apart.");
    for (size_t i = 0; i < r->n_pools; i++) {
        const Tspb__PoolSummary *p = r->pools[i];
        of_pool(out, "pool_sequences", p, ",kept=\"no\"", p->sequences - p->kept_sequences);
        of_pool(out, "pool_sequences", p, ",kept=\"yes\"", p->kept_sequences);
    }
    head(out, "pool_waiting_sessions", "gauge",
         "Sessions that wait for room, or for what others compute.");
    for (size_t i = 0; i < r->n_pools; i++)
        of_pool(out, "pool_waiting_sessions", r->pools[i], "", r->pools[i]->waiting_sessions);
    head(out, "pool_mps", "gauge",
         "Of a pool on a GPU: 1 if the daemon shares it by CUDA's multi-process service, else 0.");
    for (size_t i = 0; i < r->n_pools; i++)
        if (strncmp(r->pools[i]->device, "cuda:", 5) == 0)
            of_pool(out, "pool_mps", r->pools[i], "", r->pools[i]->mps);
    head(out, "pool_open_steps", "gauge", "Steps that are begun and not ended.");
    for (size_t i = 0; i < r->n_pools; i++)
        of_pool(out, "pool_open_steps", r->pools[i], "", r->pools[i]->open_steps);
}

/* Where nobody holds the memory the figures are 0. */
static void write_restart(FILE *out, const Tspb__RestartStatus *r)
{
    single(out, "store_held", "gauge",
           "1 while somebody holds the memory, so that what is stored outlives the daemon.",
           r->holder != TSPB__RESTART_STATUS__HOLDER__NOBODY);
    single(out, "restarts_total", "counter",
           "Daemons that took over what is stored; 0 again after one that began with nothing.",
           r->restarts);
    single(out, "last_restart_duration_seconds", "gauge",
           "Time that this daemon's taking over took; 0: it began with nothing.", r->seconds);
    single(out, "last_restart_replayed_commands", "gauge",
           "Commands of the journal that it carried out again.", (double)r->entries);
    single(out, "awaited_sessions", "gauge",
           "Sessions from before the restart whose workers have yet to come back.",
           r->awaited_sessions);
    single(out, "verify_enabled", "gauge", "1 if blocks get checksums and a restart checks them.",
           r->verify == TSPB__RESTART_STATUS__VERIFY__RESTART);
    single(out, "unsummed_pools", "gauge", "Of the pools then, those without checksums.",
           r->unsummed_pools);
    single(out, "unsummed_blocks", "gauge", "Full blocks that wait for their checksum.",
           r->unsummed_blocks);
    single(out, "last_restart_full_blocks", "gauge",
           "Full blocks that there were when it checked memory; 0: it didn't.",
           (double)r->full_blocks);
    single(out, "last_restart_checked_blocks", "gauge", "Of those, the ones with a checksum.",
           (double)r->checked_blocks);
    single(out, "last_restart_wrong_blocks", "gauge",
           "Of these, the ones that didn't hold what was stored, and were forgotten.",
           (double)r->wrong_blocks);
    single(out, "last_restart_lost_sequences", "gauge", "Sequences that had a wrong block.",
           (double)r->lost_sequences);
    single(out, "wrong_blocks_total", "counter",
           "Blocks that all restarts found wrong; 0 again after one that began with nothing.",
           (double)r->all_wrong_blocks);
    single(out, "lost_sequences_total", "counter",
           "Sequences that all restarts gave up: a block of theirs was wrong, or its memory gone.",
           (double)r->all_lost_sequences);
    single(out, "last_restart_check_duration_seconds", "gauge", "Time that checking memory took.",
           r->check_seconds);
    single(out, "journal_size_bytes", "gauge", "Size of the journal; 0: there is none.",
           (double)r->journal_bytes);
    single(out, "journal_used_bytes", "gauge", "Bytes of it that no snapshot covers.",
           (double)r->journal_used_bytes);
    single(out, "journal_waits_total", "counter",
           "Requests that waited for a snapshot, since the journal was full.",
           (double)r->journal_waits);
    single(out, "journal_behind", "gauge",
           "1 while the journal is full and there is no memory for a snapshot: a restart would "
           "begin with nothing.",
           r->behind);
    single(out, "snapshots_total", "counter", "Snapshots that this daemon made.", r->snapshots);
    single(out, "last_snapshot_size_bytes", "gauge", "Size of the last snapshot.",
           (double)r->snapshot_bytes);
    single(out, "last_snapshot_duration_seconds", "gauge", "Time that the last snapshot took.",
           r->snapshot_seconds);
}

static void write_times(FILE *out, const char *transport, const ts_latency *times)
{
    uint64_t count = 0;
    for (uint32_t i = 0; i < TS_LATENCY_BORDERS; i++) {
        count += times->counts[i];
        fprintf(out, "tinyserve_request_duration_seconds_bucket{transport=\"%s\",le=\"%g\"} %llu\n",
                transport, (double)ts_latency_borders_ns[i] * 1e-9, (unsigned long long)count);
    }
    count += times->counts[TS_LATENCY_BORDERS];
    fprintf(out,
            "tinyserve_request_duration_seconds_bucket{transport=\"%s\",le=\"+Inf\"} %llu\n"
            "tinyserve_request_duration_seconds_sum{transport=\"%s\"} %.9g\n"
            "tinyserve_request_duration_seconds_count{transport=\"%s\"} %llu\n",
            transport, (unsigned long long)count, transport, (double)times->sum_ns * 1e-9,
            transport, (unsigned long long)count);
}

static void write_all(FILE *out, const ts_service *s, const Tspb__StatusReply *r)
{
    head(out, "build_info", "gauge", "1, with the version and the host kernels in use.");
    fprintf(out, "tinyserve_build_info{version=\"%s\",kernel=\"%s\"} 1\n", r->version, r->kernel);
    single(out, "start_time_seconds", "gauge", "When the daemon started, in Unix time.",
           s->started_unix);
    single(out, "sessions", "gauge", "Sessions that are open.", (double)r->sessions);
    single(out, "requests_total", "counter",
           "Requests, whether they came as messages or through rings.", (double)r->requests);
    head(out, "requests_refused_total", "counter",
         "Requests that were answered with another status than TS_OK, by operation and pool.");
    ts_refusals_each(s, write_refusal, out);
    single(out, "tokens_committed_total", "counter", "Tokens that became part of sequences.",
           (double)r->tokens);
    single(out, "attends_total", "counter", "Runs of a layer for a session's step.",
           (double)r->runs);
    single(out, "kernel_launches_total", "counter",
           "Kernel calls that these took; fewer where sessions were joined.", (double)r->launches);
    single(out, "draining", "gauge", "1 while no new sessions are taken.", r->draining);
    single(out, "longest_wait_seconds", "gauge",
           "Of the sessions that wait, for how long the first has; 0: none waits.",
           (double)r->longest_wait_ms / 1000);
    write_restart(out, r->restart);
    write_pools(out, r);
    head(out, "request_duration_seconds", "histogram",
         "Time from a message's arrival, or from an entry's being taken from a ring, to its "
         "answer, runs of layers included.");
    write_times(out, "message", &s->message_times);
    write_times(out, "ring", &s->ring_times);
}

char *ts_metrics_text(ts_service *s)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply reply;
    char *text = NULL;
    size_t bytes;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    if (!ts_report_http(s, &request, &reply))
        return NULL;
    FILE *out = open_memstream(&text, &bytes);
    if (out != NULL) {
        write_all(out, s, reply.status_reply);
        if (fclose(out) != 0) {
            free(text);
            text = NULL;
        }
    }
    ts_report_free(&reply);
    return text;
}
