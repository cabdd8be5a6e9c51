// Preloaded into a test: the process kills itself before, within or after the k-th change of a file below a folder.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BEFORE, WITHIN, AFTER };

static char folder[PATH_MAX];
static atomic_int left = -1;  // changes until the end; negative: never
static int when = BEFORE;

void arm(const char *below, int count, int at) {
    snprintf(folder, sizeof folder, "%s", below);
    when = at;
    left = count;
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static int is_below(const char *path) {
    char full[PATH_MAX];
    if (left < 0) return 0;
    if (path[0] != '/') {
        if (getcwd(full, sizeof full) == NULL) return 0;
        strncat(full, "/", sizeof full - strlen(full) - 1);
        strncat(full, path, sizeof full - strlen(full) - 1);
        path = full;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int is_file_below(int fd) {
    char link[64], path[PATH_MAX];
    if (left < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return is_below(path);
}

// Whether this is the change at which to die.
static int is_last(int counts) { return counts && atomic_fetch_sub(&left, 1) == 1; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGE(counts, name, ...)                 \
    int last = is_last(counts);                   \
    if (last && when == BEFORE) die();            \
    __typeof__(name(__VA_ARGS__)) result = REAL(name)(__VA_ARGS__); \
    if (last) die();                              \
    return result;

ssize_t write(int fd, const void *data, size_t size) {
    int last = is_last(is_file_below(fd));
    if (last && when == BEFORE) die();
    ssize_t result = REAL(write)(fd, data, last && when == WITHIN ? (size + 1) / 2 : size);
    if (last) die();
    return result;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    int last = is_last(is_file_below(fd));
    if (last && when == BEFORE) die();
    ssize_t result = REAL(pwrite64)(fd, data, last && when == WITHIN ? (size + 1) / 2 : size, at);
    if (last) die();
    return result;
}
int fsync(int fd) { CHANGE(is_file_below(fd), fsync, fd) }
int fdatasync(int fd) { CHANGE(is_file_below(fd), fdatasync, fd) }
int ftruncate64(int fd, off64_t size) { CHANGE(is_file_below(fd), ftruncate64, fd, size) }
int rename(const char *from, const char *to) { CHANGE(is_below(from), rename, from, to) }
int unlink(const char *path) { CHANGE(is_below(path), unlink, path) }
int rmdir(const char *path) { CHANGE(is_below(path), rmdir, path) }
int mkdir(const char *path, mode_t mode) { CHANGE(is_below(path), mkdir, path, mode) }
int unlinkat(int fd, const char *path, int flags) { CHANGE(is_file_below(fd), unlinkat, fd, path, flags) }
int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    CHANGE((flags & O_CREAT) && is_below(path), open64, path, flags, mode)
}
