"""The page at /, in a real browser where there is one (CHROMIUM names it), and its figures."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from browser import Browser
from test_metrics import ask, free_port

import tinyserve

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
POOLS = ["tiny:layers=1,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=4,blocks=64",
         "larger:layers=1,kv_heads=1,head_dim=32,dtype=fp8_e4m3,block_tokens=16,blocks=5000"]


@pytest.fixture(params=["all"])
def show(request):
    return request.param


totals = pytest.mark.parametrize("show", ["totals"], indirect=True)


@pytest.fixture
def populated(start_daemon, show):
    """A daemon's address and HTTP port; a session with a kept prefix, two forks, one alone."""
    port = free_port()
    daemon = start_daemon(*POOLS, settings={"metrics": f"127.0.0.1:{port}", "metrics_show": show})
    with tinyserve.connect(daemon.url, program="<b>one</b>") as one, \
            tinyserve.connect(daemon.url, program="two") as two:
        kv, other = one.pool("tiny"), two.pool("tiny")

        def grow(pool, seqs, counts):
            with pool.step(seqs, counts) as step:
                step.run(0)
                step.commit()

        prefix, = kv.create()
        grow(kv, [prefix], [10])
        kv.keep(prefix, "a-secret-name")
        forks = kv.fork(prefix, 2)
        grow(kv, forks, [1, 7])
        mine = other.fork(prefix)
        lone, = other.create()
        grow(other, [mine[0], lone], [1, 5])
        while len(tsctl(daemon, "sessions")) > 3:
            pass  # the session that waited for the daemon is still being closed
        yield daemon, port


def tsctl(daemon, *words):
    result = subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "--json", *words],
                            check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout)


def test_stats_are_tsctls_and_tell_no_sequences_name(populated):
    daemon, port = populated
    answer, text = ask(port, "/stats.json")
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none';")
    assert "a-secret-name" not in text
    got = json.loads(text)
    assert [p["frag"] for p in got["pools"]] == [tsctl(daemon, "frag", "-P", n)
                                                 for n in ("tiny", "larger")]
    assert [p["map"] for p in got["pools"]] == [tsctl(daemon, "map", "-P", n)
                                                for n in ("tiny", "larger")]
    names = {s.pop("name") for s in tsctl(daemon, "seqs", "-P", "tiny")}
    assert names == {"", "a-secret-name"}
    seqs = tsctl(daemon, "seqs", "-P", "tiny")
    assert got["pools"][0]["seqs"] == [{k: v for k, v in s.items() if k != "name"} for s in seqs]
    assert sorted(s["program"] for s in got["sessions"]) == ["<b>one</b>", "two"]


@totals
def test_totals_tell_nothing_of_tenants(populated):
    daemon, port = populated
    text = ask(port, "/stats.json")[1]
    assert "two" not in text and "a-secret-name" not in text
    got = json.loads(text)
    assert got["shows"] == "totals" and got["sessions"] == [] and got["status"]["sessions"] == 2
    assert len(got["pools"]) == 2
    for pool, name in zip(got["pools"], ("tiny", "larger")):
        frag, whole = pool["frag"], tsctl(daemon, "frag", "-P", name)
        assert pool["seqs"] == [] and pool["more_seqs"] is False
        assert frag["tenants"] == [] and frag["lengths"] == [] and frag["longest_tokens"] == 0
        own = ("tenants", "lengths", "longest_tokens", "contiguous_bytes", "others_hidden")
        for field in whole.keys() - set(own):
            assert frag[field] == whole[field], field
        map_, all_ = pool["map"], tsctl(daemon, "map", "-P", name)
        assert map_["used"] == all_["used"] and map_["cached"] == all_["cached"]
        assert map_["owners"] == [2 if used else 0 for used in map_["used"]]
        assert set(map_["tokens"]) == set(map_["shared"]) == {0}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another tenant")
