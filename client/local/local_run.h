/*
 * What a run that this process does itself is given.
 */
#ifndef TS_LOCAL_RUN_H
#define TS_LOCAL_RUN_H

#include "client.h"

typedef struct ts_gpu_plan ts_gpu_plan; /* gpu.h */

/* What a run is given: pointers into the exchange, as ts_attention_seq's of all tokens. */
typedef struct ts_local_run {
    uint32_t layer, heads;
    ts_dtype io_dtype;
    ts_attention_variant variant;
    const unsigned char *q, *k, *v;
    unsigned char *out;
    const float *sinks, *alibi, *scales;
    float *lse;
    bool on_stream;
    void *stream;
} ts_local_run;

#endif
