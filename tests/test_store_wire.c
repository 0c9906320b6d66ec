/* What the supervisor takes for a message. */
#include "test_util.h"

#include "store_wire.h"

/* A datagram as it would have come. */
static const char *parse(const char *text, size_t bytes, int fd, ts_store_message *m)
{
    ts_store_datagram d = {.fd = fd, .bytes = bytes};
    memcpy(d.text, text, bytes);
    return ts_store_parse(&d, m);
}

static void messages_are_read_strictly(void **state)
{
    static const char several[] = "READY=1\nMAINPID=3\nSTATUS=a=b\nSTOPPING=1\nEXIT_STATUS=3";
    ts_store_message m;
    static const struct {
        const char *text;
        int fd;
    } right[] =
        {
            {"FDSTORE=1\nFDNAME=a", 7},          {"FDNAME=a\nFDPOLL=0\nFDSTORE=1\n", 7},
            {"FDSTOREREMOVE=1\nFDNAME=a", -1},   {"BARRIER=1", 7},
            {"X_OF_OTHERS=5\nMAINPID=7", -1},    {"STATUS=", -1},
            {"STOPPING=1\nEXIT_STATUS=255", -1},
        },
      wrong[] = {
          {"", -1},
          {"\n", -1},
          {"a", -1},
          {"=", -1},
          {"STATUS=a\n\nSTATUS=b", -1},
          {"FDSTORE=0\nFDNAME=a", 7},
          {"FDSTORE=1\nFDNAME=", 7},
          {"FDSTORE=1\nFDNAME=a", -1},
          {"BARRIER=1", -1},
          {"BARRIER=1\nFDNAME=a", 7},
          {"FDSTOREREMOVE=1\nFDNAME=a", 7},
          {"EXIT_STATUS=", -1},
          {"EXIT_STATUS=-1", -1},
          {"EXIT_STATUS=256", -1},
          {"READY=0", -1},
          {"STOPPING=yes", -1},
      };
    (void)state;
    for (size_t i = 0; i < sizeof right / sizeof *right; i++)
        assert_null(parse(right[i].text, strlen(right[i].text), right[i].fd, &m));
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert_non_null(parse(wrong[i].text, strlen(wrong[i].text), wrong[i].fd, &m));
    assert_non_null(parse("STATUS=a\0b", 10, -1, &m));
    assert_null(parse(several, strlen(several), -1, &m));
    assert_true(m.ready && m.stopping && !m.store && !m.remove && !m.barrier);
    assert_int_equal(m.exit_status, 3);
    assert_string_equal(m.forward, "READY=1\nSTATUS=a=b");
    /* Anything at all: what is taken for an order has its name and its descriptor. */
    static const char *const pieces[] = {
        "FDSTORE=1", "FDSTOREREMOVE=1", "FDNAME=a", "FDNAME=", "BARRIER=1", "\n",
        "=",         "STATUS=x",        "\x80",     "FDPOLL=0"};
    rng r = {.state = 27};
    for (int i = 0; i < 100000; i++) {
        char text[256] = "";
        for (uint32_t n = rng_below(&r, 8); n > 0; n--) {
            strcat(text, pieces[rng_below(&r, sizeof pieces / sizeof *pieces)]);
            if (rng_below(&r, 4) > 0)
                strcat(text, "\n");
        }
        const int fd = rng_below(&r, 2) > 0 ? 7 : -1;
        if (parse(text, strlen(text), fd, &m) != NULL)
            continue;
        assert_true(m.store + m.remove + m.barrier <= 1);
        assert_int_equal(m.store || m.remove, m.name[0] != '\0');
        assert_int_equal(m.store || m.barrier, fd >= 0);
    }
}

/* The supervisor's names of a maximal message are all forwarded, and no byte more. */
static void the_longest_message_is_forwarded_whole(void **state)
{
    char text[TS_STORE_MESSAGE_BYTES + 1] = "READY=1\nSTATUS=";
    ts_store_message m;
    (void)state;
    memset(text + strlen(text), 'x', sizeof text - strlen(text));
    text[TS_STORE_MESSAGE_BYTES] = '\0';
    assert_null(parse(text, TS_STORE_MESSAGE_BYTES, -1, &m));
    assert_string_equal(m.forward, text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(messages_are_read_strictly),
        cmocka_unit_test(the_longest_message_is_forwarded_whole),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