def test_a_tenant_is_shown_its_own_and_totals(start_daemon, tmp_path, run_worker):
    daemon = start_daemon(POOLS[0] + ",slab=4K", settings={"socket_mode": "0666"})
    for folder in tmp_path.parents:
        if folder.owner() == "root" and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    tmp_path.chmod(0o755)
    with tinyserve.connect(daemon.url) as client, client.pool("tiny") as kv:
        seq, = kv.create()
        with kv.step([seq], [23]) as step:
            step.run(0)
            step.commit()
        kv.keep(kv.fork(seq)[0], "roots")
        code = """
import os, sys, subprocess, tinyserve
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with tinyserve.connect(sys.argv[1]) as client, client.pool("tiny") as kv:
    seq, = kv.create()
    with kv.step([seq], [9]) as step:
        step.run(0)
        step.commit()
    for words in (["frag"], ["map"], ["seqs"], ["sessions"]):
        print(subprocess.run([sys.argv[2], "-s", sys.argv[1], "--json", *words], check=True,
                             text=True, stdout=subprocess.PIPE).stdout.replace("\\n", " "))
    print(subprocess.run([sys.argv[2], "-s", sys.argv[1], "map"], check=True, text=True,
                         stdout=subprocess.PIPE).stdout)
"""
        ctl = shutil.copy(os.environ["TS_TEST_TSCTL"], tmp_path / "ctl")
        frag, map_, seqs, sessions, *picture = run_worker(code, daemon.url, str(ctl)).splitlines()
        frag, map_, seqs, sessions = (json.loads(t) for t in (frag, map_, seqs, sessions))
    assert frag["others_hidden"] and map_["others_hidden"]
    assert frag["stored_tokens"] == 32 and frag["seen_tokens"] == 55
    assert frag["pool"]["used_blocks"] == 9
    assert frag["longest_tokens"] == 9 and frag["lengths"] == [{"from": 8, "count": 1}]
    assert [t["uid"] for t in frag["tenants"]] == [65534]
    assert [s["tokens"] for s in seqs] == [9]
    assert {s["uid"] for s in sessions} == {65534}
    used = [i for i, n in enumerate(map_["used"]) if n]
    assert len(used) == 9
    assert [map_["tokens"][i] for i in used] == [0] * 6 + [4, 4, 1]
    assert [map_["shared"][i] for i in used] == [0] * 9
    assert [map_["owners"][i] for i in used[:6]] == [2] * 6
    assert picture[1].split()[1].rstrip("·") == "■■··■■■■██░"


def test_an_id_is_the_same_text_everywhere(populated):
    daemon, port = populated
    got = json.loads(ask(port, "/stats.json")[1])
    sessions, seqs = got["sessions"], got["pools"][0]["seqs"]
    table = subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "seqs", "tiny"],
                           check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()[1:]
    assert [line.split()[0] for line in table] == [s["seq"] for s in seqs]
    assert [line.split()[5] for line in table] == [s["session"] or "-" for s in seqs]
    assert all(re.fullmatch("[0-9a-f]+", s["session"]) for s in sessions)
    kept = next(s["seq"] for s in seqs if s["session"] is None)
    for words in (["seq", "free", kept, "tiny"], ["session", "kick", sessions[0]["session"]]):
        subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "--yes", *words],
                       check=True)
    assert kept not in [s["seq"] for s in tsctl(daemon, "seqs", "tiny")]
    left = [s["session"] for s in tsctl(daemon, "sessions")]
    assert sessions[0]["session"] not in left and sessions[1]["session"] in left


def test_owners_of_blocks_are_told_apart(populated):
    daemon, port = populated
    tiny = json.loads(ask(port, "/stats.json")[1])["pools"][0]
    owner = {s["program"]: int(s["session"], 16) % 2**32 + 3
             for s in json.loads(ask(port, "/stats.json")[1])["sessions"]}
    one, two = owner["<b>one</b>"], owner["two"]
    owners = tiny["map"]["owners"]
    # The prefix's two full blocks are everybody's, its tail is its own, the forks' tails are the
    # sessions'.
    assert owners[:2] == [2, 2] and tiny["map"]["shared"][:2] == [1, 1]
    assert owners.count(1) == 1
    assert owners.count(one) == 4 and owners.count(two) == 3, owners
    assert owners.count(0) == tiny["frag"]["pool"]["free_blocks"]


