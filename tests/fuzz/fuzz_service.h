/*
 * The service that the fuzz targets feed: an engine with its thread, one small pool in host memory,
 * and the host's kernels. It lives as long as the process; each input has a connection of its own,
 * and after each the engine's books must agree.
 *
 * What an input does goes through the queue, as in the daemon: it runs in the fuzzer's thread where
 * the engine is idle, and in the engine's thread where it isn't.
 */
#ifndef TS_FUZZ_SERVICE_H
#define TS_FUZZ_SERVICE_H

#include "server.h"

extern ts_service fuzz_service;

/* Aborts if it can't be made. */
void fuzz_service_start(void);

/* Runs it as the engine's owner, and returns when it has run. */
void fuzz_as_owner(void (*run)(void *arg), void *arg);

/* Runs `holds` as the engine's owner until it returns true. */
void fuzz_await(bool (*holds)(void *arg), void *arg);

/* A new connection with a session that has opened the pool, and its end. */
uint32_t fuzz_connect(uint32_t uid, bool writable);
void fuzz_disconnect(uint32_t pipe);

/* Sends the request and waits for its answer, which becomes the caller's; NULL: an empty one. */
Tspb__Reply *fuzz_call(uint32_t pipe, Tspb__Request *message);

/* `count` new sequences, and `count` forks of one; ids are stored in seqs unless it is refused. */
void fuzz_create(uint32_t pipe, uint32_t count, uint64_t *seqs);
void fuzz_fork(uint32_t pipe, uint64_t parent, uint32_t count, uint64_t *seqs);

/* Gives the connection's session an exchange in host memory, as the handle socket does. */
void fuzz_give_exchange(uint32_t pipe, uint64_t bytes);

/* Aborts if the engine's books don't agree. */
void fuzz_check_books(void);

/* Lets the engine's time go on, and ends what has had its time. */
void fuzz_wait(uint64_t ms);

#endif
