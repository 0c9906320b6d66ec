/* Two tenants (uids) on one pool: neither may read, map or re-open what is the other's. Needs root,
 * to become two others. */
#define _GNU_SOURCE
#include "daemon_util.h"

#include "fd_client.h"
#include <fcntl.h>
#include <grp.h>
#include <sys/mman.h>

#define UID_A 61001
#define UID_B 61002
#define POOL_RO "ro:layers=1,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=4,blocks=64,slab=4096"
#define POOL_RW                                                                                    \
    "rw:layers=1,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=4,blocks=8,slab=4096,client_"      \
    "write="                                                                                       \
    "all"

static void become(uid_t uid)
{
    assert_int_equal(setgroups(0, NULL), 0);
    assert_int_equal(setresgid(uid, uid, uid), 0);
    assert_int_equal(setresuid(uid, uid, uid), 0);
    prctl(PR_SET_DUMPABLE, 1); /* as a program that was started as this user */
}

/* One written token in a sequence of the pool; its slot. */
static uint64_t write_token(ts_pool *p, ts_seq *seq)
{
    ts_step *step;
    uint64_t slot;
    uint32_t n = 1;
    OK(ts_seq_create(p, 1, seq));
    OK(ts_step_begin(p, seq, &n, 1, NULL, &step));
    for (int i = 0; i < 32; i++)
        ((float *)ts_step_k(step))[i] = ((float *)ts_step_v(step))[i] = 42.0f;
    OK(ts_step_run(step, 0));
    OK(ts_step_commit(step, NULL));
    OK(ts_seq_slots(p, *seq, 0, 0, 1, &slot));
    return slot;
}

/* Worker A: writes a token, shows that its own mapping is read-only, says so, and waits. */
static void tenant_a(const char *url, const char *pipes)
{
    int out, in, fd;
    assert_int_equal(sscanf(pipes, "%d,%d", &out, &in), 2);
    become(UID_A);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "ro", 0);
    ts_seq seq;
    ts_kv kv;
    ts_handle_reply reply;
    uint64_t slot = write_token(p, &seq);
    OK(ts_slot_kv(p, slot, 0, &kv));
    assert_true(((float *)kv.k)[0] == 42.0f);
    OK(ts_seq_keep(p, seq, "secret"));

    OK(ts_handle_get(c, TS_HANDLE_SLAB, p->index, 0, false, &reply, &fd));
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    assert_int_equal(open(path, O_RDWR), -1); /* not even its own for writing */
    assert_int_equal(errno, EACCES);
    assert_int_equal(fchmod(fd, 0600), -1);
    assert_ptr_equal(mmap(NULL, reply.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0),
                     MAP_FAILED);
    void *map = mmap(NULL, reply.bytes, PROT_READ, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(map, MAP_FAILED);
    assert_int_equal(mprotect(map, reply.bytes, PROT_READ | PROT_WRITE), -1);
    assert_int_equal(write(fd, "x", 1), -1);
    assert_int_equal(ftruncate(fd, 0), -1);
    assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
    char told[64], byte;
    int n = snprintf(told, sizeof told, "%d %d", (int)getpid(), fd);
    assert_int_equal(write(out, told, (size_t)n), n);
    assert_int_equal(read(in, &byte, 1), 0); /* until the parent has closed it */
    ts_pool_close(p);
    ts_disconnect(c);
}

/* Worker B: tries to get at A's. */
static void tenant_b(const char *url, const char *what)
{
    int pid, fd, got;
    ts_handle_reply reply;
    ts_seq seq;
    assert_int_equal(sscanf(what, "%d %d", &pid, &fd), 2);
    become(UID_B);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "ro", 0);
    assert_int_equal(ts_seq_attach(p, "secret", &seq, NULL), TS_ENOENT);
    assert_int_equal(ts_handle_get(c, TS_HANDLE_SLAB, p->index, 0, false, &reply, &got), TS_EPERM);
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
    assert_int_equal(open(path, O_RDONLY), -1);
    assert_int_equal(errno, EACCES);
    /* Its own token lies in another slab. */
    uint64_t slot = write_token(p, &seq);
    assert_int_not_equal(slot / 4 / p->slab_blocks, 0);
    OK(ts_handle_get(c, TS_HANDLE_SLAB, p->index, (uint32_t)(slot / 4 / p->slab_blocks), false,
                     &reply, &got));
    ts_pool_close(p);
    ts_disconnect(c);
}

