/*
 * How long the driver's calls for memory take beside processes that keep the GPU busy, and how long
 * those are held up meanwhile.
 *
 *     tests/gpu/with-mps build/tests/bench_mapping [--busy 2] [--repeat 20] [--mb 64] [--us 50]
 *                                                [--seconds 10]
 *
 * Each of the busy processes has kernels back to back that fill the GPU, as long as --us each. A
 * maker takes memory as the daemon does, and a third process maps it as a worker does: first with
 * nobody busy, then beside the busy ones; then the first of the busy ones does so itself, in a
 * thread beside the one that launches. Each of the three ends after --seconds or --repeat. The last
 * lines have the time from one kernel's end to the next one's in a busy process.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REPEATS_MOST 1000u
#define BUSY_MOST 8u
#define AHEAD 4u /* kernels that are queued */

/* spin(us): every thread waits `us` microseconds. touch(at): one thread writes a word. */
static const char kernels[] = ".version 7.0\n.target sm_80\n.address_size 64\n"
                              ".visible .entry spin(.param .u32 us)\n"
                              "{\n.reg .u64 %t<4>;\n.reg .u32 %r<2>;\n.reg .pred %p;\n"
                              "ld.param.u32 %r0, [us];\nmul.wide.u32 %t2, %r0, 1000;\n"
                              "mov.u64 %t0, %globaltimer;\n"
                              "again:\nmov.u64 %t1, %globaltimer;\nsub.u64 %t3, %t1, %t0;\n"
                              "setp.lt.u64 %p, %t3, %t2;\n@%p bra again;\nret;\n}\n"
                              ".visible .entry touch(.param .u64 at)\n"
                              "{\n.reg .u64 %a;\n.reg .u32 %v;\n"
                              "ld.param.u64 %a, [at];\nmov.u32 %v, 7;\n"
                              "st.global.u32 [%a], %v;\nret;\n}\n";

enum {
    CREATE,
    MAP,
    ACCESS,
    ZERO,
    EXPORT,
    IMPORT,
    MAP_IMPORTED,
    ACCESS_IMPORTED,
    TOUCH,
    UNMAP,
    RELEASE,
    ALLOC,
    FREE,
    PIN,
    UNPIN,
    LAUNCH,
    COPY,
    CALLS
};
static const char *const call_names[CALLS] = {[CREATE] = "cuMemCreate",
                                              [MAP] = "cuMemMap",
                                              [ACCESS] = "cuMemSetAccess",
                                              [ZERO] = "memset and wait",
                                              [EXPORT] = "export",
                                              [IMPORT] = "import",
                                              [MAP_IMPORTED] = "cuMemMap of an import",
                                              [ACCESS_IMPORTED] = "cuMemSetAccess of it",
                                              [TOUCH] = "first kernel there and wait",
                                              [UNMAP] = "cuMemUnmap",
                                              [RELEASE] = "cuMemRelease",
                                              [ALLOC] = "cuMemAlloc",
                                              [FREE] = "cuMemFree",
                                              [PIN] = "cuMemHostRegister 2 MiB",
                                              [UNPIN] = "cuMemHostUnregister",
                                              [LAUNCH] = "a kernel and wait",
                                              [COPY] = "copy of 4 KiB and wait"};

enum { GO = 1, LAST }; /* what processes say to each other */

/* What all processes see. */
typedef struct shared {
    atomic_uint ready, spinning, stop, gaps_on;
    struct {
        atomic_uint count;
        uint32_t us[1u << 16];
    } gaps[BUSY_MOST];
    uint32_t counts[CALLS];
    double ms[CALLS][REPEATS_MOST];
} shared;

static shared *all;
static size_t bytes = (size_t)64 << 20;
static unsigned busy = 2, repeats = 20, kernel_us = 50, seconds = 10;
static int makers_end, workers_end; /* of the pair of sockets between them */

