#!/usr/bin/env python3
"""Whether the time of a match tells which tokens another user has cached: one user caches a prompt,
and another asks for it and for one that nobody has, in turn. As root, since it becomes two users.

    python3 tests/python/bench_isolation.py [--repeats 4000] [--tokens 10240]

TS_TEST_DAEMON names the daemon, TINYSERVE_LIBRARY the library. Prints the medians of both, their
ratio in each of ten parts of the run, and the ratio of two prompts that nobody has, the same way.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import tinyserve

POOL = "p:layers=1,kv_heads=1,head_dim=32,dtype=bf16,block_tokens=16,blocks=4096,client_write=all"
PARTS = 10

OWNER = """if True:
    import os, sys, tinyserve
    url, tokens, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.setgid(60001); os.setuid(60001)
    kv = tinyserve.connect(url).pool("p", writable=True)
    seq, = kv.create(namespace=b"model")
    with kv.step([seq], [tokens], run=False, tokens=list(range(seed, seed + tokens))) as step:
        step.commit()
    kv.free([seq])
    print("cached", flush=True)
    sys.stdin.read()
"""

STRANGER = """if True:
    import json, os, random, sys, time, tinyserve
    url, tokens, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.setgid(60002); os.setuid(60002)
    kv = tinyserve.connect(url).pool("p", writable=True)
    prompts = [list(range(seed, seed + tokens)) for seed in (10**6, 2 * 10**6, 3 * 10**6)]
    times = [[], [], []]
    for i in range(repeats):
        for which in random.sample(range(3), 3):
            start = time.perf_counter_ns()
            seq, matched = kv.match(prompts[which], b"model")
            times[which].append(time.perf_counter_ns() - start)
            assert matched == 0
            kv.free([seq])
    print(json.dumps(times))
"""


def parts(times):
    size = len(times) // PARTS
    return [statistics.median(times[i * size:(i + 1) * size]) for i in range(PARTS)]


def ratios(first, second):
    return [a / b for a, b in zip(parts(first), parts(second), strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=10240)
    options = parser.parse_args()
    if os.getuid() != 0:
        sys.exit("bench_isolation.py: only root can be two users")
    if options.repeats < PARTS:
        sys.exit(f"bench_isolation.py: --repeats {options.repeats}; at least {PARTS} are needed")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        url = f"{folder}/s"
        daemon = subprocess.Popen([os.environ["TS_TEST_DAEMON"], "--socket", url, "--pool",
                                   POOL + ",device=host", "--set", "socket_mode=0666", "--set",
                                   "log_level=warning"])
        tinyserve.connect(url, wait=60).close()
        owner = subprocess.Popen([sys.executable, "-c", OWNER, url, str(options.tokens),
                                  str(10**6)], text=True, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
        assert owner.stdout.readline() == "cached\n"
        out = subprocess.run([sys.executable, "-c", STRANGER, url, str(options.tokens),
                              str(options.repeats)], check=True, text=True,
                             stdout=subprocess.PIPE).stdout
        owner.communicate("")
        daemon.terminate()
        daemon.wait()
    theirs, nobodys, nobodys_too = json.loads(out)
    for name, times in (("another user's", theirs), ("nobody's", nobodys),
                        ("nobody's, too", nobodys_too)):
        print(f"{name:16} {statistics.median(times) / 1e3:7.2f} us")
    for name, first in (("another user's / nobody's", theirs),
                        ("nobody's / nobody's", nobodys_too)):
        r = ratios(first, nobodys)
        print(f"{name:26} {statistics.median(r):.3f} ({min(r):.3f}-{max(r):.3f})")


if __name__ == "__main__":
    main()
