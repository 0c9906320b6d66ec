/* tsctl's command line, and the commands that are orders. */
#ifndef TSCTL_OPTIONS_H
#define TSCTL_OPTIONS_H

#include "tsctl.h"

enum { EXIT_REFUSED = 1, EXIT_USAGE = 2, EXIT_UNREACHABLE = 3 };

#define WORDS_MAX 32 /* of a command */

#define MAP_CELLS_DEFAULT (64u * 16)

typedef struct options {
    const char *url, *pool;
    char *words[WORDS_MAX];
    uint32_t num_words;
    bool json, watch, yes;
    double interval;
    uint32_t wait_ms;
    uint32_t cells;
    style style;
} options;

/* A command: fetches, and shows what came. Returns an exit status; *ts says if a call failed. */
typedef int (*command_fn)(ts_client *client, const options *o, ts_status *ts);

int do_kick(ts_client *client, const options *o, ts_status *ts);
int do_free(ts_client *client, const options *o, ts_status *ts);
int do_pool_create(ts_client *client, const options *o, ts_status *ts);
int do_pool_delete(ts_client *client, const options *o, ts_status *ts);
int do_pool_resize(ts_client *client, const options *o, ts_status *ts);
int do_drain(ts_client *client, const options *o, ts_status *ts);

#endif
