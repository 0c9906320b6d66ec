/*
 * What a model's config.json, as Hugging Face's Transformers writes it, says of its KV cache.
 *
 * Thread: any.
 */
#ifndef TSCTL_MODEL_CONFIG_H
#define TSCTL_MODEL_CONFIG_H

#include "tinyserve_types.h"

#include <stdbool.h>

typedef struct model_config {
    char architecture[80]; /* "LlamaForCausalLM" */
    char type[48];         /* "llama": a pool may have this name */
    ts_geometry geometry;  /* block_tokens is 0 */
    bool dtype_given;      /* else it is bf16 */
    uint64_t positions;    /* the longest sequence that the model was made for; 0: it isn't said */
    uint64_t window;       /* of layers with a sliding window; 0: there are none */
    uint64_t sharing;      /* layers that use K and V of earlier ones */
} model_config;

/*
 * Reads the file, or config.json in the folder. TS_OK, or a sentence in `why`: TS_ENOENT, there is
 * no such file; TS_EINVAL, it isn't such a file, or its cache has no place in a pool.
 */
TS_WARN_UNUSED ts_status model_config_read(const char *path, model_config *model, char *why,
                                           size_t why_bytes);

#endif
