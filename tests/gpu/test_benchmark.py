"""The original's benchmark: 64 sequences of 1024-4096 tokens, 32 heads of 64, fp32, blocks of 16.
Latency and effective bandwidth of each kernel, through the running daemon, and of PyTorch's masked
matmul and its scaled_dot_product_attention in the same run. Every result is checked first.

A kernel's latency is the time of a layer on the worker's own CUDA stream, the hand-over of the GPU
from process to process and back included; MPS makes that cheap (tests/gpu/with-mps python3 ...)."""

import statistics
import sys

import common
import tinyserve
import torch

SEQUENCES, HEADS, DIM, BLOCK = 64, 32, 64, 16


def timed(work, repeats):
    """Milliseconds of each call, by events on the current stream. The caches are flushed between,
    which takes long enough for the call itself to be queued behind it."""
    flush = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(repeats + 2):
        flush.fill_(i % 251)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end))
    return times


def read_rate():
    """Plain streaming read of 4 GiB, GB/s."""
    x = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    return x.nbytes / statistics.median(timed(lambda: x.sum(), 9)) / 1e6


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    pool = (f"bench:layers=1,kv_heads={HEADS},head_dim={DIM},dtype=fp32,block_tokens={BLOCK},"
            f"memory=6G,client_write=all,device={options.device},provider={options.provider}")
    with common.Daemon(pool) as daemon, tinyserve.connect(daemon.url) as client, \
            client.pool("bench", writable=True) as kv:
        generator = torch.Generator("cuda").manual_seed(1)
        lengths = torch.randint(1024, 4097, (SEQUENCES,),
                                generator=torch.Generator().manual_seed(1))
        lengths = lengths.tolist()
        client.exchange(kv, 64 << 20)
        seqs = kv.create(SEQUENCES)
        # Appended in turns, so that blocks of different sequences alternate; written in place.
        for first in range(0, max(lengths), BLOCK):
            there = [i for i in range(SEQUENCES) if lengths[i] - 1 > first]
            kv.append([seqs[i] for i in there],
                      [min(BLOCK, lengths[i] - 1 - first) for i in there])
        slots = [kv.slots(s, 0, n - 1) for s, n in zip(seqs, lengths)]
        firsts = [s for some in slots for s in some[::BLOCK]]
        keys, values = (x.torch() for x in kv.layer(0, firsts))
        longest = max(lengths)
        k = torch.zeros(SEQUENCES, HEADS, longest, DIM, device="cuda")
        v = torch.zeros_like(k)
        for i, some in enumerate(slots):
            at = torch.tensor(some, device="cuda")
            rows = torch.randn(2, len(some), HEADS, DIM, generator=generator, device="cuda")
            keys[at // BLOCK, at % BLOCK] = rows[0]
            values[at // BLOCK, at % BLOCK] = rows[1]
            k[i, :, :len(some)] = rows[0].transpose(0, 1)
            v[i, :, :len(some)] = rows[1].transpose(0, 1)
        total = sum(lengths)
        bytes_needed = total * HEADS * DIM * 4 * 2
        results = []
        with kv.step(seqs, [1] * SEQUENCES, kernel="v1") as step:
            q, newk, newv = (x.torch() for x in (step.q, step.k, step.v))
            q.normal_(generator=generator)
            newk.normal_(generator=generator)
            newv.normal_(generator=generator)
            query, new = q.clone(), (newk.clone(), newv.clone())
        for i, n in enumerate(lengths):
            k[i, :, n - 1], v[i, :, n - 1] = new[0][i], new[1][i]
        mask = torch.arange(longest, device="cuda")[None, :] < torch.tensor(lengths,
                                                                            device="cuda")[:, None]
        rows_q = query[:, :, None, :]

        def masked():
            scores = rows_q @ k.transpose(-1, -2) * DIM**-0.5
            scores.masked_fill_(~mask[:, None, None, :], float("-inf"))
            return (scores.softmax(-1) @ v)[:, :, 0]

        def sdpa():
            return torch.nn.functional.scaled_dot_product_attention(
                rows_q, k, v, attn_mask=mask[:, None, None, :])[:, :, 0]

        expected = masked()
        assert (sdpa() - expected).abs().max() < 1e-3
        for kernel in common.KERNELS:
            with kv.step(seqs, [1] * SEQUENCES, kernel=kernel) as step:
                for to, x in zip((step.q, step.k, step.v), (query, *new)):
                    to.torch().copy_(x)
                out = step.out.torch()
                out.fill_(float("nan"))
                stream = torch.cuda.current_stream()
                step.run(0, stream=stream)
                error = (out - expected).abs().max().item()
                assert error < 1e-3, f"{kernel}: differs by {error}"
                results.append((kernel, timed(lambda: step.run(0, stream=stream),
                                              options.repeats), error))
        results.append(("PyTorch masked matmul", timed(masked, options.repeats), 0.0))
        results.append(("PyTorch SDPA, masked", timed(sdpa, options.repeats), 0.0))
        rate = read_rate()
        print(f"{SEQUENCES} sequences of {min(lengths)}-{longest} tokens ({total} in all), {HEADS} "
              f"heads of {DIM}, fp32, blocks of {BLOCK}\n{common.device_line()}, {kv.memory}, "
              f"{'with' if common.MPS else 'without'} MPS; K and V: {bytes_needed / 1e9:.2f} GB, "
              f"{bytes_needed / rate / 1e6:.2f} ms at the plain read rate of {rate:.0f} GB/s\n")
        best = min(statistics.median(t) for name, t, _ in results if name.startswith("PyTorch"))
        common.table(["kernel", "latency ms", "least", "GB/s", "of read rate", "x PyTorch",
                      "max difference"],
                     [[name, f"{statistics.median(t):.3f}", f"{min(t):.3f}",
                       f"{bytes_needed / statistics.median(t) / 1e6:.0f}",
                       f"{bytes_needed / statistics.median(t) / 1e6 / rate:.2f}",
                       f"{best / statistics.median(t):.2f}", f"{error:.1e}"]
                      for name, t, error in results])
    return 0


if __name__ == "__main__":
    sys.exit(main())
