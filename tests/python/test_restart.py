"""Daemons that are killed under workers in Python: the next one has all, and calls go on."""

import hashlib
import json
import os
import pathlib
import random
import select
import signal
import subprocess
import sys
import threading

import numpy
import pytest

import tinyserve
from test_metrics import ask, free_port, values

POOL = "tiny:layers=2,kv_heads=2,head_dim=64,dtype=fp32,block_tokens=4,blocks=1024"
ROUNDS, KILLS = 30, 5  # six times


def tsctl(url, *words):
    return subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", url, "--yes", *words], check=False,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)


def restart_of(url):
    return json.loads(tsctl(url, "status", "--json").stdout)["restart"]


class Worker:
    """Does all that a worker does, and keeps a digest of all it is told but ids."""

    def __init__(self, kv):
        self.kv, self.numbers, self.seen = kv, numpy.random.default_rng(7), hashlib.sha256()

    def see(self, what):
        self.seen.update(what if isinstance(what, bytes) else repr(what).encode())

    def step(self, seqs, counts, tokens):
        with self.kv.step(seqs, counts, tokens=tokens) as step:
            for layer in range(self.kv.geometry.layers):
                for view in (step.q, step.k, step.v):
                    view[...] = self.numbers.standard_normal(view.shape, dtype=numpy.float32)
                step.run(layer)
                self.see(step.out.numpy().tobytes())
            step.commit()

    def round(self, number, between):
        kv = self.kv
        prompt = [*range(8), number % 3, *range(number, number + 9)]
        chat, found = kv.match(prompt, b"model")
        self.see(found)
        between(number)
        self.step([chat], [len(prompt) - found], prompt[found:])
        forks = kv.fork(chat, 2)
        for token in range(4):  # decode
            self.step([chat, *forks], [1, 1, 1], [token, token + 1, token + 2])
        kv.keep(forks[0], f"kept-{number % 5}", replace=True)
        kept, length = kv.attach(f"kept-{number % 5}")
        self.see(length)
        self.step([kept], [2], [number, number])
        self.see(sorted((k.name, k.length) for k in kv.kept()))
        self.see(kv.lengths([chat, forks[1], kept]))
        kv.free([chat, forks[1]])

    def digest(self, between=lambda number: None):
        for number in range(ROUNDS):
            self.round(number, between)
        self.see(sorted((k.name, k.length) for k in self.kv.kept()))
        return self.seen.hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The digest of a worker whose daemon lives."""
    url = str(tmp_path_factory.mktemp("undisturbed") / "s")
    process = subprocess.Popen([os.environ["TS_TEST_DAEMON"], "--socket", url, "--pool",
                                f"{POOL},device=host", "--set", "log_level=error"])
    try:
        with tinyserve.connect(url, wait=60) as client, client.pool("tiny") as kv:
            return Worker(kv).digest()
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("transport", ["auto", "messages"])
def test_a_worker_is_told_the_same_by_daemons_that_are_killed(start_supervised, undisturbed, seed,
                                                              transport):
    daemon = start_supervised(POOL)
    chance = random.Random(seed)
    at = set(chance.sample(range(ROUNDS), KILLS))
    killers = []

    def kill_after(seconds):
        threading.Event().wait(seconds)
        daemon.kill()

    def between(number):
        """Each kill comes at a random time after this; the one before has happened by then."""
        if number in at:
            for killer in killers:
                killer.join()
            kv.stats()  # with the daemon that there is now
            killers.append(threading.Thread(target=kill_after, args=[chance.uniform(0, 0.01)]))
            killers[-1].start()

    with tinyserve.connect(daemon.url, transport=transport) as client, client.pool("tiny") as kv:
        assert Worker(kv).digest(between) == undisturbed, f"seed {seed}"
        for killer in killers:
            killer.join()
        kv.kept()
        assert client.restarts == len(killers) == KILLS
        assert "0 problems" in tsctl(daemon.url, "check").stdout
        told = restart_of(daemon.url)
    assert told["holder"] == "supervisor" and told["restarts"] == KILLS and told["failure"] is None
    assert told["last"]["cause"] == "signal 9" and told["last"]["awaited_sessions"] == 0


def test_who_does_not_want_to_go_on_is_told_at_once(start_supervised):
    daemon = start_supervised()
    with tinyserve.connect(daemon.url, reconnect=False) as client, client.pool("tiny") as kv:
        kv.create(1)
        daemon.kill()
        with pytest.raises(tinyserve.DisconnectedError):
            kv.create(1)
        assert client.restarts == 0


def test_without_a_holder_nobody_waits_for_another_daemon(start_daemon):
    daemon = start_daemon()
    # If it waited, it would do so for ten minutes, and the test would be ended.
    with tinyserve.connect(daemon.url, timeout=600) as client, client.pool("tiny") as kv:
        kv.create(1)
        daemon.process.kill()
        daemon.process.wait()
        with pytest.raises(tinyserve.DisconnectedError):
            kv.create(1)
        assert client.restarts == 0


SLEEPER = """
import sys, tinyserve
client = tinyserve.connect(sys.argv[1])
kv = client.pool("tiny")
kv.keep(kv.create(1)[0], "kept")
kv.create(3)
print(f"{client.session:x}", flush=True)
sys.stdin.read()
"""


def sessions(url):
    return {s["session"]: s for s in json.loads(tsctl(url, "sessions", "--json").stdout)
            if s["program"] != "tsctl"}


def sequences(url):
    return json.loads(tsctl(url, "pools", "--json").stdout)[0]["sequences"]


@pytest.fixture
def start_sleeper():
    """A worker with four sequences, one of them kept, that makes no further call."""
    started = []

    def start(url):
        process = subprocess.Popen([sys.executable, "-c", SLEEPER, url], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_worker_that_dies_while_there_is_no_daemon_has_no_session_after(start_supervised,
                                                                          start_sleeper):
    daemon = start_supervised()
    lives, dies = start_sleeper(daemon.url), None
    with tinyserve.connect(daemon.url) as client, client.pool("tiny") as kv:
        kv.keep(kv.attach("kept")[0], None)  # the other may have the name
        dies = start_sleeper(daemon.url)
        assert set(sessions(daemon.url)) == {f"{client.session:x}", lives[1], dies[1]}
        before = sequences(daemon.url)
        os.kill(daemon.process.pid, signal.SIGSTOP)  # it starts no other daemon
        daemon.kill()
        dies[0].kill()
        dies[0].wait()
        os.kill(daemon.process.pid, signal.SIGCONT)
        kv.create(1)
        left = sessions(daemon.url)
        assert set(left) == {f"{client.session:x}", lives[1]}
        assert left[lives[1]]["awaited"] and not left[f"{client.session:x}"]["awaited"]
        assert restart_of(daemon.url)["last"]["awaited_sessions"] == 1
        # Its three sequences have gone; what it kept has not, and one is new.
        assert sequences(daemon.url) == before - 3 + 1
        assert [k.name for k in kv.kept()] == ["kept"]
        # One that hasn't come back can be ended.
        assert tsctl(daemon.url, "session", "kick", lives[1]).returncode == 0
        assert set(sessions(daemon.url)) == {f"{client.session:x}"}
        assert restart_of(daemon.url)["last"]["awaited_sessions"] == 0
        assert "0 problems" in tsctl(daemon.url, "check").stdout


def test_status_and_metrics_tell_what_a_restart_checked(start_supervised, tmp_path):
    port = free_port()
    config = tmp_path / "conf"
    config.write_text(f"[daemon]\nmetrics = 127.0.0.1:{port}\n")
    daemon = start_supervised(f"{POOL},client_write=all", config=config)
    with tinyserve.connect(daemon.url) as client, client.pool("tiny", writable=True) as kv:
        with kv.step(kv.create(1), [3 * 4 + 1], run=False) as step:
            step.commit()

        def restart():
            while restart_of(daemon.url)["unsummed_blocks"] > 0:
                pass
            assert tsctl(daemon.url, "restart").returncode == 0
            return restart_of(daemon.url)

        told = restart()
        assert told["verify"] == "off" and told["last"]["check"] is None
        with config.open("a") as file:
            file.write("verify = restart\n")
        check = restart()["last"]["check"]  # what was filled before has no checksum
        assert (check["full_blocks"], check["checked_blocks"]) == (3, 0)
        with kv.step(kv.create(1), [2 * 4], run=False) as step:
            step.commit()
        told = restart()
        check = told["last"]["check"]
        assert told["verify"] == "restart" and told["unsummed_pools"] == 0
        assert check.pop("seconds") > 0
        assert check == {"full_blocks": 5, "checked_blocks": 2, "wrong_blocks": 0,
                         "lost_sequences": 0}
        served = values(ask(port)[1])
        assert served["tinyserve_verify_enabled"] == 1
        for name, value in check.items():
            assert served[f"tinyserve_last_restart_{name}"] == value
        assert served["tinyserve_last_restart_check_duration_seconds"] > 0
        text = tsctl(daemon.url, "status").stdout
        assert "  verify   restart: 0 blocks wait for their checksum\n" in text
        assert " 2 of 5 full blocks were checked in 0." in text
        assert " verify " not in tsctl(daemon.url, "doctor").stdout


def test_checksums_that_find_no_room_in_the_store_cost_nothing_else(start_supervised, tmp_path):
    config = tmp_path / "conf"
    config.write_text("[daemon]\nverify = off\n")
    daemon = start_supervised(f"{POOL},slab=16K,client_write=all", config=config,
                              descriptors=100)
    with tinyserve.connect(daemon.url) as client, client.pool("tiny", writable=True) as kv:
        seqs = []
        with pytest.raises(tinyserve.Error, match="FileDescriptorStoreMax"):
            while True:
                seqs += kv.create(1)
                with kv.step(seqs[-1:], [2 * 4], run=False) as step:
                    step.commit()
        lengths = list(kv.lengths(seqs))
        assert lengths == [2 * 4] * (len(seqs) - 1) + [0] and len(seqs) > 8
        config.write_text("[daemon]\nverify = restart\n")
        for _ in range(4):  # three that fail would have the next one begin with nothing
            daemon.kill()
            assert list(kv.lengths(seqs)) == lengths
        told = restart_of(daemon.url)
        assert told["verify"] == "restart" and told["unsummed_pools"] == 1
        assert told["last"]["check"]["full_blocks"] == 2 * (len(seqs) - 1)
        assert "no restart will check it" in daemon.log.read_text()
    # As full as that, one whose books are spoilt begins with nothing, and has room for its own.
    supervisor = pathlib.Path(f"/proc/{daemon.process.pid}/fd")
    books = [fd for fd in supervisor.iterdir() if "tinyserve-books" in os.readlink(fd)]
    assert len(books) == 2
    for file in books:
        with file.open("r+b") as memory:
            memory.write(bytes(range(256)) * 16)
    daemon.kill()
    with tinyserve.connect(daemon.url, wait=60) as client, client.pool("tiny") as kv:
        assert len(kv.create(2)) == 2
    assert "begins with nothing" in daemon.log.read_text()


def test_an_operator_restarts_the_daemon_with_all_it_has_or_with_nothing(start_supervised):
    port = free_port()
    daemon = start_supervised(settings={"metrics": f"127.0.0.1:{port}"})
    before = values(ask(port)[1])
    assert before["tinyserve_store_held"] == 1 and before["tinyserve_restarts_total"] == 0
    assert before["tinyserve_verify_enabled"] == before["tinyserve_unsummed_pools"] == 0
    assert before["tinyserve_journal_size_bytes"] >= before["tinyserve_journal_used_bytes"] > 0
    with tinyserve.connect(daemon.url) as client, client.pool("tiny") as kv:
        kv.keep(kv.create(1)[0], "kept")
        client.create_pool("more:layers=1,kv_heads=1,head_dim=32,blocks=4,device=host")
        first = daemon.pid()
        assert pathlib.Path(f"/proc/{first}/comm").read_text() == "tinyserved\n"
        done = tsctl(daemon.url, "restart")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"pid {daemon.pid()} follows pid {first}, with 1 sequences\n"
        assert values(ask(port)[1])["tinyserve_awaited_sessions"] >= 1
        assert [k.name for k in kv.kept()] == ["kept"] and client.restarts == 1
        assert [p.name for p in client.pools()] == ["tiny", "more"]
        after = values(ask(port)[1])
        assert after["tinyserve_restarts_total"] == 1
        assert after["tinyserve_last_restart_duration_seconds"] > 0
        assert after["tinyserve_last_restart_replayed_commands"] == 0
        told = restart_of(daemon.url)["last"]
        assert told["cause"] == "status 4" and told["sequences"] == 1 and told["entries"] == 0
        assert restart_of(daemon.url)["verify"] == "off" and told["check"] is None
        assert "(status 4, tsctl restart)" in tsctl(daemon.url, "status").stdout
        assert "ok       store        a supervisor holds the memory" in \
            tsctl(daemon.url, "doctor").stdout

        second = daemon.pid()
        done = tsctl(daemon.url, "-j", "restart", "--empty")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"pid": daemon.pid(), "before": second, "sequences": 0}
        with pytest.raises(tinyserve.DisconnectedError, match="the session is over"):
            kv.kept()
    told = restart_of(daemon.url)
    assert (told["restarts"], told["last"], told["failure"]) == (0, None, None)
    assert values(ask(port)[1])["tinyserve_restarts_total"] == 0
    with tinyserve.connect(daemon.url) as client, client.pool("tiny") as kv:
        assert kv.kept() == []
        assert [p.name for p in client.pools()] == ["tiny"]


def test_pools_that_differ_from_the_configuration_are_named(start_supervised, tmp_path):
    config = tmp_path / "conf"
    pool = "[pool {}]\nlayers = 1\nkv_heads = 1\nhead_dim = 32\nblocks = {}\ndevice = host\n"
    config.write_text(pool.format("small", 4) + pool.format("gone", 4) + "cache = off\n")
    daemon = start_supervised(config=config)
    assert tsctl(daemon.url, "restart").returncode == 0
    assert "taken over as it was made" not in daemon.log.read_text()
    config.write_text("[daemon]\nthreads = 1\n" + pool.format("small", 8) + "sequences = 7\n" +
                      pool.format("more", 4))
    os.kill(daemon.pid(), signal.SIGHUP)
    while "a restart keeps pools" not in daemon.log.read_text():
        os.sched_yield()
    assert ("tinyserved: warning: to change threads, pool more, the daemon must be started again\n"
            "tinyserved: warning: a restart keeps pools as they are: to change pool small, pool "
            "gone, tsctl pool delete it, and then tsctl restart\n") in daemon.log.read_text()
    assert tsctl(daemon.url, "restart").returncode == 0
    assert ("warning: pool 'small' was taken over as it was made: the configuration has another "
            "memory, sequences; tsctl pool delete, and then tsctl restart, makes it "
            "anew\n") in daemon.log.read_text()
    assert "pool 'gone' was taken over; the configuration doesn't have it\n" in \
        daemon.log.read_text()
    with tinyserve.connect(daemon.url) as client:
        assert [p.name for p in client.pools()] == ["small", "gone", "tiny", "more"]
    for words in (["--yes", "pool", "delete", "small"], ["restart"]):
        assert tsctl(daemon.url, *words).returncode == 0
    assert daemon.log.read_text().count("taken over as it was made") == 1


def test_ids_of_a_pool_that_was_deleted_name_nothing(start_supervised):
    """Neither in another one of its name, nor after a restart."""
    daemon, ids = start_supervised(), set()
    with tinyserve.connect(daemon.url) as client:
        for turn in range(4):
            client.create_pool("more:layers=1,kv_heads=1,head_dim=32,blocks=4,device=host")
            if turn % 2:
                assert tsctl(daemon.url, "restart").returncode == 0
            with client.pool("more") as kv:
                for old in ids:
                    with pytest.raises(tinyserve.NotFoundError):
                        kv.lengths([old])
                new = kv.create(2)
                ids.update(new)
                kv.free(new)
            assert tsctl(daemon.url, "--yes", "pool", "delete", "more").returncode == 0
    assert len(ids) == 8


def test_a_dead_supervisor_is_told_of_and_a_restart_refused(start_supervised):
    daemon = start_supervised()
    pid = daemon.pid()
    try:
        daemon.process.kill()
        daemon.process.wait()
        while restart_of(daemon.url)["holder"] != "nobody":
            pass
        assert "the supervisor is dead" in " ".join(tsctl(daemon.url, "doctor").stdout.split())
        refused = tsctl(daemon.url, "restart")
        assert refused.returncode == 1 and "nobody holds the daemon's memory" in refused.stderr
    finally:
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        select.select([process], [], [])
        os.close(process)


def test_signals_that_come_while_it_is_busy_wait_for_it(start_supervised):
    """No thread of the daemon takes one by its default action, which would be its end."""
    daemon = start_supervised()
    pid = daemon.pid()
    for _ in range(300):
        os.kill(pid, signal.SIGHUP)
    assert "0 problems" in tsctl(daemon.url, "check").stdout
    assert daemon.pid() == pid and restart_of(daemon.url)["restarts"] == 0


MODEL = pathlib.Path(__file__).parents[2] / "tools" / "model"


@pytest.mark.skipif("TS_TEST_GENERATE" not in os.environ, reason="TS_TEST_GENERATE names no worker")
def test_a_model_goes_on_byte_for_byte(start_supervised):
    daemon = start_supervised("tiny:layers=6,kv_heads=2,head_dim=64,dtype=fp32,block_tokens=16,"
                              "memory=24M,slab=8M")
    with subprocess.Popen([os.environ["TS_TEST_GENERATE"], "-s", daemon.url, "--model", MODEL,
                           "--verify", f"{MODEL / 'reference.json'}:0"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.read(20)  # bytes of text, as they come
        daemon.kill()
        _, told = worker.communicate(timeout=60)
    assert worker.returncode == 0, told
    assert "verified: 0 of" in told and "restarts of the daemon: 1, waited" in told
