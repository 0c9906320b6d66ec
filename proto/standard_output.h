/*
 * A program's standard output, which may be a file or a pipe that takes no more. What a command
 * printed and nobody got is a failure of the command. Needs _GNU_SOURCE.
 *
 * Thread: the one that begins main.
 */
#ifndef TS_STANDARD_OUTPUT_H
#define TS_STANDARD_OUTPUT_H

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static inline void ts_output_close(void)
{
    const int failed_before = ferror(stdout);
    const int error = fclose(stdout) == 0 ? 0 : errno;
    if (!failed_before && error == 0)
        return;
    fprintf(stderr, "%s: standard output can't be written: %s\n", program_invocation_short_name,
            error != 0 ? strerror(error) : "part of it is lost");
    _exit(EXIT_FAILURE);
}

/* Where the program was begun without one of its standard descriptors, another file would get its
 * number, and what is printed. Then it gets one whose reads, or writes, fail. */
static inline void ts_output_keep_descriptors(void)
{
    for (int fd = 0; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 &&
            open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
            _exit(EXIT_FAILURE);
}

/* For the beginning of main. When the program exits, closes standard output: if not all could be
 * written, standard error says so, and the exit status is 1. */
static inline void ts_output_begin(void)
{
    ts_output_keep_descriptors();
    if (atexit(ts_output_close) == 0)
        return;
    fprintf(stderr, "%s: out of memory\n", program_invocation_short_name);
    exit(EXIT_FAILURE);
}

#endif
