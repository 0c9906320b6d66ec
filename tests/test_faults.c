/* What comes from outside and must not matter: garbage, repeats, floods, and workers that die. */
#define _GNU_SOURCE
#include "raw_client.h"

#include "attention.h"
#include "fd_client.h"

#include <fcntl.h>
#include <math.h>
#include <nng/protocol/reqrep0/rep.h>
#include <nng/protocol/reqrep0/req.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

/* ---- messages by hand ---- */

static nng_socket raw_open(const daemon_process *d)
{
    nng_socket s;
    char url[128];
    snprintf(url, sizeof url, "ipc://%s", d->url);
    assert_int_equal(nng_req0_open(&s), 0);
    nng_socket_set_ms(s, NNG_OPT_REQ_RESENDTIME, -1);
    nng_socket_set_ms(s, NNG_OPT_RECVTIMEO, 120000);
    assert_int_equal(nng_dial(s, url, NULL, 0), 0);
    return s;
}

static Tspb__Reply *raw_receive(nng_socket s)
{
    nng_msg *m;
    assert_int_equal(nng_recvmsg(s, &m, 0), 0);
    Tspb__Reply *reply = tspb__reply__unpack(NULL, nng_msg_len(m), nng_msg_body(m));
    assert_non_null(reply);
    nng_msg_free(m);
    return reply;
}

static void raw_send(nng_socket s, const void *bytes, size_t size)
{
    nng_msg *m;
    assert_int_equal(nng_msg_alloc(&m, size), 0);
    if (size > 0)
        memcpy(nng_msg_body(m), bytes, size);
    assert_int_equal(nng_sendmsg(s, m, 0), 0);
}

static size_t pack(const Tspb__Request *request, unsigned char *buffer, size_t size)
{
    assert_true(tspb__request__get_packed_size(request) <= size);
    return tspb__request__pack(request, buffer);
}

static Tspb__Reply *raw_call(nng_socket s, const Tspb__Request *request)
{
    unsigned char buffer[4096];
    raw_send(s, buffer, pack(request, buffer, sizeof buffer));
    return raw_receive(s);
}

/* The packed requests that open a session and a pool, as ids 1 and 2. */
static void raw_session(nng_socket s)
{
    Tspb__SessionOpen open = TSPB__SESSION_OPEN__INIT;
    Tspb__PoolOpen pool = TSPB__POOL_OPEN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    open.protocol = TS_PROTOCOL;
    open.program = (char *)"raw";
    request.request_id = 1;
    request.body_case = TSPB__REQUEST__BODY_SESSION_OPEN;
    request.session_open = &open;
    Tspb__Reply *reply = raw_call(s, &request);
    assert_int_equal(reply->status, TS_OK);
    tspb__reply__free_unpacked(reply, NULL);
    pool.name = (char *)"tiny";
    request.request_id = 2;
    request.body_case = TSPB__REQUEST__BODY_POOL_OPEN;
    request.pool_open = &pool;
    reply = raw_call(s, &request);
    assert_int_equal(reply->status, TS_OK);
    tspb__reply__free_unpacked(reply, NULL);
}

static Tspb__Request create_request(Tspb__SeqCreate *create, uint64_t id)
{
    Tspb__Request request = TSPB__REQUEST__INIT;
    tspb__seq_create__init(create);
    create->count = 1;
    request.request_id = id;
    request.body_case = TSPB__REQUEST__BODY_SEQ_CREATE;
    request.seq_create = create;
    return request;
}

static uint64_t sequences(ts_client *c)
{
    Tspb__Reply *reply = pool_stats(c);
    uint64_t n = reply->pool_stats_reply->pool->sequences;
    tspb__reply__free_unpacked(reply, NULL);
    return n;
}

