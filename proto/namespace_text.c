#include "namespace_text.h"

#include "plain_text.h"

#include <stdint.h>
#include <string.h>

#define MOST 64u
#define MARK "hex:"
#define MARK_BYTES 4u

static const char digits[] = "0123456789abcdefABCDEF";

const char *ts_namespace_show(const void *bytes, size_t count, char to[TS_NAMESPACE_TEXT_BYTES])
{
    const unsigned char *from = bytes;
    count = count < MOST ? count : MOST;
    memcpy(to, from, count);
    to[count] = '\0';
    if (strlen(to) == count && ts_text_plain(to) && strncmp(to, MARK, MARK_BYTES) != 0)
        return to;
    char *at = to + MARK_BYTES;
    memcpy(to, MARK, MARK_BYTES);
    for (size_t i = 0; i < count; i++) {
        *at++ = digits[from[i] >> 4];
        *at++ = digits[from[i] & 15];
    }
    *at = '\0';
    return to;
}

/* A hexadecimal digit, in either case; -1: it is none. */
static int digit_of(char c)
{
    const char *at = c == '\0' ? NULL : strchr(digits, c);
    if (at == NULL)
        return -1;
    const int digit = (int)(at - digits);
    return digit < 16 ? digit : digit - 6;
}

bool ts_namespace_read(const char *text, unsigned char bytes[64], size_t *count)
{
    const bool hex = strncmp(text, MARK, MARK_BYTES) == 0;
    const char *from = hex ? text + MARK_BYTES : text;
    const size_t length = strlen(from);
    *count = hex ? length / 2 : length;
    if (*count == 0 || *count > MOST || (hex && length % 2 != 0))
        return false;
    if (!hex)
        memcpy(bytes, from, *count);
    for (size_t i = 0; hex && i < *count; i++) {
        const int high = digit_of(from[2 * i]), low = digit_of(from[2 * i + 1]);
        if (high < 0 || low < 0)
            return false;
        bytes[i] = (unsigned char)(high << 4 | low);
    }
    return true;
}
