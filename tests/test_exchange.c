/* Memory that a worker shares with the daemon: how it grows, how long it lasts, where it lies. */
#define _GNU_SOURCE
#include "daemon_util.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static void the_exchange_grows_with_what_steps_need(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=256");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq[2];
    ts_step *steps[2], *third;
    uint32_t n = 10;
    OK(ts_seq_create(p, 2, seq));
    for (int i = 0; i < 2; i++) { /* two at once, in different places */
        OK(ts_step_begin(p, &seq[i], &n, 1, NULL, &steps[i]));
        if (i == 0) {
            OK(ts_step_abort(steps[0])); /* grown while none was open */
            n = 1;
            OK(ts_step_begin(p, &seq[0], &n, 1, NULL, &steps[0]));
        }
    }
    assert_ptr_not_equal(ts_step_q(steps[0]), ts_step_q(steps[1]));
    n = 4000;
    ts_seq more;
    OK(ts_seq_create(p, 1, &more));
    assert_int_equal(ts_step_begin(p, &more, &n, 1, NULL, &third), TS_EBUSY);
    char needs[64];
    const size_t bytes = 4000 * 64 * (2 + 2 + 2 + 2) * sizeof(float) + 2 * 64 /* sinks, alibi */ +
                         4000 * 2 * sizeof(float) + 64 /* lse, scales */;
    snprintf(needs, sizeof needs, "has no %zu free beside it", bytes);
    assert_non_null(strstr(ts_error(c), "a step or frame is open"));
    assert_non_null(strstr(ts_error(c), needs));
    const char *least = strstr(ts_error(c), "exchange_bytes of at least ");
    assert_non_null(least);
    ts_client *roomy;
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options),
                                .url = d.url,
                                .exchange_bytes = strtoul(strpbrk(least, "0123456789"), NULL, 10)},
                  &roomy)); /* what the sentence says is enough */
    ts_pool *q = open_pool(roomy, "tiny", 0);
    ts_seq there[3];
    ts_step *open[3];
    OK(ts_seq_create(q, 3, there));
    for (int i = 0; i < 3; i++)
        OK(ts_step_begin(q, &there[i], &(uint32_t[]){1, 1, 4000}[i], 1, NULL, &open[i]));
    for (int i = 0; i < 3; i++)
        OK(ts_step_abort(open[i]));
    ts_pool_close(q);
    ts_disconnect(roomy);
    OK(ts_step_abort(steps[0]));
    OK(ts_step_abort(steps[1]));
    OK(ts_step_begin(p, &more, &n, 1, NULL, &third));
    memset(ts_step_q(third), 0, 4000 * 2 * 64 * 4);
    const ts_run_options near = {.size = sizeof near, .window = 64}; /* all rows, in less time */
    for (uint32_t layer = 0; layer < 6; layer++)
        OK(ts_step_run_with(third, layer, &near));
    OK(ts_step_commit(third, NULL));
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* A forgotten commit is named as such: a larger exchange would be of no use. */
static void a_sequence_of_an_open_step_is_named_where_the_exchange_has_no_room(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=64");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seqs[2];
    ts_step *open, *next;
    char says[128];
    OK(ts_seq_create(p, 2, seqs));
    OK(ts_step_begin(p, &seqs[0], &(uint32_t){8}, 1, NULL, &open)); /* fills the exchange */
    assert_int_equal(ts_step_begin(p, &seqs[1], &(uint32_t){8}, 1, NULL, &next), TS_EBUSY);
    assert_non_null(strstr(ts_error(c), "exchange_bytes of at least "));
    assert_int_equal(ts_step_begin(p, seqs, (uint32_t[]){8, 8}, 2, NULL, &next), TS_EBUSY);
    snprintf(says, sizeof says, "sequence %llx is in open step ", (unsigned long long)seqs[0]);
    assert_memory_equal(ts_error(c), says, strlen(says));
    assert_null(strstr(ts_error(c), "exchange"));
    assert_non_null(strstr(ts_error(c), "commit or abort that first"));
    OK(ts_step_abort(open));
    OK(ts_step_begin(p, seqs, (uint32_t[]){8, 8}, 2, NULL, &next));
    OK(ts_step_abort(next));
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* A limit that isn't a whole number of pages allows the whole pages in it. */
static void the_limit_of_an_exchange_counts_pages(void **state)
{
    (void)state;
    daemon_process d;
    ts_client *c;
    daemon_start_with(&d, POOL_TINY ",blocks=64",
                      (const char *const[]){"--set", "exchange_max=9000", NULL});
    ts_options options = {.size = sizeof options, .url = d.url, .exchange_bytes = 8192};
    OK(ts_connect(&options, &c));
    ts_disconnect(c);
    options.exchange_bytes = 4097;
    OK(ts_connect(&options, &c));
    ts_disconnect(c);
    options.exchange_bytes = 8193;
    assert_int_equal(ts_connect(&options, &c), TS_EINVAL);
    assert_string_equal(ts_error(c), "an exchange of 8193 bytes; the daemon's limits are 1..8192 "
                                     "(exchange_max)");
    ts_disconnect(c);
    daemon_stop(&d);
}

static void held_memory_stays_mapped_when_all_is_closed(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL_TINY ",blocks=64");
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *step;
    uint64_t slot;
    ts_kv kv;
    uint32_t n = 1;
    assert_null(ts_exchange_hold(c));
    assert_null(ts_pool_hold(p));
    OK(ts_seq_create(p, 1, &seq));
    assert_int_equal(ts_step_begin(p, &seq, &(uint32_t){1u << 20}, 1, NULL, &step), TS_EQUOTA);
    assert_null(ts_exchange_hold(c)); /* the pool has no room for it: no memory is made */
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    float *k = ts_step_k(step);
    for (uint32_t i = 0; i < 2 * 64; i++)
        k[i] = (float)i;
    memset(ts_step_q(step), 0, 2 * 64 * sizeof(float));
    memset(ts_step_v(step), 0, 2 * 64 * sizeof(float));
    for (uint32_t layer = 0; layer < 6; layer++)
        OK(ts_step_run(step, layer));
    OK(ts_step_commit(step, NULL));
    OK(ts_seq_slots(p, seq, 0, 0, 1, &slot));
    OK(ts_slot_kv(p, slot, 5, &kv));
    ts_memory *exchange = ts_exchange_hold(c), *slabs = ts_pool_hold(p), *again = ts_pool_hold(p);
    assert_ptr_equal(slabs, again);
    n = 40; /* its step needs a larger exchange */
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    ts_memory *larger = ts_exchange_hold(c);
    assert_ptr_not_equal(exchange, larger);
    OK(ts_step_abort(step));
    ts_pool_close(p);
    ts_disconnect(c);
    ts_memory_release(again);
    ts_memory_release(larger);
    for (uint32_t i = 0; i < 2 * 64; i++) {
        assert_true(k[i] == (float)i);
        assert_true(((const float *)kv.k)[i % 64 + i / 64 * kv.head_stride / 4] == (float)i);
    }
    ts_memory_release(slabs);
    ts_memory_release(exchange);
    ts_memory_release(NULL);
    daemon_stop(&d);
}

