"""A GPU pool and its workers outlive the daemon.

    python3 -m pytest -s tests/gpu/test_restart.py          [also under tests/gpu/with-mps]

Workers of every kind (buffers in host memory, in the daemon's device memory or in their own; runs
on a stream, attention of their own, CUDA graphs) repeat one story and print a digest of every
result. With the daemon killed under them, again and again, the digests must be those of a daemon
that lives. Under MPS a kill of whoever has kernels under way can take the contexts of all others
with it: such a worker says so and begins its story anew; what it kept must be there.

TS_TEST_KILLS: how many kills (20); TS_TEST_GIB: of the large pool (8)."""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import common
import tinyserve
import torch

LAYERS, KV_HEADS, HEADS, DIM, BLOCK = 8, 2, 8, 64, 16
KILLS = int(os.environ.get("TS_TEST_KILLS", "20"))
GIB = int(os.environ.get("TS_TEST_GIB", "8"))
STEPS = 40
LOST = 3  # a worker's status: its CUDA context went, with another process's fault
WAYS = ("host", "stream", "registered", "local", "graph")
SHAPE = f"layers={LAYERS},kv_heads={KV_HEADS},head_dim={DIM},dtype=bf16,block_tokens={BLOCK}"
ON_GPU = "device=cuda:0,provider=cuda-vmm,client_write=all,model=m"


class Supervised:
    """A daemon under --supervise, in a group of its own."""

    def __init__(self, pool, *settings):
        self.folder = tempfile.TemporaryDirectory()
        self.url = str(pathlib.Path(self.folder.name) / "s")
        self.log = open(pathlib.Path(self.folder.name) / "log", "w", encoding="utf-8")
        self.process = subprocess.Popen(
            [os.environ["TS_TEST_DAEMON"], "--supervise", "--socket", self.url, "--pool", pool,
             "--set", "exchange_max=8G", *(x for s in settings for x in ("--set", s))],
            stdout=self.log, stderr=self.log, start_new_session=True)

    def pid(self):
        """The daemon's; None: there is none at the moment."""
        pid = self.process.pid
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None

    def kill_daemon(self):
        """False: there is none that serves at the moment."""
        self.log.flush()
        said = pathlib.Path(self.log.name).read_text(encoding="utf-8")
        if said.rfind("listens at") < said.rfind("the daemon (pid"):
            return False
        os.kill(self.pid(), signal.SIGKILL)
        return True

    def __enter__(self):
        tinyserve.connect(self.url, wait=60).close()
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self.log.flush()
        if os.environ.get("TS_TEST_LOG"):
            print(pathlib.Path(self.log.name).read_text())
        self.folder.cleanup()


# ---- a worker ----


class Story:
    """What one worker does, step by step."""

    def __init__(self, url, way):
        self.way, self.sum = way, hashlib.sha256()
        self.client = tinyserve.connect(
            url, wait=60, timeout=60, execution="local" if way in ("local", "graph") else "daemon")
        self.kv = self.client.pool("p", writable=True)
        if way == "registered":
            self.client.register(self.kv, torch.empty(16 << 20, dtype=torch.uint8, device="cuda"))
        elif way != "host":
            self.client.exchange(self.kv, 16 << 20)
        self.random = torch.Generator().manual_seed(7)
        self.frame = self.kv.frame(3, heads=HEADS, io_dtype="bf16") if way == "graph" else None
        self.graph = None

    def fill(self, step):
        for view in (step.q, step.k, step.v):
            there = view.torch()
            there.copy_(torch.randn(there.shape, generator=self.random).to(torch.bfloat16))

    def layers(self, step, fills):
        outs = []
        for layer in range(LAYERS):
            if fills:
                self.fill(step)
            # the stream of now: a graph is captured on one of its own
            stream = None if self.way == "host" else torch.cuda.current_stream()
            step.run(layer, stream=stream)
            outs.append(step.out.torch().clone())
        return outs

    def run(self, seqs, counts, ids=None):
        decodes = self.frame is not None and counts == [1, 1, 1]
        step = self.frame.step(seqs) if decodes else self.kv.step(
            seqs, counts, heads=HEADS, io_dtype="bf16", tokens=ids)
        with step:
            if decodes:
                self.fill(step)  # once: a graph has no kernel that fills between layers
                if self.graph is None:
                    self.graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graph):
                        self.outs = self.layers(step, False)
                self.graph.replay()
                outs = self.outs
            else:
                outs = self.layers(step, True)
            if self.way != "host":
                torch.cuda.synchronize()
            for out in outs:
                self.sum.update(out.cpu().view(torch.uint8).numpy().tobytes())
            step.commit()

    def tell(self, name):
        """The whole story; yields after each step."""
        seqs = self.kv.create(3)
        self.run(seqs, [33, 1, 700], [i % 5 for i in range(734)])
        for number in range(STEPS):
            self.run(seqs, [1, 1, 1])
            if number == STEPS // 2:
                fork, = self.kv.fork(seqs[0])
                self.run([fork, seqs[2]], [17, 2])
                self.kv.free([seqs[0]])
                seqs[0] = fork
            yield
        self.kv.keep(seqs[2], name)


