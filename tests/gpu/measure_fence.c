/*
 * How long after a process's death its kernels and streams still write (daemon/README.md, "How
 * nothing is lost", needs to know): a process with a kernel under way and a stream that waits for
 * words is killed by SIGKILL, and its parent looks at what is written afterwards, until nothing is
 * any more. Run it with tests/gpu/with-mps and without.
 *
 *   measure_fence [DEATHS [KERNEL_MS]]
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WATCH_MS 3000.0
#define WORDS 200u /* that the stream answers */

/* What both processes see. */
typedef struct page {
    uint32_t ready;
    uint32_t pad0[31];
    uint32_t ticks; /* the kernel counts them up as long as it runs */
    uint32_t pad1[31];
    uint32_t asked; /* the stream waits for it, */
    uint32_t pad2[31];
    uint32_t answered; /* ... and writes this */
    uint32_t pad3[31];
} page;

/* Counts up a word until `ns` nanoseconds have passed. */
static const char kernel_text[] = ".version 7.0\n.target sm_70\n.address_size 64\n"
                                  ".visible .entry tick(.param .u64 word, .param .u64 ns)\n{\n"
                                  ".reg .u64 %w, %n, %t0, %t;\n.reg .u32 %c;\n.reg .pred %p;\n"
                                  "ld.param.u64 %w, [word];\nld.param.u64 %n, [ns];\n"
                                  "mov.u64 %t0, %globaltimer;\nmov.u32 %c, 0;\n"
                                  "again:\nadd.u32 %c, %c, 1;\nst.volatile.global.u32 [%w], %c;\n"
                                  "mov.u64 %t, %globaltimer;\nsub.u64 %t, %t, %t0;\n"
                                  "setp.lt.u64 %p, %t, %n;\n@%p bra again;\nret;\n}\n";

static void need(CUresult result, const char *what)
{
    const char *name = "?";
    if (result == CUDA_SUCCESS)
        return;
    cuGetErrorName(result, &name);
    fprintf(stderr, "%s: %s\n", what, name);
    _exit(1);
}

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* The process that is killed. */
static void work(page *p, uint64_t kernel_ns)
{
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction tick;
    CUstream streams[2];
    CUdeviceptr there;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    need(cuInit(0), "cuInit");
    need(cuDeviceGet(&device, 0), "cuDeviceGet");
    need(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    need(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    need(cuModuleLoadData(&module, kernel_text), "cuModuleLoadData");
    need(cuModuleGetFunction(&tick, module, "tick"), "cuModuleGetFunction");
    need(cuMemHostRegister(p, 4096, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP),
         "cuMemHostRegister");
    need(cuMemHostGetDevicePointer(&there, p, 0), "cuMemHostGetDevicePointer");
    for (int i = 0; i < 2; i++)
        need(cuStreamCreate(&streams[i], CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    CUdeviceptr word = there + offsetof(page, ticks);
    void *arguments[] = {&word, &kernel_ns};
    need(cuLaunchKernel(tick, 1, 1, 1, 1, 1, 1, 0, streams[0], arguments, NULL), "cuLaunchKernel");
    for (uint32_t i = 1; i <= WORDS; i++) {
        need(cuStreamWaitValue32(streams[1], there + offsetof(page, asked), i,
                                 CU_STREAM_WAIT_VALUE_GEQ),
             "cuStreamWaitValue32");
        need(cuStreamWriteValue32(streams[1], there + offsetof(page, answered), i, 0),
             "cuStreamWriteValue32");
    }
    while (__atomic_load_n(&p->ticks, __ATOMIC_ACQUIRE) == 0)
        ;
    __atomic_store_n(&p->ready, 1, __ATOMIC_RELEASE);
    for (;;)
        pause();
}

/* One death. Times are since SIGKILL was sent. */
static void die(page *p, double kernel_ms)
{
    *p = (page){0};
    const pid_t child = fork();
    if (child == 0)
        work(p, (uint64_t)(kernel_ms * 1e6));
    int status;
    while (__atomic_load_n(&p->ready, __ATOMIC_ACQUIRE) == 0)
        if (waitpid(child, &status, WNOHANG) == child)
            exit(1);
    __atomic_store_n(&p->asked, 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(&p->answered, __ATOMIC_ACQUIRE) != 1)
        ;
    const double began = now_ms();
    double reaped = 0, ticked = 0, answered = 0, asked = 0;
    uint32_t ticks = p->ticks, answers = 1;
    kill(child, SIGKILL);
    double now = 0;
    while (now < WATCH_MS) {
        if (reaped == 0 && waitpid(child, &status, WNOHANG) == child)
            reaped = now_ms() - began;
        const uint32_t t = __atomic_load_n(&p->ticks, __ATOMIC_ACQUIRE);
        const uint32_t a = __atomic_load_n(&p->answered, __ATOMIC_ACQUIRE);
        if (t != ticks)
            ticked = now;
        if (a != answers)
            answered = now;
        ticks = t;
        answers = a;
        if (now - asked >= 5 && p->asked < WORDS) { /* the stream is asked each 5 ms */
            asked = now;
            __atomic_store_n(&p->asked, p->asked + 1, __ATOMIC_RELEASE);
        }
    }
    printf("kernel of %.0f ms: reaped after %.1f ms, kernel's last write %.1f, stream's last "
           "write %.1f (%u of %u asked)\n",
           kernel_ms, reaped, ticked, answered, answers, p->asked);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    const int deaths = argc > 1 ? atoi(argv[1]) : 5;
    const double kernel_ms = argc > 2 ? atof(argv[2]) : 500;
    page *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || deaths < 1 || !(kernel_ms > 0)) {
        fprintf(stderr, "measure_fence [DEATHS [KERNEL_MS]]\n");
        return 2;
    }
    for (int i = 0; i < deaths; i++)
        die(p, kernel_ms);
    return 0;
}
