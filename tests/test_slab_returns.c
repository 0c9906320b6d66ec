/* The library gives back slabs of a GPU's memory that are others': against a handle socket of this
 * test's own, with a driver (fake_libcuda.c) that maps host memory. */
#define _GNU_SOURCE
#include "test_util.h"

#include "client.h"
#include "fd_client.h"
#include "gpu_context.h"
#include "pool_map.h"
#include "revocations.h"
#include "slab_returns.h"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define OK(call) assert_int_equal((call), TS_OK)

enum { SLABS = 4, SLAB_BLOCKS = 512 }; /* of 4 KiB: a slab is a granule of a GPU's */

/* ---- the daemon's side ---- */

static char path[100];
static int listener, page_fd, bell, slab_fds[SLABS];
static uint32_t generations[SLABS];
static ts_revocations *page;
static atomic_uint asked_slabs;

static void reply(int to, const ts_handle_request *r)
{
    const int fd = r->kind == TS_HANDLE_REVOCATIONS       ? page_fd
                   : r->kind == TS_HANDLE_REVOCATION_BELL ? bell
                                                          : slab_fds[r->slab];
    atomic_fetch_add(&asked_slabs, r->kind == TS_HANDLE_SLAB);
    ts_handle_reply answer = {.magic = TS_HANDLE_MAGIC,
                              .tag = r->tag,
                              .protocol = TS_PROTOCOL,
                              .bytes = (uint64_t)SLAB_BLOCKS * 4096,
                              .generation = generations[r->slab]};
    struct iovec data = {.iov_base = &answer, .iov_len = sizeof answer};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof fd),
                            .cmsg_level = SOL_SOCKET,
                            .cmsg_type = SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    struct msghdr message = {.msg_iov = &data,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
    assert_int_equal(sendmsg(to, &message, 0), sizeof answer);
}

static void *serve(void *arg)
{
    ts_handle_request r;
    (void)arg;
    int connection = accept(listener, NULL, NULL);
    while (connection >= 0 && recv(connection, &r, sizeof r, 0) == sizeof r)
        reply(connection, &r);
    close(connection);
    return NULL;
}

static void take_back(uint32_t pool, uint32_t slab)
{
    const uint32_t generation = slab < SLABS ? generations[slab] : 1;
    page->entries[page->posted % TS_REVOCATIONS] =
        (ts_revocation){.pool = pool, .slab = slab, .generation = generation};
    __atomic_store_n(&page->posted, page->posted + 1, __ATOMIC_RELEASE);
    assert_int_equal(write(bell, &(uint64_t){1}, 8), 8);
}

static void until_returned(void)
{
    while (__atomic_load_n(&page->returned, __ATOMIC_ACQUIRE) != page->posted)
        ;
}

/* ---- the client's ---- */

static ts_client client;
static ts_pool *pool;
static atomic_uint *unmaps, *strict_calls;
static int (*capture_mode)(void);

static ts_pool *pool_new(uint32_t index)
{
    ts_pool *p = calloc(1, sizeof *p);
    *p = (ts_pool){.client = &client,
                   .next = client.pools,
                   .index = index,
                   .geometry = {.layers = 1,
                                .kv_heads = 1,
                                .head_dim = 32,
                                .block_tokens = 16,
                                .dtype = TS_DTYPE_FP32},
                   .num_blocks = SLABS * SLAB_BLOCKS,
                   .slab_blocks = SLAB_BLOCKS,
                   .num_slabs = SLABS,
                   .writable = true,
                   .on_gpu = true,
                   .mapped = calloc(SLABS, sizeof *p->mapped),
                   .revoked = calloc(SLABS, sizeof *p->revoked),
                   .wanted = calloc(SLABS, sizeof *p->wanted),
                   .written = calloc(SLABS, sizeof *p->written)};
    client.pools = p;
    return p;
}

static pthread_t server;

