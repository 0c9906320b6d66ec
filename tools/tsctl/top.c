/*
 * tsctl top: the daemon's rates, a picture of one pool's blocks and the sessions, drawn anew every
 * second. Sessions and their blocks have the same colour.
 */
#define _GNU_SOURCE
#include "tsctl.h"

#include "cache_figures.h"
#include "error.h"
#include "plain_text.h"

#include <curses.h>
#include <stdlib.h>
#include <string.h>

enum { SHARED_PAIR = 1, SESSION_PAIRS, NUM_SESSION_PAIRS = 5 };

typedef struct row {
    uint64_t session, sequences, blocks, requests;
    uint32_t uid, pid, steps;
    double rate;       /* requests a second */
    char program[256]; /* 63 bytes, escaped */
} row;

typedef struct view {
    ts_client *client;
    char pool[64];
    row *rows;
    size_t num_rows;
    double tokens, requests; /* a second */
    Tspb__Reply *status, *map;
    uint64_t last_ms, last_tokens, last_requests, last_pid; /* of the daemon, by its clock */
    char sort;                                              /* r, b or s */
    bool paused, knows_rates;
} view;

static short pair_of(uint32_t owner)
{
    return (short)(owner == OWNER_SEVERAL ? SHARED_PAIR
                   : owner < OWNER_SESSIONS
                       ? 0
                       : SESSION_PAIRS + (owner - OWNER_SESSIONS) % NUM_SESSION_PAIRS);
}

/* ---- fetching ---- */

static void forget(Tspb__Reply **reply)
{
    if (*reply != NULL)
        tspb__reply__free_unpacked(*reply, NULL);
    *reply = NULL;
}

static ts_status fetch_status(view *v)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    forget(&v->status);
    return tsctl_ask(v->client, &request, TSPB__REPLY__BODY_STATUS_REPLY, &v->status);
}

static ts_status fetch_map(view *v, uint32_t cells)
{
    Tspb__PoolMap body = TSPB__POOL_MAP__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_POOL_MAP;
    request.pool_map = &body;
    body.pool = v->pool;
    body.cells = cells;
    forget(&v->map);
    return tsctl_ask(v->client, &request, TSPB__REPLY__BODY_POOL_MAP_REPLY, &v->map);
}

/* Rows come in order of their place, the low half of the session's id. */
static const row *find_row(const row *rows, size_t count, uint64_t session)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if ((uint32_t)rows[middle].session < (uint32_t)session)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && rows[low].session == session ? &rows[low] : NULL;
}

static ts_status fetch_sessions(view *v, double seconds)
{
    Tspb__ListSessions body = TSPB__LIST_SESSIONS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    row *rows = NULL;
    size_t count = 0;
    request.body_case = TSPB__REQUEST__BODY_LIST_SESSIONS;
    request.list_sessions = &body;
    for (bool more = true; more;) {
        ts_status status = tsctl_ask(v->client, &request, TSPB__REPLY__BODY_SESSION_LIST, &reply);
        if (status != TS_OK) {
            free(rows);
            return status;
        }
        const Tspb__SessionList *l = reply->session_list;
        row *grown = realloc(rows, (count + l->n_sessions + 1) * sizeof *rows);
        if (grown == NULL) {
            tspb__reply__free_unpacked(reply, NULL);
            free(rows);
            return ts_fail(v->client, TS_ENOMEM, "no memory for %zu sessions", count);
        }
        rows = grown;
        for (size_t i = 0; i < l->n_sessions; i++) {
            const Tspb__SessionInfo *s = l->sessions[i];
            row *r = &rows[count++];
            *r = (row){s->session, s->sequences, s->blocks, s->requests, s->uid,
                       s->pid,     s->steps,     0,         ""};
            snprintf(r->program, sizeof r->program, "%s", s->program);
            const row *before = find_row(v->rows, v->num_rows, r->session);
            if (before != NULL && seconds > 0)
                r->rate = (double)(r->requests - before->requests) / seconds;
        }
        more = l->more && l->n_sessions > 0;
        if (more)
            body.after = l->sessions[l->n_sessions - 1]->session;
        tspb__reply__free_unpacked(reply, NULL);
    }
    free(v->rows);
    v->rows = rows;
    v->num_rows = count;
    return TS_OK;
}