static void a_repeated_request_gets_the_first_answer_and_is_applied_once(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *c = connect_to(&d);
    nng_socket s = raw_open(&d);
    Tspb__SeqCreate create;
    raw_session(s);
    Tspb__Request request = create_request(&create, 3);
    Tspb__Reply *first = raw_call(s, &request), *again = raw_call(s, &request);
    assert_int_equal(first->status, TS_OK);
    assert_int_equal(again->status, TS_OK);
    assert_true(first->seqs->seqs[0] == again->seqs->seqs[0]);
    assert_int_equal(sequences(c), 1);
    tspb__reply__free_unpacked(first, NULL);
    tspb__reply__free_unpacked(again, NULL);

    /* The first answer is lost: a new request on the socket makes NNG drop what comes for the old.
     */
    unsigned char buffer[256];
    request = create_request(&create, 4);
    size_t size = pack(&request, buffer, sizeof buffer);
    raw_send(s, buffer, size);
    raw_send(s, buffer, size);
    again = raw_receive(s);
    assert_int_equal(again->status, TS_OK);
    assert_int_equal(sequences(c), 2);
    tspb__reply__free_unpacked(again, NULL);

    /* A refusal is repeated too, though it would succeed by now. */
    Tspb__SeqAttach attach = TSPB__SEQ_ATTACH__INIT;
    Tspb__Request find = TSPB__REQUEST__INIT;
    attach.name = (char *)"later";
    find.request_id = 5;
    find.body_case = TSPB__REQUEST__BODY_SEQ_ATTACH;
    find.seq_attach = &attach;
    again = raw_call(s, &find);
    assert_int_equal(again->status, TS_ENOENT);
    tspb__reply__free_unpacked(again, NULL);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_keep(p, seq, "later"));
    again = raw_call(s, &find);
    assert_int_equal(again->status, TS_ENOENT);
    tspb__reply__free_unpacked(again, NULL);

    /* Long after, the answer is gone: it must not be applied again. */
    for (uint64_t id = 6; id < 6 + 64; id++) {
        request = create_request(&create, id);
        again = raw_call(s, &request);
        assert_int_equal(again->status, TS_OK);
        tspb__reply__free_unpacked(again, NULL);
    }
    uint64_t before = sequences(c);
    request = create_request(&create, 4);
    again = raw_call(s, &request);
    assert_int_equal(again->status, TS_ESTALE);
    assert_int_equal(sequences(c), before);
    tspb__reply__free_unpacked(again, NULL);
    nng_close(s);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void garbage_is_answered_with_a_refusal(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *c = connect_to(&d);
    nng_socket s = raw_open(&d);
    rng r = {99};
    unsigned char bytes[512], whole[256];
    Tspb__SeqCreate create;
    Tspb__Request request = create_request(&create, 1);
    Tspb__Reply *reply = raw_call(s, &request); /* no session yet */
    assert_int_equal(reply->status, TS_ENOENT);
    tspb__reply__free_unpacked(reply, NULL);
    request.request_id = 0;
    reply = raw_call(s, &request);
    assert_int_equal(reply->status, TS_EPROTO);
    assert_string_equal(reply->message, "request_id is 0; ids count from 1");
    tspb__reply__free_unpacked(reply, NULL);
    raw_send(s, "", 0);
    reply = raw_receive(s);
    assert_int_equal(reply->status, TS_EPROTO);
    tspb__reply__free_unpacked(reply, NULL);
    Tspb__SessionOpen open = TSPB__SESSION_OPEN__INIT;
    Tspb__Request old = TSPB__REQUEST__INIT;
    open.protocol = 77;
    old.request_id = 9;
    old.body_case = TSPB__REQUEST__BODY_SESSION_OPEN;
    old.session_open = &open;
    reply = raw_call(s, &old);
    assert_int_equal(reply->status, TS_EPROTO);
    assert_string_equal(
        reply->message,
        "protocol version 77 of libtinyserve (an earlier one); tinyserved " TS_VERSION " "
        "speaks 4: the older of them must be upgraded, and then started again");
    tspb__reply__free_unpacked(reply, NULL);
    open.version = (char *)"9.9\033";
    old.request_id = 10;
    reply = raw_call(s, &old);
    assert_non_null(
        strstr(reply->message, "of libtinyserve 9.9\\x1b; tinyserved " TS_VERSION " speaks"));
    tspb__reply__free_unpacked(reply, NULL);
    nng_close(s);

    s = raw_open(&d);
    raw_session(s);
    uint64_t live = sequences(c);
    for (int i = 0; i < 3000; i++) {
        size_t size = rng_below(&r, sizeof bytes);
        for (size_t j = 0; j < size; j++)
            bytes[j] = (unsigned char)rng_next(&r);
        raw_send(s, bytes, size);
        reply = raw_receive(s); /* whatever it says, it is an answer */
        tspb__reply__free_unpacked(reply, NULL);
    }
    request = create_request(&create, 1u << 20);
    size_t size = pack(&request, whole, sizeof whole);
    for (size_t cut = 0; cut < size; cut++) { /* every truncation of a good request */
        raw_send(s, whole, cut);
        reply = raw_receive(s);
        assert_true(cut == 0 || reply->status != TS_OK || sequences(c) == live);
        tspb__reply__free_unpacked(reply, NULL);
    }
    /* Half a million unknown fields of two bytes: 56 times as much memory, were they kept. */
    static unsigned char swollen[1000000];
    for (size_t i = 0; i < sizeof swollen; i += 2) {
        swollen[i] = 0x78; /* field 15 */
        swollen[i + 1] = 1;
    }
    raw_send(s, swollen, sizeof swollen);
    reply = raw_receive(s);
    assert_int_equal(reply->status, TS_EPROTO);
    tspb__reply__free_unpacked(reply, NULL);
    /* The largest good batch goes through. */
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq *batch = malloc(65536 * sizeof *batch);
    uint32_t *zeros = calloc(65536, sizeof *zeros);
    OK(ts_seq_create(p, 65536, batch));
    OK(ts_seq_truncate(p, batch, zeros, 65536));
    OK(ts_seq_free(p, batch, 65536));
    free(batch);
    free(zeros);
    ts_pool_close(p);
    check_daemon(c);
    nng_close(s);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* ---- descriptors ---- */

static void the_handle_socket_gives_nothing_without_a_token(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *c = connect_to(&d);
    ts_handle_reply reply;
    int fd;
    assert_int_equal(ts_handle_get(c, TS_HANDLE_EXCHANGE, 0, 0, true, &reply, &fd), TS_ENOENT);
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 0, 0, false, &reply, &fd), TS_ENOENT);
    ts_pool *p = open_pool(c, "tiny", 0);
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 0, 0, false, &reply, &fd), TS_EPERM);
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 0, 4000000000u, false, &reply, &fd),
                     TS_EPERM);
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 9, 0, false, &reply, &fd), TS_ENOENT);
    assert_int_equal(ts_handle_get(c, (enum ts_handle_kind)55, 0, 0, false, &reply, &fd),
                     TS_ENOENT);
    ts_seq seq;
    ts_step *step;
    uint32_t n = 1;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    OK(ts_handle_get(c, TS_HANDLE_SLAB, 0, 0, false, &reply, &fd));
    assert_int_equal(close(fd), 0);
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 0, 0, true, &reply, &fd), TS_EPERM);
    c->token[0] ^= 1;
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 0, 0, false, &reply, &fd), TS_EPERM);
    c->token[0] ^= 1;
    c->session ^= 1ull << 32;
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 0, 0, false, &reply, &fd), TS_EPERM);
    c->session ^= 1ull << 32;
    /* Requests of a wrong size end their connection. */
    int raw = raw_handles(&d);
    assert_int_equal(send(raw, "hello", 5, 0), 5);
    char end;
    assert_int_equal(recv(raw, &end, 1, 0), 0);
    close(raw);
    OK(ts_step_abort(step));
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* What a client may do with the memory that it is to fill. */
typedef struct filling {
    size_t bytes;
    bool allocate;
    int seals;
    uint32_t head[4]; /* magic, version, max_blocks, max_slabs of rings */
} filling;

