/*
 * tsctl's parts: main.c reads the command line and fetches, orders.c has what operators order,
 * text.c draws for people and top.c for those who stay; what writes for programs is shared with the
 * daemon (report_json.h). Both renderers take the same replies, so the figures are the daemon's
 * own.
 */
#ifndef TSCTL_H
#define TSCTL_H

#include "client.h"
#include "report_json.h"

typedef struct style {
    bool color;
} style;

/* Asks; TS_EPROTO where something else is answered. The reply is freed with
 * tspb__reply__free_unpacked. */
ts_status tsctl_ask(ts_client *client, Tspb__Request *request, Tspb__Reply__BodyCase expected,
                    Tspb__Reply **reply);

/* The live view, until q is pressed. Starts with the pool of that name, if there is one. */
ts_status top_run(ts_client *client, const char *pool, double interval);

/* "3.1 MiB", "5 min", in a buffer of the caller's. */
const char *text_bytes(uint64_t n, char *buffer, size_t size);
const char *text_duration(uint64_t ms, char *buffer, size_t size);

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