#define OK(call) check((call), #call)
static void check(CUresult error, const char *what)
{
    const char *name = "?";
    if (error == CUDA_SUCCESS)
        return;
    (void)cuGetErrorName(error, &name);
    fprintf(stderr, "%s: %s\n", what, name);
    _exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Times a call. */
#define TIMED(which, call)                                                                         \
    do {                                                                                           \
        const uint64_t began_ns = now_ns();                                                        \
        OK(call);                                                                                  \
        note(which, began_ns);                                                                     \
    } while (0)

static void note(int call, uint64_t began_ns)
{
    if (all->counts[call] < REPEATS_MOST)
        all->ms[call][all->counts[call]++] = (double)(now_ns() - began_ns) / 1e6;
}

typedef struct gpu {
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction spin, touch;
    CUstream stream;
    int processors;
} gpu;

static gpu start(void)
{
    gpu g;
    OK(cuInit(0));
    OK(cuDeviceGet(&g.device, 0));
    OK(cuDevicePrimaryCtxRetain(&g.context, g.device));
    OK(cuCtxSetCurrent(g.context));
    OK(cuDeviceGetAttribute(&g.processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, g.device));
    OK(cuModuleLoadData(&g.module, kernels));
    OK(cuModuleGetFunction(&g.spin, g.module, "spin"));
    OK(cuModuleGetFunction(&g.touch, g.module, "touch"));
    OK(cuStreamCreate(&g.stream, CU_STREAM_NON_BLOCKING));
    return g;
}

static CUmemAllocationProp device_memory(const gpu *g)
{
    return (CUmemAllocationProp){
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = g->device}};
}

static CUmemAccessDesc read_write(const gpu *g)
{
    return (CUmemAccessDesc){.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = g->device},
                             .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
}

/* ---- descriptors from process to process ---- */

static void send_fd(int socket, int fd)
{
    char byte = 0;
    struct iovec data = {&byte, 1};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof fd),
                            .cmsg_level = SOL_SOCKET,
                            .cmsg_type = SCM_RIGHTS}};
    struct msghdr m = {.msg_iov = &data,
                       .msg_iovlen = 1,
                       .msg_control = &control,
                       .msg_controllen = sizeof control};
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    if (sendmsg(socket, &m, 0) != 1)
        _exit(1);
}

/* -1: no more comes. */
static int receive_fd(int socket)
{
    char byte;
    int fd = -1;
    struct iovec data = {&byte, 1};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr m = {.msg_iov = &data,
                       .msg_iovlen = 1,
                       .msg_control = &control,
                       .msg_controllen = sizeof control};
    if (recvmsg(socket, &m, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&m) != NULL)
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
    return fd;
}

/* ---- the daemon's part ---- */

