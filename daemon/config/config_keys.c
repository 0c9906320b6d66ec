#include "config_keys.h"

#include "dtypes.h"
#include "http_address.h"
#include "plain_text.h"
#include "socket_place.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- ways to read a value ---- */

/* All bytes of the field are the text's or 0, so that fields can be compared. */
static void put_text(const ts_config_key *key, void *field, const char *text)
{
    memset(field, 0, key->bytes);
    snprintf(field, key->bytes, "%s", text);
}

static ts_status read_number(const ts_config_key *key, const char *value, bool units, uint64_t *out,
                             char *why, size_t why_bytes)
{
    const bool negative = value[0] == '-';
    const char *digits = value + negative;
    char *end;
    errno = 0;
    uint64_t n = strtoull(digits, &end, key->octal ? 8 : 10);
    bool bad = end == digits || strspn(digits, "0123456789") == 0;
    bool beyond = negative || errno == ERANGE;
    if (units && *end != '\0') {
        static const char letters[] = "KMGT";
        const char *letter = strchr(letters, *end);
        unsigned shift = letter == NULL ? 0 : 10 * (unsigned)(letter - letters + 1);
        bad = bad || letter == NULL;
        beyond = beyond || n > UINT64_MAX >> shift;
        n <<= shift;
        end++;
    }
    bad = bad || *end != '\0';
    if (bad && units) {
        snprintf(why, why_bytes, "not a size such as 512M, 4G or a number of bytes");
        return TS_EINVAL;
    }
    if (bad || beyond || n < key->least || n > key->most) {
        const char *what = !bad ? "" : key->octal ? "not an octal number; " : "not a number; ";
        snprintf(why, why_bytes,
                 key->octal ? "%sthe limits are %llo..%llo" : "%sthe limits are %llu..%llu", what,
                 (unsigned long long)key->least, (unsigned long long)key->most);
        return TS_EINVAL;
    }
    *out = n;
    return TS_OK;
}

static ts_status read_u32(const ts_config_key *key, void *field, const char *value, char *why,
                          size_t why_bytes)
{
    uint64_t n;
    if (read_number(key, value, false, &n, why, why_bytes) != TS_OK)
        return TS_EINVAL;
    *(uint32_t *)field = (uint32_t)n;
    return TS_OK;
}

/* Seconds into a field of milliseconds. */
static ts_status read_seconds(const ts_config_key *key, void *field, const char *value, char *why,
                              size_t why_bytes)
{
    if (read_u32(key, field, value, why, why_bytes) != TS_OK)
        return TS_EINVAL;
    *(uint32_t *)field *= 1000;
    return TS_OK;
}

static ts_status read_u64(const ts_config_key *key, void *field, const char *value, char *why,
                          size_t why_bytes)
{
    return read_number(key, value, false, field, why, why_bytes);
}

static ts_status read_size(const ts_config_key *key, void *field, const char *value, char *why,
                           size_t why_bytes)
{
    return read_number(key, value, true, field, why, why_bytes);
}

/* One of the key's words into an enum, which counts as they do. */
static ts_status read_word(const ts_config_key *key, void *field, const char *value, char *why,
                           size_t why_bytes)
{
    char known[160] = "";
    for (uint32_t i = 0; key->words[i] != NULL; i++) {
        if (strcmp(key->words[i], value) == 0) {
            memcpy(field, &i, sizeof i);
            return TS_OK;
        }
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i == 0 ? "" : ", ", key->words[i]);
    }
    snprintf(why, why_bytes, "known are %s", known);
    return TS_EINVAL;
}

static ts_status read_socket(const ts_config_key *key, void *field, const char *value, char *why,
                             size_t why_bytes)
{
    const char *path = strncmp(value, "ipc://", 6) == 0 ? value + 6 : value;
    const size_t most = TS_CONFIG_SOCKET_MAX;
    if (path[0] != '/' || strlen(path) > most) {
        snprintf(why, why_bytes, "an absolute path of at most %zu bytes is needed", most);
        return TS_EINVAL;
    }
    put_text(key, field, path);
    return TS_OK;
}