/* Fills memory of the daemon's, and hands it over; its descriptor. */
static int fill_memory(ts_client *c, bool rings, const filling *f, ts_status status,
                       const char *why)
{
    ts_handle_reply reply;
    int fd, bell;
    OK(ts_handle_new(c, rings ? TS_HANDLE_NEW_RINGS : TS_HANDLE_NEW_EXCHANGE, f->bytes, &fd));
    if (f->allocate)
        assert_int_equal(fallocate(fd, 0, 0, (off_t)f->bytes), 0);
    assert_int_equal(pwrite(fd, f->head, sizeof f->head, 0), sizeof f->head);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, f->seals), 0);
    assert_int_equal(rings ? ts_handle_get(c, TS_HANDLE_DOORBELL, 0, 0, true, &reply, &bell)
                           : ts_handle_tell(c, TS_HANDLE_TAKE_EXCHANGE),
                     status);
    if (status != TS_OK && strstr(ts_error(c), why) == NULL)
        fail_msg("'%s' is not in '%s'", why, ts_error(c));
    if (status == TS_OK && rings)
        close(bell);
    return fd;
}

static void an_exchange_and_rings_are_memory_that_the_client_has_allocated(void **state)
{
    (void)state;
    const size_t bytes = ts_rings_bytes(16, 1);
    const uint32_t version = TS_RING_VERSION, magic = TS_RING_MAGIC;
    daemon_process d;
    daemon_start_with(&d, POOL_TINY ",blocks=16",
                      (const char *const[]){"--set", "exchange_max=1M", NULL});
    ts_client *c = connect_to(&d);
    const struct {
        filling filling;
        ts_status status;
        const char *why;
    } bad[] = {
        {{bytes, false, 0, {magic, version, 16, 1}}, TS_EINVAL, " are there: the client must "},
        {{bytes, true, F_SEAL_SEAL, {magic, version, 16, 1}}, TS_EINVAL, "can't be sealed"},
        {{bytes, true, F_SEAL_WRITE, {magic, version, 16, 1}}, TS_EINVAL, "not permitted"},
        {{bytes, true, F_SEAL_FUTURE_WRITE, {magic, version, 16, 1}}, TS_EINVAL, "not permitted"},
        /* of rings alone */
        {{bytes, true, 0, {magic, version + 1, 16, 1}}, TS_EPROTO, "rings of version "},
        {{bytes, true, 0, {magic + 1, version, 16, 1}}, TS_EPROTO, "rings of version "},
        {{bytes, true, 0, {magic, version, TS_RING_BLOCKS + 1, 1}}, TS_EINVAL, "1048577 blocks"},
        {{bytes, true, 0, {magic, version, 16, UINT32_MAX}}, TS_EINVAL, "4294967295 slabs"},
        {{bytes, true, 0, {magic, version, 16 + 1024, 1}}, TS_EINVAL, "room for 1040 blocks"},
    };
    const filling good = {bytes, true, 0, {magic, version, 16, 1}};
    const filling less = {4096, true, 0, {0}};
    int fd;
    assert_int_equal(ts_handle_new(c, TS_HANDLE_NEW_EXCHANGE, 0, &fd), TS_EINVAL);
    assert_int_equal(ts_handle_new(c, TS_HANDLE_NEW_EXCHANGE, 5000, &fd), TS_EINVAL);
    assert_int_equal(ts_handle_new(c, TS_HANDLE_NEW_EXCHANGE, 2 << 20, &fd), TS_EINVAL);
    assert_string_equal(ts_error(c), "an exchange of 2097152 bytes; it must be a multiple of "
                                     "4096, 4096 to 1048576");
    assert_int_equal(ts_handle_new(c, TS_HANDLE_NEW_RINGS, 4096, &fd), TS_EINVAL);
    assert_int_equal(ts_handle_new(c, TS_HANDLE_NEW_RINGS, (uint64_t)1 << 40, &fd), TS_EINVAL);
    for (int rings = 0; rings < 2; rings++) {
        for (size_t i = 0; i < (rings ? sizeof bad / sizeof *bad : 4); i++)
            close(fill_memory(c, rings, &bad[i].filling, bad[i].status, bad[i].why));
        for (int again = 0; again < 2; again++) { /* the second in place of the first */
            fd = fill_memory(c, rings, &good, TS_OK, NULL);
            /* From then on nobody can take its pages away. */
            assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096),
                             -1);
            assert_int_equal(errno, EPERM);
            assert_int_equal(ftruncate(fd, 0), -1);
            assert_int_equal(ftruncate(fd, (off_t)bytes + 4096), -1);
            close(fd);
        }
    }
    assert_int_equal(ts_handle_tell(c, TS_HANDLE_TAKE_EXCHANGE), TS_EINVAL);
    assert_string_equal(ts_error(c), "the session has asked for no memory for the exchange");
    close(fill_memory(c, false, &less, TS_EINVAL, "would replace one of "));
    ts_disconnect(c);
    daemon_stop(&d);
}

