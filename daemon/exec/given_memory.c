#define _GNU_SOURCE
#include "given_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define PAGE 4096
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

static ts_status __attribute__((format(printf, 3, 4)))
refuse(char *why, size_t why_bytes, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(why, why_bytes, format, args);
    va_end(args);
    return TS_EINVAL;
}

static ts_status no_memfd(const char *what, char *why, size_t why_bytes)
{
    return refuse(why, why_bytes, "%s must be a memfd that can be written and sealed", what);
}

/* Whether its length, which it keeps now, is right. */
static ts_status check_length(int fd, const char *what, uint64_t least, uint64_t *bytes, char *why,
                              size_t why_bytes)
{
    struct stat about;
    if (fstat(fd, &about) != 0)
        return no_memfd(what, why, why_bytes);
    if ((uint64_t)about.st_size < least || about.st_size % PAGE != 0)
        return refuse(why, why_bytes,
                      "%s has %lld bytes; it must have a multiple of %d, at least %llu", what,
                      (long long)about.st_size, PAGE, (unsigned long long)least);
    *bytes = (uint64_t)about.st_size;
    return TS_OK;
}

/* Whether its pages, which nobody can take away now, are there. */
static ts_status check_pages(int fd, const char *what, char *why, size_t why_bytes)
{
    struct stat about;
    if (fstat(fd, &about) != 0)
        return no_memfd(what, why, why_bytes);
    if (about.st_blocks * 512 < about.st_size)
        return refuse(why, why_bytes,
                      "of %s's %lld bytes %lld are there: its maker must allocate all of them",
                      what, (long long)about.st_size, (long long)about.st_blocks * 512);
    return TS_OK;
}

/* Keeps what is mapped writable, and refuses to free pages. Linux before 5.1 can't do that. */
static bool seal_pages(int fd)
{
    return fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) == 0 ||
           (errno == EINVAL && fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL) == 0);
}

ts_status ts_given_map(int fd, const char *what, uint64_t least, void **base, uint64_t *bytes,
                       char *why, size_t why_bytes)
{
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
        return no_memfd(what, why, why_bytes);
    ts_status status = check_length(fd, what, least, bytes, why, why_bytes);
    if (status != TS_OK)
        return status;
    *base = mmap(NULL, *bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (*base == MAP_FAILED && errno == EPERM)
        return no_memfd(what, why, why_bytes);
    if (*base == MAP_FAILED) {
        snprintf(why, why_bytes, "mapping %s of %llu bytes: %s", what, (unsigned long long)*bytes,
                 strerror(errno));
        return TS_ENOMEM;
    }
    status =
        seal_pages(fd) ? check_pages(fd, what, why, why_bytes) : no_memfd(what, why, why_bytes);
    if (status != TS_OK)
        munmap(*base, *bytes);
    return status;
}
