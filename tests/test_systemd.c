/* What the daemon tells systemd, through a notify socket of the test's own. */
#define _GNU_SOURCE
#include "daemon_util.h"

#include <sys/socket.h>
#include <sys/un.h>

/* The next message that begins with this; others are skipped. */
static void expect(int fd, const char *beginning, char *text, size_t bytes)
{
    ssize_t n;
    do {
        n = recv(fd, text, bytes - 1, 0);
        assert_true(n > 0);
        text[n] = '\0';
    } while (strncmp(text, beginning, strlen(beginning)) != 0);
}

static void systemd_hears_of_readiness_life_and_end(void **state)
{
    (void)state;
    char folder[] = "/tmp/tinyserve-notify.XXXXXX", text[512];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    daemon_process d;
    assert_non_null(mkdtemp(folder));
    snprintf(address.sun_path, sizeof address.sun_path, "%s/notify", folder);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    setenv("NOTIFY_SOCKET", address.sun_path, 1);
    setenv("WATCHDOG_USEC", "30000", 1);
    daemon_start(&d, POOL_TINY ",blocks=16");
    expect(fd, "READY=1", text, sizeof text);
    ts_client *c = connect_to(&d);
    expect(fd, "WATCHDOG=1", text, sizeof text);
    expect(fd, "STATUS=1 sessions, 0 open steps, 0 of 16 blocks used in 1 pools", text,
           sizeof text);
    expect(fd, "WATCHDOG=1", text, sizeof text);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    ts_step *s;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &(uint32_t){20}, 1, NULL, &s));
    expect(fd, "STATUS=1 sessions, 1 open steps, 2 of 16 blocks used in 1 pools", text,
           sizeof text);
    OK(ts_step_abort(s));
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
    expect(fd, "STOPPING=1", text, sizeof text);
    close(fd);
    unlink(address.sun_path);
    assert_int_equal(rmdir(folder), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(systemd_hears_of_readiness_life_and_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
