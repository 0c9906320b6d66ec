/*
 * Places where a test ends the daemon. The daemon itself has nothing there: only a program that a
 * test links with a ts_test_point of its own does.
 *
 * Thread: any.
 */
#ifndef TS_TEST_POINT_H
#define TS_TEST_POINT_H

#include <stddef.h>

void ts_test_point(const char *name, unsigned what) __attribute__((weak));

/* `what`: more of where it is, such as the operation. */
static inline void ts_point(const char *name, unsigned what)
{
    if (ts_test_point != NULL)
        ts_test_point(name, what);
}

#endif
