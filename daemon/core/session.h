/*
 * Sessions: one connected client process each, with what must be reclaimed when it goes. A session
 * that closes while a kernel still works on one of its steps is *closing* until the kernel is done.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_SESSION_H
#define TS_SESSION_H

#include "gpu.h"
#include "waits.h"

#define TS_PROGRAM_BYTES 64
#define TS_SECRET_BYTES 16

/* Where an exchange lies. */
typedef enum ts_exchange_place {
    TS_EXCHANGE_IN_HOST,
    TS_EXCHANGE_ON_DEVICE, /* memory of the daemon's */
    TS_EXCHANGE_OF_CLIENT  /* memory of its own on a device, by an IPC handle */
} ts_exchange_place;

typedef struct ts_exchange_source {
    uint32_t place;  /* ts_exchange_place */
    uint32_t pool;   /* whose device it is on */
    uint64_t offset; /* in the allocation that the handle is of */
    uint8_t handle[TS_IPC_HANDLE_BYTES];
} ts_exchange_source;

typedef struct ts_session {
    uint32_t generation;
    bool live, closing;
    bool away;       /* its client has yet to come back to a daemon that was restarted */
    uint32_t tenant; /* index */
    uint32_t pid;
    uint64_t process_started; /* by /proc: tells the process from a later one with its pid */
    char program[TS_PROGRAM_BYTES];
    uint8_t token[TS_SECRET_BYTES]; /* whoever knows it speaks for the session */
    uint8_t nonce[TS_SECRET_BYTES]; /* the client's, of its opening; all 0: it gave none */
    uint64_t call;                  /* the last one that was carried out, by the client's count */
    uint64_t exchange_bytes;
    uint32_t exchanges; /* that it has had */
    ts_exchange_source exchange;
    uint32_t stream_number; /* of the last run on a stream; 0: there was none */
    uint32_t sequences;     /* owned */
    uint64_t blocks;        /* entries in their block tables, and what its open steps reserved */
    uint32_t steps;         /* open */
    uint32_t step_list;
    uint64_t opened_pools;   /* bit i: pool i */
    uint64_t writable_pools; /* bit i: opened to be written */
    uint32_t claims;         /* of its sequences (claims.h), */
    uint32_t newest_claim;   /* ... if there are any */
    ts_wait wait;
    uint32_t *owned; /* per pool: head of its sequences */
    uint32_t next_free;
    bool in_closing; /* it is in the engine's list, linked by next_closing */
    uint32_t next_closing;
} ts_session;

#endif
