/*
 * Round trips through a daemon of its own, and through a bare NNG echo that answers with as many
 * bytes in the same way (contexts and callbacks), by the same number of client processes, by turns.
 */
#define _GNU_SOURCE
#include "tsbench.h"

#include "rpc.h"
#include "unconst.h"

#include <errno.h>
#include <nng/protocol/reqrep0/rep.h>
#include <nng/protocol/reqrep0/req.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define CALLS 4000u /* of all clients together, per turn */
#define TURNS 5
#define CLIENTS_MAX 16u
#define CONTEXTS 64

/* ---- the echo ---- */

typedef struct echo_slot {
    nng_ctx ctx;
    nng_aio *aio;
    bool sending;
    size_t reply_bytes;
} echo_slot;

static void echo_event(void *arg)
{
    echo_slot *s = arg;
    if (nng_aio_result(s->aio) != 0)
        exit(1);
    if (!s->sending) {
        nng_msg *m = nng_aio_get_msg(s->aio);
        nng_msg_free(m);
        if (nng_msg_alloc(&m, s->reply_bytes) != 0)
            exit(1);
        s->sending = true;
        nng_aio_set_msg(s->aio, m);
        nng_ctx_send(s->ctx, s->aio);
        return;
    }
    s->sending = false;
    nng_ctx_recv(s->ctx, s->aio);
}

int rpc_echo_server(int argc, char **argv)
{
    static echo_slot slots[CONTEXTS];
    nng_socket s;
    if (argc != 4)
        return 1;
    const char *url = argv[2];
    const size_t reply_bytes = strtoul(argv[3], NULL, 10);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (nng_rep0_open(&s) != 0 || nng_listen(s, url, NULL, 0) != 0)
        return 1;
    for (int i = 0; i < CONTEXTS; i++) {
        slots[i].reply_bytes = reply_bytes;
        if (nng_ctx_open(&slots[i].ctx, s) != 0 ||
            nng_aio_alloc(&slots[i].aio, echo_event, &slots[i]) != 0)
            return 1;
        nng_ctx_recv(slots[i].ctx, slots[i].aio);
    }
    for (;;)
        pause();
}

/* ---- a client process ---- */

/* rpc-client KIND URL BATCH CALLS RESULTS_FD INDEX REQUEST_BYTES: writes seconds of each call into
 * the shared array; reads a byte from stdin before it starts. */
static int client_run(const char *kind, const char *url, uint32_t batch, uint32_t calls,
                      double *results, size_t request_bytes)
{
    ts_client *c = NULL;
    ts_pool *pool = NULL;
    ts_seq *seqs = calloc(batch, sizeof *seqs);
    uint32_t *lengths = calloc(batch, sizeof *lengths);
    nng_socket s;
    nng_aio *aio = NULL;
    bool echo = strcmp(kind, "echo") == 0;
    if (seqs == NULL || lengths == NULL)
        /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the process ends */
        return 1;
    if (echo) {
        if (nng_req0_open(&s) != 0 || nng_aio_alloc(&aio, NULL, NULL) != 0 ||
            nng_dial(s, url, NULL, 0) != 0)
            return 1;
        nng_socket_set_ms(s, NNG_OPT_REQ_RESENDTIME, -1);
    } else if (ts_connect(&(ts_options){.size = sizeof(ts_options), .url = url + 6}, &c) != TS_OK ||
               ts_pool_open(c, "bench", 0, &pool) != TS_OK ||
               ts_seq_create(pool, batch, seqs) != TS_OK) {
        fprintf(stderr, "tsbench: %s\n", ts_error(c));
        return 1;
    }
    char go;
    if (write(STDOUT_FILENO, "r", 1) != 1 || read(STDIN_FILENO, &go, 1) != 1)
        return 1;
    for (uint32_t i = 0; i < calls; i++) {
        double t = bench_now();
        if (echo) {
            nng_msg *m;
            if (nng_msg_alloc(&m, request_bytes) != 0)
                return 1;
            nng_aio_set_msg(aio, m);
            nng_send_aio(s, aio);
            nng_aio_wait(aio);
            nng_recv_aio(s, aio);
            nng_aio_wait(aio);
            if (nng_aio_result(aio) != 0)
                return 1;
            nng_msg_free(nng_aio_get_msg(aio));
        } else if (ts_seq_lengths(pool, seqs, batch, lengths) != TS_OK || lengths[0] != 0) {
            return 1;
        }
        results[i] = bench_now() - t;
    }
    return 0; /* the process ends: nothing needs closing */
}

