#!/usr/bin/env python3
"""Random attention against a float64 reference: the Python package and a real tinyserved.

A case is a pool of a random shape, and random steps over random sequences in it. Each step goes
both ways: one session lets the daemon attend, the other attends itself; both must give the same
bits, and those must be what NumPy makes of the stored K and V. Before each step all slots that no
sequence has become NaN, so that reading one shows. After it, all stored K and V must be as they
were written.

    tests/random_attention.py                   # a minute, with a seed of its own
    tests/random_attention.py --seconds 7200
    tests/random_attention.py --seed S --case N # one case again
"""

import argparse
import inspect
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from subprocess import Popen

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TS_TEST_DAEMON", str(ROOT / "build/daemon/tinyserved"))
os.environ.setdefault("TINYSERVE_LIBRARY", str(ROOT / "build/client/libtinyserve.so"))
sys.path.insert(0, str(ROOT / "client/python"))

import tinyserve  # noqa: E402
from tinyserve.records import DTYPE_NAMES  # noqa: E402

MEMORY = 4 << 20  # bytes of a pool, about
STEPS = 6  # of a case
WORK = 30e6  # products of a sequence's q and k in a layer, at most: NumPy is slow
EDGES = (16, 64, 256, 1024)  # tokens of the kernels' tiles, runs and parts


# ---- numbers: how each type is stored, and read as float64 ----

def _fp8_values():
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    return np.ldexp(np.where(exponent == 0, mantissa, mantissa + 8.0),
                    np.where(exponent == 0, 1, exponent) - 10)


FP8 = _fp8_values()  # of codes without a sign; the last is NaN's


def encode(x, dtype):
    """float32 rounded to the type, to the nearest and to even; what is beyond 448 is 448 in fp8."""
    if dtype == "fp32":
        return x.astype(np.float32)
    if dtype == "fp16":
        return x.astype(np.float16)
    bits = x.astype(np.float32).view(np.uint32)
    if dtype == "bf16":
        return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    between = (FP8[:126] + FP8[1:127]) / 2
    low = np.searchsorted(between, np.abs(x), "left")
    high = np.searchsorted(between, np.abs(x), "right")
    code = np.where(low % 2 == 0, low, high)
    return (code | (bits >> 31 << 7)).astype(np.uint8)


def decode(x, dtype):
    if dtype == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(float)
    if dtype == "fp8_e4m3":
        magnitude = np.where(x & 0x7f == 0x7f, np.nan, FP8[x & 0x7f])
        return np.where(x & 0x80, -magnitude, magnitude)
    return x.astype(float)


def elements(view):
    """The view as encode() has it: numbers of fp32 and fp16, bits of the others."""
    return view.numpy() if view.dtype in ("fp32", "fp16") else view.bits()


NAN = {"fp32": np.nan, "fp16": np.nan, "bf16": 0xffff, "fp8_e4m3": 0xff}
ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8_e4m3": 2.0**-4}


# ---- the reference ----

@dataclass
class Variant:
    """What Step.run is asked for."""
    scale: float = 0.0
    soft_cap: float = 0.0
    window: int = 0
    alibi: bool = False
    sinks: bool = False
    rope_theta: float = 0.0
    rope_dims: int = 0
    rope_interleaved: bool = False


OPTIONS = set(inspect.signature(tinyserve.Step.run).parameters) - {"self", "layer", "stream"}
assert OPTIONS == {f.name for f in fields(Variant)} | {"lse", "scales"}, "an option isn't tried"


