/*
 * tsctl's parts: main.c reads the command line and fetches, text.c draws for people; what writes
 * for programs is shared with the daemon (report_json.h). Both renderers take the same replies, so
 * the figures are the daemon's own.
 */
#ifndef TSCTL_H
#define TSCTL_H

#include "client.h"
#include "report_json.h"

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

#endif
