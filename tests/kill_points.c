/*
 * Ends the daemon at a place of test_point.h. TS_TEST_KILL=NAME:N kills it at its Nth time there:
 * only the first daemon under a supervisor, so that the next one can go on, or the one after
 * TS_TEST_DEATHS others; TS_TEST_STOP=NAME:N stops the first one there until somebody else kills
 * it, and if TS_TEST_PART is set ends its handle connections before. TS_TEST_CRASH=NAME or
 * NAME/WHAT has every daemon crash whenever it comes there. TS_TEST_FAIL=NAME: what is there fails
 * in the daemon after the first one.
 */
#include "test_point.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>

/* It dies with its parent, the supervisor or the test: one that was aborted leaves none behind. */
static void __attribute__((constructor)) die_with_parent(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static bool is(const char *wanted, const char *name, unsigned what)
{
    char both[64];
    snprintf(both, sizeof both, "%s/%u", name, what);
    return wanted != NULL && (strcmp(wanted, name) == 0 || strcmp(wanted, both) == 0);
}

/* A daemon that dies with a GPU's context closes its sockets one by one, over 0.2 s. */
static void end_handle_connections(void)
{
    for (int fd = 3; fd < 1024; fd++) {
        int type = 0, listens = 1;
        socklen_t bytes = sizeof type;
        if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &bytes) == 0 && type == SOCK_SEQPACKET &&
            getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &bytes) == 0 && !listens)
            (void)shutdown(fd, SHUT_RDWR);
    }
}

/* Whether `wanted` daemons have died before this one; NULL: none. */
static bool comes_after(const char *wanted)
{
    const char *deaths = getenv("TINYSERVE_DEATHS");
    return strcmp(deaths == NULL ? "0" : deaths, wanted == NULL ? "0" : wanted) == 0;
}

bool ts_test_fails(const char *name)
{
    return is(getenv("TS_TEST_FAIL"), name, 0) && comes_after("1");
}

void ts_test_point(const char *name, unsigned what)
{
    static atomic_long left = -1;
    static char wanted[64];
    static int action = SIGKILL;
    if (atomic_load(&left) == -1) { /* at the first command, which comes before all else */
        const char *kill_at = comes_after(getenv("TS_TEST_DEATHS")) ? getenv("TS_TEST_KILL") : NULL;
        if (kill_at == NULL && comes_after("0")) {
            kill_at = getenv("TS_TEST_STOP");
            action = SIGSTOP;
        }
        const char *colon = kill_at == NULL ? NULL : strchr(kill_at, ':');
        if (colon != NULL)
            snprintf(wanted, sizeof wanted, "%.*s", (int)(colon - kill_at), kill_at);
        atomic_store(&left, colon == NULL ? 0 : atol(colon + 1));
    }
    if (is(getenv("TS_TEST_CRASH"), name, what))
        (void)raise(SIGSEGV);
    if (is(wanted, name, what) && atomic_load(&left) > 0 && atomic_fetch_sub(&left, 1) == 1) {
        if (getenv("TS_TEST_PART") != NULL)
            end_handle_connections();
        (void)raise(action); /* before this thread does anything more */
    }
}