/* ---- workers that die ---- */

enum { KV = 2, HEADS = 4, DIM = 64, LAYERS = 6, ROUND = 90 };

static void fill(rng *r, float *to, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = rng_normal(r);
}

/* Worker: decodes with a cache of its own beside the daemon's, until `stop` is at its end; every
 * output must equal what the same kernels make of the private cache, bit for bit. */
static void steady(const char *url, int stop)
{
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_geometry g = *ts_pool_geometry(p);
    ts_attention *own = ts_attention_new(1, TS_ISA_AUTO);
    unsigned char *cache = malloc(ts_geometry_block_bytes(&g) * ((ROUND + 15) / 16));
    float *out = malloc(HEADS * DIM * sizeof *out);
    uint32_t blocks[(ROUND + 15) / 16];
    for (uint32_t i = 0; i < (ROUND + 15) / 16; i++)
        blocks[i] = i;
    rng r = {(uint64_t)getpid()};
    struct pollfd end = {.fd = stop, .events = POLLIN};
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    for (uint32_t token = 0; poll(&end, 1, 0) == 0; token = (token + 1) % ROUND) {
        ts_step *step;
        uint32_t n = 1, zero = 0;
        if (token == 0)
            OK(ts_seq_truncate(p, &seq, &zero, 1));
        OK(ts_step_begin(p, &seq, &n, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS},
                         &step));
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            fill(&r, ts_step_q(step), HEADS * DIM);
            fill(&r, ts_step_k(step), KV * DIM);
            fill(&r, ts_step_v(step), KV * DIM);
            OK(ts_step_run(step, layer));
            ts_attention_seq one = {.blocks = blocks,
                                    .kv_tokens = token + 1,
                                    .q_tokens = 1,
                                    .layer = layer,
                                    .q = ts_step_q(step),
                                    .k = ts_step_k(step),
                                    .v = ts_step_v(step),
                                    .out = out};
            ts_attention_call call = {.geometry = g,
                                      .base = cache,
                                      .heads = HEADS,
                                      .variant.scale = 0.125f,
                                      .seqs = &one,
                                      .num_seqs = 1};
            OK(ts_attention_run(own, &call));
            const float *there = ts_step_out(step);
            if (strcmp(ts_pool_memory(p), "host") == 0)
                assert_memory_equal(out, there, HEADS * DIM * sizeof *out);
            else /* other kernels: other roundings */
                for (uint32_t j = 0; j < HEADS * DIM; j++)
                    assert_true(fabsf(out[j] - there[j]) <= 1e-5f);
        }
        OK(ts_step_commit(step, NULL));
    }
    ts_attention_free(own);
    free(cache);
    free(out);
    ts_pool_close(p);
    ts_disconnect(c);
}

