/*
 * Arrays of zeroes that may be large: memory is taken as they are touched, in the system's large
 * pages where there are some, so that a million elements aren't thousands of page faults.
 *
 * Errors: NULL, no memory. Owner: who made one frees it, and says how long it is.
 */
#ifndef TS_LARGE_ARRAY_H
#define TS_LARGE_ARRAY_H

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#define TS_LARGE_ARRAY_BYTES (1u << 20) /* from which on the heap isn't used */

static inline void *ts_large_array_new(uint64_t count, size_t element_bytes)
{
    const uint64_t bytes = count * element_bytes;
    if (bytes < TS_LARGE_ARRAY_BYTES)
        return calloc(count + 1, element_bytes);
    void *array = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (array == MAP_FAILED)
        return NULL;
    (void)madvise(array, bytes, MADV_HUGEPAGE); /* where there are none, without */
    return array;
}

static inline void ts_large_array_free(void *array, uint64_t count, size_t element_bytes)
{
    const uint64_t bytes = count * element_bytes;
    if (bytes < TS_LARGE_ARRAY_BYTES)
        free(array);
    else if (array != NULL)
        (void)munmap(array, bytes);
}

#endif
