/*
 * --wait, which several programs have: how long they wait for a daemon to appear. A row of a
 * program's options, and what its parser makes of the argument.
 *
 * Thread: the one that parses the command line.
 */
#ifndef TS_WAIT_OPTION_H
#define TS_WAIT_OPTION_H

#include <argp.h>
#include <stdint.h>
#include <stdlib.h>

#define TS_WAIT_OPTION(key)                                                                        \
    {                                                                                              \
        "wait", key, "SECONDS", 0, "How long to wait for a daemon to appear (default 0)", 0        \
    }

/* The milliseconds that the argument names; one that names none ends the program. */
static inline uint32_t ts_wait_option(const char *arg, struct argp_state *state)
{
    char *end;
    const double seconds = strtod(arg, &end);
    if (end == arg || *end != '\0' || !(seconds >= 0 && seconds <= 3600))
        argp_error(state, "--wait %s: 0 to 3600 seconds are possible", arg);
    return (uint32_t)(seconds * 1000);
}

#endif