/* Worker: does all that can be done, until it is killed. */
static void victim(const char *url, int ready)
{
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    rng r = {(uint64_t)getpid()};
    ts_seq kept, forks[3];
    uint64_t slot;
    ts_kv kv;
    bool told = false;
    OK(ts_seq_attach(p, "shared", &kept, NULL));
    for (;;) {
        ts_step *step;
        OK(ts_seq_fork(p, kept, 3, forks));
        uint32_t n[4] = {1 + rng_below(&r, 40), 1 + rng_below(&r, 9), 1, 5};
        bool with_kept = rng_below(&r, 2); /* a step on what must stay as it is */
        ts_seq batch[4] = {forks[0], forks[1], forks[2], kept};
        if (!told && write(ready, "r", 1) != 1)
            _exit(1);
        told = true;
        ts_status status = ts_step_begin(
            p, batch, n, with_kept ? 4 : 3,
            &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &step);
        if (status != TS_OK) { /* another victim has the kept one in a step */
            assert_int_equal(status, TS_EBUSY);
            OK(ts_seq_free(p, forks, 3));
            continue;
        }
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            OK(ts_step_run(step, layer));
        OK(with_kept ? ts_step_abort(step) : ts_step_commit(step, NULL));
        OK(ts_seq_slots(p, forks[0], 0, 1, &slot));
        OK(ts_slot_kv(p, slot, 0, &kv));
        OK(ts_seq_free(p, forks, 3));
    }
}

