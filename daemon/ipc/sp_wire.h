/*
 * The wire protocol of NNG's ipc:// transport, as far as a REP socket needs it ("Scalability
 * Protocols", the IPC mapping). Each side greets with 8 bytes. A message is a byte 1, its length of
 * 8 bytes, big-endian, and its content. A request's content begins with a *backtrace*: words of 4
 * bytes, the last of which has its highest bit set; an answer begins with the same.
 *
 * Locking: none; plain functions.
 */
#ifndef TS_SP_WIRE_H
#define TS_SP_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TS_SP_GREETING_BYTES 8u
#define TS_SP_HEAD_BYTES 9u
#define TS_SP_BACKTRACE_BYTES 32u /* at most: 8 words, as many as NNG passes on */

static const uint8_t ts_sp_greeting_rep[TS_SP_GREETING_BYTES] = {0, 'S', 'P', 0, 0, 0x31, 0, 0};
static const uint8_t ts_sp_greeting_req[TS_SP_GREETING_BYTES] = {0, 'S', 'P', 0, 0, 0x30, 0, 0};

/* Whether a REQ socket greets. */
static inline bool ts_sp_greets(const uint8_t bytes[TS_SP_GREETING_BYTES])
{
    return memcmp(bytes, ts_sp_greeting_req, TS_SP_GREETING_BYTES) == 0;
}

static inline void ts_sp_head(uint8_t head[TS_SP_HEAD_BYTES], uint64_t bytes)
{
    head[0] = 1;
    for (int i = 0; i < 8; i++)
        head[1 + i] = (uint8_t)(bytes >> (56 - 8 * i));
}

/* The length that a head tells; false: it begins no message. */
static inline bool ts_sp_length(const uint8_t head[TS_SP_HEAD_BYTES], uint64_t *bytes)
{
    *bytes = 0;
    for (int i = 0; i < 8; i++)
        *bytes = *bytes << 8 | head[1 + i];
    return head[0] == 1;
}

/* Bytes of the backtrace that the content begins with; 0: it begins with none. */
static inline size_t ts_sp_backtrace(const uint8_t *content, size_t bytes)
{
    for (size_t at = 0; at + 4 <= bytes && at + 4 <= TS_SP_BACKTRACE_BYTES; at += 4)
        if (content[at] & 0x80)
            return at + 4;
    return 0;
}

#endif
