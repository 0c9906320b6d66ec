/*
 * Namespaces of the prefix index for people. A namespace is bytes. Those that are plain text
 * (plain_text.h) are written as they are; others, and text that begins with "hex:", as "hex:" and
 * two hexadecimal digits a byte. So each has one form, and it is safe to show.
 */
#ifndef TS_NAMESPACE_TEXT_H
#define TS_NAMESPACE_TEXT_H

#include <stdbool.h>
#include <stddef.h>

#define TS_NAMESPACE_TEXT_BYTES (4 + 2 * 64 + 1)

/* The form for people of at most 64 bytes. Returns `to`. */
const char *ts_namespace_show(const void *bytes, size_t count, char to[TS_NAMESPACE_TEXT_BYTES]);

/* Reads it back. False: it is none of 1 to 64 bytes. */
bool ts_namespace_read(const char *text, unsigned char bytes[64], size_t *count);

#endif