static void neither_of_two_uids_reaches_the_others_slabs(void **state)
{
    (void)state;
    if (getuid() != 0)
        skip();
    daemon_process d;
    static const char *const more[] = {"--set", "socket_mode=0666", NULL};
    daemon_start_with(&d, POOL_RO, more);
    int out[2], in[2];
    char pipes[32], told[64] = "";
    assert_int_equal(pipe(out), 0);
    assert_int_equal(pipe(in), 0);
    fcntl(in[1], F_SETFD, FD_CLOEXEC);
    snprintf(pipes, sizeof pipes, "%d,%d", out[1], in[0]);
    pid_t a = spawn("a", d.url, pipes);
    close(out[1]);
    assert_true(read(out[0], told, sizeof told - 1) > 0);
    pid_t b = spawn("b", d.url, told);
    join_child(b);
    close(in[1]);
    join_child(a);
    close(out[0]);
    close(in[0]);
    daemon_stop(&d);
}

/* A sequence of 32 tokens, and where their K and V lie. */
static ts_seq take_slots(ts_pool *p, ts_kv kv[32])
{
    ts_seq seq;
    uint64_t slots[32];
    uint32_t n = 32;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_append(p, &seq, &n, 1, slots));
    for (int t = 0; t < 32; t++)
        OK(ts_slot_kv(p, slots[t], 0, &kv[t]));
    return seq;
}

/* Worker: fills the whole pool with 42s, frees it, and keeps its mapping while another tenant
 * writes. */
static void former_owner(const char *url, const char *pipes)
{
    int out, in;
    char byte;
    assert_int_equal(sscanf(pipes, "%d,%d", &out, &in), 2);
    become(UID_A);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "rw", TS_POOL_WRITABLE);
    ts_kv kv[32];
    ts_seq seq = take_slots(p, kv);
    for (int t = 0; t < 32; t++)
        ((float *)kv[t].k)[0] = ((float *)kv[t].v)[0] = 42.0f;
    OK(ts_seq_free(p, &seq, 1));
    assert_int_equal(write(out, "f", 1), 1);
    assert_int_equal(read(in, &byte, 1), 0); /* the other has written by now */
    for (int t = 0; t < 32; t++) {
        assert_true(((float *)kv[t].k)[0] == 0.0f);
        ((float *)kv[t].k)[0] = 13.0f; /* and what is written here reaches nobody */
    }
    ts_pool_close(p);
    ts_disconnect(c);
}

/* Worker: gets the same slabs; must find zeros, and keep what it writes. */
static void next_owner(const char *url, const char *pipes)
{
    int out, in;
    char byte;
    assert_int_equal(sscanf(pipes, "%d,%d", &out, &in), 2);
    become(UID_B);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "rw", TS_POOL_WRITABLE);
    ts_kv kv[32];
    (void)take_slots(p, kv);
    for (int t = 0; t < 32; t++) {
        for (int i = 0; i < 32; i++)
            assert_true(((float *)kv[t].k)[i] == 0.0f && ((float *)kv[t].v)[i] == 0.0f);
        ((float *)kv[t].k)[0] = 77.0f;
    }
    assert_int_equal(write(out, "w", 1), 1);
    assert_int_equal(read(in, &byte, 1), 0); /* the former owner has looked and scribbled */
    for (int t = 0; t < 32; t++)
        assert_true(((float *)kv[t].k)[0] == 77.0f);
    ts_pool_close(p);
    ts_disconnect(c);
}

static void a_slab_is_wiped_before_the_next_tenant_gets_it(void **state)
{
    (void)state;
    if (getuid() != 0)
        skip();
    daemon_process d;
    static const char *const more[] = {"--set", "socket_mode=0666", NULL};
    daemon_start_with(&d, POOL_RW, more);
    int out[2], first[2], second[2];
    char pipes[32], byte;
    assert_int_equal(pipe(out), 0);
    assert_int_equal(pipe(first), 0);
    assert_int_equal(pipe(second), 0);
    fcntl(first[1], F_SETFD, FD_CLOEXEC);
    fcntl(second[1], F_SETFD, FD_CLOEXEC);
    snprintf(pipes, sizeof pipes, "%d,%d", out[1], first[0]);
    pid_t a = spawn("former", d.url, pipes);
    assert_int_equal(read(out[0], &byte, 1), 1);
    snprintf(pipes, sizeof pipes, "%d,%d", out[1], second[0]);
    pid_t b = spawn("next", d.url, pipes);
    close(out[1]);
    assert_int_equal(read(out[0], &byte, 1), 1);
    close(first[1]);
    join_child(a);
    close(second[1]);
    join_child(b);
    close(out[0]);
    close(first[0]);
    close(second[0]);
    daemon_stop(&d);
}

/* ---- descriptors that are kept ---- */

