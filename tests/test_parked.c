/* What waits beside the engine: deadlines, alarms, and one thing at a time. */
#include "test_util.h"

#include "clock.h"
#include "parked.h"
#include "request.h"

static ts_service service;

static void go_on(ts_parked *parked)
{
    (void)parked;
}

static void claims_are_looked_at_however_many_come_to_wait(void **state)
{
    (void)state;
    enum { COUNT = 4 };
    ts_connection c[COUNT] = {{.uid = 1}};
    ts_parked p[COUNT] = {{.go_on = go_on}};
    service.exec.engine->claims.live = 1;
    ts_parked_add(&service, &c[0], &p[0], 3600000);
    const uint64_t at = service.exec.queue.alarm_ms;
    for (int i = 1; i < COUNT; i++) {
        const uint64_t now = ts_now_ms();
        while (ts_now_ms() == now)
            ;
        p[i].go_on = go_on;
        ts_parked_add(&service, &c[i], &p[i], 3600000);
        assert_int_equal(service.exec.queue.alarm_ms, at);
    }
    service.exec.engine->claims.live = 0;
    for (int i = 0; i < COUNT; i++)
        assert_true(ts_service_go_on(&service, &c[i], false));
    assert_null(service.parked);
}

static void what_waited_before_does_not_push_out_what_waits_now(void **state)
{
    (void)state;
    ts_connection c = {.uid = 1};
    ts_parked now = {.go_on = go_on},
              before = {.go_on = go_on, .deadline_ms = ts_now_ms() + 3600000};
    ts_command command = {.op = TS_OP_SEQ_MATCH};
    ts_answer answer = {0};
    assert_true(ts_parked_prepare(&service, &c, &before, 1000, &command, &answer));
    assert_true(command.again && command.seq_match.wait);
    ts_parked_add(&service, &c, &now, 3600000);
    assert_true(ts_parked_prepare(&service, &c, &before, 1000, &command, &answer));
    assert_false(command.again);
    assert_false(command.seq_match.wait);
    assert_true(ts_service_go_on(&service, &c, false));
}

int main(void)
{
    ts_engine_limits limits;
    ts_engine_default_limits(&limits);
    if (!ts_service_init(&service, &limits))
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(claims_are_looked_at_however_many_come_to_wait),
        cmocka_unit_test(what_waited_before_does_not_push_out_what_waits_now),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    ts_service_fini(&service);
    ts_queue_fini(&service.exec.queue);
    return failed;
}
