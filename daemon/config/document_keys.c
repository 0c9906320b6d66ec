/*
 * Writes the lists of keys in systemd/tinyserved.conf and tinyserved.conf.5 anew, from the tables
 * in config_keys.c. What stands before the first section of the one, and around the lists of the
 * other, stays as it is.
 *
 *     document_keys [--check] FILE...     --check: changes nothing; 1 if a file isn't up to date
 *
 * 2: a file can't be read or written, or has no place for the keys.
 */
#define _GNU_SOURCE
#include "config_keys.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COLUMNS 100u
#define TEXT_BYTES 2048u

/* A section as the two documents call it. */
typedef struct section {
    const ts_config_section *keys;
    const char *in_file, *in_manual;
} section;

static const section sections[] = {
    {&ts_config_daemon, "[daemon]", ".Ss [daemon]\n"},
    {&ts_config_pools, "[pool llama-8b]", ".Ss [pool NAME]\n"},
};
#define NUM_SECTIONS (sizeof sections / sizeof *sections)

__attribute__((noreturn)) static void fail(const char *what, const char *which)
{
    fprintf(stderr, "document_keys: %s: %s\n", what, which);
    exit(2);
}

/* ---- words and lines ---- */

/* Puts the key's words and limits into the text. */
static void expand(const ts_config_key *key, const char *text, char *to, size_t bytes)
{
    FILE *out = fmemopen(to, bytes, "w");
    if (out == NULL)
        abort();
    while (*text != '\0') {
        if (strncmp(text, "{words}", 7) == 0) {
            for (uint32_t i = 0; key->words[i] != NULL; i++) {
                const char *between = key->words[i + 1] == NULL ? " or " : ", ";
                fprintf(out, "%s%s", i == 0 ? "" : between, key->words[i]);
            }
            text += 7;
        } else if (strncmp(text, "{limits}", 8) == 0) {
            fprintf(out, "%llu to %llu", (unsigned long long)key->least,
                    (unsigned long long)key->most);
            text += 8;
        } else {
            fputc(*text++, out);
        }
    }
    fclose(out);
}

/* The text's next word; what stands between backquotes is one. NULL: the end. */
static char *next_word(char **text)
{
    char *word = *text + strspn(*text, " ");
    if (*word == '\0')
        return NULL;
    char *quote = *word == '`' ? strchr(word + 1, '`') : NULL;
    char *end = quote != NULL ? quote : word;
    end += strcspn(end, " ");
    *text = *end == '\0' ? end : end + 1;
    *end = '\0';
    return word;
}

/* Lines that are filled with words. */
typedef struct filler {
    FILE *out;
    const char *prefix; /* of each line */
    size_t column;      /* 0: a line begins */
} filler;

static void fill(filler *f, const char *word)
{
    if (f->column > 0 && f->column + 1 + strlen(word) > COLUMNS) {
        fputc('\n', f->out);
        f->column = 0;
    }
    f->column += (size_t)fprintf(f->out, "%s%s", f->column == 0 ? f->prefix : " ", word);
}

static void end_line(filler *f)
{
    if (f->column > 0)
        fputc('\n', f->out);
    f->column = 0;
}

__attribute__((format(printf, 3, 0))) static void fill_text(filler *f, const ts_config_key *key,
                                                            const char *format, const char *text)
{
    char whole[TEXT_BYTES], expanded[TEXT_BYTES], *rest = expanded;
    snprintf(whole, sizeof whole, format, text);
    expand(key, whole, expanded, sizeof expanded);
    for (char *word; (word = next_word(&rest)) != NULL;)
        fill(f, word);
}

/* ---- the configuration file ---- */

/* A key behind a # has its default; `blocks`, which has none, has no line. */
static void write_setting(FILE *out, const ts_config_key *key)
{
    filler f = {.out = out, .prefix = "## "};
    if (key->shipped == NULL && key->preset == NULL && key->empty == NULL)
        return;
    fill_text(&f, key, "%s", key->help);
    if (key->empty != NULL)
        fill_text(&f, key, "If empty: %s.", key->empty);
    if (key->shipped != NULL && key->preset != NULL)
        fill_text(&f, key, "Without this line: %s.", key->preset);
    end_line(&f);
    if (key->shipped != NULL)
        fprintf(out, "%s = %s\n", key->name, key->shipped);
    else
        fprintf(out, "# %s =%s%s\n", key->name, key->preset != NULL ? " " : "",
                key->preset != NULL ? key->preset : "");
}

static void write_file(FILE *out, const char *old)
{
    const char *keys = strstr(old, "\n[");
    if (keys == NULL)
        fail("no section", sections[0].in_file);
    fprintf(out, "%.*s", (int)(keys - old), old);
    for (size_t i = 0; i < NUM_SECTIONS; i++) {
        fprintf(out, "\n%s\n", sections[i].in_file);
        for (uint32_t k = 0; k < sections[i].keys->num_keys; k++)
            write_setting(out, &sections[i].keys->keys[k]);
    }
}

