#include "config.h"

#include "plain_text.h"

#include <errno.h>
#include <ini.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* What a slab is a multiple of: a page, or a granule of device memory. */
#define HOST_GRANULE 4096u
#define DEVICE_GRANULE (2u << 20)

static ts_status __attribute__((format(printf, 2, 3))) fail(ts_config *c, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (c->error[0] == '\0')
        vsnprintf(c->error, sizeof c->error, format, args);
    va_end(args);
    return TS_EINVAL;
}

const char *ts_loopback_port(const char *address)
{
    static const char *const hosts[] = {"127.0.0.1:", "localhost:", "[::1]:"};
    for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) {
        size_t n = strlen(hosts[i]);
        const char *port = address + n;
        if (strncasecmp(address, hosts[i], n) == 0 && strspn(port, "0123456789") == strlen(port) &&
            strlen(port) <= 5 && strtoul(port, NULL, 10) >= 1 && strtoul(port, NULL, 10) <= 65535)
            return port;
    }
    return NULL;
}

void ts_config_init(ts_config *c)
{
    *c = (ts_config){
        .socket = TS_SOCKET_DEFAULT,
        .socket_mode = 0660,
        .log_level = TS_LOG_INFO,
        .tenant_connections = 1024,
        .idle_ms = 10000,
        .submit_ms = 30000,
        .spin_us = 50,
        .message_bytes = 1u << 20,
    };
    ts_engine_default_limits(&c->limits);
}

/* A number, with K, M, G or T (powers of 1024) behind it where `units` says so. */
static ts_status number(ts_config *c, const char *key, const char *value, bool units, int base,
                        uint64_t min, uint64_t max, uint64_t *out)
{
    char *end;
    errno = 0;
    uint64_t n = strtoull(value, &end, base);
    bool bad = errno != 0 || end == value || value[0] == '-';
    if (units && *end != '\0') {
        static const char letters[] = "KMGT";
        const char *letter = strchr(letters, *end);
        unsigned shift = letter == NULL ? 0 : 10 * (unsigned)(letter - letters + 1);
        bad = bad || letter == NULL || n > UINT64_MAX >> shift;
        n <<= shift;
        end++;
    }
    if (bad || *end != '\0')
        return fail(c, "%s = %s: %s", key, value,
                    units ? "not a size such as 512M, 4G or a number of bytes" : "not a number");
    if (n < min || n > max)
        return fail(c, "%s = %s: the limits are %llu..%llu", key, value, (unsigned long long)min,
                    (unsigned long long)max);
    *out = n;
    return TS_OK;
}

/* One of `count` words; *out is which. */
static ts_status word(ts_config *c, const char *key, const char *value, const char *const *words,
                      uint32_t count, uint32_t *out)
{
    char known[128] = "";
    for (*out = 0; *out < count; (*out)++) {
        if (strcmp(words[*out], value) == 0)
            return TS_OK;
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", *out == 0 ? "" : ", ", words[*out]);
    }
    return fail(c, "%s = %s: known are %s", key, value, known);
}

static ts_status number32(ts_config *c, const char *key, const char *value, uint32_t min,
                          uint32_t max, uint32_t *out)
{
    uint64_t n = 0;
    ts_status status = number(c, key, value, false, 10, min, max, &n);
    if (status == TS_OK)
        *out = (uint32_t)n;
    return status;
}

ts_status ts_config_memory(ts_config *c, const char *text, uint64_t *bytes)
{
    return number(c, "memory", text, true, 10, 1, UINT64_MAX >> 1, bytes);
}

