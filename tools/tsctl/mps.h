/*
 * CUDA's multi-process service (MPS): its clients share one context on the device. A client that is
 * killed while its kernels run can take the others' work with it; one whose work the service's
 * control has ended first can't.
 */
#ifndef TSCTL_MPS_H
#define TSCTL_MPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Whether the service's control is reachable: CUDA_MPS_PIPE_DIRECTORY, or its default folder. */
bool mps_runs(void);

/*
 * Ends a client's work on every server of the service by the program nvidia-cuda-mps-control, which
 * has 5 seconds for each answer. True: no server has such a client any more, or none ever had.
 * False: a sentence in `why`. *ended says whether there was work to end.
 */
bool mps_end_client(uint32_t pid, bool *ended, char *why, size_t why_bytes);

#endif
