/* Ends of lives: a binary heap of the sequences whose time ends, the first to end on top. Each
 * sequence knows its place in it. */
#include "sequence.h"

#include <stdlib.h>

static void put(ts_sequences *s, uint32_t place, ts_life life)
{
    s->lives[place] = life;
    s->all[life.seq].life = place;
}

/* The life at this place goes up or down to where it belongs. */
static void settle(ts_sequences *s, uint32_t place)
{
    const ts_life life = s->lives[place];
    for (; place > 0 && life.end_ms < s->lives[(place - 1) / 2].end_ms; place = (place - 1) / 2)
        put(s, place, s->lives[(place - 1) / 2]);
    for (uint32_t child; (child = 2 * place + 1) < s->num_lives; place = child) {
        if (child + 1 < s->num_lives && s->lives[child + 1].end_ms < s->lives[child].end_ms)
            child++;
        if (life.end_ms <= s->lives[child].end_ms)
            break;
        put(s, place, s->lives[child]);
    }
    put(s, place, life);
}

ts_status ts_sequences_reserve_life(ts_sequences *s)
{
    if (s->num_lives < s->lives_capacity)
        return TS_OK;
    const uint32_t wanted = s->lives_capacity == 0 ? 16 : 2 * s->lives_capacity;
    ts_life *grown = realloc(s->lives, wanted * sizeof *grown);
    if (grown == NULL)
        return TS_ENOMEM;
    s->lives = grown;
    s->lives_capacity = wanted;
    return TS_OK;
}

void ts_sequence_set_life(ts_sequences *s, ts_sequence *seq, uint64_t ttl_ms, uint64_t now_ms)
{
    if (seq->life == TS_NONE)
        put(s, s->num_lives++, (ts_life){.end_ms = UINT64_MAX, .seq = ts_sequence_index(s, seq)});
    s->lives[seq->life].ttl_ms = ttl_ms;
    ts_sequence_renew_life(s, seq, now_ms);
}

void ts_sequence_renew_life(ts_sequences *s, const ts_sequence *seq, uint64_t now_ms)
{
    ts_life *life = &s->lives[seq->life];
    const bool never = seq->step != TS_NONE || life->ttl_ms > UINT64_MAX - now_ms;
    life->end_ms = never ? UINT64_MAX : now_ms + life->ttl_ms;
    settle(s, seq->life);
}

void ts_sequence_end_life(ts_sequences *s, ts_pool_books *pool, ts_sequence *seq)
{
    const uint32_t place = seq->life;
    if (place == TS_NONE)
        return;
    if (s->lives[place].ticket != NULL) {
        pool->tenants[seq->tenant].tickets--;
        ts_names_remove(&s->tickets, seq->tenant, s->lives[place].ticket);
    }
    seq->life = TS_NONE;
    if (place == --s->num_lives)
        return;
    put(s, place, s->lives[s->num_lives]);
    settle(s, place);
}

uint64_t ts_sequence_left_ms(const ts_sequences *s, const ts_sequence *seq, uint64_t now_ms)
{
    if (seq->life == TS_NONE)
        return 0;
    const ts_life *life = &s->lives[seq->life];
    if (seq->step != TS_NONE) /* from the step's end on */
        return life->ttl_ms >= UINT64_MAX - now_ms ? 0 : life->ttl_ms;
    if (life->end_ms == UINT64_MAX) /* never, as without a life */
        return 0;
    return life->end_ms > now_ms ? life->end_ms - now_ms : 0;
}

ts_sequence *ts_sequences_first_over(const ts_sequences *s, uint64_t now_ms)
{
    return s->num_lives > 0 && s->lives[0].end_ms <= now_ms ? &s->all[s->lives[0].seq] : NULL;
}
