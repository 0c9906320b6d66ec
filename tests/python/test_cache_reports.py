"""What operators see of the prefix cache and do to it, and what others see of each other's."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import tinyserve
from test_match import POOL
from test_metrics import ask, free_port, values
from test_waits import open_to_others, until_waiting

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
    pool = got["pool"]
    assert (pool["asked_tokens"], pool["found_tokens"]) == (31 + 5 + 3, 30 + 4)
    assert got["hit_rate"] == pytest.approx(34 / 39)
    assert got["namespaces"] == 3 and pool["cache"] and not got["others_hidden"]
    assert got["largest_namespaces"] == [
        {"namespace": name, "uid": os.getuid(), "blocks": blocks, "asked_tokens": asked,
         "found_tokens": found, "sequences": sequences}
        for name, blocks, asked, found, sequences in (
            ("first", 10, 31, 30, 1), ("second", 4, 5, 4, 2), ("third", 0, 3, 0, 1))]
    assert pool["cached_blocks"] == 2  # of the 40 tokens, 30 are in use again
    assert kv.lengths([live]) == [16]
    tenant, = json.loads(tsctl(url, "--json", "frag"))["tenants"]
    assert (tenant["used_blocks"], tenant["cached_blocks"]) == (12, 2)
    assert " 96.0 KiB used, 16.0 KiB cached, 7 slabs\n" in tsctl(url, "frag")
    text = tsctl(url, "cache", "p")
    assert "  tokens      34 found of 39 asked for (87.2 %)\n" in text
    assert "  blocks      64 total   12 used   2 cached (16.0 KiB)   50 free\n" in text
    assert (f"\n        10 {os.getuid():10}       1           31           30  96.8%  first\n"
            in text)


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
        assert (got["pool"]["blocks"], got["pool"]["used_blocks"]) == (16, 0)
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
        assert got["pool"]["evicted_blocks"] == 56
        ages = got["evicted_by_age"]
        assert [a["up_to_s"] for a in ages] == [1, 10, 60, 600, 3600, None]
        assert sum(a["blocks"] for a in ages) == 56
        assert sum(a["blocks"] for a in ages[:4]) == 56  # this test takes no ten minutes
        assert 0 <= got["evicted_mean_age_s"] < 600
        text = tsctl(url, "cache")
        assert "  evicted     56 blocks, unused for " in text
        assert (f"  by cause    room {room}, limit 8, others 0, resize {resized}, drop 16\n"
                "  by age      up to 1 s ") in text
        assert ", 10 min " in text and ", 1 h 0, longer 0\n" in text


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
    assert [n["namespace"] for n in cache(url)["largest_namespaces"]] == ["other"]
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
        assert got["evicted_by_cause"]["resize"] == got["pool"]["evicted_blocks"]
        assert got["pool"]["evicted_blocks"] + got["pool"]["cached_blocks"] == blocks - 1024
        assert got["pool"]["evicted_blocks"] > 32768
        check(daemon.url)


def test_metrics_have_evictions_by_cause_and_a_histogram_of_ages(start_daemon):
    port = free_port()
    daemon = start_daemon(POOL + MORE + ",tenant_memory=64K",  # 8 blocks
                          settings={"metrics": f"127.0.0.1:{port}"})
    with tinyserve.connect(daemon.url) as client, client.pool("p", writable=True) as kv:
        publish(kv, list(range(20)), b"secret-name")
        publish(kv, list(range(100, 124)), b"other")
        kv.match(list(range(100, 120)), b"other")
        text = ask(port)[1]
        got = values(text)
        blocks = {state: got[f'tinyserve_pool_blocks{{pool="p",state="{state}"}}']
                  for state in ("free", "used", "shared", "cached")}
        assert blocks == {"free": 56, "used": 5, "shared": 0, "cached": 3}
        assert {cause: got[f'tinyserve_evicted_blocks_total{{pool="p",cause="{cause}"}}']
                for cause in ("room", "limit", "others", "resize", "drop")} == {
                    "room": 0, "limit": 3, "others": 0, "resize": 0, "drop": 0}
        age = "tinyserve_evicted_block_age_seconds"
        counts = [got[f'{age}_bucket{{pool="p",le="{le}"}}']
                  for le in ("1", "10", "60", "600", "3600", "+Inf")]
        assert counts == sorted(counts) and counts[3] == counts[-1] == 3
        assert got[f'{age}_count{{pool="p"}}'] == 3
        assert 0 <= got[f'{age}_sum{{pool="p"}}'] < 3 * 600
        assert f"# TYPE {age} histogram" in text
        assert got['tinyserve_prefix_query_tokens_total{pool="p"}'] == 20
        assert got['tinyserve_prefix_hit_tokens_total{pool="p"}'] == 19
        assert got['tinyserve_pool_waiting_sessions{pool="p"}'] == 0
        assert "secret" not in text and b"secret-name".hex() not in text
        if "PROMTOOL" in os.environ:
            subprocess.run([os.environ["PROMTOOL"], "check", "metrics"], input=text, text=True,
                           check=True)


OWNER = """if True:
    import os, sys, threading, tinyserve
    os.setgroups([]); os.setgid(60001); os.setuid(60001)
    url, space, first = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
    def publish(kv, tokens):
        seq, = kv.create(namespace=space)
        with kv.step([seq], [len(tokens)], run=False, tokens=tokens) as step:
            step.commit()
        return seq
    a, b = tinyserve.connect(url), tinyserve.connect(url)
    kv, other = a.pool("p", writable=True), b.pool("p", writable=True)
    kv.free([publish(kv, list(range(first, first + 40)))])
    kv.keep(publish(kv, list(range(first + 500, first + 508))), f"kept-in-{sys.argv[2]}")
    # It is going to compute this, and another session waits for it.
    prompt = list(range(first + 100, first + 120))
    seq, matched = kv.match(prompt, space, wait=600)
    step = kv.step([seq], [16], run=False, tokens=prompt[:16])
    def wait():
        assert other.match(prompt, space, wait=600)[1] == 16
    waiter = threading.Thread(target=wait)
    waiter.start()
    print(matched, flush=True)
    sys.stdin.readline()
    step.commit()
    waiter.join()
    print(kv.matching([list(range(first + 500, first + 509))], space), flush=True)
