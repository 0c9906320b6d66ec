/*
 * What a plan holds for kernels: every chunk of every sequence is one piece's, or goes through one
 * piece of its team, which have the same blocks there. Needs no GPU.
 */
#include "no_device.h"

#include "pieces.h"
#include "waves.h"

#include <stdlib.h>
#include <string.h>

#define SEQS 80u
#define BLOCK 16u

typedef struct batch {
    ts_attention_seq seqs[SEQS];
    uint32_t count, heads;
    uint32_t *tables[SEQS];
    ts_geometry geometry;
} batch;

static void batch_free(batch *b)
{
    for (uint32_t i = 0; i < b->count; i++)
        free(b->tables[i]);
}

/* Sequences that begin with what others begin with, and go on by themselves. */
static void batch_new(batch *b, uint32_t count, uint32_t most, rng *r)
{
    static const ts_dtype dtypes[] = {TS_DTYPE_BF16, TS_DTYPE_FP16, TS_DTYPE_FP8_E4M3};
    uint32_t next = 0;
    b->count = count;
    b->geometry = (ts_geometry){.layers = 1,
                                .kv_heads = 1u << rng_below(r, 4),
                                .head_dim = 64 + rng_below(r, 2) * 64,
                                .block_tokens = BLOCK,
                                .dtype = dtypes[rng_below(r, 3)]};
    b->heads = b->geometry.kv_heads * (1 + rng_below(r, 8));
    for (uint32_t i = 0; i < count; i++) {
        ts_attention_seq *s = &b->seqs[i];
        const uint32_t q = rng_below(r, 8) == 0 ? rng_below(r, 200) : 1 + rng_below(r, 2);
        const uint32_t past = q > 2 && rng_below(r, 2) == 0 ? 0 : rng_below(r, most);
        *s = (ts_attention_seq){.q_tokens = q, .kv_tokens = q + past};
        const uint32_t blocks = (s->kv_tokens + BLOCK - 1) / BLOCK;
        b->tables[i] = malloc((blocks + 1) * sizeof(uint32_t));
        for (uint32_t n = 0; n < blocks; n++)
            b->tables[i][n] = next++;
        if (i > 0) {
            const uint32_t with = rng_below(r, i), past = (s->kv_tokens - q) / BLOCK;
            const ts_attention_seq *o = &b->seqs[with];
            const uint32_t its = (o->kv_tokens - o->q_tokens) / BLOCK;
            const uint32_t all = past < its ? past : its;
            const uint32_t shared = rng_below(r, 3) == 0 ? rng_below(r, all + 1) : all;
            memcpy(b->tables[i], b->tables[with], shared * sizeof(uint32_t));
        }
        s->blocks = b->tables[i];
    }
}

