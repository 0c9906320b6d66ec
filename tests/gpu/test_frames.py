"""Frames: one CUDA graph, captured in one step, serves the steps after it with the daemon's bits.

    python3 -m pytest tests/gpu/test_frames.py
"""

import random
from concurrent.futures import ThreadPoolExecutor

import common
import pytest
import tinyserve
import torch

HEADS, KV, DIM, BLOCK, LAYERS, SEQS = 16, 2, 64, 16, 2, 6


@pytest.fixture(params=["cuda-vmm", "cuda-ipc"])
def daemon(request):
    pool = (f"p:layers={LAYERS},kv_heads={KV},head_dim={DIM},dtype=bf16,block_tokens={BLOCK},"
            f"memory=64M,slab=8M,device=cuda:0,provider={request.param},client_write=all")
    with common.Daemon(pool) as d:
        yield d


def rows(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Worker:
    """Keeps sequences, by numbers of its own, and steps through them one way or the other."""

    def __init__(self, kv, new_tokens=None):
        self.kv, self.seqs, self.graph = kv, {}, None
        self.new_tokens = new_tokens
        self.outs = [torch.empty(SEQS * (new_tokens or 0), HEADS, DIM, device="cuda",
                                 dtype=torch.bfloat16) for _ in range(LAYERS)]
        self.frame = new_tokens and kv.frame(SEQS, new_tokens=new_tokens, heads=HEADS,
                                             io_dtype="bf16")

    def layers(self, step, stream):
        for layer, out in enumerate(self.outs):
            step.run(layer, stream=stream, window=layer * 100)
            out.copy_(step.out.torch())

    def prompt(self, number, length, seed):
        self.seqs[number], = self.kv.create()
        self.step_of([number], [length], seed)

    def step_of(self, batch, counts, seed, accepted=None):
        torch.manual_seed(seed)
        tokens = sum(counts)
        seqs = [self.seqs[n] for n in batch]
        decode = self.frame and counts == [self.new_tokens] * len(batch)
        step = (self.frame.step(seqs) if decode else
                self.kv.step(seqs, counts, heads=HEADS, io_dtype="bf16"))
        with step:
            for view, heads in ((step.q, HEADS), (step.k, KV), (step.v, KV)):
                view.torch()[:tokens].copy_(rows(tokens, heads, DIM))
            results = []
            if decode and self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.layers(step, torch.cuda.current_stream())
            for out in self.outs:
                out.fill_(float("nan"))
            if decode:
                self.graph.replay()
                torch.cuda.synchronize()
                results = [out[:tokens].clone() for out in self.outs]
            else:
                for layer in range(LAYERS):
                    step.run(layer, stream=torch.cuda.current_stream(), window=layer * 100)
                    results.append(step.out.torch().clone())
            step.commit(accepted)
        return results


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_one_graph_serves_many_steps_of_changing_batches_with_the_daemons_bits(daemon, new_tokens):
    chance = random.Random(new_tokens)
    with tinyserve.connect(daemon.url) as there, tinyserve.connect(daemon.url) as here, \
            there.pool("p") as kv_there, here.pool("p", writable=True) as kv_here:
        for client, kv in ((there, kv_there), (here, kv_here)):
            client.exchange(kv, 16 << 20)
        workers = Worker(kv_there), Worker(kv_here, new_tokens)
        number = 0
        for turn in range(60):
            known = sorted(workers[0].seqs)
            if len(known) < 2 or (turn % 7 == 0 and len(known) < 10):
                length = chance.choice([1, 15, 16, 17, 100, 1500, 2900])
                for w in workers:
                    w.prompt(number, length, turn)
                number += 1
            if turn % 11 == 5:  # a shared tail, to be copied when it is written
                parent = chance.choice(known)
                for w in workers:
                    w.seqs[number], = w.kv.fork(w.seqs[parent])
                number += 1
            if turn % 13 == 12:
                gone = chance.choice(known)
                for w in workers:
                    w.kv.free([w.seqs.pop(gone)])
            known = sorted(workers[0].seqs)
            batch = chance.sample(known, chance.randint(1, min(SEQS, len(known))))
            accepted = [chance.randint(0, new_tokens) for _ in batch] if turn % 3 == 0 else None
            got = [w.step_of(batch, [new_tokens] * len(batch), turn, accepted) for w in workers]
            for layer, (x, y) in enumerate(zip(*got, strict=True)):
                assert not x.isnan().any() and torch.equal(x, y), f"turn {turn}, layer {layer}"
        lengths = [w.kv.lengths([w.seqs[n] for n in sorted(w.seqs)]) for w in workers]
        assert lengths[0] == lengths[1]
        assert here.execution == "local"
        graph, outs = workers[1].graph, workers[1].outs
        seqs = list(workers[1].seqs.values())
        slots = [slot for s, n in zip(seqs, kv_here.lengths(seqs))
                 for slot in kv_here.slots(s, 0, n)]
        at = torch.tensor(slots, device="cuda")
        planes = [x.torch() for layer in range(LAYERS) for x in kv_here.layer(layer, slots)]
        before = [x[at // BLOCK, at % BLOCK] for x in planes]
        with kv_here.step(seqs[:1], [4], heads=HEADS, io_dtype="bf16") as step:
            step.abort()  # takes blocks that the graph's last step may have had
        with workers[1].frame.step(seqs[:1]) as step:
            step.out.torch().fill_(7)
        graph.replay()  # while there is no step: nothing is read or written
        torch.cuda.synchronize()
        assert (outs[0][0] == 7).all(), "the graph should have found nothing to do"
        for x, y in zip(before, planes, strict=True):
            assert torch.equal(x, y[at // BLOCK, at % BLOCK])
        workers[1].frame.close()


def test_a_frames_limits_are_named_and_a_refused_step_changes_nothing(daemon):
    with tinyserve.connect(daemon.url) as client, client.pool("p", writable=True) as kv:
        with pytest.raises(tinyserve.InvalidError, match="needs q, k, v and out in its memory"):
            kv.frame(4, heads=HEADS)
        client.exchange(kv, 4 << 20)
        with pytest.raises(tinyserve.InvalidError,
                           match="a frame of 5000 sequences; the limits are 1..4096"):
            kv.frame(5000, heads=HEADS)
        with pytest.raises(tinyserve.InvalidError, match="3 query heads; they must be a multiple"):
            kv.frame(4, heads=3)
        with pytest.raises(tinyserve.InvalidError, match="what kernels v5 and wgmma decode"):
            kv.frame(4, heads=HEADS, new_tokens=100, io_dtype="bf16")
        with pytest.raises(tinyserve.InvalidError, match=r"io_dtype fp16; beside a pool of bf16"):
            kv.frame(4, heads=HEADS, io_dtype="fp16")
        seqs = kv.create(3)
        with kv.frame(2, tokens=40, heads=HEADS, io_dtype="bf16") as frame:
            with pytest.raises(tinyserve.BusyError, match="can't be replaced"):
                client.exchange(kv, 8 << 20)
            with pytest.raises(tinyserve.InvalidError,
                               match="a step of 3 sequences; the frame's limits are 1..2"):
                frame.step(seqs)
            with frame.step(seqs[:2]) as step:
                where = step.q.ptr
                with pytest.raises(tinyserve.BusyError, match="a step that hasn't ended"):
                    frame.step(seqs[2:])
                step.run(0)
                step.run(1)
                step.commit()
            with kv.step(seqs[:1], [38], heads=HEADS, io_dtype="bf16") as step:
                step.commit()
            for _ in range(2):
                with pytest.raises(tinyserve.InvalidError,
                                   match="2 sequences of 42 tokens; the limits are 2 of 40"):
                    frame.step(seqs[:2])
            assert kv.lengths(seqs) == [39, 1, 0]
            with frame.step(seqs[:1]) as step:
                assert step.q.ptr == where
                step.commit()
            assert kv.lengths(seqs) == [40, 1, 0]
    with tinyserve.connect(daemon.url) as client, client.pool("p") as kv:
        client.exchange(kv, 4 << 20)
        with pytest.raises(tinyserve.DeniedError, match="TS_POOL_WRITABLE"):
            kv.frame(4, heads=HEADS)


def test_each_step_of_a_frame_may_have_tokens_a_wait_and_a_priority(daemon):
    with tinyserve.connect(daemon.url) as client, client.pool("p", writable=True) as kv:
        client.exchange(kv, 4 << 20)
        seq, = kv.create(namespace=b"m")
        with kv.frame(1, heads=HEADS, io_dtype="bf16") as frame:
            for token in range(BLOCK):
                with frame.step([seq], [1000 + token], priority=1) as step:
                    for layer in range(LAYERS):
                        step.run(layer)
                    step.commit()
            ids = [1000 + token for token in range(BLOCK)] + [5]
            found, tokens = kv.match(ids, b"m")
            assert tokens == BLOCK
            kv.free([found])
            room = kv.stats()
            rest, = kv.create()
            with kv.step([rest], [room.available * BLOCK], heads=HEADS,
                         io_dtype="bf16", run=False) as step:
                step.commit()
            with pytest.raises(tinyserve.NoSpaceError):
                frame.step([seq], wait=0.05)
            with pytest.raises(ValueError, match="priority"):
                frame.step([seq], priority=2)
            kv.free([rest])
            with frame.step([seq], wait=0.05) as step:
                step.abort()


@pytest.mark.parametrize("execution", ["daemon", "local"])
def test_a_capture_of_another_thread_stays_valid(daemon, execution):
    x, stream, graph = torch.zeros(1, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def work(kv):
        seqs = kv.create(2)
        for count in (1500, 1, 1):  # slabs are mapped; each step waits for the one before
            with kv.step(seqs, [count] * 2, heads=HEADS, io_dtype="bf16") as step:
                for layer in range(LAYERS):
                    step.run(layer, stream=stream)
                step.commit()
        kv.fork(seqs[0])
        kv.free(seqs)

    with tinyserve.connect(daemon.url, execution=execution) as client, \
            client.pool("p", writable=execution == "local") as kv, ThreadPoolExecutor(1) as other:
        client.exchange(kv, 16 << 20)
        other.submit(work, kv).result()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            x += 1
            other.submit(work, kv).result()
            x += 1
        assert client.execution == execution
    graph.replay()
    torch.cuda.synchronize()
    assert x.item() == 2
