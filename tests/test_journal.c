/* The journal by itself: what was changed in it isn't read. */
#define _GNU_SOURCE
#include "test_util.h"

#include "journal.h"

#include <sys/mman.h>
#include <unistd.h>

/* A journal with two entries; *first is where the first one ends. */
static void journal_of_two(ts_journal *j, uint64_t *first)
{
    static const uint32_t counts[] = {2, 1}, tokens[] = {7, 8, 9};
    char why[128];
    ts_command c = {.op = TS_OP_SEQ_MATCH,
                    .session = 0x100000001,
                    .call = 5,
                    .seq_match = {.counts = counts, .tokens = tokens, .count = 2}};
    assert_int_equal(ts_journal_new(j, 8192, why, sizeof why), TS_OK);
    assert_true(ts_journal_put(j, &c, 1000, TS_OK, 0xabcdef));
    *first = ts_journal_end(j);
    c = (ts_command){.op = TS_OP_SWEEP};
    assert_true(ts_journal_put(j, &c, 1001, TS_OK, 0x123456));
}

/* The whole journal is read; how many of its entries are. */
static uint32_t entries_of(const ts_journal *j)
{
    const uint64_t end = ts_journal_end(j);
    ts_journal_entry entry;
    uint32_t entries = 0;
    for (uint64_t at = 0; at != end; entries++)
        if (ts_journal_get(j, end, &at, &entry) != TS_OK)
            return entries;
    return entries;
}

static void an_entry_of_which_a_bit_was_changed_is_none(void **state)
{
    (void)state;
    ts_journal j;
    uint64_t first;
    journal_of_two(&j, &first);
    const uint64_t end = ts_journal_end(&j);
    assert_int_equal(entries_of(&j), 2);
    for (uint64_t bit = 0; bit < end * 8; bit++) {
        j.ring[bit / 8] ^= (unsigned char)(1u << bit % 8);
        const uint32_t entries = entries_of(&j);
        if (entries != (bit / 8 < first ? 0 : 1))
            fail_msg("bit %llu of byte %llu: %u entries are read", (unsigned long long)bit % 8,
                     (unsigned long long)bit / 8, entries);
        j.ring[bit / 8] ^= (unsigned char)(1u << bit % 8);
    }
    assert_int_equal(entries_of(&j), 2);
    ts_journal_close(&j);
}

/* As earlier daemons wrote them. */
static void an_entry_without_a_checksum_is_read(void **state)
{
    (void)state;
    ts_journal j;
    uint64_t first;
    journal_of_two(&j, &first);
    memset(j.ring + 12, 0, 4);
    memset(j.ring + first + 12, 0, 4);
    assert_int_equal(entries_of(&j), 2);
    ts_journal_close(&j);
}

static void a_journal_without_room_or_read_from_between_is_none(void **state)
{
    (void)state;
    ts_journal j, none;
    uint64_t first;
    ts_journal_entry entry;
    char why[256];
    journal_of_two(&j, &first);
    const uint64_t end = j.capacity;
    for (uint64_t at = end - 7, before = at; at < end; before = ++at) {
        assert_int_equal(ts_journal_get(&j, end, &at, &entry), TS_EPROTO);
        assert_int_equal(at, before);
    }
    const int fd = memfd_create("journal", MFD_CLOEXEC);
    ts_journal_head head = *j.head;
    head.capacity = 0;
    assert_int_equal(ftruncate(fd, 4096), 0);
    assert_int_equal(pwrite(fd, &head, sizeof head, 0), sizeof head);
    assert_int_equal(ts_journal_open(&none, fd, why, sizeof why), TS_EPROTO);
    ts_journal_close(&none);
    ts_journal_close(&j);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_entry_of_which_a_bit_was_changed_is_none),
        cmocka_unit_test(an_entry_without_a_checksum_is_read),
        cmocka_unit_test(a_journal_without_room_or_read_from_between_is_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
