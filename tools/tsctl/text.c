/* Tables and pictures for people. A name is cut where a terminal has no room for it; in a pipe it
 * is whole. */
#define _GNU_SOURCE
#include "tsctl.h"

#include "cache_figures.h"
#include "namespace_text.h"
#include "plain_text.h"

#include <langinfo.h>
#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <wchar.h>

#define MAP_COLUMNS 64u

void text_start(style *s)
{
    struct winsize size;
    /* The width of characters is asked of the locale; whatever it is, UTF-8 is written. */
    if (setlocale(LC_CTYPE, "") == NULL || strcmp(nl_langinfo(CODESET), "UTF-8") != 0)
        (void)setlocale(LC_CTYPE, "C.UTF-8");
    s->columns = 0;
    if (isatty(1))
        s->columns = ioctl(1, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

const char *text_cell(const char *text, size_t width, size_t most, char *buffer, size_t size)
{
    size_t used = 0, columns = 0, bytes;
    for (; *text != '\0'; text += bytes) {
        uint32_t c = ts_text_character(text, &bytes);
        bytes = bytes > 0 ? bytes : 1;
        int wide = wcwidth((wchar_t)c);
        size_t more = wide < 0 ? 1 : (size_t)wide;
        if ((most > 0 && columns + more > most) || used + bytes >= size)
            break;
        memcpy(buffer + used, text, bytes);
        used += bytes;
        columns += more;
    }
    for (; columns < width && used + 1 < size; columns++)
        buffer[used++] = ' ';
    buffer[used] = '\0';
    return buffer;
}

const char *text_duration(uint64_t ms, char *buffer, size_t size)
{
    uint64_t s = ms / 1000;
    if (s < 120)
        snprintf(buffer, size, "%llu s", (unsigned long long)s);
    else if (s < 7200)
        snprintf(buffer, size, "%llu min", (unsigned long long)s / 60);
    else if (s < 172800)
        snprintf(buffer, size, "%llu h", (unsigned long long)s / 3600);
    else
        snprintf(buffer, size, "%llu days", (unsigned long long)s / 86400);
    return buffer;
}

#define CELL_BYTES 1024 /* a name of 127 bytes, escaped, and what fills a column */

/* Columns that the terminal has beyond those of a table. */
static size_t spare(const style *s, int table)
{
    return s->columns > table ? (size_t)(s->columns - table) : 0;
}

static double percent(uint64_t part, uint64_t whole)
{
    return whole == 0 ? 0 : 100.0 * (double)part / (double)whole;
}

static const char *on(const style *s, const char *code)
{
    return s->color ? code : "";
}

#define BOLD "\033[1m"
#define SHARED "\033[35m"
#define PLAIN "\033[0m"

/* "fp32, 6 layers, 2 KV heads of 64, 16 tokens a block" */
static void print_geometry(const Tspb__PoolSummary *p)
{
    printf("%s, %u layers, %u KV heads of %u, %u tokens a block\n", report_dtype(p), p->layers,
           p->kv_heads, p->head_dim, p->block_tokens);
}

/* Each GPU once that processes can't share. */
static void print_without_mps(const Tspb__StatusReply *r)
{
    for (size_t i = 0; i < r->n_pools; i++) {
        const Tspb__PoolSummary *p = r->pools[i];
        size_t first = 0;
        while (strcmp(r->pools[first]->device, p->device) != 0)
            first++;
        if (first == i && !p->mps && strcmp(p->device, "host") != 0)
            printf("  %s: MPS is off, and the GPU is handed from process to process: see tsctl "
                   "doctor\n",
                   p->device);
    }
}

/* "signal 9, SIGKILL", of what the holder says of the last daemon's end. What follows a comma, the
 * end of one that never served, stays behind that. */
static const char *cause_text(const char *cause, char *buffer, size_t size)
{
    int signal = 0;
    const char *then = strchrnul(cause, ',');
    const int first = (int)(then - cause);
    if (sscanf(cause, "signal %d", &signal) == 1 && signal > 0 && sigabbrev_np(signal) != NULL)
        snprintf(buffer, size, "%.*s, SIG%s%s", first, cause, sigabbrev_np(signal), then);
    else if (first == 8 && strncmp(cause, "status 3", 8) == 0)
        snprintf(buffer, size, "%.*s, a GPU failed%s", first, cause, then);
    else if (first == 8 && strncmp(cause, "status 4", 8) == 0)
        snprintf(buffer, size, "%.*s, tsctl restart%s", first, cause, then);
    else
        snprintf(buffer, size, "%s", cause[0] != '\0' ? cause : "cause unknown");
    return buffer;
}

static void print_journal(const Tspb__RestartStatus *r)
{
    char a[32], b[32], c[32];
    printf("  journal  %s of %s in use", ts_text_bytes(r->journal_used_bytes, a, sizeof a),
           ts_text_bytes(r->journal_bytes, b, sizeof b));
    if (r->snapshot_bytes > 0)
        printf("; the last snapshot: %s in %.3f s", ts_text_bytes(r->snapshot_bytes, c, sizeof c),
               r->snapshot_seconds);
    puts("");
    if (r->behind)
        puts("  BEHIND: the journal is full, and there is no memory for a snapshot:\n"
             "    a restart would begin with nothing");
}

/* Whether a restart checks memory; that it doesn't is told where it could. */
static void print_verify(const Tspb__RestartStatus *r)
{
    if (r->verify == TSPB__RESTART_STATUS__VERIFY__OFF && r->journaled)
        puts("  verify   off: a restart doesn't check memory");
    if (r->verify != TSPB__RESTART_STATUS__VERIFY__RESTART)
        return;
    if (!r->journaled)
        puts("  verify   restart, in vain: nothing outlives the daemon");
    else
        printf("  verify   restart: %u blocks wait for their checksum\n", r->unsummed_blocks);
    if (r->journaled && r->unsummed_pools > 0)
        printf("  verify   %u pools have no checksums: see tsctl doctor\n", r->unsummed_pools);
}

static void print_check(const Tspb__RestartStatus *r)
{
    printf("           %llu of %llu full blocks were checked in %.3f s\n",
           (unsigned long long)r->checked_blocks, (unsigned long long)r->full_blocks,
           r->check_seconds);
    if (r->wrong_blocks > 0)
        printf("  LOST: %llu blocks, which didn't hold what was stored in them,\n"
               "    and the %llu sequences that had one\n",
               (unsigned long long)r->wrong_blocks, (unsigned long long)r->lost_sequences);
}

/* What outlives the daemon, and what the last restart did. */
static void print_restart(const Tspb__StatusReply *all)
{
    const Tspb__RestartStatus *r = all->restart;
    char cause[64];
    if (r == NULL) /* an older daemon */
        return;
    printf("  store    %s\n", r->holder == TSPB__RESTART_STATUS__HOLDER__NOBODY
                                  ? "nobody: what is stored ends with the daemon"
                              : r->holder == TSPB__RESTART_STATUS__HOLDER__SYSTEMD
                                  ? "held by systemd"
                                  : "held by a supervisor");
    for (size_t i = 0; i < all->n_pools; i++)
        if (r->holder != TSPB__RESTART_STATUS__HOLDER__NOBODY &&
            strcmp(all->pools[i]->memory, "cuda-ipc") == 0)
            printf("  store    pool %s's memory (cuda-ipc) ends with the daemon\n",
                   all->pools[i]->name);
    print_verify(r);
    if (r->journaled)
        print_journal(r);
    if (r->took_over)
        printf("  restarts %u; the last (%s) took %.3f s: %llu sequences,\n"
               "           %llu commands done again, %u sessions yet to come back\n",
               r->restarts, cause_text(r->cause, cause, sizeof cause), r->seconds,
               (unsigned long long)r->sequences, (unsigned long long)r->entries,
               r->awaited_sessions);
    if (r->checked)
        print_check(r);
    if (r->all_wrong_blocks > r->wrong_blocks || r->all_lost_sequences > r->lost_sequences)
        printf("  LOST in all restarts: %llu such blocks, and %llu sequences that had one,\n"
               "    or a block in memory that was gone\n",
               (unsigned long long)r->all_wrong_blocks, (unsigned long long)r->all_lost_sequences);
    if (r->failure[0] != '\0')
        printf("  LOST: what the last daemon left could not be taken over:\n    %s\n", r->failure);
}

void text_status(const Tspb__StatusReply *r, const style *s)
{
    char up[32];
    printf("%stinyserved %s%s, pid %llu, up %s\n", on(s, BOLD), r->version, on(s, PLAIN),
           (unsigned long long)r->pid, text_duration(r->uptime_ms, up, sizeof up));
    printf("  sessions %8llu        kernels  %s, %u threads\n", (unsigned long long)r->sessions,
           r->kernel, r->threads);
    printf("  requests %8llu        refused  %llu\n", (unsigned long long)r->requests,
           (unsigned long long)r->refused);
    printf("  tokens   %8llu        runs     %llu in %llu launches\n",
           (unsigned long long)r->tokens, (unsigned long long)r->runs,
           (unsigned long long)r->launches);
    print_restart(r);
    if (r->draining)
        puts("  draining: no new sessions are taken, but operators'");
    print_without_mps(r);
    text_pools(r, s);
}

void text_pools(const Tspb__StatusReply *r, const style *s)
{
    char a[32], b[32], name[CELL_BYTES], device[32];
    const size_t most = s->columns == 0 ? 0 : 15 + spare(s, 80);
    printf("%s%-15s %-8s %10s %10s %5s %6s %7s %7s %4s%s\n", on(s, BOLD), "POOL", "DEVICE", "USED",
           "OF", "LIVE", "CACHED", "SEQS", "SHARED", "WAIT", on(s, PLAIN));
    for (size_t i = 0; i < r->n_pools; i++) {
        const Tspb__PoolSummary *p = r->pools[i];
        printf("%s %s %10s %10s %4.0f%% %5.0f%% %7llu %6.0f%% %4u\n",
               text_cell(p->name, 15, most, name, sizeof name),
               text_cell(p->device, 8, 0, device, sizeof device),
               ts_text_bytes(p->used_blocks * p->block_bytes, a, sizeof a),
               ts_text_bytes(p->blocks * p->block_bytes, b, sizeof b),
               percent(p->used_blocks, p->blocks), percent(p->cached_blocks, p->blocks),
               (unsigned long long)p->sequences, percent(p->shared_blocks, p->used_blocks),
               p->waiting_sessions);
    }
}

void text_sessions_head(void)
{
    printf("%-16s %6s %7s %-15s %7s %8s %5s %9s\n", "SESSION", "UID", "PID", "PROGRAM", "SEQS",
           "BLOCKS", "STEPS", "EXCHANGE");
}

void text_sessions(const Tspb__SessionList *r, const style *s)
{
    char a[32], program[CELL_BYTES];
    const size_t most = s->columns == 0 ? 0 : 15 + spare(s, 80);
    for (size_t i = 0; i < r->n_sessions; i++) {
        const Tspb__SessionInfo *n = r->sessions[i];
        printf("%-16llx %6u %7u %s %7llu %8llu %5u %9s\n", (unsigned long long)n->session, n->uid,
               n->pid, text_cell(n->program, 15, most, program, sizeof program),
               (unsigned long long)n->sequences, (unsigned long long)n->blocks, n->steps,
               ts_text_bytes(n->exchange_bytes, a, sizeof a));
    }
}

void text_seqs_head(void)
{
    printf("%-16s %8s %6s %7s %6s %-16s %s\n", "SEQUENCE", "TOKENS", "BLOCKS", "SHARED", "UID",
           "SESSION", "KEPT AS");
}

void text_seqs(const Tspb__SeqList *r, const style *s)
{
    char name[CELL_BYTES];
    const size_t most = s->columns == 0 ? 0 : 15 + spare(s, 80);
    for (size_t i = 0; i < r->n_seqs; i++) {
        const Tspb__SeqInfo *n = r->seqs[i];
        char session[64] = "-", left[32];
        if (n->session != 0)
            snprintf(session, sizeof session, "%llx", (unsigned long long)n->session);
        else if (n->left_ms != 0)
            snprintf(session, sizeof session, "%s %s", n->on_ticket ? "ticket:" : "ends in",
                     text_duration(n->left_ms, left, sizeof left));
        printf("%-16llx %8u %6u %7u %6u %-16s %s%s\n", (unsigned long long)n->seq, n->length,
               n->blocks, n->shared_blocks, n->uid, session,
               text_cell(n->name[0] != '\0' ? n->name : "-", 0, most, name, sizeof name),
               n->in_step ? " *" : "");
    }
}

/* Each bin with its lower bound (`lowest` for the first) and a bar as high as its share of the
 * fullest. */
static void print_histogram(const uint64_t *bins, size_t count, unsigned lowest)
{
    static const char *const bars[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
    uint64_t most = 0;
    size_t first = count;
    for (size_t i = count; i-- > 0;)
        if (bins[i] > 0) {
            first = i;
            if (bins[i] > most)
                most = bins[i];
        }
    if (first == count) {
        printf("none\n");
        return;
    }
    size_t column = 14;
    for (size_t i = first; i < count; i++) {
        char label[32];
        int width = snprintf(label, sizeof label, "%llu",
                             (unsigned long long)(i == 0 ? lowest : (uint64_t)1 << i));
        if (column + (size_t)width + 3 > 79) {
            printf("\n%14s", "");
            column = 14;
        }
        /* NOLINTNEXTLINE(clang-analyzer-core.DivideZero): a bin that has some has most */
        printf("%s %s ", label, bins[i] == 0 ? "·" : bars[(bins[i] * 8 - 1) / most]);
        column += (size_t)width + 3;
    }
    printf("\n");
}

void text_frag(const Tspb__PoolStatsReply *r, const style *s)
{
    const Tspb__PoolSummary *p = r->pool;
    frag_figures f = frag_work_out(r);
    char a[32], b[32];
    printf("%s%s on %s%s", on(s, BOLD), p->name, p->device, on(s, PLAIN));
    if (p->device_name[0] != '\0') /* a GPU: more than one line holds */
        printf(" (%s), %s, kernel %s\n  ", p->device_name, p->memory, p->kernel);
    else
        printf(": ");
    print_geometry(p);
    printf(
        "  blocks      %llu total   %llu used (%.0f %%)   %llu shared   %llu cached   %llu free\n",
        (unsigned long long)p->blocks, (unsigned long long)p->used_blocks,
        percent(p->used_blocks, p->blocks), (unsigned long long)p->shared_blocks,
        (unsigned long long)p->cached_blocks,
        (unsigned long long)(p->blocks - p->used_blocks - p->cached_blocks));
    if (p->asked_tokens > 0)
        printf("  cache       %llu of %llu tokens of matched prompts found (%.0f %%)   %llu blocks "
               "evicted\n",
               (unsigned long long)p->found_tokens, (unsigned long long)p->asked_tokens,
               percent(p->found_tokens, p->asked_tokens), (unsigned long long)p->evicted_blocks);
    const unsigned long long slots = r->used_slots - r->reserved_slots;
    if (slots == 0)
        puts("  tokens      none stored");
    else
        printf("  tokens      %llu stored in %llu slots: %.1f %% efficient, %s of tails unused\n",
               (unsigned long long)r->stored_tokens, slots, 100 * f.efficiency,
               ts_text_bytes(f.tail_bytes, a, sizeof a));
    if (r->reserved_slots > 0)
        printf("  reserved    %llu slots by %llu open steps\n",
               (unsigned long long)r->reserved_slots, (unsigned long long)p->open_steps);
    printf("  sharing     %s stored, %s seen by %llu sequences: %.1f x\n",
           ts_text_bytes(f.stored_bytes, a, sizeof a), ts_text_bytes(f.seen_bytes, b, sizeof b),
           (unsigned long long)p->sequences, f.sharing);
    printf("  otherwise   %s if each %ssequence had a buffer of the longest length (%u)\n",
           ts_text_bytes(f.contiguous_bytes, a, sizeof a), r->others_hidden ? "own " : "",
           r->longest_tokens);
    printf("  lengths     ");
    print_histogram(r->length_histogram, r->n_length_histogram, 0);
    printf("  unused runs ");
    print_histogram(r->free_run_histogram, r->n_free_run_histogram, 1);
    for (size_t i = 0; i < r->n_tenants; i++)
        printf("  %-11s uid %-10u %7llu seqs   %s used, %s cached, %u slabs\n",
               i == 0 ? "tenants" : "", r->tenants[i]->uid,
               (unsigned long long)r->tenants[i]->sequences,
               ts_text_bytes(r->tenants[i]->used_blocks * p->block_bytes, a, sizeof a),
               ts_text_bytes(r->tenants[i]->cached_blocks * p->block_bytes, b, sizeof b),
               r->tenants[i]->slabs);
    if (r->others_hidden)
        printf("  %-11s lengths and tenants are your own: operators see all\n", "");
}

/* "1 s", "10 min", of what ts_cache_ages has. */
static const char *age_text(uint32_t seconds, char *buffer, size_t size)
{
    if (seconds < 60)
        snprintf(buffer, size, "%u s", seconds);
    else if (seconds < 3600)
        snprintf(buffer, size, "%u min", seconds / 60);
    else
        snprintf(buffer, size, "%u h", seconds / 3600);
    return buffer;
}

static void print_evictions(const Tspb__PoolSummary *p)
{
    char age[32];
    printf("  evicted     %llu blocks, unused for %.1f s on average\n  by cause    ",
           (unsigned long long)p->evicted_blocks, ts_cache_mean_age(p));
    for (size_t i = 0; i < p->n_evicted_by_cause && i < TS_CACHE_CAUSES; i++)
        printf("%s%s %llu", i == 0 ? "" : ", ", ts_cache_causes[i],
               (unsigned long long)p->evicted_by_cause[i]);
    printf("\n  by age      ");
    for (size_t i = 0; i < p->n_evicted_by_age && i <= TS_CACHE_AGES; i++)
        printf("%s%s %llu", i == 0 ? "up to " : ", ",
               i < TS_CACHE_AGES ? age_text(ts_cache_ages[i], age, sizeof age) : "longer",
               (unsigned long long)p->evicted_by_age[i]);
    printf("\n");
}

void text_cache(const Tspb__CacheStatsReply *r, const style *s)
{
    const Tspb__PoolSummary *p = r->pool;
    const size_t most = s->columns == 0 ? 0 : 10 + spare(s, 74);
    char a[32], shown[TS_NAMESPACE_TEXT_BYTES], name[CELL_BYTES];
    printf("%s%s on %s%s: %s\n", on(s, BOLD), p->name, p->device, on(s, PLAIN),
           p->cache_off ? "nothing is cached (cache = off)" : "prefix cache");
    printf("  tokens      %llu found of %llu asked for (%.1f %%)\n",
           (unsigned long long)p->found_tokens, (unsigned long long)p->asked_tokens,
           100 * ts_cache_hit_rate(p->found_tokens, p->asked_tokens));
    printf("  blocks      %u total   %u used   %u cached (%s)   %u free\n", p->blocks,
           p->used_blocks, p->cached_blocks,
           ts_text_bytes(p->cached_blocks * p->block_bytes, a, sizeof a),
           p->blocks - p->used_blocks - p->cached_blocks);
    print_evictions(p);
    printf("  namespaces  %u%s%s\n", r->namespaces,
           r->namespaces > r->n_largest ? ", the largest of them:" : "",
           r->others_hidden ? " of your own: operators see all" : "");
    if (r->n_largest > 0)
        printf("%s%10s %10s %7s %12s %12s %6s  %s%s\n", on(s, BOLD), "BLOCKS", "UID", "SEQS",
               "ASKED", "FOUND", "HIT", "NAMESPACE", on(s, PLAIN));
    for (size_t i = 0; i < r->n_largest; i++) {
        const Tspb__SpaceUse *u = r->largest[i];
        printf("%10u %10u %7u %12llu %12llu %5.1f%%  %s\n", u->blocks, u->uid, u->sequences,
               (unsigned long long)u->asked_tokens, (unsigned long long)u->found_tokens,
               100 * ts_cache_hit_rate(u->found_tokens, u->asked_tokens),
               text_cell(ts_namespace_show(u->space.data, u->space.len, shown), 0, most, name,
                         sizeof name));
    }
}

const char *text_unused(const Tspb__PoolMapReply *r, size_t cell)
{
    return cell < r->n_cached && r->cached[cell] > 0 ? "○" : "·";
}

void text_map(const Tspb__PoolMapReply *r, const style *s)
{
    static const char *const fills[] = {"░", "▒", "▓", "█"};
    static const char *const shared_fills[] = {"a", "b", "c", "S"}; /* where there is no colour */
    const Tspb__PoolSummary *p = r->pool;
    printf("%s%s on %s%s: %llu blocks, %llu used, %llu shared, %llu cached; %u block%s a cell\n",
           on(s, BOLD), p->name, p->device, on(s, PLAIN), (unsigned long long)p->blocks,
           (unsigned long long)p->used_blocks, (unsigned long long)p->shared_blocks,
           (unsigned long long)p->cached_blocks, r->blocks_per_cell,
           r->blocks_per_cell == 1 ? "" : "s");
    for (size_t i = 0; i < r->n_used; i++) {
        if (i % MAP_COLUMNS == 0)
            printf("%12llu ", (unsigned long long)i * r->blocks_per_cell);
        uint64_t last = p->blocks - (uint64_t)i * r->blocks_per_cell;
        uint64_t blocks = last < r->blocks_per_cell ? last : r->blocks_per_cell;
        uint64_t slots = blocks * p->block_tokens;
        /* NOLINTNEXTLINE(clang-analyzer-core.DivideZero): a cell has blocks */
        uint32_t fill = r->tokens[i] == 0 ? 0 : (uint32_t)((r->tokens[i] * 4ull - 1) / slots);
        bool shared = r->shared[i] > 0;
        if (r->used[i] == 0)
            fputs(text_unused(r, i), stdout);
        else if (r->others_hidden && r->tokens[i] == 0 && r->owners[i] == OWNER_SEVERAL)
            fputs("■", stdout);
        else if (shared && s->color)
            printf(SHARED "%s" PLAIN, fills[fill]);
        else
            fputs(shared ? shared_fills[fill] : fills[fill], stdout);
        if (i % MAP_COLUMNS == MAP_COLUMNS - 1 || i + 1 == r->n_used)
            fputs("\n", stdout);
    }
    if (s->color)
        printf("%12s · free  ○ cached  ░ ▒ ▓ █ full by quarters  " SHARED "█" PLAIN " shared\n",
               "");
    else
        printf("%12s · free ○ cached ░ ▒ ▓ █ full by quarters, a b c S the same, shared\n", "");
    if (r->others_hidden)
        printf("%12s ■ of others, which operators see in full\n", "");
}

void text_check(const Tspb__CheckReply *r)
{
    for (size_t i = 0; i < r->n_problems; i++)
        printf("WRONG: %s\n", r->problems[i]);
    printf("%s: %llu blocks, sequences, steps and sessions checked, %zu problem%s (%.1f ms)\n",
           r->n_problems == 0 ? "ok" : "NOT OK", (unsigned long long)r->checked, r->n_problems,
           r->n_problems == 1 ? "" : "s", (double)r->held_us / 1e3);
}
