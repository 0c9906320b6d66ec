#define _GNU_SOURCE
#include "socket_path.h"

#include "socket_place.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static const char *kind_of(mode_t mode)
{
    return S_ISREG(mode)   ? "a file"
           : S_ISDIR(mode) ? "a folder"
           : S_ISLNK(mode) ? "a symbolic link"
                           : "neither a file nor a socket";
}

/* 0: somebody listens; else the error of connecting. */
static int connect_error(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return ENAMETOOLONG;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return errno;
    int error = connect(fd, (struct sockaddr *)&address, sizeof address) == 0 ? 0 : errno;
    close(fd);
    /* A queue that is full, or a socket of another type: somebody has it open. */
    return error == EAGAIN || error == EPROTOTYPE ? 0 : error;
}

ts_status ts_socket_folder_make(const char *socket, bool own, char *why, size_t why_bytes)
{
    char folder[sizeof(struct sockaddr_un)];
    if (!own) { /* where it can't be made, the lock finds no folder and says so */
        if (strcmp(socket, TS_SYSTEM_SOCKET) == 0 && mkdir(TS_SYSTEM_FOLDER, 0755) == 0)
            (void)chmod(TS_SYSTEM_FOLDER, 0755); /* whatever the umask: sockets have modes, too */
        return TS_OK;
    }
    snprintf(folder, sizeof folder, "%.*s", (int)(strrchr(socket, '/') - socket), socket);
    if (mkdir(folder, 0700) != 0 && errno != EEXIST) {
        snprintf(why, why_bytes, "%s, the folder of this user's socket: %s", folder,
                 strerror(errno));
        return TS_EEXIST;
    }
    if (ts_own_folder_check(socket, why, why_bytes) == TS_OK)
        return TS_OK;
    size_t used = strlen(why);
    snprintf(why + used, why_bytes - used, ": the daemon's socket can't be made there");
    return TS_EEXIST;
}

ts_status ts_socket_path_clear(const char *path, char *why, size_t why_bytes)
{
    struct stat st;
    if (lstat(path, &st) != 0) {
        if (errno == ENOENT)
            return TS_OK;
        snprintf(why, why_bytes, "%s: %s", path, strerror(errno));
        return TS_EEXIST;
    }
    if (!S_ISSOCK(st.st_mode)) {
        snprintf(why, why_bytes, "%s is %s: a socket can't be made there, and it is left as it is",
                 path, kind_of(st.st_mode));
        return TS_EEXIST;
    }
    if (st.st_uid != geteuid()) {
        snprintf(why, why_bytes, "%s is a socket of uid %u, and this daemon is uid %u", path,
                 (unsigned)st.st_uid, (unsigned)geteuid());
        return TS_EEXIST;
    }
    int error = connect_error(path);
    if (error != ECONNREFUSED) {
        snprintf(why, why_bytes, "%s is a socket in use: %s", path,
                 error == 0 ? "another program listens there" : strerror(error));
        return TS_EEXIST;
    }
    if (unlink(path) == 0 || errno == ENOENT)
        return TS_OK;
    snprintf(why, why_bytes, "%s is a socket that nobody uses, and can't be removed: %s", path,
             strerror(errno));
    return TS_EEXIST;
}

/* Whether the folder of this path is there. */
static bool has_folder(const char *path)
{
    char folder[sizeof(struct sockaddr_un)];
    struct stat st;
    snprintf(folder, sizeof folder, "%.*s", (int)(strrchr(path, '/') - path), path);
    return stat(folder[0] != '\0' ? folder : "/", &st) == 0;
}

ts_status ts_socket_path_lock(const char *socket, const char *who, char *path, size_t path_bytes,
                              int *fd, char *why, size_t why_bytes)
{
    snprintf(path, path_bytes, "%s.lock", socket);
    for (;;) {
        struct stat ours, there;
        *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
        if (*fd < 0 || fstat(*fd, &ours) != 0) {
            const int error = errno;
            if (*fd < 0 && error == ENOENT && !has_folder(socket))
                snprintf(why, why_bytes,
                         "%s: its folder is missing; make it, or name another socket (--socket)",
                         socket);
            else
                snprintf(why, why_bytes, "%s: the socket's lock can't be made: %s", path,
                         strerror(error));
            break;
        }
        if (!S_ISREG(ours.st_mode) || ours.st_size != 0) {
            snprintf(why, why_bytes,
                     "%s isn't the empty file that locks the socket: it is left as it is", path);
            break;
        }
        if (flock(*fd, LOCK_EX | LOCK_NB) != 0) {
            snprintf(why, why_bytes, "%s: another %s serves this socket (%s is locked)", socket,
                     who, path);
            break;
        }
        /* Its last holder may have removed it between our two calls: then it locks nothing. */
        if (stat(path, &there) == 0 && ours.st_ino == there.st_ino)
            return TS_OK;
        close(*fd);
    }
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    return TS_EEXIST;
}
