/* What a windowed run costs on the host: the parts and the table entries of what it sees, wherever
 * it stands. The items that the kernels get are counted on their way. */
#define ts_attention_portable counted_portable
#include "attention.c"
#undef ts_attention_portable

#include "attention_util.h"

#include <sys/mman.h>

extern const ts_attention_isa_ops ts_attention_portable;

static atomic_uint parts_walked, parts_merged;

static void count_item(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    atomic_fetch_add(&parts_walked, item->part_end - item->part_first);
    ts_attention_portable.item(item, scratch);
}

static void count_merge(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    atomic_fetch_add(&parts_merged, item->part_end - item->part_first);
    ts_attention_portable.merge(item, scratch);
}

const ts_attention_isa_ops counted_portable = {.item = count_item, .merge = count_merge};

enum { BLOCK = 16, NEAR = 4096, FAR = (1 << 25) + NEAR };

/* Runs with `tokens` tokens of context; only what is seen of its table can be read. */
static void run_at(problem *p, uint32_t tokens, uint32_t seen, uint32_t threads)
{
    const size_t page = 4096, entries = tokens / BLOCK, bytes = entries * sizeof(uint32_t);
    uint32_t *table = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(table, MAP_FAILED);
    for (size_t i = 0; i < entries; i++)
        table[i] = p->tables[0][i % (NEAR / BLOCK)];
    size_t unseen = (tokens - seen) / BLOCK * sizeof(uint32_t) / page * page;
    assert_int_equal(mprotect(table, unseen, PROT_NONE), 0);
    ts_attention *a = ts_attention_new(threads, TS_ISA_PORTABLE);
    p->seqs[0].blocks = table;
    p->seqs[0].kv_tokens = tokens;
    poison(p);
    parts_walked = parts_merged = 0;
    assert_int_equal(ts_attention_run(a, &p->call), TS_OK);
    ts_attention_free(a);
    munmap(table, bytes);
}

static void a_window_costs_what_is_seen_at_any_position(void **state)
{
    (void)state;
    static const struct {
        uint32_t new_tokens, window, parts; /* of each set of rows, at most */
    } cases[] = {{90, 64, 1}, {1, 64, 1}, {1, 1500, 2}, {90, 1500, 3}, {9, 3000, 4}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (uint32_t threads = 1; threads <= 3; threads += 2) {
            const uint32_t lengths[][2] = {{NEAR, cases[i].new_tokens}};
            rng r = {31};
            problem p;
            problem_new(&p,
                        (shape){.dtype = TS_DTYPE_BF16,
                                .heads = 16,
                                .kv_heads = 2,
                                .head_dim = 64,
                                .block_tokens = BLOCK,
                                .layers = 1},
                        lengths, 1, &r);
            problem_vary(&p, (variety){.window = cases[i].window}, &r);
            const size_t bytes = p.q_elements * sizeof(float);
            const uint32_t seen = cases[i].window + cases[i].new_tokens;
            unsigned char *near = malloc(bytes);
            run_at(&p, NEAR, seen, threads);
            uint32_t walked = parts_walked, merged = parts_merged;
            memcpy(near, p.out, bytes);
            run_at(&p, FAR, seen, threads);
            assert_memory_equal(p.out, near, bytes);
            assert_int_equal(parts_walked, walked);
            assert_int_equal(parts_merged, merged);
            /* Sets of rows: 4 query tokens of each KV head of 8 rows, or up to 8 tokens of all. */
            uint32_t sets = cases[i].new_tokens <= 9 ? 6 : (cases[i].new_tokens + 3) / 4 * 2;
            assert_in_range(walked, 1, sets * cases[i].parts);
            free(near);
            problem_free(&p);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_window_costs_what_is_seen_at_any_position),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
