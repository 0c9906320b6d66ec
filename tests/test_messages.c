/* Messages that are made by hand: repeats, garbage, and what is answered. */
#define _GNU_SOURCE
#include "raw_client.h"

#include <nng/protocol/reqrep0/req.h>

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

/* An id is taken before its request is sent: another thread may end many waits in between. */
static void ends_of_waits_make_no_call_a_repeated_one(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    nng_socket s = raw_open(&d);
    Tspb__SeqCreate create;
    Tspb__WaitEnd end = TSPB__WAIT_END__INIT;
    raw_session(s);
    for (uint64_t id = 100; id < 300; id++) {
        Tspb__Request request = TSPB__REQUEST__INIT;
        request.request_id = id;
        request.body_case = TSPB__REQUEST__BODY_WAIT_END;
        request.wait_end = &end;
        Tspb__Reply *ended = raw_call(s, &request);
        assert_int_equal(ended->status, TS_OK);
        tspb__reply__free_unpacked(ended, NULL);
    }
    Tspb__Request request = create_request(&create, 99);
    Tspb__Reply *made = raw_call(s, &request);
    assert_int_equal(made->status, TS_OK);
    tspb__reply__free_unpacked(made, NULL);
    nng_close(s);
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
        "speaks 8: the older of them must be upgraded, and then started again");
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

/* What a session that goes on tells of has limits, which its process keeps. */
static void a_resume_of_too_much_is_refused(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=16");
    nng_socket s = raw_open(&d);
    Tspb__SessionResume resume = TSPB__SESSION_RESUME__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    uint64_t given_up[TS_GIVEN_UP_MOST + 1] = {0};
    resume.protocol = TS_PROTOCOL;
    resume.given_up = given_up;
    resume.n_given_up = TS_GIVEN_UP_MOST + 1;
    request.request_id = 1;
    request.body_case = TSPB__REQUEST__BODY_SESSION_RESUME;
    request.session_resume = &resume;
    Tspb__Reply *reply = raw_call(s, &request);
    assert_int_equal(reply->status, TS_EINVAL);
    assert_string_equal(reply->message, "a resume that gives up 65 calls and 0 steps; the limits "
                                        "are 64 and 256");
    tspb__reply__free_unpacked(reply, NULL);
    resume.n_given_up--;
    request.request_id = 2;
    reply = raw_call(s, &request);
    assert_int_equal(reply->status, TS_ENOENT); /* there is no such session */
    tspb__reply__free_unpacked(reply, NULL);
    nng_close(s);
    daemon_stop(&d);
}

/* A prompt of `count` token ids that take five bytes each; *found: what is stored of it. */
static ts_status match_long(ts_pool *p, uint32_t count, uint32_t *found)
{
    const ts_seq_options in_a_space = {.size = sizeof in_a_space, .space = "m", .space_bytes = 1};
    uint32_t *ids = malloc(count * sizeof *ids);
    ts_seq seq;
    for (uint32_t i = 0; i < count; i++)
        ids[i] = UINT32_MAX - 1 - i;
    const ts_status status = ts_seq_match(p, ids, &count, 1, &in_a_space, &seq, found);
    if (status == TS_OK)
        OK(ts_seq_free(p, &seq, 1));
    free(ids);
    return status;
}

static void as_many_token_ids_as_the_limits_allow_fit_into_a_message(void **state)
{
    (void)state;
    daemon_process d;
    uint32_t found = 1;
    daemon_start(&d, POOL_TINY ",blocks=16");
    ts_client *c;
    OK(ts_connect(
        &(ts_options){.size = sizeof(ts_options), .url = d.url, .transport = TS_TRANSPORT_MESSAGES},
        &c));
    ts_pool *p = open_pool(c, "tiny", 0);
    OK(match_long(p, 1u << 20, &found));
    assert_int_equal(found, 0);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void a_request_that_is_too_long_is_refused_and_the_session_goes_on(void **state)
{
    (void)state;
    daemon_process d;
    uint32_t found = 1, length = 1;
    ts_seq seq;
    daemon_start_with(&d, POOL_TINY ",blocks=16",
                      (const char *const[]){"--set", "message_max=4096", NULL});
    ts_client *c;
    OK(ts_connect(
        &(ts_options){.size = sizeof(ts_options), .url = d.url, .transport = TS_TRANSPORT_MESSAGES},
        &c));
    ts_pool *p = open_pool(c, "tiny", 0);
    OK(ts_seq_create(p, 1, &seq));
    OK(match_long(p, 800, &found)); /* 4000 bytes, and some */
    assert_int_equal(match_long(p, 820, &found), TS_EINVAL);
    char sentence[256];
    snprintf(sentence, sizeof sentence,
             "a request of 4116 bytes; %s takes messages of up to 4096 (message_max)", d.url);
    assert_string_equal(ts_error(c), sentence);
    ts_error_info info = {.size = sizeof info};
    OK(ts_error_read(c, &info));
    assert_int_equal(info.status, TS_EINVAL);
    assert_int_equal(info.needed, 4116);
    assert_int_equal(info.limit, 4096);
    OK(ts_seq_lengths(p, &seq, 1, &length));
    assert_int_equal(length, 0);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_repeated_request_gets_the_first_answer_and_is_applied_once),
        cmocka_unit_test(ends_of_waits_make_no_call_a_repeated_one),
        cmocka_unit_test(a_resume_of_too_much_is_refused),
        cmocka_unit_test(garbage_is_answered_with_a_refusal),
        cmocka_unit_test(as_many_token_ids_as_the_limits_allow_fit_into_a_message),
        cmocka_unit_test(a_request_that_is_too_long_is_refused_and_the_session_goes_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
