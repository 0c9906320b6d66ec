#define _GNU_SOURCE
#include "config.h"

#include "config_keys.h"
#include "plain_text.h"

#include <errno.h>
#include <ini.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILE_BYTES_MAX (1u << 20)

/* ---- problems ---- */

void ts_config_complain(ts_config *c, uint32_t line, const char *format, ...)
{
    ts_config_problem problem = {.line = line};
    va_list args;
    va_start(args, format);
    vsnprintf(problem.text, sizeof problem.text, format, args);
    va_end(args);
    if (c->num_problems == TS_CONFIG_PROBLEMS_MAX) {
        c->problems_left_out++;
        return;
    }
    uint32_t at = c->num_problems++;
    for (; at > 0 && line > 0 && (c->problems[at - 1].line > line || c->problems[at - 1].line == 0);
         at--)
        c->problems[at] = c->problems[at - 1];
    c->problems[at] = problem;
}

const char *ts_config_problem_text(const ts_config *c, uint32_t problem, char *text, size_t bytes)
{
    const ts_config_problem *p = &c->problems[problem];
    if (p->line > 0)
        snprintf(text, bytes, "%s:%u: %s", c->file, p->line, p->text);
    else
        snprintf(text, bytes, "%s", p->text);
    return text;
}

uint32_t ts_config_threads(const ts_config *c, uint32_t processors)
{
    return c->threads > 0 ? c->threads : processors - processors / 8;
}

uint32_t ts_config_pool_line(const ts_config_pool *p, const char *name)
{
    const ts_config_key *key = ts_config_find_key(&ts_config_pools, name);
    uint32_t line = p->given.lines[key - ts_config_pools.keys];
    return line > 0 ? line : p->given.line;
}

/* ---- keys and sections ---- */

void ts_config_init(ts_config *c)
{
    *c = (ts_config){0};
    ts_engine_default_limits(&c->limits); /* some are no keys */
    ts_config_preset(&ts_config_daemon, c);
}

/* Sets a key of a section's struct. `line` 0: from the command line, which overrides the file. */
static ts_status set_key(ts_config *c, const ts_config_section *section, void *object,
                         ts_config_given *given, uint32_t line, const char *name, const char *value)
{
    char why[200], shown[100], whose[160] = "";
    const ts_config_key *key = ts_config_find_key(section, name);
    if (line == 0 && section == &ts_config_pools) /* no line says whose key it is */
        snprintf(whose, sizeof whose, "pool '%s': ", ((const ts_config_pool *)object)->pool.name);
    if (key == NULL) {
        const ts_config_key *nearest = ts_config_nearest_key(section, name);
        ts_config_complain(c, line, "%sthere is no key '%s' in %s%s%s%s", whose,
                           ts_text_escape(name, shown, sizeof shown), section->name,
                           nearest == NULL ? "" : ": is '", nearest == NULL ? "" : nearest->name,
                           nearest == NULL ? "" : "' meant?");
        return TS_EINVAL;
    }
    uint32_t index = (uint32_t)(key - section->keys);
    if (line > 0 && given->lines[index] > 0) {
        ts_config_complain(c, line, "%s is given twice: in line %u too", name, given->lines[index]);
        return TS_EINVAL;
    }
    given->keys |= 1u << index;
    given->lines[index] = line;
    if (value[0] == '\0' && key->empty != NULL) { /* also of what the file gave */
        memset((char *)object + key->offset, 0, key->bytes);
        return TS_OK;
    }
    if (key->read(key, (char *)object + key->offset, value, why, sizeof why) == TS_OK)
        return TS_OK;
    ts_config_complain(c, line, "%s%s = %s: %s", whose, name,
                       ts_text_escape(value, shown, sizeof shown), why);
    return TS_EINVAL;
}

ts_status ts_config_set(ts_config *c, const char *key, const char *value)
{
    return set_key(c, &ts_config_daemon, c, &c->given, 0, key, value);
}

