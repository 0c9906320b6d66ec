/*
 * Taking all pages of shared memory (a memfd) at once, so that none is wanting later, which would
 * be a SIGBUS.
 */
#ifndef TS_FILE_PAGES_H
#define TS_FILE_PAGES_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>

#define TS_PAGES_PIECE ((uint64_t)4 << 20)

/*
 * Takes the file's first `bytes`, piece by piece; 0, or an errno. A signal that comes meanwhile
 * makes many kernels undo what they have taken (6.18 doesn't): under a profiler, which sends one
 * every few milliseconds, all at once would never be done. So signals wait for a piece's end; those
 * that can't (a debugger's, or a container's pause) cost a piece. Needs _GNU_SOURCE.
 */
static inline int ts_file_take_pages(int fd, uint64_t bytes)
{
    int error = 0;
    for (uint64_t at = 0; at < bytes && error == 0;) {
        const uint64_t left = bytes - at, piece = left < TS_PAGES_PIECE ? left : TS_PAGES_PIECE;
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        error = fallocate(fd, 0, (off_t)at, (off_t)piece) == 0 ? 0 : errno;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (error == 0)
            at += piece;
        else if (error == EINTR)
            error = 0;
    }
    return error;
}

#endif
