/* Reading a fuzzer's input: bytes that run out give zeros. */
#ifndef TS_FUZZ_INPUT_H
#define TS_FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>

typedef struct fuzz_input {
    const uint8_t *at, *end;
} fuzz_input;

static inline uint32_t fuzz_take(fuzz_input *in, unsigned bytes)
{
    uint32_t x = 0;
    for (; bytes > 0 && in->at < in->end; bytes--)
        x = x << 8 | *in->at++;
    return x;
}

/* Small numbers mostly, sometimes any. */
static inline uint32_t fuzz_number(fuzz_input *in)
{
    uint32_t x = fuzz_take(in, 1);
    return x < 224 ? x % 32 : fuzz_take(in, 4);
}

/* One of the ids that earlier answers gave, sometimes any number. */
static inline uint64_t fuzz_id(fuzz_input *in, const uint64_t *ids, uint32_t count)
{
    uint32_t i = fuzz_take(in, 1);
    return i < 240 ? ids[i % count] : fuzz_number(in);
}

/* The next bytes, at most as many as there are; *bytes becomes their number. */
static inline const uint8_t *fuzz_bytes(fuzz_input *in, size_t *bytes)
{
    const uint8_t *at = in->at;
    if (*bytes > (size_t)(in->end - in->at))
        *bytes = (size_t)(in->end - in->at);
    in->at += *bytes;
    return at;
}

#endif
