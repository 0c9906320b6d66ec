#!/usr/bin/env python3
"""The kernels beside their peers on the same shapes: `tsbench attend`, PyTorch's scaled dot product
attention over contiguous K and V (its flash and cuDNN backends), and FlashInfer's paged decode and
prefill where the package flashinfer-python is installed.

    python3 tests/gpu/bench_peers.py [--device cuda:0] [--json peers.json]

Times are medians, of the kernels alone; K and V are copied so often, and the copies used in turn,
that no cache helps. kernels/doc/plot.py draws the JSON.
"""

import json
import os
import subprocess
import sys

import common
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

try:
    import flashinfer
except ImportError:
    flashinfer = None

REPEATS, WARM = 60, 5
TURNS_BYTES = 512 << 20  # of copies in turn: well beyond the second-level cache
BLOCK = 16

#: name as tsbench has it: (lengths, new tokens of each, heads, KV heads, head_dim)
SHAPES = {
    "64 x 4096, 32/8/128 bf16": ([4096] * 64, 1, 32, 8, 128),
    "256 x 1024, 32/8/128 bf16": ([1024] * 256, 1, 32, 8, 128),
    "1 x 131072, 32/8/128 bf16": ([131072], 1, 32, 8, 128),
    "1 x 32768, 32/8/128 bf16": ([32768], 1, 32, 8, 128),
    "1 x 8192, 32/8/128 bf16": ([8192], 1, 32, 8, 128),
    "512 x 64-512 + 8 x 32768, 64/8/128 bf16":
        ([64 + 448 * i // 511 for i in range(512)] + [32768] * 8, 1, 64, 8, 128),
    "64 x 4096, 128/1/128 bf16": ([4096] * 64, 1, 128, 1, 128),
    "64 x 4096, 32/8/128 bf16, 4 new": ([4096] * 64, 4, 32, 8, 128),
    "64 x 4096, 32/8/128 bf16, 8 new": ([4096] * 64, 8, 32, 8, 128),
    "4 x 4096, all new, 32/8/128 bf16": ([4096] * 4, 4096, 32, 8, 128),
    "8 x 8704, 512 new, 32/8/128 bf16": ([8704] * 8, 512, 32, 8, 128),
}


def median_us(run, turns):
    """run(i) is timed with i going round the turns; the first ones warm up."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
              for _ in range(REPEATS)]
    for i in range(WARM):
        run(i % turns)
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(events):
        start.record()
        run((WARM + i) % turns)
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) * 1e3 for start, end in events)
    return times[len(times) // 2]


def turns_of(num_bytes):
    return max(2, -(-TURNS_BYTES // num_bytes))


def sdpa(shape, backend):
    """Contiguous [batch, heads, tokens, head_dim]; None: the backend doesn't take the shape."""
    lengths, new, heads, kv_heads, dim = shape
    if len(set(lengths)) > 1:
        return None  # it has no ragged batches
    batch, tokens = len(lengths), lengths[0]
    turns = turns_of(2 * batch * tokens * kv_heads * dim * 2)
    kw = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, heads, new, dim, **kw)
    k = [torch.randn(batch, kv_heads, tokens, dim, **kw) for _ in range(turns)]
    v = [torch.randn(batch, kv_heads, tokens, dim, **kw) for _ in range(turns)]
    causal = {} if new == 1 else {"is_causal": True} if new == tokens else \
        {"attn_mask": causal_lower_right(new, tokens)}

    def run(i):
        F.scaled_dot_product_attention(q, k[i], v[i], enable_gqa=True, **causal)

    try:
        with sdpa_kernel([backend]):
            return median_us(run, turns)
    except (RuntimeError, ValueError):
        return None


def paged(shape):
    """FlashInfer over blocks of 16 in random order; None: it isn't here, or doesn't take it."""
    lengths, new, heads, kv_heads, dim = shape
    if flashinfer is None:
        return None
    counts = torch.tensor([-(-n // BLOCK) for n in lengths])
    blocks = int(counts.sum())
    turns = turns_of(2 * blocks * BLOCK * kv_heads * dim * 2)
    caches = [torch.randn(blocks, 2, BLOCK, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
              for _ in range(turns)]
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()]).cuda()
    order = torch.randperm(blocks).int().cuda()
    last = torch.tensor([(n - 1) % BLOCK + 1 for n in lengths], dtype=torch.int32).cuda()
    q = torch.randn(len(lengths) * new, heads, dim, device="cuda", dtype=torch.bfloat16)
    space = torch.empty(3 << 30, dtype=torch.uint8, device="cuda")
    try:
        if new == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD",
                                                                    use_tensor_cores=True)
            wrapper.plan(starts, order, last, heads, kv_heads, dim, BLOCK,
                         q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
            q_starts = torch.arange(0, len(lengths) * new + 1, new, dtype=torch.int32).cuda()
            wrapper.plan(q_starts, starts, order, last, heads, kv_heads, dim, BLOCK, causal=True,
                         q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        return median_us(lambda i: wrapper.run(q, caches[i]), turns)
    except Exception as error:  # pylint: disable=broad-except
        print(f"flashinfer: {str(error).splitlines()[0] if str(error) else error!r}",
              file=sys.stderr)
        return None


def ours(device):
    tsbench = common.first(common.ROOT / "bin/tsbench", common.ROOT / "build/tools/tsbench")
    out = subprocess.run([tsbench, "attend", "--device", device, "--json"], text=True, check=True,
                         stdout=subprocess.PIPE).stdout
    return {row["shape"]: row for row in json.loads(out)["rows"]}


def main():
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    torch.cuda.set_device(options.device)
    torch.manual_seed(1)
    mine = ours(options.device)
    rows, figures = [], []
    for name, shape in SHAPES.items():
        row = mine[name]
        peers = {"sdpa flash": sdpa(shape, SDPBackend.FLASH_ATTENTION),
                 "sdpa cudnn": sdpa(shape, SDPBackend.CUDNN_ATTENTION),
                 "flashinfer": paged(shape)}
        torch.cuda.empty_cache()
        known = [us for us in peers.values() if us is not None]
        rows.append([name, f"{row['us']:.1f}", f"{row['ratio']:.2f}", f"{row['TFLOP_s']:.0f}",
                     *("-" if us is None else f"{us:.1f}" for us in peers.values()),
                     f"{min(known) / row['us']:.2f}" if known else "-"])
        figures.append({"shape": name, "us": row["us"], "ratio": row["ratio"],
                        "GB_s": row["GB_s"], "read_GB_s": row["read_GB_s"],
                        "TFLOP_s": row["TFLOP_s"], "peers_us": peers})
    print(f"{common.device_line()}, torch {torch.__version__}, flashinfer "
          f"{flashinfer.__version__ if flashinfer else 'not installed'}; "
          f"µs, medians of {REPEATS}\n")
    common.table(["shape", "ours", "of read rate", "TFLOP/s", *peers, "best peer / ours"], rows)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"device": common.device_line(), "torch": torch.__version__,
                       "flashinfer": flashinfer.__version__ if flashinfer else None,
                       "shapes": figures}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "error")
    main()
