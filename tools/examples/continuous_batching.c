/*
 * A worker with continuous batching: up to 32 sequences of different lengths are computed in each
 * step, and when one ends, the next request takes its place in the step after.
 *
 *   continuous_batching [REQUESTS [BATCH]]     96 requests, at most 32 at a time
 *
 * What a scheduler needs of TinyServe is all here:
 *   - a request begins with what the pool has of its prompt (ts_seq_match);
 *   - prompts are computed in parts, beside sequences that decode (BUDGET tokens a step);
 *   - a step that finds no room waits for other workers' (wait_ms). If none comes, the youngest
 *     sequence is put back: what was computed of it stays cached, and is found again later.
 *
 * The "model" is arithmetic on hashes, so that this file needs nothing else. A line for each
 * request says what it came to. The lines are the same for any BATCH, and beside any other worker.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tinyserve.h>

enum { BATCH_MAX = 32, BUDGET = 256, VOCABULARY = 128, WAIT_MS = 100, LENGTH_MAX = 400 };

static const char space[] = "tinyserve/examples/continuous_batching"; /* whose K and V these are */

typedef struct request {
    uint32_t number;
    uint32_t tokens[LENGTH_MAX];
    uint32_t length, end; /* tokens that are known; as many as there will be */
    uint32_t stored;      /* of them, those whose K and V are in the pool */
    uint32_t now;         /* of them, those that the present step adds */
    ts_seq seq;
} request;

static ts_client *client;
static ts_pool *pool;
static const ts_geometry *shape;
static uint32_t steps, put_back, found, most;

static void check(ts_status status)
{
    if (status == TS_OK)
        return;
    fprintf(stderr, "continuous_batching: %s\n", ts_error(client));
    exit(1);
}

static uint32_t hash(uint32_t a, uint32_t b)
{
    uint64_t x = ((uint64_t)a << 32 | b) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9u;
    return (uint32_t)(x >> 32);
}

/* ---- the model: two query heads for each KV head, q, k and v all parts of one state ---- */

static uint32_t width(void)
{
    return 2 * shape->kv_heads * shape->head_dim;
}

static float feature(uint32_t token, uint32_t i)
{
    return (float)hash(token + 1, i) / 2147483648.0f - 1; /* -1..1 */
}

/* The token that the state looks most like. */
static uint32_t next_token(const float *state)
{
    uint32_t best = 0;
    double best_score = -INFINITY;
    for (uint32_t token = 0; token < VOCABULARY; token++) {
        double score = 0;
        for (uint32_t i = 0; i < width(); i++)
            score += (double)state[i] * (double)feature(token, i);
        if (score > best_score) {
            best_score = score;
            best = token;
        }
    }
    return best;
}

/* All layers of the step; `states` has a row for each new token. */
static void compute(ts_step *step, float *states, uint32_t rows)
{
    const uint32_t kv = width() / 2;
    ts_run_options how = TS_RUN_OPTIONS_INIT;
    how.rope_theta = 10000; /* else a token wouldn't know where it is */
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        float *q = ts_step_q(step), *k = ts_step_k(step), *v = ts_step_v(step);
        memcpy(q, states, (size_t)rows * width() * sizeof *q);
        for (uint32_t row = 0; row < rows; row++) {
            memcpy(k + (size_t)row * kv, states + (size_t)row * width(), kv * sizeof *k);
            memcpy(v + (size_t)row * kv, states + (size_t)row * width() + kv, kv * sizeof *v);
        }
        check(ts_step_run_with(step, layer, &how));
        const float *out = ts_step_out(step);
        for (size_t i = 0; i < (size_t)rows * width(); i++)
            states[i] = 0.5f * states[i] + out[i];
    }
}

/* ---- requests ---- */

/* Prompts of 8 to 159 tokens, of which every other one begins with the same 64; 4 to 127 answers.
 */
static void make(request *r, uint32_t number)
{
    *r = (request){.number = number, .length = 8 + hash(number, 1) % 152};
    r->end = r->length + 4 + hash(number, 2) % 124;
    for (uint32_t i = 0; i < r->length; i++)
        r->tokens[i] = hash(number % 2 == 0 && i < 64 ? 7 : number, 100 + i) % VOCABULARY;
}

static uint32_t blocks_for(uint32_t tokens)
{
    return (tokens + shape->block_tokens - 1) / shape->block_tokens;
}

/* Whether the pool has room now for all that these requests and this one may become. Another worker
 * may take it meanwhile. */
static bool fits(const request *r, request *const *batch, uint32_t count)
{
    ts_pool_room room = TS_POOL_ROOM_INIT;
    uint64_t needed = blocks_for(r->end);
    check(ts_pool_stats(pool, &room));
    for (uint32_t i = 0; i < count; i++)
        needed += blocks_for(batch[i]->end) - blocks_for(batch[i]->stored);
    return count == 0 || needed <= room.available;
}

/* It runs from now on, with what the pool has of it. */
static void start(request *r)
{
    ts_seq_options options = TS_SEQ_OPTIONS_INIT;
    options.space = space;
    options.space_bytes = sizeof space - 1;
    check(ts_seq_match(pool, r->tokens, &r->length, 1, &options, &r->seq, &r->stored));
    found += r->stored;
}