int rpc_client(int argc, char **argv)
{
    if (argc != 9)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    uint32_t calls = (uint32_t)strtoul(argv[5], NULL, 10);
    uint32_t index = (uint32_t)strtoul(argv[7], NULL, 10);
    double *results =
        mmap(NULL, CALLS * sizeof *results, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[6]), 0);
    if (results == MAP_FAILED)
        return 1;
    return client_run(argv[2], argv[3], (uint32_t)strtoul(argv[4], NULL, 10), calls,
                      results + (size_t)index * calls, strtoul(argv[8], NULL, 10));
}

/* ---- the benchmark ---- */

typedef struct turn {
    double p50, p99, rate;
} turn;

static bool run_turn(const char *kind, const char *url, uint32_t clients, uint32_t batch,
                     size_t request_bytes, int results_fd, double *results, turn *out)
{
    char numbers[CLIENTS_MAX][5][24];
    char *argvs[CLIENTS_MAX][10];
    uint32_t calls = CALLS / clients;
    for (uint32_t i = 0; i < clients; i++) {
        snprintf(numbers[i][0], sizeof numbers[i][0], "%u", batch);
        snprintf(numbers[i][1], sizeof numbers[i][1], "%u", calls);
        snprintf(numbers[i][2], sizeof numbers[i][2], "%d", results_fd);
        snprintf(numbers[i][3], sizeof numbers[i][3], "%u", i);
        snprintf(numbers[i][4], sizeof numbers[i][4], "%zu", request_bytes);
        char *argv[] = {"/proc/self/exe", "rpc-client",  ts_unconst(kind), ts_unconst(url),
                        numbers[i][0],    numbers[i][1], numbers[i][2],    numbers[i][3],
                        numbers[i][4],    NULL};
        memcpy(argvs[i], argv, sizeof argv);
    }
    double t = bench_together(clients, argvs[0], 10);
    if (t < 0)
        return false;
    uint32_t n = calls * clients;
    double *sorted = malloc(n * sizeof *sorted);
    if (sorted == NULL)
        return false;
    memcpy(sorted, results, n * sizeof *sorted);
    out->p50 = bench_percentile(sorted, n, 50);
    out->p99 = bench_percentile(sorted, n, 99);
    out->rate = n / t;
    free(sorted);
    return true;
}

/* Bytes of a request and a reply of ts_seq_lengths for `batch` sequences. */
static void message_sizes(uint32_t batch, size_t *request_bytes, size_t *reply_bytes)
{
    Tspb__SeqLengths body = TSPB__SEQ_LENGTHS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Lengths lengths = TSPB__LENGTHS__INIT;
    Tspb__Reply reply = TSPB__REPLY__INIT;
    body.seqs = calloc(batch, sizeof *body.seqs);
    lengths.lengths = calloc(batch, sizeof *lengths.lengths);
    body.n_seqs = lengths.n_lengths = batch;
    request.request_id = reply.request_id = 100;
    request.body_case = TSPB__REQUEST__BODY_SEQ_LENGTHS;
    request.seq_lengths = &body;
    reply.body_case = TSPB__REPLY__BODY_LENGTHS;
    reply.lengths = &lengths;
    *request_bytes = tspb__request__get_packed_size(&request);
    *reply_bytes = tspb__reply__get_packed_size(&reply);
    free(body.seqs);
    free(lengths.lengths);
}

static double median(turn *turns, size_t offset)
{
    double values[TURNS];
    for (int i = 0; i < TURNS; i++)
        memcpy(&values[i], (char *)&turns[i] + offset, sizeof(double));
    return bench_percentile(values, TURNS, 50);
}

