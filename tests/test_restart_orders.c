/*
 * The daemon dies at operators' orders (kill_points.c): wherever it does, each order is carried out
 * once, and each is answered as if the daemon had lived.
 */
#define _GNU_SOURCE
#include "restart_steps.h"

#define A_DROP "applying/34" /* TS_OP_CACHE_DROP */

/* Gives the order, which must be carried out; of a cache drop, how many blocks it dropped. */
static uint64_t order(ts_client *c, Tspb__Request__BodyCase body_case, void *body)
{
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    uint64_t dropped = 0;
    request.body_case = body_case;
    request.admin_kick = body; /* where each of the bodies is */
    DO(ts_call(c, &request, &reply));
    if (reply->body_case == TSPB__REPLY__BODY_CACHE_DROPPED)
        dropped = reply->cache_dropped->blocks;
    tspb__reply__free_unpacked(reply, NULL);
    return dropped;
}

static void make_and_end_a_pool(ts_client *c)
{
    Tspb__AdminPoolCreate create = TSPB__ADMIN_POOL_CREATE__INIT;
    Tspb__AdminPoolResize resize = TSPB__ADMIN_POOL_RESIZE__INIT;
    Tspb__AdminPoolDelete remove = TSPB__ADMIN_POOL_DELETE__INIT;
    create.text = ts_unconst("made:layers=1,kv_heads=1,head_dim=32,dtype=fp32,blocks=16,"
                             "memory_max=1M,slab=16K,device=host");
    resize.pool = remove.pool = ts_unconst("made");
    resize.memory = ts_unconst("512K");
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_POOL_CREATE, &create);
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_POOL_RESIZE, &resize);
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_POOL_DELETE, &remove);
}

/* Each order is answered as if the daemon had lived: none is carried out twice, and none is refused
 * since it was carried out before. */
static uint64_t give_orders(ts_client *c, int exchange, uint32_t *restarts)
{
    (void)exchange;
    rng r = {42};
    digest d = {1469598103934665603u};
    ts_seq seqs[2];
    uint32_t ids[40];
    ts_client *other;
    Tspb__AdminFree release = TSPB__ADMIN_FREE__INIT;
    Tspb__AdminCacheDrop drop = TSPB__ADMIN_CACHE_DROP__INIT;
    Tspb__AdminDrain drain = TSPB__ADMIN_DRAIN__INIT;
    Tspb__AdminKick kick = TSPB__ADMIN_KICK__INIT;
    ts_pool *p = open_pool(c, "p", 0);
    for (uint32_t i = 0; i < 40; i++)
        ids[i] = i;
    DO(ts_seq_create(p, 2, seqs));
    one_step(c, p, seqs, (uint32_t[]){40}, 1, ids, &r, &d);
    release.pool = drop.pool = ts_unconst("p");
    release.seq = seqs[0];
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_FREE, &release);
    const uint64_t dropped = order(c, TSPB__REQUEST__BODY_ADMIN_CACHE_DROP, &drop);
    assert_int_equal(dropped, 2);
    make_and_end_a_pool(c);
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_DRAIN, &drain);
    drain.off = true;
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_DRAIN, &drain);
    OK(ts_connect(
        &(ts_options){
            .size = sizeof(ts_options), .url = c->path, .wait_ms = 60000, .timeout_ms = 60000},
        &other));
    kick.session = other->session;
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_KICK, &kick);
    ts_disconnect(other);
    DO(ts_seq_free(p, &seqs[1], 1));
    check_daemon(c);
    mix(&d, &(uint64_t){sequences(c)}, sizeof(uint64_t));
    *restarts = ts_client_restarts(c);
    ts_pool_close(p);
    return d.value;
}

static uint32_t kills_of_orders(const char *place)
{
    const killed_workload w = {
        .pool = POOL, .transport = TS_TRANSPORT_MESSAGES, .work = give_orders};
    return kill_everywhere(&w, place, 3);
}

static void an_operators_order_is_carried_out_once(void **state)
{
    (void)state;
    assert_true(kills_of_orders("applied") > 20 / STRIDE);
    assert_true(kills_of_orders("published") > 20 / STRIDE);
    assert_true(kills_of_orders("answering") > 15 / STRIDE);
}

