/* Which sequences of a batch go through common pieces of work: kernels/gpu/plan/sharing.h. */
#include "test_util.h"

#include "sharing.h"

#include <stdlib.h>
#include <string.h>

#define SEQS 64u
#define BLOCKS 600u
#define BLOCK 16u  /* tokens of one */
#define CHUNK 512u /* tokens of a chunk: 32 blocks */

static uint32_t tables[SEQS][BLOCKS];

/* Tables of their own: no block twice. */
static void fill_tables(void)
{
    for (uint32_t i = 0; i < SEQS; i++)
        for (uint32_t b = 0; b < BLOCKS; b++)
            tables[i][b] = i * BLOCKS + b;
}

/* A batch of the tables, of whole chunks and a token; a sequence has `rows` of 32 rows. */
static void find(ts_sharing *s, uint32_t num_seqs, uint32_t blocks, uint32_t rows)
{
    assert_int_equal(ts_sharing_init(s, num_seqs), 0);
    for (uint32_t i = 0; i < num_seqs; i++) {
        s->seqs[i].blocks = tables[i];
        s->seqs[i].num_blocks = blocks;
    }
    if (!ts_sharing_compare(s))
        return;
    for (uint32_t i = 0; i < num_seqs; i++) {
        s->seqs[i].chunk_tokens = CHUNK;
        s->seqs[i].chunks = (blocks * BLOCK - 1) / CHUNK;
        s->seqs[i].rows = rows;
    }
    ts_sharing_find(s, BLOCK, 32);
}

/* What must hold of any result: teams have room for their members, who are in one team and have the
 * same blocks there. */
static void check(const ts_sharing *s, uint32_t rows)
{
    uint32_t members = 0, shared = 0;
    uint64_t pieces = 0, spared = 0;
    bool seen[SEQS] = {false};
    for (uint32_t t = 0; t < s->num_teams; t++) {
        const ts_team *team = &s->teams[t];
        const uint32_t *who = s->members + team->first, end = team->chunks * CHUNK / BLOCK;
        assert_int_equal(team->first, members);
        assert_in_range(team->count, 2, 32 / rows);
        assert_true(team->chunks >= 1);
        for (uint32_t m = 0; m < team->count; m++) {
            assert_true(who[m] < s->num_seqs && !seen[who[m]]);
            seen[who[m]] = true;
            assert_int_equal(s->seqs[who[m]].shared, team->chunks);
            assert_true(team->chunks <= s->seqs[who[m]].chunks);
            assert_true(s->seqs[who[m]].alike >= end);
            assert_memory_equal(tables[who[m]], tables[who[0]], end * sizeof(uint32_t));
        }
        members += team->count;
        pieces += team->chunks;
        spared += (uint64_t)(team->count - 1) * team->chunks * CHUNK;
    }
    for (uint32_t i = 0; i < s->num_seqs; i++)
        shared += s->seqs[i].shared > 0;
    assert_int_equal(shared, members);
    assert_int_equal(s->num_members, members);
    assert_int_equal(s->pieces, pieces);
    assert_int_equal(s->spared, spared);
}

/* The first `blocks` of one become another's. */
static void share(uint32_t i, uint32_t with, uint32_t blocks)
{
    memcpy(tables[i], tables[with], blocks * sizeof(uint32_t));
}

static void sequences_with_one_prefix_are_full_teams(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    for (uint32_t i = 1; i < SEQS; i++)
        share(i, 0, 512);
    find(&s, SEQS, 577, 4);
    check(&s, 4);
    assert_int_equal(s.num_teams, 8);
    assert_int_equal(s.pieces, 8 * 16);
    ts_sharing_fini(&s);
    find(&s, 9, 577, 4);
    check(&s, 4);
    assert_int_equal(s.num_teams, 1);
    assert_int_equal(s.teams[0].count, 8);
    ts_sharing_fini(&s);
}

static void sequences_that_begin_apart_are_in_no_team(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    share(2, 1, 31); /* a block less than a chunk */
    find(&s, SEQS, 577, 4);
    check(&s, 4);
    assert_int_equal(s.num_teams, 0);
    assert_int_equal(s.seqs[1].alike, 31);
    assert_int_equal(s.seqs[2].alike, 31);
    assert_int_equal(s.seqs[3].alike, 0);
    ts_sharing_fini(&s);
}

