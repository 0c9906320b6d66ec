"""The examples of tools/examples, each run as its users run it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import tinyserve

EXAMPLES = pathlib.Path(__file__).parents[2] / "tools" / "examples"
# Built beside tsctl.
BATCHING = pathlib.Path(os.environ["TS_TEST_TSCTL"]).parent / "continuous_batching"
SHAPE = "small:layers=2,kv_heads=2,head_dim=64,dtype=fp32,block_tokens=16"

needs_sources = pytest.mark.skipif(not EXAMPLES.is_dir(),
                                   reason="the tests of a bundle have no sources beside them")
needs_program = pytest.mark.skipif(not BATCHING.exists(), reason="it isn't built here")


def begin(daemon, *command):
    return subprocess.Popen(
        [str(word) for word in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TINYSERVE_URL": daemon.url,
             "PYTHONPATH": os.path.dirname(os.path.dirname(tinyserve.__file__))})


def end(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


@needs_program
def test_continuous_batching_gives_each_request_the_same_text_in_any_company(start_daemon):
    daemon = start_daemon(f"{SHAPE},blocks=4096")
    alone, _ = end(begin(daemon, BATCHING, 64, 1))
    lines = sorted(alone.splitlines())
    assert len(lines) == 64 and all(
        re.fullmatch(r"request \d+: \d+ tokens, digest [0-9a-f]{8}", line) for line in lines)
    assert len(set(line.split(": ")[1] for line in lines)) == 64
    together, told = end(begin(daemon, BATCHING, 64, 32))
    assert sorted(together.splitlines()) == lines
    steps, most, found, put_back = map(int, re.findall(r"\d+", told))
    assert most == 32 and put_back == 0 and found > 64 * 8  # the first run's are still there
    assert together != alone  # they end in another order: the short ones overtake


@needs_program
def test_continuous_batching_goes_on_where_two_workers_lack_room(start_daemon):
    """48 blocks are a fifth of what 32 sequences take; one takes 18 at most."""
    daemon = start_daemon(f"{SHAPE},blocks=48")
    want, _ = end(begin(daemon, BATCHING, 32, 1))
    workers = [begin(daemon, BATCHING, 32, 32) for _ in range(2)]
    for worker in workers:
        assert sorted(end(worker)[0].splitlines()) == sorted(want.splitlines())
    with tinyserve.connect(daemon.url) as client, client.pool("small") as kv:
        assert kv.stats().used == 0


@needs_program
def test_continuous_batching_says_what_it_cannot_do(start_daemon):
    daemon = start_daemon(f"{SHAPE},blocks=8")  # the longest request takes more
    assert "blocks are needed, but pool 'small' has" in end(begin(daemon, BATCHING, 32), 1)[1]
    assert end(begin(daemon, BATCHING, 8, 33), 2)[1] == (
        "continuous_batching: '33' is not a number of 1 to 32\n")


@needs_sources
def test_beam_search_shares_and_its_best_beam_is_worth_the_same_without_forks(start_daemon):
    daemon = start_daemon(f"{SHAPE},blocks=256")
    out, _ = end(begin(daemon, sys.executable, EXAMPLES / "beam_search.py", 8, 40))
    *beams, told = out.splitlines()
    worth = [float(line.split()[0]) for line in beams]
    assert worth == sorted(worth, reverse=True) and len(set(beams)) == 8
    assert all(len(line.split()) == 41 for line in beams)
    used, alone = map(int, re.fullmatch(r"(\d+) blocks hold what (\d+) would without sharing",
                                        told).groups())
    assert alone == 8 * 4 and used < alone
    # A beam of one is the greedy choice, and a wider search is never worse.
    greedy, _ = end(begin(daemon, sys.executable, EXAMPLES / "beam_search.py", 1, 40))
    assert float(greedy.split()[0]) <= worth[0]


@needs_sources
def test_two_processes_compute_their_common_prefix_once(start_daemon):
    daemon = start_daemon(f"{SHAPE},blocks=256")
    questions = "What is K?", "And what is V?"
    workers = [begin(daemon, sys.executable, EXAMPLES / "shared_prefix.py", question)
               for question in questions]
    found = {}
    for question, worker in zip(questions, workers):
        out, _ = end(worker)
        tokens, had, computed, _ = re.fullmatch(
            r"(\d+) tokens: (\d+) found, (\d+) computed; answer (\S+)\n", out).groups()
        assert int(tokens) == int(had) + int(computed) == 640 + len(question)
        found[question] = int(had)
    assert sorted(found.values()) == [0, 640]
    # The other way round, with the first's prefix in the pool, the answers are the same.
    for question in questions:
        assert "640 found" in end(begin(daemon, sys.executable, EXAMPLES / "shared_prefix.py",
                                        question))[0]


@needs_program
def test_continuous_batching_waits_for_room_that_another_holds(start_daemon):
    daemon = start_daemon(f"{SHAPE},blocks=48,client_write=all")
    with tinyserve.connect(daemon.url) as client, client.pool("small", writable=True) as kv:
        seq, = kv.create()
        with kv.step([seq], [48 * 16], run=False) as step:
            step.commit()
        worker = begin(daemon, BATCHING, 4)
        while kv.stats().waiting == 0:
            assert worker.poll() is None
        kv.free([seq])
        out, told = end(worker)
        assert len(out.splitlines()) == 4