static ts_config_pool *find_pool(ts_config *c, const char *name)
{
    for (uint32_t i = 0; i < c->num_pools; i++)
        if (strcmp(c->pools[i].pool.name, name) == 0)
            return &c->pools[i];
    return NULL;
}

/* A new pool; NULL and a problem if there can't be one of that name. */
static ts_config_pool *new_pool(ts_config *c, uint32_t line, const char *name)
{
    const size_t most = sizeof c->pools[0].pool.name - 1;
    char shown[160];
    if (name[0] == '\0' || strlen(name) > most) {
        ts_config_complain(c, line, "a pool's name has 1..%zu bytes: '%s'", most,
                           ts_text_escape(name, shown, sizeof shown));
        return NULL;
    }
    if (!ts_text_plain(name)) {
        ts_config_complain(c, line,
                           "a pool's name is plain text, without control characters, in UTF-8: "
                           "'%s'",
                           ts_text_escape(name, shown, sizeof shown));
        return NULL;
    }
    if (name[0] == ' ' || name[strlen(name) - 1] == ' ') {
        ts_config_complain(c, line, "a pool's name neither begins nor ends with a blank: '%s'",
                           name);
        return NULL;
    }
    if (c->num_pools == TS_POOLS_MAX) {
        ts_config_complain(c, line, "pool '%s' would be number %u; the limit is %u", name,
                           c->num_pools + 1, TS_POOLS_MAX);
        return NULL;
    }
    ts_config_pool *p = &c->pools[c->num_pools++];
    *p = (ts_config_pool){.given = {.line = line}, .pool = {.memory = "host"}};
    ts_config_preset(&ts_config_pools, p);
    snprintf(p->pool.name, sizeof p->pool.name, "%s", name);
    return p;
}

/* ---- the file ---- */

/*
 * The file's lines on their way to inih, which neither tells its handler where a line lies nor
 * takes comments that begin with # behind a value.
 */
typedef struct reader {
    ts_config *c;
    const char *rest; /* of the file */
    uint32_t line;    /* the last one that was read */
    bool dry;         /* only what inih can't read is looked for */
    uint32_t malformed[TS_CONFIG_PROBLEMS_MAX], num_malformed; /* inih sees these lines empty */
    bool in_daemon;
    ts_config_pool *pool;  /* whose section it is; NULL: none's */
    bool in_wrong_section; /* which was complained of */
} reader;

/* What inih takes for blanks. */
#define BLANKS " \t\r\v\f"
/* Some editors begin a file with it: it says that the text is UTF-8. */
#define BYTE_ORDER_MARK "\xef\xbb\xbf"

/* A line [NAME]: which section it begins. */
static void begin_section(reader *r, const char *name)
{
    ts_config *c = r->c;
    char shown[160];
    r->in_daemon = strcmp(name, "daemon") == 0;
    r->pool = NULL;
    if (r->in_daemon && c->given.line > 0)
        ts_config_complain(c, r->line, "section [daemon] is given twice: in line %u too",
                           c->given.line);
    if (r->in_daemon) {
        c->given.line = r->line;
    } else if (strncmp(name, "pool ", 5) == 0) {
        const ts_config_pool *other = find_pool(c, name + 5);
        if (other != NULL)
            ts_config_complain(c, r->line, "section [%s] is given twice: in line %u too", name,
                               other->given.line);
        else
            r->pool = new_pool(c, r->line, name + 5);
    } else {
        ts_config_complain(c, r->line,
                           "there is no section [%s]; known are [daemon] and [pool NAME]",
                           ts_text_escape(name, shown, sizeof shown));
    }
    r->in_wrong_section = !r->in_daemon && r->pool == NULL;
}

/* Complains of what stands in the line of a section, behind it, where inih doesn't look. */
static void check_behind_section(reader *r, const char *rest)
{
    char shown[100];
    rest += strspn(rest, BLANKS);
    if (rest[0] != '\0' && rest[0] != '#' && rest[0] != ';')
        ts_config_complain(r->c, r->line, "'%s' stands behind a section: it needs its own line",
                           ts_text_escape(rest, shown, sizeof shown));
}

