/*
 * A Llama-architecture model on the CPU, all but its attention: weights from a Hugging Face folder
 * (config.json, model.safetensors), fp32 arithmetic. Keys, values and attention are TinyServe's:
 * the forward pass takes a step and runs it layer by layer.
 */
#ifndef MODEL_H
#define MODEL_H

#include "tinyserve.h"

typedef struct model_layer {
    float *attention_norm, *mlp_norm; /* [hidden] */
    float *q, *k, *v, *o;             /* [heads or kv_heads * head_dim][hidden]; o transposed so */
    float *gate, *up, *down;          /* [intermediate][hidden]; down [hidden][intermediate] */
} model_layer;

typedef struct model {
    uint32_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, positions;
    int32_t bos;
    uint64_t digest; /* of the weights' file: what K and V depend on */
    float norm_eps, rope_theta;
    float *embeddings; /* [vocab][hidden]; the output head too */
    float *final_norm;
    model_layer *layer;
} model;

/* Loads the model of a folder. On failure returns NULL with a sentence in `why`. */
model *model_load(const char *folder, char *why, size_t why_bytes);
void model_free(model *m);

/*
 * Runs tokens[0..ts_step_tokens) at positions ts_step_start.. of the step's only sequence through
 * all layers. logits: [vocab], of the last token. Scratch memory is allocated and freed here.
 */
ts_status model_forward(const model *m, const uint8_t *tokens, ts_step *step, float *logits);

#endif
