/*
 * Why a file that should grow didn't: errno's text, and where it grew beyond the process's limit on
 * files' sizes, that limit. Shared memory is files, too. SIGXFSZ must be ignored, or it ends the
 * process before there is anything to say.
 */
#ifndef TS_FILE_ERROR_H
#define TS_FILE_ERROR_H

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#define TS_FILE_ERROR_BYTES 128

static inline const char *ts_file_error(int error, char text[TS_FILE_ERROR_BYTES])
{
    struct rlimit limit;
    if (error == EFBIG && getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
        snprintf(text, TS_FILE_ERROR_BYTES,
                 "%s: the limit for a file of this process is %llu bytes (ulimit -f, LimitFSIZE=)",
                 strerror(error), (unsigned long long)limit.rlim_cur);
    else
        snprintf(text, TS_FILE_ERROR_BYTES, "%s", strerror(error));
    return text;
}

#endif
