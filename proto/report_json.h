/*
 * The operator's replies as JSON: tsctl --json, and the daemon's /stats.json. NULL: no memory. What
 * is returned is the caller's.
 */
#ifndef TS_REPORT_JSON_H
#define TS_REPORT_JSON_H

#include "tinyserve.pb-c.h"

#include <jansson.h>

json_t *json_status(const Tspb__StatusReply *r);
json_t *json_pools(const Tspb__StatusReply *r);
void json_sessions(json_t *list, const Tspb__SessionList *r);
void json_seqs(json_t *list, const Tspb__SeqList *r);
json_t *json_frag(const Tspb__PoolStatsReply *r);
json_t *json_map(const Tspb__PoolMapReply *r);
json_t *json_check(const Tspb__CheckReply *r);
json_t *json_cache(const Tspb__CacheStatsReply *r);

/* The name of a pool's dtype; "unknown" of one that only a newer daemon has. */
const char *report_dtype(const Tspb__PoolSummary *pool);

/* Figures that both renderers show, worked out in one place. */
typedef struct frag_figures {
    double efficiency;         /* stored tokens over slots of used blocks; 1 of none */
    uint64_t tail_bytes;       /* slots of used blocks that hold no token, reserved ones aside */
    uint64_t stored_bytes;     /* used blocks */
    uint64_t seen_bytes;       /* blocks of all block tables */
    double sharing;            /* seen over stored */
    uint64_t contiguous_bytes; /* a buffer of the longest length for each sequence that is shown */
} frag_figures;

frag_figures frag_work_out(const Tspb__PoolStatsReply *r);

#endif
