/*
 * Fuzz target: what clients send to the handle socket (proto/handle_wire.h), and what they do to
 * the memory that it gives them. An input is a list of a client's actions, at a few connections to
 * the real socket: requests with fields of its choice, any bytes, descriptors that nobody wants,
 * answers left unread, connections ended, memory filled, sealed or left empty. After each input no
 * descriptor of it is left, and the engine's books agree.
 */
#define _GNU_SOURCE
#include "fd_server.h"
#include "fuzz_input.h"
#include "fuzz_service.h"
#include "ring_server.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CONNECTIONS 3
#define ACTIONS_MAX 60
#define TURNS_MAX 100000

static struct sockaddr_un address = {.sun_family = AF_UNIX};
static char folder[] = "/tmp/fuzz_handles.XXXXXX";

typedef struct client {
    uint32_t pipe;
    uint64_t session;
    uint8_t token[TS_TOKEN_BYTES];
    int sockets[CONNECTIONS]; /* -1: not connected */
    int memory;               /* the last descriptor that came with an answer; -1: none */
    uint64_t memory_bytes;
} client;

/* ---- connections ---- */

static int open_socket(void)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
        abort();
    return fd;
}

static void close_socket(client *c, uint32_t which)
{
    if (c->sockets[which] >= 0)
        close(c->sockets[which]);
    c->sockets[which] = -1;
}

static void forget_memory(client *c)
{
    if (c->memory >= 0)
        close(c->memory);
    c->memory = -1;
}

/* Sends the bytes, with a descriptor if there is one. A daemon that has ended the connection may
 * do that. */
static void send_bytes(client *c, uint32_t which, const void *bytes, size_t size, int passed)
{
    struct iovec data = {.iov_base = (void *)bytes, .iov_len = size};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (passed >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        control.header = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &passed, sizeof passed);
    }
    if (c->sockets[which] < 0)
        c->sockets[which] = open_socket();
    if (sendmsg(c->sockets[which], &message, MSG_NOSIGNAL) < 0)
        close_socket(c, which);
}

