"""Many workers on one GPU: tokens a second of all, and how long single steps take, beside one
worker with all the sequences and beside PyTorch's attention in as many processes.

    tests/gpu/with-mps python3 tests/gpu/bench_workers.py [--ways daemon,local,graph,sdpa]
        [--crowds 1x16,16x1,8x8,2x8+1,1x64/15x1] [--steps 1000] [--context 4096]

WORKERSxSEQUENCES: WORKERS processes, each with SEQUENCES sequences of --context tokens; behind a
slash, others beside them. A step adds one token to each sequence: 32 layers (32 query heads, 8 KV
heads of 128, bf16) on the worker's stream, which it waits for at the end of the step, as one that
samples does. Rates are counted while all workers run. With daemon, also its processor time over the
runs, and the runs of a launch.

A second table says where the time of slow steps goes: begin, runs, the wait for the stream, commit.
1000 steps cross borders of blocks (16 tokens) and of slabs (64 MiB: 32 blocks). With +1, one worker
more comes while the others work: how long it takes from its CUDA context until it is ready. Each
row has a daemon of its own; the workers' processes stay."""

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import common
import tinyserve
import torch

LAYERS, HEADS, KV, DIM, BLOCK = 32, 32, 8, 128, 16
WARM = 20  # steps before those that are counted


class Steps:
    """A worker's steps by the daemon, by itself, or by CUDA graph."""

    def __init__(self, url, way, count, steps, context):
        self.graph = way == "graph"
        self.parts = [now()]
        self.client = tinyserve.connect(url, execution="daemon" if way == "daemon" else "local")
        self.kv = self.client.pool("bench", writable=True)
        self.client.exchange(self.kv, 16 << 20)
        self.parts.append(now())
        self.seqs = self.kv.create(count)
        self.kv.append(self.seqs, [context] * count)
        self.parts.append(now())
        slots = [slot for s in self.seqs for slot in self.kv.slots(s, 0, context)[::BLOCK]]
        self.kv.layer(0, slots)
        self.parts.append(now())
        blocks = torch.tensor(slots, device="cuda") // BLOCK
        for layer in range(LAYERS):
            for plane in self.kv.layer(layer, slots):
                plane = plane.torch()
                plane[blocks] = torch.randn(len(slots), *plane.shape[1:], device="cuda",
                                            dtype=torch.bfloat16)
        torch.cuda.synchronize()
        self.captured = None
        self.frame = None
        if self.graph:
            self.frame = self.kv.frame(count, tokens=count * (context + WARM + steps),
                                       heads=HEADS, io_dtype="bf16")

    def _begin(self):
        if self.frame is not None:
            return self.frame.step(self.seqs)
        return self.kv.step(self.seqs, [1] * len(self.seqs), heads=HEADS, io_dtype="bf16")

    def _layers(self, step):
        for layer in range(LAYERS):
            step.run(layer, stream=torch.cuda.current_stream())

    def __call__(self):
        """A step; when each part of it ended."""
        step = self._begin()
        begun = now()
        if self.graph and self.captured is None:
            self.captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.captured):
                self._layers(step)
        if self.captured is not None:
            self.captured.replay()
        else:
            self._layers(step)
        ran = now()
        torch.cuda.synchronize()
        waited = now()
        step.commit()
        return begun, ran, waited, now()

    def close(self):
        self.captured = None
        if self.frame is not None:
            self.frame.close()
        self.client.close()


