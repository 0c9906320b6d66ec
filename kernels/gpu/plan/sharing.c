#include "sharing.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define BRANCHES 32 /* that are told apart where prefixes part; what it costs has a bound */

static uint32_t min(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static uint32_t ceil_div(uint64_t a, uint32_t b)
{
    return (uint32_t)((a + b - 1) / b);
}

int ts_sharing_init(ts_sharing *s, uint32_t num_seqs)
{
    uint32_t places = 16; /* at least twice the sequences */
    while (places < num_seqs * 2)
        places *= 2;
    *s = (ts_sharing){.num_seqs = num_seqs, .places = places};
    const size_t words = places + (size_t)num_seqs * 6 + 1;
    const size_t structs = num_seqs * (sizeof *s->seqs + sizeof *s->teams);
    s->memory = calloc(1, structs + words * sizeof(uint32_t));
    if (s->memory == NULL)
        return -1;
    s->seqs = s->memory;
    s->teams = (ts_team *)(s->seqs + num_seqs);
    s->members = (uint32_t *)(s->teams + num_seqs);
    s->next = s->members + num_seqs;
    s->line = s->next + num_seqs;
    s->common = s->line + num_seqs;
    s->size = s->common + num_seqs;
    s->saved = s->size + num_seqs;
    s->found = s->saved + num_seqs + 1;
    return 0;
}

void ts_sharing_fini(ts_sharing *s)
{
    free(s->memory);
}

/* The place of the sequences with number i's key that are cut alike, or a free one. Places hold a
 * sequence's number + 1. */
static uint32_t *place_of(ts_sharing *s, uint32_t i)
{
    const ts_sharer *q = &s->seqs[i];
    uint32_t at = (uint32_t)(q->key * UINT64_C(0x9e3779b97f4a7c15) >> 32) & (s->places - 1);
    for (; s->found[at] != 0; at = (at + 1) & (s->places - 1)) {
        const ts_sharer *p = &s->seqs[s->found[at] - 1];
        if (p->key == q->key && p->chunk_tokens == q->chunk_tokens && p->rows == q->rows)
            break;
    }
    return &s->found[at];
}

/* ---- which begin with the same block ---- */

/* Blocks that two tables begin with alike, if what they share comes first: the place where they
 * part is searched for. */
static uint32_t guess_alike(const ts_sharer *a, const ts_sharer *b)
{
    uint32_t least = 0, most = min(a->num_blocks, b->num_blocks);
    while (least < most) {
        uint32_t middle = (least + most) / 2;
        if (a->blocks[middle] == b->blocks[middle])
            least = middle + 1;
        else
            most = middle;
    }
    return least;
}

bool ts_sharing_compare(ts_sharing *s)
{
    bool any = false;
    for (uint32_t i = 0; i < s->num_seqs; i++) {
        if (s->seqs[i].num_blocks == 0)
            continue;
        s->seqs[i].key = s->seqs[i].blocks[0];
        uint32_t *place = place_of(s, i);
        if (*place == 0) {
            *place = i + 1;
            continue;
        }
        ts_sharer *other = &s->seqs[*place - 1];
        uint32_t n = guess_alike(&s->seqs[i], other);
        s->seqs[i].alike = n;
        other->alike = n > other->alike ? n : other->alike;
        any = true;
    }
    return any;
}

/* ---- teams ---- */

/* Blocks that the first `chunks` chunks take; the last block may be taken in part. */
static uint32_t blocks_of(const ts_sharer *q, uint32_t chunks, uint32_t block_tokens)
{
    return ceil_div((uint64_t)chunks * q->chunk_tokens, block_tokens);
}

/* Whether a chunk's blocks are the same in both. */
static bool same_chunk(const ts_sharer *a, const ts_sharer *b, uint32_t chunk,
                       uint32_t block_tokens)
{
    if (chunk >= a->chunks || chunk >= b->chunks)
        return false;
    const uint32_t first = (uint32_t)((uint64_t)chunk * a->chunk_tokens / block_tokens);
    const uint32_t end = blocks_of(a, chunk + 1, block_tokens);
    return a->blocks[end - 1] == b->blocks[end - 1] &&
           memcmp(a->blocks + first, b->blocks + first, (end - first) * sizeof *a->blocks) == 0;
}

/* Puts those of a line that have the chunk of its first one before the others, either in the order
 * that they had; returns how many they are. */
static uint32_t part_line(ts_sharing *s, uint32_t *line, uint32_t count, uint32_t chunk,
                          uint32_t block_tokens)
{
    uint32_t alike = 1, others = 0, *later = s->saved; /* not used yet */
    const ts_sharer *first = &s->seqs[line[0]];
    if (chunk >= first->chunks)
        return 1;
    for (uint32_t i = 1; i < count; i++)
        if (same_chunk(first, &s->seqs[line[i]], chunk, block_tokens))
            line[alike++] = line[i];
        else
            later[others++] = line[i];
    memcpy(line + alike, later, others * sizeof *later);
    return alike;
}

/* Orders a line of sequences, which have the chunks before `chunk` in common, so that those that
 * have most in common stand together; notes how many chunks each has in common with the one before
 * it. Each chunk that sequences share is compared once. */
static void order_line(ts_sharing *s, uint32_t *line, uint32_t *common, uint32_t count,
                       uint32_t chunk, uint32_t block_tokens)
{
    for (int branch = 0; branch < BRANCHES && count > 1;) {
        const uint32_t alike = part_line(s, line, count, chunk, block_tokens);
        if (alike == count) {
            chunk++;
            branch = 0;
            continue;
        }
        if (alike > 1)
            order_line(s, line, common, alike, chunk + 1, block_tokens);
        common[alike] = chunk;
        line += alike;
        common += alike;
        count -= alike;
        branch++;
    }
    for (uint32_t i = 1; i < count; i++)
        common[i] = chunk;
}

/* Cuts a line into teams of `most` at most, one behind the other, so that as much as possible isn't
 * read: chunks in common, times members but one. */
static void cut_line(ts_sharing *s, uint32_t count, uint32_t most)
{
    s->saved[0] = 0;
    for (uint32_t end = 1; end <= count; end++) {
        uint32_t chunks = UINT32_MAX;
        s->saved[end] = s->saved[end - 1];
        s->size[end - 1] = 1;
        for (uint32_t n = 2; n <= most && n <= end; n++) {
            chunks = min(chunks, s->common[end - n + 1]);
            if (chunks == 0)
                break;
            const uint32_t saved = s->saved[end - n] + (n - 1) * chunks;
            if (saved > s->saved[end]) {
                s->saved[end] = saved;
                s->size[end - 1] = n;
            }
        }
    }
    s->spared += (uint64_t)s->saved[count] * s->seqs[s->line[0]].chunk_tokens;
    for (uint32_t end = count; end > 0; end -= s->size[end - 1]) {
        const uint32_t n = s->size[end - 1], *who = s->line + end - n;
        uint32_t chunks = UINT32_MAX;
        if (n == 1)
            continue;
        for (uint32_t m = 1; m < n; m++)
            chunks = min(chunks, s->common[end - n + m]);
        s->teams[s->num_teams++] = (ts_team){s->num_members, n, chunks};
        s->pieces += chunks;
        for (uint32_t m = 0; m < n; m++) {
            s->seqs[who[m]].shared = chunks;
            s->members[s->num_members++] = who[m];
        }
    }
}

/* Links those that may have a chunk in common, each behind the one before it; `found` has the last.
 * They are told by the block in which the first chunk ends. */
static void link_alike(ts_sharing *s, uint32_t block_tokens)
{
    memset(s->found, 0, s->places * sizeof *s->found);
    for (uint32_t i = 0; i < s->num_seqs; i++) {
        ts_sharer *q = &s->seqs[i];
        s->next[i] = 0;
        if (q->alike == 0 || q->chunks == 0)
            continue;
        q->key = q->blocks[blocks_of(q, 1, block_tokens) - 1];
        uint32_t *place = place_of(s, i);
        s->next[i] = *place;
        *place = i + 1;
    }
}

/* Takes the sequences at a place into the line, in their order; returns how many they are. */
static uint32_t line_up(ts_sharing *s, uint32_t place)
{
    uint32_t count = 0;
    for (uint32_t i = s->found[place]; i != 0; i = s->next[i - 1])
        count++;
    for (uint32_t i = s->found[place], at = count; i != 0; i = s->next[i - 1])
        s->line[--at] = i - 1;
    return count;
}

void ts_sharing_drop(ts_sharing *s)
{
    for (uint32_t m = 0; m < s->num_members; m++)
        s->seqs[s->members[m]].shared = 0;
    s->num_teams = s->num_members = 0;
    s->pieces = s->spared = 0;
}

void ts_sharing_find(ts_sharing *s, uint32_t block_tokens, uint32_t rows)
{
    link_alike(s, block_tokens);
    for (uint32_t place = 0; place < s->places; place++) {
        const uint32_t count = line_up(s, place);
        if (count < 2)
            continue;
        order_line(s, s->line, s->common, count, 0, block_tokens);
        cut_line(s, count, rows / s->seqs[s->line[0]].rows);
    }
    for (uint32_t t = 0; t < s->num_teams; t++)
        for (uint32_t m = 0; m < s->teams[t].count; m++) {
            ts_sharer *q = &s->seqs[s->members[s->teams[t].first + m]];
            const uint32_t blocks = blocks_of(q, s->teams[t].chunks, block_tokens);
            q->alike = blocks > q->alike ? blocks : q->alike;
        }
}
