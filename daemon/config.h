/*
 * The daemon's configuration: an INI file (read with inih), and the same keys from the command
 * line. Every value is checked where it is read; the first error names file, line, key, value and
 * limit.
 */
#ifndef TS_CONFIG_H
#define TS_CONFIG_H

#include "engine.h"
#include "log.h"
#include "operators.h"

#define TS_SOCKET_DEFAULT "/run/tinyserve/tinyserve.sock"
#define TS_CONFIG_DEFAULT "/etc/tinyserve/tinyserved.conf"

/* Who provides a pool's memory. */
typedef enum ts_provider {
    TS_PROVIDER_AUTO,
    TS_PROVIDER_HOST,
    TS_PROVIDER_CUDA_VMM,
    TS_PROVIDER_CUDA_IPC
} ts_provider;

typedef struct ts_config_pool {
    ts_pool_config pool; /* device: as given; resolved by devices.h */
    ts_provider provider;
    uint64_t memory, memory_max, slab, tenant_memory; /* bytes; 0: not given */
    uint64_t blocks;
} ts_config_pool;

typedef struct ts_config {
    char socket[100]; /* with TS_HANDLE_SUFFIX it fits into a sockaddr_un */
    uint32_t socket_mode;
    uint32_t threads; /* 0: all processors */
    ts_isa kernel;
    ts_log_level log_level;
    uint32_t tenant_connections; /* of one uid */
    uint32_t idle_ms;            /* that a connection has for each of its first steps */
    uint32_t submit_ms;          /* that a worker has to submit an ordered run */
    uint32_t spin_us;            /* that a session's rings are polled after their last use */
    ts_operators operators;
    char metrics[64]; /* where HTTP is served; empty: nowhere */
    uint64_t message_bytes;
    ts_engine_limits limits;
    ts_config_pool pools[TS_POOLS_MAX];
    uint32_t num_pools;
    char error[256]; /* the first error */
} ts_config;

/* "auto", "host", "cuda-vmm", "cuda-ipc" */
const char *ts_provider_name(ts_provider provider);

/* The port of "127.0.0.1:PORT", "localhost:PORT" or "[::1]:PORT"; NULL: it is something else. */
const char *ts_loopback_port(const char *address);

void ts_config_init(ts_config *config);

/* TS_EINVAL with config->error if a line is wrong, TS_ENOENT if the file can't be read. */
ts_status ts_config_read(ts_config *config, const char *path);

/* "NAME:key=value,key=value": a pool as on the command line. */
ts_status ts_config_add_pool(ts_config *config, const char *text);

/* A pool's memory in bytes: "8G". TS_EINVAL with config->error. */
ts_status ts_config_memory(ts_config *config, const char *text, uint64_t *bytes);

/* Sets one key of the [daemon] section. */
ts_status ts_config_set(ts_config *config, const char *key, const char *value);

/* Works out blocks and slabs; checks what only all keys together can show. */
ts_status ts_config_finish(ts_config *config);

#endif
