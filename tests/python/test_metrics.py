"""What the daemon tells over HTTP. PROMTOOL names Prometheus' own checker, if it shall be asked."""

import contextlib
import http.client
import os
import re
import resource
import select
import signal
import socket
import subprocess
import threading

import pytest

import tinyserve

RING_STEPS = 50


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(port, path="/metrics", method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def values(text):
    out = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert re.fullmatch(r'tinyserve_[a-z_]+(\{([a-z]+="[^"]*",?)+\})?', name), line
            assert name not in out
            out[name] = float(value)
    return out


@pytest.fixture
def served(start_daemon):
    port = free_port()
    return start_daemon(settings={"metrics": f"127.0.0.1:{port}"}), port


def test_figures_are_those_of_the_pool(served):
    daemon, port = served
    with tinyserve.connect(daemon.url) as client, client.pool("tiny") as kv:
        a, b = kv.create(2)
        with kv.step([a], [7]) as step:
            for layer in range(2):
                step.q[...] = step.k[...] = step.v[...] = 0
                step.run(layer)
            step.commit()
        c = kv.fork(a)[0]
        kv.keep(b, "kept")
        got = values(ask(port)[1])
        assert got["tinyserve_sessions"] == 1
        assert got["tinyserve_tokens_committed_total"] == 7
        assert got["tinyserve_attends_total"] == 2
        assert got['tinyserve_pool_blocks{pool="tiny",state="free"}'] == 62
        assert got['tinyserve_pool_blocks{pool="tiny",state="used"}'] == 0
        assert got['tinyserve_pool_blocks{pool="tiny",state="shared"}'] == 2
        assert got['tinyserve_pool_sequences{pool="tiny",kept="no"}'] == 2
        assert got['tinyserve_pool_sequences{pool="tiny",kept="yes"}'] == 1
        assert c != a


def test_the_longest_wait_grows_while_a_session_waits_and_ends_with_it(start_daemon):
    port = free_port()
    daemon = start_daemon(
        "tiny:layers=1,kv_heads=1,head_dim=32,block_tokens=4,blocks=64,client_write=all",
        settings={"metrics": f"127.0.0.1:{port}"})

    def longest():
        return values(ask(port)[1])["tinyserve_longest_wait_seconds"]

    with tinyserve.connect(daemon.url) as holder, tinyserve.connect(daemon.url) as waiter:
        holding, wanted = (c.pool("tiny", writable=True) for c in (holder, waiter))
        all_of_it = holding.create(1)
        with holding.step(all_of_it, [64 * 4], run=False) as step:
            step.commit()
        assert longest() == 0

        def wait():
            with wanted.step(wanted.create(1), [1], run=False, wait=600) as step:
                step.commit()

        thread = threading.Thread(target=wait)
        thread.start()
        while longest() == 0:
            pass
        first = longest()
        while longest() == first:
            pass
        assert longest() > first
        holding.free(all_of_it)
        thread.join()
        assert longest() == 0


REFUSED = "tinyserve_requests_refused_total"


@pytest.mark.parametrize("transport", ["messages", "ring"])
def test_refusals_are_counted_by_operation_pool_and_status(start_daemon, capfd, transport):
    port = free_port()
    pools = [f"{name}:layers=1,kv_heads=1,head_dim=32,block_tokens=4,blocks=8,slab=4096"
             for name in ("one", "two")]
    daemon = start_daemon(*pools, settings={"metrics": f"127.0.0.1:{port}"})
    with (tinyserve.connect(daemon.url, transport=transport, exchange_bytes=1 << 20) as client,
          client.pool("one") as kv):
        a, b = kv.create(2)
        step = kv.step([b], [16])
        for _ in range(3):
            with pytest.raises(tinyserve.NoSpaceError):
                kv.step([a], [17])
        with pytest.raises(tinyserve.DeniedError):
            step.commit()
        step.abort()
        with pytest.raises(tinyserve.NotFoundError):
            client.pool("three")
        kv.keep(a, "kept")
        with pytest.raises(tinyserve.NotFoundError):
            kv.attach("not kept")
        with pytest.raises(tinyserve.InvalidError):
            kv.match([1])
        with pytest.raises(tinyserve.NotFoundError):
            kv.redeem(bytes(16))
        got = {n: v for n, v in values(ask(port)[1]).items() if n.startswith(REFUSED)}
        assert got == {
            f'{REFUSED}{{operation="step_begin",pool="one",status="TS_ENOSPC"}}': 3,
            f'{REFUSED}{{operation="step_commit",pool="one",status="TS_EPERM"}}': 1,
            f'{REFUSED}{{operation="pool_open",pool="",status="TS_ENOENT"}}': 1,
            f'{REFUSED}{{operation="seq_attach",pool="one",status="TS_ENOENT"}}': 1,
            f'{REFUSED}{{operation="seq_match",pool="one",status="TS_EINVAL"}}': 1,
            f'{REFUSED}{{operation="seq_redeem",pool="one",status="TS_ENOENT"}}': 1,
        }
    told = [line for line in capfd.readouterr().err.splitlines() if "is full" in line]
    assert told == ["tinyserved: warning: pool 'one' is full: 4 of 8 blocks are used and 0 cached, "
                    f"1 of 1 slabs belong to tenants: uid {os.getuid()} holds 4 in 1 slabs"]


def test_scraping_under_load_gives_counters_that_only_grow(served):
    daemon, port = served
    seen, stop = [], threading.Event()

    def scrape():
        while not stop.is_set() or len(seen) < 20:
            answer, text = ask(port)
            assert answer.status == 200
            seen.append((text, values(text)))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        with tinyserve.connect(daemon.url, transport="messages") as client, \
                client.pool("tiny") as kv:
            for _ in range(200):
                with kv.step(kv.create(1), [3]) as step:
                    step.q[...] = step.k[...] = step.v[...] = 0
                    step.run(0)
                    step.abort()
        with tinyserve.connect(daemon.url, transport="ring") as client, client.pool("tiny") as kv:
            seqs = kv.create(1)
            for _ in range(RING_STEPS):
                with kv.step(seqs, [3]) as step:
                    step.q[...] = step.k[...] = step.v[...] = 0
                    step.run(0)
                    step.abort()
    finally:
        stop.set()
        thread.join()
    text = ask(port)[1]
    seen.append((text, values(text)))
    for (_, before), (_, after) in zip(seen, seen[1:]):
        for name, value in before.items():
            if name.split("{")[0].endswith(("_total", "_count", "_sum", "_bucket")):
                assert after[name] >= value, name
    text, last = seen[-1]
    # What went through the ring is counted apart, entry by entry: create; begin, run and abort.
    for transport, least in (("message", 200), ("ring", 1 + 3 * RING_STEPS)):
        name = "tinyserve_request_duration_seconds"
        buckets = [v for n, v in last.items()
                   if n.startswith(f'{name}_bucket{{transport="{transport}"')]
        assert buckets == sorted(buckets)
        count = last[f'{name}_count{{transport="{transport}"}}']
        assert buckets[-1] == count >= least
        assert transport == "message" or count == least
        assert last[f'{name}_sum{{transport="{transport}"}}'] > 0
    if "PROMTOOL" in os.environ:
        subprocess.run([os.environ["PROMTOOL"], "check", "metrics"], input=text, text=True,
                       check=True)


def test_who_asks_otherwise_is_refused(served):
    _, port = served
    answer, text = ask(port, "/healthz")
    assert (answer.status, text) == (200, "ok\n")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert ask(port, "/metrics?x=1")[0].status == 200
    assert ask(port, host=f"localhost:{port}")[0].status == 200
    assert ask(port, "/healthz", "HEAD")[0].status == 200
    # Through a forwarded port, or by another address of this machine.
    for host in (f"127.0.0.1:{port + 1}", "localhost:80", "LOCALHOST", "192.168.7.7:9470",
                 "[fe80::1]:80"):
        assert ask(port, host=host)[0].status == 200
    for host in ("tinyserve.example", "127.0.0.1.example:9470", "localhost.example", "[localhost]",
                 "1.2.3", "127.0.0.1:99999", "localhost:x", "", "[::1", "<b>\x9b31m"):
        answer, text = ask(port, host=host)
        assert answer.status == 403
        assert "names in metrics_hosts of its configuration" in text
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "\x9b" not in text
    assert ask(port, "/metricsx")[0].status == 404
    assert ask(port, "/nothing")[0].status == 404
    answer, text = ask(port, method="POST")
    assert (answer.status, text) == (405, "Only GET and HEAD are.\n")
    assert answer.headers["Allow"] == "GET, HEAD"
    assert ask(port)[0].headers["Allow"] is None


def test_a_daemon_that_is_drained_is_not_healthy(served):
    daemon, port = served

    def drain(*words):
        subprocess.run([os.environ["TS_TEST_TSCTL"], "--yes", "-s", daemon.url, "drain", *words],
                       check=True, stdout=subprocess.DEVNULL)

    drain()
    answer, text = ask(port, "/healthz")
    assert (answer.status, text) == (503, "the daemon is being drained: it takes no new sessions\n")
    assert ask(port, "/metrics")[0].status == 200
    drain("off")
    assert ask(port, "/healthz")[0].status == 200


def test_hosts_that_are_configured_may_be_asked_for(start_daemon):
    port = free_port()
    start_daemon(settings={"metrics": f"127.0.0.1:{port}",
                           "metrics_hosts": "gpu7.example, proxy:8080 gpu8"})
    for host, status in (("gpu7.example", 200), ("GPU7.example:1234", 200), ("gpu8:1", 200),
                         ("proxy:8080", 200), ("proxy", 403), ("proxy:80", 403), ("example", 403),
                         ("gpu7.example.org", 403)):
        assert ask(port, host=host)[0].status == status, host


@pytest.mark.parametrize("hosts", ["a/b", "http://a", "[::1]", "a:0", "a:x"])
def test_what_is_no_host_is_refused(hosts):
    result = subprocess.run([os.environ["TS_TEST_DAEMON"], "--set", f"metrics_hosts={hosts}",
                             "--pool", "p:layers=1,kv_heads=1,head_dim=32,memory=1M",
                             "--check-config"],
                            text=True, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 2
    assert f"metrics_hosts = {hosts}: '{hosts}' is no host's name" in result.stderr


def test_another_address_than_the_loopbacks_is_listened_at_and_told_of(start_daemon, capfd):
    port = free_port()
    start_daemon(settings={"metrics": f"0.0.0.0:{port}"})
    assert ask(port, "/healthz")[0].status == 200
    told = f"http://0.0.0.0:{port} can be read by everybody who can reach it"
    assert told in capfd.readouterr().err


def connect(port, text=b""):
    s = socket.create_connection(("127.0.0.1", port), timeout=60)
    s.sendall(text)
    return s


def test_unfinished_requests_take_64_places_and_no_more(served):
    daemon, port = served
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    held = [connect(port, head) for _ in range(64)]
    for _ in range(3):  # the daemon has taken the others by then: they came in order
        with connect(port) as s:
            assert s.recv(1) == b""
    # One that goes makes room, also before the daemon has seen it go; the others are answered when
    # they come to their end, unless this machine is so slow that their time is over.
    os.kill(daemon.process.pid, signal.SIGSTOP)
    os.waitpid(daemon.process.pid, os.WUNTRACED)  # until it stands still
    with held.pop() as s:
        s.shutdown(socket.SHUT_WR)
        while s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x05":
            pass  # until it is FIN_WAIT2: its end is at the daemon's side
    with connect(port, head + b"Connection: close\r\n\r\n") as s:
        os.kill(daemon.process.pid, signal.SIGCONT)
        assert s.makefile("rb").read()[:15] == b"HTTP/1.1 200 OK"
    for s in held:
        with contextlib.suppress(ConnectionError):
            s.sendall(b"\r\n")
            assert s.makefile("rb").read()[:15] in (b"HTTP/1.1 200 OK", b"")
        s.close()


def test_a_request_has_5_seconds_however_it_trickles(served):
    _, port = served
    with (connect(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ") as silent,
          connect(port) as trickles):
        with pytest.raises(OSError):
            while True:  # a byte again and again, as long as the other side has not ended
                trickles.sendall(b"G")
                if select.select([trickles], [], [], 0.05)[0]:
                    assert trickles.recv(1) == b""
                    raise ConnectionResetError
        assert silent.recv(1) == b""


def test_without_descriptors_a_connection_is_turned_away_and_the_next_one_served(served):
    daemon, port = served
    pid = daemon.process.pid
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    assert ask(port, "/healthz")[0].status == 200
    while len(os.listdir(f"/proc/{pid}/fd")) > descriptors:
        pass  # until the daemon has closed that connection
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(taken) + 1, before[1]))
    try:
        held = [connect(port) for fd in range(max(taken)) if fd not in taken]
        for _ in range(3):
            with connect(port) as s:
                assert s.recv(1) == b""
        for s in held:
            s.close()
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert ask(port, "/healthz")[0].status == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "::1:9470",
                                     "localhost:http", "[::1:9470", "[127.0.0.1]:9470", "gpu7:9470",
                                     ""])
