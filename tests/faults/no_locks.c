/* Every call that locks a file fails with ENOSYS, as on Lustre without flock; each is noted in $LOCK_LOG. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static int refuse(const char *name) {
    FILE *log = fopen(getenv("LOCK_LOG"), "a");
    if (log) {
        fprintf(log, "%s\n", name);
        fclose(log);
    }
    errno = ENOSYS;
    return -1;
}

int flock(int fd, int operation) { return refuse("flock"); }
int lockf(int fd, int command, off_t length) { return refuse("lockf"); }
int lockf64(int fd, int command, off64_t length) { return refuse("lockf"); }

static int locks(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}

#define WRAP(name)                                                                                                     \
    int name(int fd, int command, ...) {                                                                               \
        va_list list;                                                                                                  \
        va_start(list, command);                                                                                       \
        void *argument = va_arg(list, void *);                                                                         \
        va_end(list);                                                                                                  \
        if (locks(command))                                                                                            \
            return refuse(#name);                                                                                      \
        int (*real)(int, int, ...) = dlsym(RTLD_NEXT, #name);                                                          \
        return real(fd, command, argument);                                                                            \
    }
WRAP(fcntl)
WRAP(fcntl64)
