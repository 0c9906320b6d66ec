/* Sequences over a pool's books: sharing, cutting and freeing, reference by reference. */
#include "test_util.h"

#include "sequence.h"

enum { BLOCK = 4 };

static ts_pool_books books;
static ts_sequences seqs;
static uint32_t owned;

static int start(void **state)
{
    (void)state;
    assert_int_equal(ts_pool_init(&books, 16, 16, 16), TS_OK);
    assert_int_equal(ts_pool_add_tenant(&books, 0), TS_OK);
    assert_int_equal(ts_pool_grant(&books, 0, 0), TS_OK);
    ts_sequences_init(&seqs, 3, BLOCK, 1000);
    owned = TS_NONE;
    return 0;
}

static int end(void **state)
{
    (void)state;
    ts_sequences_fini(&seqs);
    ts_pool_fini(&books);
    return 0;
}

/* A sequence of `length` tokens. */
static ts_sequence *make(uint32_t length)
{
    const uint32_t blocks = (length + BLOCK - 1) / BLOCK;
    assert_int_equal(ts_sequences_reserve(&seqs, 1), TS_OK);
    ts_sequence *s = &seqs.all[ts_sequence_new(&seqs, &books, 0, 0, TS_NONE, &owned)];
    assert_int_equal(ts_sequence_reserve(s, blocks), TS_OK);
    for (uint32_t i = 0; i < blocks; i++)
        s->blocks[i] = ts_pool_take(&books, 0, 0);
    s->num_blocks = blocks;
    s->length = length;
    books.tenants[0].entries += blocks;
    return s;
}

static void an_id_never_names_two_sequences(void **state)
{
    (void)state;
    const uint64_t first = ts_sequence_id(&seqs, ts_sequence_index(&seqs, make(0)));
    assert_ptr_equal(ts_sequence_find(&seqs, first), &seqs.all[(uint32_t)first]);
    assert_true(first >> 32 > 1000); /* behind the first generation */
    ts_sequence_free(&seqs, &books, ts_sequence_find(&seqs, first), &owned);
    assert_null(ts_sequence_find(&seqs, first));
    const uint64_t second = ts_sequence_id(&seqs, ts_sequence_index(&seqs, make(0)));
    assert_int_equal((uint32_t)second, (uint32_t)first); /* in the same place */
    assert_true(second != first);
    assert_null(ts_sequence_find(&seqs, first));
}

static void there_are_no_more_than_the_maximum(void **state)
{
    (void)state;
    make(0);
    assert_int_equal(ts_sequences_reserve(&seqs, 2), TS_OK);
    assert_int_equal(ts_sequences_reserve(&seqs, 3), TS_EQUOTA);
}

static void a_fork_shares_the_blocks_up_to_its_length(void **state)
{
    (void)state;
    make(0); /* so that the table has grown before pointers into it are taken */
    assert_int_equal(ts_sequences_reserve(&seqs, 2), TS_OK);
    ts_sequence *parent = make(10); /* blocks of 4, 4 and 2 tokens */
    ts_sequence *child = make(0);
    assert_int_equal(ts_sequence_reserve(child, 2), TS_OK);
    ts_sequence_share(&seqs, &books, parent, 7, TS_NONE, child);
    assert_int_equal(child->length, 7);
    assert_int_equal(child->num_blocks, 2);
    assert_memory_equal(child->blocks, parent->blocks, 2 * sizeof *child->blocks);
    assert_int_equal(ts_pool_refs(&books, parent->blocks[0]), 2);
    assert_int_equal(ts_pool_refs(&books, parent->blocks[1]), 2);
    assert_int_equal(ts_pool_refs(&books, parent->blocks[2]), 1);
    assert_int_equal(books.used, 3);
}

static void truncating_gives_back_whole_blocks(void **state)
{
    (void)state;
    ts_sequence *s = make(10);
    const uint32_t last = s->blocks[2], middle = s->blocks[1];
    ts_sequence_truncate(&seqs, &books, s, 5);
    assert_int_equal(s->length, 5);
    assert_int_equal(s->num_blocks, 2);
    assert_int_equal(ts_pool_refs(&books, last), 0);
    assert_int_equal(ts_pool_refs(&books, middle), 1);
    ts_sequence_truncate(&seqs, &books, s, 0);
    assert_int_equal(s->num_blocks, 0);
    assert_int_equal(books.used, 0);
}