def test_other_addresses_are_refused(address):
    result = subprocess.run([os.environ["TS_TEST_DAEMON"], "--set", f"metrics={address}", "--pool",
                             "p:layers=1,kv_heads=1,head_dim=32,memory=1M", "--check-config"],
                            text=True, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 2
    assert f"metrics = {address}: off, or an address and a port such as" in result.stderr


def test_a_port_that_is_taken_ends_the_daemon_with_a_sentence(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        result = subprocess.run([os.environ["TS_TEST_DAEMON"], "--socket", str(tmp_path / "s"),
                                 "--set", f"metrics=127.0.0.1:{port}", "--pool",
                                 "p:layers=1,kv_heads=1,head_dim=32,memory=1M,device=host"],
                                text=True, stderr=subprocess.PIPE, check=False, timeout=60)
    assert result.returncode == 1
    assert f"listening at http://127.0.0.1:{port} failed: Address already in use" in result.stderr


def test_those_who_ask_together_get_one_answer(served):
    """However many ask for the statistics at once, the engine makes them a few times."""
    daemon, port = served
    daemon.pause()  # so that all have asked before it looks
    request = f"GET /stats.json HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    sockets = []
    for _ in range(60):
        sockets.append(socket.create_connection(("127.0.0.1", port), timeout=30))
        sockets[-1].sendall(request)
    daemon.resume()
    answers = set()
    for s in sockets:
        with s, s.makefile("rb") as file:
            answers.add(file.read().split(b"\r\n\r\n", 1)[1])
    assert len(answers) <= 4
