#define _GNU_SOURCE
#include "socket_place.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OTHERS_WRITE (S_IWGRP | S_IWOTH)

static bool is_folder_of_ours(const char *path, struct stat *about)
{
    return stat(path, about) == 0 && S_ISDIR(about->st_mode) && about->st_uid == geteuid();
}

size_t ts_own_socket(char *to, size_t bytes)
{
    struct stat about;
    if (geteuid() == 0 || is_folder_of_ours(TS_SYSTEM_FOLDER, &about))
        return 0;
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    int length =
        runtime != NULL && runtime[0] == '/' && is_folder_of_ours(runtime, &about) &&
                (about.st_mode & OTHERS_WRITE) == 0
            ? snprintf(to, bytes, "%s/tinyserve/" TS_SOCKET_NAME, runtime)
            : snprintf(to, bytes, "/tmp/tinyserve-%u/" TS_SOCKET_NAME, (unsigned)geteuid());
    return (size_t)length;
}

ts_status ts_own_folder_check(const char *socket, char *why, size_t why_bytes)
{
    struct stat about;
    int length = (int)(strrchr(socket, '/') - socket);
    char *folder = strndup(socket, (size_t)length);
    int error = folder == NULL ? ENOMEM : lstat(folder, &about) != 0 ? errno : 0;
    free(folder);
    if (error == ENOENT)
        return TS_ENOENT;
    if (error != 0)
        snprintf(why, why_bytes, "%.*s: %s", length, socket, strerror(error));
    else if (!S_ISDIR(about.st_mode))
        snprintf(why, why_bytes, "%.*s is %s and not a folder", length, socket,
                 S_ISLNK(about.st_mode) ? "a symbolic link" : "a file");
    else if (about.st_uid != geteuid())
        snprintf(why, why_bytes, "%.*s belongs to uid %u and not to uid %u", length, socket,
                 (unsigned)about.st_uid, (unsigned)geteuid());
    else if ((about.st_mode & OTHERS_WRITE) != 0)
        snprintf(why, why_bytes, "%.*s may be written by others (its mode is %03o)", length, socket,
                 (unsigned)about.st_mode & 07777);
    else
        return TS_OK;
    return TS_EPERM;
}
