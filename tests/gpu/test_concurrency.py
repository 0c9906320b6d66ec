"""Max concurrency within 23.0 GB: 90 % short (64-512 tokens) and 10 % long (2048-4096) sequences of
a cache of 32 heads of 64 in fp32. PyTorch gives each sequence a buffer of the longest length; the
paged pool gives it what it needs. Both hold the tokens for real, and the pool attends over them;
sampled sequences are compared with PyTorch."""

import random
import sys

import common
import tinyserve
import torch

HEADS, DIM, BLOCK, LONGEST = 32, 64, 16, 4096
BUDGET = 23.0e9


def draw(count):
    """The lengths of a batch: the same for every run."""
    rng = random.Random(count)
    return [rng.randint(2048, 4096) if i % 10 == 9 else rng.randint(64, 512) for i in range(count)]


def contiguous(count):
    """Whether PyTorch can allocate K and V for the batch within the budget."""
    try:
        buffers = [torch.empty(count, LONGEST, HEADS, DIM, device="cuda") for _ in range(2)]
        del buffers
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def append_all(kv, seqs, lengths):
    for first in range(0, len(seqs), 500):
        kv.append(seqs[first:first + 500], lengths[first:first + 500])


def paged(kv, client, count, check):
    """Holds the batch and attends over it. Returns (efficiency, worst difference), or None if the
    pool is too small."""
    lengths = draw(count)
    seqs = kv.create(count)
    try:
        append_all(kv, seqs, [n - 1 for n in lengths])
        if not check:  # only whether it fits, the new tokens too
            with kv.step(seqs, [1] * count, run=False):
                pass
            return sum(lengths) / sum((n + BLOCK - 1) // BLOCK * BLOCK for n in lengths), 0.0
        return attend(kv, seqs, lengths)
    except tinyserve.NoSpaceError:
        return None
    finally:
        kv.free(seqs)


def attend(kv, seqs, lengths):
    slots = [kv.slots(s, 0, n - 1) for s, n in zip(seqs, lengths)]
    firsts = [s for some in slots for s in some[::BLOCK]]
    keys, values = (x.torch() for x in kv.layer(0, firsts))
    worst = 0.0
    blocks = torch.tensor(sorted({s // BLOCK for s in firsts}), device="cuda")
    for some in blocks.split(4096):
        keys[some] = torch.randn(len(some), BLOCK, HEADS, DIM, device="cuda")
        values[some] = torch.randn(len(some), BLOCK, HEADS, DIM, device="cuda")
    with kv.step(seqs, [1] * len(seqs)) as step:
        q, k, v, out = (x.torch() for x in (step.q, step.k, step.v, step.out))
        for x in (q, k, v):
            x.normal_()
        out.fill_(float("nan"))
        step.run(0, stream=torch.cuda.current_stream())
        assert not out.isnan().any(), "an output was not written"
        for i in random.Random(1).sample(range(len(seqs)), min(50, len(seqs))):
            at = torch.tensor(slots[i], device="cuda")
            ks = torch.cat([keys[at // BLOCK, at % BLOCK], k[i:i + 1]]).double()
            vs = torch.cat([values[at // BLOCK, at % BLOCK], v[i:i + 1]]).double()
            scores = torch.einsum("hd,thd->ht", q[i].double(), ks) * DIM**-0.5
            expected = torch.einsum("ht,thd->hd", scores.softmax(-1), vs)
            worst = max(worst, (out[i].double() - expected).abs().max().item())
        assert worst < 1e-3, f"attention differs by {worst}"
        step.commit()
    assert kv.lengths(seqs) == lengths
    return sum(lengths) / sum((n + BLOCK - 1) // BLOCK * BLOCK for n in lengths), worst


def main():
    options = common.arguments(__doc__).parse_args()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(BUDGET / total)
    most_contiguous, rows = 0, []
    batches = [100, 200, 300, 400, 800, 1200, 1600, 2000, 2200, 2400, 2500]
    for count in batches:
        if contiguous(count):
            most_contiguous = count
    torch.cuda.set_per_process_memory_fraction(1.0)
    pool = (f"cache:layers=1,kv_heads={HEADS},head_dim={DIM},dtype=fp32,block_tokens={BLOCK},"
            f"memory={int(BUDGET)},client_write=all,device={options.device},"
            f"provider={options.provider}")
    with common.Daemon(pool) as daemon, tinyserve.connect(daemon.url) as client, \
            client.pool("cache", writable=True) as kv:
        client.exchange(kv, 256 << 20)
        print(f"max concurrency within {BUDGET / 1e9:.1f} GB, {common.device_line()}\n")
        most, last = 0, None
        for count in batches:
            result = paged(kv, client, count, True)
            rows.append([count, "OK" if count <= most_contiguous else "out of memory",
                         "OK" if result else "pool full",
                         f"{100 * result[0]:.1f} %" if result else "-",
                         f"{result[1]:.1e}" if result else "-"])
            if result:
                most, last = count, result
        for count in range(most + 10, most + 1000, 10):
            if paged(kv, client, count, False) is None:
                break
            most = count
        last = paged(kv, client, most, True)
        rows.append([most, "", "OK", f"{100 * last[0]:.1f} %", f"{last[1]:.1e}"])
        common.table(["sequences", "contiguous PyTorch", "paged, attended", "efficiency",
                      "max difference"], rows)
        print(f"contiguous: {most_contiguous}; paged: {most}, in steps of 10: "
              f"{most / most_contiguous:.1f} x, at {100 * last[0]:.1f} % efficiency")
        good = most >= 2400 and last[0] >= 0.986
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
