/*
 * A batch of sequences on its way into a plan: how each is cut, who shares what, how much there is
 * of everything, and then the plan's memory, written. For plan.cu.
 */
#ifndef TS_GPU_BATCH_CUH
#define TS_GPU_BATCH_CUH

#include "work_split.cuh"

extern "C" {
#include "sharing.h"
}

#include <stdlib.h>
#include <string.h>

namespace
{

/* Which kernel a sequence gets, and how its work is split; of one without query tokens, nothing. */
struct seq_cut {
    ts_gpu_list list;
    work_split c;
};

struct batch {
    ts_sharing sharing;
    seq_cut *cuts;
    sorter sorters[SPLIT_LISTS];
};

bool batch_init(batch &b, uint32_t num_seqs)
{
    b = batch{};
    b.cuts = (seq_cut *)calloc(num_seqs + 1, sizeof *b.cuts);
    return ts_sharing_init(&b.sharing, num_seqs) == 0 && b.cuts != NULL;
}

void batch_fini(batch &b)
{
    ts_sharing_fini(&b.sharing);
    free(b.cuts);
}

/* Query tokens of one tile of the tile kernel. */
uint32_t tile_tokens(const ts_gpu_plan *p)
{
    uint32_t group = p->heads / p->geometry.kv_heads;
    return group < TILE_ROWS ? TILE_ROWS / group : 1;
}

/* Entries that are laid out for a table of `blocks` blocks: more than it has, so that tokens can be
 * added without moving the tables behind it. */
size_t table_room(size_t blocks)
{
    return blocks + blocks / 8 + 8;
}

/* Finds how sequences are cut: and before, which of them have chunks that are one piece. */
void cut(ts_gpu_plan *p, const ts_attention_seq *seqs, batch &b)
{
    uint64_t tokens[LIST_COUNT] = {};
    for (uint32_t i = 0; i < p->num_seqs; i++) {
        if (seqs[i].q_tokens == 0)
            continue;
        ts_gpu_list list = b.cuts[i].list = list_of(p, &seqs[i]);
        if (list >= LIST_NARROW)
            tokens[list] += (uint64_t)seqs[i].kv_tokens * tiles_of(p, seqs[i].q_tokens, list);
    }
    for (uint32_t l = LIST_NARROW; l < LIST_COUNT; l++)
        p->whole_tokens[l] = whole_tokens(p, (ts_gpu_list)l, tokens[l]);
    for (uint32_t i = 0; i < p->num_seqs; i++)
        if (seqs[i].q_tokens > 0 && b.cuts[i].list >= LIST_NARROW)
            b.cuts[i].c = work_split_of(p, &seqs[i], b.cuts[i].list);
}

/* Whether teams are worth their pieces (TS_GPU_TEAM_TOKENS). */
bool are_teams_worth_it(const ts_gpu_plan *p)
{
    const uint32_t company = __atomic_load_n(&p->gpu->company, __ATOMIC_RELAXED);
    const uint64_t spared = p->spared * p->geometry.kv_heads * (company > 0 ? company : 1);
    return spared >= (uint64_t)p->gpu->team_tokens * p->gpu->info.processors &&
           p->spared >= p->kv_tokens / TS_GPU_TEAM_PART;
}

/* Finds teams (sharing.h). */
void find_teams(ts_gpu_plan *p, const ts_attention_seq *seqs, batch &b)
{
    ts_sharer *to = b.sharing.seqs;
    p->spared = p->kv_tokens = 0;
    for (uint32_t i = 0; i < p->num_seqs; i++)
        if (seqs[i].q_tokens > 0) {
            to[i].blocks = seqs[i].blocks;
            to[i].num_blocks = ceil_div(seqs[i].kv_tokens, p->geometry.block_tokens);
            p->kv_tokens += seqs[i].kv_tokens;
        }
    if (p->num_seqs > TEAM_LIST(~0u) || !ts_sharing_compare(&b.sharing))
        return;
    for (uint32_t i = 0; i < p->num_seqs; i++)
        if (to[i].alike > 0) {
            to[i].chunk_tokens = b.cuts[i].c.tokens;
            to[i].chunks = team_chunks(p, &seqs[i], b.cuts[i].list, b.cuts[i].c);
            to[i].rows = seqs[i].q_tokens * (p->heads / p->geometry.kv_heads);
        }
    ts_sharing_find(&b.sharing, p->geometry.block_tokens, team_rows(&p->geometry));
    p->spared = b.sharing.spared;
    if (!are_teams_worth_it(p))
        ts_sharing_drop(&b.sharing);
}

/* Whether wgmma may store the sequence's K and V itself: all are new, and each piece of work has
 * all chunks. */
bool is_storable(const ts_attention_seq *s, const seq_cut &cut)
{
    return cut.list == LIST_WGMMA && s->kv_tokens == s->q_tokens && cut.c.together == cut.c.chunks;
}

/* Counts items, records and counters of a sequence. */
void count_seq(ts_gpu_plan *p, const ts_attention_seq *s, const seq_cut &cut, uint32_t shared,
               sorter *sorters)
{
    const ts_gpu_list list = cut.list;
    const work_split &c = cut.c;
    p->q_tokens += s->q_tokens;
    if (list >= LIST_NARROW) {
        sorter &so = sorters[list - LIST_NARROW];
        uint32_t longest = c.together > 1 ? s->kv_tokens : c.chunks > 1 ? c.tokens : c.last;
        so.longest = longest > so.longest ? longest : so.longest;
        if (list == LIST_NARROW) {
            p->longest_piece = so.longest;
            p->shortest_piece = c.last < p->shortest_piece ? c.last : p->shortest_piece;
        }
        p->count[list] += (c.chunks / c.together - shared) * c.tiles;
        p->folds = p->folds || (is_wgmma(list) && c.together > 1);
        if (c.chunks > c.together) {
            p->records += (size_t)c.chunks * s->q_tokens * p->heads;
            p->counters += p->geometry.kv_heads * c.tiles;
        }
    }
    if (list == LIST_TILE)
        p->count[list] += ceil_div(s->q_tokens, tile_tokens(p));
    if (list == LIST_DECODE)
        p->count[list] += s->q_tokens;
    if (list == LIST_TILE || list == LIST_DECODE || has_many_rows(list))
        p->count[LIST_APPEND] += s->q_tokens;
    if (list == LIST_WGMMA && s->kv_tokens > p->longest)
        p->longest = s->kv_tokens;
    if (is_storable(s, cut))
        p->storable += s->q_tokens;
}

/* Says where each bucket's pieces begin, once the longest piece of each list is known. */
void sort_pieces(const ts_gpu_plan *p, const ts_attention_seq *seqs, batch &b)
{
    const ts_sharing &sharing = b.sharing;
    uint32_t counts[SPLIT_LISTS][BUCKETS] = {};
    for (uint32_t i = 0; i < p->num_seqs; i++) {
        ts_gpu_list list = b.cuts[i].list;
        const work_split &c = b.cuts[i].c;
        if (seqs[i].q_tokens == 0 || list < LIST_NARROW)
            continue;
        for (uint32_t chunk = sharing.seqs[i].shared; chunk < c.chunks; chunk += c.together)
            for (uint32_t tile = 0; tile < c.tiles; tile++)
                counts[list - LIST_NARROW][bucket_of(b.sorters[list - LIST_NARROW],
                                                     rank_of(p, &seqs[i], list, c, tile, chunk))]++;
    }
    for (uint32_t t = 0; t < sharing.num_teams; t++) {
        const ts_team &team = sharing.teams[t];
        const ts_sharer &first = sharing.seqs[sharing.members[team.first]];
        counts[0][bucket_of(b.sorters[0], first.chunk_tokens)] += team.chunks;
    }
    for (uint32_t l = 0; l < SPLIT_LISTS; l++)
        for (uint32_t n = 0, at = 0; n < BUCKETS; n++) {
            b.sorters[l].next[n] = at;
            at += counts[l][n];
        }
}

/* Counts items, records and counters; returns the entries of the block tables, and of all teams'
 * members before them. */
size_t count_up(ts_gpu_plan *p, const ts_attention_seq *seqs, batch &b)
{
    size_t entries = b.sharing.num_members;
    p->folds = false;
    memset(p->count, 0, sizeof p->count);
    p->records = p->counters = p->q_tokens = p->storable = p->longest = p->longest_piece = 0;
    p->shortest_piece = UINT32_MAX;
    for (uint32_t i = 0; i < p->num_seqs; i++) {
        if (seqs[i].q_tokens == 0) /* nothing is told of it, nor of its table */
            continue;
        entries += table_room(ceil_div(seqs[i].kv_tokens, p->geometry.block_tokens));
        count_seq(p, &seqs[i], b.cuts[i], b.sharing.seqs[i].shared, b.sorters);
    }
    p->count[LIST_NARROW] += (uint32_t)b.sharing.pieces;
    sort_pieces(p, seqs, b);
    return entries;
}

/* Sets where the parts of a plan with room for num_seqs sequences and items[l] items of each list l
 * lie; returns where the block tables start, whose length is the caller's to add. */
size_t lay_out(ts_gpu_plan *p, uint32_t num_seqs, const uint32_t *items)
{
    size_t at = PLAN_SEQS + num_seqs * sizeof(plan_seq);
    for (uint32_t l = 0; l < LIST_COUNT; l++) {
        at = (at + 15) / 16 * 16;
        p->items[l] = at;
        at += items[l] * (l >= LIST_NARROW ? sizeof(plan_piece) : sizeof(uint2));
    }
    return p->tables = at;
}

/* The sequences, and their tables. */
void fill_seqs(const ts_gpu_plan *p, const ts_attention_seq *seqs, const batch &b, plan_seq *to,
               uint32_t *tables)
{
    uint32_t table = b.sharing.num_members, row = 0, slot = 0, counter = 0;
    for (uint32_t i = 0; i < p->num_seqs; i++) {
        const ts_attention_seq *s = &seqs[i];
        const work_split &c = b.cuts[i].c;
        to[i] = plan_seq{table, s->kv_tokens, s->q_tokens, row, s->kv_tokens, 1, slot, counter};
        if (s->q_tokens == 0)
            continue;
        uint32_t blocks = ceil_div(s->kv_tokens, p->geometry.block_tokens);
        memcpy(tables + table, s->blocks, blocks * sizeof *tables);
        table += (uint32_t)table_room(blocks);
        row += s->q_tokens;
        if (b.cuts[i].list < LIST_NARROW)
            continue;
        to[i].chunk_tokens = c.tokens;
        to[i].num_chunks = c.chunks;
        if (c.chunks > c.together) {
            slot += c.chunks * s->q_tokens * p->heads;
            counter += p->geometry.kv_heads * c.tiles;
        }
    }
}

/* Writes teams' pieces: those of all teams' first chunks, then of their second ones, and so on, so
 * that teams with the same blocks read them at about the same time. */
struct team_writer {
    const ts_sharing *sharing;
    const plan_seq *seqs;
    sorter *order;
    plan_piece *pieces;
    uint32_t team, chunk; /* the next, if the team has it */
    uint64_t written;

