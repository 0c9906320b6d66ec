/*
 * What a run that this process does itself is given.
 */
#ifndef TS_LOCAL_RUN_H
#define TS_LOCAL_RUN_H

#include "client.h"

typedef struct ts_gpu_plan ts_gpu_plan; /* gpu.h */

/* A run on a stream is one on `stream`. */
typedef struct ts_local_run {
    ts_layer_run run;
    uint32_t heads; /* these are the step's */
    ts_dtype io_dtype;
    float scale;
    void *stream;
} ts_local_run;

#endif
