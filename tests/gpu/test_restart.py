"""A GPU pool outlives its daemon: pytest tests/gpu/test_restart.py [with tests/gpu/with-mps].

A worker whose buffers lie in host memory goes on over kills of the daemon, with the same bits, and
what is kept and cached is there afterwards. (TS_TEST_KILLS: how many kills; 20.)"""

import os
import pathlib
import random
import signal
import subprocess
import tempfile
import time

import numpy as np
import tinyserve

LAYERS, KV_HEADS, HEADS, DIM, BLOCK = 4, 2, 8, 64, 16
POOL = (f"p:layers={LAYERS},kv_heads={KV_HEADS},head_dim={DIM},dtype=fp32,block_tokens={BLOCK},"
        f"memory=2G,slab=64M,device=cuda:0,provider=cuda-vmm,model=m")
STEPS = 60


class Supervised:
    """A daemon under --supervise, in a group of its own."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.url = str(pathlib.Path(self.folder.name) / "s")
        self.log = open(pathlib.Path(self.folder.name) / "log", "w", encoding="utf-8")
        self.process = subprocess.Popen(
            [os.environ["TS_TEST_DAEMON"], "--supervise", "--socket", self.url, "--pool", POOL],
            stdout=self.log, stderr=self.log, start_new_session=True)

    def kill_daemon(self):
        """False: there is none at the moment."""
        pid = self.process.pid
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children:
            return False
        os.kill(int(children[0]), signal.SIGKILL)
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self.log.flush()
        if os.environ.get("TS_TEST_LOG"):
            print(pathlib.Path(self.log.name).read_text())
        self.folder.cleanup()


def work(url, between):
    """Steps of three sequences and a fork; all that they give. `between` is called before each run
    of a layer."""
    rng, outs, waits = np.random.default_rng(7), [], []
    with tinyserve.connect(url, wait=60, timeout=60) as client, client.pool("p") as kv:
        seqs = kv.create(3)
        for number in range(STEPS):
            began = time.monotonic()
            counts = [33, 1, 7] if number == 0 else [1, 2, 3]
            ids = [(number * 31 + i) % 5 for i in range(sum(counts))]
            with kv.step(seqs, counts, heads=HEADS, tokens=ids) as step:
                for layer in range(LAYERS):
                    for buffer in (step.q, step.k, step.v):
                        buffer[:] = rng.standard_normal(buffer.shape)
                    between()
                    step.run(layer)
                    outs.append(np.array(step.out).copy())
                step.commit()
            if number == STEPS // 2:
                kv.free([seqs[2]])
                seqs = seqs[:2] + kv.fork(seqs[0], 1)
            waits.append(time.monotonic() - began)
        restarts = client.restarts
        lengths = kv.lengths(seqs)
        kv.keep(seqs[0], f"kept-{os.getpid()}-{time.monotonic_ns()}")
    return outs, lengths, restarts, waits


def test_a_worker_goes_on_over_kills_of_the_daemon():
    kills = int(os.environ.get("TS_TEST_KILLS", "20"))
    draw = random.Random(1)
    with Supervised() as daemon:
        alone, lengths, restarts, _ = work(daemon.url, lambda: None)
        assert restarts == 0
        left = [kills]

        def kill_now_and_then():
            if left[0] > 0 and draw.random() < 2 * kills / (STEPS * LAYERS):
                left[0] -= daemon.kill_daemon()

        outs, lengths_then, restarts, waits = work(daemon.url, kill_now_and_then)
        assert lengths_then == lengths and restarts > 0
        assert all(np.array_equal(a, b) for a, b in zip(outs, alone, strict=True))
        print(f"\n{kills - left[0]} kills, {restarts} restarts seen; a step took "
              f"{sorted(waits)[len(waits) // 2] * 1e3:.1f} ms in the median and "
              f"{max(waits):.2f} s at most")
        with tinyserve.connect(daemon.url) as client, client.pool("p") as kv:
            assert [k.length for k in kv.kept()] == [lengths[0], lengths[0]]
            seq, found = kv.match([(i % 5) for i in range(33)] + [9])
            assert found == 33  # two blocks, and a token of the third
