/*
 * tsctl's parts: main.c reads the command line and fetches, orders.c has what operators order,
 * text.c draws for people and top.c for those who stay; what writes for programs is shared with the
 * daemon (report_json.h). Both renderers take the same replies, so the figures are the daemon's
 * own.
 */
#ifndef TSCTL_H
#define TSCTL_H

#include "report_json.h"
#include "rpc.h"

enum { EXIT_REFUSED = 1, EXIT_USAGE = 2, EXIT_UNREACHABLE = 3 };

enum { OWNER_KEPT = 1, OWNER_SEVERAL, OWNER_SESSIONS }; /* as PoolMapReply counts them */

typedef struct style {
    bool color;
    int columns; /* of the terminal; 0: it is none, and nothing is cut */
} style;

/* Asks; TS_EPROTO where something else is answered. The reply is freed with
 * tspb__reply__free_unpacked. */
ts_status tsctl_ask(ts_client *client, Tspb__Request *request, Tspb__Reply__BodyCase expected,
                    Tspb__Reply **reply);

/* The live view, until q is pressed. Starts with the pool of that name, if there is one. */
ts_status top_run(ts_client *client, const char *pool, double interval);

/* Finds out what the terminal can show. */
void text_start(style *s);

/* The text in a buffer of the caller's, filled up to `width` columns of a terminal, and no more of
 * it than `most` columns have room for; 0: all. */
const char *text_cell(const char *text, size_t width, size_t most, char *buffer, size_t size);

/* "5 min", in a buffer of the caller's. */
const char *text_duration(uint64_t ms, char *buffer, size_t size);

void text_status(const Tspb__StatusReply *r, const style *s);
void text_pools(const Tspb__StatusReply *r, const style *s);
void text_sessions_head(void);
void text_sessions(const Tspb__SessionList *r, const style *s);
void text_seqs_head(void);
void text_seqs(const Tspb__SeqList *r, const style *s);
void text_frag(const Tspb__PoolStatsReply *r, const style *s);
void text_map(const Tspb__PoolMapReply *r, const style *s);
/* How a cell without used blocks is drawn. */
const char *text_unused(const Tspb__PoolMapReply *r, size_t cell);
void text_cache(const Tspb__CacheStatsReply *r, const style *s);
void text_check(const Tspb__CheckReply *r);

#endif
