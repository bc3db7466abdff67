/* Preloaded into a process that converts (tests/end_to_end/faults.py): counts the system calls that change
 * what lies below a folder, and at a chosen one fails, kills the process, or calls the disk full. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum mode { OFF, COUNT, ONCE, FULL, KILL };

static char folder[4096];
static atomic_int mode = OFF;
static atomic_long calls, wanted;
static int trace_fd = -1;

/* Watch what lies below `below`; act at call number `at`, from 1. With `trace` >= 0, lines go there. */
void faults_arm(int how, long at, const char *below, int trace) {
  snprintf(folder, sizeof folder, "%s", below);
  calls = 0;
  wanted = at;
  trace_fd = trace;
  mode = how;
}

long faults_calls(void) { return calls; }

static int named(const char *path) {
  /* A relative path is one of a folder that is open: shutil.rmtree. */
  return path[0] != '/' || strncmp(path, folder, strlen(folder)) == 0;
}

static int opened(int fd, char *path, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, size - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strncmp(path, folder, strlen(folder)) == 0;
}

static void tell(const char *call, const char *path, const char *other) {
  char line[9000];
  if (trace_fd < 0) return;
  int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", call, path, other);
  syscall(SYS_write, trace_fd, line, (size_t)length);
}

/* Whether the call is to fail; `grows` are calls that need room on the disk. */
static int fails(const char *call, const char *path, const char *other, int grows) {
  if (mode == OFF) return 0;
  long number = ++calls;
  tell(call, path, other);
  if (mode == KILL && number == wanted) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  if (mode == ONCE && number == wanted) {
    errno = EIO;
    return 1;
  }
  if (mode == FULL && number >= wanted && grows) {
    errno = ENOSPC;
    return 1;
  }
  return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_FD(name, grows)                                                       \
  char path[4096];                                                               \
  if (mode != OFF && opened(fd, path, sizeof path) && fails(#name, path, "", grows)) return -1;
#define ON_PATH(name, path, other, grows)                                        \
  if (mode != OFF && named(path) && fails(#name, path, other, grows)) return -1;

ssize_t write(int fd, const void *data, size_t size) {
  ON_FD(write, 1)
  return REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  ON_FD(pwrite, 1)
  return REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  ON_FD(pwrite, 1)
  return REAL(pwrite64)(fd, data, size, at);
}
int ftruncate(int fd, off_t size) {
  ON_FD(ftruncate, 1)
  return REAL(ftruncate)(fd, size);
}
int ftruncate64(int fd, off64_t size) {
  ON_FD(ftruncate, 1)
  return REAL(ftruncate64)(fd, size);
}
int fsync(int fd) {
  ON_FD(fsync, 0)
  return REAL(fsync)(fd);
}
int fdatasync(int fd) {
  ON_FD(fsync, 0)
  return REAL(fdatasync)(fd);
}
int rename(const char *from, const char *to) {
  ON_PATH(rename, from, to, 0)
  return REAL(rename)(from, to);
}
int unlink(const char *path) {
  ON_PATH(unlink, path, "", 0)
  return REAL(unlink)(path);
}
int unlinkat(int at, const char *path, int flags) {
  ON_PATH(unlinkat, path, "", 0)
  return REAL(unlinkat)(at, path, flags);
}
int rmdir(const char *path) {
  ON_PATH(rmdir, path, "", 0)
  return REAL(rmdir)(path);
}
int mkdir(const char *path, mode_t bits) {
  ON_PATH(mkdir, path, "", 1)
  return REAL(mkdir)(path, bits);
}

static int creates(const char *path, int flags) {
  return mode != OFF && flags & O_CREAT && named(path) && access(path, F_OK) != 0 &&
         fails("create", path, "", 1);
}
#define MODE_OF(flags)                 \
  mode_t bits = 0;                     \
  if (flags & O_CREAT) {               \
    va_list more;                      \
    va_start(more, flags);             \
    bits = va_arg(more, mode_t);       \
    va_end(more);                      \
  }
int open(const char *path, int flags, ...) {
  MODE_OF(flags)
  return creates(path, flags) ? -1 : REAL(open)(path, flags, bits);
}
int open64(const char *path, int flags, ...) {
  MODE_OF(flags)
  return creates(path, flags) ? -1 : REAL(open64)(path, flags, bits);
}