class Sdpa:
    """The same by PyTorch, with caches of the worker's own."""

    def __init__(self, count, context):
        shape = (LAYERS, count, KV, context + 1, DIM)
        self.k, self.v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16)
                          for _ in range(2))
        self.q = torch.randn(count, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
        self.new = torch.randn(count, KV, DIM, device="cuda", dtype=torch.bfloat16)

    def __call__(self):
        begun = now()
        for layer in range(LAYERS):
            self.k[layer, :, :, -1] = self.new
            self.v[layer, :, :, -1] = self.new
            torch.nn.functional.scaled_dot_product_attention(
                self.q, self.k[layer], self.v[layer], enable_gqa=True)
        ran = now()
        torch.cuda.synchronize()
        return begun, ran, now(), now()

    def close(self):
        self.k = self.v = None
        torch.cuda.empty_cache()


def now():
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def spent_on():
    """What the thread has had of the machine: seconds on a processor, page faults, switches to
    others while it would have gone on; and Python's full collections."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return (used.ru_utime + used.ru_stime, used.ru_minflt + used.ru_majflt, used.ru_nivcsw,
            gc.get_stats()[2]["collections"])


def worker():
    """For each line that it is told: makes the work ready and says how long that took, waits for a
    line, and prints when it began and when the parts of each step ended."""
    torch.zeros(1, device="cuda")
    if sys.argv[2:] == ["--no-gc"]:
        gc.disable()
    print("started", flush=True)
    for line in sys.stdin:
        url, way, count, steps, context = json.loads(line)
        work = (Sdpa(count, context) if way == "sdpa" else
                Steps(url, way, count, steps, context))
        torch.cuda.synchronize()
        parts = [*getattr(work, "parts", [now()]), now()]
        for _ in range(WARM):
            work()
        parts.append(now())
        print(json.dumps([b - a for a, b in zip(parts, parts[1:])]), flush=True)
        sys.stdin.readline()
        times, spent = [now()], [spent_on()]
        for _ in range(steps):
            times.append(work())
            spent.append(spent_on())
        print(json.dumps([times, spent]), flush=True)
        sys.stdin.readline()  # its end is not to hold up the others
        work.close()
        del work
        print("closed", flush=True)


class Worker:
    """A worker's process, for any number of rows."""

    def __init__(self, options):
        command = [sys.executable, __file__, "--worker"] + ["--no-gc"] * options.no_gc
        if options.c:
            command = [options.c] + ["--spin"] * options.spin
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors)

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self):
        line = self.process.stdout.readline()
        if line == "":
            self.errors.seek(0)
            raise SystemExit(f"a worker failed: {self.errors.read().decode()[-2000:]}")
        return line.strip()


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


PARTS = ["begin", "runs", "wait", "commit"]