static ts_status read_operators(const ts_config_key *key, void *field, const char *value, char *why,
                                size_t why_bytes)
{
    (void)key;
    return ts_operators_find(value, field, why, why_bytes);
}

static ts_status read_isa(const ts_config_key *key, void *field, const char *value, char *why,
                          size_t why_bytes)
{
    ts_isa isa;
    if (read_word(key, &isa, value, why, why_bytes) != TS_OK)
        return TS_EINVAL;
    if (isa != TS_ISA_AUTO && ts_isa_resolve(isa) != isa) {
        snprintf(why, why_bytes, "this machine has no %s, or doesn't let this process use it",
                 value);
        return TS_EINVAL;
    }
    *(ts_isa *)field = isa;
    return TS_OK;
}

static ts_status read_log_level(const ts_config_key *key, void *field, const char *value, char *why,
                                size_t why_bytes)
{
    static const ts_log_level levels[] = {TS_LOG_ERROR, TS_LOG_WARNING, TS_LOG_INFO, TS_LOG_DEBUG};
    uint32_t which;
    if (read_word(key, &which, value, why, why_bytes) != TS_OK)
        return TS_EINVAL;
    *(ts_log_level *)field = levels[which];
    return TS_OK;
}

static ts_status read_metrics(const ts_config_key *key, void *field, const char *value, char *why,
                              size_t why_bytes)
{
    ts_http_address address;
    bool off = strcmp(value, "off") == 0;
    if (!off && (strlen(value) >= key->bytes || !ts_http_address_parse(value, &address))) {
        snprintf(why, why_bytes, "off, or an address and a port such as 127.0.0.1:9470, is needed");
        return TS_EINVAL;
    }
    put_text(key, field, off ? "" : value);
    return TS_OK;
}

static ts_status read_hosts(const ts_config_key *key, void *field, const char *value, char *why,
                            size_t why_bytes)
{
    if (strlen(value) >= key->bytes) {
        snprintf(why, why_bytes, "%zu bytes; the limit is %zu", strlen(value), key->bytes - 1);
        return TS_EINVAL;
    }
    if (!ts_http_hosts_parse(value, why, why_bytes))
        return TS_EINVAL;
    put_text(key, field, value);
    return TS_OK;
}

static ts_status read_device(const ts_config_key *key, void *field, const char *value, char *why,
                             size_t why_bytes)
{
    char *end;
    bool cuda = strncmp(value, "cuda:", 5) == 0 && value[5] >= '0' && value[5] <= '9' &&
                strtoul(value + 5, &end, 10) < 1024 && *end == '\0';
    if (!cuda && strcmp(value, "auto") != 0 && strcmp(value, "host") != 0) {
        snprintf(why, why_bytes, "known are auto, host and cuda:N");
        return TS_EINVAL;
    }
    put_text(key, field, value);
    return TS_OK;
}

static ts_status read_model(const ts_config_key *key, void *field, const char *value, char *why,
                            size_t why_bytes)
{
    if (strlen(value) >= key->bytes || !ts_text_plain(value)) {
        snprintf(why, why_bytes, "plain text of at most %zu bytes is needed", key->bytes - 1);
        return TS_EINVAL;
    }
    put_text(key, field, value);
    return TS_OK;
}

/* ---- the keys ---- */

static const char *const isas[] = {"auto", "portable", "avx2", "avx512", "amx", "neon", NULL};
static const char *const levels[] = {"error", "warning", "info", "debug", NULL};
static const char *const verifies[] = {"off", "restart", NULL};
static const char *const shows[] = {"totals", "all", NULL};
static const char *const dtypes[] = {"fp32", "fp16", "bf16", "fp8_e4m3", NULL};
static const char *const layouts[] = {"nhd", "hnd", NULL};
static const char *const providers[] = {"auto", "host", "cuda-vmm", "cuda-ipc", NULL};
static const char *const writers[] = {"none", "all", NULL};
static const char *const caches[] = {"on", "off", NULL};
static const char *const kernels[] = {"auto", "v1",   "v2",  "v3",    "v4",
                                      "v5",   "tile", "mma", "wgmma", NULL};