static void workers_killed_at_random_points_take_nothing_with_them(void **state)
{
    (void)state;
    const int kills = 200;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=128");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    rng r = {4242};
    int stop[2], ready[2];
    assert_int_equal(pipe(stop), 0);
    assert_int_equal(pipe(ready), 0);
    fcntl(stop[1], F_SETFD,
          FD_CLOEXEC); /* its only holder's close is the end that workers wait for */
    fcntl(ready[0], F_SETFD, FD_CLOEXEC);
    ts_seq kept;
    ts_step *step;
    uint32_t n = 25, length;
    OK(ts_seq_create(p, 1, &kept));
    OK(ts_step_begin(p, &kept, &n, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &step));
    memset(ts_step_k(step), 0, 25 * KV * DIM * 4);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        OK(ts_step_run(step, layer));
    OK(ts_step_commit(step, NULL));
    OK(ts_seq_keep(p, kept, "shared"));

    char number[16], byte;
    snprintf(number, sizeof number, "%d", stop[0]);
    pid_t load[2];
    for (int i = 0; i < 2; i++)
        load[i] = spawn("steady", d.url, number);
    close(stop[0]);
    snprintf(number, sizeof number, "%d", ready[1]);
    double worst = 0;
    for (int i = 0; i < kills; i += 2) {
        pid_t victims[2];
        for (int v = 0; v < 2; v++)
            victims[v] = spawn("victim", d.url, number);
        for (int v = 0; v < 2; v++)
            assert_int_equal(read(ready[0], &byte, 1), 1);
        for (uint32_t j = rng_below(&r, 25); j > 0; j--) /* some round trips later */
            (void)used_blocks(c);
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        for (int v = 0; v < 2; v++) {
            kill(victims[v], SIGKILL);
            assert_int_equal(waitpid(victims[v], NULL, 0), victims[v]);
        }
        /* Only this test's session, the load's and what they own may be left. */
        for (uint64_t left = 4; left > 3;) {
            Tspb__Status body = TSPB__STATUS__INIT;
            Tspb__Request request = TSPB__REQUEST__INIT;
            Tspb__Reply *reply;
            request.body_case = TSPB__REQUEST__BODY_STATUS;
            request.status = &body;
            OK(ts_call(c, &request, &reply));
            left = reply->status_reply->sessions;
            tspb__reply__free_unpacked(reply, NULL);
        }
        clock_gettime(CLOCK_MONOTONIC, &to);
        double took =
            (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) * 1e-9;
        if (took > worst)
            worst = took;
        check_daemon(c);
    }
    print_message("%d workers killed; the slowest was reclaimed after %.1f ms\n", kills,
                  worst * 1e3);
    close(stop[1]);
    for (int i = 0; i < 2; i++)
        join_child(load[i]);
    await_used_blocks(c, 2); /* the kept sequence's */
    OK(ts_seq_lengths(p, &kept, 1, &length));
    assert_int_equal(length, 25);
    assert_int_equal(sequences(c), 1);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    close(ready[0]);
    close(ready[1]);
    daemon_stop(&d);
}

/* Worker: forks a child that holds on to all that was open here, tells the child's pid, and waits.
 */
static void parent_of_a_holder(const char *url, int ready)
{
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    uint32_t n = 40;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    pid_t child = fork();
    if (child == 0)
        for (;;)
            pause();
    assert_int_equal(write(ready, &child, sizeof child), sizeof child);
    for (;;)
        pause();
}

