/*
 * Text that comes from others and goes to a terminal, a log or a page. Plain text is valid UTF-8
 * without control characters (U+0000 to U+001F, U+007F to U+009F) and without what reorders or
 * breaks lines (bidi controls, U+2028, U+2029). Names must be plain; whatever else is shown is made
 * so.
 */
#ifndef TS_PLAIN_TEXT_H
#define TS_PLAIN_TEXT_H

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

bool ts_text_plain(const char *text);

/* Copies the text, each byte that isn't plain as \xNN, as far as it fits without cutting a
 * character. Returns `to`. */
char *ts_text_escape(const char *text, char *to, size_t bytes);

/* Makes every string in the message plain, in those inside it too. Strings are malloc'ed, as
 * protobuf-c's default allocator makes them. False: no memory; the string is empty then. */
bool ts_text_escape_all(ProtobufCMessage *message);

/* The name of a field of the message, or of one inside it, whose string isn't plain, and the
 * string; NULL: all are. */
const char *ts_text_find_not_plain(const ProtobufCMessage *message, const char **string);

/* The character at `text`, and how many bytes it has; 0 of a byte that begins none. */
uint32_t ts_text_character(const char *text, size_t *bytes);

/* "512 B", "3.1 MiB", in a buffer of the caller's. */
const char *ts_text_bytes(uint64_t n, char *buffer, size_t size);

#endif