def turn(x, first, v):
    """Rows [tokens, heads, dim] from position `first` on, turned as rotary embedding has it."""
    dims = v.rope_dims or x.shape[-1]
    if v.rope_theta == 0:
        return x
    pair = np.arange(dims // 2)
    a, b = (2 * pair, 2 * pair + 1) if v.rope_interleaved else (pair, pair + dims // 2)
    turns = np.float64(v.rope_theta)**(-2 * pair / dims)
    angle = (first + np.arange(len(x)))[:, None, None] * turns
    out = x.copy()
    out[..., a] = x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle)
    out[..., b] = x[..., a] * np.sin(angle) + x[..., b] * np.cos(angle)
    return out


def attend(q, k, v, scales, variant, slopes, sinks):
    """The last len(q) tokens over all: outputs, log-sum-exps, and how far outputs may be off."""
    n, heads, dim = q.shape
    group, past = heads // k.shape[1], len(k) - len(q)
    q = turn(q, past, variant)
    scale = variant.scale or np.float32(1 / np.sqrt(np.float32(dim)))
    key, position = np.arange(len(k)), past + np.arange(n)[:, None]
    seen = (key <= position) & ((key > position - variant.window) | (variant.window == 0))
    out, lse, allowed = np.empty((n, heads, dim)), np.empty((n, heads)), np.empty((n, heads))
    for h in range(heads):
        unit = float(scale) * scales[0, h // group]
        s = q[:, h] @ k[:, h // group].T * unit
        size = np.abs(q[:, h]) @ np.abs(np.nan_to_num(k[:, h // group], neginf=0)).T * unit
        if variant.soft_cap:
            s = variant.soft_cap * np.tanh(s / variant.soft_cap)
            size = np.maximum(size, np.abs(s))
        if variant.alibi:
            s = s + slopes[h] * (key - position)
            size = size + np.abs(slopes[h] * (key - position))
        s = np.where(seen, s, -np.inf)
        most = s.max(axis=1, keepdims=True)
        most = np.where(np.isneginf(most), 0, most)
        weights = np.exp(s - most)
        total = weights.sum(axis=1)
        with np.errstate(divide="ignore"):
            lse[:, h] = np.log(total) + most[:, 0]
        if variant.sinks:
            with np.errstate(over="ignore"):
                total = total + np.exp(sinks[h] - most[:, 0])
        total = np.where(total == 0, 1, total)
        values = v[:, h // group] * scales[1, h // group]
        out[:, h] = weights / total[:, None] @ values
        # Of a score's terms fp32 keeps 24 bits each, which are added up.
        off = np.where(weights > 1e-9, size, 0).max(axis=1) * 2**-20 + 4e-6
        allowed[:, h] = off * (1 + np.abs(values).max())
    return out, lse, allowed


# ---- a case ----

@dataclass
class Sequence:
    ids: list  # the daemon's names for it, one a session
    layers: list = field(default_factory=list)  # of each [2 (K, V), tokens, kv_heads, dim], stored

    @property
    def tokens(self):
        return self.layers[0].shape[1]


def pick(rng, *choices):
    return choices[rng.integers(len(choices))]


class Case:
    def __init__(self, seed, number):
        rng = self.rng = np.random.default_rng([seed, number])
        self.dtype = pick(rng, *DTYPE_NAMES)
        self.io = pick(rng, "fp32", "fp32", self.dtype if self.dtype != "fp8_e4m3"
                       else pick(rng, "fp16", "bf16"))
        self.kv_heads, self.group = int(rng.integers(1, 6)), int(pick(rng, 1, 2, 3, 4, 5, 7, 8))
        self.dim = int(pick(rng, 32, 64, 64, 128, 128, 192, 256, rng.integers(32, 257)))
        self.block = int(pick(rng, 1, 3, 4, 7, 16, 16, 17, 64, rng.integers(1, 257)))
        self.layers, self.heads = int(rng.integers(1, 3)), self.kv_heads * self.group
        self.hides = self.dtype != "fp8_e4m3" and rng.random() < 0.2  # some K[0] are -infinity
        size = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8_e4m3": 1}[self.dtype]
        token = self.layers * 2 * self.kv_heads * self.dim * size
        self.blocks = max(12, min(MEMORY // (token * self.block), 6000 // self.block))
        self.layout = pick(rng, "nhd", "hnd")
        kernels = ["auto", "portable"]
        kernels += ["avx2"] if " avx2 " in CPU and " f16c " in CPU else []
        kernels += ["avx512"] if " avx512dq " in CPU and " avx512vl " in CPU else []
        self.settings = {"kernel": pick(rng, *kernels), "threads": int(rng.integers(1, 4))}
        self.transport = pick(rng, "ring", "messages")
        self.sequences = []

    def pool(self):
        return (f"random:layers={self.layers},kv_heads={self.kv_heads},head_dim={self.dim},"
                f"dtype={self.dtype},layout={self.layout},block_tokens={self.block},"
                f"blocks={self.blocks},client_write=all,device=host")

    def run(self):
        with tempfile.TemporaryDirectory(prefix="tinyserve-random.") as folder:
            command = [os.environ["TS_TEST_DAEMON"], "--socket", f"{folder}/s",
                       "--pool", self.pool()]
            for key, value in {"log_level": "warning", **self.settings}.items():
                command += ["--set", f"{key}={value}"]
            daemon = Popen(command)
            try:
                with tinyserve.connect(f"{folder}/s", wait=60, transport=self.transport) as asks, \
                        tinyserve.connect(f"{folder}/s", execution="local",
                                          threads=self.settings["threads"]) as attends:
                    self.ways = [c.pool("random", writable=True) for c in (asks, attends)]
                    self.steps()
            finally:
                if daemon.poll() is not None:
                    print(f"the daemon ended by itself with status {daemon.returncode}")
                daemon.terminate()
                status = daemon.wait(30)
        assert status == 0, f"the daemon ended with status {status}"

    # -- what lies in the pool --

    def slots(self, sequence, way):
        if sequence.tokens == 0:
            return np.empty(0, np.int64)
        return np.array(self.ways[way].slots(sequence.ids[way], 0, sequence.tokens), np.int64)

    def planes(self, layer):
        """K and V of a layer, [blocks, block_tokens, kv_heads, dim]; the pool is one slab."""
        return [elements(view) for view in self.ways[1].layer(layer, [self.a_slot])]

    def hide_unused(self):
        """NaN in all slots that no sequence has."""
        unused = np.ones((self.ways[1].blocks, self.block), bool)
        unused[self.a_slot // self.block, self.a_slot % self.block] = False
        for sequence in self.sequences:
            for way in range(2):
                at = self.slots(sequence, way)
                unused[at // self.block, at % self.block] = False
        for layer in range(self.layers):
            for plane in self.planes(layer):
                plane[unused] = NAN[self.dtype]

    def check_stored(self):
        for sequence in self.sequences:
            for way in range(2):
                at = self.slots(sequence, way)
                for layer in range(self.layers):
                    for plane, meant in zip(self.planes(layer), sequence.layers[layer]):
                        stored = plane[at // self.block, at % self.block]
                        assert stored.tobytes() == meant.tobytes(), "stored K or V changed"

    # -- what is done --

    def variant(self):
        rng = self.rng
        edge = int(pick(rng, self.block, *EDGES)) * int(rng.integers(1, 4))
        v = Variant(scale=pick(rng, 0.0, 0.0, 0.3),
                    soft_cap=pick(rng, 0.0, 0.0, 5.0, 50.0, 1e6, 1e20),
                    window=max(0, int(pick(rng, 0, 0, 1, edge - 1, edge, edge + 1,
                                           rng.integers(1, 2000)))),
                    alibi=rng.random() < 0.3, sinks=rng.random() < 0.3)
        if not self.hides and rng.random() < 0.3:
            v.rope_theta = float(pick(rng, 100, 10000, 500000))
            v.rope_interleaved = bool(rng.integers(2))
            v.rope_dims = int(pick(rng, 2 * rng.integers(1, self.dim // 2 + 1), self.dim // 2 * 2))
        v.scale = float(np.float32(v.scale))
        return v

    def new_tokens(self, sequence):
        rng = self.rng
        n = int(pick(rng, 0, 1, 1, 1, rng.integers(2, 9), rng.integers(9, 100), self.block,
                     16 * rng.integers(1, 8), rng.integers(1, 1200)))
        while n > 1 and n * (sequence.tokens + n) * self.heads * self.dim > WORK:
            n = (n + 1) // 2
        return n

    def rows(self, *shape):
        return encode(self.rng.standard_normal(shape, np.float32), self.io)

    def create(self):
        empty = np.empty((2, 0, self.kv_heads, self.dim), encode(np.zeros(1), self.dtype).dtype)
        self.sequences.append(Sequence([pool.create()[0] for pool in self.ways],
                                       [empty] * self.layers))

    def append(self, sequence):
        """Adds rows that this process writes itself."""
        n = int(pick(self.rng, self.rng.integers(1, 40), self.rng.integers(1, 1500)))
        at = []
        try:
            for pool, i in zip(self.ways, sequence.ids):
                at.append(np.array(pool.append([i], [n]), np.int64))
        except tinyserve.NoSpaceError:
            for _, pool, i in zip(at, self.ways, sequence.ids):
                pool.truncate([i], [sequence.tokens])
            return
        for layer in range(self.layers):
            rows = encode(self.rng.standard_normal((2, n, self.kv_heads, self.dim), np.float32),
                          self.dtype)
            sequence.layers[layer] = np.concatenate([sequence.layers[layer], rows], axis=1)
            for slots in at:
                for plane, part in zip(self.planes(layer), rows):
                    plane[slots // self.block, slots % self.block] = part

    def change(self):
        """Lengthens, forks, cuts or frees a sequence."""
        rng, which = self.rng, self.rng.random()
        sequence = self.sequences[rng.integers(len(self.sequences))]
        length = int(rng.integers(0, sequence.tokens + 1))
        if which < 0.3:
            self.append(sequence)
        elif which < 0.6:
            length = pick(rng, length, sequence.tokens)
            self.sequences.append(Sequence(
                [pool.fork(i, length=length)[0] for pool, i in zip(self.ways, sequence.ids)],
                [layer[:, :length] for layer in sequence.layers]))
        elif which < 0.8:
            for pool, i in zip(self.ways, sequence.ids):
                pool.truncate([i], [length])
            sequence.layers = [layer[:, :length] for layer in sequence.layers]
        elif len(self.sequences) > 2:
            for pool, i in zip(self.ways, sequence.ids):
                pool.free([i])
            self.sequences.remove(sequence)

    def steps(self):
        keeper, = self.ways[1].create()  # keeps the slab, and what is written into its unused slots
        self.a_slot, = self.ways[1].append([keeper], [1])
        for _ in range(2):
            self.create()
        for _ in range(STEPS):
            self.hide_unused()
            self.step()
            self.check_stored()
            if self.rng.random() < 0.7:
                self.change()
                self.check_stored()
            if len(self.sequences) < 4 and self.rng.random() < 0.3:
                self.create()

    def step(self):
        rng = self.rng
        count = int(rng.integers(1, len(self.sequences) + 1))
        batch = [self.sequences[i] for i in rng.permutation(len(self.sequences))[:count]]
        tokens = [self.new_tokens(s) for s in batch]
        if sum(tokens) == 0:
            tokens[0] = 1
        open_steps = []
        try:
            for way, pool in enumerate(self.ways):
                open_steps.append(pool.step([s.ids[way] for s in batch], tokens, heads=self.heads,
                                            io_dtype=self.io))
        except tinyserve.NoSpaceError:
            for step in open_steps:
                step.abort()
            return
        written = [self.layer(open_steps, batch, tokens, layer) for layer in range(self.layers)]
        accepted = [int(rng.integers(0, n + 1)) for n in tokens]
        ends = pick(rng, "all", "all", "some", "none")
        for step in open_steps:
            if ends == "none":
                step.abort()
            else:
                step.commit(None if ends == "all" else accepted)
        first = 0
        for sequence, n, kept in zip(batch, tokens, accepted):
            kept = {"all": n, "some": kept, "none": 0}[ends]
            sequence.layers = [np.concatenate([old, new[:, first:first + kept]], axis=1)
                               for old, new in zip(sequence.layers, written)]
            first += n

    def layer(self, steps, batch, tokens, layer):
        """Runs a layer once or twice; returns what is stored of its new K and V then."""
        rng, total = self.rng, sum(tokens)
        for _ in range(int(rng.integers(1, 3))):
            v = self.variant()
            q, k, values = (self.rows(total, heads, self.dim)
                            for heads in (self.heads, self.kv_heads, self.kv_heads))
            if self.hides:
                q[..., 0] = encode(np.abs(decode(q[..., 0], self.io)) + 0.25, self.io)
                hidden = rng.random(total) < pick(rng, 0, 0.5, 1)
                k[hidden, :, 0] = encode(np.float32([-np.inf]), self.io)
            slopes = np.float32(2.0)**-rng.integers(1, 9, self.heads).astype(np.float32)
            sinks = rng.standard_normal(self.heads, np.float32)
            scales = np.ones((2, self.kv_heads), np.float32)
            if self.dtype == "fp8_e4m3":
                scales = rng.uniform(0.25, 2, scales.shape).astype(np.float32)
            found = []
            for step in steps:
                for view, given in (step.q, q), (step.k, k), (step.v, values):
                    elements(view)[...] = given
                step.alibi[...], step.sinks[...] = slopes, sinks
                if self.dtype == "fp8_e4m3":
                    step.scales[...] = scales
                elements(step.out)[...] = NAN[self.io]
                step.run(layer, lse=True, scales=self.dtype == "fp8_e4m3", **vars(v))
                found.append((elements(step.out).copy(), step.lse.numpy().copy()))
            for daemon, local in zip(*found):
                assert daemon.tobytes() == local.tobytes(), f"the two ways differ: {v}"
            stored = self.written(steps, batch, tokens, layer, k, values, scales, v)
            self.check(batch, tokens, layer, q, stored, scales, v, slopes, sinks, *found[0])
        return stored

    def written(self, steps, batch, tokens, layer, k, values, scales, v):
        """What the slots of the new tokens hold: what was given, turned and rounded."""
        turned, first = decode(k, self.io), 0
        length = np.abs(turned)
        for sequence, n in zip(batch, tokens):
            part = slice(first, first + n)
            turned[part] = turn(turned[part], sequence.tokens, v)
            first += n
        if v.rope_theta:
            length = np.maximum(length, np.abs(turned)) * 2
        exact = [encode(decode(x, self.io).astype(np.float32) / by[:, None], self.dtype)
                 for x, by in zip((k, values), scales)]
        for step in steps:
            at = np.array(step.slots, np.int64)
            stored = np.stack([plane[at // self.block, at % self.block]
                               for plane in self.planes(layer)])
            assert stored[1].tobytes() == exact[1].tobytes(), f"V isn't what was given: {v}"
            if v.rope_theta == 0:
                assert stored[0].tobytes() == exact[0].tobytes(), f"K isn't what was given: {v}"
                continue
            off = np.abs(decode(stored[0], self.dtype) * scales[0][:, None] - turned)
            pairs = np.linalg.norm(length, axis=2, keepdims=True)
            assert (off <= ROUNDING[self.dtype] * 2 * pairs + 0.01 *
                    (self.dtype == "fp8_e4m3")).all(), f"K isn't turned as it is to be: {v}"
        return stored

    def check(self, batch, tokens, layer, q, stored, scales, v, slopes, sinks, out, lse):
        out, q, first = decode(out, self.io), decode(q, self.io), 0
        for sequence, n in zip(batch, tokens):
            part = slice(first, first + n)
            first += n
            if n == 0:
                continue
            k, values = decode(np.concatenate([sequence.layers[layer], stored[:, part]], axis=1),
                               self.dtype)
            right, right_lse, allowed = attend(q[part], k, values, scales.astype(float), v, slopes,
                                               sinks)
            limit = allowed[..., None] + ROUNDING[self.io] * np.abs(right) + 1e-7
            bad = ~(np.abs(out[part] - right) <= limit)
            assert not bad.any(), (
                f"{bad.sum()} of {bad.size} outputs are wrong, {n} new of {len(k)}, {v}: "
                f"{out[part][bad][:3]} in place of {right[bad][:3]} within {limit[bad][:3]}")
            same = lse[part] == right_lse
            with np.errstate(invalid="ignore"):
                bad = ~(same | (np.abs(lse[part] - right_lse) <=
                                allowed + 4e-7 * np.abs(right_lse)))
            assert not bad.any(), (f"log-sum-exps {lse[part][bad][:3]} in place of "
                                   f"{right_lse[bad][:3]}, {n} new of {len(k)}, {v}")


def cpu_flags():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return next((line + " " for line in text.splitlines() if line.startswith("flags")), "")


CPU = cpu_flags()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--case", type=int, help="this one alone")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    end, number = time.monotonic() + options.seconds, options.case or 0
    while True:
        case = Case(options.seed, number)
        try:
            case.run()
        except Exception:
            traceback.print_exc()
            print(f"failed: {case.pool()} io={case.io} heads={case.heads} {case.settings} "
                  f"{case.transport}\nagain: tests/random_attention.py --seed {options.seed} "
                  f"--case {number}", flush=True)
            return 1
        number += 1
        if options.case is not None or time.monotonic() >= end:
            break
    print(f"{number - (options.case or 0)} cases passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
