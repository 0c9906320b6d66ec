/*
 * The daemon's configuration: an INI file (read with inih), and the same keys from the command
 * line. Every value is checked where it is read, and every problem is kept, with its line, key,
 * value and limit. The keys themselves are config_keys.c's table.
 */
#ifndef TS_CONFIG_H
#define TS_CONFIG_H

#include "attention.h"
#include "engine.h"
#include "handle_wire.h"
#include "log.h"
#include "operators.h"

#define TS_CONFIG_SOCKET_BYTES 100
/* Of the path; the handle socket's name is longer by its suffix. */
#define TS_CONFIG_SOCKET_MAX (TS_CONFIG_SOCKET_BYTES - sizeof TS_HANDLE_SUFFIX)
#define TS_CONFIG_DEFAULT "/etc/tinyserve/tinyserved.conf"

/* Who provides a pool's memory. */
typedef enum ts_provider {
    TS_PROVIDER_AUTO,
    TS_PROVIDER_HOST,
    TS_PROVIDER_CUDA_VMM,
    TS_PROVIDER_CUDA_IPC
} ts_provider;

#define TS_METRICS_ADDRESS_BYTES 64
#define TS_METRICS_HOSTS_BYTES 512

#define TS_CONFIG_KEYS_MAX 32u /* of a section */

/* Which of a section's keys were given, and in which lines; 0: on the command line. */
typedef struct ts_config_given {
    uint32_t keys; /* bit i: key i of the section's table, whether its value could be read or not */
    uint32_t lines[TS_CONFIG_KEYS_MAX];
    uint32_t line; /* of the section itself; 0: it isn't in the file */
} ts_config_given;

typedef struct ts_config_pool {
    ts_pool_config pool; /* device: as given; resolved by pool_memory.h */
    ts_provider provider;
    uint64_t memory, memory_max, slab, tenant_memory, tenant_pinned; /* bytes; 0: not given */
    uint64_t blocks;
    ts_config_given given;
    bool bad;             /* a value of it couldn't be read */
    bool on_command_line; /* a --pool has told of it */
} ts_config_pool;

#define TS_CONFIG_PROBLEMS_MAX 32u

typedef struct ts_config_problem {
    uint32_t line; /* 0: of the command line, or of no line */
    char text[240];
} ts_config_problem;

/* What of tenants is shown over HTTP to everybody who can connect. */
typedef enum ts_metrics_show { TS_METRICS_TOTALS, TS_METRICS_ALL } ts_metrics_show;

/* Whether a restart holds pools' memory against checksums of it. */
typedef enum ts_verify { TS_VERIFY_OFF, TS_VERIFY_RESTART } ts_verify;

typedef struct ts_config {
    char socket[TS_CONFIG_SOCKET_BYTES]; /* with TS_HANDLE_SUFFIX it fits into a sockaddr_un */
    bool socket_is_own; /* nobody has set it, and it is the user's own (socket_place.h) */
    uint32_t socket_mode;
    uint32_t threads; /* 0: see ts_config_threads */
    ts_isa kernel;
    ts_log_level log_level;
    uint32_t tenant_connections; /* of one uid */
    uint32_t idle_ms;            /* that a connection has for each of its first steps */
    uint32_t submit_ms;          /* that a worker has to submit a run on a stream */
    ts_verify verify;
    uint32_t join_us;               /* that a ready run waits for others, among many sessions */
    uint64_t tenant_exchange_bytes; /* of a GPU, in one tenant's exchanges; 0: a quarter of it */
    uint32_t spin_us;               /* that a session's rings are polled after their last use */
    ts_operators operators;
    char metrics[TS_METRICS_ADDRESS_BYTES];     /* where HTTP is served; empty: nowhere */
    char metrics_hosts[TS_METRICS_HOSTS_BYTES]; /* names it may be asked for by, beside addresses */
    ts_metrics_show metrics_show;
    uint64_t message_bytes;
    ts_engine_limits limits;
    ts_config_given given;
    ts_config_pool pools[TS_POOLS_MAX];
    uint32_t num_pools;
    const char *file; /* whose lines the problems name; the caller's */
    ts_config_problem problems[TS_CONFIG_PROBLEMS_MAX]; /* by line */
    uint32_t num_problems, problems_left_out;
} ts_config;

/* "auto", "host", "cuda-vmm", "cuda-ipc" */
const char *ts_provider_name(ts_provider provider);

void ts_config_init(ts_config *config);

/* Each of these goes on after a problem. TS_EINVAL: there are problems. */

/* TS_ENOENT: the file can't be read. The path must stay. */
ts_status ts_config_read(ts_config *config, const char *path);

/* "NAME:key=value,key=value": a pool as on the command line. */
ts_status ts_config_add_pool(ts_config *config, const char *text);

/* Sets one key of the [daemon] section. */
ts_status ts_config_set(ts_config *config, const char *key, const char *value);

/* Works out blocks and slabs; checks what only all keys together can show. Of pools alone: the rest
 * of the configuration isn't looked at. */
ts_status ts_config_finish(ts_config *config);
ts_status ts_config_finish_pools(ts_config *config);

/* Gives a pool, or the engine, the quotas that a configuration has. Those that depend on how large
 * it is (as by default they do) are worked out from what `to` has, which is set but for them. */
void ts_config_set_quotas(const ts_config_pool *given, ts_pool_config *to);
void ts_config_set_sessions(const ts_config *given, ts_engine_limits *to);

/* One more problem of a line, or of none. */
void ts_config_complain(ts_config *config, uint32_t line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The problem as a sentence, with file and line. Returns `text`. */
const char *ts_config_problem_text(const ts_config *config, uint32_t problem, char *text,
                                   size_t bytes);

/* The line in which a pool's key was given; else its section's. */
uint32_t ts_config_pool_line(const ts_config_pool *pool, const char *key);

/* Threads for the processor's kernels on a machine of `processors` processors. */
uint32_t ts_config_threads(const ts_config *config, uint32_t processors);

/* A pool's memory in bytes: "8G". TS_EINVAL with a sentence. */
ts_status ts_config_memory(const char *text, uint64_t *bytes, char *why, size_t why_bytes);

/* Calls `differs` with the name of each key whose values differ and that a running daemon can't
 * change. */
void ts_config_compare(const ts_config *a, const ts_config *b,
                       void (*differs)(void *arg, const char *key), void *arg);
bool ts_config_pools_differ(const ts_config_pool *a, const ts_config_pool *b);

#endif
