/* tsctl plan: how many sequences of a model fit, worked out without a daemon. */
#ifndef TSCTL_PLAN_H
#define TSCTL_PLAN_H

#include <argp.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct plan_options {
    const char *model;     /* a config.json, or its folder */
    uint64_t memory;       /* bytes of the pool of one GPU; 0: not given */
    uint64_t tokens;       /* of a sequence */
    uint64_t shared;       /* of these, the first ones that all sequences have in common */
    uint64_t gpus, split;  /* of a node, and among how many each model is split; 0: 1 */
    uint64_t block_tokens; /* 0: one is recommended */
    int dtype;             /* a ts_dtype; -1: the model's */
    bool given;            /* any of these */
} plan_options;

#define PLAN_OPTIONS_INIT                                                                          \
    {                                                                                              \
        .dtype = -1                                                                                \
    }

/* Reads the options of plan alone, as a child of argp's parser, into its input. */
extern const struct argp plan_argp;

/* Prints the plan; an exit status. */
int plan_run(const plan_options *plan, bool json);

#endif