_Static_assert(sizeof dtypes / sizeof *dtypes - 1 == TS_DTYPE_COUNT, "one word for each dtype");
_Static_assert(sizeof kernels / sizeof *kernels - 1 == TS_KERNEL_COUNT, "one word for each kernel");

#define KEY(type, name_, reader, field)                                                            \
    .name = name_, .read = reader, .offset = offsetof(type, field),                                \
    .bytes = sizeof(((type *)0)->field)
#define DAEMON(name, reader, field) KEY(ts_config, name, reader, field)
#define POOL(name, reader, field) KEY(ts_config_pool, name, reader, field)
#define BYTES_MAX (UINT64_MAX >> 1)

/* In the order in which tinyserved.conf has them. config_keys.h explains the fields. */
static const ts_config_key daemon_keys[] = {
    {DAEMON("socket", read_socket, socket), .preset = TS_SYSTEM_SOCKET,
     .help = "Where workers connect. The handle socket lies beside it (.handles). Without root the "
             "default is the user's own, as tinyserved(8) says."},
    {DAEMON("socket_mode", read_u32, socket_mode), .octal = true, .least = 0600, .most = 0666,
     .preset = "0660", .help = "Who may connect: the daemon's user and group."},
    {DAEMON("operators", read_operators, operators), .empty = "none", .reloads = true,
     .help = "A group that may give the orders of tsctl(1), beside root and the daemon's user.",
     .more = "Its members are looked up when the configuration is read."},
    {DAEMON("threads", read_u32, threads), .least = 0, .most = 1024, .preset = "0",
     .help = "Threads of the attention kernels. 0: one for each processor, but for an eighth of "
             "them where there are 8 and more: those are left to the workers."},
    {DAEMON("kernel", read_isa, kernel), .words = isas, .preset = "auto",
     .help = "What the processor's attention kernels use: {words}."},
    {DAEMON("log_level", read_log_level, log_level), .words = levels, .preset = "info",
     .reloads = true, .help = "The least important lines of the log: {words}."},
    {DAEMON("tenant_connections", read_u32, tenant_connections), .least = 1, .most = 65536,
     .preset = "1024",
     .help = "Connections of one user at each of the two sockets. Operators have no such limit.",
     .more = "The last 8 connections that the daemon's descriptors allow are theirs; a user has "
             "three quarters of all at most."},
    {DAEMON("idle_seconds", read_seconds, idle_ms), .least = 1, .most = 3600, .preset = "10",
     .help = "Seconds that a connection has to greet, to send a message, to read an answer, and to "
             "open a session.",
     .more = "Then the daemon ends it."},
    {DAEMON("submit_seconds", read_seconds, submit_ms), .least = 1, .most = 3600, .preset = "30",
     .help = "Seconds that a worker on a GPU has to submit a run that it has asked for."},
    {DAEMON("join_us", read_u32, join_us), .least = 0, .most = 1000, .preset = "20",
     .help = "Microseconds that a run waits for others at most, to share a launch with them, while "
             "many sessions are at work. 0: none waits.",
     .more = "On a GPU it waits while six sessions and more are at work and the GPU has something "
             "to do. On the machine's processors, where there are four and more, it waits until as "
             "many have come as shared the last launch."},
    {DAEMON("verify", read_word, verify), .words = verifies, .preset = "off",
     .help = "Whether pools' memory is checked after a restart: {words}.",
     .more =
         "With restart each block that a step has filled gets a checksum, by a thread of its "
         "own, and the daemon that takes over serves nothing before all of them were held "
         "against the memory. Blocks that don't hold what was stored are forgotten, and the "
         "sequences that had one are lost; the log and tsctl status say how many. It takes as long "
         "as reading "
         "the memory does. Blocks that wait for their checksum at the death aren't checked, nor "
         "are those that were filled while 65536 waited, and blocks with tokens that a worker "
         "appended."},
    {DAEMON("metrics", read_metrics, metrics), .preset = "off", .shipped = "127.0.0.1:9470",
     .help = "An address and a port, or off. They serve a page that shows the pools at /, its "
             "figures as /stats.json, Prometheus' figures as /metrics, and /healthz, to everybody "
             "who can reach the address.",
     .more = "At 127.0.0.1 or [::1] those are the machine's users. There is no password: on "
             "another address a firewall or a proxy must decide who connects, and the unit's "
             "`IPAddressAllow` needs an override."},
    {DAEMON("metrics_hosts", read_hosts, metrics_hosts), .empty = "none",
     .help = "Names that HTTP may be asked for by, beside addresses and localhost, with commas "
             "between them. A name with :PORT stands for that port alone.",
     .more = "Other names are refused, since a page elsewhere could have made them lead here."},
    {DAEMON("metrics_show", read_word, metrics_show), .words = shows, .preset = "totals",
     .reloads = true,
     .help = "What HTTP shows everybody of tenants: totals, or all, with sessions, sequences and "
             "pids.",
     .more = "`all` adds sessions with their programs, pids and uids, sequences with their "
             "lengths, and whose each block is."},
    {DAEMON("spin_us", read_u32, spin_us), .least = 0, .most = 1000000, .preset = "50",
     .help = "Microseconds that a session's rings are polled after their last use. Longer is "
             "quicker for workers that do much between two layers, and costs a processor."},
    {DAEMON("message_max", read_size, message_bytes), .least = 4096, .most = 1u << 30,
     .preset = "8M",
     .help =
         "The longest message. libtinyserve refuses to send a longer one; another client's ends "
         "its connection.",
     .more = "A step of as many new tokens as `step_tokens` allows by default, with their ids, "
             "fits into 8M."},
    {DAEMON("exchange_max", read_size, limits.exchange_bytes), .least = 4096, .most = BYTES_MAX,
     .preset = "1G", .reloads = true, .help = "Shared memory for q, k, v and out of one session."},
    {DAEMON("tenant_exchange", read_size, tenant_exchange_bytes), .least = 4096, .most = BYTES_MAX,
     .empty = "a quarter of the GPU's memory", .reloads = true,
     .help = "A GPU's memory that the exchanges of one user may take.",
     .more = "An exchange that was replaced counts until the GPU has its memory back. Exchanges "
             "never take what pools of the GPU were promised."},
    {DAEMON("sessions", read_u32, limits.sessions), .least = 1, .most = 1u << 20, .preset = "4096",
     .help = "Sessions open at a time."},
    {DAEMON("tenant_sessions", read_u32, limits.tenant_sessions), .least = 1, .most = 1u << 20,
     .empty = "a quarter of `sessions`", .reloads = true,
     .help = "Sessions of one user open at a time. Operators have no such limit.",
     .more = "The last 8 of `sessions` are theirs."},
    {DAEMON("session_sequences", read_u32, limits.session_sequences), .least = 1, .most = 1u << 24,
     .preset = "16777216", .reloads = true, .help = "Sequences that one session may own."},
    {DAEMON("session_steps", read_u32, limits.session_steps), .least = 1, .most = 65536,
     .preset = "256", .reloads = true, .help = "Steps that one session may have open."},
    {DAEMON("session_blocks", read_u64, limits.session_blocks), .least = 1, .most = UINT64_MAX,
     .empty = "16 times the pool's blocks", .reloads = true,
     .help = "Block table entries of one session's sequences."},
    {DAEMON("batch", read_u32, limits.batch), .least = 1, .most = 1u << 20, .preset = "65536",
     .reloads = true, .help = "Sequences in one request."},
    {DAEMON("step_tokens", read_u32, limits.step_tokens), .least = 1, .most = 1u << 24,
     .preset = "1048576", .reloads = true,
     .help = "New tokens in one step, and tokens of the prompts in one match."},
};

