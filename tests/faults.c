/* A library for LD_PRELOAD that stops a process, or lets its disk be full, at the n-th change to a folder.

   FAULT_DIR   the folder, an absolute path without links
   FAULT_AT    n, counted from 1; 0 never
   FAULT_MODE  "kill": die of SIGKILL before the change; "half": likewise, but half of a write is written;
               "full": the change fails with ENOSPC, as do all later ones that need room; later renames need none
   FAULT_LOG   a file that each change is appended to, as a line "<change> <path>"

   Changes are files opened for writing, writes, flushes, renames, new folders and deletions. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int changes;

static int is_mode(const char *name) { return !strcmp(getenv("FAULT_MODE"), name); }

static void append_to_log(const char *change, const char *path) {
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%s %s\n", change, path);
    int log = (int)syscall(SYS_openat, AT_FDCWD, getenv("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    syscall(SYS_write, log, line, length);
    syscall(SYS_close, log);
}

/* 0 to go on, 1 where half a write is due, -1 with errno where the disk is full. */
static int change(const char *what, const char *path, int needs_room) {
    const char *folder = getenv("FAULT_DIR");
    if (!folder || strncmp(path, folder, strlen(folder))) return 0;
    int at = atoi(getenv("FAULT_AT"));
    append_to_log(what, path);
    changes++;
    if (is_mode("full")) {
        if (!at || changes < at || !needs_room || (changes > at && !strcmp(what, "rename"))) return 0;
        errno = ENOSPC;
        return -1;
    }
    if (changes != at) return 0;
    if (is_mode("half") && !strcmp(what, "write")) return 1;
    raise(SIGKILL);
    return 0;
}

static int change_at(const char *what, int directory, const char *name, int needs_room) {
    char link[64], path[PATH_MAX];
    if (name[0] == '/' || directory == AT_FDCWD) return change(what, name, needs_room);
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (name[0]) {
        strncat(path, "/", sizeof path - strlen(path) - 1);
        strncat(path, name, sizeof path - strlen(path) - 1);
    }
    return change(what, path, needs_room);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int open_file(int (*real)(const char *, int, ...), const char *path, int flags, int mode) {
    if (flags & (O_WRONLY | O_RDWR | O_CREAT) && change("open", path, 1)) return -1;
    return real(path, flags, mode);
}

#define OPEN(name)                                    \
    int name(const char *path, int flags, ...) {      \
        va_list arguments;                            \
        va_start(arguments, flags);                   \
        int mode = va_arg(arguments, int);            \
        va_end(arguments);                            \
        return open_file(REAL(name), path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int file, const void *bytes, size_t size) {
    int fault = change_at("write", file, "", 1);
    if (fault < 0) return -1;
    if (fault > 0) {
        REAL(write)(file, bytes, size / 2);
        raise(SIGKILL);
    }
    return REAL(write)(file, bytes, size);
}

int fsync(int file) { return change_at("fsync", file, "", 1) ? -1 : REAL(fsync)(file); }
int rename(const char *from, const char *to) { return change("rename", to, 1) ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return change("mkdir", path, 1) ? -1 : REAL(mkdir)(path, mode); }
int rmdir(const char *path) { return change("rmdir", path, 0) ? -1 : REAL(rmdir)(path); }
int unlink(const char *path) { return change("unlink", path, 0) ? -1 : REAL(unlink)(path); }
int unlinkat(int directory, const char *name, int flags) {
    return change_at("unlink", directory, name, 0) ? -1 : REAL(unlinkat)(directory, name, flags);
}
