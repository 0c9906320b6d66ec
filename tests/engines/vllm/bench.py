#!/usr/bin/env python3
"""bench.py [ROUNDS]: what sharing saves, and what it costs the scheduler. Run by
`run FOLDER bench`, with a daemon and two engines of its own.

- The time to the first token of a prompt of 993 tokens: computed by the first engine, and found by
  the second, ROUNDS times in turns (9), each with a salt of its own.
- How long the scheduler waited for the daemon, a question: while it answers, while it is paused,
  and while there is none.
- How long a step took when the daemon was paused.
"""

import pathlib
import statistics
import sys
import tempfile

from conftest import REFERENCE, Daemon, Engine

LONG = sum((p["prompt_ids"] + p["output_ids"] for p in REFERENCE), [])[:993]


def line(name, seconds):
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    print(f"{name:34} n {len(ordered):4}  p50 {statistics.median(ordered) * 1e3:7.2f} ms  "
          f"p99 {p99 * 1e3:7.2f} ms  most {ordered[-1] * 1e3:7.2f} ms")


def first_tokens(first, second, rounds):
    cold, warm = [], []
    for i in range(-1, rounds):
        for engine in first, second:
            engine.ask("forget")
        computed = first.generate([LONG], tokens=1, salt=f"round {i}")
        found = second.generate([LONG], tokens=1, salt=f"round {i}")
        assert computed["ids"] == found["ids"]
        assert computed["found"] == [0] and found["found"] == [len(LONG) - 1]
        if i >= 0:  # the first round warms up
            cold.append(computed["seconds"])
            warm.append(found["seconds"])
    line("first token of 993, computed", cold)
    line("first token of 993, found", warm)
    print(f"{'found / computed (medians)':34} "
          f"{statistics.median(warm) / statistics.median(cold):.3f}")


def waits(engine, name, salt, count):
    """Many questions: short prompts, each with a beginning of its own."""
    before = engine.ask("stats")["finder"]["asked"]
    engine.ask("clear_waits")
    for begin in range(0, count, 8):
        prompts = [[1 + (begin + i) // 200, 1 + (begin + i) % 200] + LONG[:300] for i in range(8)]
        engine.generate(prompts, tokens=1, salt=salt)
    stats = engine.ask("stats")
    assert stats["finder"]["asked"] >= before + count
    line(name, stats["waits"])


def main(rounds):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        daemon = Daemon(folder)
        engines = [Engine(folder / f"{i}.log", daemon.url) for i in range(2)]
        try:
            for engine in engines:
                assert engine.ready() is None, engine.ready()
            first_tokens(*engines, rounds)
            waits(engines[0], "asking, the daemon answers", "answers", 400)
            daemon.pause()
            paused = engines[0].generate([LONG[:300]], tokens=1, salt="paused")["seconds"]
            print(f"{'the first step of a paused daemon':34} {paused * 1e3:.0f} ms")
            waits(engines[0], "asking, the daemon is paused", "paused", 400)
            daemon.resume()
            daemon.kill()
            waits(engines[0], "asking, the daemon is killed", "killed", 400)
        finally:
            for engine in engines:
                engine.stop()
            daemon.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
