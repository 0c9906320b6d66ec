/* Programs that are run as a shell runs them, and what they print. */
#ifndef TS_COMMAND_UTIL_H
#define TS_COMMAND_UTIL_H

#include "test_util.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

/* Runs a shell command; its output (stdout and stderr) as far as there is room, its exit status. */
static inline int run(char *output, size_t bytes, const char *format, ...)
{
    char command[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    strncat(command, " 2>&1", sizeof command - strlen(command) - 1);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    size_t n = fread(output, 1, bytes - 1, f);
    output[n] = '\0';
    while (fgetc(f) != EOF) /* else the command may be ended by a signal */
        ;
    int status = pclose(f);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static inline void assert_has(const char *text, const char *part)
{
    if (strstr(text, part) == NULL)
        fail_msg("'%s' is missing in:\n%s", part, text);
}

#endif