/* Index of the pool that is shown. */
static size_t pool_index(const view *v)
{
    const Tspb__StatusReply *s = v->status->status_reply;
    for (size_t i = 0; i < s->n_pools; i++)
        if (strcmp(s->pools[i]->name, v->pool) == 0)
            return i;
    return 0;
}

static void show_pool(view *v, size_t index)
{
    const Tspb__StatusReply *s = v->status->status_reply;
    if (s->n_pools > 0)
        snprintf(v->pool, sizeof v->pool, "%s", s->pools[index % s->n_pools]->name);
}

static ts_status fetch(view *v, uint32_t cells)
{
    ts_status status = fetch_status(v);
    if (status != TS_OK)
        return status;
    const Tspb__StatusReply *s = v->status->status_reply;
    const bool same = v->last_ms != 0 && v->last_pid == s->pid; /* the next daemon counts anew */
    double seconds = same ? (double)(s->uptime_ms - v->last_ms) / 1000 : 0;
    v->knows_rates = seconds > 0;
    if (seconds > 0) {
        v->tokens = (double)(s->tokens - v->last_tokens) / seconds;
        v->requests = (double)(s->requests - v->last_requests) / seconds;
    }
    v->last_ms = s->uptime_ms;
    v->last_pid = s->pid;
    v->last_tokens = s->tokens;
    v->last_requests = s->requests;
    show_pool(v, pool_index(v));
    status = fetch_sessions(v, seconds);
    if (status != TS_OK)
        return status;
    status = s->n_pools > 0 ? fetch_map(v, cells) : TS_ENOENT;
    if (status != TS_ENOENT)
        return status;
    forget(&v->map); /* there is none, or it was deleted just now */
    return TS_OK;
}

/* ---- drawing ---- */

/* Adds as much of the text at the cursor as `columns` columns hold. */
static void add_line(const char *text, int columns)
{
    char shown[1024];
    addstr(text_cell(text, 0, (size_t)columns, shown, sizeof shown));
}

/* A line, cut where the screen ends, of which the first `bold` bytes stand out. */
static void put_line(int line, const char *text, size_t bold)
{
    char shown[1024];
    text_cell(text, 0, (size_t)COLS, shown, sizeof shown);
    bold = bold < strlen(shown) ? bold : strlen(shown);
    move(line, 0);
    attron(A_BOLD);
    addnstr(shown, (int)bold);
    attroff(A_BOLD);
    addstr(shown + bold);
}

