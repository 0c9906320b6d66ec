"""Waiting: for what other sessions compute, and for room."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import tinyserve
from test_match import BLOCK, HEADS, LAYERS, MORE, POOL, compute

SPACE = b"model"
LONG = 60.0  # seconds; no test waits that long


def tsctl(daemon, *words):
    result = subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "--json", *words],
                            check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout) if result.stdout else None


def until_waiting(daemon, count):
    """Returns when `count` sessions wait in the pool."""
    deadline = time.monotonic() + LONG
    while tsctl(daemon, "status")["pools"][0]["waiting_sessions"] != count:
        assert time.monotonic() < deadline


def open_to_others(folder):
    """Lets every user into the folder."""
    for parent in folder.parents:
        if parent.owner() == "root" and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    folder.chmod(0o755)


class Call(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, function, *arguments, **named):
        super().__init__(daemon=True)
        self._call = function, arguments, named
        self._result = None
        self._error = None
        self.start()

    def run(self):
        function, arguments, named = self._call
        try:
            self._result = function(*arguments, **named)
        except Exception as error:
            self._error = error

    def result(self):
        self.join(LONG)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._result


@pytest.fixture(params=["ring", "messages", "local"])
def how(request):
    return {"execution": "local"} if request.param == "local" else {"transport": request.param}


@pytest.fixture
def daemon(start_daemon):
    return start_daemon(POOL + MORE)


@pytest.fixture
def session(daemon, how):
    clients = []

    def new():
        client = tinyserve.connect(daemon.url, **how)
        clients.append(client)
        return client.pool("p", writable=True)
    yield new
    for client in clients:
        client.close()


def test_of_workers_with_one_prompt_one_computes_it(daemon, session):
    prompt = list(range(100, 140))
    pools = [session() for _ in range(8)]
    first, matched = pools[0].match(prompt, SPACE, wait=LONG)
    assert matched == 0
    calls = [Call(pool.match, prompt, SPACE, wait=LONG) for pool in pools[1:]]
    until_waiting(daemon, 7)
    for at in range(0, 40, 10):  # in chunks
        assert all(call.is_alive() for call in calls)
        compute(pools[0], first, prompt[at:at + 10])
    assert [call.result()[1] for call in calls] == [39] * 7
    until_waiting(daemon, 0)


def test_the_next_goes_on_where_one_that_dies_left_off(daemon, session, how):
    prompt = list(range(100, 140))
    code = """