static void an_id_from_before_a_restart_names_nothing(void **state)
{
    (void)state;
    ts_seq before[20], after[20];
    for (int turn = 0; turn < 2; turn++) {
        daemon_process d;
        daemon_start(&d, POOL_TINY ",blocks=16");
        ts_client *c = connect_to(&d);
        ts_pool *p = open_pool(c, "tiny", 0);
        uint32_t length;
        OK(ts_seq_create(p, 20, turn == 0 ? before : after));
        for (int i = 0; turn == 1 && i < 20; i++) {
            assert_true(before[i] != after[i]);
            assert_int_equal(ts_seq_lengths(p, &before[i], 1, &length), TS_ENOENT);
        }
        ts_pool_close(p);
        ts_disconnect(c);
        daemon_stop(&d);
    }
}

/* Worker: begins a run on the processor that takes many minutes, and tells when it is under way. */
static void runs_for_minutes(const char *url, int ready)
{
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    uint32_t n = 20000;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = 64}, &step));
    if (write(ready, "r", 1) != 1)
        _exit(1);
    _exit(2 + (int)ts_step_run(step, 0)); /* it was to be killed long before */
}

static void a_killed_workers_long_run_ends_and_others_go_on_meanwhile(void **state)
{
    (void)state;
    daemon_process d;
    char number[16], byte;
    int ready[2];
    daemon_start(&d, POOL_TINY ",blocks=2000");
    ts_client *c = connect_to(&d);
    assert_int_equal(pipe(ready), 0);
    fcntl(ready[0], F_SETFD, FD_CLOEXEC);
    snprintf(number, sizeof number, "%d", ready[1]);
    pid_t worker = spawn("minutes", d.url, number);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    ts_pool *p = open_pool(c, "tiny", 0);
    for (int i = 0; i < 20; i++) {
        ts_seq seq;
        ts_step *step;
        uint32_t n = 3;
        OK(ts_seq_create(p, 1, &seq));
        OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
        memset(ts_step_q(step), 0, 3 * KV * DIM * sizeof(float));
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            OK(ts_step_run(step, layer));
        OK(ts_step_commit(step, NULL));
        OK(ts_seq_free(p, &seq, 1));
    }
    assert_int_equal(used_blocks(c), 1250); /* it runs still */
    kill(worker, SIGKILL);
    assert_int_equal(waitpid(worker, NULL, 0), worker);
    await_used_blocks(c, 0);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    close(ready[0]);
    close(ready[1]);
    daemon_stop(&d);
}

static void an_abort_after_a_runs_timeout_ends_the_run(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=2000");
    for (int transport = TS_TRANSPORT_RING; transport <= TS_TRANSPORT_MESSAGES; transport++) {
        ts_client *c;
        ts_options options = {
            .size = sizeof(ts_options), .url = d.url, .timeout_ms = 300, .transport = transport};
        OK(ts_connect(&options, &c));
        ts_pool *p = open_pool(c, "tiny", 0);
        ts_seq seq;
        ts_step *step;
        uint32_t n = 20000, length;
        OK(ts_seq_create(p, 1, &seq));
        OK(ts_step_begin(p, &seq, &n, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options), .heads = 64}, &step));
        assert_int_equal(ts_step_run(step, 0), TS_ETIMEOUT);
        for (int i = 0; i < 100; i++) /* no other call is any the worse */
            OK(ts_seq_lengths(p, &seq, 1, &length));
        OK(ts_step_abort(step));
        assert_int_equal(used_blocks(c), 0);
        OK(ts_seq_lengths(p, &seq, 1, &length));
        assert_int_equal(length, 0);
        n = 20000; /* its place in the exchange is free again */
        OK(ts_step_begin(p, &seq, &n, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options), .heads = 64}, &step));
        OK(ts_step_abort(step));
        OK(ts_seq_free(p, &seq, 1));
        ts_pool_close(p);
        ts_disconnect(c);
    }
    daemon_stop(&d);
}