/* Takes a comment off the line's end, and blanks off both. */
static void trim(char *line)
{
    size_t start = strspn(line, BLANKS), length = strlen(line + start);
    memmove(line, line + start, length + 1);
    for (char *hash = line; (hash = strchr(hash, '#')) != NULL; hash++)
        if (hash == line || hash[-1] == ' ' || hash[-1] == '\t') {
            *hash = '\0';
            break;
        }
    length = strlen(line);
    while (length > 0 && strchr(BLANKS, line[length - 1]) != NULL)
        line[--length] = '\0';
}

static char *read_line(char *to, int size, void *user)
{
    reader *r = user;
    if (r->rest[0] == '\0')
        return NULL;
    size_t length = strcspn(r->rest, "\n");
    char *line = strndup(r->rest, length);
    r->rest += length + (r->rest[length] == '\n');
    r->line++;
    to[0] = '\0';
    if (line == NULL) {
        ts_config_complain(r->c, r->line, "no memory to read the line");
        return to;
    }
    trim(line);
    bool skip = strlen(line) + 1 > (size_t)size;
    if (skip && !r->dry)
        ts_config_complain(r->c, r->line, "a line of %zu bytes; the limit is %d", strlen(line),
                           size - 1);
    for (uint32_t i = 0; i < r->num_malformed; i++)
        skip = skip || r->malformed[i] == r->line;
    if (!skip)
        snprintf(to, (size_t)size, "%s", line);
    char *bracket = line[0] == '[' ? strchr(line, ']') : NULL;
    if (bracket != NULL && !r->dry && !skip) {
        *bracket = '\0';
        begin_section(r, line + 1);
        check_behind_section(r, bracket + 1);
    }
    free(line);
    return to;
}

static int on_key(void *user, const char *section, const char *key, const char *value)
{
    reader *r = user;
    ts_config *c = r->c;
    char shown[100];
    (void)section; /* begin_section knows more of it */
    if (r->dry)
        return 1;
    if (r->in_daemon)
        (void)set_key(c, &ts_config_daemon, c, &c->given, r->line, key, value);
    else if (r->pool != NULL &&
             set_key(c, &ts_config_pools, r->pool, &r->pool->given, r->line, key, value) != TS_OK)
        r->pool->bad = true;
    else if (r->pool == NULL && !r->in_wrong_section)
        ts_config_complain(
            c, r->line, "'%s' stands before the first section; known are [daemon] and [pool NAME]",
            ts_text_escape(key, shown, sizeof shown));
    return 1;
}

static int parse(reader *r, const char *text)
{
    const size_t mark = strlen(BYTE_ORDER_MARK);
    r->rest = strncmp(text, BYTE_ORDER_MARK, mark) == 0 ? text + mark : text;
    r->line = 0;
    return ini_parse_stream(read_line, r, on_key, r);
}

/* The whole file, of `*bytes_out`; NULL, and errno says why not. */
static char *slurp(const char *path, size_t *bytes_out)
{
    FILE *file = fopen(path, "re");
    char *text = calloc(1, FILE_BYTES_MAX + 1);
    bool ok = file != NULL && text != NULL;
    size_t bytes = ok ? fread(text, 1, FILE_BYTES_MAX + 1, file) : 0;
    int error = errno;
    if (ok && (ferror(file) != 0 || bytes > FILE_BYTES_MAX)) {
        error = ferror(file) != 0 ? error : EFBIG;
        ok = false;
    }
    if (file != NULL)
        (void)fclose(file); /* only read */
    if (ok) {
        *bytes_out = bytes;
        return text;
    }
    free(text);
    errno = error;
    return NULL;
}

/* A NUL byte would end the text before the file's end: complains of the first one, and makes all of
 * them blanks, so that what is behind them is checked too. */
static void replace_nuls(ts_config *c, char *text, size_t bytes)
{
    uint32_t line = 1;
    bool told = false;
    for (size_t i = 0; i < bytes; i++) {
        line += text[i] == '\n';
        if (text[i] != '\0')
            continue;
        if (!told)
            ts_config_complain(c, line, "a NUL byte: the file must be text in UTF-8");
        told = true;
        text[i] = ' ';
    }
}

