"""Attention against PyTorch: random q, k and v in non-contiguous blocks, every kernel, through the
running daemon. Fails where an output differs by more than 1e-3; prints by how much."""

import sys

import common
import tinyserve
import torch


def fill(kv, seqs, lengths, heads, generator, chunk=16):
    """Prefills the sequences in turns, so that their blocks interleave. Returns K and V of each."""
    g = kv.geometry
    stored = [(torch.randn(n, g.kv_heads, g.head_dim, generator=generator, device="cuda"),
               torch.randn(n, g.kv_heads, g.head_dim, generator=generator, device="cuda"))
              for n in lengths]
    done = [0] * len(seqs)
    while any(d < n for d, n in zip(done, lengths)):
        for i, seq in enumerate(seqs):
            count = min(chunk, lengths[i] - done[i])
            if count == 0:
                continue
            with kv.step([seq], [count], heads=heads) as step:
                step.q.torch().zero_()
                step.k.torch().copy_(stored[i][0][done[i]:done[i] + count])
                step.v.torch().copy_(stored[i][1][done[i]:done[i] + count])
                for layer in range(g.layers):
                    step.run(layer, stream=torch.cuda.current_stream())
                step.commit()
            done[i] += count
    return stored


def reference(q, k, v, group):
    """PyTorch: one query token [heads, dim] over k and v [tokens, kv_heads, dim], in float64."""
    k = k.double().repeat_interleave(group, dim=1)
    v = v.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,thd->ht", q.double(), k) / q.shape[-1]**0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def main():
    options = common.arguments(__doc__).parse_args()
    failed = False
    shapes = [  # heads, KV heads, head_dim, dtype, lengths
        (32, 32, 64, "fp32", [37, 120]),  # the original's scenario
        (32, 8, 128, "bf16", [1, 15, 16, 17, 500, 1025, 3000]),
        (32, 8, 128, "fp16", [1, 15, 16, 17, 500, 1025, 3000]),
        (8, 1, 96, "bf16", [777, 64]),
    ]
    print(f"attention against PyTorch (float64), {common.device_line()}\n")
    rows = []
    for heads, kv_heads, dim, dtype, lengths in shapes:
        pool = (f"a:layers=1,kv_heads={kv_heads},head_dim={dim},dtype={dtype},block_tokens=16,"
                f"memory=256M,device={options.device},provider={options.provider}")
        with common.Daemon(pool) as daemon, tinyserve.connect(daemon.url) as client, \
                client.pool("a") as kv:
            client.exchange(kv, 64 << 20)
            generator = torch.Generator("cuda").manual_seed(heads * dim)
            seqs = kv.create(len(lengths))
            stored = fill(kv, seqs, lengths, heads, generator)
            slots = kv.slots(seqs[-1], 0, lengths[-1])
            blocks = [s // 16 for s in slots[::16]]
            assert len(blocks) < 4 or any(b - a != 1 for a, b in zip(blocks, blocks[1:])), \
                "the blocks should not be contiguous"
            for kernel in common.KERNELS:
                with kv.step(seqs, [1] * len(seqs), heads=heads, kernel=kernel) as step:
                    q, k, v, out = (x.torch() for x in (step.q, step.k, step.v, step.out))
                    q.normal_(generator=generator)
                    k.normal_(generator=generator)
                    v.normal_(generator=generator)
                    out.fill_(float("nan"))
                    step.run(0, stream=torch.cuda.current_stream())
                    worst = 0.0
                    for i, (ks, vs) in enumerate(stored):
                        cast = {"fp32": torch.float32, "fp16": torch.float16,
                                "bf16": torch.bfloat16}[dtype]
                        keys = torch.cat([ks, k[i:i + 1]]).to(cast)
                        values = torch.cat([vs, v[i:i + 1]]).to(cast)
                        expected = reference(q[i], keys, values, heads // kv_heads)
                        error = (out[i].double() - expected).abs().max().item()
                        worst = max(worst, error) if error == error else float("nan")
                ok = worst <= 1e-3
                failed |= not ok
                rows.append([f"{heads}/{kv_heads}/{dim} {dtype}", len(lengths), kernel,
                             f"{worst:.1e}", "PASS" if ok else "FAIL"])
    common.table(["heads/KV/dim", "sequences", "kernel", "max difference", ""], rows)
    print("FAILED" if failed else "all kernels agree with PyTorch within 1e-3")
    return failed


if __name__ == "__main__":
    sys.exit(main())
