/*
 * Where the daemon's sockets go. Only what a daemon before it left there makes way: a socket of the
 * daemon's own user at which nobody listens. Everything else at the path is somebody's, and stays.
 *
 * Thread: main's, before anything listens.
 */
#ifndef TS_SOCKET_PATH_H
#define TS_SOCKET_PATH_H

#include "tinyserve_types.h"

#include <stdbool.h>
#include <stddef.h>

/*
 * Makes the folder of the system's socket (socket_place.h) if it is missing, as it is where root
 * starts a daemon by hand; any other socket's folder has to be there. own: it is the user's own
 * socket: its folder is made, or taken as it is. TS_EEXIST with a sentence: something lies there
 * that isn't this user's alone.
 */
ts_status ts_socket_folder_make(const char *socket, bool own, char *why, size_t why_bytes);

/* Removes a stale socket from the path. TS_EEXIST with a sentence: something else lies there. */
ts_status ts_socket_path_clear(const char *path, char *why, size_t why_bytes);

/*
 * Makes sure that no other daemon serves this socket, without touching the socket. `who` is what
 * serves it: "tinyserved". *fd is the lock's, and `path` its file, SOCKET.lock. The lock ends with
 * the process. TS_EEXIST with a sentence: another daemon has it, or the file isn't a lock.
 */
ts_status ts_socket_path_lock(const char *socket, const char *who, char *path, size_t path_bytes,
                              int *fd, char *why, size_t why_bytes);

#endif