static int start(void **state)
{
    (void)state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(path, sizeof path, "/tmp/ts-returns-%d", getpid());
    snprintf(address.sun_path, sizeof address.sun_path, "%s" TS_HANDLE_SUFFIX, path);
    listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(listener, 1), 0);
    page_fd = memfd_create("page", MFD_CLOEXEC);
    assert_int_equal(ftruncate(page_fd, TS_REVOCATIONS_BYTES), 0);
    page = mmap(NULL, TS_REVOCATIONS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, page_fd, 0);
    bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (uint32_t i = 0; i < SLABS; i++) {
        slab_fds[i] = memfd_create("slab", MFD_CLOEXEC);
        assert_int_equal(ftruncate(slab_fds[i], (off_t)SLAB_BLOCKS * 4096), 0);
        generations[i] = 1;
    }
    assert_int_equal(pthread_create(&server, NULL, serve, NULL), 0);
    client = (ts_client){.pid = getpid(), .handle_fd = -1, .timeout_ms = 30000};
    snprintf(client.path, sizeof client.path, "%s", path);
    pool = pool_new(3);
    atomic_store(&asked_slabs, 0);
    return 0;
}

static void pool_end(ts_pool *p)
{
    ts_pool_unmap(p);
    free(p->mapped);
    free(p->revoked);
    free(p->wanted);
    free(p->written);
    free(p);
}

static int stop(void **state)
{
    (void)state;
    ts_slab_returns_stop(&client);
    for (ts_pool *p = client.pools, *next; p != NULL; p = next) {
        next = p->next;
        pool_end(p);
    }
    ts_cuda_close(client.cuda);
    ts_handles_close(&client);
    shutdown(listener, SHUT_RDWR); /* it may wait for a first connection yet */
    pthread_join(server, NULL);
    close(listener);
    munmap(page, TS_REVOCATIONS_BYTES);
    close(page_fd);
    close(bell);
    for (uint32_t i = 0; i < SLABS; i++)
        close(slab_fds[i]);
    char socket_path[sizeof path + 16];
    snprintf(socket_path, sizeof socket_path, "%s" TS_HANDLE_SUFFIX, path);
    unlink(socket_path);
    return 0;
}

static void map(ts_pool *p, uint32_t slab, ts_status expected)
{
    p->wanted[slab] = generations[slab];
    assert_int_equal(ts_pool_map_block(p, (uint64_t)slab * SLAB_BLOCKS, true), expected);
}

/* The generation that is mapped. */
static uint32_t mapped(const ts_pool *p, uint32_t slab)
{
    return __atomic_load_n(&p->mapped[slab], __ATOMIC_ACQUIRE);
}

static unsigned char *first_byte(ts_pool *p, uint32_t slab)
{
    return p->base + (size_t)slab * SLAB_BLOCKS * 4096;
}

static void find_counts(void)
{
    void *fake = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    assert_non_null(fake);
    unmaps = dlsym(fake, "fake_unmaps");
    strict_calls = dlsym(fake, "fake_strict_calls");
    *(void **)&capture_mode = dlsym(fake, "fake_capture_mode");
    assert_non_null(unmaps);
    assert_non_null(strict_calls);
    assert_non_null(capture_mode);
    dlclose(fake);
}

static void what_is_anothers_is_unmapped_while_the_worker_is_idle(void **state)
{
    (void)state;
    ts_pool *other = pool_new(4), *again = pool_new(3); /* the pool, opened once more */
    for (uint32_t i = 0; i < 3; i++)
        map(pool, i, TS_OK);
    map(other, 1, TS_OK);
    map(again, 1, TS_OK);
    find_counts();
    *first_byte(pool, 1) = 17;
    const uint32_t before = atomic_load(unmaps);
    take_back(3, 1);
    take_back(3, 3);          /* it isn't mapped */
    take_back(9, 0);          /* no such pool is open */
    take_back(3, SLABS + 10); /* no such slab */
    until_returned();
    assert_int_equal(atomic_load(unmaps), before + 2); /* both that are open */
    assert_int_equal(atomic_load(strict_calls), 0);    /* of both threads: captures stay valid */
    assert_int_equal(capture_mode(), 0);               /* this one's is as it was */
    assert_int_equal(mapped(pool, 1), 0);
    assert_int_equal(mapped(again, 1), 0);
    assert_int_equal(mapped(other, 1), 1);
    assert_int_equal(mapped(pool, 0), 1);
    *first_byte(pool, 0) = 1;
    /* Its memory goes with its last mapping. */
    unsigned char resident;
    assert_int_equal(mincore(first_byte(pool, 1), 4096, &resident), 0);
    assert_int_equal(resident & 1, 0);
    /* The user has it again, as new memory. */
    generations[1] = 2;
    map(pool, 1, TS_OK);
    assert_int_equal(mapped(pool, 1), 2);
    *first_byte(pool, 1) = 18;
}

