/* A build without CUDA: there is no device, and whoever asks is told. */
#include "gpu.h"

#include <stdio.h>
#include <unistd.h>

uint32_t ts_gpu_count(char *why, size_t why_bytes)
{
    snprintf(why, why_bytes, "built without CUDA");
    return 0;
}

ts_status ts_gpu_open(uint32_t ordinal, ts_gpu **out, char *why, size_t why_bytes)
{
    *out = NULL;
    snprintf(why, why_bytes, "cuda:%u can't be used: built without CUDA", ordinal);
    return TS_EDEVICE;
}

/* Nothing below is reached: no ts_gpu exists. */

ts_status ts_gpu_read(ts_gpu *gpu, const void *device, size_t bytes, void *host, char *why,
                      size_t why_bytes)
{
    (void)device;
    (void)bytes;
    (void)host;
    return ts_gpu_health(gpu, why, why_bytes);
}

ts_status ts_gpu_load(ts_gpu *gpu, const ts_geometry *geometry, char *why, size_t why_bytes)
{
    (void)geometry;
    return ts_gpu_health(gpu, why, why_bytes);
}

void ts_gpu_close(ts_gpu *gpu)
{
    (void)gpu;
}

const ts_gpu_info *ts_gpu_get_info(const ts_gpu *gpu)
{
    (void)gpu;
    return NULL;
}

ts_status ts_gpu_free_bytes(ts_gpu *gpu, uint64_t *bytes, char *why, size_t why_bytes)
{
    *bytes = 0;
    return ts_gpu_health(gpu, why, why_bytes);
}

ts_status ts_gpu_health(ts_gpu *gpu, char *why, size_t why_bytes)
{
    (void)gpu;
    (void)ts_gpu_count(why, why_bytes);
    return TS_EDEVICE;
}

ts_status ts_memory_cuda_vmm_new(ts_gpu *gpu, uint32_t num_slabs, size_t slab_bytes,
                                 ts_memory **out, char *why, size_t why_bytes)
{
    (void)num_slabs;
    (void)slab_bytes;
    *out = NULL;
    return ts_gpu_health(gpu, why, why_bytes);
}

ts_status ts_memory_cuda_ipc_new(ts_gpu *gpu, size_t bytes, ts_memory **out, char *why,
                                 size_t why_bytes)
{
    (void)bytes;
    *out = NULL;
    return ts_gpu_health(gpu, why, why_bytes);
}

ts_status ts_gpu_shared_new(ts_gpu *gpu, bool vmm, size_t bytes, uint64_t *held, ts_gpu_shared *out,
                            char *why, size_t why_bytes)
{
    (void)vmm;
    (void)bytes;
    (void)held;
    (void)out;
    return ts_gpu_health(gpu, why, why_bytes);
}

ts_status ts_gpu_shared_adopt(ts_gpu *gpu, int fd, size_t bytes, uint64_t *held, ts_gpu_shared *out,
                              char *why, size_t why_bytes)
{
    (void)bytes;
    (void)held;
    (void)out;
    close(fd);
    return ts_gpu_health(gpu, why, why_bytes);
}

ts_status ts_gpu_shared_import(ts_gpu *gpu, const uint8_t handle[TS_IPC_HANDLE_BYTES],
                               uint64_t offset, size_t bytes, ts_gpu_shared *out, char *why,
                               size_t why_bytes)
{
    (void)handle;
    (void)offset;
    (void)bytes;
    (void)out;
    return ts_gpu_health(gpu, why, why_bytes);
}

void ts_gpu_shared_free(ts_gpu_shared *shared)
{
    (void)shared;
}

ts_status ts_gpu_pin(ts_gpu *gpu, void *host, size_t bytes, void **device, char *why,
                     size_t why_bytes)
{
    (void)host;
    (void)bytes;
    *device = NULL;
    return ts_gpu_health(gpu, why, why_bytes);
}

void ts_gpu_unpin_unmap(ts_gpu *gpu, void *host, size_t bytes)
{
    (void)gpu;
    (void)host;
    (void)bytes;
}

ts_gpu_launch *ts_gpu_launch_take(ts_gpu *gpu, ts_gpu_position *position)
{
    (void)gpu;
    (void)position;
    return NULL;
}

bool ts_gpu_may_wait(ts_gpu *gpu)
{
    (void)gpu;
    return false;
}

ts_status ts_gpu_launch_wait(ts_gpu_launch *launch, const uint32_t *word, uint32_t value)
{
    (void)launch;
    (void)word;
    (void)value;
    return TS_EDEVICE;
}

ts_status ts_gpu_launch_signal(ts_gpu_launch *launch, const ts_gpu_signal *signals, uint32_t count)
{
    (void)launch;
    (void)signals;
    (void)count;
    return TS_EDEVICE;
}

ts_status ts_gpu_plan_new(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                          ts_dtype io_dtype, ts_kernel kernel, const ts_attention_seq *seqs,
                          uint32_t num_seqs, ts_gpu_plan **out, char *why, size_t why_bytes)
{
    (void)geometry;
    (void)heads;
    (void)io_dtype;
    (void)kernel;
    (void)seqs;
    (void)num_seqs;
    *out = NULL;
    return ts_gpu_health(gpu, why, why_bytes);
}

void ts_gpu_expect_company(ts_gpu *gpu, uint32_t sessions)
{
    (void)gpu;
    (void)sessions;
}

ts_status ts_gpu_plan_renew(ts_gpu *gpu, const ts_geometry *geometry, uint32_t heads,
                            ts_dtype io_dtype, ts_kernel kernel, const ts_attention_seq *seqs,
                            uint32_t num_seqs, ts_gpu_plan **plan, char *why, size_t why_bytes)
{
    return ts_gpu_plan_new(gpu, geometry, heads, io_dtype, kernel, seqs, num_seqs, plan, why,
                           why_bytes);
}

void ts_gpu_plan_free(ts_gpu_plan *plan)
{
    (void)plan;
}

ts_status ts_gpu_launch_attend(ts_gpu_launch *launch, unsigned char *base,
                               const ts_attention_variant *variant, const ts_gpu_run *runs,
                               uint32_t num_runs)
{
    (void)launch;
    (void)base;
    (void)variant;
    (void)runs;
    (void)num_runs;
    return TS_EDEVICE;
}

ts_status ts_gpu_launch_copies(ts_gpu_launch *launch, unsigned char *base, size_t block_bytes,
                               const ts_block_copy *copies, uint32_t num_copies)
{
    (void)launch;
    (void)base;
    (void)block_bytes;
    (void)copies;
    (void)num_copies;
    return TS_EDEVICE;
}

ts_status ts_gpu_launch_finish(ts_gpu_launch *launch,
                               void (*done)(void *arg, ts_status status, const char *why),
                               void *arg)
{
    (void)launch;
    (void)done;
    (void)arg;
    return TS_EDEVICE;
}

void *ts_gpu_launch_stream(ts_gpu_launch *launch)
{
    (void)launch;
    return NULL;
}

const char *ts_gpu_launch_why(const ts_gpu_launch *launch)
{
    (void)launch;
    return "built without CUDA";
}