static void a_dead_workers_blocks_are_free_though_its_child_holds_the_socket(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *c = connect_to(&d);
    int ready[2];
    char number[16];
    pid_t child;
    assert_int_equal(pipe(ready), 0);
    fcntl(ready[0], F_SETFD, FD_CLOEXEC);
    snprintf(number, sizeof number, "%d", ready[1]);
    pid_t worker = spawn("parent", d.url, number);
    assert_int_equal(read(ready[0], &child, sizeof child), sizeof child);
    assert_int_equal(used_blocks(c), 3);
    kill(worker, SIGKILL);
    assert_int_equal(waitpid(worker, NULL, 0), worker);
    await_used_blocks(c, 0); /* while the child lives */
    assert_int_equal(kill(child, SIGKILL), 0);
    close(ready[0]);
    close(ready[1]);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* Answers one request as a daemon of another protocol does. */
static void *other_daemon(void *arg)
{
    nng_socket s = *(nng_socket *)arg;
    nng_msg *message;
    assert_int_equal(nng_recvmsg(s, &message, 0), 0);
    Tspb__Request *request =
        tspb__request__unpack(NULL, nng_msg_len(message), nng_msg_body(message));
    assert_string_equal(request->session_open->version, TS_VERSION);
    Tspb__Reply reply = TSPB__REPLY__INIT;
    reply.request_id = request->request_id;
    reply.status = TS_EPROTO;
    reply.message = (char *)"protocol version 2; tinyserved 9.9 speaks 9";
    uint8_t packed[256];
    nng_msg_clear(message);
    assert_int_equal(nng_msg_append(message, packed, tspb__reply__pack(&reply, packed)), 0);
    assert_int_equal(nng_sendmsg(s, message, 0), 0);
    tspb__request__free_unpacked(request, NULL);
    return NULL;
}

static void a_library_that_meets_another_version_names_both(void **state)
{
    (void)state;
    char folder[] = "/tmp/tinyserve-other.XXXXXX", url[64];
    nng_socket s;
    pthread_t thread;
    ts_client *c;
    assert_non_null(mkdtemp(folder));
    snprintf(url, sizeof url, "ipc://%s/s", folder);
    assert_int_equal(nng_rep0_open(&s), 0);
    assert_int_equal(nng_listen(s, url, NULL, 0), 0);
    assert_int_equal(pthread_create(&thread, NULL, other_daemon, &s), 0);
    assert_int_equal(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = url}, &c),
                     TS_EPROTO);
    assert_string_equal(ts_error(c),
                        "libtinyserve " TS_VERSION ": protocol version 2; tinyserved 9.9 speaks 9");
    ts_disconnect(c);
    pthread_join(thread, NULL);
    nng_close(s);
    assert_int_equal(rmdir(folder), 0);
}

int main(int argc, char **argv)
{
    if (argc == 4) {
        if (strcmp(argv[1], "steady") == 0)
            steady(argv[2], atoi(argv[3]));
        if (strcmp(argv[1], "victim") == 0)
            victim(argv[2], atoi(argv[3]));
        if (strcmp(argv[1], "minutes") == 0)
            runs_for_minutes(argv[2], atoi(argv[3]));
        if (strcmp(argv[1], "parent") == 0)
            parent_of_a_holder(argv[2], atoi(argv[3]));
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_library_that_meets_another_version_names_both),
        cmocka_unit_test(a_repeated_request_gets_the_first_answer_and_is_applied_once),
        cmocka_unit_test(garbage_is_answered_with_a_refusal),
        cmocka_unit_test(the_handle_socket_gives_nothing_without_a_token),
        cmocka_unit_test(an_exchange_and_rings_are_memory_that_the_client_has_allocated),
        cmocka_unit_test(an_id_from_before_a_restart_names_nothing),
        cmocka_unit_test(a_killed_workers_long_run_ends_and_others_go_on_meanwhile),
        cmocka_unit_test(an_abort_after_a_runs_timeout_ends_the_run),
        cmocka_unit_test(a_dead_workers_blocks_are_free_though_its_child_holds_the_socket),
        cmocka_unit_test(workers_killed_at_random_points_take_nothing_with_them),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
