/*
 * Shared memory that a client makes and passes, so that the client's own memory control group is
 * charged with its pages. They must stay its: a page that is freed and then touched by the daemon
 * would be charged to the daemon. So all of it must be there, and the daemon seals it, once both
 * have mapped it, against what frees pages or changes its length.
 */
#ifndef TS_GIVEN_MEMORY_H
#define TS_GIVEN_MEMORY_H

#include "tinyserve_types.h"

#include <stddef.h>
#include <stdint.h>

/*
 * Maps a memfd of whole pages and at least `least` bytes (at least 1), and seals it. `what` names
 * it in sentences ("the exchange"). The descriptor stays the caller's. TS_EINVAL or TS_ENOMEM with
 * a sentence.
 */
ts_status ts_given_map(int fd, const char *what, uint64_t least, void **base, uint64_t *bytes,
                       char *why, size_t why_bytes);

#endif