static uint32_t ceil_div(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

/* A piece of one sequence: notes that it has the chunks. */
static void note(const batch *b, const plan_piece *p, const plan_seq *seqs, uint32_t **seen)
{
    assert_true(p->index < b->count);
    assert_memory_equal(&p->seq, &seqs[p->index], sizeof p->seq);
    for (uint32_t n = 0; n < p->chunks_and_alone / 2; n++) {
        assert_true(p->chunk + n < p->seq.num_chunks);
        seen[p->index][p->chunk + n]++;
    }
}

/* A team's: notes its members'; returns how many they are. */
static uint32_t note_team(const batch *b, const plan_piece *p, const plan_seq *seqs,
                          const uint32_t *tables, uint32_t **seen)
{
    const uint32_t *list = tables + TEAM_LIST(p->tile), count = TEAM_SIZE(p->tile);
    const uint32_t begin = p->chunk * p->seq.chunk_tokens, end = begin + p->seq.chunk_tokens;
    const uint32_t first = begin / BLOCK, blocks = ceil_div(end, BLOCK) - first;
    const uint32_t rows = b->geometry.dtype == TS_DTYPE_FP8_E4M3 ? 16 : 32;
    assert_int_equal(p->index, list[0]);
    assert_int_equal(p->chunks_and_alone, 2);
    assert_memory_equal(&p->seq, &seqs[p->index], sizeof p->seq);
    assert_in_range(count * p->seq.q_tokens * (b->heads / b->geometry.kv_heads), 2, rows);
    for (uint32_t m = 0; m < count; m++) {
        const plan_seq *s = &seqs[list[m]];
        assert_true(list[m] < b->count);
        assert_int_equal(s->chunk_tokens, p->seq.chunk_tokens);
        assert_int_equal(s->q_tokens, p->seq.q_tokens);
        assert_true(end <= s->kv_tokens - s->q_tokens);
        assert_memory_equal(tables + s->table + first, tables + p->seq.table + first,
                            blocks * sizeof(uint32_t));
        seen[list[m]][p->chunk]++;
    }
    return count;
}

static uint32_t storable; /* new tokens, over a test */

/* New tokens that are appended: those come last that wgmma may store itself, of sequences that are
 * all new and have all chunks in each piece. */
static void check_appends(const batch *b, const ts_gpu_plan *plan)
{
    const unsigned char *host = plan->buffer->host;
    const uint2 *items = (const uint2 *)(const void *)(host + plan->items[LIST_APPEND]);
    const plan_piece *pieces = (const plan_piece *)(const void *)(host + plan->items[LIST_WGMMA]);
    const uint32_t count = plan->count[LIST_APPEND];
    uint32_t next[SEQS] = {0}, last = 0;
    bool stored[SEQS] = {false};
    for (uint32_t n = 0; n < plan->count[LIST_WGMMA]; n++) {
        const plan_seq *s = &pieces[n].seq;
        stored[pieces[n].index] =
            s->kv_tokens == s->q_tokens && pieces[n].chunks_and_alone / 2 == s->num_chunks;
    }
    for (uint32_t n = 0; n < count; n++) {
        assert_int_equal(items[n].y, next[items[n].x]++);
        assert_int_equal(stored[items[n].x], n >= count - plan->storable);
        last += stored[items[n].x];
    }
    for (uint32_t i = 0; i < b->count; i++)
        assert_true(!stored[i] || next[i] == b->seqs[i].q_tokens);
    assert_int_equal(last, plan->storable);
    storable += last;
}

/* Returns how many members' chunks go through teams' pieces. */
static uint32_t check(const batch *b, const ts_gpu_plan *plan)
{
    const unsigned char *host = plan->buffer->host;
    const plan_seq *seqs = (const plan_seq *)(const void *)(host + PLAN_SEQS);
    const uint32_t *tables = (const uint32_t *)(const void *)(host + plan->tables);
    uint32_t *seen[SEQS], tiles[SEQS], common = 0;
    assert_memory_equal(((const plan_head *)(const void *)host)->counts, plan->count,
                        sizeof plan->count);
    for (uint32_t i = 0; i < b->count; i++) {
        seen[i] = calloc(seqs[i].num_chunks + 1, sizeof(uint32_t));
        tiles[i] = 0;
        if (b->seqs[i].q_tokens > 0)
            assert_memory_equal(tables + seqs[i].table, b->tables[i],
                                ceil_div(b->seqs[i].kv_tokens, BLOCK) * sizeof(uint32_t));
    }
    for (uint32_t l = LIST_NARROW; l < LIST_COUNT; l++) {
        const plan_piece *pieces = (const plan_piece *)(const void *)(host + plan->items[l]);
        for (uint32_t n = 0; n < plan->count[l]; n++) {
            const plan_piece *p = &pieces[n];
            if (l == LIST_NARROW && (p->tile & TEAM_PIECE) != 0) {
                common += note_team(b, p, seqs, tables, seen);
                continue;
            }
            note(b, p, seqs, seen);
            tiles[p->index] = p->tile + 1 > tiles[p->index] ? p->tile + 1 : tiles[p->index];
        }
    }
    check_appends(b, plan);
    for (uint32_t i = 0; i < b->count; i++) {
        for (uint32_t n = 0; n < seqs[i].num_chunks && b->seqs[i].q_tokens > 0; n++)
            assert_int_equal(seen[i][n], tiles[i]);
        free(seen[i]);
    }
    return common;
}

static ts_gpu_plan *plan_of(const batch *b)
{
    ts_gpu_plan *plan;
    if (ts_gpu_plan_new(&gpu, &b->geometry, b->heads,
                        b->geometry.dtype == TS_DTYPE_FP16 ? TS_DTYPE_FP16 : TS_DTYPE_BF16,
                        TS_KERNEL_AUTO, b->seqs, b->count, &plan, why, sizeof why) != TS_OK)
        fail_msg("%s", why);
    return plan;
}

static void renew(const batch *b, ts_gpu_plan **plan)
{
    if (ts_gpu_plan_renew(&gpu, &b->geometry, b->heads,
                          b->geometry.dtype == TS_DTYPE_FP16 ? TS_DTYPE_FP16 : TS_DTYPE_BF16,
                          TS_KERNEL_AUTO, b->seqs, b->count, plan, why, sizeof why) != TS_OK)
        fail_msg("%s", why);
}

static void every_chunk_is_worked_on_once(void **state)
{
    (void)state;
    rng r = {5};
    uint64_t common = 0;
    storable = 0;
    for (int turn = 0; turn < 400; turn++) {
        batch b;
        batch_new(&b, 1 + rng_below(&r, SEQS), turn % 4 == 0 ? 20000 : 3000, &r);
        gpu.info.warp_groups = turn % 3 != 0;
        ts_gpu_plan *plan = plan_of(&b);
        common += check(&b, plan);
        ts_gpu_plan_free(plan);
        batch_free(&b);
    }
    assert_true(common > 10000 && storable > 10000);
}

/* Sequences that grow by a token, whose plan is renewed. */
static void renewed_plans_hold_the_same_pieces(void **state)
{
    (void)state;
    rng r = {6};
    uint64_t common = 0;
    for (int turn = 0; turn < 200; turn++) {
        batch b;
        batch_new(&b, 1 + rng_below(&r, turn % 2 ? 4 : 40), 3000, &r);
        gpu.info.warp_groups = turn % 2;
        for (uint32_t i = 0; i < b.count; i++)
            b.seqs[i].kv_tokens -= b.seqs[i].kv_tokens > b.seqs[i].q_tokens;
        ts_gpu_plan *plan = plan_of(&b);
        (void)check(&b, plan);
        for (uint32_t i = 0; i < b.count; i++)
            b.seqs[i].kv_tokens +=
                ceil_div(b.seqs[i].kv_tokens, BLOCK) * BLOCK != b.seqs[i].kv_tokens;
        renew(&b, &plan);
        common += check(&b, plan);
        ts_gpu_plan_free(plan);
        batch_free(&b);
    }
    assert_true(common > 1000);
}

/* A member of a team gets a block of its own where it had a common one, or falls back so far that
 * its new tokens lie where the others go on. */
static void a_renewed_plan_shares_what_is_still_shared(void **state)
{
    (void)state;
    rng r = {7};
    uint32_t own = 0, fallen = 0;
    for (int turn = 0; turn < 300; turn++) {
        batch b;
        batch_new(&b, 20, 3000, &r);
        ts_gpu_plan *plan = plan_of(&b);
        for (uint32_t i = 0; i < b.count && plan->shared != NULL; i++) {
            const plan_seq *s =
                (const plan_seq *)(const void *)(plan->buffer->host + PLAN_SEQS) + i;
            const uint32_t end = plan->shared[i] * s->chunk_tokens, q = b.seqs[i].q_tokens;
            if (end == 0)
                continue;
            if (turn % 2 == 0) {
                b.tables[i][1 + rng_below(&r, end / BLOCK - 1)] = 1000000;
                own++;
            } else if (q > 1 && b.seqs[i].kv_tokens - q < end + s->chunk_tokens) {
                b.seqs[i].kv_tokens = end + q - 1; /* as many chunks as before */
                fallen++;
            } else {
                continue;
            }
            break;
        }
        renew(&b, &plan);
        (void)check(&b, plan);
        ts_gpu_plan_free(plan);
        batch_free(&b);
    }
    assert_true(own > 50 && fallen > 20);
}

/* The blocks that boxes are to be asked for lie among those that the plan knows. */
static void check_blocks(const ts_gpu_plan *plan, const ts_attention_seq *seqs, uint32_t count)
{
    uint32_t first = UINT32_MAX, last = 0;
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t n = 0; n < ceil_div(seqs[i].kv_tokens, BLOCK); n++) {
            first = seqs[i].blocks[n] < first ? seqs[i].blocks[n] : first;
            last = seqs[i].blocks[n] > last ? seqs[i].blocks[n] : last;
        }
    assert_int_equal(plan->blocks.first, first);
    assert_int_equal(plan->blocks.last, last);
}

