/*
 * For structs of others that only read what they point to, but have no const for that: messages of
 * protobuf-c that are packed, struct iovec of what is sent, the arguments of execv.
 */
#ifndef TS_UNCONST_H
#define TS_UNCONST_H

#include <stdint.h>

static inline void *ts_unconst(const void *pointer)
{
    return (void *)(uintptr_t)pointer;
}

#endif
