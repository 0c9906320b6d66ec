/*
 * Slabs as memfds. The size is sealed, so no holder of a descriptor can shrink the file under the
 * daemon. The file's mode is 0400: a receiver that is neither the daemon's user nor root can't open
 * its read-only descriptor again for writing through /proc.
 *
 * F_SEAL_FUTURE_WRITE, which forbids writing to everybody, isn't used: it forbids to free pages,
 * too. A client that keeps a descriptor or a mapping would keep the pages of slabs that aren't its
 * any more, and so any amount of the daemon's memory.
 *
 * Their pages lie on all NUMA nodes in turn. Whoever takes them all at once would have them on its
 * own node otherwise, and all processors would read from there.
 */
#define _GNU_SOURCE
#include "memory.h"

#include "file_error.h"
#include "file_pages.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct memory_host {
    ts_memory memory;
    int fds[]; /* -1: not backed */
} memory_host;

static ts_status fail(ts_status status, char *why, size_t why_bytes, const char *what, size_t bytes)
{
    char error[TS_FILE_ERROR_BYTES];
    snprintf(why, why_bytes, "%s of %zu bytes failed: %s", what, bytes,
             ts_file_error(errno, error));
    return status;
}

/* A memfd of `bytes`, which stay its size, that nobody else may open for writing. */
static int memfd_new(const char *name, size_t bytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    if (fchmod(fd, 0400) != 0 || ftruncate(fd, (off_t)bytes) != 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

/* Pages of the file that are taken from now on come from the nodes that this process may use, in
 * turn. Where the system knows no nodes, or forbids it, they come from wherever they come. */
static void interleave(int fd, size_t bytes)
{
    enum { NODES = 1024, BITS = 8 * sizeof(long) };
    unsigned long nodes[NODES / BITS];
    if (syscall(SYS_get_mempolicy, NULL, nodes, (unsigned long)NODES, NULL, MPOL_F_MEMS_ALLOWED) !=
        0)
        return;
    /* The policy is the file's, whoever maps it. */
    void *address = mmap(NULL, bytes, PROT_NONE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED)
        return;
    (void)syscall(SYS_mbind, address, bytes, MPOL_INTERLEAVE, nodes, NODES + 1ul, 0u);
    munmap(address, bytes);
}

/* Gives the file's pages back to the system, whoever has it open or mapped. */
static ts_status give_pages_back(int fd, size_t bytes, char *why, size_t why_bytes)
{
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes) == 0)
        return TS_OK;
    return fail(TS_ENOMEM, why, why_bytes, "giving a slab back", bytes);
}