static void what_is_doomed_is_gone_at_once_and_freed_bit_by_bit(void **state)
{
    (void)state;
    ts_sequence *s = make(40); /* 10 blocks */
    const uint64_t id = ts_sequence_id(&seqs, ts_sequence_index(&seqs, s));
    ts_sequence_doom(&seqs, &books, s, &owned);
    assert_null(ts_sequence_find(&seqs, id));
    assert_int_equal(owned, TS_NONE);
    assert_int_equal(books.used, 10);
    assert_int_equal(ts_sequences_sweep(&seqs, &books, 4), 0);
    assert_int_equal(books.used, 6);
    assert_int_equal(ts_sequences_sweep(&seqs, &books, 4), 0);
    assert_true(ts_sequences_sweep(&seqs, &books, 100) > 0);
    assert_int_equal(books.used, 0);
    assert_int_equal(seqs.dying, TS_NONE);
}

static void a_kept_sequence_has_a_name_and_no_owner(void **state)
{
    (void)state;
    ts_sequence *s = make(6);
    assert_int_equal(ts_sequence_unpinned(&books, s), 2);
    assert_int_equal(ts_sequence_keep(&seqs, &books, s, TS_NONE, "prefix", &owned), TS_OK);
    assert_int_equal(owned, TS_NONE);
    assert_int_equal(s->owner, TS_NONE);
    assert_int_equal(books.tenants[0].pinned, 2);
    assert_int_equal(ts_sequence_unpinned(&books, s), 0);
    assert_int_equal(ts_names_find(&seqs.names, 0, "prefix"), ts_sequence_index(&seqs, s));
    ts_sequence_own(&seqs, &books, s, TS_NONE, 7, &owned);
    assert_int_equal(owned, ts_sequence_index(&seqs, s));
    assert_int_equal(s->owner, 7);
    assert_int_equal(books.tenants[0].pinned, 0);
    assert_int_equal(ts_names_find(&seqs.names, 0, "prefix"), TS_NONE);
}

/* What the tenant's books say of its sequences is what they have. */
static void assert_counted(uint32_t sequences, uint64_t entries)
{
    assert_int_equal(books.tenants[0].sequences, sequences);
    assert_int_equal(books.tenants[0].entries, entries);
}

static void entries_and_known_tokens_follow_what_is_shared_and_cut(void **state)
{
    (void)state;
    make(0);
    assert_int_equal(ts_sequences_reserve(&seqs, 2), TS_OK);
    ts_sequence *parent = make(10), *child = make(0);
    parent->known = 8;
    assert_counted(3, 3);
    assert_int_equal(ts_sequence_reserve(child, 3), TS_OK);
    ts_sequence_share(&seqs, &books, parent, 9, TS_NONE, child);
    assert_int_equal(child->known, 8);
    assert_counted(3, 6);
    ts_sequence_truncate(&seqs, &books, child, 7);
    assert_int_equal(child->known, 7);
    assert_counted(3, 5);
    ts_sequence_truncate(&seqs, &books, child, 0);
    ts_sequence_share(&seqs, &books, parent, 6, TS_NONE, child);
    assert_int_equal(child->known, 6);
    ts_sequence_free(&seqs, &books, child, &owned);
    assert_counted(2, 3);
    assert_int_equal(parent->known, 8);
}

/* A step that is open has put another block into the parent's table. */
static void a_fork_gets_the_parents_own_tail_if_it_reaches_that_far(void **state)
{
    (void)state;
    make(0);
    assert_int_equal(ts_sequences_reserve(&seqs, 2), TS_OK);
    ts_sequence *parent = make(10), *child = make(0);
    const uint32_t own = ts_pool_take(&books, 0, 0);
    assert_int_equal(ts_sequence_reserve(child, 3), TS_OK);
    ts_sequence_share(&seqs, &books, parent, 10, own, child);
    assert_int_equal(child->blocks[1], parent->blocks[1]);
    assert_int_equal(child->blocks[2], own);
    assert_int_equal(ts_pool_refs(&books, own), 2);
    assert_int_equal(ts_pool_refs(&books, parent->blocks[2]), 1);
    ts_sequence_truncate(&seqs, &books, child, 0);
    ts_sequence_share(&seqs, &books, parent, 8, own, child);
    assert_int_equal(child->blocks[1], parent->blocks[1]);
    assert_int_equal(ts_pool_refs(&books, own), 1);
}

static void the_name_of_a_replaced_sequence_goes_to_the_other(void **state)
{
    (void)state;
    make(0);
    assert_int_equal(ts_sequences_reserve(&seqs, 2), TS_OK);
    ts_sequence *old = make(6), *s = make(10);
    assert_int_equal(ts_sequence_keep(&seqs, &books, old, TS_NONE, "prefix", &owned), TS_OK);
    ts_sequence_replace(&seqs, &books, old, s, TS_NONE, &owned);
    assert_string_equal(s->name, "prefix");
    assert_null(old->name);
    assert_int_equal(s->owner, TS_NONE);
    assert_int_equal(ts_names_find(&seqs.names, 0, "prefix"), ts_sequence_index(&seqs, s));
    assert_int_equal(seqs.kept, 1);
    assert_int_equal(books.tenants[0].pinned, 3); /* the old one's 2 aren't any more */
    ts_sequence_free(&seqs, &books, old, NULL);
    assert_int_equal(ts_names_find(&seqs.names, 0, "prefix"), ts_sequence_index(&seqs, s));
}

