/*
 * Where pools lie: opens the GPUs that the configuration names, decides what `auto` means, sees
 * that the pools fit, and makes their memory. Says in the log what was chosen and why.
 *
 * Thread: main's, before the engine runs.
 */
#ifndef TS_DEVICES_H
#define TS_DEVICES_H

#include "config.h"
#include "service.h"

/* Adds every configured pool to the service's engine, with its memory and, on a GPU, its batch.
 * `failed` is told when a GPU is lost. What went wrong is logged. */
ts_status ts_devices_start(ts_service *service, const ts_config *config,
                           void (*failed)(const char *why));

/* Ends the GPUs' batches; the GPUs go with the service. */
void ts_devices_stop(ts_service *service);

/* "pool 'x' on cuda:0: bf16, 32 layers, ..." */
void ts_devices_describe(const ts_pool_config *pool, char *text, size_t bytes);

#endif
