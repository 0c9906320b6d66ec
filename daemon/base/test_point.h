/*
 * Places where a test ends the daemon, or has something fail for want of memory. The daemon itself
 * has nothing there: only a program that a test links with functions of its own does.
 *
 * Thread: any.
 */
#ifndef TS_TEST_POINT_H
#define TS_TEST_POINT_H

#include <stdbool.h>
#include <stddef.h>

void ts_test_point(const char *name, unsigned what) __attribute__((weak));
bool ts_test_fails(const char *name) __attribute__((weak));

/* `what`: more of where it is, such as the operation. */
static inline void ts_point(const char *name, unsigned what)
{
    if (ts_test_point != NULL)
        ts_test_point(name, what);
}

static inline bool ts_point_fails(const char *name)
{
    return ts_test_fails != NULL && ts_test_fails(name);
}

#endif