static void draw_head(const view *v)
{
    const Tspb__StatusReply *s = v->status->status_reply;
    char line[512], rates[96] = "", up[32], used[32], all[32];
    if (v->knows_rates)
        snprintf(rates, sizeof rates, "  tokens/s %.0f  requests/s %.0f", v->tokens, v->requests);
    snprintf(line, sizeof line, "tinyserved %s%s%s  up %s  sessions %llu%s  refused %llu",
             s->version, v->paused ? "  stopped" : "", s->draining ? "  draining" : "",
             text_duration(s->uptime_ms, up, sizeof up), (unsigned long long)s->sessions, rates,
             (unsigned long long)s->refused);
    put_line(0, line, strlen("tinyserved ") + strlen(s->version));
    if (v->map == NULL)
        return put_line(1, s->n_pools == 0 ? "no pools" : "", 0);
    const Tspb__PoolSummary *p = v->map->pool_map_reply->pool;
    snprintf(line, sizeof line,
             "%s on %s (%zu of %zu): %u of %u blocks used (%.0f %%), %u shared; %s of %s", p->name,
             p->device, pool_index(v) + 1, s->n_pools, p->used_blocks, p->blocks,
             p->blocks == 0 ? 0 : 100.0 * p->used_blocks / p->blocks, p->shared_blocks,
             ts_text_bytes((uint64_t)p->used_blocks * p->block_bytes, used, sizeof used),
             ts_text_bytes((uint64_t)p->blocks * p->block_bytes, all, sizeof all));
    put_line(1, line, strlen(p->name));
    char hits[32] = "";
    if (p->asked_tokens > 0)
        snprintf(hits, sizeof hits, ", %.0f %% hits",
                 100 * ts_cache_hit_rate(p->found_tokens, p->asked_tokens));
    snprintf(
        line, sizeof line,
        "%llu sequences, %llu kept; %u blocks cached (%.0f %%)%s; %llu steps open, %u wait; %s",
        (unsigned long long)p->sequences, (unsigned long long)p->kept_sequences, p->cached_blocks,
        p->blocks == 0 ? 0 : 100.0 * p->cached_blocks / p->blocks, hits,
        (unsigned long long)p->open_steps, p->waiting_sessions, p->kernel);
    put_line(2, line, 0);
}

static void draw_map(const view *v, int top, int columns)
{
    static const char *const fills[] = {"░", "▒", "▓", "█"};
    const Tspb__PoolMapReply *m = v->map->pool_map_reply;
    for (size_t i = 0; i < m->n_used; i++) {
        uint64_t slots = (uint64_t)m->blocks_per_cell * m->pool->block_tokens;
        uint64_t fill = m->tokens[i] == 0 ? 0 : (m->tokens[i] * 4ull - 1) / slots;
        short pair = pair_of(m->owners[i]);
        move(top + (int)(i / (size_t)columns), (int)(i % (size_t)columns));
        attron(COLOR_PAIR(pair));
        bool hidden = m->others_hidden && m->tokens[i] == 0 && m->owners[i] == OWNER_SEVERAL;
        addstr(m->used[i] == 0 ? text_unused(m, i) : hidden ? "■" : fills[fill > 3 ? 3 : fill]);
        attroff(COLOR_PAIR(pair));
    }
}

static int by_requests(const void *a, const void *b)
{
    double x = ((const row *)a)->rate, y = ((const row *)b)->rate;
    return x < y ? 1 : x > y ? -1 : 0;
}

static int by_blocks(const void *a, const void *b)
{
    uint64_t x = ((const row *)a)->blocks, y = ((const row *)b)->blocks;
    return x < y ? 1 : x > y ? -1 : 0;
}

static int by_sequences(const void *a, const void *b)
{
    uint64_t x = ((const row *)a)->sequences, y = ((const row *)b)->sequences;
    return x < y ? 1 : x > y ? -1 : 0;
}

static void draw_sessions(const view *v, int top, int lines, int columns)
{
    attron(A_REVERSE);
    mvprintw(top, 0, "%-*.*s", columns, columns,
             "  SESSION          PROGRAM             PID    UID  SEQS  BLOCKS STEPS  REQ/S");
    attroff(A_REVERSE);
    row *sorted = malloc((v->num_rows + 1) * sizeof *sorted);
    if (sorted == NULL)
        return;
    if (v->num_rows > 0)
        memcpy(sorted, v->rows, v->num_rows * sizeof *sorted);
    qsort(sorted, v->num_rows, sizeof *sorted,
          v->sort == 'b'   ? by_blocks
          : v->sort == 's' ? by_sequences
                           : by_requests);
    for (size_t i = 0; i < v->num_rows && (int)i < lines - 1; i++) {
        const row *r = &sorted[i];
        short pair = pair_of((uint32_t)r->session + OWNER_SESSIONS);
        attron(COLOR_PAIR(pair));
        mvaddstr(top + 1 + (int)i, 0, "█");
        attroff(COLOR_PAIR(pair));
        char line[512], program[256];
        snprintf(line, sizeof line, " %-16llx %s %7u %6u %5llu %7llu %5u %6.0f",
                 (unsigned long long)r->session,
                 text_cell(r->program, 15, 15, program, sizeof program), r->pid, r->uid,
                 (unsigned long long)r->sequences, (unsigned long long)r->blocks, r->steps,
                 r->rate);
        add_line(line, columns - 1);
    }
    free(sorted);
}

