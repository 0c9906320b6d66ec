"""Workers that are killed (SIGKILL) while their kernels run: who else notices?

A bystander, which attends itself or goes by the daemon, repeats one step and compares every bit of its
results with the first ones. Beside it one worker after another is killed at a random moment: with short
kernels (decode) or long ones (a prefill of 32768 tokens, many of them queued), attending itself or by
the daemon. Counted are the bystanders and daemons that were lost. Run it bare and by ./with-mps.

Ends with 1 if a kill of a worker that goes by the daemon harmed anybody, or, without MPS, any kill."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import common
import tinyserve
import torch

HEADS, KV_HEADS, DIM, LONG = 32, 8, 128, 32768


def connect(url, execution, exchange):
    client = tinyserve.connect(url, execution=execution, timeout=60)
    kv = client.pool("kills", writable=True)
    client.exchange(kv, exchange)
    return client, kv


def begin(kv, seqs, tokens):
    """A step whose inputs are the same each time."""
    step = kv.step(seqs, tokens, heads=HEADS)
    torch.manual_seed(7)
    for view in (step.q, step.k, step.v):
        view.torch().normal_()
    return step


def bystander(url, execution):
    """Prints a line after each step that was as the first; ends with 3 when it is lost."""
    try:
        client, kv = connect(url, execution, 64 << 20)
        seqs = kv.create(4)
        first = None
        while True:
            with begin(kv, seqs, [200, 1, 77, 513]) as step:
                for layer in range(kv.geometry.layers):
                    step.run(layer, stream=torch.cuda.current_stream())
                out = step.out.torch().clone()
                torch.cuda.synchronize()
            if first is None:
                first = out
            if not torch.equal(out, first):
                print("WRONG", flush=True)
                return 4
            print("ok", flush=True)
    except (tinyserve.Error, RuntimeError) as error:
        print(f"LOST {type(error).__name__}: {error}".splitlines()[0], flush=True)
        return 3


def victim(url, execution, length):
    """Says when its first kernels are under way, and goes on until it is killed."""
    _, kv = connect(url, execution, 1 << 30)
    seqs = kv.create(1)
    tokens, queued = ([LONG], 50) if length == "long" else ([1], 20)
    step = begin(kv, seqs, tokens)
    said = False
    while True:
        for _ in range(queued):
            step.run(0, stream=torch.cuda.current_stream())
        if not said:
            print("ready", flush=True)
            said = True
        torch.cuda.synchronize()


class Process:
    """One of the roles above, as a process of its own; counts its lines."""

    def __init__(self, *words):
        self.process = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        self.lines, self.last, self.changed = 0, "", threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines, self.last = self.lines + 1, line.strip()
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    def await_more(self, seconds):
        """Whether it says something more, and nothing bad, within so many seconds."""
        with self.changed:
            before = self.lines
            self.changed.wait_for(lambda: self.lines > before + 1 or self.process.poll() is not None,
                                  seconds)
            return self.lines > before and self.last in ("ok", "ready")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def count(pool, watcher, execution, length, kills):
    """Kills so many; (kills, bystanders lost, daemons lost, what the first lost one said)."""
    lost, daemons, said = 0, 0, "-"
    daemon = other = None
    rng = random.Random(f"{watcher} {execution} {length}")
    for _ in range(kills):
        if daemon is None:
            daemon = common.Daemon(pool)
        if other is None:
            other = Process("bystander", daemon.url, watcher)
            if not other.await_more(120):
                sys.exit(f"the bystander doesn't start: {other.last}")
        worker = Process("victim", daemon.url, execution, length)
        if not worker.await_more(120):
            sys.exit("the worker doesn't start")
        time.sleep(rng.random() * 0.4)  # a moment of any kind
        worker.kill()
        if not other.await_more(20):
            said = other.last if lost == 0 else said
            lost += 1
            other.kill()
            other = None
        if daemon.process.poll() is not None:
            daemons += 1
            daemon = other = None
    if other is not None:
        other.kill()
    if daemon is not None:
        daemon.stop()
    return kills, lost, daemons, said


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--kills", type=int, default=12, help="of each kind")
    options = parser.parse_args()
    mps = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    pool = (f"kills:layers=2,kv_heads={KV_HEADS},head_dim={DIM},dtype=bf16,block_tokens=16,memory=4G,"
            f"client_write=all,device={options.device},provider={options.provider}")
    print(f"{'with' if mps else 'without'} MPS, {common.device_line()}\n")
    rows, harm = [], False
    for watcher in ("local", "daemon"):
        for execution in ("local", "daemon"):
            for length in ("short", "long"):
                kills, lost, daemons, said = count(pool, watcher, execution, length, options.kills)
                rows.append([watcher, execution, length, kills, lost, daemons, said[:60]])
                harm |= lost + daemons > 0 and (execution == "daemon" or not mps)
    common.table(["bystander", "killed", "kernels", "kills", "bystanders lost", "daemons lost",
                  "first said"], rows)
    return 1 if harm else 0


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "bystander":
        sys.exit(bystander(*sys.argv[2:]))
    if len(sys.argv) > 2 and sys.argv[1] == "victim":
        sys.exit(victim(*sys.argv[2:]))
    sys.exit(main())
