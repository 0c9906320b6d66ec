"""Frames on a GPU of the tests' own (fake_gpu.c, fake_libcuda.c, fake_local_gpu.c): no kernel runs.
tests/gpu/test_frames.py has the rest."""

import os
import subprocess
import sys

import pytest

import tinyserve

POOL = ("p:layers=3,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=1024,slab=2M,"
        "device=cuda:0,provider=cuda-vmm,model=m,client_write=all")

pytestmark = pytest.mark.skipif("TS_TEST_FAKE_GPU_DAEMON" not in os.environ,
                                reason="TS_TEST_FAKE_GPU_DAEMON names no daemon")

BEGIN = """
import sys, tinyserve
client = tinyserve.connect(sys.argv[1])
kv = client.pool("p", writable=True)
client.exchange(kv, 1 << 20)
seq, = kv.create()
frame = kv.frame(1)
"""


@pytest.fixture
def run_beside_gpu(start_daemon, monkeypatch):
    """Runs code behind BEGIN, in a process whose CUDA is the tests' own; what it prints."""
    monkeypatch.setenv("TS_TEST_FAKE_GPU", "1")
    monkeypatch.setenv("TS_TEST_DAEMON", os.environ["TS_TEST_FAKE_GPU_DAEMON"])
    daemon = start_daemon(POOL)

    def run(code):
        folders = (os.environ["TS_TEST_FAKE_CUDA"], os.environ.get("LD_LIBRARY_PATH", ""))
        return subprocess.run([sys.executable, "-c", BEGIN + code, daemon.url], check=True,
                              env=dict(os.environ, LD_LIBRARY_PATH=":".join(filter(None, folders))),
                              text=True, stdout=subprocess.PIPE, timeout=120).stdout

    yield run
    with tinyserve.connect(daemon.url) as client, client.pool("p") as kv:
        assert kv.stats().used == 0


def test_a_frame_that_is_closed_drops_its_step(run_beside_gpu):
    assert run_beside_gpu("""
step = frame.step([seq])
frame.close()
for _ in range(100):  # where the frame was, there is something else
    kv.frame(1).close()
for call in step.abort, step.commit:
    try:
        call()
    except tinyserve.DisconnectedError as error:
        print(error)
print(kv.lengths([seq]))
with kv.step([seq], [1], run=False) as step:  # it is in no open step
    step.abort()
frame.close()
client.close()
""") == "the step has ended\nthe step has ended\n[0]\n"


def test_a_step_of_a_frame_waits_and_has_a_priority(run_beside_gpu):
    assert run_beside_gpu("""
rest, = kv.create()
with kv.step([rest], [kv.stats().available * 16], run=False) as step:
    step.commit()
for options in {"wait": 0.05}, {"priority": 2}, {"wait": -1}, {"tokens": [1, 2]}:
    try:
        frame.step([seq], **options)
    except (tinyserve.NoSpaceError, ValueError) as error:
        print(type(error).__name__)
kv.free([rest])
with frame.step([seq], [7], wait=0.05, priority=-1) as step:
    step.abort()
client.close()
""") == "NoSpaceError\nValueError\nValueError\nValueError\n"