/* The daemon's slabs, in /proc/PID/numa_maps. */

static void host_memory_lies_on_all_nodes_in_turn(void **state)
{
    (void)state;
    daemon_process d;
    char path[64], line[512];
    daemon_start(&d, POOL_TINY ",memory=1M,slab=512K,client_write=all,device=host");
    snprintf(path, sizeof path, "/proc/%d/numa_maps", (int)d.pid);
    FILE *f;
    if (syscall(SYS_get_mempolicy, NULL, NULL, 0ul, NULL, 0ul) != 0) { /* no nodes, or forbidden */
        daemon_stop(&d);
        skip();
    }
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", TS_POOL_WRITABLE);
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_append(p, &seq, &(uint32_t){1}, 1, NULL));
    uint32_t slabs = 0;
    f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f) != NULL)
        if (strstr(line, "tinyserve-slab") != NULL) {
            if (strstr(line, " interleave") == NULL)
                fail_msg("a slab isn't interleaved: %s", line);
            slabs++;
        }
    fclose(f);
    assert_int_equal(slabs, 1);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_exchange_grows_with_what_steps_need),
        cmocka_unit_test(a_sequence_of_an_open_step_is_named_where_the_exchange_has_no_room),
        cmocka_unit_test(the_limit_of_an_exchange_counts_pages),
        cmocka_unit_test(held_memory_stays_mapped_when_all_is_closed),
        cmocka_unit_test(host_memory_lies_on_all_nodes_in_turn),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