static const ts_config_key pool_keys[] = {
    {POOL("layers", read_u32, pool.geometry.layers), .least = 1, .most = TS_LAYERS_MAX,
     .required = true, .shipped = "32", .help = "Layers of the model, {limits}."},
    {POOL("kv_heads", read_u32, pool.geometry.kv_heads), .least = 1, .most = TS_HEADS_MAX,
     .required = true, .shipped = "8", .help = "KV heads of a layer, {limits}."},
    {POOL("head_dim", read_u32, pool.geometry.head_dim), .least = TS_HEAD_DIM_MIN,
     .most = TS_HEAD_DIM_MAX, .required = true, .shipped = "128",
     .help = "Elements of a head, {limits}."},
    {POOL("memory", read_size, memory), .least = 1, .most = BYTES_MAX, .shipped = "1G",
     .help = "The pool's memory. In its place, `blocks` says how many blocks the pool has."},
    {POOL("blocks", read_u64, blocks), .least = 1, .most = TS_POOL_BLOCKS_MAX,
     .help = "How many blocks the pool has, in place of `memory`."},
    {POOL("memory_max", read_size, memory_max), .least = 1, .most = BYTES_MAX, .empty = "`memory`",
     .help = "What `tsctl pool resize` may give the pool while it runs.",
     .more = "Workers reserve this much of their address space for the pool."},
    {POOL("device", read_device, pool.device), .preset = "auto",
     .help = "Where the pool lies: host, cuda:N, or auto: the first GPU if there is one."},
    {POOL("provider", read_word, provider), .words = providers, .preset = "auto",
     .help = "Who provides the memory: host; on a GPU cuda-vmm, or cuda-ipc where VMM export is "
             "missing; or auto."},
    {POOL("kernel", read_word, pool.kernel), .words = kernels, .preset = "auto",
     .help = "The kernels of a GPU, to compare them (kernels/README.md): {words}."},
    {POOL("dtype", read_word, pool.geometry.dtype), .words = dtypes, .preset = "bf16",
     .help = "What K and V are stored as: {words}."},
    {POOL("block_tokens", read_u32, pool.geometry.block_tokens), .least = 1,
     .most = TS_BLOCK_TOKENS_MAX, .preset = "16", .help = "Tokens of a block, {limits}."},
    {POOL("layout", read_word, pool.geometry.layout), .words = layouts, .preset = "nhd",
     .help = "The order inside a layer of a block: nhd is [token][head][dim], hnd is "
             "[head][token][dim]."},
    {POOL("slab", read_size, slab), .least = 4096, .most = BYTES_MAX, .preset = "64M",
     .help = "The unit of memory that is exported, and that one tenant has to itself. It is cut "
             "down to whole blocks that fill a multiple of 2M, or of 4K with `device = host`, but "
             "to no less than one such multiple. One of a pool without `memory_max` is no larger "
             "than the pool."},
    {POOL("tenant_memory", read_size, tenant_memory), .least = 1, .most = BYTES_MAX,
     .empty = "no limit", .reloads = true, .help = "The most that one tenant may use."},
    {POOL("tenant_pinned", read_size, tenant_pinned), .least = 1, .most = BYTES_MAX,
     .empty = "half of the pool's memory", .reloads = true,
     .help = "Memory that the kept sequences of one user may take, each block counted once."},
    {POOL("tenant_sequences", read_u32, pool.tenant_sequences_max), .least = 1, .most = 1u << 24,
     .empty = "a quarter of `sequences`", .reloads = true,
     .help = "Sequences of one user live at a time."},
    {POOL("tenant_entries", read_u64, pool.tenant_entries_max), .least = 1, .most = UINT64_MAX,
     .empty = "16 times the pool's blocks", .reloads = true,
     .help = "Block table entries of all sequences of one user, kept ones included."},
    {POOL("sequences", read_u32, pool.sequences_max), .least = 1, .most = 1u << 24,
     .preset = "1048576", .help = "Sequences live at a time."},
    {POOL("sequence_tokens", read_u32, pool.sequence_tokens_max), .least = 1, .most = 1u << 30,
     .preset = "1048576",
     .help = "Tokens of the longest sequence; at most 262144 blocks, which is 4194304 tokens in "
             "blocks of 16."},
    {POOL("client_write", read_word, pool.client_write), .words = writers, .preset = "none",
     .help = "all: any tenant may map its slabs writable, to append K and V or to attend itself."},
    {POOL("cache", read_word, pool.cache), .words = caches, .preset = "on", .reloads = true,
     .help =
         "on: blocks that no sequence uses any more are found again by their tokens' ids, until "
         "room is needed; off: they are free at once.",
     .more = "Switched off while the daemon runs, what is cached is dropped."},
    {POOL("model", read_model, pool.model), .empty = "none",
     .help = "The namespace of sequences that name none: the model, and what else K and V depend "
             "on.",
     .more = "Without it such sequences get no token ids."},
};