static bool measure(const bench_options *o, const char *folder, uint32_t clients, uint32_t batch,
                    int results_fd, double *results, json_t *rows)
{
    turn echo[TURNS], ours[TURNS];
    size_t request_bytes, reply_bytes;
    char echo_url[128], daemon_url[128], number[24];
    message_sizes(batch, &request_bytes, &reply_bytes);
    snprintf(echo_url, sizeof echo_url, "ipc://%s/echo", folder);
    snprintf(daemon_url, sizeof daemon_url, "ipc://%s/daemon", folder);
    snprintf(number, sizeof number, "%zu", reply_bytes);
    char *argv[] = {"/proc/self/exe", "rpc-echo", echo_url, number, NULL};
    pid_t server = bench_start(argv, -1, -1);
    while (access(echo_url + 6, F_OK) != 0 && waitpid(server, NULL, WNOHANG) == 0)
        usleep(1000);
    bool ok = server > 0;
    for (int i = 0; ok && i < TURNS; i++)
        ok = run_turn("echo", echo_url, clients, batch, request_bytes, results_fd, results,
                      &echo[i]) &&
             run_turn("daemon", daemon_url, clients, batch, request_bytes, results_fd, results,
                      &ours[i]);
    bench_end(server, SIGKILL);
    unlink(echo_url + 6);
    if (!ok)
        return false;
    double e50 = median(echo, offsetof(turn, p50)), d50 = median(ours, offsetof(turn, p50));
    double e99 = median(echo, offsetof(turn, p99)), d99 = median(ours, offsetof(turn, p99));
    double er = median(echo, offsetof(turn, rate)), dr = median(ours, offsetof(turn, rate));
    if (!o->json)
        printf("%7u %7zu %7zu %9.0f %7.0f %8.0f %9.0f %7.0f %8.0f %6.2f\n", clients, request_bytes,
               reply_bytes, e50 * 1e6, e99 * 1e6, er, d50 * 1e6, d99 * 1e6, dr, d50 / e50);
    json_array_append_new(rows, json_pack("{s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f}",
                                          "clients", clients, "request_bytes", (int)request_bytes,
                                          "reply_bytes", (int)reply_bytes, "echo_p50_us", e50 * 1e6,
                                          "echo_p99_us", e99 * 1e6, "echo_per_s", er,
                                          "daemon_p50_us", d50 * 1e6, "daemon_p99_us", d99 * 1e6,
                                          "daemon_per_s", dr, "p50_ratio", d50 / e50));
    return true;
}

int bench_rpc(const bench_options *o, json_t *rows)
{
    static const uint32_t clients[] = {1, 2, 4, 8, 16}, batches[] = {1, 1024};
    char folder[] = "/tmp/tsbench.XXXXXX", socket[64];
    if (mkdtemp(folder) == NULL) {
        perror("tsbench");
        return 1;
    }
    snprintf(socket, sizeof socket, "%s/daemon", folder);
    int fd = memfd_create("tsbench", 0);
    double *results = MAP_FAILED;
    if (fd >= 0 && ftruncate(fd, CALLS * sizeof *results) == 0)
        results = mmap(NULL, CALLS * sizeof *results, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    pid_t daemon = bench_daemon(o, socket, "bench:layers=1,kv_heads=1,head_dim=64,memory=1M", NULL);
    bool ok = results != MAP_FAILED && daemon > 0;
    if (!o->json)
        printf("round trips, medians of %d turns of %u calls; µs\n%7s %7s %7s %9s %7s %8s %9s %7s "
               "%8s %6s\n",
               TURNS, CALLS, "clients", "request", "reply", "echo p50", "p99", "/s", "daemon p50",
               "p99", "/s", "ratio");
    for (size_t b = 0; b < 2; b++)
        for (size_t i = 0; ok && i < sizeof clients / sizeof *clients; i++)
            ok = measure(o, folder, clients[i], batches[b], fd, results, rows);
    bench_end(daemon, SIGTERM);
    rmdir(folder);
    if (!ok)
        fprintf(stderr, "tsbench: a process failed: the figures are not complete\n");
    return ok ? 0 : 1;
}
