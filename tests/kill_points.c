/*
 * Ends the daemon by SIGKILL at a place of test_point.h: TS_TEST_KILL=NAME:N, at its Nth time. Only
 * the first daemon under a supervisor is ended, so that the next one can go on.
 */
#include "test_point.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void ts_test_point(const char *name)
{
    static atomic_long left = -1;
    static const char *wanted;
    static size_t length;
    if (atomic_load(&left) == -1) { /* at the first command, which comes before all else */
        const char *deaths = getenv("TINYSERVE_DEATHS"), *kill_at = getenv("TS_TEST_KILL");
        const char *colon = kill_at == NULL ? NULL : strchr(kill_at, ':');
        const int first = deaths == NULL || strcmp(deaths, "0") == 0;
        wanted = kill_at;
        length = colon == NULL ? 0 : (size_t)(colon - kill_at);
        atomic_store(&left, colon == NULL || !first ? 0 : atol(colon + 1));
    }
    if (length > 0 && strlen(name) == length && memcmp(name, wanted, length) == 0 &&
        atomic_load(&left) > 0 && atomic_fetch_sub(&left, 1) == 1)
        (void)kill(getpid(), SIGKILL);
}