"""

STRANGER = """if True:
    import json, os, subprocess, sys, tinyserve
    os.setgroups([]); os.setgid(60002); os.setuid(60002)
    url, ctl = sys.argv[1:]
    FIRST = (0, 1000)
    SPACES = (b"alpha", b"bravo")
    def refusal(call, *arguments, **named):
        try:
            return call(*arguments, **named)
        except tinyserve.Error as e:
            return [type(e).__name__, str(e), e.needed, e.free, e.limit, e.cached, e.pinned,
                    e.others]
    def tsctl(*words):
        r = subprocess.run([ctl, "-s", url, *words], text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
        return [r.returncode, r.stdout, r.stderr]
    def reports():
        seen = {words[0]: json.loads(tsctl("--json", *words)[1]) for words in
                (["status"], ["pools"], ["frag"], ["map"], ["seqs"], ["cache"])}
        for name in "pid", "uptime_ms", "requests", "longest_wait_ms":  # by the clock
            del seen["status"][name]
        for seq in seen["seqs"]:
            del seq["seq"], seq["session"]
        for name in "evicted_by_age", "evicted_mean_age_s":  # by the clock
            del seen["cache"][name]
        return seen
    with tinyserve.connect(url) as client, client.pool("p", writable=True) as kv:
        told = [reports()]
        for space in SPACES:
            for first in FIRST:
                for start, tokens in ((0, 41), (500, 9), (100, 20)):
                    prompt = list(range(first + start, first + start + tokens))
                    told.append(kv.matching([prompt], space))
                    seq, matched = kv.match(prompt, space)
                    kv.free([seq])
                    told.append(matched)
                    seq, matched = kv.match(prompt, space, wait=600)
                    kv.free([seq])
                    told.append(matched)
        told.append([list(kv.kept(prefix)) for prefix in ("", "kept-in-")])
        told.append([refusal(kv.attach, f"kept-in-{space.decode()}") for space in SPACES])
        told.append(reports())
        for words in ([], ["--namespace=alpha"], ["--namespace=bravo"], ["--namespace=charlie"],
                      ["--tenant=60001"], ["--tenant=60002"]):
            told.append(tsctl("--yes", "cache", "drop", *words))
        told += [tsctl("cache"), str(kv.stats())]
        seq, = kv.create(namespace=b"mine")
        told.append(refusal(kv.step, [seq], [61 * 4], run=False))
        # All the room that there is: what others have cached goes.
        tokens = list(range(50 * 4))
        with kv.step([seq], [len(tokens)], run=False, tokens=tokens) as step:
            step.commit()
        told.append(refusal(kv.step, [seq], [61 * 4], run=False))
        kv.free([seq])
        told.append(reports())
    print(json.dumps(told))
"""


def what_a_stranger_is_told(start_daemon, folder, run_worker, space, first):
    """Of a pool where another user has content in a namespace of that name, ids from `first` on."""
    daemon = start_daemon(POOL + MORE, settings={"socket_mode": "0666"})
    open_to_others(folder)
    ctl = shutil.copy(os.environ["TS_TEST_TSCTL"], folder / "ctl")
    owner = subprocess.Popen([sys.executable, "-c", OWNER, daemon.url, space, str(first)],
                             text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == "0\n"
    until_waiting(daemon, 1)
    told = json.loads(run_worker(STRANGER, daemon.url, str(ctl)))
    seen = cache(daemon.url)
    for uid, blocks in ((60003, 0), (60002, 50)):  # of nobody, and of the stranger alone
        dropped = json.loads(tsctl(daemon.url, "--yes", "--json", "cache", "drop",
                                   f"--tenant={uid}"))
        assert dropped == {"dropped_blocks": blocks}
    assert [n["uid"] for n in cache(daemon.url)["largest_namespaces"]] == [60001]
    check(daemon.url)
    assert owner.communicate("go on\n")[0] == "[8]\n" and owner.returncode == 0
    daemon.stop()
    return told, seen


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be other tenants")
def test_nobody_is_told_which_tokens_or_names_others_have_cached(start_daemon, tmp_path,
                                                                 run_worker):
    """Two daemons: in one another user has just what is asked for, in the other as much else."""
    one, seen = what_a_stranger_is_told(start_daemon, tmp_path, run_worker, "alpha", 0)
    other, _ = what_a_stranger_is_told(start_daemon, tmp_path, run_worker, "bravo", 1000)
    assert one == other
    # Operators see all, the stranger its own and totals.
    assert {(n["uid"], n["namespace"]) for n in seen["largest_namespaces"]} == {
        (60001, "alpha"), (60002, "mine")}
    first, last = one[0]["cache"], one[-1]["cache"]
    assert first["others_hidden"] and first["namespaces"] == 0
    assert first["pool"]["cached_blocks"] == 10 and first["pool"]["waiting_sessions"] == 1
    assert first["pool"]["used_blocks"] == 2 + 4 and one[0]["seqs"] == []
    assert [n["namespace"] for n in last["largest_namespaces"]] == ["mine"]
    assert last["evicted_by_cause"]["others"] > 0
    matches = one[1:37]
    assert matches == [[0], 0, 0] * 12
    drops = one[40:46]
    assert {d[0] for d in drops} == {1} and len({d[2] for d in drops}) == 1
    assert drops[0][2].startswith("tsctl: uid 60002 is no operator: ")
    for name in ("alpha", "bravo", b"alpha".hex(), "kept-in"):
        assert name not in json.dumps([one[0], one[39], *one[46:]])
