#!/usr/bin/env python3
"""bench_transformers.py [--device cuda] [...]: Transformers on TinyServe beside DynamicCache with
sdpa, in one run on one machine: first that both give the same, then how long a decode step takes,
then how long eight processes take whose prompts begin with the same tokens, and eight whose don't.

Needs what `setup` installs (on a GPU: with TS_ENGINES_CUDA=1, or any environment with torch,
transformers and xxhash) and a built tree: `run` shows the variables. Prints one table.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tinyserve
import tinyserve.transformers as ts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
transformers.logging.set_verbosity_error()


def build(a, device):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8192, hidden_size=a.hidden,
                         intermediate_size=a.hidden * 11 // 4, num_hidden_layers=a.layers,
                         num_attention_heads=a.hidden // a.head_dim,
                         num_key_value_heads=a.kv_heads or a.hidden // a.head_dim,
                         head_dim=a.head_dim, max_position_embeddings=32768)
    torch.set_default_dtype(DTYPES[a.dtype])
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self):
        self.at = []

    def put(self, _):
        self.at.append(time.perf_counter())

    def end(self):
        pass


def generate(model, ids, cache, tokens, clock=None):
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                          do_sample=False, past_key_values=cache, streamer=clock)


def prompt(a, rows, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 8192, (rows, a.context), generator=g).to(a.device)


def check(a, model, kv):
    """Tokens in fp32, and logits in any type."""
    ids = prompt(a, 2)[:, :200]
    other = generate(model, ids, DynamicCache(config=model.config), 16)
    ours = generate(model, ids, kv.cache(ids), 16)
    again = generate(model, ids, kv.cache(ids), 16)
    with torch.no_grad():
        logits = [model(ids, position_ids=torch.arange(200, device=ids.device)[None],
                        past_key_values=c).logits.float() for c in
                  (kv.cache(), DynamicCache(config=model.config))]
    worst = float((logits[0] - logits[1]).abs().max())
    same = torch.equal(ours, other) and torch.equal(again, other)
    if a.dtype == "fp32" and not (same and worst <= 1e-4):
        sys.exit(f"WRONG: tokens {'equal' if same else 'differ'}, logits by {worst:.2e}")
    return [("tokens equal, found anew too", "yes" if same else f"no ({a.dtype})"),
            ("largest difference of a logit", f"{worst:.1e}")]


def steps(a, model, kv, rows):
    """Medians of the milliseconds between two tokens, by turns."""
    ids, times = prompt(a, rows), {"dynamic": [], "pool": []}
    clocks = {"dynamic": lambda: DynamicCache(config=model.config), "pool": lambda: kv.cache(ids)}
    for round_ in range(a.rounds + 1):
        for name, cache in clocks.items():
            clock = Clock() if rows == 1 else None
            if clock is None:
                times_of = _batch_times(model, ids, cache(), a.steps)
            else:
                generate(model, ids, cache(), a.steps + 1, clock)
                times_of = [b - c for b, c in zip(clock.at[2:], clock.at[1:-1])]
            if round_ > 0:  # the first warms up
                times[name] += times_of
    dynamic, pool = (statistics.median(times[n]) * 1000 for n in ("dynamic", "pool"))
    return [(f"decode step, {rows} x {a.context} tokens: DynamicCache + sdpa", f"{dynamic:.2f} ms"),
            ("  TinyServe", f"{pool:.2f} ms"), ("  ratio (at most 1.05)", f"{pool / dynamic:.3f}")]


class _Stop(transformers.StoppingCriteria):
    """Notes the time of each step; streamers serve one row alone."""

    def __init__(self):
        self.at = []

    def __call__(self, input_ids, scores, **_):
        if input_ids.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _batch_times(model, ids, cache, count):
    stop = _Stop()
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count + 1,
                   do_sample=False, past_key_values=cache, stopping_criteria=[stop])
    return [b - c for b, c in zip(stop.at[1:], stop.at[:-1])]


def worker(a):
    """One of several processes: waits for "go", and answers a prompt."""
    model = build(a, a.device)
    g = torch.Generator().manual_seed(1000 if a.shared else 2000 + a.worker)
    begin = torch.randint(0, 8192, (1, a.prefix), generator=g)
    g = torch.Generator().manual_seed(3000 + a.worker)
    rest = torch.randint(0, 8192, (1, a.prompt - a.prefix), generator=g)
    ids = torch.cat([begin, rest], 1).to(a.device)
    kv = ts.attach(model, identity=bytes(16), tokens=a.pool_tokens)
    generate(model, ids[:, -8:], kv.cache(), 2)
    before = kv.stats
    print("ready", flush=True)
    sys.stdin.readline()
    out = generate(model, ids, kv.cache(ids), a.answer)
    print(json.dumps({"found": kv.stats.found - before.found,
                      "tokens": out[0, a.prompt:].tolist()}), flush=True)


def processes(a, arguments, shared):
    """Seconds from the start of all until the last one's end, and tokens that were found."""
    workers = [subprocess.Popen([sys.executable, "-W", "ignore", __file__, *arguments, "--worker",
                                 str(i), *(["--shared"] if shared else [])], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                env={**os.environ, "OMP_WAIT_POLICY": "passive"})
               for i in range(a.processes)]
    for w in workers:
        if w.stdout.readline() != "ready\n":
            sys.exit("a worker failed")
    start = time.perf_counter()
    for w in workers:
        w.stdin.write("go\n")
        w.stdin.flush()
    lines = [w.stdout.readline() for w in workers]
    seconds = time.perf_counter() - start
    for w in workers:
        w.wait()
    return seconds, [json.loads(line)["found"] for line in lines]