static ts_status host_renew(ts_memory *m, uint32_t slab, char *why, size_t why_bytes)
{
    memory_host *host = (memory_host *)m;
    int fd = memfd_new("tinyserve-slab", m->slab_bytes);
    if (fd < 0)
        return fail(TS_ENOMEM, why, why_bytes, "memfd for a slab", m->slab_bytes);

    interleave(fd, m->slab_bytes);
    /* Take the pages now: a full /dev/shm or cgroup is an error here and a SIGBUS later. */
    errno = ts_file_take_pages(fd, m->slab_bytes);
    if (errno != 0) {
        ts_status status = fail(TS_ENOMEM, why, why_bytes, "taking a slab", m->slab_bytes);
        close(fd);
        return status;
    }
    void *address = m->base + (size_t)slab * m->slab_bytes;
    if (mmap(address, m->slab_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
        MAP_FAILED) {
        ts_status status = fail(TS_ENOMEM, why, why_bytes, "mapping a slab", m->slab_bytes);
        close(fd);
        return status;
    }
    const int old = host->fds[slab];
    ts_status status = old < 0 ? TS_OK : give_pages_back(old, m->slab_bytes, why, why_bytes);
    if (status != TS_OK && mmap(address, m->slab_bytes, PROT_READ | PROT_WRITE,
                                MAP_SHARED | MAP_FIXED, old, 0) != MAP_FAILED) {
        close(fd); /* it is as it was */
        return status;
    }
    if (old >= 0)
        close(old);
    host->fds[slab] = fd;
    return TS_OK;
}

static ts_status host_adopt(ts_memory *m, uint32_t slab, int fd, char *why, size_t why_bytes)
{
    memory_host *host = (memory_host *)m;
    struct stat about;
    if (fstat(fd, &about) != 0) {
        snprintf(why, why_bytes, "a slab's descriptor: %s", strerror(errno));
        close(fd);
        return TS_EINVAL;
    }
    if ((size_t)about.st_size != m->slab_bytes) {
        snprintf(why, why_bytes, "a descriptor of %lld bytes for a slab of %zu",
                 (long long)about.st_size, m->slab_bytes);
        close(fd);
        return TS_EINVAL;
    }
    if (mmap(m->base + (size_t)slab * m->slab_bytes, m->slab_bytes, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        ts_status status = fail(TS_ENOMEM, why, why_bytes, "mapping a slab", m->slab_bytes);
        close(fd);
        return status;
    }
    if (host->fds[slab] >= 0)
        close(host->fds[slab]);
    host->fds[slab] = fd;
    return TS_OK;
}

ts_status ts_memory_adopt(ts_memory *m, uint32_t slab, int fd, char *why, size_t why_bytes)
{
    if (m->ops->adopt != NULL && slab < m->num_slabs)
        return m->ops->adopt(m, slab, fd, why, why_bytes);
    snprintf(why, why_bytes, "slab %u of %s memory can't outlive its maker", slab, m->ops->name);
    close(fd);
    return TS_EDEVICE;
}

static ts_status host_drop(ts_memory *m, uint32_t slab, char *why, size_t why_bytes)
{
    memory_host *host = (memory_host *)m;
    if (host->fds[slab] < 0)
        return TS_OK;
    ts_status status = give_pages_back(host->fds[slab], m->slab_bytes, why, why_bytes);
    if (mmap(m->base + (size_t)slab * m->slab_bytes, m->slab_bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
        status = fail(TS_ENOMEM, why, why_bytes, "unmapping a slab", m->slab_bytes);
    if (status != TS_OK)
        return status;
    close(host->fds[slab]);
    host->fds[slab] = -1;
    return TS_OK;
}

static ts_status host_export(ts_memory *m, uint32_t slab, bool writable, int *fd, char *why,
                             size_t why_bytes)
{
    memory_host *host = (memory_host *)m;
    if (slab >= m->num_slabs || host->fds[slab] < 0) {
        snprintf(why, why_bytes, "slab %u has no memory; the pool has %u slabs", slab,
                 m->num_slabs);
        return TS_ENOENT;
    }
    if (writable) {
        *fd = fcntl(host->fds[slab], F_DUPFD_CLOEXEC, 0);
    } else {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", host->fds[slab]);
        *fd = open(path, O_RDONLY | O_CLOEXEC);
    }
    if (*fd < 0)
        return fail(TS_ENOMEM, why, why_bytes, "a descriptor for a slab", m->slab_bytes);
    return TS_OK;
}

static void host_free(ts_memory *m)
{
    memory_host *host = (memory_host *)m;
    munmap(m->base, m->slab_bytes * m->num_slabs);
    for (uint32_t i = 0; i < m->num_slabs; i++)
        if (host->fds[i] >= 0)
            close(host->fds[i]);
    free(host);
}

static const ts_memory_ops host_ops = {
    .name = "host",
    .renew = host_renew,
    .drop = host_drop,
    .export_fd = host_export,
    .adopt = host_adopt,
    .free = host_free,
};

ts_status ts_memory_host_new(uint32_t num_slabs, size_t slab_bytes, ts_memory **out, char *why,
                             size_t why_bytes)
{
    *out = NULL;
    memory_host *host = malloc(sizeof *host + num_slabs * sizeof host->fds[0]);
    if (host == NULL)
        return fail(TS_ENOMEM, why, why_bytes, "the slab table", num_slabs * sizeof(int));
    void *base = mmap(NULL, slab_bytes * num_slabs, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        ts_status status =
            fail(TS_ENOMEM, why, why_bytes, "reserving addresses", slab_bytes * num_slabs);
        free(host);
        return status;
    }
    host->memory = (ts_memory){.ops = &host_ops,
                               .base = base,
                               .slab_bytes = slab_bytes,
                               .export_bytes = slab_bytes,
                               .num_slabs = num_slabs};
    for (uint32_t i = 0; i < num_slabs; i++)
        host->fds[i] = -1;
    *out = &host->memory;
    return TS_OK;
}

ts_status ts_memory_shared_new(const char *name, size_t bytes, int *fd, void **address, char *why,
                               size_t why_bytes)
{
    *fd = memfd_new(name, bytes);
    if (*fd < 0)
        return fail(TS_ENOMEM, why, why_bytes, "memfd", bytes);
    *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    if (*address == MAP_FAILED) {
        ts_status status = fail(TS_ENOMEM, why, why_bytes, "mapping shared memory", bytes);
        close(*fd);
        return status;
    }
    return TS_OK;
}
