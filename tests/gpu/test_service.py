"""The service on a GPU, with many processes: pytest tests/gpu/test_service.py

Runs once for each memory provider. Under CUDA's multi-process service (tests/gpu/with-mps python3
-m pytest ...) it leaves out what MPS can't survive: a worker's illegal access.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import common
import pytest
import tinyserve
import torch

HEADS, KV, DIM, BLOCK, LAYERS = 8, 2, 64, 16, 2


@pytest.fixture(params=["cuda-vmm", "cuda-ipc"])
def provider(request):
    return request.param


def pool_text(provider, more=""):
    return (f"p:layers={LAYERS},kv_heads={KV},head_dim={DIM},dtype=fp32,block_tokens={BLOCK},"
            f"memory=64M,slab=8M,device=cuda:0,provider={provider}{more}")


@pytest.fixture
def daemon(provider):
    with common.Daemon(pool_text(provider)) as d:
        yield d


@pytest.fixture
def client(daemon):
    with tinyserve.connect(daemon.url) as c:
        yield c


def reference(q, k, v):
    """Causal attention of the last len(q) tokens: [tokens, heads, dim], in float64."""
    n, t = len(q), len(k)
    k, v = (x.double().repeat_interleave(HEADS // KV, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,thd->hqt", q.double(), k) * DIM**-0.5
    hidden = torch.arange(t, device=q.device)[None, :] > torch.arange(t - n, t,
                                                                      device=q.device)[:, None]
    scores.masked_fill_(hidden, float("-inf"))
    return torch.einsum("hqt,thd->qhd", scores.softmax(-1), v)


def rows(*shape):
    return torch.randn(*shape, device="cuda")


def one_step(kv, seq, past_k, past_v, count, stream=None):
    """Adds random tokens in all layers and checks what comes out. Returns K and V so far."""
    new_k, new_v = rows(count, KV, DIM), rows(count, KV, DIM)
    k, v = torch.cat([past_k, new_k]), torch.cat([past_v, new_v])
    with kv.step([seq], [count], heads=HEADS) as step:
        tq, tk, tv, out = (x.torch() for x in (step.q, step.k, step.v, step.out))
        for layer in range(LAYERS):
            q = rows(count, HEADS, DIM)
            tq.copy_(q)
            tk.copy_(new_k)
            tv.copy_(new_v)
            out.fill_(float("nan"))
            if stream is None:
                torch.cuda.synchronize()
                step.run(layer)
            else:
                step.run(layer, stream=stream)
            assert (out.double() - reference(q, k, v)).abs().max() < 1e-4
        step.commit()
    return k, v


def nothing():
    return rows(0, KV, DIM), rows(0, KV, DIM)


def test_steps_on_a_stream_and_without_one_agree_with_torch(client):
    with client.pool("p") as kv:
        client.exchange(kv, 16 << 20)
        seq, = kv.create()
        k, v = nothing()
        for count in (1, 5, 40, 1, 130):
            k, v = one_step(kv, seq, k, v, count, torch.cuda.current_stream())
            k, v = one_step(kv, seq, k, v, count)
        slots = kv.slots(seq, 0, len(k))
        keys, values = (x.torch() for x in kv.layer(1, slots))
        at = torch.tensor(slots, device="cuda")
        assert torch.equal(keys[at // BLOCK, at % BLOCK], k)
        assert torch.equal(values[at // BLOCK, at % BLOCK], v)


def test_what_is_queued_may_use_memory_that_is_unmapped_meanwhile(client):
    with client.pool("p") as kv:
        client.exchange(kv, 16 << 20)
        seq, = kv.create()
        k, _ = one_step(kv, seq, *nothing(), 40)
        with kv.step([seq], [1], heads=HEADS) as step:
            query = step.q.torch().copy_(torch.ones(1, HEADS, DIM))
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        queries = query.clone()
        client.exchange(kv, 32 << 20)  # unmaps the one before
        slots = torch.tensor(kv.slots(seq, 0, 40), device="cuda")
        keys, _ = (x.torch() for x in kv.layer(1, slots.tolist()))
        torch.cuda._sleep(200_000_000)
        keys = keys[slots // BLOCK, slots % BLOCK]
    torch.cuda.synchronize()
    assert torch.equal(keys, k) and torch.equal(queries, torch.ones_like(queries))


def test_a_tensors_own_memory_serves_as_the_exchange(client):
    with client.pool("p") as kv:
        whole = torch.zeros(48 << 20, dtype=torch.uint8, device="cuda")
        client.register(kv, whole[16 << 20:32 << 20])  # somewhere inside an allocation
        seq, = kv.create()
        k, v = one_step(kv, seq, *nothing(), 33, torch.cuda.current_stream())
        with kv.step([seq], [1], heads=HEADS) as step:
            assert whole.data_ptr() + (16 << 20) <= step.q.ptr < whole.data_ptr() + (32 << 20)
        with pytest.raises(tinyserve.OutOfMemoryError, match="the registered memory has 16777216"):
            kv.step([seq], [20000], heads=HEADS)
        one_step(kv, seq, k, v, 2)
        assert not whole[:16 << 20].any() and not whole[32 << 20:].any()
        with pytest.raises(tinyserve.InvalidError, match="the size of 4096|an allocation of"):
            client._check(tinyserve.client.lib.ts_exchange_register(kv._open(), whole.data_ptr(),
                                                                    1 << 40))


def test_the_order_is_the_streams(client):
    """q, k and v are written by the stream long after the call has returned."""
    with client.pool("p") as kv:
        client.exchange(kv, 16 << 20)
        seq, = kv.create()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), kv.step([seq], [3], heads=HEADS) as step:
            q, k, v = rows(3, HEADS, DIM), rows(3, KV, DIM), rows(3, KV, DIM)
            results = []
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            for layer in range(LAYERS):
                step.q.torch().copy_(q)
                step.k.torch().copy_(k * (layer + 1))
                step.v.torch().copy_(v)
                step.run(layer, stream=stream)
                results.append(step.out.torch().clone())
            assert not stream.query(), "the calls should have returned before the GPU was done"
            step.commit()  # waits for both layers
            for layer in range(LAYERS):
                expected = reference(q, k * (layer + 1), v)
                assert (results[layer].double() - expected).abs().max() < 1e-4
        assert kv.lengths([seq]) == [3]


def random_step(kv, seqs, counts, stream, seed, graph=False):
    """Both layers of a step with random q, k and v and one variant; what came out."""
    torch.manual_seed(seed)
    results = []
    with kv.step(seqs, counts, heads=HEADS) as step:
        tokens = sum(counts)
        for layer in range(LAYERS):
            q, k, v = rows(tokens, HEADS, DIM), rows(tokens, KV, DIM), rows(tokens, KV, DIM)
            step.q.torch().copy_(q)
            step.k.torch().copy_(k)
            step.v.torch().copy_(v)
            step.sinks.torch().copy_(rows(HEADS))
            more = {"sinks": True, "window": 50, "lse": True} if layer == 1 else {}
            for _ in range(2):  # a captured run is replayed: the first result must not count
                step.out.torch().fill_(float("nan"))
                if stream is None:
                    torch.cuda.synchronize()
                    step.run(layer, **more)
                elif graph:
                    captured = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(captured):
                        step.run(layer, stream=torch.cuda.current_stream(), **more)
                    assert step.out.torch().isnan().all(), "a capture runs nothing"
                    captured.replay()
                    torch.cuda.synchronize()
                else:
                    step.run(layer, stream=stream, **more)
            results += [step.out.torch().clone(), step.lse.torch().clone() if more else None]
        step.commit()
    return results


def test_a_worker_that_attends_itself_gets_the_daemons_bits(provider):
    lengths = [1, 40, 700]
    with common.Daemon(pool_text(provider, ",client_write=all")) as daemon:
        def session(execution):
            return tinyserve.connect(daemon.url, execution=execution)
        with session("daemon") as there, session("local") as here, session("auto") as auto:
            got = []
            for client, stream, graph in ((there, torch.cuda.current_stream(), False),
                                          (here, torch.cuda.current_stream(), False),
                                          (here, None, False), (here, True, True),
                                          (auto, torch.cuda.current_stream(), False)):
                with client.pool("p", writable=True) as kv:
                    client.exchange(kv, 16 << 20)
                    seqs = kv.create(3)
                    mine = random_step(kv, seqs, lengths, stream, 1, graph)
                    seqs.append(kv.fork(seqs[2])[0])  # a shared tail, to be copied
                    mine += random_step(kv, seqs, [1, 2, 1, 3], stream, 2, graph)
                    assert kv.lengths(seqs) == [2, 42, 701, 703]
                    slots = kv.slots(seqs[3], 0, 703)
                    keys, values = (x.torch() for x in kv.layer(1, slots))
                    at = torch.tensor(slots, device="cuda")
                    mine += [keys[at // BLOCK, at % BLOCK], values[at // BLOCK, at % BLOCK]]
                    kv.free(seqs)
                    got.append(mine)
                    if client is auto:  # the first step went both ways, the second the quicker
                        assert client.execution in ("daemon", "local")
                    else:
                        assert client.execution == ("daemon" if client is there else "local")
            for mine in got[1:]:
                for x, y in zip(got[0], mine, strict=True):
                    assert x is y is None or torch.equal(x, y)
            with here.pool("p") as kv:
                with pytest.raises(tinyserve.DeniedError, match="TS_POOL_WRITABLE"):
                    kv.step(kv.create(), [1], heads=HEADS)
        with session("local") as client, client.pool("p", writable=True) as kv:
            with pytest.raises(tinyserve.InvalidError, match="needs q, k, v and out in its memory"):
                kv.step(kv.create(), [1], heads=HEADS)
        with session("auto") as client, client.pool("p", writable=True) as kv:
            client.exchange(kv, 16 << 20)
            for stream in (None, torch.cuda.current_stream()):
                seqs = kv.create(2)
                random_step(kv, seqs, [3, 40], stream, 3)
                assert client.execution == ("auto" if stream is None else decided)
                random_step(kv, seqs, [1, 1], stream, 4)
                decided = client.execution
                assert decided in ("daemon", "local")
        with session("auto") as client, client.pool("p", writable=True) as kv:
            client.exchange(kv, 16 << 20)
            seqs = kv.create(2)
            random_step(kv, seqs, [3, 40], True, 3, True)
            assert client.execution == "local"  # a graph can't be captured the other way
        with session("auto") as client, client.pool("p", writable=True) as kv:
            with kv.step(kv.create(), [1], heads=HEADS) as step:
                step.run(0)
            assert client.execution == "daemon"


@pytest.mark.parametrize("dtype, dim", [("bf16", 64), ("bf16", 128), ("fp8_e4m3", 128)])
def test_a_prefill_needs_no_memory_but_its_own(provider, dtype, dim):
    """By a worker that maps none of the pool's first slab, which is another session's."""
    pool = (f"p:layers=2,kv_heads={KV},head_dim={dim},dtype={dtype},block_tokens={BLOCK},"
            f"memory=64M,slab=8M,device=cuda:0,provider={provider},client_write=all")

    def prefill(kv):
        torch.manual_seed(7)
        results, seqs = [], kv.create(3)
        for counts in ([700, 33, 256], [3, 8, 5]):
            with kv.step(seqs, counts, heads=HEADS, io_dtype="bf16") as step:
                for layer in range(2):
                    for buffer in (step.q, step.k, step.v):
                        buffer.torch().normal_()
                    step.run(layer, stream=torch.cuda.current_stream())
                    results.append(step.out.torch().clone())
                step.commit()
        return results

    with common.Daemon(pool) as daemon, tinyserve.connect(daemon.url) as there, \
            tinyserve.connect(daemon.url, execution="local") as here, \
            there.pool("p", writable=True) as first, here.pool("p", writable=True) as second:
        first.client.exchange(first, 32 << 20)
        second.client.exchange(second, 32 << 20)
        for x, y in zip(prefill(first), prefill(second), strict=True):
            assert torch.equal(x, y)


def test_a_matched_sequence_has_the_bits_of_one_that_computed_all(provider):
    prompt = list(range(200))
    data = [(rows(200, HEADS, DIM), rows(200, KV, DIM), rows(200, KV, DIM)) for _ in range(LAYERS)]

    def add(kv, seq, first, last):
        results = []
        with kv.step([seq], [last - first], heads=HEADS, tokens=prompt[first:last]) as step:
            for layer, (q, k, v) in enumerate(data):
                step.q.torch().copy_(q[first:last])
                step.k.torch().copy_(k[first:last])
                step.v.torch().copy_(v[first:last])
                step.run(layer, stream=torch.cuda.current_stream())
                results.append(step.out.torch().clone())
            step.commit()
        return results

    with common.Daemon(pool_text(provider, ",client_write=all")) as daemon:
        with tinyserve.connect(daemon.url) as there, \
                tinyserve.connect(daemon.url, execution="local") as here:
            pools = [client.pool("p", writable=True) for client in (there, here)]
            for pool in pools:
                pool.client.exchange(pool, 16 << 20)
            seq, = pools[0].create(namespace=b"m")
            add(pools[0], seq, 0, 128)
            whole = add(pools[0], seq, 128, 200)
            pools[0].free([seq])  # from here on it is cached
            for pool in pools:
                found, matched = pool.match(prompt[:129], b"m")
                assert matched == 128
                again = add(pool, found, 128, 200)
                assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
                assert pool.matching([prompt], b"m") == [200 // BLOCK * BLOCK]


def test_runs_that_don_t_fit_in_order_are_refused(client):
    with client.pool("p") as kv, kv.step(kv.create(), [1], heads=HEADS) as step:
        with pytest.raises(tinyserve.InvalidError, match="layer 7; the pool has 2"):
            step.run(7, stream=torch.cuda.current_stream())
        step.run(0, stream=torch.cuda.current_stream())  # the refused one took no number
        step.run(1, stream=torch.cuda.current_stream())
        step.commit()
        torch.cuda.synchronize()


def test_variants_agree_with_torch(client):
    with client.pool("p") as kv:
        client.exchange(kv, 16 << 20)
        seq, = kv.create()
        k, v = one_step(kv, seq, *nothing(), 50, torch.cuda.current_stream())
        q, new_k, new_v = rows(1, HEADS, DIM), rows(1, KV, DIM), rows(1, KV, DIM)
        k, v = torch.cat([k, new_k]).double(), torch.cat([v, new_v]).double()
        sinks, slopes = rows(HEADS), rows(HEADS).abs() / 4
        with kv.step([seq], [1], heads=HEADS) as step:
            for to, x in ((step.q, q), (step.k, new_k), (step.v, new_v), (step.sinks, sinks),
                          (step.alibi, slopes)):
                to.torch().copy_(x)
            step.run(0, stream=torch.cuda.current_stream(), window=20, soft_cap=3.0, scale=0.3,
                     sinks=True, alibi=True, lse=True)
            group = HEADS // KV
            scores = torch.einsum("hd,thd->ht", q[0].double(), k.repeat_interleave(group, 1)) * 0.3
            distance = torch.arange(-50, 1, device="cuda").double()
            scores = 3.0 * torch.tanh(scores / 3.0) + slopes.double()[:, None] * distance
            scores[:, :-20] = float("-inf")
            lse = scores.logsumexp(-1)
            assert (step.lse.torch()[0].double() - lse).abs().max() < 1e-5
            weights = (scores - torch.logaddexp(lse, sinks.double())[:, None]).exp()
            expected = torch.einsum("ht,thd->hd", weights, v.repeat_interleave(group, 1))
            assert (step.out.torch()[0].double() - expected).abs().max() < 1e-5


WORKER = """
import sys, random, torch, tinyserve
sys.path.insert(0, sys.argv[3])
import test_service as t
with tinyserve.connect(sys.argv[1]) as client, client.pool("p") as kv:
    client.exchange(kv, 16 << 20)
    kept, n = kv.attach("prefix")
    at = torch.tensor(kv.slots(kept, 0, n), device="cuda")
    keys, values = (x.torch() for x in kv.layer(0, at.tolist()))
    k0, v0 = keys[at // t.BLOCK, at % t.BLOCK].clone(), values[at // t.BLOCK, at % t.BLOCK].clone()
    stream = torch.cuda.current_stream()
    rng = random.Random(int(sys.argv[2]))
    rounds = int(sys.argv[4])
    i = 0
    while rounds < 0 or i < rounds:
        i += 1
        seq, = kv.fork(kept)
        k, v = k0, v0
        for _ in range(3):
            k, v = t.one_step(kv, seq, k, v, rng.randint(1, 30),
                              stream if rng.random() < 0.7 else None)
        kv.free([seq])
        if i == 1:
            print("ready", flush=True)
    print("done", flush=True)
"""


def worker(daemon, number, rounds):
    return subprocess.Popen([sys.executable, "-c", WORKER, daemon.url, str(number),
                             str(common.HERE), str(rounds)], stdout=subprocess.PIPE, text=True)


def keep_prefix(client, tokens=100):
    kv = client.pool("p")
    client.exchange(kv, 16 << 20)
    seq, = kv.create()
    k, v = one_step(kv, seq, *nothing(), tokens, torch.cuda.current_stream())
    kv.keep(seq, "prefix")
    return kv, seq, k, v


def tsctl(daemon, *words):
    return subprocess.run([common.TSCTL, "--socket", daemon.url, *words], check=True, text=True,
                          stdout=subprocess.PIPE).stdout


def used_blocks(daemon):
    return json.loads(tsctl(daemon, "pools", "--json"))[0]["used_blocks"]


def check(daemon):
    tsctl(daemon, "check")


def await_used(daemon, blocks, seconds):
    """Asks until the pool uses `blocks` blocks; how long that took, which is under `seconds`."""
    start = time.monotonic()
    while used_blocks(daemon) != blocks:
        assert time.monotonic() - start < 60, "the blocks never came back"
    took = time.monotonic() - start
    assert took < seconds
    return took


def test_eight_workers_share_a_prefix_while_others_are_killed(client, daemon):
    kv, seq, k, v = keep_prefix(client)
    blocks = used_blocks(daemon)
    steady = [worker(daemon, i, 12) for i in range(4)]
    victims = [worker(daemon, 100 + i, -1) for i in range(4)]
    rng = random.Random(5)
    for victim in victims:
        assert victim.stdout.readline() == "ready\n"
        time_of_death = rng.random() * 0.2
        end = time.monotonic() + time_of_death
        while time.monotonic() < end:
            check(daemon)
        victim.kill()
        victim.wait()
    for process in steady:
        assert process.communicate(timeout=120)[0] == "ready\ndone\n"
        assert process.returncode == 0
    await_used(daemon, blocks, 1.0)
    check(daemon)
    child, = kv.fork(seq)
    one_step(kv, child, k, v, 9, torch.cuda.current_stream())


STUCK = """
import ctypes, sys, torch, tinyserve
with tinyserve.connect(sys.argv[1]) as client, client.pool("p") as kv:
    client.exchange(kv, 16 << 20)
    stream = torch.cuda.current_stream()
    step = kv.step(kv.create(4), [20] * 4, heads=8)
    libc = ctypes.CDLL(None)  # the stream waits for a function of the host: nothing is submitted
    ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc(
        ctypes.c_void_p(stream.cuda_stream), ctypes.cast(libc.sleep, ctypes.c_void_p),
        ctypes.c_void_p(100000))
    step.run(0, stream=stream)
    step.run(1, stream=stream)
    print("stuck", flush=True)
    sys.stdin.read()
"""


def test_a_worker_that_dies_between_its_signals_holds_up_nobody(client, daemon):
    kv, seq, k, v = keep_prefix(client)
    blocks = used_blocks(daemon)
    stuck = [subprocess.Popen([sys.executable, "-c", STUCK, daemon.url], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in stuck:
        assert process.stdout.readline() == "stuck\n"
    assert used_blocks(daemon) == blocks + 2 * 4 * 2
    child, = kv.fork(seq)
    one_step(kv, child, k, v, 5, torch.cuda.current_stream())  # meanwhile
    kv.free([child])
    for process in stuck:
        process.send_signal(signal.SIGKILL)
        process.wait()
    await_used(daemon, blocks, 1.0)
    child, = kv.fork(seq)
    one_step(kv, child, k, v, 5, torch.cuda.current_stream())
    check(daemon)


LATE = """
import ctypes, sys, torch, tinyserve
with tinyserve.connect(sys.argv[1]) as client, client.pool("p") as kv:
    client.exchange(kv, 16 << 20)
    stream = torch.cuda.current_stream()
    seq, = kv.create()
    step = kv.step([seq], [20], heads=8)
    ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc(
        ctypes.c_void_p(stream.cuda_stream), ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p),
        ctypes.c_void_p(4))
    step.run(0, stream=stream)
    try:
        step.commit()
        print("committed")
    except tinyserve.TimedOutError as error:
        print(error)
    torch.cuda.synchronize()
    step.run(0, stream=stream)
    step.run(1, stream=stream)
    step.commit()
    print(kv.lengths([seq])[0])