    void write(uint64_t upto) /* until `upto` pieces are written */
    {
        for (; written < upto; team++) {
            if (team == sharing->num_teams) {
                team = 0;
                chunk++;
            }
            const ts_team &t = sharing->teams[team];
            if (t.chunks <= chunk)
                continue;
            const uint32_t first = sharing->members[t.first];
            pieces[order->next[bucket_of(*order, seqs[first].chunk_tokens)]++] =
                plan_piece{seqs[first], TEAM_PIECE | t.count << 24 | t.first, chunk, first, 2};
            written++;
        }
    }
};

/* The pieces of sequence i that are its own. */
void fill_pieces(const ts_gpu_plan *p, const ts_attention_seq *s, const plan_seq &seq, uint32_t i,
                 batch &b, plan_piece *pieces)
{
    ts_gpu_list list = b.cuts[i].list;
    const work_split &c = b.cuts[i].c;
    const ts_sharer &sharer = b.sharing.seqs[i];
    sorter &so = b.sorters[list - LIST_NARROW];
    /* Tiles of a chunk share reads; later ones see more. */
    for (uint32_t chunk = sharer.shared; chunk < c.chunks; chunk += c.together)
        for (uint32_t n = 0; n < c.tiles; n++) {
            uint32_t tile = c.tiles - 1 - n;
            uint32_t bucket = bucket_of(so, rank_of(p, s, list, c, tile, chunk));
            bool alone =
                c.tiles == 1 && chunk * c.tokens >= sharer.alike * p->geometry.block_tokens;
            pieces[so.next[bucket]++] = plan_piece{seq, tile, chunk, i, c.together * 2 + alone};
        }
}

/* Everything, into the plan's memory. */
void fill(const ts_gpu_plan *p, const ts_attention_seq *seqs, batch &b, unsigned char *host)
{
    const ts_sharing &sharing = b.sharing;
    plan_seq *to = (plan_seq *)(host + PLAN_SEQS);
    uint2 *items[LIST_COUNT];
    plan_piece *pieces[LIST_COUNT];
    for (uint32_t l = 0; l < LIST_COUNT; l++) {
        items[l] = (uint2 *)(host + p->items[l]);
        pieces[l] = (plan_piece *)(host + p->items[l]);
    }
    uint2 *storable = items[LIST_APPEND] + (p->count[LIST_APPEND] - p->storable);
    memcpy(((plan_head *)host)->counts, p->count, sizeof p->count);
    if (sharing.num_members > 0)
        memcpy(host + p->tables, sharing.members, sharing.num_members * sizeof(uint32_t));
    fill_seqs(p, seqs, b, to, (uint32_t *)(host + p->tables));
    team_writer teams = {&sharing, to, &b.sorters[0], pieces[LIST_NARROW], 0, 0, 0};
    for (uint32_t i = 0; i < p->num_seqs; i++) {
        const ts_attention_seq *s = &seqs[i];
        ts_gpu_list list = b.cuts[i].list;
        if (s->q_tokens == 0)
            continue;
        /* Teams' pieces, which seldom wait for memory, go in between those that do; in the first
         * quarter, for who ends a team's piece may have the chunks of many sequences to merge. */
        uint64_t share = sharing.pieces * 4 * (i + 1) / p->num_seqs;
        teams.write(share < sharing.pieces ? share : sharing.pieces);
        if (list >= LIST_NARROW)
            fill_pieces(p, s, to[i], i, b, pieces[list]);
        uint2 *&append = is_storable(s, b.cuts[i]) ? storable : items[LIST_APPEND];
        if (list < LIST_NARROW || has_many_rows(list))
            for (uint32_t q = 0; q < s->q_tokens; q++)
                *append++ = make_uint2(i, q);
        if (list == LIST_TILE)
            for (uint32_t q = 0; q < s->q_tokens; q += tile_tokens(p))
                *items[LIST_TILE]++ = make_uint2(i, q);
        if (list == LIST_DECODE)
            for (uint32_t q = 0; q < s->q_tokens; q++)
                *items[LIST_DECODE]++ = make_uint2(i, q);
    }
    teams.write(sharing.pieces);
}

} // namespace

#endif