#define KEPT_SLABS 16 /* of POOL_RO: all that it has */

/* Takes the whole pool, notes its slabs' descriptors where they are wanted, and frees all. */
static void take_all(ts_pool *p, int *fds)
{
    ts_seq seq;
    ts_step *step;
    ts_handle_reply reply;
    uint32_t n = 64 * 4;
    assert_int_equal(p->num_slabs, KEPT_SLABS);
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    for (uint32_t i = 0; fds != NULL && i < KEPT_SLABS; i++)
        OK(ts_handle_get(p->client, TS_HANDLE_SLAB, p->index, i, false, &reply, &fds[i]));
    OK(ts_step_abort(step));
    OK(ts_seq_free(p, &seq, 1));
}

/* How much memory is behind the descriptors. */
static uint64_t memory_of(const int *fds)
{
    uint64_t bytes = 0;
    for (int i = 0; i < KEPT_SLABS; i++) {
        struct stat about;
        assert_int_equal(fstat(fds[i], &about), 0);
        bytes += (uint64_t)about.st_blocks * 512;
    }
    return bytes;
}

static void close_all(const int *fds)
{
    for (int i = 0; i < KEPT_SLABS; i++)
        close(fds[i]);
}

/* Worker: takes the whole pool and lets go of it. */
static void passer_by(const char *url, const char *argument)
{
    (void)argument;
    become(UID_B);
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "ro", 0);
    take_all(p, NULL);
    ts_pool_close(p);
    ts_disconnect(c);
}

static void order(ts_client *c, Tspb__Request *request)
{
    Tspb__Reply *reply;
    ts_status status = ts_call(c, request, &reply);
    if (status != TS_OK)
        fail_msg("%s", ts_error(c));
    tspb__reply__free_unpacked(reply, NULL);
}

static void whoever_keeps_descriptors_keeps_no_memory(void **state)
{
    (void)state;
    if (getuid() != 0)
        skip();
    daemon_process d;
    int fds[KEPT_SLABS];
    daemon_start_with(&d, POOL_RO, (const char *const[]){"--set", "socket_mode=0666", NULL});
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "ro", 0);
    take_all(p, fds);
    const uint64_t all = memory_of(fds);
    assert_true(all >= KEPT_SLABS * 4096);
    join_child(spawn("passer-by", d.url, "")); /* the slabs become another tenant's */
    assert_int_equal(memory_of(fds), 0);
    close_all(fds);
    take_all(p, fds);
    Tspb__AdminPoolResize resize = TSPB__ADMIN_POOL_RESIZE__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_POOL_RESIZE;
    request.admin_pool_resize = &resize;
    resize.pool = ts_unconst("ro");
    resize.memory = ts_unconst("32K");
    order(c, &request);
    assert_int_equal(memory_of(fds), all / 2);
    ts_pool_close(p);
    Tspb__AdminPoolDelete delete = TSPB__ADMIN_POOL_DELETE__INIT;
    request.body_case = TSPB__REQUEST__BODY_ADMIN_POOL_DELETE;
    request.admin_pool_delete = &delete;
    delete.pool = ts_unconst("ro");
    order(c, &request);
    assert_int_equal(memory_of(fds), 0);
    close_all(fds);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void who_may_not_connect_is_told_why(void **state)
{
    (void)state;
    if (getuid() != 0)
        skip();
    daemon_process d;
    daemon_start(&d, POOL_RO); /* socket_mode = 0660 */
    pid_t stranger = spawn("stranger", d.url, "");
    join_child(stranger);
    daemon_stop(&d);
}

static void stranger(const char *url, const char *argument)
{
    (void)argument;
    ts_client *c;
    char expected[256];
    struct stat about;
    assert_int_equal(stat(url, &about), 0);
    const struct group *group = getgrgid(about.st_gid);
    assert_non_null(group);
    become(UID_B);
    assert_int_equal(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = url}, &c),
                     TS_EPERM);
    snprintf(expected, sizeof expected,
             "may not connect to %s: is uid %d in the daemon's group (%s)?", url, UID_B,
             group->gr_name);
    assert_string_equal(ts_error(c), expected);
    ts_disconnect(c);
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {
        {"a", tenant_a},      {"b", tenant_b},        {"former", former_owner},
        {"next", next_owner}, {"stranger", stranger}, {"passer-by", passer_by},
    };
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(neither_of_two_uids_reaches_the_others_slabs),
        cmocka_unit_test(a_slab_is_wiped_before_the_next_tenant_gets_it),
        cmocka_unit_test(whoever_keeps_descriptors_keeps_no_memory),
        cmocka_unit_test(who_may_not_connect_is_told_why),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
