/* Signals that a worker gets all the time, such as a profiler's: no call of the library minds. */
#define _GNU_SOURCE
#include "execution_util.h"

#include <sys/time.h>

static volatile sig_atomic_t hits;

static void hit(int signal)
{
    (void)signal;
    hits++;
}

/* Goes once through all that a worker waits for: both sockets, the rings, slabs, the exchange. */
static void work_once(const char *url, ts_transport transport)
{
    ts_client *c;
    ts_status status = ts_connect(&(ts_options){.size = sizeof(ts_options),
                                                .url = url,
                                                .timeout_ms = 120000,
                                                .exchange_bytes = 1 << 20,
                                                .transport = transport},
                                  &c);
    if (status != TS_OK)
        fail_msg("%s: %s", ts_status_name(status), ts_error(c));
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    ts_kv kv;
    uint64_t slot;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &(uint32_t){3}, 1, NULL, &step));
    assert_int_equal(ts_client_transport(c), transport);
    memset(ts_step_q(step), 0, 3 * KV * DIM * sizeof(float));
    for (uint32_t layer = 0; layer < ts_pool_geometry(p, 0)->layers; layer++)
        OK(ts_step_run(step, layer));
    OK(ts_step_commit(step, NULL));
    OK(ts_seq_slots(p, seq, 0, 0, 1, &slot));
    OK(ts_slot_kv(p, slot, 0, &kv));
    ts_pool_close(p);
    ts_disconnect(c);
}

/* Worker: interrupted every millisecond, it connects 100 times. The argument: the transport, then
 * 'r' for system calls that are begun again. */
static void interrupted(const char *url, const char *how)
{
    const struct itimerval often = {{0, 1000}, {0, 1000}};
    struct sigaction action = {.sa_handler = hit, .sa_flags = how[1] == 'r' ? SA_RESTART : 0};
    assert_int_equal(sigaction(SIGALRM, &action, NULL), 0);
    assert_int_equal(setitimer(ITIMER_REAL, &often, NULL), 0);
    for (int i = 0; i < 100; i++)
        work_once(url, (ts_transport)(how[0] - '0'));
    while (hits == 0)
        ;
}

static void a_worker_whose_calls_are_interrupted_works_as_any(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL);
    for (int transport = TS_TRANSPORT_RING; transport <= TS_TRANSPORT_MESSAGES; transport++)
        for (int again = 0; again < 2; again++) {
            char how[] = {(char)('0' + transport), again ? 'r' : '-', '\0'};
            join_child(spawn("interrupted", d.url, how));
        }
    daemon_stop(&d);
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {
        {"interrupted", interrupted},
    };
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_worker_whose_calls_are_interrupted_works_as_any),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
