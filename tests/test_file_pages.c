/* Pages of shared memory, taken under a kernel that undoes what a signal interrupts. */
#define _GNU_SOURCE
#include "test_util.h"

#include "file_pages.h"

enum { PIECES = 5, REST = 12345 };

/* What was asked of the kernel that stands for the system's. */
static struct {
    uint64_t taken; /* bytes, one piece behind the other */
    uint32_t calls, interrupted, fails_at;
} kernel;

/* Each second call comes to a signal that can't wait; one that can would come to each. */
int fallocate(int fd, int mode, off_t at, off_t bytes)
{
    sigset_t now;
    assert_int_equal(fd, 7);
    assert_int_equal(mode, 0);
    assert_int_equal(at, kernel.taken);
    assert_in_range(bytes, 1, TS_PAGES_PIECE);
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    assert_int_equal(sigismember(&now, SIGPROF), 1);
    assert_int_equal(sigismember(&now, SIGINT), 1);
    errno = ++kernel.calls == kernel.fails_at ? ENOSPC : EINTR;
    if (kernel.calls == kernel.fails_at)
        return -1;
    if (kernel.calls % 2 == 0) {
        kernel.interrupted++;
        return -1;
    }
    kernel.taken += (uint64_t)bytes;
    return 0;
}

static void assert_signals_come(void)
{
    sigset_t now;
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    assert_int_equal(sigismember(&now, SIGPROF), 0);
}

static void pages_are_taken_piece_by_piece_whatever_interrupts(void **state)
{
    (void)state;
    const uint64_t bytes = PIECES * TS_PAGES_PIECE + REST;
    assert_int_equal(ts_file_take_pages(7, bytes), 0);
    assert_int_equal(kernel.taken, bytes);
    assert_int_equal(kernel.interrupted, PIECES);
    assert_signals_come();
}

static void what_the_kernel_refuses_is_told(void **state)
{
    (void)state;
    memset(&kernel, 0, sizeof kernel);
    kernel.fails_at = 3;
    assert_int_equal(ts_file_take_pages(7, PIECES * TS_PAGES_PIECE), ENOSPC);
    assert_int_equal(kernel.calls, 3);
    assert_signals_come();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_are_taken_piece_by_piece_whatever_interrupts),
        cmocka_unit_test(what_the_kernel_refuses_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
