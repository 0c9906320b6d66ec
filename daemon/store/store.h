/*
 * The store: descriptors that outlive the daemon, because somebody else holds them. That is systemd
 * (its service's fd store) or the supervisor (supervisor.h). What the memory behind a descriptor
 * holds is there for the next daemon, whatever ended this one.
 *
 * Storing is asynchronous: a thread of the store sends, so no caller waits for the holder, and
 * nothing is lost where its socket is full. A barrier says when the holder has it all.
 *
 * The holder never tells one of its descriptors from another by what it is: a name belongs to one
 * descriptor, and systemd passes over a second name of the same open file.
 *
 * Without a holder `ts_store_holds` is false, and every call does nothing and says so. A supervisor
 * may die: the log says so, and what is stored is kept here and sent to the next supervisor.
 *
 * Thread: any, after ts_store_open.
 */
#ifndef TS_STORE_H
#define TS_STORE_H

#include "tinyserve_types.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ts_store ts_store;

/*
 * From the environment (store_wire.h): there is a store if NOTIFY_SOCKET is set and FDSTORE (or,
 * for systemd before 254, TINYSERVE_FDSTORE) says how many descriptors it takes. Unsets what
 * concerns this process alone; NOTIFY_SOCKET stays, for sd_notify(3). Descriptors that were passed
 * are the store's now, close-on-exec. NULL: no memory or no thread; all calls take a NULL as "no
 * store". Before any thread starts: it changes the environment.
 */
ts_store *ts_store_open(void);

/* Stops the thread and closes what nobody took. What is stored stays so; messages that weren't sent
 * yet are not: a barrier comes before. */
void ts_store_close(ts_store *store);

/* Whether somebody holds what is stored, at this moment. */
bool ts_store_holds(ts_store *store);

/* Whether the holder is a supervisor, and not systemd; a dead one counts. */
bool ts_store_supervised(const ts_store *store);

/* How many descriptors the holder takes at most; 0: there is none. How many are stored. */
uint32_t ts_store_fds_max(ts_store *store);
uint32_t ts_store_fds(ts_store *store);

/*
 * The descriptor of this name that was there at start, the caller's from now on; it stays stored.
 * -1: there is none, or it was taken. Listening sockets of socket activation are found here, too,
 * by the name that their unit gives them (tinyserved.socket); of one name the first comes first.
 */
int ts_store_take(ts_store *store, const char *name);

/*
 * Tells the name of each stored descriptor that was there at start and that nobody took; not of
 * listening sockets. `each` may call the store.
 */
void ts_store_each(ts_store *store, void (*each)(void *arg, const char *name), void *arg);

/*
 * Stores a duplicate of `fd`, which stays the caller's, under a name: 1 to 32 of [a-z0-9.], without
 * ".socket" at the end. Returns at once. While a supervisor is dead it is kept for the next one.
 *
 * TS_EINVAL: the name is none. TS_EEXIST: it is stored. TS_ENOSPC: the holder's descriptors or the
 * bytes of names (TS_STORE_NAMES_BYTES) are used up. TS_ENOMEM. TS_ECONN: there is no store. With
 * a sentence in `why`.
 */
ts_status ts_store_put(ts_store *store, const char *name, int fd, char *why, size_t why_bytes)
    __attribute__((warn_unused_result));

/*
 * From now on ts_store_put leaves room for `fds` descriptors, which ts_store_put_reserved alone may
 * use: those without which the next daemon could not begin, however full the store is. 0: none.
 */
void ts_store_reserve(ts_store *store, uint32_t fds);
ts_status ts_store_put_reserved(ts_store *store, const char *name, int fd, char *why,
                                size_t why_bytes) __attribute__((warn_unused_result));

/* Has the holder close the descriptor of this name. TS_ENOENT: none is stored. TS_ECONN: there is
 * no store. */
ts_status ts_store_remove(ts_store *store, const char *name);

/*
 * Waits until the holder has carried out all puts and removes that came before. False: it didn't
 * within the time, or there is no holder, or it died.
 */
bool ts_store_barrier(ts_store *store, uint32_t timeout_ms) __attribute__((warn_unused_result));

/* Whether the last barrier wasn't reached in its time: the holder is slow, or stands still. */
bool ts_store_lags(const ts_store *store);

/*
 * Has a thread of the store tell when the holder is lost (false) and when a new one has been found
 * (true). The log has said so already. NULL: nobody is told any more.
 */
void ts_store_on_change(ts_store *store, void (*changed)(void *arg, bool holds), void *arg);

#endif
