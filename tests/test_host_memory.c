/* Slabs of host memory: who keeps the descriptor of one, or its mapping, keeps no memory. */
#define _GNU_SOURCE
#include "test_util.h"

#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SLAB_BYTES ((size_t)64 << 10)

/* A slab as a client has it. */
typedef struct kept {
    int fd;
    unsigned char *map;
} kept;

static ts_memory *two_slabs(bool outlives)
{
    ts_memory *m;
    char why[256];
    assert_int_equal(ts_memory_host_new(2, SLAB_BYTES, &m, why, sizeof why), TS_OK);
    m->outlives = outlives;
    for (uint32_t i = 0; i < 2; i++)
        assert_int_equal(ts_memory_renew(m, i, why, sizeof why), TS_OK);
    return m;
}

/* Exports the slab, which holds 42s. */
static kept keep(ts_memory *m, uint32_t slab)
{
    kept k;
    char why[256];
    memset(m->base + slab * SLAB_BYTES, 42, SLAB_BYTES);
    assert_int_equal(ts_memory_export(m, slab, false, &k.fd, why, sizeof why), TS_OK);
    k.map = mmap(NULL, SLAB_BYTES, PROT_READ, MAP_SHARED, k.fd, 0);
    assert_ptr_not_equal(k.map, MAP_FAILED);
    assert_int_equal(k.map[SLAB_BYTES - 1], 42);
    return k;
}

static size_t bytes_of(const kept *k)
{
    struct stat about;
    assert_int_equal(fstat(k->fd, &about), 0);
    assert_int_equal(about.st_size, SLAB_BYTES);
    return (size_t)about.st_blocks * 512;
}

static void end(const kept *k)
{
    munmap(k->map, SLAB_BYTES);
    close(k->fd);
}

static void a_slab_that_is_renewed_gives_its_pages_back(void **state)
{
    (void)state;
    char why[256];
    for (int outlives = 0; outlives < 2; outlives++) {
        ts_memory *m = two_slabs(outlives);
        kept k = keep(m, 0), other = keep(m, 1);
        assert_int_equal(ts_memory_renew(m, 0, why, sizeof why), TS_OK);
        assert_int_equal(bytes_of(&k), 0);
        assert_int_equal(bytes_of(&other), SLAB_BYTES);
        memset(m->base, 13, SLAB_BYTES);
        assert_int_equal(k.map[SLAB_BYTES - 1], 0);
        assert_int_equal(other.map[0], 42);
        end(&k);
        end(&other);
        ts_memory_free(m);
    }
}

static void a_slab_that_goes_gives_its_pages_back(void **state)
{
    (void)state;
    char why[256];
    for (int outlives = 0; outlives < 2; outlives++) {
        ts_memory *m = two_slabs(outlives);
        kept k = keep(m, 1);
        assert_int_equal(ts_memory_drop(m, 1, why, sizeof why), TS_OK);
        assert_int_equal(bytes_of(&k), 0);
        assert_int_equal(k.map[0], 0);
        assert_int_equal(ts_memory_drop(m, 1, why, sizeof why), TS_OK); /* it has none */
        assert_int_equal(ts_memory_renew(m, 1, why, sizeof why), TS_OK);
        assert_int_equal(m->base[2 * SLAB_BYTES - 1], 0);
        end(&k);
        ts_memory_free(m);
    }
}

static void a_client_can_neither_write_nor_shrink_nor_seal_a_slab(void **state)
{
    (void)state;
    ts_memory *m = two_slabs(false);
    kept k = keep(m, 0);
    struct stat about;
    assert_ptr_equal(mmap(NULL, SLAB_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, k.fd, 0),
                     MAP_FAILED);
    assert_int_equal(mprotect(k.map, SLAB_BYTES, PROT_READ | PROT_WRITE), -1);
    assert_int_equal(write(k.fd, "x", 1), -1);
    assert_int_equal(ftruncate(k.fd, 0), -1);
    assert_int_equal(fallocate(k.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
    assert_int_equal(fcntl(k.fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
    assert_int_equal(fstat(k.fd, &about), 0);
    assert_int_equal(about.st_mode & 07777, 0400); /* others can't open it again */
    end(&k);
    ts_memory_free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_slab_that_is_renewed_gives_its_pages_back),
        cmocka_unit_test(a_slab_that_goes_gives_its_pages_back),
        cmocka_unit_test(a_client_can_neither_write_nor_shrink_nor_seal_a_slab),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