/* A session that hasn't come back yet is ended, and the daemon dies before it has said so. */
static void an_order_to_end_an_absent_session_is_carried_out_once(void **state)
{
    (void)state;
    daemon_process d;
    Tspb__AdminKick end = TSPB__ADMIN_KICK__INIT;
    setenv("TS_TEST_DEATHS", "1", 1);
    start(&d, POOL, "answering:2"); /* of the operator's return, and of the order */
    unsetenv("TS_TEST_DEATHS");
    ts_client *c = connect_by(&d, TS_TRANSPORT_MESSAGES);
    ts_client *other = connect_by(&d, TS_TRANSPORT_MESSAGES);
    const pid_t first = daemon_of(&d);
    assert_int_equal(kill(first, SIGKILL), 0);
    end.session = other->session;
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_KICK, &end);
    assert_int_equal(ts_client_restarts(c), 2);
    Tspb__Status status = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &status;
    assert_int_equal(ts_call_plain(other, &request), TS_ECONN);
    assert_non_null(strstr(ts_error(other), "the session is over"));
    check_daemon(c);
    ts_disconnect(other);
    ts_disconnect(c);
    stop(&d, false);
}

/* Its operator's session is over, and what is stored is there. */
static void an_order_that_kills_the_daemon_twice_isnt_carried_out_a_third_time(void **state)
{
    (void)state;
    daemon_process d;
    Tspb__AdminCacheDrop drop = TSPB__ADMIN_CACHE_DROP__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    ts_seq seq;
    ts_client *c = start_crashing(&d, A_DROP), *other = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *others = open_pool(other, "p", 0);
    OK(ts_seq_create(others, 1, &seq));
    request.body_case = TSPB__REQUEST__BODY_ADMIN_CACHE_DROP;
    request.admin_cache_drop = &drop;
    assert_int_equal(ts_call_plain(c, &request), TS_ECONN);
    finish_after_crashes(&d, c, other, others, seq);
}

/* An operator has deleted a pool of the configuration and made others in its place, so that there
 * is no room for it: the next daemon serves those. */
static void a_pool_that_has_no_room_any_more_keeps_no_daemon_from_the_others(void **state)
{
    (void)state;
    daemon_process d;
    Tspb__AdminPoolDelete remove = TSPB__ADMIN_POOL_DELETE__INIT;
    Tspb__AdminPoolCreate create = TSPB__ADMIN_POOL_CREATE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    char text[128], log[] = "/tmp/tinyserve-log.XXXXXX";
    ts_status status = TS_OK;
    ts_seq seq;
    close(mkstemp(log));
    setenv("TS_TEST_LOG", log, 1);
    start(&d, POOL, NULL);
    unsetenv("TS_TEST_LOG");
    ts_client *c = connect_by(&d, TS_TRANSPORT_MESSAGES);
    remove.pool = ts_unconst("p");
    (void)order(c, TSPB__REQUEST__BODY_ADMIN_POOL_DELETE, &remove);
    request.body_case = TSPB__REQUEST__BODY_ADMIN_POOL_CREATE;
    request.admin_pool_create = &create;
    create.text = text;
    for (uint32_t i = 0; status == TS_OK; i++) { /* as many as there may be */
        snprintf(text, sizeof text,
                 "n%u:layers=1,kv_heads=1,head_dim=32,dtype=fp32,blocks=16,slab=16K,device=host",
                 i);
        status = ts_call_plain(c, &request);
    }
    assert_int_equal(status, TS_EINVAL);
    ts_pool *p = open_pool(c, "n0", 0);
    DO(ts_seq_create(p, 1, &seq));
    assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
    DO(ts_seq_lengths(p, &seq, 1, &(uint32_t){0}));
    assert_int_equal(ts_client_restarts(c), 1);
    finish(&d, c, p);
    char *said = read_log(log);
    assert_non_null(strstr(said, "pool 'p': there are "));
    assert_non_null(strstr(said, "; what was taken over is served without it"));
    free(said);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_operators_order_is_carried_out_once),
        cmocka_unit_test(an_order_to_end_an_absent_session_is_carried_out_once),
        cmocka_unit_test(an_order_that_kills_the_daemon_twice_isnt_carried_out_a_third_time),
        cmocka_unit_test(a_pool_that_has_no_room_any_more_keeps_no_daemon_from_the_others),
    };
    cmocka_set_test_filter(getenv("TS_TEST_FILTER"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
