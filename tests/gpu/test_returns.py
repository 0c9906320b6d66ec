"""GPU memory that goes to another user comes free, though the worker that mapped it is idle: pytest
tests/gpu/test_returns.py, as root, since it becomes another user."""

import os
import subprocess
import sys
import time

import common
import pytest
import tinyserve
import torch

SLAB, SLABS, BLOCK = 64 << 20, 32, 16
POOL = (f"p:layers=2,kv_heads=2,head_dim=64,dtype=fp32,block_tokens={BLOCK},memory={SLAB * SLABS},"
        f"slab={SLAB},device=cuda:0,provider=cuda-vmm,client_write=all")
SECONDS = 10  # a session that gives nothing back for this long is ended

WORKER = """if True:
    import os, sys, tinyserve
    os.setgroups([]); os.setgid(60001); os.setuid(60001)
    client = tinyserve.connect(sys.argv[1])
    kv = client.pool("p", writable=True)
    def hold(blocks):
        seq, = kv.create()
        with kv.step([seq], [blocks * 16], run=False) as step:
            step.commit()
        kv.layer(0, kv.slots(seq, 0, blocks * 16))  # maps all of them
        return seq
    seq = hold(int(sys.argv[2]))
    kv.free([seq])
    print("mapped", flush=True)
    sys.stdin.readline()
    hold(1)  # the session goes on
    print("again", flush=True)
    sys.stdin.read()
"""


def free_bytes():
    return torch.cuda.mem_get_info()[0]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
def test_what_an_idle_worker_maps_comes_free_when_it_is_anothers(tmp_path):
    torch.zeros(1, device="cuda")
    with common.Daemon(POOL, socket_mode="0666") as daemon:
        os.chmod(daemon.folder.name, 0o755)
        with tinyserve.connect(daemon.url) as client, client.pool("p", writable=True) as kv:
            blocks = kv.stats().blocks
            worker = subprocess.Popen([sys.executable, "-c", WORKER, daemon.url, str(blocks)],
                                      text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert worker.stdout.readline() == "mapped\n"
            before = free_bytes()
            seq, = kv.create()
            began = time.monotonic()
            with kv.step([seq], [blocks * BLOCK], run=False) as step:
                step.commit()
            while free_bytes() < before - SLAB:  # each slab was made before the old one went
                assert time.monotonic() - began < SECONDS
            took = time.monotonic() - began
            print(f"{SLABS} slabs of {SLAB >> 20} MiB came free within {took:.2f} s")
            kv.free([seq])
            worker.stdin.write("go on\n")
            worker.stdin.flush()
            assert worker.stdout.readline() == "again\n"
            worker.communicate("")
            assert worker.returncode == 0
