/* As NFS does on other nodes: for a while a process sees no file that another one has put into a folder .work.
 *
 * A file is late for LATE_SECONDS after its last change, unless this process made it. Each time that a process is told
 * that a late file is not there is noted in $LATE_LOG.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LATE_SECONDS 0.5
#define OWN_FILES 65536
static ino_t own[OWN_FILES]; /* by inode, made by this process */

static void note_own(int fd) {
    struct stat status;
    if (fd >= 0 && !syscall(SYS_fstat, fd, &status))
        own[status.st_ino % OWN_FILES] = status.st_ino;
}

static int is_late(int folder, const char *path) {
    char parent[4096] = "";
    struct stat status;
    struct timespec now;
    if (path[0] != '/' && folder != AT_FDCWD) {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        if (readlink(link, parent, sizeof parent - 1) < 0)
            return 0;
    }
    if (!strstr(path, ".work/") && !strstr(parent, ".work"))
        return 0;
    if (syscall(SYS_newfstatat, folder, path, &status, AT_SYMLINK_NOFOLLOW) || !S_ISREG(status.st_mode))
        return 0;
    clock_gettime(CLOCK_REALTIME, &now);
    double age = now.tv_sec - status.st_ctim.tv_sec + (now.tv_nsec - status.st_ctim.tv_nsec) / 1e9;
    return age < LATE_SECONDS && own[status.st_ino % OWN_FILES] != status.st_ino;
}

static int refuse(const char *path) {
    int log = syscall(SYS_openat, AT_FDCWD, getenv("LATE_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0644);
    dprintf(log, "%d %s\n", getpid(), path);
    close(log);
    errno = ENOENT;
    return -1;
}

#define OPEN(name, parameters, folder, path)                                                                           \
    int name parameters {                                                                                              \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, int) : 0;                                              \
        va_end(list);                                                                                                  \
        if (!(flags & O_CREAT) && is_late(folder, path))                                                               \
            return refuse(path);                                                                                       \
        int fd = syscall(SYS_openat, folder, path, flags, mode);                                                       \
        if (flags & O_CREAT)                                                                                           \
            note_own(fd);                                                                                              \
        return fd;                                                                                                     \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD, path)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, path)
OPEN(openat, (int folder, const char *path, int flags, ...), folder, path)
OPEN(openat64, (int folder, const char *path, int flags, ...), folder, path)

#define STAT(name, type, parameters, folder, path, arguments)                                                          \
    int name parameters {                                                                                              \
        int(*real) parameters = dlsym(RTLD_NEXT, #name);                                                               \
        return is_late(folder, path) ? refuse(path) : real arguments;                                                  \
    }
STAT(stat, stat, (const char *path, struct stat *buffer), AT_FDCWD, path, (path, buffer))
STAT(lstat, stat, (const char *path, struct stat *buffer), AT_FDCWD, path, (path, buffer))
STAT(stat64, stat64, (const char *path, struct stat64 *buffer), AT_FDCWD, path, (path, buffer))
STAT(lstat64, stat64, (const char *path, struct stat64 *buffer), AT_FDCWD, path, (path, buffer))
STAT(fstatat, stat, (int folder, const char *path, struct stat *buffer, int flags), folder, path,
     (folder, path, buffer, flags))
STAT(fstatat64, stat64, (int folder, const char *path, struct stat64 *buffer, int flags), folder, path,
     (folder, path, buffer, flags))

#define READ(name, type)                                                                                               \
    struct type *name(DIR *stream) {                                                                                   \
        struct type *(*real)(DIR *) = dlsym(RTLD_NEXT, #name);                                                         \
        struct type *entry;                                                                                            \
        while ((entry = real(stream)) && is_late(dirfd(stream), entry->d_name)) {                                      \
            refuse(entry->d_name);                                                                                     \
            errno = 0; /* which is how the end of a folder differs from an error */                                    \
        }                                                                                                              \
        return entry;                                                                                                  \
    }
READ(readdir, dirent)
READ(readdir64, dirent64)