ts_status ts_config_set(ts_config *c, const char *key, const char *value)
{
    uint64_t n = 0;
    uint32_t which = 0;
    ts_status status;
    if (strcmp(key, "socket") == 0) {
        const char *path = strncmp(value, "ipc://", 6) == 0 ? value + 6 : value;
        if (path[0] != '/' || strlen(path) >= sizeof c->socket - 1)
            return fail(c, "socket = %s: an absolute path of at most %zu bytes is needed", value,
                        sizeof c->socket - 2);
        snprintf(c->socket, sizeof c->socket, "%s", path);
        return TS_OK;
    }
    if (strcmp(key, "operators") == 0) {
        char why[128];
        if (ts_operators_find(value, &c->operators, why, sizeof why) == TS_OK)
            return TS_OK;
        return fail(c, "operators = %.64s: %s", value, why);
    }
    if (strcmp(key, "socket_mode") == 0) {
        status = number(c, key, value, false, 8, 0600, 0666, &n);
        if (status == TS_OK)
            c->socket_mode = (uint32_t)n;
        return status;
    }
    if (strcmp(key, "threads") == 0)
        return number32(c, key, value, 0, 1024, &c->threads);
    if (strcmp(key, "kernel") == 0) {
        static const char *const kernels[] = {"auto", "portable", "avx2", "avx512", "amx"};
        status = word(c, key, value, kernels, 5, &which);
        if (status == TS_OK && which != TS_ISA_AUTO && ts_isa_resolve((ts_isa)which) != which)
            return fail(c,
                        "kernel = %s: this machine has no %s, or doesn't let this process use it",
                        value, value);
        c->kernel = (ts_isa)which;
        return status;
    }
    if (strcmp(key, "log_level") == 0) {
        static const char *const levels[] = {"error", "warning", "info", "debug"};
        static const ts_log_level values[] = {TS_LOG_ERROR, TS_LOG_WARNING, TS_LOG_INFO,
                                              TS_LOG_DEBUG};
        status = word(c, key, value, levels, 4, &which);
        if (status == TS_OK)
            c->log_level = values[which];
        return status;
    }
    if (strcmp(key, "tenant_connections") == 0)
        return number32(c, key, value, 1, 65536, &c->tenant_connections);
    if (strcmp(key, "idle_seconds") == 0) {
        status = number32(c, key, value, 1, 3600, &which);
        c->idle_ms = which * 1000;
        return status;
    }
    if (strcmp(key, "submit_seconds") == 0) {
        status = number32(c, key, value, 1, 3600, &which);
        c->submit_ms = which * 1000;
        return status;
    }
    if (strcmp(key, "metrics") == 0) {
        bool off = strcmp(value, "off") == 0;
        if (!off && ts_loopback_port(value) == NULL)
            return fail(c,
                        "metrics = %s: off, or a loopback address such as 127.0.0.1:9470, is "
                        "needed",
                        value);
        snprintf(c->metrics, sizeof c->metrics, "%s", off ? "" : value);
        return TS_OK;
    }
    if (strcmp(key, "spin_us") == 0)
        return number32(c, key, value, 0, 1000000, &c->spin_us);
    if (strcmp(key, "message_max") == 0)
        return number(c, key, value, true, 10, 4096, 1u << 30, &c->message_bytes);
    if (strcmp(key, "exchange_max") == 0)
        return number(c, key, value, true, 10, 4096, UINT64_MAX >> 1, &c->limits.exchange_bytes);
    if (strcmp(key, "sessions") == 0)
        return number32(c, key, value, 1, 1u << 20, &c->limits.sessions);
    if (strcmp(key, "session_sequences") == 0)
        return number32(c, key, value, 1, 1u << 24, &c->limits.session_sequences);
    if (strcmp(key, "session_steps") == 0)
        return number32(c, key, value, 1, 65536, &c->limits.session_steps);
    if (strcmp(key, "session_blocks") == 0)
        return number(c, key, value, false, 10, 1, UINT64_MAX, &c->limits.session_blocks);
    if (strcmp(key, "batch") == 0)
        return number32(c, key, value, 1, 1u << 20, &c->limits.batch);
    if (strcmp(key, "step_tokens") == 0)
        return number32(c, key, value, 1, 1u << 24, &c->limits.step_tokens);
    return fail(c, "there is no key '%s' in [daemon]", key);
}

static const char *const providers[] = {"auto", "host", "cuda-vmm", "cuda-ipc"};

const char *ts_provider_name(ts_provider provider)
{
    return providers[provider];
}

static ts_status set_device(ts_config *c, ts_config_pool *p, const char *value)
{
    char *end;
    bool cuda = strncmp(value, "cuda:", 5) == 0 && value[5] >= '0' && value[5] <= '9' &&
                strtoul(value + 5, &end, 10) < 1024 && *end == '\0';
    if (!cuda && strcmp(value, "auto") != 0 && strcmp(value, "host") != 0)
        return fail(c, "device = %s: known are auto, host and cuda:N", value);
    snprintf(p->pool.device, sizeof p->pool.device, "%s", value);
    return TS_OK;
}