/* ---- the manual page ---- */

/* A word with a macro: `word` or page(5), with what follows it. false: it is a plain word. */
static bool as_macro(const char *word, char *to, size_t bytes)
{
    const char *paren = strchr(word, '(');
    size_t length = strcspn(word + 1, "`");
    if (word[0] == '`')
        snprintf(to, bytes, "Cm %.*s %s", (int)length, word + 1, word + 1 + length + 1);
    else if (paren != NULL && paren > word && isdigit((unsigned char)paren[1]))
        snprintf(to, bytes, "Xr %.*s %c %s", (int)(paren - word), word, paren[1], paren + 3);
    else
        return false;
    if (to[strlen(to) - 1] == ' ')
        to[strlen(to) - 1] = '\0';
    return true;
}

/* Each sentence and each macro has a line of its own. */
static void write_sentences(FILE *out, const ts_config_key *key, const char *text)
{
    char expanded[TEXT_BYTES], macro[TEXT_BYTES], *rest = expanded;
    filler f = {.out = out, .prefix = ""};
    expand(key, text, expanded, sizeof expanded);
    for (char *word; (word = next_word(&rest)) != NULL;) {
        if (as_macro(word, macro, sizeof macro)) {
            end_line(&f);
            fprintf(out, ".%s\n", macro);
            continue;
        }
        fill(&f, word);
        if (word[strlen(word) - 1] == '.')
            end_line(&f);
    }
    end_line(&f);
}

/* The same in a macro's line. */
static void write_arguments(FILE *out, const char *text)
{
    char copy[TEXT_BYTES], macro[TEXT_BYTES], *rest = copy;
    bool in_macro = false;
    snprintf(copy, sizeof copy, "%s", text);
    for (char *word; (word = next_word(&rest)) != NULL;) {
        bool is_macro = as_macro(word, macro, sizeof macro);
        fprintf(out, " %s%s", in_macro && !is_macro ? "No " : "", is_macro ? macro : word);
        in_macro = is_macro;
    }
}

static void write_item(FILE *out, const ts_config_key *key)
{
    const char *unset = key->required ? "required" : key->preset != NULL ? key->preset : key->empty;
    fprintf(out, ".It Cm %s\n", key->name);
    write_sentences(out, key, key->help);
    if (key->more != NULL)
        write_sentences(out, key, key->more);
    if (unset == NULL)
        return;
    fputs(".Pq", out);
    write_arguments(out, unset);
    if (key->shipped != NULL && key->preset != NULL)
        fprintf(out, " ; the file that is shipped says %s", key->shipped);
    fputs(key->reloads ? " ; reloads\n" : "\n", out);
}

static void write_list(FILE *out, const ts_config_section *keys)
{
    fputs(".Bl -tag -width session_sequences\n", out);
    for (uint32_t k = 0; k < keys->num_keys; k++)
        write_item(out, &keys->keys[k]);
    fputs(".El\n", out);
}

static void write_manual(FILE *out, const char *old)
{
    static const char end[] = "\n.El\n";
    for (size_t i = 0; i < NUM_SECTIONS; i++) {
        const char *heading = strstr(old, sections[i].in_manual);
        const char *after = heading == NULL ? NULL : strstr(heading, end);
        if (after == NULL)
            fail("no list of keys below", sections[i].in_manual);
        const char *list = heading + strlen(sections[i].in_manual);
        fprintf(out, "%.*s", (int)(list - old), old);
        write_list(out, sections[i].keys);
        old = after + strlen(end);
    }
    fputs(old, out);
}

/* ---- both ---- */

static char *read_all(const char *path)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *file = fopen(path, "re");
    if (file == NULL || getdelim(&text, &bytes, '\0', file) < 0)
        fail(path, strerror(errno));
    fclose(file);
    return text;
}

/* Whether the document is up to date; if not, it is told, or written anew. */
static bool update(const char *path, bool check)
{
    char *old = read_all(path), *new = NULL;
    size_t bytes;
    const char *suffix = strrchr(path, '.');
    FILE *out = open_memstream(&new, &bytes);
    if (out == NULL)
        abort();
    (suffix != NULL && strcmp(suffix, ".conf") == 0 ? write_file : write_manual)(out, old);
    fclose(out);
    bool same = strcmp(old, new) == 0;
    if (!same && check) {
        fprintf(stderr,
                "%s isn't what config_keys.c says: cmake --build FOLDER --target documents\n",
                path);
    } else if (!same) {
        FILE *file = fopen(path, "we");
        if (file == NULL || fputs(new, file) < 0 || fclose(file) != 0)
            fail(path, strerror(errno));
    }
    free(old);
    free(new);
    return same;
}

int main(int argc, char **argv)
{
    bool check = argc > 1 && strcmp(argv[1], "--check") == 0, ok = true;
    for (int i = check ? 2 : 1; i < argc; i++)
        ok = update(argv[i], check) && ok;
    return check && !ok ? 1 : 0;
}