/* A search for the place where two tables part would not see it. */
static void a_block_that_differs_in_the_middle_ends_what_is_shared(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    for (uint32_t i = 1; i < 4; i++)
        share(i, 0, 512);
    tables[2][100] = 77777;
    find(&s, 4, 577, 4);
    check(&s, 4);
    assert_int_equal(s.seqs[0].shared, 16);
    assert_int_equal(s.seqs[2].shared, 0);
    ts_sharing_fini(&s);
    find(&s, 3, 577, 16); /* it has somebody of its own */
    check(&s, 16);
    share(3, 2, 512);
    ts_sharing_fini(&s);
    find(&s, 4, 577, 16);
    check(&s, 16);
    assert_int_equal(s.seqs[1].shared, 16);
    assert_int_equal(s.seqs[3].shared, 16);
    ts_sharing_fini(&s);
}

static void those_that_share_much_find_each_other_among_those_that_share_little(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    for (uint32_t i = 1; i < 24; i++)
        share(i, 0, 40); /* a chunk, with everybody */
    for (uint32_t i = 9; i < 22; i += 2)
        share(i, 7, 400); /* twelve with seven others */
    find(&s, 24, 577, 4);
    check(&s, 4);
    assert_int_equal(s.seqs[7].shared, 12);
    assert_int_equal(s.seqs[9].shared, 12);
    assert_int_equal(s.seqs[0].shared, 1);
    assert_int_equal(s.seqs[8].shared, 1);
    ts_sharing_fini(&s);
}

/* One more member that has little in common would cost the others more than it gains: of five that
 * share sixteen chunks, four times sixteen aren't read. */
static void a_team_takes_nobody_in_who_shares_too_little(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    for (uint32_t i = 1; i < 4; i++)
        share(i, 0, 512);
    share(4, 0, 384); /* twelve chunks, five times */
    share(5, 0, 512);
    find(&s, 6, 577, 4);
    check(&s, 4);
    assert_int_equal(s.seqs[0].shared, 16);
    assert_int_equal(s.seqs[4].shared, 0);
    share(4, 0, 512 - 32); /* fifteen */
    ts_sharing_fini(&s);
    find(&s, 6, 577, 4);
    check(&s, 4);
    assert_int_equal(s.seqs[0].shared, 15);
    assert_int_equal(s.seqs[4].shared, 15);
    ts_sharing_fini(&s);
}

static void sequences_that_are_cut_otherwise_or_want_none_are_in_no_team(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    assert_int_equal(ts_sharing_init(&s, 6), 0);
    for (uint32_t i = 0; i < 5; i++) { /* the last has no table */
        share(i, 0, 512);
        s.seqs[i].blocks = tables[i];
        s.seqs[i].num_blocks = 577;
    }
    assert_true(ts_sharing_compare(&s));
    for (uint32_t i = 0; i < 5; i++) {
        s.seqs[i].chunk_tokens = i == 1 ? 2 * CHUNK : CHUNK;
        s.seqs[i].chunks = i == 2 ? 0 : 8;
        s.seqs[i].rows = i == 3 ? 8 : 4;
    }
    ts_sharing_find(&s, BLOCK, 32);
    assert_int_equal(s.num_teams, 1);
    assert_int_equal(s.num_members, 2);
    assert_int_equal(s.seqs[0].shared, 8);
    assert_int_equal(s.seqs[4].shared, 8);
    ts_sharing_fini(&s);
}

/* Pairs that have one chunk more in common than all have: that isn't worth being teams of two. */
static void teams_are_as_large_as_it_pays(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    for (uint32_t i = 1; i < 16; i++)
        share(i, 0, 480);
    for (uint32_t i = 8; i < 16; i++)
        share(i, i - 8, 512);
    find(&s, 16, 577, 4);
    check(&s, 4);
    assert_int_equal(s.num_teams, 2);
    assert_int_equal(s.seqs[0].shared, 15);
    ts_sharing_fini(&s);
    fill_tables();
    for (uint32_t i = 1; i < 16; i++)
        share(i, 0, 32);
    for (uint32_t i = 8; i < 16; i++)
        share(i, i - 8, 512);
    find(&s, 16, 577, 4);
    check(&s, 4);
    assert_int_equal(s.num_teams, 8);
    assert_int_equal(s.seqs[0].shared, 16);
    ts_sharing_fini(&s);
}