/* A sequence falls back, others' tables change, and it grows again: its table's end is what it was,
 * and nothing of the tables differs from what the plan has. */
static void a_renewed_plan_knows_which_blocks_are_read(void **state)
{
    (void)state;
    static const uint32_t ends[][2] = {{0, 9}, {0, 8}, {19, 9}, {19, 8}};
    const ts_geometry geometry = {
        .layers = 1, .kv_heads = 2, .head_dim = 128, .block_tokens = BLOCK, .dtype = TS_DTYPE_BF16};
    gpu.info.warp_groups = true;
    for (uint32_t e = 0; e < sizeof ends / sizeof *ends; e++) {
        uint32_t tables[2][2] = {{5, ends[e][0]}, {7, 9}};
        ts_attention_seq seqs[] = {{.q_tokens = 8, .kv_tokens = 28, .blocks = tables[0]},
                                   {.q_tokens = 8, .kv_tokens = 28, .blocks = tables[1]}};
        ts_gpu_plan *plan = NULL;
        for (int step = 0; step < 4; step++) {
            seqs[0].kv_tokens = step % 2 == 0 ? 28 : 12;
            tables[1][1] = step == 0 ? 9 : ends[e][1];
            assert_int_equal(ts_gpu_plan_renew(&gpu, &geometry, 16, TS_DTYPE_BF16, TS_KERNEL_AUTO,
                                               seqs, 2, &plan, why, sizeof why),
                             TS_OK);
            assert_int_equal(plan->renewals, step);
            assert_true(plan->count[LIST_WGMMA] + plan->count[LIST_FEW] > 0);
            check_blocks(plan, seqs, 2);
        }
        ts_gpu_plan_free(plan);
    }
}