/* Waits for an answer or the connection's end, and keeps the descriptor that comes along. */
static void receive(client *c, uint32_t which)
{
    ts_handle_reply reply = {0};
    struct iovec data = {.iov_base = &reply, .iov_len = sizeof reply};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr message = {.msg_iov = &data,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    ssize_t got = recvmsg(c->sockets[which], &message, MSG_CMSG_CLOEXEC);
    if (got <= 0) {
        close_socket(c, which);
        return;
    }
    if (got != sizeof reply || reply.magic != TS_HANDLE_MAGIC ||
        memchr(reply.message, '\0', sizeof reply.message) == NULL)
        abort();
    if (message.msg_controllen == 0)
        return;
    forget_memory(c);
    memcpy(&c->memory, CMSG_DATA(&control.header), sizeof c->memory);
    c->memory_bytes = reply.bytes;
}

/* ---- actions ---- */

static void ask(client *c, fuzz_input *in)
{
    ts_handle_request r = {.magic = TS_HANDLE_MAGIC, .protocol = TS_PROTOCOL, .tag = 1};
    uint32_t which = fuzz_take(in, 1) % CONNECTIONS, odd = fuzz_take(in, 1);
    r.session = c->session;
    memcpy(r.token, c->token, sizeof r.token);
    r.kind = fuzz_take(in, 1) % 9;
    r.slab = fuzz_number(in);
    r.writable = odd & 1;
    r.bytes = r.kind == TS_HANDLE_NEW_RINGS ? ts_rings_bytes(fuzz_number(in), fuzz_number(in), 0)
                                            : fuzz_number(in) * 4096ull;
    if (odd == 255)
        r.magic = fuzz_number(in);
    else if (odd == 254)
        r.protocol = fuzz_number(in);
    else if (odd == 253)
        r.session ^= fuzz_number(in);
    else if (odd == 252)
        r.token[0] ^= 1;
    else if (odd == 251)
        r.pool = fuzz_number(in);
    else if (odd == 250)
        r.bytes = (uint64_t)fuzz_take(in, 4) << 32 | fuzz_take(in, 4);
    else if (odd == 249)
        memset(r.version, 'x', sizeof r.version);
    send_bytes(c, which, &r, sizeof r, odd == 248 ? c->memory : -1);
    if (odd < 240 && c->sockets[which] >= 0)
        receive(c, which);
}

static void send_any(client *c, fuzz_input *in)
{
    uint8_t bytes[256] = {0};
    uint32_t magic = TS_HANDLE_MAGIC, which = fuzz_take(in, 1) % CONNECTIONS;
    size_t size = fuzz_take(in, 1), some = size;
    const uint8_t *what = fuzz_bytes(in, &some);
    memcpy(bytes, what, some);
    if (size % 2 == 1)
        memcpy(bytes, &magic, sizeof magic);
    send_bytes(c, which, bytes, size, -1);
}

/* What a client does to the memory that it is to fill; the daemon's seals refuse some of it. */
static void fill(client *c, fuzz_input *in)
{
    uint32_t odd = fuzz_take(in, 1);
    if (c->memory < 0)
        return;
    if (odd >= 16) {
        const uint32_t head[] = {TS_RING_MAGIC, TS_PROTOCOL, fuzz_number(in), fuzz_number(in)};
        (void)fallocate(c->memory, 0, 0, (off_t)(c->memory_bytes < 8 << 20 ? c->memory_bytes : 0));
        (void)!pwrite(c->memory, head, sizeof head, 0);
    } else if (odd >= 12)
        (void)fallocate(c->memory, 0, 0, 4096);
    else if (odd >= 8)
        (void)fcntl(c->memory, F_ADD_SEALS, 1 << fuzz_take(in, 1) % 5);
    else if (odd >= 4)
        (void)!ftruncate(c->memory, (off_t)fuzz_number(in) * 4096);
    else
        (void)fallocate(c->memory, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096);
}

static void act(client *c, fuzz_input *in)
{
    uint32_t action = fuzz_take(in, 1) % 16;
    if (action == 0)
        close_socket(c, fuzz_take(in, 1) % CONNECTIONS);
    else if (action == 1)
        send_any(c, in);
    else if (action < 6)
        fill(c, in);
    else
        ask(c, in);
}

/* ---- one input ---- */

static void learn_session(void *arg)
{
    client *c = arg;
    const ts_connection *connection = ts_service_connection(&fuzz_service, c->pipe);
    c->session = connection->session;
    memcpy(c->token, connection->token, sizeof c->token);
}

/* Has the tenant own slabs, so that there are some to ask for. */
static void grow(client *c)
{
    uint64_t seqs[2];
    uint32_t tokens[2] = {20, 20};
    Tspb__StepBegin begin = TSPB__STEP_BEGIN__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    fuzz_create(c->pipe, 2, seqs);
    begin.seqs = seqs;
    begin.new_tokens = tokens;
    begin.n_seqs = begin.n_new_tokens = 2;
    begin.heads = 2;
    r.request_id = 1;
    r.body_case = TSPB__REQUEST__BODY_STEP_BEGIN;
    r.step_begin = &begin;
    tspb__reply__free_unpacked(fuzz_call(c->pipe, &r), NULL);
}

/* Open descriptors, but for those of the pool's slabs, of which there is at most one for each;
 * `tell` has them named. */
static uint32_t count_descriptors(bool tell)
{
    static const char slab[] = "/memfd:tinyserve-slab";
    uint32_t slabs = 0, others = 0;
    DIR *all = opendir("/proc/self/fd");
    if (all == NULL)
        abort();
    for (const struct dirent *entry; (entry = readdir(all)) != NULL;) {
        char target[64] = "";
        (void)!readlinkat(dirfd(all), entry->d_name, target, sizeof target - 1);
        if (strncmp(target, slab, strlen(slab)) == 0)
            slabs++;
        else
            others++;
        if (tell)
            fprintf(stderr, "%s: %s\n", entry->d_name, target);
    }
    closedir(all);
    if (slabs > fuzz_service.exec.engine->pools[0].books.num_slabs)
        others += slabs;
    return others;
}

/* Waits until no more than `idle` descriptors are open: the server's thread has yet to see the ends
 * of connections, and perhaps their beginnings. */
static void await_idle(uint32_t idle)
{
    for (uint32_t turns = 0; count_descriptors(false) != idle; turns++) {
        if (turns == TURNS_MAX) {
            fprintf(stderr, "%u descriptors, and not %u\n", count_descriptors(true), idle);
            abort();
        }
        sched_yield();
    }
}

static void remove_folder(void)
{
    (void)unlink(address.sun_path);
    (void)rmdir(folder);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    char why[256];
    ts_fd_server *server;
    fuzz_service_start();
    if (mkdtemp(folder) == NULL || ts_rings_new(&fuzz_service, 0, 0) == NULL)
        abort();
    snprintf(address.sun_path, sizeof address.sun_path, "%s/s", folder);
    atexit(remove_folder);
    const ts_fd_server_options options = {.path = address.sun_path,
                                          .mode = 0600,
                                          .connections_max = 1024,
                                          .tenant_connections_max = 1024,
                                          .idle_ms = 3600000};
    if (ts_fd_server_start(&fuzz_service, &options, &server, why, sizeof why) != TS_OK) {
        fprintf(stderr, "%s\n", why);
        abort();
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {.at = data, .end = data + size};
    static uint32_t idle; /* descriptors that are open while there is no connection */
    if (idle == 0)
        idle = count_descriptors(false);
    bool writable = fuzz_take(&in, 1) & 1;
    client c = {.memory = -1, .sockets = {-1, -1, -1}};
    c.pipe = fuzz_connect(getuid(), writable);
    fuzz_as_owner(learn_session, &c);
    grow(&c);
    for (uint32_t i = 0; in.at < in.end && i < ACTIONS_MAX; i++)
        act(&c, &in);
    for (uint32_t i = 0; i < CONNECTIONS; i++)
        close_socket(&c, i);
    forget_memory(&c);
    fuzz_disconnect(c.pipe);
    await_idle(idle);
    fuzz_check_books();
    return 0;
}