def test_what_is_cached_is_shown_apart_from_what_is_free(start_daemon):
    port = free_port()
    settings = {"metrics": f"127.0.0.1:{port}", "metrics_show": "all"}
    daemon = start_daemon(POOLS[0], settings=settings)
    with tinyserve.connect(daemon.url) as client, client.pool("tiny") as kv:
        for tokens, frees in (([1] * 10, True), ([2] * 6, False)):
            seq, = kv.create(namespace=b"m")
            with kv.step([seq], [len(tokens)], tokens=tokens) as step:
                step.run(0)
                step.commit()
            if frees:
                kv.free([seq])
        pool = json.loads(ask(port, "/stats.json")[1])["pools"][0]
        picture = subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "map"],
                                 check=True, text=True, stdout=subprocess.PIPE).stdout
        metrics = ask(port, "/metrics")[1]
    # Of ten tokens two whole blocks stay; that of the rest was free, and is in use again.
    assert pool["map"]["cached"] == [1, 1] + [0] * 62
    assert pool["map"]["used"] == [0, 0, 1, 1] + [0] * 60
    summary = pool["frag"]["pool"]
    assert (summary["used_blocks"], summary["cached_blocks"], summary["free_blocks"]) == (2, 2, 60)
    assert "2 used, 0 shared, 2 cached" in picture and " ○○" in picture
    assert 'state="cached"} 2' in metrics and 'state="free"} 60' in metrics


def test_the_page_asks_for_nothing_else_and_lets_nothing_else_run(populated):
    _, port = populated
    (first, text), (second, _) = ask(port, "/"), ask(port, "/")
    assert first.headers["Content-Type"] == "text/html; charset=utf-8"
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"] * 2
    assert not re.search(r"<[^>]* (style|on[a-z]+|src|href)=", text)
    policies = [a.headers["Content-Security-Policy"] for a in (first, second)]
    nonces = [re.search(r"script-src 'nonce-([0-9a-f]{32})'", policy)[1] for policy in policies]
    assert nonces[0] != nonces[1] and text.count(nonces[0]) == 3
    assert policies[0] == (
        f"default-src 'none'; script-src 'nonce-{nonces[0]}'; style-src 'nonce-{nonces[0]}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    assert ask(port, "/", host="tinyserve.example")[0].status == 403
    assert ask(port, "/stats.json", host="tinyserve.example")[0].status == 403


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_tsctls_figures(populated, tmp_path):
    daemon, port = populated
    result = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000",
         "--enable-logging=stderr", "--dump-dom", f"http://127.0.0.1:{port}/"],
        text=True, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    dom = result.stdout
    by_id = dict(re.findall(r'id="([a-z-]+)"[^>]*>([^<]*)<', dom))
    status = tsctl(daemon, "status")
    assert by_id["trouble"] == ""
    assert by_id["sessions"] == "2"
    assert by_id["tokens"] == f"{status['tokens']:,}" == "24"
    assert by_id["refused"] == str(status["refused"])
    sections = [s.split("</section>")[0] for s in dom.split('<section data-pool="')[1:]]
    assert [s.split('"')[0] for s in sections] == ["tiny", "larger"]
    for name, section in zip(("tiny", "larger"), sections):
        shown = dict(re.findall(r'data-is="([a-z_-]+)"[^>]*>([^<]*)<', section))
        frag = tsctl(daemon, "frag", "-P", name)
        for field in ("used_blocks", "shared_blocks", "cached_blocks", "free_blocks", "sequences",
                      "kept_sequences", "open_steps", "evicted_blocks", "waiting_sessions"):
            assert shown[field] == f"{frag['pool'][field]:,}", field
        live = frag["pool"]["used_blocks"] / frag["pool"]["blocks"]
        assert shown["occupancy"] == f"{100 * live:.1f} %"
        assert shown["cached_part"] == "0.0 %" and shown["hit_rate"] == "–"
        assert shown["stored_tokens"] == f"{frag['stored_tokens']:,}"
        assert shown["seen_tokens"] == f"{frag['seen_tokens']:,}"
        assert shown["efficiency"] == f"{100 * frag['efficiency']:.1f} %"
        assert shown["sharing"] == f"{frag['sharing']:.2f} ×"
        assert f"Picture of the blocks: {frag['pool']['used_blocks']:,} used" in section
    programs = re.findall(r'class="word"[^>]*>([^<]*)</td>', dom.split('id="session-rows"')[1])
    assert sorted(html.unescape(p) for p in programs) == ["<b>one</b>", "two"]