static void a_sequence_on_a_ticket_is_found_by_that_alone(void **state)
{
    (void)state;
    make(0);
    assert_int_equal(ts_sequences_reserve(&seqs, 2), TS_OK);
    ts_sequence *s = make(6), *other = make(0);
    const uint64_t id = ts_sequence_id(&seqs, ts_sequence_index(&seqs, s));
    assert_int_equal(ts_sequences_reserve_life(&seqs), TS_OK);
    ts_sequence_set_life(&seqs, s, 1000, 5);
    assert_int_equal(ts_sequence_put_on_ticket(&seqs, &books, s, "c0de", &owned), TS_OK);
    assert_true(ts_sequence_has_ticket(&seqs, s));
    assert_null(ts_sequence_find(&seqs, id));
    assert_int_equal(owned, ts_sequence_index(&seqs, other));
    assert_int_equal(ts_names_find(&seqs.tickets, 0, "c0de"), ts_sequence_index(&seqs, s));
    assert_int_equal(books.tenants[0].tickets, 1);
    assert_int_equal(ts_sequences_reserve_life(&seqs), TS_OK);
    ts_sequence_set_life(&seqs, other, 1000, 5);
    assert_int_equal(ts_sequence_put_on_ticket(&seqs, &books, other, "c0de", &owned), TS_EEXIST);
    assert_false(ts_sequence_is_over(&seqs, s, 1004));
    assert_true(ts_sequence_is_over(&seqs, s, 1005));
    ts_sequence_take_off_ticket(&seqs, &books, s, 7, &owned);
    assert_int_equal(s->owner, 7);
    assert_int_equal(owned, ts_sequence_index(&seqs, s));
    assert_int_equal(books.tenants[0].tickets, 0);
    assert_int_equal(ts_names_find(&seqs.tickets, 0, "c0de"), TS_NONE);
    assert_false(ts_sequence_is_over(&seqs, s, 1005)); /* its time has no end any more */
}

static void an_entry_whose_generations_are_used_up_is_retired(void **state)
{
    (void)state;
    ts_sequence *s = make(0);
    const uint32_t index = ts_sequence_index(&seqs, s);
    s->generation = UINT32_MAX;
    ts_sequence_free(&seqs, &books, s, &owned);
    assert_int_equal(seqs.live, 0);
    assert_int_not_equal(ts_sequence_index(&seqs, make(0)), index);
}

/* Each costs what it has of entries, and 1. */
static void sweeping_counts_the_doomed_themselves_too(void **state)
{
    (void)state;
    make(0);
    assert_int_equal(ts_sequences_reserve(&seqs, 2), TS_OK);
    ts_sequence *a = make(6), *b = make(6);
    ts_sequence_doom(&seqs, &books, a, &owned);
    ts_sequence_doom(&seqs, &books, b, &owned);
    assert_int_equal(ts_sequences_sweep(&seqs, &books, 10), 4);
    assert_counted(1, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(an_id_never_names_two_sequences, start, end),
        cmocka_unit_test_setup_teardown(there_are_no_more_than_the_maximum, start, end),
        cmocka_unit_test_setup_teardown(a_fork_shares_the_blocks_up_to_its_length, start, end),
        cmocka_unit_test_setup_teardown(truncating_gives_back_whole_blocks, start, end),
        cmocka_unit_test_setup_teardown(what_is_doomed_is_gone_at_once_and_freed_bit_by_bit, start,
                                        end),
        cmocka_unit_test_setup_teardown(a_kept_sequence_has_a_name_and_no_owner, start, end),
        cmocka_unit_test_setup_teardown(entries_and_known_tokens_follow_what_is_shared_and_cut,
                                        start, end),
        cmocka_unit_test_setup_teardown(a_fork_gets_the_parents_own_tail_if_it_reaches_that_far,
                                        start, end),
        cmocka_unit_test_setup_teardown(the_name_of_a_replaced_sequence_goes_to_the_other, start,
                                        end),
        cmocka_unit_test_setup_teardown(a_sequence_on_a_ticket_is_found_by_that_alone, start, end),
        cmocka_unit_test_setup_teardown(an_entry_whose_generations_are_used_up_is_retired, start,
                                        end),
        cmocka_unit_test_setup_teardown(sweeping_counts_the_doomed_themselves_too, start, end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
