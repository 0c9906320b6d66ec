"""Many workers on one GPU: tokens a second of all, and how long single steps take, beside one
worker with all the sequences and beside PyTorch's attention in as many processes.

    tests/gpu/with-mps python3 tests/gpu/bench_workers.py [--ways daemon,local,graph,sdpa]
                                                          [--crowds 1x16,16x1,8x8] [--steps 200]

WORKERSxSEQUENCES: so many processes with so many sequences of 4096 tokens each. A step adds one
token to each sequence: 32 layers (32 query heads, 8 KV heads of 128, bf16) on the worker's stream,
which it waits for at the end of the step, as one that samples does. Rates are counted while all
workers run. With daemon, also its processor time over the runs, and the runs of a launch."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import common
import tinyserve
import torch

LAYERS, HEADS, KV, DIM, BLOCK, CONTEXT = 32, 32, 8, 128, 16, 4096
WARM = 20  # steps before those that are counted


class Steps:
    """A worker's steps by the daemon, by itself, or by CUDA graph."""

    def __init__(self, url, way, count):
        self.graph = way == "graph"
        self.client = tinyserve.connect(url, execution="daemon" if way == "daemon" else "local")
        self.kv = self.client.pool("bench", writable=True)
        self.client.exchange(self.kv, 16 << 20)
        self.seqs = self.kv.create(count)
        self.kv.append(self.seqs, [CONTEXT] * count)
        slots = [slot for s in self.seqs for slot in self.kv.slots(s, 0, CONTEXT)[::BLOCK]]
        blocks = torch.tensor(slots, device="cuda") // BLOCK
        for layer in range(LAYERS):
            for plane in self.kv.layer(layer, slots):
                plane = plane.torch()
                plane[blocks] = torch.randn(len(slots), *plane.shape[1:], device="cuda",
                                            dtype=torch.bfloat16)
        torch.cuda.synchronize()
        self.captured = None
        self.frame = self.kv.frame(count, heads=HEADS, io_dtype="bf16") if self.graph else None

    def _begin(self):
        if self.frame is not None:
            return self.frame.step(self.seqs)
        return self.kv.step(self.seqs, [1] * len(self.seqs), heads=HEADS, io_dtype="bf16")

    def _layers(self, step):
        for layer in range(LAYERS):
            step.run(layer, stream=torch.cuda.current_stream())

    def __call__(self):
        step = self._begin()
        if self.graph and self.captured is None:
            self.captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.captured):
                self._layers(step)
        if self.captured is not None:
            self.captured.replay()
        else:
            self._layers(step)
        torch.cuda.synchronize()
        step.commit()


class Sdpa:
    """The same by PyTorch, with caches of the worker's own."""

    def __init__(self, count):
        shape = (LAYERS, count, KV, CONTEXT + 1, DIM)
        self.k, self.v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16)
                          for _ in range(2))
        self.q = torch.randn(count, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
        self.new = torch.randn(count, KV, DIM, device="cuda", dtype=torch.bfloat16)

    def __call__(self):
        for layer in range(LAYERS):
            self.k[layer, :, :, CONTEXT] = self.new
            self.v[layer, :, :, CONTEXT] = self.new
            torch.nn.functional.scaled_dot_product_attention(
                self.q, self.k[layer], self.v[layer], enable_gqa=True)
        torch.cuda.synchronize()


def worker(url, way, count, steps):
    """Says that it is ready, waits for a line, and prints when it began and each step's end."""
    work = Sdpa(count) if way == "sdpa" else Steps(url, way, count)
    for _ in range(WARM):
        work()
    print("ready", flush=True)
    sys.stdin.readline()
    times = [time.clock_gettime(time.CLOCK_MONOTONIC)]
    for _ in range(steps):
        work()
        times.append(time.clock_gettime(time.CLOCK_MONOTONIC))
    print(json.dumps(times), flush=True)
    sys.stdin.readline()  # its end is not to hold up the others


def cpu_seconds(pid):
    """Processor time of each of the process's threads, by name."""
    names = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        name, fields = open(f"/proc/{pid}/task/{task}/stat",
                            encoding="ascii").read().split("(", 1)[1].rsplit(")", 1)
        used = sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")
        names[name] = names.get(name, 0) + used
    return names


def status(daemon):
    out = subprocess.run([common.TSCTL, "-s", daemon.url, "--json", "status"], check=True,
                         text=True, stdout=subprocess.PIPE).stdout
    found = json.loads(out)
    return found["runs"], found["launches"], cpu_seconds(daemon.process.pid)


def measure(daemon, way, workers, count, steps):
    with tempfile.TemporaryFile() as errors:
        processes = [subprocess.Popen(
            [sys.executable, __file__, "--worker", daemon.url, way, str(count), str(steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            for _ in range(workers)]
        try:
            for p in processes:
                line = p.stdout.readline()
                if line != "ready\n":
                    errors.seek(0)
                    raise SystemExit(f"a worker failed: {errors.read().decode()[-2000:]}")
            before = status(daemon)
            for p in processes:
                p.stdin.write("go\n")
                p.stdin.flush()
            times = [json.loads(p.stdout.readline()) for p in processes]
            after = status(daemon)
            for p in processes:
                p.stdin.close()
                p.wait()
        finally:
            for p in processes:
                p.kill()
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    done = sum(sum(begin < x <= end for x in t[1:]) for t in times)
    each = sorted(b - a for t in times for a, b in zip(t, t[1:]))
    row = [way, f"{workers} x {count}", f"{done * count / (end - begin):.0f}",
           f"{statistics.median(each) * 1e3:.2f}", f"{each[int(len(each) * 0.99)] * 1e3:.2f}",
           f"{each[-1] * 1e3:.1f}"]
    runs, launches = (b - a for a, b in zip(before[:2], after[:2]))
    cpu = {name: used - before[2].get(name, 0) for name, used in after[2].items()}
    if way == "daemon" and runs > 0:
        most = sorted(cpu, key=cpu.get, reverse=True)[:4]
        row += [f"{sum(cpu.values()) / runs * 1e6:.1f} ("
                + ", ".join(f"{name} {cpu[name] / runs * 1e6:.1f}" for name in most) + ")",
                f"{runs / launches:.1f}"]
    else:
        row += ["", ""]
    return row


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    parser = common.arguments(__doc__)
    parser.add_argument("--ways", default="daemon,graph,local,sdpa")
    parser.add_argument("--crowds", default="1x8,8x1,1x16,16x1,8x8,32x1")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="of the daemon: join_us=0 launches each run by itself")
    options = parser.parse_args()
    pool = (f"bench:layers={LAYERS},kv_heads={KV},head_dim={DIM},dtype=bf16,block_tokens={BLOCK},"
            f"memory=40G,client_write=all,device={options.device},provider={options.provider}")
    rows = []
    settings = dict(x.split("=", 1) for x in options.set)
    with common.Daemon(pool, **settings) as daemon:
        for crowd in options.crowds.split(","):
            workers, count = map(int, crowd.split("x"))
            for way in options.ways.split(","):
                rows.append(measure(daemon, way, workers, count, options.steps))
                print(*rows[-1], file=sys.stderr, flush=True)
    print(f"{common.device_line()}, {'with' if common.MPS else 'without'} MPS, sequences of "
          f"{CONTEXT} tokens, {options.steps} steps{''.join(', ' + x for x in options.set)}\n")
    common.table(["way", "workers x sequences", "tokens/s", "ms a step: p50", "p99", "slowest",
                  "daemon: µs of processor a run", "runs a launch"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