static void what_came_too_late_is_not_mapped(void **state)
{
    (void)state;
    map(pool, 0, TS_OK);
    take_back(3, 2);
    until_returned();
    map(pool, 2, TS_EPERM); /* the daemon had answered before */
    assert_string_equal(client.error.text, "slab 2 has become another user's");
    assert_int_equal(mapped(pool, 2), 0);
    generations[2] = 2;
    map(pool, 2, TS_OK);
    generations[2] = 1; /* of old */
    const uint32_t before = page->returned;
    take_back(3, 2);
    until_returned();
    assert_int_equal(page->returned, before + 1);
    assert_int_equal(mapped(pool, 2), 2);
}

static void a_forked_child_waits_for_no_lock(void **state)
{
    (void)state;
    map(pool, 0, TS_OK);
    ts_slab_returns_lock(&client); /* as the thread may have it at any moment */
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        ts_slab_returns_lock(&client);
        ts_slab_returns_unlock(&client);
        ts_slab_returns_stop(&client);
        _exit(client.returns == NULL ? 0 : 1);
    }
    ts_slab_returns_unlock(&client);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static void more_than_the_page_has_are_given_back_in_turn(void **state)
{
    (void)state;
    map(pool, 0, TS_OK);
    find_counts();
    const uint32_t before = atomic_load(unmaps);
    for (uint32_t i = 0; i < 3 * TS_REVOCATIONS; i++) {
        if (i % 7 == 0)
            map(pool, 0, TS_OK);
        take_back(3, 0);
        until_returned();
        assert_int_equal(mapped(pool, 0), 0);
        generations[0]++;
    }
    assert_int_equal(atomic_load(unmaps) - before, (3 * TS_REVOCATIONS + 6) / 7);
}

/* The next daemon is told of each slab that is mapped, and what has become others' meanwhile goes.
 */
static void the_next_daemon_is_told_what_is_mapped(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 3; i++)
        map(pool, i, TS_OK);
    OK(ts_slab_returns_reopen(&client));
    for (uint32_t i = 0; i < 3; i++)
        assert_int_equal(mapped(pool, i), 1);
    assert_int_equal(atomic_load(&asked_slabs), 2 * 3);
    *first_byte(pool, 0) = 5;
    generations[1] = 2; /* it is somebody else's now */
    OK(ts_slab_returns_reopen(&client));
    assert_int_equal(mapped(pool, 0), 1);
    assert_int_equal(mapped(pool, 1), 0);
    assert_int_equal(mapped(pool, 2), 1);
    assert_int_equal(*first_byte(pool, 0), 5);
    take_back(3, 2); /* the thread works on */
    until_returned();
    assert_int_equal(mapped(pool, 2), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(what_is_anothers_is_unmapped_while_the_worker_is_idle,
                                        start, stop),
        cmocka_unit_test_setup_teardown(what_came_too_late_is_not_mapped, start, stop),
        cmocka_unit_test_setup_teardown(the_next_daemon_is_told_what_is_mapped, start, stop),
        cmocka_unit_test_setup_teardown(a_forked_child_waits_for_no_lock, start, stop),
        cmocka_unit_test_setup_teardown(more_than_the_page_has_are_given_back_in_turn, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
