#include "plain_text.h"

#include "unconst.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint32_t ts_text_character(const char *text, size_t *bytes)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}; /* by length: no longer forms */
    const unsigned char *t = (const unsigned char *)text;
    size_t length = t[0] < 0x80             ? 1
                    : (t[0] & 0xe0) == 0xc0 ? 2
                    : (t[0] & 0xf0) == 0xe0 ? 3
                    : (t[0] & 0xf8) == 0xf0 ? 4
                                            : 0;
    uint32_t c = length <= 1 ? t[0] : t[0] & (0x7fu >> length);
    for (size_t i = 1; i < length; i++) {
        if ((t[i] & 0xc0) != 0x80) { /* the end of the text, too */
            length = 0;
            break;
        }
        c = c << 6 | (t[i] & 0x3f);
    }
    bool wrong = length == 0 || c < least[length] || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff);
    *bytes = wrong ? 0 : length;
    return wrong ? 0 : c;
}

static bool is_plain(uint32_t c)
{
    return c >= 0x20 && !(c >= 0x7f && c <= 0x9f) && c != 0x61c && c != 0x200e && c != 0x200f &&
           !(c >= 0x2028 && c <= 0x202e) && !(c >= 0x2066 && c <= 0x2069);
}

bool ts_text_plain(const char *text)
{
    for (size_t bytes; *text != '\0'; text += bytes) {
        uint32_t c = ts_text_character(text, &bytes);
        if (bytes == 0 || !is_plain(c))
            return false;
    }
    return true;
}

char *ts_text_escape(const char *text, char *to, size_t size)
{
    static const char digits[] = "0123456789abcdef";
    size_t used = 0;
    while (*text != '\0') {
        size_t bytes;
        uint32_t c = ts_text_character(text, &bytes);
        bool plain = bytes > 0 && is_plain(c);
        size_t from = bytes > 0 ? bytes : 1, length = plain ? from : 4 * from;
        if (used + length + 1 > size)
            break;
        for (size_t i = 0; i < from; i++, text++) {
            unsigned char byte = (unsigned char)*text;
            if (plain) {
                to[used++] = *text;
            } else {
                to[used++] = '\\';
                to[used++] = 'x';
                to[used++] = digits[byte >> 4];
                to[used++] = digits[byte & 15];
            }
        }
    }
    if (size > 0)
        to[used] = '\0';
    return to;
}

/* The string itself if it is plain; else one in its place. */
static bool make_plain(char **string)
{
    if (*string == NULL || ts_text_plain(*string))
        return true;
    size_t size = strlen(*string) * 4 + 1;
    char *plain = malloc(size);
    if (plain != NULL)
        ts_text_escape(*string, plain, size);
    else
        **string = '\0';
    if (plain != NULL) {
        free(*string);
        *string = plain;
    }
    return plain != NULL;
}

/* Where a message has the values of a field, and how many; 0 of one of a oneof that isn't there. */
static void **values_of(const ProtobufCMessage *message, const ProtobufCFieldDescriptor *f,
                        size_t *count)
{
    char *base = ts_unconst(message);
    void *quantifier = base + f->quantifier_offset, *value = base + f->offset;
    *count = 1;
    if (f->label == PROTOBUF_C_LABEL_REPEATED)
        *count = *(const size_t *)quantifier;
    else if (f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF)
        *count = *(const uint32_t *)quantifier == f->id;
    return f->label == PROTOBUF_C_LABEL_REPEATED ? *(void ***)value : (void **)value;
}

bool ts_text_escape_all(ProtobufCMessage *message)
{
    bool ok = true;
    for (unsigned i = 0; i < message->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &message->descriptor->fields[i];
        size_t count;
        if (f->type != PROTOBUF_C_TYPE_STRING && f->type != PROTOBUF_C_TYPE_MESSAGE)
            continue;
        void **values = values_of(message, f, &count);
        for (size_t j = 0; j < count; j++)
            if (f->type == PROTOBUF_C_TYPE_STRING)
                ok = make_plain((char **)&values[j]) && ok;
            else if (values[j] != NULL)
                ok = ts_text_escape_all(values[j]) && ok;
    }
    return ok;
}

const char *ts_text_find_not_plain(const ProtobufCMessage *message, const char **string)
{
    for (unsigned i = 0; i < message->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &message->descriptor->fields[i];
        size_t count;
        if (f->type != PROTOBUF_C_TYPE_STRING && f->type != PROTOBUF_C_TYPE_MESSAGE)
            continue;
        void **values = values_of(message, f, &count);
        for (size_t j = 0; j < count; j++) {
            const char *name = NULL;
            if (values[j] == NULL)
                continue;
            if (f->type == PROTOBUF_C_TYPE_MESSAGE)
                name = ts_text_find_not_plain(values[j], string);
            else if (!ts_text_plain(values[j]))
                name = f->name, *string = values[j];
            if (name != NULL)
                return name;
        }
    }
    return NULL;
}

const char *ts_text_bytes(uint64_t n, char *buffer, size_t size)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double x = (double)n;
    size_t u = 0;
    while (x >= 1024 && u + 1 < sizeof units / sizeof *units) {
        x /= 1024;
        u++;
    }
    snprintf(buffer, size, u == 0 ? "%.0f %s" : "%.1f %s", x, units[u]);
    return buffer;
}