/* The first chunk of one ends in the block where the other's, which is half as long, ends. */
static void chunks_of_other_lengths_are_not_common(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    share(1, 0, 512);
    tables[1][63] = tables[0][31];
    assert_int_equal(ts_sharing_init(&s, 2), 0);
    for (uint32_t i = 0; i < 2; i++) {
        s.seqs[i].blocks = tables[i];
        s.seqs[i].num_blocks = 577;
    }
    assert_true(ts_sharing_compare(&s));
    for (uint32_t i = 0; i < 2; i++) {
        s.seqs[i].chunk_tokens = (i + 1) * CHUNK;
        s.seqs[i].chunks = 8;
        s.seqs[i].rows = 4;
    }
    ts_sharing_find(&s, BLOCK, 32);
    assert_int_equal(s.num_teams, 0);
    ts_sharing_fini(&s);
}

/* One has fewer whole chunks before its new tokens than the others. */
static void a_team_goes_no_further_than_its_members(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    assert_int_equal(ts_sharing_init(&s, 3), 0);
    for (uint32_t i = 0; i < 3; i++) {
        share(i, 0, 512);
        s.seqs[i].blocks = tables[i];
        s.seqs[i].num_blocks = 577;
    }
    assert_true(ts_sharing_compare(&s));
    for (uint32_t i = 0; i < 3; i++) {
        s.seqs[i].chunk_tokens = CHUNK;
        s.seqs[i].chunks = i == 1 ? 12 : 16;
        s.seqs[i].rows = 4;
    }
    ts_sharing_find(&s, BLOCK, 32);
    check(&s, 4);
    assert_int_equal(s.seqs[0].shared, 12);
    assert_int_equal(s.seqs[1].shared, 12);
    ts_sharing_fini(&s);
}

static void rows_that_fill_more_than_half_of_a_tile_make_no_team(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    share(1, 0, 512);
    find(&s, 2, 577, 17);
    assert_int_equal(s.num_teams, 0);
    ts_sharing_fini(&s);
}

static void what_spares_too_little_is_dropped(void **state)
{
    (void)state;
    ts_sharing s;
    fill_tables();
    share(1, 0, 512);
    find(&s, 3, 577, 4);
    assert_int_equal(s.spared, 8192);
    ts_sharing_drop(&s);
    check(&s, 4);
    assert_int_equal(s.num_teams, 0);
    assert_int_equal(s.seqs[0].shared, 0);
    assert_int_equal(s.seqs[1].alike, 512); /* which is known all the same */
    ts_sharing_fini(&s);
}

/* Random trees of prefixes, some with a flaw in a table. */
static void whatever_is_found_is_shared(void **state)
{
    (void)state;
    rng r = {11};
    uint32_t teams = 0;
    for (int turn = 0; turn < 3000; turn++) {
        const uint32_t count = 1 + rng_below(&r, SEQS), rows = 1 + rng_below(&r, 16);
        ts_sharing s;
        fill_tables();
        for (uint32_t i = 1; i < count; i++) {
            share(i, rng_below(&r, i), rng_below(&r, BLOCKS));
            if (rng_below(&r, 8) == 0)
                tables[i][rng_below(&r, BLOCKS)] = 100000 + i;
        }
        find(&s, count, 1 + rng_below(&r, BLOCKS), rows);
        check(&s, rows);
        teams += s.num_teams;
        ts_sharing_fini(&s);
    }
    assert_true(teams > 3000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sequences_with_one_prefix_are_full_teams),
        cmocka_unit_test(sequences_that_begin_apart_are_in_no_team),
        cmocka_unit_test(a_block_that_differs_in_the_middle_ends_what_is_shared),
        cmocka_unit_test(those_that_share_much_find_each_other_among_those_that_share_little),
        cmocka_unit_test(a_team_takes_nobody_in_who_shares_too_little),
        cmocka_unit_test(sequences_that_are_cut_otherwise_or_want_none_are_in_no_team),
        cmocka_unit_test(teams_are_as_large_as_it_pays),
        cmocka_unit_test(chunks_of_other_lengths_are_not_common),
        cmocka_unit_test(a_team_goes_no_further_than_its_members),
        cmocka_unit_test(rows_that_fill_more_than_half_of_a_tile_make_no_team),
        cmocka_unit_test(what_spares_too_little_is_dropped),
        cmocka_unit_test(whatever_is_found_is_shared),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