ts_status ts_config_read(ts_config *c, const char *path)
{
    size_t bytes = 0;
    char *text = slurp(path, &bytes);
    reader r = {.c = c, .dry = true};
    c->file = path;
    if (text == NULL && path[0] == '\0') {
        ts_config_complain(c, 0, "--config names no file");
        return TS_ENOENT;
    }
    if (text == NULL) {
        bool named = strcmp(path, TS_CONFIG_DEFAULT) != 0;
        ts_config_complain(c, 0, "%s: %s%s", path, strerror(errno),
                           named ? "" : "; --config names another file, --pool a pool without one");
        return TS_ENOENT;
    }
    replace_nuls(c, text, bytes);
    /* inih tells of the first such line alone: once that is empty, of the next. */
    int line;
    while (r.num_malformed < TS_CONFIG_PROBLEMS_MAX && (line = parse(&r, text)) > 0) {
        ts_config_complain(c, (uint32_t)line, "neither a [section] nor key = value");
        r.malformed[r.num_malformed++] = (uint32_t)line;
    }
    r.dry = false;
    (void)parse(&r, text);
    free(text);
    return c->num_problems == 0 ? TS_OK : TS_EINVAL;
}

/* ---- the command line ---- */

ts_status ts_config_add_pool(ts_config *c, const char *text)
{
    char copy[512], *rest = copy, shown[100];
    uint32_t before = c->num_problems + c->problems_left_out;
    if (strlen(text) >= sizeof copy) {
        ts_config_complain(c, 0, "a pool told in %zu bytes; the limit is %zu", strlen(text),
                           sizeof copy - 1);
        return TS_EINVAL;
    }
    snprintf(copy, sizeof copy, "%s", text);
    const char *name = strsep(&rest, ":");
    ts_config_pool *p = find_pool(c, name);
    if (p == NULL)
        p = new_pool(c, 0, name);
    if (p == NULL)
        return TS_EINVAL;
    if (p->on_command_line)
        ts_config_complain(c, 0, "pool '%s' is given twice on the command line", p->pool.name);
    p->on_command_line = true;
    ts_config_given now = {0};
    for (char *pair; (pair = strsep(&rest, ",")) != NULL;) {
        char *equals = strchr(pair, '=');
        if (equals == NULL) {
            ts_config_complain(c, 0, "pool '%s': '%s' is not key=value", p->pool.name,
                               ts_text_escape(pair, shown, sizeof shown));
            continue;
        }
        *equals = '\0';
        const ts_config_key *key = ts_config_find_key(&ts_config_pools, pair);
        uint32_t bit = key == NULL ? 0 : 1u << (key - ts_config_pools.keys);
        if (now.keys & bit)
            ts_config_complain(c, 0, "pool '%s': %s is given twice", p->pool.name, pair);
        now.keys |= bit;
        if (set_key(c, &ts_config_pools, p, &p->given, 0, pair, equals + 1) != TS_OK)
            p->bad = true;
    }
    return c->num_problems + c->problems_left_out == before ? TS_OK : TS_EINVAL;
}

/* ---- a reload ---- */

void ts_config_compare(const ts_config *a, const ts_config *b,
                       void (*differs)(void *arg, const char *key), void *arg)
{
    for (uint32_t i = 0; i < ts_config_daemon.num_keys; i++) {
        const ts_config_key *key = &ts_config_daemon.keys[i];
        if (!key->reloads && ts_config_key_differs(key, a, b))
            differs(arg, key->name);
    }
}

bool ts_config_pools_differ(const ts_config_pool *a, const ts_config_pool *b)
{
    bool differ = false;
    for (uint32_t i = 0; i < ts_config_pools.num_keys; i++) {
        const ts_config_key *key = &ts_config_pools.keys[i];
        differ = differ || (!key->reloads && ts_config_key_differs(key, a, b));
    }
    return differ;
}
