/*
 * tsctl's parts: main.c reads the command line and fetches, text.c draws for people, json.c writes
 * for programs. Both renderers take the same replies, so the figures are the daemon's own.
 */
#ifndef TSCTL_H
#define TSCTL_H

#include "client.h"

#include <jansson.h>

typedef struct style {
    bool color;
} style;

void text_status(const Tspb__StatusReply *r, const style *s);
void text_pools(const Tspb__StatusReply *r, const style *s);
void text_sessions_head(void);
void text_sessions(const Tspb__SessionList *r);
void text_seqs_head(void);
void text_seqs(const Tspb__SeqList *r);
void text_frag(const Tspb__PoolStatsReply *r, const style *s);
void text_map(const Tspb__PoolMapReply *r, const style *s);
void text_check(const Tspb__CheckReply *r);

json_t *json_status(const Tspb__StatusReply *r);
json_t *json_pools(const Tspb__StatusReply *r);
void json_sessions(json_t *list, const Tspb__SessionList *r);
void json_seqs(json_t *list, const Tspb__SeqList *r);
json_t *json_frag(const Tspb__PoolStatsReply *r);
json_t *json_map(const Tspb__PoolMapReply *r);
json_t *json_check(const Tspb__CheckReply *r);

/* Figures that both renderers show, worked out in one place. */
typedef struct frag_figures {
    double efficiency;         /* stored tokens over slots of used blocks; 1 of none */
    uint64_t tail_bytes;       /* slots of used blocks that hold no token, reserved ones aside */
    uint64_t stored_bytes;     /* used blocks */
    uint64_t seen_bytes;       /* blocks of all block tables */
    double sharing;            /* seen over stored */
    uint64_t contiguous_bytes; /* a buffer of the longest length for each sequence */
} frag_figures;

frag_figures frag_work_out(const Tspb__PoolStatsReply *r);

#endif