/* Makes memory, and keeps it until the other process has mapped it. */
static void make(const gpu *g, CUdeviceptr base, int socket)
{
    const CUmemAllocationProp prop = device_memory(g);
    const CUmemAccessDesc access = read_write(g);
    char done;
    for (unsigned i = 0; i < repeats; i++) {
        const CUdeviceptr at = base + i * bytes;
        CUmemGenericAllocationHandle handle;
        int fd = -1;
        TIMED(CREATE, cuMemCreate(&handle, bytes, &prop, 0));
        TIMED(MAP, cuMemMap(at, bytes, 0, handle, 0));
        TIMED(ACCESS, cuMemSetAccess(at, bytes, &access, 1));
        const uint64_t began_ns = now_ns();
        OK(cuMemsetD8Async(at, 0, bytes, g->stream));
        OK(cuStreamSynchronize(g->stream));
        note(ZERO, began_ns);
        TIMED(EXPORT, cuMemExportToShareableHandle(&fd, handle,
                                                   CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
        send_fd(socket, fd);
        close(fd);
        if (read(socket, &done, 1) != 1)
            _exit(1);
        OK(cuMemUnmap(at, bytes));
        OK(cuMemRelease(handle));
        if (done == LAST)
            break;
    }
}

static void maker(void)
{
    const int socket = makers_end;
    gpu g = start();
    CUdeviceptr base;
    char go;
    OK(cuMemAddressReserve(&base, bytes * repeats, 0, 0, 0));
    atomic_fetch_add(&all->ready, 1);
    while (read(socket, &go, 1) == 1)
        make(&g, base, socket);
    _exit(0);
}

/* ---- a worker's ---- */

static void worker(const gpu *g)
{
    const int socket = workers_end;
    const CUmemAccessDesc access = read_write(g);
    CUdeviceptr base;
    CUstream stream;
    char go = GO;
    uint64_t until_ns = now_ns() + seconds * 500000000ull;
    OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(cuMemAddressReserve(&base, bytes * repeats, 0, 0, 0));
    if (write(socket, &go, 1) != 1)
        _exit(1);
    for (unsigned i = 0; i < repeats && go == GO; i++) {
        CUdeviceptr at = base + i * bytes;
        CUmemGenericAllocationHandle handle;
        int fd = receive_fd(socket);
        TIMED(IMPORT, cuMemImportFromShareableHandle(&handle, (void *)(intptr_t)fd,
                                                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
        close(fd);
        TIMED(MAP_IMPORTED, cuMemMap(at, bytes, 0, handle, 0));
        TIMED(ACCESS_IMPORTED, cuMemSetAccess(at, bytes, &access, 1));
        void *arguments[] = {&at};
        const uint64_t began_ns = now_ns();
        OK(cuLaunchKernel(g->touch, 1, 1, 1, 1, 1, 1, 0, stream, arguments, NULL));
        OK(cuStreamSynchronize(stream));
        note(TOUCH, began_ns);
        TIMED(UNMAP, cuMemUnmap(at, bytes));
        TIMED(RELEASE, cuMemRelease(handle));
        go = i + 1 == repeats || now_ns() > until_ns ? LAST : GO;
        if (write(socket, &go, 1) != 1)
            _exit(1);
    }
    void *host = mmap(NULL, 2u << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(host, 1, 2u << 20);
    CUdeviceptr word;
    OK(cuMemAlloc(&word, 4096));
    until_ns = now_ns() + seconds * 500000000ull;
    for (unsigned i = 0; i < repeats && now_ns() < until_ns; i++) {
        CUdeviceptr memory;
        TIMED(ALLOC, cuMemAlloc(&memory, bytes));
        TIMED(FREE, cuMemFree(memory));
        TIMED(PIN, cuMemHostRegister(host, 2u << 20, CU_MEMHOSTREGISTER_DEVICEMAP));
        TIMED(UNPIN, cuMemHostUnregister(host));
        void *arguments[] = {&word};
        uint64_t began_ns = now_ns();
        OK(cuLaunchKernel(g->touch, 1, 1, 1, 1, 1, 1, 0, stream, arguments, NULL));
        OK(cuStreamSynchronize(stream));
        note(LAUNCH, began_ns);
        began_ns = now_ns();
        OK(cuMemcpyHtoDAsync(word, host, 4096, stream));
        OK(cuStreamSynchronize(stream));
        note(COPY, began_ns);
    }
    OK(cuMemFree(word));
    OK(cuMemAddressFree(base, bytes * repeats));
    munmap(host, 2u << 20);
}

/* ---- who keeps the GPU busy ---- */

typedef struct beside {
    const gpu *g;
    atomic_uint done;
} beside;

static void *beside_main(void *arg)
{
    beside *b = arg;
    OK(cuCtxSetCurrent(b->g->context));
    worker(b->g);
    atomic_store(&b->done, 1);
    return NULL;
}

static void spin(const gpu *g, CUstream stream)
{
    void *arguments[] = {&kernel_us};
    OK(cuLaunchKernel(g->spin, (unsigned)g->processors * 4, 1, 1, 512, 1, 1, 0, stream, arguments,
                      NULL));
}

/* `socket`: where it is told to be a worker, too; -1: it isn't. */
static void busy_main(unsigned number, int socket)
{
    gpu g = start();
    CUevent ends[AHEAD];
    pthread_t thread;
    beside b = {.g = &g};
    bool working = false;
    char go;
    for (unsigned i = 0; i < AHEAD; i++)
        OK(cuEventCreate(&ends[i], CU_EVENT_DISABLE_TIMING));
    atomic_fetch_add(&all->ready, 1);
    while (atomic_load(&all->spinning) == 0)
        usleep(1000);
    for (unsigned i = 0; i < AHEAD; i++) {
        spin(&g, g.stream);
        OK(cuEventRecord(ends[i], g.stream));
    }
    uint64_t last_ns = now_ns();
    for (unsigned i = 0; atomic_load(&all->stop) == 0; i++) {
        OK(cuEventSynchronize(ends[i % AHEAD]));
        const uint64_t end_ns = now_ns();
        const unsigned n = atomic_load(&all->gaps[number].count);
        if (atomic_load(&all->gaps_on) && n < 1u << 16) {
            all->gaps[number].us[n] = (uint32_t)((end_ns - last_ns) / 1000);
            atomic_store(&all->gaps[number].count, n + 1);
        }
        last_ns = end_ns;
        spin(&g, g.stream);
        OK(cuEventRecord(ends[i % AHEAD], g.stream));
        if (socket >= 0 && !working && recv(socket, &go, 1, MSG_DONTWAIT) == 1) {
            working = true;
            if (pthread_create(&thread, NULL, beside_main, &b) != 0)
                _exit(1);
        }
        if (working && atomic_load(&b.done) == 1) {
            pthread_join(thread, NULL);
            atomic_store(&b.done, 0);
            working = false;
            if (write(socket, &go, 1) != 1)
                _exit(1);
        }
    }
    _exit(0);
}

/* ---- the table ---- */

static int by_ms(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int by_us(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void print_calls(const char *title)
{
    printf("\n%s\n%-30s %9s %9s %9s\n", title, "", "p50 ms", "p99", "max");
    for (int i = 0; i < CALLS; i++) {
        const uint32_t n = all->counts[i];
        if (n == 0)
            continue;
        qsort(all->ms[i], n, sizeof all->ms[i][0], by_ms);
        printf("%-30s %9.3f %9.3f %9.3f\n", call_names[i], all->ms[i][n / 2],
               all->ms[i][(size_t)n * 99 / 100], all->ms[i][n - 1]);
        all->counts[i] = 0;
    }
    for (unsigned i = 0; i < busy; i++) {
        const uint32_t n = atomic_load(&all->gaps[i].count);
        uint32_t *us = all->gaps[i].us;
        const size_t p50 = n / 2, p99 = (size_t)n * 99 / 100;
        if (n == 0)
            continue;
        qsort(us, n, sizeof *us, by_us);
        printf("busy %u: from end to end        %9.3f %9.3f %9.3f  (%u kernels of %u us)\n", i,
               us[p50] / 1e3, us[p99] / 1e3, us[n - 1] / 1e3, n, kernel_us);
        atomic_store(&all->gaps[i].count, 0);
    }
    fflush(stdout);
}

static pid_t fork_one(void)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0)
        exit(1);
    if (pid == 0)
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    return pid;
}

static void measure(const char *title, int ask)
{
    char go = 1;
    const uint64_t began_ns = now_ns();
    atomic_store(&all->gaps_on, 1);
    if (write(ask, &go, 1) != 1 || read(ask, &go, 1) != 1)
        exit(1);
    atomic_store(&all->gaps_on, 0);
    usleep(50000);
    char all_of_it[120];
    snprintf(all_of_it, sizeof all_of_it, "%s: %.2f s", title, (double)(now_ns() - began_ns) / 1e9);
    print_calls(all_of_it);
}

int main(int argc, char **argv)
{
    for (int i = 1; i + 1 < argc; i += 2) {
        const unsigned n = (unsigned)strtoul(argv[i + 1], NULL, 10);
        if (strcmp(argv[i], "--busy") == 0 && n >= 1 && n <= BUSY_MOST)
            busy = n;
        else if (strcmp(argv[i], "--repeat") == 0 && n >= 1 && n <= REPEATS_MOST)
            repeats = n;
        else if (strcmp(argv[i], "--mb") == 0 && n >= 2)
            bytes = (size_t)n << 20;
        else if (strcmp(argv[i], "--us") == 0 && n >= 1)
            kernel_us = n;
        else if (strcmp(argv[i], "--seconds") == 0 && n >= 1)
            seconds = n;
        else
            return fprintf(stderr, "%s %s: see the top of bench_mapping.c\n", argv[i], argv[i + 1]);
    }
    all = mmap(NULL, sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    /* maker and worker; who asks and the worker, whether a third process or a busy one. */
    int fds[2], asks[2], busy_asks[2];
    if (all == MAP_FAILED || socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0 ||
        socketpair(AF_UNIX, SOCK_STREAM, 0, asks) != 0 ||
        socketpair(AF_UNIX, SOCK_STREAM, 0, busy_asks) != 0)
        return 1;
    makers_end = fds[0];
    workers_end = fds[1];
    if (fork_one() == 0)
        maker();
    pid_t pids[BUSY_MOST];
    for (unsigned i = 0; i < busy; i++)
        if ((pids[i] = fork_one()) == 0)
            busy_main(i, i == 0 ? busy_asks[1] : -1);
    if (fork_one() == 0) {
        gpu g = start();
        char go;
        atomic_fetch_add(&all->ready, 1);
        while (read(asks[1], &go, 1) == 1) {
            worker(&g);
            if (write(asks[1], &go, 1) != 1)
                break;
        }
        _exit(0);
    }
    const uint64_t began_ns = now_ns();
    while (atomic_load(&all->ready) < busy + 2)
        if (now_ns() - began_ns > 60000000000u || waitpid(-1, NULL, WNOHANG) > 0)
            return fprintf(stderr, "a process has failed\n");
        else
            usleep(1000);
    printf("%s MPS, %zu MiB at once, %u repeats\n",
           getenv("CUDA_MPS_PIPE_DIRECTORY") != NULL ? "with" : "without", bytes >> 20, repeats);
    measure("nobody busy", asks[0]);
    atomic_store(&all->spinning, 1);
    usleep(200000);
    char title[80];
    snprintf(title, sizeof title, "a process beside %u that never pause", busy);
    measure(title, asks[0]);
    measure("in one of those", busy_asks[0]);
    atomic_store(&all->stop, 1);
    for (unsigned i = 0; i < busy; i++)
        (void)waitpid(pids[i], NULL, 0);
    return 0; /* the others end with this one */
}