"""


def test_a_worker_that_submits_too_late_loses_its_run(provider):
    with common.Daemon(pool_text(provider), submit_seconds=1) as daemon:
        printed = subprocess.run([sys.executable, "-c", LATE, daemon.url], stdout=subprocess.PIPE,
                                 text=True, timeout=60, check=True).stdout.splitlines()
        assert "the run of layer 0" in printed[0] and "TS_ETIMEOUT" in printed[0]
        assert printed[1] == "20"  # run again, in time


def test_a_daemon_that_is_killed_leaves_no_stream_waiting(provider):
    daemon = common.Daemon(pool_text(provider))
    client = tinyserve.connect(daemon.url)
    kv = client.pool("p")
    client.exchange(kv, 16 << 20)
    step = kv.step(kv.create(), [1], heads=HEADS)
    stream = torch.cuda.Stream()
    step.run(0, stream=stream)
    stream.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
    step.run(1, stream=stream)
    daemon.process.kill()
    daemon.process.wait()
    stream.synchronize()  # must end
    with pytest.raises(tinyserve.DisconnectedError):
        step.run(0, stream=stream)
    client.close()


VANDAL = """
import sys, torch, tinyserve
client = tinyserve.connect(sys.argv[1])
kv = client.pool("p")
seq, n = kv.attach("prefix")
key, _ = kv.kv(kv.slots(seq, 0, 1)[0], 0)
print(key.torch().sum().item(), flush=True)
key.torch().fill_(1e9)
try:
    torch.cuda.synchronize()
    print("written", flush=True)