static ts_status set_pool(ts_config *c, ts_config_pool *p, const char *key, const char *value)
{
    ts_geometry *g = &p->pool.geometry;
    uint32_t which = 0;
    ts_status status;
    if (strcmp(key, "layers") == 0)
        return number32(c, key, value, 1, TS_LAYERS_MAX, &g->layers);
    if (strcmp(key, "kv_heads") == 0)
        return number32(c, key, value, 1, TS_HEADS_MAX, &g->kv_heads);
    if (strcmp(key, "head_dim") == 0)
        return number32(c, key, value, TS_HEAD_DIM_MIN, TS_HEAD_DIM_MAX, &g->head_dim);
    if (strcmp(key, "block_tokens") == 0)
        return number32(c, key, value, 1, TS_BLOCK_TOKENS_MAX, &g->block_tokens);
    if (strcmp(key, "dtype") == 0) {
        static const char *const dtypes[] = {"fp32", "fp16", "bf16", "fp8_e4m3"};
        status = word(c, key, value, dtypes, 4, &which);
        g->dtype = (ts_dtype)which;
        return status;
    }
    if (strcmp(key, "layout") == 0) {
        static const char *const layouts[] = {"nhd", "hnd"};
        status = word(c, key, value, layouts, 2, &which);
        g->layout = (ts_layout)which;
        return status;
    }
    if (strcmp(key, "device") == 0)
        return set_device(c, p, value);
    if (strcmp(key, "provider") == 0) {
        status = word(c, key, value, providers, 4, &which);
        p->provider = (ts_provider)which;
        return status;
    }
    if (strcmp(key, "kernel") == 0) {
        const char *kernels[TS_KERNEL_COUNT];
        for (int i = 0; i < TS_KERNEL_COUNT; i++)
            kernels[i] = ts_kernel_name((ts_kernel)i);
        status = word(c, key, value, kernels, TS_KERNEL_COUNT, &which);
        p->pool.kernel = (ts_kernel)which;
        return status;
    }
    if (strcmp(key, "client_write") == 0) {
        static const char *const writers[] = {"none", "all"};
        status = word(c, key, value, writers, 2, &which);
        p->pool.client_write = (ts_client_write)which;
        return status;
    }
    if (strcmp(key, "memory") == 0)
        return ts_config_memory(c, value, &p->memory);
    if (strcmp(key, "memory_max") == 0)
        return number(c, key, value, true, 10, 1, UINT64_MAX >> 1, &p->memory_max);
    if (strcmp(key, "slab") == 0)
        return number(c, key, value, true, 10, 4096, UINT64_MAX >> 1, &p->slab);
    if (strcmp(key, "tenant_memory") == 0)
        return number(c, key, value, true, 10, 1, UINT64_MAX >> 1, &p->tenant_memory);
    if (strcmp(key, "blocks") == 0)
        return number(c, key, value, false, 10, 1, TS_POOL_BLOCKS_MAX, &p->blocks);
    if (strcmp(key, "sequences") == 0)
        return number32(c, key, value, 1, 1u << 24, &p->pool.sequences_max);
    if (strcmp(key, "sequence_tokens") == 0)
        return number32(c, key, value, 1, 1u << 30, &p->pool.sequence_tokens_max);
    return fail(c, "there is no key '%s' in a [pool]", key);
}

/* The pool of this name, made if there is none; NULL and an error if that can't be. */
static ts_config_pool *pool_named(ts_config *c, const char *name)
{
    if (name[0] == '\0' || strlen(name) >= sizeof c->pools[0].pool.name) {
        fail(c, "a pool's name has 1..%zu bytes: '%s'", sizeof c->pools[0].pool.name - 1, name);
        return NULL;
    }
    if (!ts_text_plain(name)) {
        char shown[160];
        fail(c, "a pool's name is plain text, without control characters, in UTF-8: '%s'",
             ts_text_escape(name, shown, sizeof shown));
        return NULL;
    }
    for (uint32_t i = 0; i < c->num_pools; i++)
        if (strcmp(c->pools[i].pool.name, name) == 0)
            return &c->pools[i];
    if (c->num_pools == TS_POOLS_MAX) {
        fail(c, "pool '%s' would be number %u; the limit is %u", name, c->num_pools + 1,
             TS_POOLS_MAX);
        return NULL;
    }
    ts_config_pool *p = &c->pools[c->num_pools++];
    *p = (ts_config_pool){
        .slab = 64u << 20,
        .pool = {.geometry = {.block_tokens = 16, .dtype = TS_DTYPE_BF16},
                 .sequences_max = 1u << 20,
                 .sequence_tokens_max = 1u << 20,
                 .device = "auto",
                 .memory = "host"},
    };
    snprintf(p->pool.name, sizeof p->pool.name, "%s", name);
    return p;
}

static int on_key(void *user, const char *section, const char *key, const char *value)
{
    ts_config *c = user;
    if (strcmp(section, "daemon") == 0)
        return ts_config_set(c, key, value) == TS_OK;
    if (strncmp(section, "pool ", 5) == 0) {
        ts_config_pool *p = pool_named(c, section + 5);
        return p != NULL && set_pool(c, p, key, value) == TS_OK;
    }
    fail(c, "there is no section [%s]; known are [daemon] and [pool NAME]", section);
    return 0;
}

