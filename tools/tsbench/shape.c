#include "shape.h"

#include "dtypes.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct reader {
    const char *at; /* in the text */
    const char *text;
    char *why;
    size_t why_bytes;
} reader;

static bool refuse(reader *r, const char *format, ...)
{
    char what[160];
    va_list args;
    va_start(args, format);
    /* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): va_start set it */
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    snprintf(r->why, r->why_bytes, "shape '%.95s': %s", r->text, what);
    return false;
}

static void skip_spaces(reader *r)
{
    r->at += strspn(r->at, " ");
}

/* Takes the word, which nothing but a space, a mark or the end may follow. */
static bool take_word(reader *r, const char *word)
{
    skip_spaces(r);
    const size_t length = strlen(word);
    if (strncmp(r->at, word, length) != 0 ||
        strchr(" ,+-/", r->at[length]) == NULL) /* which finds the end, too */
        return false;
    r->at += length;
    return true;
}

static bool take_mark(reader *r, char mark)
{
    skip_spaces(r);
    if (*r->at != mark)
        return false;
    r->at++;
    return true;
}

static bool take_number(reader *r, const char *what, uint32_t most, uint32_t *out)
{
    char *end;
    skip_spaces(r);
    if (*r->at < '0' || *r->at > '9')
        return refuse(r, "'%.20s' where the number of %s is expected", r->at, what);
    const unsigned long long n = strtoull(r->at, &end, 10);
    if (n < 1 || n > most)
        return refuse(r, "%llu %s; 1 to %u are possible", n, what, most);
    r->at = end;
    *out = (uint32_t)n;
    return true;
}

static bool take_group(reader *r, bench_shape *s)
{
    if (s->num_groups == BENCH_GROUPS_MAX)
        return refuse(r, "more than %u groups", BENCH_GROUPS_MAX);
    bench_group *g = &s->groups[s->num_groups++];
    if (!take_number(r, "sequences", BENCH_SEQS_MAX, &g->count))
        return false;
    if (!take_word(r, "x"))
        return refuse(r, "'%.20s' where 'x TOKENS' is expected", r->at);
    if (!take_number(r, "tokens", BENCH_TOKENS_MAX, &g->least))
        return false;
    g->most = g->least;
    if (take_mark(r, '-') && !take_number(r, "tokens", BENCH_TOKENS_MAX, &g->most))
        return false;
    if (g->most < g->least)
        return refuse(r, "%u-%u tokens: the first is the least", g->least, g->most);
    return true;
}

static bool take_dtype(reader *r, ts_dtype *out)
{
    for (int i = 0; i < TS_DTYPE_COUNT; i++)
        if (take_word(r, ts_dtype_name((ts_dtype)i))) {
            *out = (ts_dtype)i;
            return true;
        }
    if (!take_word(r, "fp8"))
        return refuse(r, "'%.20s' where fp32, fp16, bf16 or fp8 is expected", r->at);
    *out = TS_DTYPE_FP8_E4M3;
    return true;
}

static bool take_heads(reader *r, bench_shape *s)
{
    char why[160];
    if (!take_number(r, "query heads", TS_HEADS_MAX, &s->heads))
        return false;
    if (!take_mark(r, '/'))
        return refuse(r, "'%.20s' where '/KV_HEADS/HEAD_DIM' is expected", r->at);
    if (!take_number(r, "KV heads", s->heads, &s->kv_heads))
        return false;
    if (!take_mark(r, '/'))
        return refuse(r, "'%.20s' where '/HEAD_DIM' is expected", r->at);
    if (!take_number(r, "elements a head", TS_HEAD_DIM_MAX, &s->head_dim) ||
        !take_dtype(r, &s->dtype))
        return false;
    if (s->heads % s->kv_heads != 0)
        return refuse(r, "%u query heads aren't a multiple of %u KV heads", s->heads, s->kv_heads);
    s->layout = take_word(r, "hnd") ? TS_LAYOUT_HND : TS_LAYOUT_NHD;
    (void)take_word(r, "nhd");
    const ts_geometry g = {.layers = 1,
                           .kv_heads = s->kv_heads,
                           .head_dim = s->head_dim,
                           .block_tokens = 16,
                           .dtype = s->dtype,
                           .layout = s->layout};
    return ts_geometry_check(&g, why, sizeof why) == TS_OK || refuse(r, "%s", why);
}

/* "4 new", "all new", "8192 shared", or the heads, which contain the first '/'. */
static bool take_part(reader *r, bench_shape *s)
{
    uint32_t n;
    if (take_word(r, "all")) {
        s->new_tokens = 0;
        return take_word(r, "new") || refuse(r, "'%.20s' where 'new' is expected", r->at);
    }
    skip_spaces(r);
    const size_t digits = strspn(r->at, "0123456789");
    if (r->at[digits] == '/')
        return take_heads(r, s);
    if (!take_number(r, "tokens", BENCH_TOKENS_MAX, &n))
        return false;
    if (take_word(r, "new"))
        /* NOLINTNEXTLINE(clang-analyzer-core.uninitialized.Assign): take_number set it */
        s->new_tokens = n;
    else if (take_word(r, "shared"))
        /* NOLINTNEXTLINE(clang-analyzer-core.uninitialized.Assign): take_number set it */
        s->shared = n;
    else
        return refuse(r, "'%.20s' where 'new' or 'shared' is expected", r->at);
    return true;
}

bool bench_shape_is(const char *text)
{
    return strstr(text, " x ") != NULL && strchr(text, '/') != NULL;
}

bool bench_shape_parse(const char *text, bench_shape *s, char *why, size_t why_bytes)
{
    reader r = {.at = text, .text = text, .why = why, .why_bytes = why_bytes};
    *s = (bench_shape){.new_tokens = 1};
    if (strlen(text) >= sizeof s->name)
        return refuse(&r, "%zu characters; the limit is %zu", strlen(text), sizeof s->name - 1);
    snprintf(s->name, sizeof s->name, "%s", text);
    do {
        if (!take_group(&r, s))
            return false;
    } while (take_mark(&r, '+'));
    while (take_mark(&r, ','))
        if (!take_part(&r, s))
            return false;
    skip_spaces(&r);
    if (*r.at != '\0')
        return refuse(&r, "'%.20s' is too much", r.at);
    if (s->heads == 0)
        return refuse(&r, "HEADS/KV_HEADS/HEAD_DIM DTYPE is missing");
    for (uint32_t i = 0; i < s->num_groups; i++) {
        if (s->groups[i].least < s->new_tokens)
            return refuse(&r, "%u new tokens of %u", s->new_tokens, s->groups[i].least);
        if (s->groups[i].least < s->shared)
            return refuse(&r, "%u shared tokens of %u", s->shared, s->groups[i].least);
    }
    return true;
}

uint32_t bench_group_tokens(const bench_group *g, uint32_t i)
{
    if (g->most == g->least || g->count == 1)
        return g->least;
    return g->least +
           (uint32_t)((uint64_t)(g->most - g->least) * (i * 29ull % g->count) / (g->count - 1));
}
