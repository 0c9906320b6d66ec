#define _GNU_SOURCE
#include "filled_memory.h"

#include "file_error.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

ts_status ts_filling_new(ts_filling *f, uint64_t bytes, char *why, size_t why_bytes)
{
    char error[TS_FILE_ERROR_BYTES];
    ts_filling_end(f);
    f->fd = memfd_create("tinyserve", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (f->fd >= 0 && fchmod(f->fd, 0400) == 0 && ftruncate(f->fd, (off_t)bytes) == 0 &&
        fcntl(f->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0) {
        f->bytes = bytes;
        return TS_OK;
    }
    snprintf(why, why_bytes, "shared memory of %llu bytes: %s", (unsigned long long)bytes,
             ts_file_error(errno, error));
    if (f->fd >= 0)
        close(f->fd);
    return TS_ENOMEM;
}

void ts_filling_end(ts_filling *f)
{
    if (f->bytes > 0)
        close(f->fd);
    f->bytes = 0;
}

/* Keeps what is mapped writable, and refuses to free pages. Linux before 5.1 can't do that. */
static bool seal(int fd, bool outlives)
{
    if (outlives)
        return fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL) == 0;
    return fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) == 0 ||
           (errno == EINVAL && fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL) == 0);
}

/* Seals the mapped memory. */
static ts_status seal_and_check(int fd, bool outlives, const char *what, char *why,
                                size_t why_bytes)
{
    struct stat about;
    if (!seal(fd, outlives) || fstat(fd, &about) != 0) {
        snprintf(why, why_bytes, "%s can't be sealed: the client has sealed it", what);
        return TS_EINVAL;
    }
    if (about.st_blocks * 512 < about.st_size) {
        snprintf(why, why_bytes,
                 "of %s's %lld bytes %lld are there: the client must allocate all of them", what,
                 (long long)about.st_size, (long long)about.st_blocks * 512);
        return TS_EINVAL;
    }
    return TS_OK;
}

bool ts_filled_is_whole(int fd)
{
    struct stat about;
    return fstat(fd, &about) == 0 && about.st_blocks * 512 >= about.st_size;
}

ts_status ts_filling_take(ts_filling *f, const char *what, void **base, uint64_t *bytes, int *fd,
                          char *why, size_t why_bytes)
{
    if (fd != NULL)
        *fd = -1;
    if (f->bytes == 0) {
        snprintf(why, why_bytes, "the session has asked for no memory for %s", what);
        return TS_EINVAL;
    }
    *bytes = f->bytes;
    *base = mmap(NULL, *bytes, PROT_READ | PROT_WRITE, MAP_SHARED, f->fd, 0);
    ts_status status = TS_OK;
    if (*base == MAP_FAILED) {
        status = errno == EPERM ? TS_EINVAL : TS_ENOMEM; /* EPERM: it is sealed */
        snprintf(why, why_bytes, "mapping %s of %llu bytes: %s", what, (unsigned long long)*bytes,
                 strerror(errno));
    } else {
        status = seal_and_check(f->fd, f->outlives, what, why, why_bytes);
        if (status != TS_OK)
            munmap(*base, *bytes);
    }
    if (status == TS_OK && fd != NULL && (*fd = fcntl(f->fd, F_DUPFD_CLOEXEC, 0)) < 0) {
        snprintf(why, why_bytes, "no descriptor for %s: %s", what, strerror(errno));
        munmap(*base, *bytes);
        status = TS_ENOMEM;
    }
    ts_filling_end(f);
    return status;
}
