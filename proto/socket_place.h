/*
 * Where a daemon listens that was told nothing, and where clients then look for it: the one rule of
 * both sides.
 *
 * The system's daemon has /run/tinyserve/tinyserve.sock. It runs as root, or as the user to whom
 * /run/tinyserve belongs (which only root can have given away). Everybody else has a folder of
 * their own for the socket: $XDG_RUNTIME_DIR/tinyserve; where that variable doesn't name a folder
 * of the user's that others can't write to, /tmp/tinyserve-UID. TMPDIR isn't looked at, since a
 * daemon and its workers often have different ones. Who connects or listens there checks the folder
 * first: in /tmp anybody may have made it.
 */
#ifndef TS_SOCKET_PLACE_H
#define TS_SOCKET_PLACE_H

#include "tinyserve_types.h"

#include <stddef.h>

#define TS_SYSTEM_FOLDER "/run/tinyserve"
#define TS_SOCKET_NAME "tinyserve.sock"
#define TS_SYSTEM_SOCKET TS_SYSTEM_FOLDER "/" TS_SOCKET_NAME

/*
 * The path of this user's own socket, whether it is there or not, cut off where `to` ends. Returns
 * its length as snprintf does; 0: the user's is the system's.
 */
size_t ts_own_socket(char *to, size_t bytes);

/*
 * Whether the folder that this socket lies in is this user's, and nobody else can make a socket in
 * it. TS_ENOENT: there is no folder. TS_EPERM with a sentence: it isn't.
 */
ts_status ts_own_folder_check(const char *socket, char *why, size_t why_bytes);

#endif
