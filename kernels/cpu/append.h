/* Writes a call's new K and V into the cache. Any thread: the caller sees to it that no two write
 * the same token. */
#ifndef TS_APPEND_H
#define TS_APPEND_H

#include "attention_call.h"

/* Writes K and V of new tokens first..first + count - 1 of the sequence, which has some (seq->k),
 * into their slots. */
void ts_append_tokens(const ts_attention_call *call, const ts_attention_seq *seq, uint32_t first,
                      uint32_t count);

#endif