#define COUNT(array) (sizeof array / sizeof *array)
_Static_assert(COUNT(daemon_keys) <= TS_CONFIG_KEYS_MAX, "given has a bit for each");
_Static_assert(COUNT(pool_keys) <= TS_CONFIG_KEYS_MAX, "given has a bit for each");

const ts_config_section ts_config_daemon = {"[daemon]", daemon_keys, COUNT(daemon_keys)};
const ts_config_section ts_config_pools = {"a [pool]", pool_keys, COUNT(pool_keys)};

const ts_config_key *ts_config_find_key(const ts_config_section *section, const char *name)
{
    for (uint32_t i = 0; i < section->num_keys; i++)
        if (strcmp(section->keys[i].name, name) == 0)
            return &section->keys[i];
    return NULL;
}

#define NAME_BYTES 32u /* longer than any key */

/* Letters to put in, leave out or change until one is the other; NAME_BYTES: one is too long. */
static uint32_t edits_between(const char *a, const char *b)
{
    const size_t a_bytes = strlen(a), b_bytes = strlen(b);
    uint32_t row[NAME_BYTES]; /* from what was read of `a` to each beginning of `b` */
    if (a_bytes >= NAME_BYTES || b_bytes >= NAME_BYTES)
        return NAME_BYTES;
    for (uint32_t i = 0; i <= b_bytes; i++)
        row[i] = i;
    for (uint32_t n = 1; n <= a_bytes; n++) {
        uint32_t before = row[0]++;
        for (uint32_t i = 1; i <= b_bytes; i++) {
            const uint32_t changed = before + (a[n - 1] != b[i - 1]);
            const uint32_t fewer = row[i] < row[i - 1] ? row[i] : row[i - 1];
            before = row[i];
            row[i] = changed <= fewer ? changed : fewer + 1;
        }
    }
    return row[b_bytes];
}