def where_it_went(way, crowd, times, spent, show):
    """A row of the second table: steps beyond twice and five times the median, and the parts of
    the median step, of those beyond twice the median (their mean), and of the slowest; `show` of
    these are told of one by one, with what the thread had of the machine."""
    steps = []  # (whole, parts, which step, whose, when it began)
    first = min(t[0] for t in times)
    for number, worker_times in enumerate(times):
        ends = [[worker_times[0]] * 4, *worker_times[1:]]
        for i, (before, at) in enumerate(zip(ends, ends[1:])):
            marks = [before[3], *at]
            steps.append((at[3] - before[3], [b - a for a, b in zip(marks, marks[1:])], i, number,
                          before[3] - first))
    steps.sort()
    for whole, parts_of, i, worker_number, at in steps[:-1 - show:-1]:
        had = [b - a for a, b in zip(spent[worker_number][i], spent[worker_number][i + 1])]
        print(f"    worker {worker_number}, step {i}, {at * 1e3:.1f} ms after the first began: "
              f"{whole * 1e3:.2f} ms ({' '.join(f'{x * 1e3:.2f}' for x in parts_of)}), "
              f"{had[0] * 1e3:.2f} on a processor, {had[1]} faults, {had[2]} switches, "
              f"{had[3]} collections",
              file=sys.stderr)
    middle = steps[len(steps) // 2][0]
    slow = [s for s in steps if s[0] > 2 * middle]

    def parts(some):
        if not some:
            return "-"
        return " ".join(f"{statistics.fmean(s[1][i] for s in some) * 1e3:.2f}" for i in range(4))

    return [way, crowd, f"{len(slow)}, {sum(s[0] > 5 * middle for s in steps)} of {len(steps)}",
            parts(steps[len(steps) // 2 - 8:len(steps) // 2 + 8]), parts(slow), parts(steps[-1:]),
            " ".join(str(s[2]) for s in steps[:-6:-1])]


def measure(daemon, way, workers, comer, counts, options):
    """For each number of sequences the rows of both tables; and what the newcomer's readiness
    took. `counts`: of each worker's sequences."""
    def order(count, steps):
        return json.dumps([daemon.url, way, count, steps, options.context])

    for w, count in zip(workers, counts):
        w.tell(order(count, options.steps))
    for w in workers:
        w.hear()
    before = status(daemon)
    for w in workers:
        w.tell("go")
    arrival = None
    if comer is not None:
        time.sleep(0.3)
        comer.tell(order(counts[0], 1))
        arrival = json.loads(comer.hear())
    times, spent = zip(*(json.loads(w.hear()) for w in workers))
    after = status(daemon)
    if comer is not None:
        comer.tell("go")
        comer.hear()
    for w in [*workers, *([comer] if comer is not None else [])]:
        w.tell("")
        w.hear()
    begin, end = max(t[0] for t in times), min(t[-1][3] for t in times)
    rows = []
    for count in dict.fromkeys(counts):
        some = [t for t, n in zip(times, counts) if n == count]
        theirs = [t for t, n in zip(spent, counts) if n == count]
        crowd = (f"{len(some)} x {count}" + (" + 1" if comer is not None else "")
                 + (" of " + str(len(counts)) if len(some) < len(counts) else ""))
        ends = [[t[0], *(at[3] for at in t[1:])] for t in some]
        done = sum(sum(begin < x <= end for x in t[1:]) for t in ends)
        each = sorted(b - a for t in ends for a, b in zip(t, t[1:]) if b <= end)
        row = [way, crowd, f"{done * count / (end - begin):.0f}",
               f"{statistics.median(each) * 1e3:.2f}", f"{each[int(len(each) * 0.99)] * 1e3:.2f}",
               f"{each[-1] * 1e3:.1f}", *daemons_part(way, before, after)]
        rows.append((row, where_it_went(way, crowd, some, theirs, options.slowest)))
    return rows, arrival


def daemons_part(way, before, after):
    runs, launches = (b - a for a, b in zip(before[:2], after[:2]))
    if way != "daemon" or runs == 0:
        return ["", ""]
    cpu = {name: used - before[2].get(name, 0) for name, used in after[2].items()}
    most = sorted(cpu, key=cpu.get, reverse=True)[:4]
    return [f"{sum(cpu.values()) / runs * 1e6:.1f} ("
            + ", ".join(f"{name} {cpu[name] / runs * 1e6:.1f}" for name in most) + ")",
            f"{runs / launches:.1f}"]


def parse(crowd):
    """The workers' numbers of sequences, and whether one more comes."""
    counts = []
    for group in crowd.removesuffix("+1").split("/"):
        workers, count = map(int, group.split("x"))
        counts += [count] * workers
    return counts, crowd.endswith("+1")


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker()
    parser = common.arguments(__doc__)
    parser.add_argument("--ways", default="daemon,graph,local,sdpa")
    parser.add_argument("--crowds", default="1x8,8x1,1x16,16x1,8x8,32x1,2x8+1")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--no-gc", action="store_true",
                        help="workers without Python's collector")
    parser.add_argument("--c", metavar="PROGRAM",
                        help="workers in C: build/tests/crowd_worker, which sleeps while the GPU "
                             "works; it has no sdpa")
    parser.add_argument("--spin", action="store_true", help="workers in C spin meanwhile")
    parser.add_argument("--slowest", type=int, default=0, help="steps to tell of, one by one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="of the daemon: with join_us=0 no run waits for others")
    options = parser.parse_args()
    pool = (f"bench:layers={LAYERS},kv_heads={KV},head_dim={DIM},dtype=bf16,block_tokens={BLOCK},"
            f"memory=60G,client_write=all,device={options.device},provider={options.provider}")
    rows, parts, arrivals, workers = [], [], [], []
    settings = dict(x.split("=", 1) for x in options.set)
    crowds = [parse(c) for c in options.crowds.split(",")]
    workers = [Worker(options)
               for _ in range(max(len(counts) + plus for counts, plus in crowds))]
    try:
        for w in workers:
            w.hear()
        for counts, plus in crowds:
            for way in options.ways.split(","):
                with common.Daemon(pool, **settings) as daemon:
                    measured, arrival = measure(daemon, way, workers[:len(counts)],
                                                workers[len(counts)] if plus else None, counts,
                                                options)
                for row, part in measured:
                    rows.append(row)
                    parts.append(part)
                    print(*row, part[2], file=sys.stderr, flush=True)
                if arrival is not None:
                    arrivals.append([way, f"{len(counts)} x {counts[0]}",
                                     *["-"] * (5 - len(arrival)),
                                     *(f"{x * 1e3:.0f}" for x in arrival)])
    finally:
        for w in workers:
            w.process.kill()
    print(f"{common.device_line()}, {'with' if common.MPS else 'without'} MPS, sequences of "
          f"{options.context} tokens, {options.steps} steps"
          f"{''.join(', ' + x for x in options.set)}{', no collector' if options.no_gc else ''}"
          f"{', workers in C' if options.c else ''}{' that spin' if options.spin else ''}\n")
    common.table(["way", "workers x sequences", "tokens/s", "ms a step: p50", "p99", "slowest",
                  "daemon: µs of processor a run", "runs a launch"], rows)
    names = "/".join(PARTS)
    common.table(["way", "workers x sequences", "beyond 2x, 5x the median",
                  f"ms of {names}: median steps", "beyond 2x", "slowest", "slowest are steps"],
                 parts)
    if arrivals:
        common.table(["a newcomer by", "beside", "ms: connect", "append", "map", "fill",
                      f"{WARM} steps"], arrivals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