import sys, tinyserve
sys.path.insert(0, sys.argv[2])
from test_match import compute
how = {sys.argv[3]: sys.argv[4]}
client = tinyserve.connect(sys.argv[1], **how)
pool = client.pool("p", writable=True)
prompt = list(range(100, 140))
seq, matched = pool.match(prompt, b"model", wait=60)
compute(pool, seq, prompt[:20])
step = pool.step([seq], [10], heads=4, tokens=prompt[20:30])
print("half", flush=True)
sys.stdin.read()
"""
    (key, value), = how.items()
    worker = subprocess.Popen([sys.executable, "-c", code, daemon.url, os.path.dirname(__file__),
                               key, value],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "half\n"
    pools = [session(), session()]
    calls = [Call(pool.match, prompt, SPACE, wait=LONG) for pool in pools]
    until_waiting(daemon, 2)
    worker.kill()
    worker.wait()
    until_waiting(daemon, 1)
    while all(call.is_alive() for call in calls):  # its thread may not have got there yet
        os.sched_yield()
    first = 0 if not calls[0].is_alive() else 1
    seq, matched = calls[first].result()
    assert matched == 20
    compute(pools[first], seq, prompt[20:])
    assert calls[1 - first].result()[1] == 39


def test_when_the_time_is_over_a_match_tells_what_there_is(daemon, session):
    prompt = list(range(100, 140))
    first, second = session(), session()
    seq, _ = first.match(prompt, SPACE, wait=LONG)
    compute(first, seq, prompt[:8])
    with first.step([seq], [8], heads=HEADS, tokens=prompt[8:16]):
        assert second.match(prompt, SPACE, wait=0.02)[1] == 8
    assert second.match(prompt, SPACE)[1] == 8  # and without a wait nobody waits


def test_after_a_wait_in_vain_each_prompt_is_its_own_twin(daemon, session):
    prompt = list(range(100, 140))
    _ = session().match(prompt, SPACE, wait=LONG)
    pool, twins = session(), []
    # A ring has something else where it tells of twins.
    compute(pool, pool.create(namespace=SPACE)[0], list(range(1, 20)))
    found = pool.match_many([prompt, prompt, prompt], SPACE, wait=0.01, twins=twins)
    assert [matched for _, matched in found] == [0, 0, 0]
    assert twins == [0, 1, 2]


def test_prompts_of_one_call_that_lack_the_same_are_told(session):
    pool = session()
    prompt, other, twins = list(range(20)), list(range(50, 70)), []
    found = pool.match_many([prompt, other, prompt], SPACE, wait=LONG, twins=twins)
    assert twins == [0, 1, 0] and [n for _, n in found] == [0, 0, 0]
    found = pool.match_many([prompt, prompt], SPACE, twins=twins)
    assert twins == [0, 1]


def fill(pool, blocks):
    """A sequence that holds `blocks` blocks."""
    seq, = pool.create()
    pool.append([seq], [blocks * BLOCK])
    return seq


def take(pool, seq, blocks, wait):
    with pool.step([seq], [blocks * BLOCK], heads=HEADS, wait=wait) as step:
        for layer in range(LAYERS):
            step.run(layer)
        step.commit()


def test_a_step_waits_for_room_in_its_turn(daemon, session):
    holder, large, small = session(), session(), session()
    seq = fill(holder, 60)
    wants = [large.create()[0], small.create()[0]]
    first = Call(take, large, wants[0], 20, LONG)
    until_waiting(daemon, 1)
    second = Call(take, small, wants[1], 2, LONG)
    until_waiting(daemon, 2)  # there would be room for it, but the other came first
    with pytest.raises(tinyserve.NoSpaceError, match="64 blocks|2 blocks are needed"):
        take(holder, holder.create()[0], 2, 0)
    holder.truncate([seq], [44 * BLOCK])
    first.result()
    until_waiting(daemon, 1)
    holder.free([seq])
    second.result()
    assert large.lengths(wants[:1]) == [20 * BLOCK]


def test_who_waits_in_vain_is_refused_with_the_numbers(session):
    holder, other = session(), session()
    fill(holder, 60)
    seq, = other.create()
    with pytest.raises(tinyserve.NoSpaceError) as error:
        take(other, seq, 10, 0.02)
    assert (error.value.needed, error.value.free) == (10, 4)
    take(other, seq, 4, 0)


def test_who_is_killed_gives_up_its_place(daemon, session):
    holder, other = session(), session()
    seq = fill(holder, 60)
    code = """
