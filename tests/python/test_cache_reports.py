"""What operators see of the prefix cache and do to it, and what others see of each other's."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import tinyserve
from test_match import LAYERS, POOL

BLOCK = 4
MORE = ",client_write=all,slab=16K"  # a block is 8 KiB, two to a slab


def run_tsctl(url, *words):
    return subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", url, *words], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)


def tsctl(url, *words):
    result = run_tsctl(url, *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def cache(url, *words):
    return json.loads(tsctl(url, "--json", "cache", *words))


def publish(kv, tokens, space=b"m", *, keep=False):
    """A sequence of the tokens, whose K and V stay what they are; it is freed unless it is kept."""
    seq, = kv.create(namespace=space)
    with kv.step([seq], [len(tokens)], run=False, tokens=tokens) as step:
        step.commit()
    if keep:
        return seq
    kv.free([seq])
    return None


def check(url):
    assert ", 0 problems (" in tsctl(url, "check")


def open_to_others(folder):
    for parent in folder.parents:
        if parent.owner() == "root" and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    folder.chmod(0o755)


@pytest.fixture
def served(start_daemon):
    daemon = start_daemon(POOL + MORE)
    with tinyserve.connect(daemon.url) as client, client.pool("p", writable=True) as kv:
        yield daemon.url, kv


def test_what_was_asked_for_and_found_is_told_by_pool_and_namespace(served):
    url, kv = served
    assert cache(url)["largest_namespaces"] == [] and cache(url)["hit_rate"] == 0
    publish(kv, list(range(40)), b"first")
    live = publish(kv, list(range(100, 116)), b"second", keep=True)
    kv.match(list(range(30)) + [999], b"first")
    kv.match(list(range(100, 105)), b"second")
    kv.match([7, 8, 9], b"third")  # nothing is there; the namespace is, while its sequence is
    kv.matching([list(range(20))], b"first")  # a dry match doesn't count
    got = cache(url)
    assert (got["asked_tokens"], got["found_tokens"]) == (31 + 5 + 3, 30 + 4)
    assert got["hit_rate"] == pytest.approx(34 / 39)
    assert got["namespaces"] == 3 and got["cache"] and not got["others_hidden"]
    assert got["largest_namespaces"] == [
        {"namespace": name, "uid": os.getuid(), "blocks": blocks, "asked_tokens": asked,
         "found_tokens": found, "sequences": sequences}
        for name, blocks, asked, found, sequences in (
            ("first", 10, 31, 30, 1), ("second", 4, 5, 4, 2), ("third", 0, 3, 0, 1))]
    assert got["pool"]["cached_blocks"] == 2  # of the 40 tokens, 30 are in use again
    assert kv.lengths([live]) == [16]
    text = tsctl(url, "cache", "p")
    assert "  tokens      34 found of 39 asked for (87.2 %)\n" in text
    assert "  blocks      64 total   12 used   2 cached (16.0 KiB)   50 free\n" in text
    assert f"\n        10 {os.getuid():10}       1           31           30  96.8%  first\n" in text


def test_evictions_are_told_by_cause_and_age(start_daemon):
    daemon = start_daemon(POOL + MORE + ",tenant_memory=256K")  # 32 of 64 blocks
    url = daemon.url
    with tinyserve.connect(url) as client, client.pool("p", writable=True) as kv:
        assert cache(url)["evicted_by_cause"] == {
            "room": 0, "limit": 0, "others": 0, "resize": 0, "drop": 0}
        for i in range(10):  # 40 blocks
            publish(kv, [i] * 16)
        got = cache(url)
        assert got["pool"]["cached_blocks"] == 32
        assert got["evicted_by_cause"] == {
            "room": 0, "limit": 8, "others": 0, "resize": 0, "drop": 0}
        tsctl(url, "pool", "resize", "p", "128K")  # 16 blocks
        got = cache(url)
        assert got["pool"]["blocks"] == got["pool"]["cached_blocks"] + got["pool"]["free_blocks"]
        resized = got["evicted_by_cause"]["resize"]
        assert resized >= 16
        publish(kv, [100] * (16 * BLOCK))  # all of it
        got = cache(url)
        room = got["evicted_by_cause"]["room"]
        assert room == 32 - resized
        tsctl(url, "--yes", "cache", "drop")
        check(url)
        got = cache(url)
        assert got["evicted_by_cause"] == {
            "room": room, "limit": 8, "others": 0, "resize": resized, "drop": 16}
        assert got["evicted_blocks"] == 56
        ages = got["evicted_by_age"]
        assert [a["up_to_s"] for a in ages] == [1, 10, 60, 600, 3600, None]
        assert sum(a["blocks"] for a in ages) == 56
        assert sum(a["blocks"] for a in ages[:4]) == 56  # this test takes no ten minutes
        assert 0 <= got["evicted_mean_age_s"] < 600
        text = tsctl(url, "cache")
        assert (f"  evicted     56 blocks: {room} for room, 8 at a limit, 0 for others, "
                f"{resized} by resizing, 16 dropped\n") in text
        assert " up to 1 min " in text and ", up to 1 h 0, longer 0\n" in text


def test_the_largest_namespaces_are_told_and_the_others_counted(start_daemon):
    daemon = start_daemon(POOL.replace("blocks=64", "blocks=512") + MORE)
    with tinyserve.connect(daemon.url) as client, client.pool("p", writable=True) as kv:
        for i in range(25):
            publish(kv, [1] * (BLOCK * (1 + i * 7 % 25)), f"n{i}".encode())
        got = cache(daemon.url)
        assert got["namespaces"] == 25
        assert [n["blocks"] for n in got["largest_namespaces"]] == list(range(25, 5, -1))
        assert "namespaces  25, the largest of them:" in tsctl(daemon.url, "cache")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be other tenants")
def test_what_follows_on_more_pages_is_among_the_largest(start_daemon, tmp_path):
    """More namespaces than the daemon looks at in one answer."""
    daemon = start_daemon(POOL + MORE, settings={"socket_mode": "0666"})
    open_to_others(tmp_path)
    code = """if True:
        import os, sys, tinyserve
        os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
        with tinyserve.connect(sys.argv[1]) as c, c.pool("p", writable=True) as kv:
            for i in range(1023):
                kv.create(namespace=f"{i:04}".encode())
            seq, = kv.create(namespace=b"full")
            with kv.step([seq], [8], run=False, tokens=list(range(8))) as step:
                step.commit()
            print("there", flush=True)
            sys.stdin.read()
    """
    workers = [subprocess.Popen([sys.executable, "-c", code, daemon.url, str(60001 + i)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE) for i in range(9)]
    for worker in workers:
        assert worker.stdout.readline() == "there\n"
    got = cache(daemon.url)
    assert got["namespaces"] == 9 * 1024
    largest = got["largest_namespaces"]
    assert [(n["uid"], n["namespace"], n["blocks"]) for n in largest[:9]] == [
        (60001 + i, "full", 2) for i in range(9)]
    assert len(largest) == 20 and largest[9]["blocks"] == 0
    for worker in workers:
        worker.communicate()
        assert worker.returncode == 0


SPACES = {b"plain": "plain", "größe".encode(): "größe", b"\x1b[31mred": "hex:1b5b33316d726564",
          b"nul\0": "hex:6e756c00", b"hex:6d": "hex:6865783a3664", b"\xff" * 64: "hex:" + "ff" * 64}


def test_namespaces_are_escaped_and_named_by_what_is_shown(served):
    url, kv = served
    for space in SPACES:
        publish(kv, [1] * BLOCK, space)
    got = {n["namespace"]: n["blocks"] for n in cache(url)["largest_namespaces"]}
    assert got == {shown: 1 for shown in SPACES.values()}
    text = tsctl(url, "cache")
    assert "\x1b" not in text and "\0" not in text and all(s in text for s in SPACES.values())
    for space, shown in SPACES.items():
        assert kv.matching([[1] * 5], space) == [4]
        assert tsctl(url, "--yes", "cache", "drop", "--namespace", shown) == (
            "dropped: 1 block is found no more\n")
        assert kv.matching([[1] * 5], space) == [0]
    for wrong in ("", "hex:", "hex:6", "hex:6g", "x" * 65, "hex:" + "00" * 65):
        result = run_tsctl(url, "--yes", "cache", "drop", f"--namespace={wrong}")
        assert result.returncode == 2 and "1 to 64 bytes, as text or as hex:" in result.stderr
    check(url)


def test_what_is_dropped_is_found_no_more_and_live_sequences_go_on(served):
    url, kv = served
    a, b = list(range(20)), list(range(50, 90))
    live = publish(kv, a, keep=True)
    publish(kv, b)
    publish(kv, a, b"other")
    result = run_tsctl(url, "cache", "drop")
    assert result.returncode == 2
    assert "Drop the cached prefixes of the pool? Add --yes" in result.stderr
    assert kv.matching([a + [0], b + [0]], b"m") == [20, 40]
    assert tsctl(url, "--yes", "cache", "drop", "p", "--namespace", "m") == (
        "dropped: 15 blocks are found no more\n")
    assert kv.matching([a + [0], b + [0]], b"m") == [0, 0]
    assert kv.matching([a + [0]], b"other") == [20]
    # The live one reads, grows and forks; what it adds isn't found either.
    more = list(range(20, 28))
    with kv.step([live], [8], run=False, tokens=more) as step:
        step.commit()
    fork, = kv.fork(live)
    assert kv.lengths([live, fork]) == [28, 28]
    assert kv.matching([a + more + [0]], b"m") == [0]
    kv.free([live, fork])
    got = cache(url)
    assert [n["namespace"] for n in got["largest_namespaces"]] == ["other"]
    assert got["pool"]["cached_blocks"] == 5 and got["pool"]["used_blocks"] == 0
    # What is computed anew is found.
    publish(kv, a)
    assert kv.matching([a + [0]], b"m") == [20]
    assert json.loads(tsctl(url, "--yes", "--json", "cache", "drop")) == {"dropped_blocks": 10}
    assert kv.matching([a + [0]], b"m") == kv.matching([a + [0]], b"other") == [0]
    check(url)
    assert cache(url)["pool"]["cached_blocks"] == 0


def test_wrong_words_are_refused(served):
    url, _ = served
    for words, part in ((("cache", "nosuch"), "there is no pool 'nosuch'"),
                        (("--yes", "cache", "drop", "nosuch"), "there is no pool 'nosuch'")):
        result = run_tsctl(url, *words)
        assert result.returncode == 1 and part in result.stderr
    for words, part in ((("cache", "--tenant=1"), "--tenant and --namespace are for cache drop"),
                        (("map", "--namespace=m"), "--tenant and --namespace are for cache drop"),
                        (("cache", "drop", "--tenant=-1"), "--tenant -1: not a uid"),
                        (("cache", "drop", "--tenant=4294967296"), "not a uid"),
                        (("cache", "drop", "--tenant=root"), "--tenant root: not a uid")):
        result = run_tsctl(url, *words)
        assert result.returncode == 2 and part in result.stderr, words


def test_a_pool_shrinks_though_more_is_cached_there_than_is_evicted_at_once(start_daemon):
    blocks = 40000
    daemon = start_daemon("large:layers=1,kv_heads=1,head_dim=32,dtype=fp8_e4m3,block_tokens=1,"
                          f"blocks={blocks},slab=64K,client_write=all")
    with tinyserve.connect(daemon.url) as client, client.pool("large", writable=True) as kv:
        publish(kv, list(range(blocks - 1024)))
        assert cache(daemon.url)["pool"]["cached_blocks"] == blocks - 1024
        result = tsctl(daemon.url, "pool", "resize", "large", "64K")
        assert result == "pool large has 1024 blocks of 64 bytes in 1 slabs\n"
        got = cache(daemon.url)
        assert got["evicted_by_cause"]["resize"] == got["evicted_blocks"]
        assert got["evicted_blocks"] + got["pool"]["cached_blocks"] == blocks - 1024
        assert got["evicted_blocks"] > 32768
        check(daemon.url)