def sharing(a, arguments):
    apart, _ = processes(a, arguments, False)
    together, found = processes(a, arguments, True)
    return [(f"{a.processes} processes, {a.prompt} tokens of their own, {a.answer} new",
             f"{apart:.2f} s"),
            (f"  of which {a.prefix} are the same", f"{together:.2f} s"),
            ("  ratio (at most 0.5)", f"{together / apart:.3f}"),
            ("  tokens found", str(sum(found)))]


def arguments_of():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=DTYPES)
    p.add_argument("--layers", type=int, default=24)
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--execution", nargs="+", default=["daemon", "local"])
    p.add_argument("--processes", type=int, default=8)
    p.add_argument("--prompt", type=int, default=4000)
    p.add_argument("--prefix", type=int, default=3000)
    p.add_argument("--answer", type=int, default=8)
    p.add_argument("--pool-tokens", type=int, default=65536)
    p.add_argument("--share-layers", type=int, help="layers of the processes' models, to save time")
    p.add_argument("--only", choices=["steps", "sharing"])
    p.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    p.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.dtype = a.dtype or ("fp32" if a.device == "cpu" else "bf16")
    a.device = "cuda:0" if a.device == "cuda" else a.device  # as the daemon has it
    return a


def main():
    a = arguments_of()
    if a.worker is not None:
        return worker(a)
    with tempfile.TemporaryDirectory() as folder:
        url = str(pathlib.Path(folder, "s"))
        needs = f"layers={a.layers},kv_heads={a.kv_heads or a.hidden // a.head_dim}," \
                f"head_dim={a.head_dim},dtype={a.dtype},block_tokens=16,client_write=all," \
                f"blocks={a.pool_tokens // 16},device={'host' if a.device == 'cpu' else a.device}"
        daemon = subprocess.Popen([os.environ["TS_TEST_DAEMON"], "--config", os.devnull, "--socket",
                                   url, "--set", "log_level=warning", "--pool", f"bench:{needs}"])
        try:
            await_daemon(daemon, url)
            os.environ["TINYSERVE_URL"] = url
            report(a)
        finally:
            daemon.terminate()
            daemon.wait()


def await_daemon(daemon, url):
    while daemon.poll() is None:
        try:
            return tinyserve.connect(url, wait=1).close()
        except tinyserve.DisconnectedError:
            pass
    sys.exit("the daemon ended")


def report(a):
    name = torch.cuda.get_device_name() if a.device.startswith("cuda") else \
        f"{os.cpu_count()} processors"
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{a.layers} layers of {a.hidden}, {a.dtype}")
    if a.only != "sharing":
        model = build(a, a.device)
        for execution in a.execution:
            with ts.attach(model, execution=execution, tokens=a.pool_tokens) as kv:
                print(f"execution: {execution}")
                for row in check(a, model, kv):
                    show(row)
                for rows in a.rows:
                    for row in steps(a, model, kv, rows):
                        show(row)
        del model
    if a.only != "steps":
        arguments = [f"--{k.replace('_', '-')}={getattr(a, k)}" for k in (
            "device", "dtype", "hidden", "head_dim", "kv_heads", "prompt", "prefix", "answer",
            "pool_tokens")] + [f"--layers={a.share_layers or a.layers}"]
        for row in sharing(a, arguments):
            show(row)


def show(row):
    print(f"{row[0]:<66} {row[1]:>12}", flush=True)


if __name__ == "__main__":
    main()