const ts_config_key *ts_config_nearest_key(const ts_config_section *section, const char *name)
{
    const ts_config_key *nearest = NULL;
    uint32_t least = (uint32_t)strlen(name) / 3 + 1;
    for (uint32_t i = 0; i < section->num_keys; i++) {
        const uint32_t edits = edits_between(name, section->keys[i].name);
        if (edits >= least)
            continue;
        least = edits;
        nearest = &section->keys[i];
    }
    return nearest;
}

void ts_config_preset(const ts_config_section *section, void *object)
{
    char why[200];
    for (uint32_t i = 0; i < section->num_keys; i++) {
        const ts_config_key *key = &section->keys[i];
        if (key->preset != NULL) /* it can be read: test_config.c reads each */
            (void)key->read(key, (char *)object + key->offset, key->preset, why, sizeof why);
    }
}

bool ts_config_key_differs(const ts_config_key *key, const void *a, const void *b)
{
    return memcmp((const char *)a + key->offset, (const char *)b + key->offset, key->bytes) != 0;
}

const char *ts_provider_name(ts_provider provider)
{
    return providers[provider];
}

ts_status ts_config_memory(const char *text, uint64_t *bytes, char *why, size_t why_bytes)
{
    char reason[128], shown[64];
    const ts_config_key *key = ts_config_find_key(&ts_config_pools, "memory");
    ts_status status = read_size(key, bytes, text, reason, sizeof reason);
    if (status != TS_OK)
        snprintf(why, why_bytes, "memory = %s: %s", ts_text_escape(text, shown, sizeof shown),
                 reason);
    return status;
}