@totals
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_of_totals_shows_pools_and_says_where_the_rest_is(populated, tmp_path):
    daemon, port = populated
    cell = "document.querySelector('[data-pool=tiny] [data-is=cell]').textContent"
    with Browser(CHROMIUM, tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until("document.querySelectorAll('[data-pool] canvas[aria-label]').length == 2")
        browser.run("document.querySelector('[data-pool=tiny] canvas').focus()")
        browser.press("ArrowRight")
        assert browser.run(cell) == "Block 0: 1 used"
        used = tsctl(daemon, "frag", "tiny")["pool"]["used_blocks"]
        shown = "document.querySelector('[data-pool=tiny] [data-is=used_blocks]').textContent"
        assert browser.run(shown) == str(used)
        visible = "[...document.querySelectorAll('%s')].filter(e => e.offsetParent).length"
        assert browser.run(visible % ".all") == 0
        assert browser.run(visible % ".totals") == 3
        note = browser.run("document.querySelector('section p.totals').innerText")
        assert "metrics_show = all" in note


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_it_is_used_with_the_keyboard_and_read_by_a_screen_reader(populated, tmp_path):
    daemon, port = populated
    cell = "document.querySelector('[data-pool=tiny] [data-is=cell]').textContent"
    with Browser(CHROMIUM, tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until("document.querySelectorAll('[data-pool] canvas[aria-label]').length == 2")
        # The first stop is the first pool's picture; each arrow says what lies there.
        for _ in range(20):
            browser.press("Tab")
            if browser.run("document.activeElement.localName") == "canvas":
                break
        assert browser.run("document.activeElement.closest('section').dataset.pool") == "tiny"
        used = tsctl(daemon, "map", "-P", "tiny")["used"]
        browser.press("ArrowRight")
        assert browser.run(cell) == "Block 0: 1 used, 1 shared, 4 tokens, several owners'"
        browser.press("ArrowRight")
        assert browser.run(cell) == "Block 1: 1 used, 1 shared, 4 tokens, several owners'"
        browser.press("ArrowRight")
        assert browser.run(cell) == "Block 2: 1 used, 0 shared, 2 tokens, kept sequences'"
        browser.press("ArrowLeft")
        browser.press("ArrowLeft")
        browser.press("ArrowLeft")  # there is nothing before the first
        assert browser.run(cell).startswith("Block 0: 1 used")
        last = len(used) - 1
        for _ in range(last + 5):
            browser.press("ArrowRight")
        assert browser.run(cell) == f"Block {last}: free"
        browser.press("ArrowDown")  # nor below the last line
        assert browser.run(cell) == f"Block {last}: free"
        browser.press("Escape")
        assert browser.run(cell) == ""
        # Everything has a role and a name, and what the keys find is announced.
        tree = browser.accessible()
        assert ("heading", "Pool tiny") in tree and ("heading", "Pool larger") in tree
        picture = [name for role, name in tree if role == "application"]
        assert [p.split(":")[0] for p in picture] == ["Picture of the blocks"] * 2
        assert picture[0].endswith("Arrow keys go from cell to cell.")
        assert {"table", "columnheader", "status"} <= {role for role, _ in tree}
        assert all(name for role, name in tree
                   if role in ("image", "img", "heading", "application"))
        assert browser.run("document.querySelector('[data-pool=tiny] [data-is=cell]')"
                           ".getAttribute('aria-live')") == "polite"
        assert browser.run("document.documentElement.lang") == "en"
        # A pool that is made appears, and goes when it is deleted.
        subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "pool", "create", "third",
                        "layers=1", "kv_heads=1", "head_dim=32", "blocks=8", "device=host"],
                       check=True)
        browser.until("document.querySelector('[data-pool=third]')")
        subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "--yes", "pool", "delete",
                        "third"], check=True)
        browser.until("!document.querySelector('[data-pool=third]')")