import sys, tinyserve
pool = tinyserve.connect(sys.argv[1]).pool("p")
pool.step(pool.create(), [80], heads=4, wait=60)
"""
    worker = subprocess.Popen([sys.executable, "-c", code, daemon.url])
    until_waiting(daemon, 1)
    call = Call(take, other, other.create()[0], 3, LONG)
    until_waiting(daemon, 2)
    worker.kill()
    worker.wait()
    call.result()
    holder.free([seq])


def test_ctrl_c_ends_a_wait_and_leaves_nothing(daemon, session, how):
    holder = session()
    seq = fill(holder, 60)
    client = tinyserve.connect(daemon.url, **how)
    pool = client.pool("p", writable=True)
    want, = pool.create()
    main = threading.get_ident()
    press = Call(lambda: (until_waiting(daemon, 1), signal.pthread_kill(main, signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        take(pool, want, 10, LONG)
    press.result()
    holder.free([seq])
    take(pool, want, 10, 0)  # neither its place nor a step is left
    client.close()


def interrupt_twice(daemon, pool, prompt):
    """Waits for a prompt that another session computes, and presses Ctrl+C twice, the second time
    while the daemon stands still and the first one's wait can't be undone. Returns the threads that
    go on undoing it; the daemon still stands still."""
    main = threading.get_ident()
    before = threading.enumerate()  # another test's may not have ended yet

    def undoing():
        return [t for t in threading.enumerate() if t.name == "tinyserve-undo" and t not in before]

    def press():
        until_waiting(daemon, 1)
        daemon.pause()
        signal.pthread_kill(main, signal.SIGINT)
        while not any(t.is_alive() for t in undoing()):
            pass
        signal.pthread_kill(main, signal.SIGINT)

    pressed = Call(press)
    with pytest.raises(KeyboardInterrupt):
        pool.match(prompt, SPACE, wait=LONG)
    pressed.result()
    assert undoing() != []
    return undoing()


def test_a_second_ctrl_c_leaves_nothing_either(daemon, session, how):
    prompt = list(range(100, 140))
    holder = session()
    held, matched = holder.match(prompt, SPACE, wait=LONG)  # it is going to compute it
    assert matched == 0
    client = tinyserve.connect(daemon.url, **how)
    pool = client.pool("p", writable=True)
    undoing = interrupt_twice(daemon, pool, prompt)
    daemon.resume()
    for thread in undoing:
        thread.join(LONG)
    mine, = (s for s in tsctl(daemon, "sessions") if s["session"] == f"{client.session:x}")
    assert mine["sequences"] == 0
    assert pool.create(1) != []  # and the session goes on
    client.close()
    holder.free([held])


def test_a_kick_and_a_drain_end_waits(daemon, session):
    holder, one, two = session(), session(), session()
    fill(holder, 60)
    first = Call(take, one, one.create()[0], 10, LONG)
    until_waiting(daemon, 1)
    tsctl(daemon, "--yes", "session", "kick", f"{one.client.session:x}")
    with pytest.raises(tinyserve.DisconnectedError):
        first.result()
    second = Call(take, two, two.create()[0], 10, LONG)
    until_waiting(daemon, 1)
    tsctl(daemon, "--yes", "drain")
    with pytest.raises(tinyserve.BusyError, match="drained"):
        second.result()
    tsctl(daemon, "--yes", "drain", "off")


USER = """if True:
    import os, sys, threading, tinyserve
    url, uid, have, spare, more = sys.argv[1], *map(int, sys.argv[2:])
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
    def hold(kv, blocks, wait=0.0):
        seq, = kv.create()
        with kv.step([seq], [blocks * 4], run=False, wait=wait) as step:
            step.commit()
        return seq
    a, b = tinyserve.connect(url), tinyserve.connect(url)
    kv, other = a.pool("p", writable=True), b.pool("p", writable=True)
    held = [hold(kv, n) for n in (have, spare) if n > 0]
    waiter = threading.Thread(target=lambda: (hold(other, more, wait=600),
                                              print("has room", flush=True)))
    print("holds", flush=True)
    for line in sys.stdin:
        if line == "wait\\n":
            waiter.start()
        else:
            kv.free([held.pop()])
            print("freed", flush=True)
    waiter.join()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
def test_a_user_within_its_share_gets_room_before_one_beyond_it_that_asked_first(start_daemon,
                                                                                 tmp_path):
    daemon = start_daemon(POOL + MORE + ",slab=32K", settings={"socket_mode": "0666"})
    open_to_others(tmp_path)

    def user(uid, *blocks):
        return subprocess.Popen([sys.executable, "-c", USER, daemon.url, str(uid),
                                 *map(str, blocks)],
                                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tell(process, word):
        process.stdin.write(word + "\n")
        process.stdin.flush()

    # Of 64 blocks in slabs of 4, 32 are a user's share. The large one has 40 and wants 24 more, the
    # small one has 20 and wants 10; 4 are free, and then 12.
    large, small = user(60001, 32, 8, 24), user(60002, 20, 0, 10)
    assert [large.stdout.readline(), small.stdout.readline()] == ["holds\n"] * 2
    tell(large, "wait")
    until_waiting(daemon, 1)
    tell(small, "wait")
    until_waiting(daemon, 2)
    tell(large, "free")
    assert large.stdout.readline() == "freed\n"
    assert small.stdout.readline() == "has room\n"
    until_waiting(daemon, 1)
    assert small.communicate("")[0] == "" and small.returncode == 0  # its 30 blocks are free again
    assert large.stdout.readline() == "has room\n"
    assert large.communicate("")[0] == "" and large.returncode == 0
