/* The handle socket: whom it gives which memory, and what is taken of memory that clients fill. */
#define _GNU_SOURCE
#include "raw_client.h"

#include "fd_client.h"

#include <fcntl.h>
#include <sys/mman.h>

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
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 0, 0, false, &reply, &fd), TS_ECONN);
    c->token[0] ^= 1;
    c->session ^= 1ull << 32;
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, 0, 0, false, &reply, &fd), TS_ECONN);
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
    const size_t bytes = ts_rings_bytes(16, 1, 0);
    const uint32_t version = TS_PROTOCOL, magic = TS_RING_MAGIC;
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_handle_socket_gives_nothing_without_a_token),
        cmocka_unit_test(an_exchange_and_rings_are_memory_that_the_client_has_allocated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