/* A launch takes the kernel of which more blocks share a processor where that spares it a wave. */
static void blocks_lie_closer_where_that_spares_a_wave(void **state)
{
    (void)state;
    static const struct {
        uint32_t blocks, shortest, longest;
        bool close;
    } cases[] = {
        {4, 777, 777, false},    {396, 777, 777, false}, {397, 777, 777, true},
        {528, 777, 777, true},   {529, 777, 777, false}, {792, 777, 777, false},
        {793, 777, 777, true},   {1056, 777, 777, true}, {1057, 777, 777, false},
        {1200, 777, 777, false}, {400, 400, 800, true},  {400, 399, 800, false},
        {1000000, 1, 1, false},
    };
    for (uint32_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(is_close_faster(cases[i].blocks, 132, cases[i].shortest, cases[i].longest),
                         cases[i].close);
}

/* What is little more than a chunk is one; what is more, as it was, a whole chunk and a rest. */
static void a_sequence_of_little_more_than_a_chunk_is_one(void **state)
{
    (void)state;
    static const uint32_t cases[][3] = {/* tokens, then the first piece's and the last one's */
                                        {700, 700, 700},  {704, 704, 704}, {705, 705, 705},
                                        {777, 777, 777},  {792, 792, 792}, {793, 704, 89},
                                        {1408, 704, 704}, {1409, 704, 1}};
    const ts_geometry geometry = {
        .layers = 1, .kv_heads = 4, .head_dim = 128, .block_tokens = BLOCK, .dtype = TS_DTYPE_BF16};
    uint32_t table[100] = {0};
    for (uint32_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const ts_attention_seq seq = {.q_tokens = 1, .kv_tokens = cases[i][0], .blocks = table};
        ts_gpu_plan *plan;
        assert_int_equal(ts_gpu_plan_new(&gpu, &geometry, 28, TS_DTYPE_BF16, TS_KERNEL_AUTO, &seq,
                                         1, &plan, why, sizeof why),
                         TS_OK);
        assert_int_equal(plan->count[LIST_NARROW], ceil_div(cases[i][0], cases[i][1]));
        assert_int_equal(plan->longest_piece, cases[i][1]);
        assert_int_equal(plan->shortest_piece, cases[i][2]);
        ts_gpu_plan_free(plan);
    }
}

/* Two sequences of one token each, that have all else in common. */
static batch two_alike(uint32_t length)
{
    batch b = {.count = 2,
               .heads = 32,
               .geometry = {.layers = 1,
                            .kv_heads = 8,
                            .head_dim = 128,
                            .block_tokens = BLOCK,
                            .dtype = TS_DTYPE_BF16}};
    for (uint32_t i = 0; i < 2; i++) {
        b.tables[i] = calloc(length / BLOCK + 1, sizeof(uint32_t));
        for (uint32_t n = 0; n <= length / BLOCK; n++)
            b.tables[i][n] = n + (n == length / BLOCK ? i : 0);
        b.seqs[i] = (ts_attention_seq){.q_tokens = 1, .kv_tokens = length, .blocks = b.tables[i]};
    }
    return b;
}

/* What spares too little for a launch of its own is worth it in a crowd's; a plan that is renewed
 * gets its team then, and keeps it. */
static void in_company_fewer_sharers_are_a_team(void **state)
{
    (void)state;
    static const struct {
        uint32_t company;
        bool shares;
    } turns[] = {{0, false}, {1, false}, {4, false}, {6, true}, {1, true}};
    batch b = two_alike(9217);
    ts_gpu_plan *plan = NULL;
    gpu.team_tokens = TS_GPU_TEAM_TOKENS;
    for (uint32_t i = 0; i < sizeof turns / sizeof *turns; i++) {
        gpu.company = turns[i].company;
        renew(&b, &plan);
        assert_int_equal(plan->shared != NULL, turns[i].shares);
        (void)check(&b, plan);
    }
    ts_gpu_plan_free(plan);
    plan = plan_of(&b); /* alone again */
    assert_null(plan->shared);
    ts_gpu_plan_free(plan);
    gpu.team_tokens = gpu.company = 0;
    batch_free(&b);
}

/* Two of them have a chunk's worth in common; a launch with teams is slower for the others. */
static void few_sharers_among_many_are_no_team(void **state)
{
    (void)state;
    enum { LENGTH = 2817, LEAST = TS_GPU_TEAM_PART };
    static uint32_t tables[SEQS][LENGTH / BLOCK + 1];
    batch b = {.heads = 32,
               .geometry = {.layers = 1,
                            .kv_heads = 8,
                            .head_dim = 128,
                            .block_tokens = BLOCK,
                            .dtype = TS_DTYPE_BF16}};
    for (uint32_t i = 0; i < SEQS; i++) {
        for (uint32_t n = 0; n <= LENGTH / BLOCK; n++)
            tables[i][n] = (i == 1 && n < LENGTH / BLOCK ? 0 : i) * (LENGTH / BLOCK + 1) + n;
        b.seqs[i] = (ts_attention_seq){.q_tokens = 1, .kv_tokens = LENGTH, .blocks = tables[i]};
    }
    for (b.count = LEAST - 1; b.count <= LEAST + 1; b.count += 2) {
        ts_gpu_plan *plan = plan_of(&b);
        assert_int_equal(plan->shared != NULL, b.count < LEAST);
        ts_gpu_plan_free(plan);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_chunk_is_worked_on_once),
        cmocka_unit_test(renewed_plans_hold_the_same_pieces),
        cmocka_unit_test(a_renewed_plan_shares_what_is_still_shared),
        cmocka_unit_test(a_renewed_plan_knows_which_blocks_are_read),
        cmocka_unit_test(blocks_lie_closer_where_that_spares_a_wave),
        cmocka_unit_test(a_sequence_of_little_more_than_a_chunk_is_one),
        cmocka_unit_test(few_sharers_among_many_are_no_team),
        cmocka_unit_test(in_company_fewer_sharers_are_a_team),
    };
    return cmocka_run_group_tests(tests, make_gpu, NULL);
}