ts_status ts_config_read(ts_config *c, const char *path)
{
    int line = ini_parse(path, on_key, c);
    if (line == 0)
        return TS_OK;
    char reason[200];
    snprintf(reason, sizeof reason, "%.199s", c->error);
    if (line < 0) {
        snprintf(c->error, sizeof c->error, "%s: %s", path, strerror(errno));
        return TS_ENOENT;
    }
    snprintf(c->error, sizeof c->error, "%s:%d: %s", path, line,
             reason[0] != '\0' ? reason : "neither a [section] nor key = value");
    return TS_EINVAL;
}

ts_status ts_config_add_pool(ts_config *c, const char *text)
{
    char copy[512], *rest = copy;
    if (strlen(text) >= sizeof copy)
        return fail(c, "a pool told in %zu bytes; the limit is %zu", strlen(text), sizeof copy - 1);
    snprintf(copy, sizeof copy, "%s", text);
    const char *name = strsep(&rest, ":");
    ts_config_pool *p = pool_named(c, name);
    if (p == NULL)
        return TS_EINVAL;
    for (char *pair; (pair = strsep(&rest, ",")) != NULL;) {
        char *equals = strchr(pair, '=');
        if (equals == NULL)
            return fail(c, "pool '%s': '%s' is not key=value", p->pool.name, pair);
        *equals = '\0';
        if (set_pool(c, p, pair, equals + 1) != TS_OK)
            return TS_EINVAL;
    }
    return TS_OK;
}

static ts_status finish_pool(ts_config *c, ts_config_pool *p)
{
    char why[160];
    const char *name = p->pool.name;
    if (ts_geometry_check(&p->pool.geometry, why, sizeof why) != TS_OK)
        return fail(c, "pool '%s': %s", name, why);
    size_t block_bytes = ts_geometry_block_bytes(&p->pool.geometry);
    if ((p->memory == 0) == (p->blocks == 0))
        return fail(c, "pool '%s': give either memory or blocks", name);
    uint64_t blocks = p->blocks != 0 ? p->blocks : p->memory / block_bytes;
    if (blocks == 0 || blocks > TS_POOL_BLOCKS_MAX)
        return fail(c, "pool '%s': %llu blocks of %zu bytes; the limits are 1..%u blocks", name,
                    (unsigned long long)blocks, block_bytes, TS_POOL_BLOCKS_MAX);
    bool host = strcmp(p->pool.device, "host") == 0;
    bool cuda = strncmp(p->pool.device, "cuda:", 5) == 0;
    if ((host && p->provider > TS_PROVIDER_HOST) || (cuda && p->provider == TS_PROVIDER_HOST))
        return fail(c, "pool '%s': provider = %s can't be used with device = %s", name,
                    ts_provider_name(p->provider), p->pool.device);
    if ((host || p->provider == TS_PROVIDER_HOST) && p->pool.kernel != TS_KERNEL_AUTO)
        return fail(c, "pool '%s': kernel = %s runs on a GPU, and the pool is in host memory", name,
                    ts_kernel_name(p->pool.kernel));
    p->pool.num_blocks = (uint32_t)blocks;
    p->pool.slab_blocks =
        ts_geometry_slab_blocks(&p->pool.geometry, p->slab, host ? HOST_GRANULE : DEVICE_GRANULE);
    if (!host && p->pool.slab_blocks > blocks &&
        p->memory_max == 0) /* one slab need not be whole granules */
        p->pool.slab_blocks = (uint32_t)blocks;
    uint64_t max = p->memory_max / block_bytes, slab = p->pool.slab_blocks;
    if (p->memory_max != 0 && max < blocks)
        return fail(c, "pool '%s': memory_max is less than its memory", name);
    if (max > TS_POOL_BLOCKS_MAX)
        return fail(c, "pool '%s': memory_max would be %llu blocks; the limit is %u", name,
                    (unsigned long long)max, TS_POOL_BLOCKS_MAX);
    p->pool.max_blocks = (uint32_t)(max > blocks ? max : blocks);
    if (max > blocks) { /* whole slabs, up to the last */
        blocks = (blocks + slab - 1) / slab * slab;
        p->pool.num_blocks = (uint32_t)(blocks < max ? blocks : max);
    }
    p->pool.tenant_blocks_max = p->tenant_memory == 0 ? UINT64_MAX : p->tenant_memory / block_bytes;
    return TS_OK;
}

ts_status ts_config_finish(ts_config *c)
{
    if (c->num_pools == 0)
        return fail(c, "no pool is configured: add a [pool NAME] section");
    for (uint32_t i = 0; i < c->num_pools; i++)
        if (finish_pool(c, &c->pools[i]) != TS_OK)
            return TS_EINVAL;
    return TS_OK;
}
