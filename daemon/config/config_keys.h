/*
 * The keys of the configuration's two kinds of sections: their names, values, limits and help. The
 * lists of keys in systemd/tinyserved.conf and in its manual page come from here: document_keys.c.
 */
#ifndef TS_CONFIG_KEYS_H
#define TS_CONFIG_KEYS_H

#include "config.h"

typedef struct ts_config_key ts_config_key;

struct ts_config_key {
    const char *name;
    /* Reads the value into the field; TS_EINVAL with the reason, which goes behind "key = value".
     */
    ts_status (*read)(const ts_config_key *key, void *field, const char *value, char *why,
                      size_t why_bytes);
    size_t offset, bytes; /* of the field in the section's struct */
    uint64_t least, most; /* of a number */
    bool octal;           /* how a number is written */
    const char *const *words;
    const char *preset;  /* the value if none is given; NULL: what zeros of the field mean */
    const char *empty;   /* what no value means, in words; an empty value is as good as none */
    const char *shipped; /* the value in the shipped file, which leaves other keys to the preset */
    /* Sentences for people. {words} and {limits} stand for the key's; `name` is another key, a
     * value or a command. */
    const char *help;
    const char *more; /* what the manual alone says */
    bool required;
    bool reloads; /* a running daemon can change it */
};

typedef struct ts_config_section {
    const char *name; /* as problems call it */
    const ts_config_key *keys;
    uint32_t num_keys;
} ts_config_section;

extern const ts_config_section ts_config_daemon, ts_config_pools;

/* The key of this name; NULL: there is none. */
const ts_config_key *ts_config_find_key(const ts_config_section *section, const char *name);

/* The key that a name may mean which is none: with edits of a third of its letters at most. NULL:
 * there is none so near. */
const ts_config_key *ts_config_nearest_key(const ts_config_section *section, const char *name);

/* Sets every key of a section's struct that has a preset to it. */
void ts_config_preset(const ts_config_section *section, void *object);

/* Whether two structs of the section's kind have another value of this key. */
bool ts_config_key_differs(const ts_config_key *key, const void *a, const void *b);

#endif
