"""What a layer of a decode step costs through the daemon, or launched by the worker itself, over
the bare kernel: 32 layers, one after the other on the worker's CUDA stream, submitted ahead of the
GPU.

    tests/gpu/with-mps python3 tests/gpu/bench_step.py [--transport ring|messages]
                                                       [--exec local|graph]

graph: launched by the worker as one CUDA graph, captured in an earlier step of a frame. Bare
kernels are `tsbench attend`'s, in the same run: as many layers, blocks in order, and they write the
new tokens' K and V as a step's do. Every layer's result is checked first."""

import json
import statistics
import subprocess
import sys
import time

import common
import tinyserve
import torch

LAYERS, HEADS, KV, DIM, BLOCK = 32, 32, 8, 128, 16
SHAPES = {"1 x 8192, 32/8/128 bf16": (1, 8192), "1 x 32768, 32/8/128 bf16": (1, 32768),
          "256 x 1024, 32/8/128 bf16": (256, 1024)}


def bare(device, shape):
    tsbench = common.first(common.ROOT / "bin/tsbench", common.ROOT / "build/tools/tsbench")
    out = subprocess.run([tsbench, "attend", "--device", device, "--json", "--shape", shape,
                          "--append", "--layers", str(LAYERS), "--in-order"],
                         text=True, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(out)["rows"][0]["us"]


def timed(repeats, work):
    """Microseconds on the host, the median."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(times)


def measure(kv, count, tokens, repeats, graph):
    """Microseconds of a layer on the GPU when all are queued before it begins, and as it comes; of
    a layer's call, and of a begin and an abort, on the host."""
    seqs = kv.create(count)
    kv.append(seqs, [tokens - 1] * count)
    slots = [slot for s in seqs for slot in kv.slots(s, 0, tokens - 1)[::BLOCK]]
    for layer in range(LAYERS):
        _, values = (x.torch() for x in kv.layer(layer, slots))
        values[torch.tensor(slots, device="cuda") // BLOCK] = float(layer + 1)
    wait = torch.empty(8 << 30, dtype=torch.uint8, device="cuda")
    frame = kv.frame(count, heads=HEADS, io_dtype="bf16") if graph else None

    def begin():
        return (frame.step(seqs) if graph else
                kv.step(seqs, [1] * count, heads=HEADS, io_dtype="bf16"))

    ahead, plain, host = [], [], []
    with begin() as step:
        step.q.torch().normal_()
        step.k.torch().normal_()
        out, want = step.out.torch(), step.v.torch()
        outs = torch.empty(LAYERS, *out.shape, dtype=out.dtype, device="cuda")

        def layers():
            for layer in range(LAYERS):
                step.run(layer, stream=torch.cuda.current_stream())

        def checked():
            for layer in range(LAYERS):
                want.fill_(layer + 1)
                out.fill_(float("nan"))
                step.run(layer, stream=torch.cuda.current_stream())
                outs[layer].copy_(out)

        checked()
        call = layers
        if graph:
            for body in (checked, layers):
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    body()
                call = captured.replay
                if body is checked:
                    step.abort()
                    step = begin()
                    outs.fill_(float("nan"))
                    captured.replay()
                    torch.cuda.synchronize()
        for layer in range(LAYERS):
            assert ((outs[layer] - (layer + 1)).abs() < 1e-2 * (layer + 1)).all(), \
                f"layer {layer} is wrong"
        for i in range(repeats + 1):
            for queue, times in ((True, ahead), (False, plain)):
                if queue:
                    wait.fill_(i)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                begun = time.perf_counter()
                call()
                host.append((time.perf_counter() - begun) / LAYERS * 1e6)
                end.record()
                torch.cuda.synchronize()
                if i > 0:
                    times.append(start.elapsed_time(end) / LAYERS * 1e3)
        step.abort()
    opened = timed(repeats, lambda: begin().abort())
    if frame:
        frame.close()
    kv.free(seqs)
    return [statistics.median(x) for x in (ahead, plain, host)] + [opened]


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--transport", default="ring", choices=["ring", "messages"])
    parser.add_argument("--exec", default="daemon", choices=["daemon", "local", "graph"])
    options = parser.parse_args()
    kernels = {name: bare(options.device, name) for name in SHAPES}
    pool = (f"bench:layers={LAYERS},kv_heads={KV},head_dim={DIM},dtype=bf16,block_tokens={BLOCK},"
            f"memory=40G,client_write=all,device={options.device},provider={options.provider}")
    rows = []
    execution = "daemon" if options.exec == "daemon" else "local"
    with common.Daemon(pool) as daemon, \
            tinyserve.connect(daemon.url, transport=options.transport,
                              execution=execution) as client, \
            client.pool("bench", writable=True) as kv:
        client.exchange(kv, 64 << 20)
        for name, (count, tokens) in SHAPES.items():
            ahead, plain, host, opened = measure(kv, count, tokens, options.repeats,
                                                 options.exec == "graph")
            rows.append([name, f"{kernels[name]:.1f}", f"{ahead:.1f}",
                         f"{ahead - kernels[name]:.1f}", f"{plain:.1f}", f"{host:.1f}",
                         f"{opened:.0f}"])
    print(f"{common.device_line()}, {'with' if common.MPS else 'without'} MPS, {options.exec}, "
          f"by {options.transport}; µs a layer, medians of {options.repeats}\n")
    common.table(["shape", "bare kernel", "queued ahead", "over bare", "as it comes",
                  "a call on the host", "begin and abort"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