except RuntimeError as error:
    print("illegal" if "illegal" in str(error) or "access" in str(error) else error, flush=True)
"""


@pytest.mark.skipif(common.MPS,
                    reason="under MPS a worker's illegal access ends the daemon's context too")
def test_a_write_through_a_read_only_mapping_kills_only_the_writer(client, daemon, provider):
    if provider != "cuda-vmm":
        pytest.skip("cuda-ipc memory can always be written")
    kv, seq, k, v = keep_prefix(client)
    vandal = subprocess.run([sys.executable, "-c", VANDAL, daemon.url], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True, timeout=120)
    assert vandal.stdout.splitlines()[1] == "illegal"
    child, = kv.fork(seq)
    one_step(kv, child, k, v, 7, torch.cuda.current_stream())
    check(daemon)


def test_a_pool_that_doesn_t_fit_is_refused_with_the_numbers(tmp_path, provider):
    total = torch.cuda.get_device_properties(0).total_memory
    log = subprocess.run([os.environ["TS_TEST_DAEMON"], "--socket", str(tmp_path / "s"), "--pool",
                          f"big:layers=32,kv_heads=8,head_dim=128,memory={total + (1 << 30)},"
                          f"device=cuda:0,provider={provider}"], stderr=subprocess.PIPE, text=True,
                         timeout=60)
    assert log.returncode == 1
    assert "are asked for on cuda:0" in log.stderr and "GiB free of" in log.stderr