/* Rows and columns of the map on a screen of that size. */
static void map_size(int lines, int columns, int *rows, int *across)
{
    *across = columns < 128 ? columns : 128;
    *rows = (lines - 6) / 2;
    if (*rows > 16)
        *rows = 16;
    if (*rows < 1)
        *rows = 1;
}

static void draw(const view *v)
{
    int lines, columns, rows, across;
    getmaxyx(stdscr, lines, columns);
    map_size(lines, columns, &rows, &across);
    erase();
    draw_head(v);
    size_t used = 0;
    if (v->map != NULL) {
        draw_map(v, 4, across);
        used = (v->map->pool_map_reply->n_used + (size_t)across - 1) / (size_t)across;
    }
    int top = 5 + (int)used;
    draw_sessions(v, top, lines - 1 - top, columns);
    mvaddnstr(lines - 1, 0,
              "q end  n/p pool  r/b/s sort by requests, blocks, sequences  space stop",
              columns - 1);
    refresh();
}

/* ---- running ---- */

/* False: it is to end. */
static bool key(view *v, int pressed)
{
    size_t count = v->status->status_reply->n_pools;
    switch (pressed) {
    case 'q':
        return false;
    case 'n':
        show_pool(v, pool_index(v) + 1);
        break;
    case 'p':
        show_pool(v, pool_index(v) + count - 1);
        break;
    case 'r':
    case 'b':
    case 's':
        v->sort = (char)pressed;
        break;
    case ' ':
        v->paused = !v->paused;
        break;
    case 'L' - '@': /* ^L: what others have written to the terminal goes */
        clearok(stdscr, TRUE);
        break;
    default:
        break;
    }
    return true;
}

static void start_screen(double interval)
{
    initscr();
    cbreak();
    noecho();
    curs_set(0);
    keypad(stdscr, TRUE);
    timeout((int)(interval * 1000));
    if (!has_colors())
        return;
    static const short colors[] = {COLOR_RED, COLOR_GREEN, COLOR_YELLOW, COLOR_BLUE, COLOR_CYAN};
    start_color();
    use_default_colors();
    init_pair(SHARED_PAIR, COLOR_MAGENTA, -1);
    for (int i = 0; i < NUM_SESSION_PAIRS; i++)
        init_pair((short)(SESSION_PAIRS + i), colors[i], -1);
}

ts_status top_run(ts_client *client, const char *pool, double interval)
{
    view v = {.client = client, .sort = 'r'};
    snprintf(v.pool, sizeof v.pool, "%s", pool);
    ts_status status = fetch_status(&v);
    if (status == TS_OK && pool[0] != '\0' &&
        (v.status->status_reply->n_pools == 0 ||
         strcmp(v.status->status_reply->pools[pool_index(&v)]->name, pool) != 0))
        status = ts_fail(client, TS_ENOENT, "there is no pool '%.64s'", pool);
    if (status != TS_OK) {
        forget(&v.status);
        return status;
    }
    start_screen(interval);
    for (bool goes_on = true; goes_on && status == TS_OK;) {
        int lines, columns, rows, across;
        getmaxyx(stdscr, lines, columns);
        map_size(lines, columns, &rows, &across);
        if (!v.paused || v.last_ms == 0)
            status = fetch(&v, (uint32_t)(rows * across));
        if (status != TS_OK)
            break;
        draw(&v);
        int pressed = getch();
        goes_on = pressed == ERR || key(&v, pressed);
    }
    endwin();
    forget(&v.status);
    forget(&v.map);
    free(v.rows);
    return status;
}
