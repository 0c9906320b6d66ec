/* tsctl's command line, and the commands that are orders. */
#ifndef TSCTL_OPTIONS_H
#define TSCTL_OPTIONS_H

#include "plan.h"
#include "tsctl.h"

#define WORDS_MAX 32 /* of a command */

#define MAP_CELLS_DEFAULT (64u * 16)

typedef struct options {
    const char *url, *pool;
    char *words[WORDS_MAX];
    uint32_t num_words;
    bool json, watch, yes;
    bool empty; /* what restart leaves */
    double interval;
    uint32_t wait_ms;
    uint32_t cells;
    bool has_cells;
    bool has_tenant; /* what cache drop forgets */
    uint32_t tenant;
    unsigned char space[64];
    size_t space_bytes; /* 0: in all namespaces */
    plan_options plan;
    style style;
} options;

/* A command: fetches, and shows what came. Returns an exit status; *ts says if a call failed. */
typedef int (*command_fn)(ts_client *client, const options *o, ts_status *ts);

void tsctl_print_json(const options *o, json_t *value);

/* Asks on the terminal whether to go on. */
bool tsctl_sure(const options *o, const char *question);

int do_cache(ts_client *client, const options *o, ts_status *ts);
int do_cache_drop(ts_client *client, const options *o, ts_status *ts);
/* Refuses, and names the pools that there are. */
ts_status tsctl_no_pool(ts_client *client, const Tspb__StatusReply *status, const char *name);

int do_kick(ts_client *client, const options *o, ts_status *ts);
int do_free(ts_client *client, const options *o, ts_status *ts);
int do_pool_create(ts_client *client, const options *o, ts_status *ts);
int do_pool_delete(ts_client *client, const options *o, ts_status *ts);
int do_pool_resize(ts_client *client, const options *o, ts_status *ts);
int do_restart(ts_client *client, const options *o, ts_status *ts);
int do_drain(ts_client *client, const options *o, ts_status *ts);

#endif
