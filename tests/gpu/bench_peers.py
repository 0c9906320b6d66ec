#!/usr/bin/env python3
"""The kernels beside their peers on the same shapes: `tsbench attend`, PyTorch's scaled dot product
attention over contiguous K and V (its flash and cuDNN backends), FlashInfer's paged decode and
prefill where the package flashinfer-python is installed, and FlashAttention-3 over contiguous K and
V where fa3-fwd is: the faster of its two calls, for caches and for whole prompts.

    python3 tests/gpu/bench_peers.py [--device cuda:0] [--only 'all new'] [--json peers.json]
                                     [--peers fa3] [--turns 5]

Times are medians, of the kernels alone; there are enough copies of K and V, used in turn, that no
cache helps. `--turns N` measures each N times, one after the other, the card resting before each,
and has the median of these medians and their range: long prompts take what the card's power allows,
so who comes second in a row is slower. Ours writes the new tokens' K and V too where a shape says
so; no peer does. A peer's fp8 has q in fp8 as well, ours bf16. kernels/doc/plot.py draws the JSON.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata

import common
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

try:
    import flashinfer
except ImportError:
    flashinfer = None

try:
    import fa3_fwd_interface as fa3
except ImportError:
    fa3 = None

REPEATS, WARM = 60, 5
REST_S = 1  # before each measurement, if there are several turns
TURNS_BYTES = 512 << 20  # of copies in turn: well beyond the second-level cache
BLOCK = 16

#: name as tsbench has it, and what it is told beside that: that the new tokens' K and V are
#: written, or that the sequences are several workers' in one launch
SHAPES = [
    ("64 x 4096, 32/8/128 bf16", []),
    ("256 x 1024, 32/8/128 bf16", []),
    ("1 x 131072, 32/8/128 bf16", []),
    ("1 x 32768, 32/8/128 bf16", []),
    ("1 x 8192, 32/8/128 bf16", []),
    ("512 x 64-512 + 8 x 32768, 64/8/128 bf16", []),
    ("64 x 4096, 128/1/128 bf16", []),
    ("16 x 16384, 64/8/128 bf16", []),
    ("100 x 777, 28/4/128 bf16", []),
    ("64 x 9216, 8192 shared, 32/8/128 bf16", []),
    ("64 x 9216, 8192 shared, 32/8/128 bf16", ["--runs", "8"]),
    ("64 x 4096, 32/8/128 fp8", []),
    ("256 x 1024, 32/8/128 fp8", []),
    ("16 x 16384, 64/8/128 fp8", []),
    ("64 x 4096, 32/8/128 bf16, 4 new", []),
    ("64 x 4096, 32/8/128 bf16, 8 new", []),
    ("64 x 4096, 32/8/128 bf16, 16 new", []),
    ("64 x 4096, 32/8/128 fp8, 4 new", []),
    ("64 x 4096, 32/8/128 fp8, 8 new", []),
    ("4 x 4096, all new, 32/8/128 bf16", []),
    ("8 x 8704, 512 new, 32/8/128 bf16", []),
    ("1 x 32768, all new, 32/8/128 bf16", []),
    ("2 x 16384, 2048 new, 32/8/128 bf16", []),
    ("16 x 1024, all new, 32/8/128 bf16", ["--append"]),
    ("32 x 512, all new, 32/8/128 bf16", ["--append"]),
    ("4 x 4096, all new, 64/8/64 bf16", []),
    ("4 x 4096, all new, 16/16/256 bf16", []),
    ("4 x 4096, all new, 32/8/128 fp8", []),
    ("8 x 8704, 512 new, 32/8/128 fp8", []),
    ("1 x 32768, all new, 32/8/128 fp8", []),
    ("2 x 16384, 2048 new, 32/8/128 fp8", []),
    ("16 x 1024, all new, 32/8/128 fp8", ["--append"]),
    ("32 x 512, all new, 32/8/128 fp8", ["--append"]),
    ("4 x 4096, all new, 64/8/64 fp8", []),
    ("4 x 4096, all new, 16/16/256 fp8", []),
]


@dataclasses.dataclass
class Shape:
    """What a name says."""
    lengths: list
    new: int
    heads: int
    kv_heads: int
    dim: int
    fp8: bool
    shared: bool


def shape_of(name):
    lengths = []
    for count, least, most in re.findall(r"(\d+) x (\d+)(?:-(\d+))?", name):
        count, least, most = int(count), int(least), int(most or least)
        lengths += [least + (most - least) * i // max(count - 1, 1) for i in range(count)]
    new = re.search(r"(\d+|all) new", name)
    new = 1 if new is None else lengths[0] if new[1] == "all" else int(new[1])
    heads, kv_heads, dim = map(int, re.search(r"(\d+)/(\d+)/(\d+)", name).groups())
    return Shape(lengths, new, heads, kv_heads, dim, "fp8" in name, "shared" in name)


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
    if len(set(shape.lengths)) > 1 or shape.fp8 or shape.shared:
        return None  # it has no ragged batches
    new, heads, kv_heads, dim = shape.new, shape.heads, shape.kv_heads, shape.dim
    batch, tokens = len(shape.lengths), shape.lengths[0]
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
    lengths, new, heads, kv_heads, dim = (shape.lengths, shape.new, shape.heads, shape.kv_heads,
                                          shape.dim)
    if flashinfer is None or shape.fp8 or shape.shared:
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


def flash_attention_3(shape):
    """Its call for caches, which packs heads, and the one for prompts; the faster. None: it isn't
    here, or doesn't take it."""
    if fa3 is None or len(set(shape.lengths)) > 1 or shape.shared:
        return None
    batch, tokens = len(shape.lengths), shape.lengths[0]
    dtype = torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    turns = turns_of(2 * batch * tokens * shape.kv_heads * shape.dim * (1 if shape.fp8 else 2))

    def random(*size):
        # Rounded from fp32, as tsbench's: those of torch.rand in 16 bits have several bits that are
        # always 0, which takes less power, and so less time where the card's power is the bound.
        return torch.rand(*size, device="cuda").mul_(2).sub_(1).to(dtype)

    q = random(batch, shape.new, shape.heads, shape.dim)
    k = [random(batch, tokens, shape.kv_heads, shape.dim) for _ in range(turns)]
    v = [random(batch, tokens, shape.kv_heads, shape.dim) for _ in range(turns)]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    try:
        return min(
            median_us(lambda i: fa3.flash_attn_with_kvcache(q, k[i], v[i], cache_seqlens=lengths,
                                                            causal=True), turns),
            median_us(lambda i: fa3.flash_attn_func(q, k[i], v[i], causal=True), turns))
    except RuntimeError as error:
        print(f"fa3-fwd: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def ours(device, name, told):
    tsbench = common.first(common.ROOT / "bin/tsbench", common.ROOT / "build/tools/tsbench")
    command = [tsbench, "attend", "--device", device, "--json", "--shape", name]
    out = subprocess.run(command + told, text=True, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(out)["rows"][0]


#: name, and its median time for a shape, in µs
PEERS = {
    "sdpa flash": lambda shape: sdpa(shape, SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": lambda shape: sdpa(shape, SDPBackend.CUDNN_ATTENTION),
    "flashinfer": paged,
    "fa3": flash_attention_3,
}


def measure(device, name, told, peers, turns):
    """tsbench's row with the median time of all turns, and by name all times of ours and peers."""
    shape, times, row = shape_of(name), {"ours": []}, None
    for _ in range(turns):
        time.sleep(REST_S if turns > 1 else 0)
        row = ours(device, name, told)
        times["ours"].append(row["us"])
        for peer in peers:
            time.sleep(REST_S if turns > 1 else 0)
            us = PEERS[peer](shape)
            torch.cuda.empty_cache()
            times.setdefault(peer, []).extend([] if us is None else [us])
    median = statistics.median(times["ours"])
    for rate in "ratio", "GB_s", "TFLOP_s":
        row[rate] *= row["us"] / median
    row["us"] = median
    return row, times


def shown(times):
    """The median, and from several the range."""
    if not times:
        return "-"
    text = f"{statistics.median(times):.1f}"
    return text if len(times) == 1 else f"{text} ({min(times):.0f}-{max(times):.0f})"


def main():
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--only", default="", help="shapes whose name has this")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of them (default: all)")
    parser.add_argument("--turns", type=int, default=1, help="measure each so often, by turns")
    options = parser.parse_args()
    names = [name for name in options.peers.split(",") if name]
    if not set(names) <= set(PEERS) or options.turns < 1:
        parser.error(f"--peers is of {','.join(PEERS)}, and --turns 1 or more")
    torch.cuda.set_device(options.device)
    torch.manual_seed(1)
    rows, figures = [], []
    for name, told in ((n, t) for n, t in SHAPES if options.only in n):
        row, times = measure(options.device, name, told, names, options.turns)
        name = " ".join([name, *told])
        peers = {peer: statistics.median(times[peer]) if times[peer] else None for peer in names}
        known = [us for us in peers.values() if us is not None]
        rows.append([name, shown(times["ours"]), f"{row['ratio']:.2f}", f"{row['TFLOP_s']:.0f}",
                     *(shown(times[peer]) for peer in names),
                     f"{min(known) / row['us']:.2f}" if known else "-"])
        figures.append({"shape": name, "us": row["us"], "ratio": row["ratio"],
                        "GB_s": row["GB_s"], "read_GB_s": row["read_GB_s"],
                        "TFLOP_s": row["TFLOP_s"], "peers_us": peers})
    print(f"{common.device_line()}, torch {torch.__version__}, flashinfer "
          f"{flashinfer.__version__ if flashinfer else 'not installed'}, fa3-fwd "
          f"{metadata.version('fa3-fwd') if fa3 else 'not installed'}; "
          f"µs, medians of {REPEATS}"
          f"{f', and of {options.turns} turns' if options.turns > 1 else ''}\n")
    common.table(["shape", "ours", "of read rate", "TFLOP/s", *names, "best peer / ours"], rows)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"device": common.device_line(), "torch": torch.__version__,
                       "flashinfer": flashinfer.__version__ if flashinfer else None,
                       "fa3": metadata.version("fa3-fwd") if fa3 else None,
                       "turns": options.turns, "shapes": figures}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "error")
    main()
