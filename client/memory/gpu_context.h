/*
 * A worker's side of GPU memory, through the CUDA driver, which is loaded when a GPU pool first
 * needs it: libtinyserve is built and linked without CUDA. The driver's functions work in the
 * device's primary context, the one that PyTorch and the CUDA runtime use too; what the calling
 * thread had current is restored.
 *
 * Thread: the client's.
 */
#ifndef TS_GPU_CONTEXT_H
#define TS_GPU_CONTEXT_H

#include "client.h"

/* The device with this UUID. TS_EDEVICE: no driver, or it isn't visible here
 * (CUDA_VISIBLE_DEVICES). The error sentence is set. */
ts_status ts_cuda_open(ts_client *client, const uint8_t uuid[TS_UUID_BYTES], ts_cuda **out);
void ts_cuda_close(ts_cuda *cuda);
int ts_cuda_ordinal(const ts_cuda *cuda);
bool ts_cuda_is(const ts_cuda *cuda, const uint8_t uuid[TS_UUID_BYTES]);

/* Makes the device's primary context the calling thread's, and undoes it. In between, as within
 * each function here, no call spoils a CUDA graph that another thread captures, whatever the mode
 * of that capture is: the calling thread's is relaxed. Not nested. */
ts_status ts_cuda_enter(ts_client *client, ts_cuda *cuda);
void ts_cuda_leave(ts_cuda *cuda);

/* Whether a fault, this process's or under CUDA's multi-process service another one's, has taken
 * the context. Waits for nothing. */
bool ts_cuda_is_lost(ts_cuda *cuda);

/* Waits for all that this process has queued on the device, by whatever library: before memory is
 * unmapped that it may use. */
ts_status ts_cuda_await(ts_client *client, ts_cuda *cuda);

/* Addresses for `bytes` of memory that is mapped piece by piece. */
ts_status ts_cuda_reserve(ts_client *client, ts_cuda *cuda, size_t bytes, unsigned char **base);
void ts_cuda_unreserve(ts_cuda *cuda, unsigned char *base, size_t bytes);

/* Maps the VMM memory behind the descriptor, which stays the caller's. */
ts_status ts_cuda_map(ts_client *client, ts_cuda *cuda, unsigned char *at, size_t bytes, int fd,
                      bool writable);
void ts_cuda_unmap(ts_cuda *cuda, unsigned char *at, size_t bytes);

/* Maps another process's cudaMalloc memory, whole. */
ts_status ts_cuda_ipc_open(ts_client *client, ts_cuda *cuda,
                           const uint8_t handle[TS_IPC_HANDLE_BYTES], unsigned char **base);
void ts_cuda_ipc_close(ts_cuda *cuda, unsigned char *base);

/* The handle of the cudaMalloc allocation that `memory` lies in, and where in it. TS_EINVAL: it is
 * no such memory, or the allocation ends before memory + bytes. */
ts_status ts_cuda_ipc_export(ts_client *client, ts_cuda *cuda, void *memory, size_t bytes,
                             uint8_t handle[TS_IPC_HANDLE_BYTES], uint64_t *offset);

/* Lets the device write and read a page of host memory; its address there. */
ts_status ts_cuda_pin(ts_client *client, ts_cuda *cuda, void *host, size_t bytes, uint64_t *there);
void ts_cuda_unpin(ts_cuda *cuda, void *host);

/* Queues on the stream (a CUstream or cudaStream_t; NULL: the default one): write `submitted`, then
 * wait until `completed` has reached the same value. Both are addresses of pinned words. */
ts_status ts_cuda_hand_over(ts_client *client, ts_cuda *cuda, void *stream, uint64_t submitted,
                            uint64_t completed, uint32_t value);

/* Whether the stream is being captured into a graph. */
ts_status ts_cuda_is_captured(ts_client *client, ts_cuda *cuda, void *stream, bool *captured);

/* Makes a mark and queues it on the stream. Unmark it also after an
 * error, unless it is NULL. */
ts_status ts_cuda_mark(ts_client *client, ts_cuda *cuda, void *stream, void **mark);
void ts_cuda_unmark(ts_cuda *cuda, void *mark); /* NULL: nothing */

/* Waits for the later mark; the time that the stream took from one to the other. */
ts_status ts_cuda_between(ts_client *client, ts_cuda *cuda, void *from, void *to, uint64_t *ns);

/* The GPU of the pool, made ready at the first need: a session uses one. */
ts_status ts_client_cuda(ts_client *client, const ts_pool *pool, ts_cuda **out);

#endif