def worker(url, way, name, rounds):
    """Tells the story `rounds` times; prints what came of each as a line of JSON. Ends with LOST if
    its CUDA context went."""
    try:
        for turn in range(rounds):
            waits, began = [], time.monotonic()
            story = Story(url, way)
            for _ in story.tell(f"{name}.{turn}"):
                pathlib.Path(f"{url}.{name}").touch()  # it is at work
                waits.append(time.monotonic() - began)
                began = time.monotonic()
            print(json.dumps({"sum": story.sum.hexdigest(), "restarts": story.client.restarts,
                              "longest": max(waits), "median": sorted(waits)[len(waits) // 2]}),
                  flush=True)
            story.client.close()
    except (RuntimeError, tinyserve.Error) as error:
        said = f"{type(error).__name__}: {error}"
        print(said.splitlines()[0], file=sys.stderr, flush=True)
        gone = isinstance(error, RuntimeError) and "CUDA" in said or "DeviceError" in said
        return LOST if gone else 1
    return 0


def start(url, way, name, rounds):
    return subprocess.Popen([sys.executable, "-X", "faulthandler", __file__, url, way, name,
                             str(rounds)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digests(ways):
    """The story's for each way, with a daemon that lives."""
    sums = {}
    with Supervised(f"p:{SHAPE},memory=1G,slab=16M,{ON_GPU}") as daemon:
        running = {way: start(daemon.url, way, way, 1) for way in ways}
        for way, process in running.items():
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            found = json.loads(out)
            assert found["restarts"] == 0
            sums[way] = found["sum"]
    return sums


def kept(url):
    """The names and lengths of what is kept."""
    with tinyserve.connect(url, wait=60, timeout=60) as client, client.pool("p") as kv:
        return {k.name: k.length for k in kv.kept()}


# ---- tests ----

FAULT = """
import ctypes, sys
cuda, context, module, kernel = ctypes.CDLL("libcuda.so.1"), *(ctypes.c_void_p() for _ in range(3))
text = b'''.version 7.0
.target sm_70
.address_size 64
.visible .entry fault()
{ .reg .u64 %a; .reg .u32 %v; mov.u64 %a, 64; mov.u32 %v, 1; st.global.u32 [%a], %v; ret; }
'''
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuModuleLoadData(ctypes.byref(module), text) == 0
assert cuda.cuModuleGetFunction(ctypes.byref(kernel), module, b"fault") == 0
print("ready", flush=True)
assert sys.stdin.readline() == "now\\n"
assert cuda.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, None, None, None) == 0
assert cuda.cuCtxSynchronize() == 700
print("faulted", flush=True)
if len(sys.argv) > 1:
    sys.stdin.read()
"""


def test_another_clients_fault_under_mps_loses_nothing():
    """An illegal access of a stranger's takes all contexts under the MPS server with it. The first
    of the tests: MPS would wait for this process, too, had it a context already."""
    if not common.MPS:
        return
    faults = int(os.environ.get("TS_TEST_FAULTS", "3"))
    expected = digests(["host"])["host"]
    with Supervised(f"p:{SHAPE},memory=1G,slab=16M,{ON_GPU}") as daemon:
        for turn in range(faults):
            linger = turn == faults - 1  # it doesn't exit: nobody is served before it is ended
            stranger = subprocess.Popen(
                [sys.executable, "-c", FAULT, *(["stay"] if linger else [])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True)
            assert stranger.stdout.readline() == "ready\n"
            host = start(daemon.url, "host", f"host{turn}", 3)
            while daemon.pid() is None or len(kept(daemon.url)) <= 3 * turn:
                time.sleep(0.05)  # until it is at work
            pid = daemon.pid()
            print("now", file=stranger.stdin, flush=True)
            assert stranger.stdout.readline() == "faulted\n"
            if linger:
                time.sleep(2)
                stranger.kill()
            stranger.stdin.close()
            stranger.wait()
            out, err = host.communicate(timeout=120)
            assert host.returncode == 0, err
            assert all(json.loads(line)["sum"] == expected for line in out.splitlines())
            ends = time.monotonic() + 10  # a daemon that rests looks every second
            while daemon.pid() == pid and time.monotonic() < ends:
                time.sleep(0.05)
            assert daemon.pid() != pid, "the fault did not reach the daemon"
        assert len(kept(daemon.url)) == 3 * faults
        print(f"\n{faults} faults: nothing was lost")


def test_workers_of_every_kind_go_on_over_kills_of_the_daemon():
    expected = digests(WAYS)
    draw, kills, lost = random.Random(1), 0, 0
    with Supervised(f"p:{SHAPE},memory=2G,slab=16M,{ON_GPU}") as daemon:
        names = [(way, f"w{i}.{way}") for i, way in enumerate((*WAYS, "stream", "local", "graph"))]
        running = {name: (way, start(daemon.url, way, name, 4)) for way, name in names}
        begun = [pathlib.Path(f"{daemon.url}.{name}") for _, name in names]
        done, told = {}, []
        ends = time.monotonic() + 60 + 2 * KILLS
        try:
            while running:
                time.sleep(draw.uniform(0.02, 0.4))
                if kills < KILLS and all(path.exists() for path in begun):
                    kills += daemon.kill_daemon()
                if time.monotonic() > ends:  # they say where they are
                    for _, process in running.values():
                        process.send_signal(signal.SIGABRT)
                        print(process.communicate()[1])
                    raise AssertionError(f"{sorted(running)} hang after {kills} kills, {lost} lost")
                for name, (way, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    out, err = process.communicate()
                    del running[name]
                    for line in out.splitlines():
                        found = json.loads(line)
                        assert found["sum"] == expected[way], f"{name} was told something else"
                        told.append(found)
                    if process.returncode == LOST and common.MPS:
                        lost += 1
                        again = f"{name}+"
                        running[again] = (way, start(daemon.url, way, again, 4))
                    else:
                        assert process.returncode == 0, f"{name}: {err}"
                        done[name] = way
                        if kills < KILLS:
                            again = f"{name}'"
                            running[again] = (way, start(daemon.url, way, again, 4))
        finally:  # none is left behind, which MPS would wait for
            for _, process in running.values():
                process.kill()
        assert sum(t["restarts"] for t in told) > 0
        waits = sorted(t["longest"] for t in told)
        print(f"\n{kills} kills, {len(told)} stories, {sum(t['restarts'] for t in told)} restarts "
              f"seen, {lost} workers' contexts lost; the longest step of a story "
              f"{waits[len(waits) // 2]:.2f} s in the median, {waits[-1]:.2f} s at most; a step "
              f"{sorted(t['median'] for t in told)[len(told) // 2] * 1e3:.1f} ms")
        there = kept(daemon.url)
        for name in done:
            for turn in range(4):
                assert there[f"{name}.{turn}"] == 700 + STEPS + 2
        with tinyserve.connect(daemon.url, wait=60, timeout=60) as client, \
                client.pool("p") as kv:
            assert kv.match([i % 5 for i in range(33)] + [9])[1] == 32


def test_a_stream_that_waits_gets_its_word_from_the_next_daemon():
    """The worker waits for its stream alone, and calls nothing of the library's meanwhile."""
    sums = []
    for kills in (0, 1):
        with Supervised(f"p:{SHAPE},memory=1G,slab=16M,{ON_GPU}") as daemon:
            story = Story(daemon.url, "stream")
            seqs = story.kv.create(1)
            with story.kv.step(seqs, [500], heads=HEADS, io_dtype="bf16") as step:
                torch.cuda._sleep(1_000_000_000)  # half a second: runs are queued behind it
                outs = story.layers(step, True)
                if kills:
                    assert daemon.kill_daemon()
                torch.cuda.synchronize()
                assert story.client.restarts == 0
                step.commit()
                assert story.client.restarts == kills
            sums.append(b"".join(o.cpu().view(torch.uint8).numpy().tobytes() for o in outs))
            story.client.close()
    assert sums[0] == sums[1]


def test_blocks_of_a_run_that_was_under_way_are_another_workers_at_once():
    """Daemon and worker die during a long kernel; its blocks are another's right away, and nothing
    that the dead had queued is written into them."""
    tokens = 65536
    with Supervised(f"p:{SHAPE},memory=320M,slab=64M,{ON_GPU}") as daemon:
        script = ("import sys, tinyserve, torch\n"
                  f"c = tinyserve.connect({daemon.url!r}, timeout=60)\n"
                  "kv = c.pool('p'); c.exchange(kv, 2 << 30); s = kv.create(1)\n"
                  f"step = kv.step(s, [{tokens}], heads=64, io_dtype='bf16')\n"
                  "for view in (step.q, step.k, step.v): view.torch().fill_(7)\n"
                  f"for layer in range({LAYERS}): step.run(layer, "
                  "stream=torch.cuda.current_stream())\n"
                  "print('running', flush=True); sys.stdin.read()\n")
        victim = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        assert victim.stdout.readline() == "running\n"
        assert daemon.kill_daemon()
        victim.kill()
        with tinyserve.connect(daemon.url, wait=60, timeout=60) as client, \
                client.pool("p", writable=True) as kv:
            seq, = kv.create(1)
            kv.append([seq], [tokens])
            slots = kv.slots(seq, 0, tokens)[::BLOCK]
            at = torch.tensor(slots, device="cuda") // BLOCK
            planes = [p.torch() for layer in range(LAYERS) for p in kv.layer(layer, slots)]
            for plane in planes:
                plane[at] = 3
            torch.cuda.synchronize()
            time.sleep(1)  # longer than anything that was queued
            for plane in planes:
                assert bool((plane[at] == 3).all())
        victim.wait()


def test_memory_that_was_changed_behind_the_daemons_back_is_found():
    """`verify = restart`: a block that somebody wrote to is forgotten, and what had it."""
    with Supervised(f"p:{SHAPE},memory=256M,slab=16M,{ON_GPU}", "verify=restart") as daemon, \
            tinyserve.connect(daemon.url, wait=60, timeout=60) as client, \
            client.pool("p", writable=True) as kv:
        client.exchange(kv, 16 << 20)
        checked, before, turns, restarts = 0, 0, 1, 0
        while checked - before < 6:  # until the checksums were made before the kill
            before, restarts, turns = checked, restarts + 1, turns * 4
            prompts = [[turns * 10000 + p * 1000 + t for t in range(3 * BLOCK)] for p in range(2)]
            seqs = kv.create(2, namespace=b"m")
            with kv.step(seqs, [3 * BLOCK] * 2, heads=HEADS, io_dtype="bf16",
                         tokens=sum(prompts, [])) as step:
                for view in (step.q, step.k, step.v):
                    view.torch().normal_()
                for layer in range(LAYERS):
                    step.run(layer)
                step.commit()
            for _ in range(turns):
                kv.stats()
            checked, wrong = restart_checks(daemon, kv, restarts)
            assert wrong == 0
        slot, = kv.slots(seqs[0], BLOCK + 3, 1)
        plane = kv.layer(1, [slot])[0].torch()
        plane[slot // BLOCK, slot % BLOCK] += 1
        torch.cuda.synchronize()
        assert restart_checks(daemon, kv, restarts + 1)[1] == 1
        assert kv.matching([p + [7] for p in prompts], b"m") == [BLOCK, 3 * BLOCK]


def restart_checks(daemon, kv, restarts):
    """Kills it; returns how many blocks the next one checked, and how many were wrong."""
    while not daemon.kill_daemon():
        pass
    while kv.client.restarts < restarts:
        kv.stats()
    told = json.loads(subprocess.run([common.TSCTL, "--socket", daemon.url, "status", "--json"],
                                     check=True, capture_output=True, text=True).stdout)
    check = told["restart"]["last"]["check"]
    return check["checked_blocks"], check["wrong_blocks"]


def bare_context_seconds():
    """Of a process that makes a CUDA context and nothing else."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import ctypes\n"
                    "cuda = ctypes.CDLL('libcuda.so.1')\n"
                    "context = ctypes.c_void_p()\n"
                    "assert cuda.cuInit(0) == 0\n"
                    "assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0\n"],
                   check=True)
    return time.monotonic() - began


def test_a_large_pool_is_there_again_as_soon_as_a_context_is():
    """From the kill to the first step served, beside the bare creation of a context."""
    with Supervised(f"p:layers=32,kv_heads=8,head_dim=128,dtype=bf16,block_tokens=16,"
                    f"memory={GIB}G,slab=1G,{ON_GPU}") as daemon:
        with tinyserve.connect(daemon.url, timeout=120) as client, \
                client.pool("p", writable=True) as kv:
            client.exchange(kv, 64 << 20)
            tokens = (GIB << 30) // (2 * 32 * 8 * 128 * 2)
            seqs = kv.create(tokens // 65536)
            kv.append(seqs, [65536 - 16] * len(seqs))

            def step():
                with kv.step(seqs[:1], [1], heads=32, io_dtype="bf16") as one:
                    for view in (one.q, one.k, one.v):
                        view.torch().fill_(1)
                    torch.cuda.synchronize()
                    for layer in range(32):
                        one.run(layer)
                    one.abort()

            step()
            bare = min(bare_context_seconds() for _ in range(3))
            took = []
            for _ in range(3):
                began = time.monotonic()
                assert daemon.kill_daemon()
                step()
                took.append(time.monotonic() - began)
            print(f"\n{GIB} GiB: the first step {min(took):.2f}-{max(took):.2f} s after the kill; "
                  f"a bare context {bare:.2f} s")
            assert kv.lengths(seqs) == [65536 - 16] * len(seqs)


if __name__ == "__main__":
    sys.exit(worker(*sys.argv[1:4], int(sys.argv[4])))
