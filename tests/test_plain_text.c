/* What of other people's text reaches a terminal, a log or a page. */
#include "test_util.h"

#include "namespace_text.h"
#include "plain_text.h"
#include "tinyserve.pb-c.h"

#include <stdlib.h>
#include <string.h>

static void plain_text_is_utf_8_without_controls(void **state)
{
    (void)state;
    static const char *const plain[] = {"",
                                        "llama-8b",
                                        "a b",
                                        "\xc2\xa0",
                                        "\xe7\x8e\x8b",
                                        "\xf0\x9f\x98\x80",
                                        "\xef\xbf\xbf",
                                        "\xf4\x8f\xbf\xbf"};
    static const char *const not [] = {"\n",
                                       "\x1b",
                                       "\x7f",
                                       "\xc2\x80",
                                       "\xc2\x9f", /* C0, DEL, C1 */
                                       "\xd8\x9c",
                                       "\xe2\x80\x8e",
                                       "\xe2\x80\x8f", /* marks of direction */
                                       "\xe2\x80\xa8",
                                       "\xe2\x80\xaa",
                                       "\xe2\x80\xae", /* separators, embeddings */
                                       "\xe2\x81\xa6",
                                       "\xe2\x81\xa9", /* isolates */
                                       "\x80",
                                       "\xff",
                                       "\xc3",
                                       "\xe7\x8e",
                                       "\xc0\xaf", /* no UTF-8: stray, cut, too long */
                                       "\xe0\x80\xaf",
                                       "\xed\xa0\x80",
                                       "\xf4\x90\x80\x80",
                                       "\xf8\x88\x80\x80\x80"};
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        assert_true(ts_text_plain(plain[i]));
    for (size_t i = 0; i < sizeof not / sizeof *not ; i++)
        assert_false(ts_text_plain(not [i]));
}

static void escaping_never_cuts_a_character(void **state)
{
    (void)state;
    char to[64];
    assert_string_equal(ts_text_escape("a\nb\xff\xc2\x9b", to, sizeof to),
                        "a\\x0ab\\xff\\xc2\\x9b");
    for (size_t bytes = 1; bytes <= 8; bytes++) { /* 3 + 4 bytes, and the end */
        ts_text_escape("\xe7\x8e\x8b\n", to, bytes);
        assert_string_equal(to, bytes < 4 ? "" : bytes < 8 ? "\xe7\x8e\x8b" : "\xe7\x8e\x8b\\x0a");
    }
}

static void all_strings_of_a_message_are_found_and_made_plain(void **state)
{
    (void)state;
    Tspb__Reply *reply = calloc(1, sizeof *reply);
    Tspb__SessionList *list = calloc(1, sizeof *list);
    tspb__reply__init(reply);
    tspb__session_list__init(list);
    reply->message = strdup("\a");
    reply->body_case = TSPB__REPLY__BODY_SESSION_LIST;
    reply->session_list = list;
    list->sessions = calloc(2, sizeof *list->sessions);
    list->n_sessions = 2;
    for (size_t i = 0; i < 2; i++) {
        list->sessions[i] = calloc(1, sizeof **list->sessions);
        tspb__session_info__init(list->sessions[i]);
    }
    list->sessions[1]->program = strdup("\033[31m");
    const char *string;
    assert_string_equal(ts_text_find_not_plain(&reply->base, &string), "message");
    assert_ptr_equal(string, reply->message);
    assert_true(ts_text_escape_all(&reply->base));
    assert_null(ts_text_find_not_plain(&reply->base, &string));
    assert_string_equal(reply->message, "\\x07");
    assert_string_equal(list->sessions[0]->program, "");
    assert_string_equal(list->sessions[1]->program, "\\x1b[31m");
    tspb__reply__free_unpacked(reply, NULL);
}

static void sizes_have_a_unit_that_fits(void **state)
{
    (void)state;
    static const struct {
        uint64_t bytes;
        const char *text;
    } cases[] = {{0, "0 B"},
                 {1023, "1023 B"},
                 {1536, "1.5 KiB"},
                 {3u << 20, "3.0 MiB"},
                 {UINT64_MAX, "16.0 EiB"}};
    char to[32];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_string_equal(ts_text_bytes(cases[i].bytes, to, sizeof to), cases[i].text);
}

static void a_namespace_has_one_form_for_people_that_is_read_back(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t count;
        const char *text;
    } cases[] = {{"llama-8b", 8, "llama-8b"},
                 {"gr\xc3\xb6\xc3\x9f"
                  "e",
                  7, "größe"},
                 {"two words", 9, "two words"},
                 {"\n", 1, "hex:0a"},
                 {"a\0b", 3, "hex:610062"},
                 {"a\0", 2, "hex:6100"},
                 {"\xff\x80", 2, "hex:ff80"},
                 {"hex:00", 6, "hex:6865783a3030"}};
    char to[TS_NAMESPACE_TEXT_BYTES], longest[64];
    unsigned char bytes[64];
    size_t count;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_string_equal(ts_namespace_show(cases[i].bytes, cases[i].count, to), cases[i].text);
        assert_true(ts_namespace_read(to, bytes, &count));
        assert_int_equal(count, cases[i].count);
        assert_memory_equal(bytes, cases[i].bytes, count);
    }
    memset(longest, 0xfe, sizeof longest);
    assert_int_equal(strlen(ts_namespace_show(longest, sizeof longest, to)), sizeof to - 1);
    assert_true(ts_namespace_read(to, bytes, &count) && count == 64);
    assert_true(ts_namespace_read("hex:FfA0", bytes, &count) && bytes[0] == 0xff && count == 2);
    static const char *const wrong[] = {"", "hex:", "hex:0", "hex:0g", "hex:g0", "hex: 0"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert_false(ts_namespace_read(wrong[i], bytes, &count));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_text_is_utf_8_without_controls),
        cmocka_unit_test(escaping_never_cuts_a_character),
        cmocka_unit_test(all_strings_of_a_message_are_found_and_made_plain),
        cmocka_unit_test(sizes_have_a_unit_that_fits),
        cmocka_unit_test(a_namespace_has_one_form_for_people_that_is_read_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