/* The step of this batch. It waits for room. If none comes, all of it is taken by sequences that
 * wait, too: then the youngest is put back, and in the end all are (NULL). */
static ts_step *begin(request **batch, uint32_t *count, uint32_t *rows)
{
    static uint32_t ids[BUDGET + BATCH_MAX];
    ts_seq seqs[BATCH_MAX];
    uint32_t counts[BATCH_MAX];
    ts_step *step;
    while (*count > 0) {
        uint32_t budget = BUDGET;
        *rows = 0;
        for (uint32_t i = 0; i < *count; i++) {
            request *r = batch[i];
            r->now = r->length - r->stored;
            if (r->now > 1) /* of a prompt, of which a part will do; but a token is computed */
                r->now = budget == 0 ? 1 : r->now < budget ? r->now : budget;
            budget -= r->now < budget ? r->now : budget;
            memcpy(ids + *rows, r->tokens + r->stored, r->now * sizeof *ids);
            *rows += r->now;
            seqs[i] = r->seq;
            counts[i] = r->now;
        }
        ts_step_options options = TS_STEP_OPTIONS_INIT;
        options.heads = 2 * shape->kv_heads;
        options.tokens = ids;
        options.wait_ms = WAIT_MS;
        const ts_status status = ts_step_begin(pool, seqs, counts, *count, &options, &step);
        if (status == TS_OK)
            return step;
        request *youngest = batch[*count - 1];
        if (status != TS_ENOSPC || blocks_for(youngest->end) > ts_pool_blocks(pool))
            check(status); /* no waiting helps */
        check(ts_seq_free(pool, &youngest->seq, 1));
        youngest->seq = 0;
        (*count)--;
        put_back++;
    }
    return NULL;
}

/* Computes one step and takes the next token of each sequence that is complete. */
static void advance(request **batch, uint32_t *count)
{
    uint32_t rows, row = 0;
    ts_step *step = begin(batch, count, &rows);
    if (step == NULL)
        return;
    float *states = calloc((size_t)rows * width(), sizeof *states);
    if (states == NULL)
        exit(1);
    for (uint32_t i = 0; i < *count; i++)
        for (uint32_t j = 0; j < batch[i]->now; j++, row++)
            for (uint32_t k = 0; k < width(); k++)
                states[(size_t)row * width() + k] =
                    feature(batch[i]->tokens[batch[i]->stored + j], k);
    compute(step, states, rows);
    check(ts_step_commit(step, NULL));
    row = 0;
    for (uint32_t i = 0; i < *count; i++) {
        request *r = batch[i];
        row += r->now;
        r->stored += r->now;
        if (r->stored == r->length)
            r->tokens[r->length++] = next_token(states + (size_t)(row - 1) * width());
    }
    free(states);
    steps++;
    most = *count > most ? *count : most;
}

static void print(const request *r)
{
    uint32_t digest = 0;
    for (uint32_t i = 0; i < r->length; i++)
        digest = hash(digest, r->tokens[i]);
    printf("request %u: %u tokens, digest %08x\n", r->number, r->length, digest);
}

static uint32_t read_argument(int argc, char **argv, int i, uint32_t preset, uint32_t limit)
{
    char *end = NULL;
    const unsigned long n = i < argc ? strtoul(argv[i], &end, 10) : preset;
    if (n >= 1 && n <= limit && (end == NULL || *end == '\0'))
        return (uint32_t)n;
    fprintf(stderr, "continuous_batching: '%s' is not a number of 1 to %u\n", argv[i], limit);
    exit(2);
}

int main(int argc, char **argv)
{
    const uint32_t requests = read_argument(argc, argv, 1, 96, 1u << 16);
    const uint32_t at_once = read_argument(argc, argv, 2, BATCH_MAX, BATCH_MAX);
    request *all = calloc(requests, sizeof *all), *batch[BATCH_MAX];
    uint32_t count = 0, done = 0;
    if (all == NULL)
        return 1;
    check(ts_connect(NULL, &client));
    check(ts_pool_open(client, "", 0, &pool));
    shape = ts_pool_geometry(pool, 0);
    for (uint32_t i = 0; i < requests; i++)
        make(&all[i], i);
    while (done < requests) {
        /* The oldest that don't run, as far as there are places and room. */
        for (uint32_t i = 0; i < requests && count < at_once; i++)
            if (all[i].seq == 0 && all[i].length < all[i].end) {
                if (!fits(&all[i], batch, count))
                    break;
                start(&all[i]);
                batch[count++] = &all[i];
            }
        advance(batch, &count);
        for (uint32_t i = count; i-- > 0;)
            if (batch[i]->length == batch[i]->end) {
                check(ts_seq_free(pool, &batch[i]->seq, 1)); /* what is stored stays cached */
                print(batch[i]);
                memmove(&batch[i], &batch[i + 1], (--count - i) * sizeof(request *));
                done++;
            }
    }
    fprintf(stderr, "%u steps of up to %u sequences; %u tokens found in the pool; %u put back\n",
            steps, most, found, put_back);
    ts_disconnect(client);
    free(all);
    return 0;
}
