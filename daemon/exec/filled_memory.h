/*
 * Memory that the daemon makes and a client fills, so that the client's own memory control group
 * is charged with its pages: the exchange in host memory and the rings. The pages must stay there:
 * one that is freed and then touched by the daemon would be charged to the daemon. So when the
 * client hands the memory over, all of it must be there, and the daemon seals it against what frees
 * pages. Memory that the next daemon must map can't be sealed: ts_filled_is_whole finds out who
 * frees pages of it, and that session ends. The daemon makes the memory, so that no client has to
 * pass a descriptor (passed_fds.h).
 *
 * Locking: the caller's.
 */
#ifndef TS_FILLED_MEMORY_H
#define TS_FILLED_MEMORY_H

#include "tinyserve_types.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Memory that a client has yet to hand over. */
typedef struct ts_filling {
    int fd;
    uint64_t bytes; /* 0: none */
    bool outlives;  /* the next daemon must map it, so it can't be sealed */
} ts_filling;

/* Makes memory of whole pages, in place of what was made before. TS_ENOMEM with a sentence. */
ts_status ts_filling_new(ts_filling *filling, uint64_t bytes, char *why, size_t why_bytes);

/* Maps what the client has filled; `what` names it in sentences ("the exchange"). The struct is
 * empty afterwards, also on an error. *fd is the memory's descriptor, the caller's; NULL: it isn't
 * wanted. TS_EINVAL or TS_ENOMEM with a sentence. */
ts_status ts_filling_take(ts_filling *filling, const char *what, void **base, uint64_t *bytes,
                          int *fd, char *why, size_t why_bytes);

/* Whether all pages of the descriptor's memory are there. */
bool ts_filled_is_whole(int fd);

void ts_filling_end(ts_filling *filling);

#endif
