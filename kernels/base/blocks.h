/* How many blocks tokens fill: what both sides of a begin work out for each sequence of a batch. */
#ifndef TS_BLOCKS_H
#define TS_BLOCKS_H

#include <stdint.h>

#define TS_COMMAND_ENTRIES (1u << 18) /* of block tables, that one request changes at most */

/* tokens / block_tokens. Block lengths are powers of 2, as a rule, and a division takes ten times
 * as long as a shift. */
static inline uint64_t ts_whole_blocks(uint64_t tokens, uint32_t block_tokens)
{
    if ((block_tokens & (block_tokens - 1)) == 0)
        return tokens >> __builtin_ctz(block_tokens);
    return tokens / block_tokens;
}

/* Entries that a table for `tokens` tokens has. */
static inline uint32_t ts_blocks_for(uint64_t tokens, uint32_t block_tokens)
{
    return (uint32_t)ts_whole_blocks(tokens + block_tokens - 1, block_tokens);
}

/* The first entry that `new_tokens` behind the first `start` tokens lie in; of none, the table's
 * end. */
static inline uint32_t ts_first_touched(uint64_t start, uint32_t new_tokens, uint32_t block_tokens)
{
    return new_tokens == 0 ? ts_blocks_for(start, block_tokens)
                           : (uint32_t)ts_whole_blocks(start, block_tokens);
}

#endif
