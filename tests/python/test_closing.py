"""What is closed or ended by one thread while another one uses it."""

import gc
import os
import signal
import threading
import warnings

import pytest

import tinyserve
from test_match import BLOCK, HEADS, MORE, POOL
from test_waits import LONG, Call, fill, interrupt_twice, tsctl, until_waiting

SPACE = b"model"


@pytest.fixture
def daemon(start_daemon):
    return start_daemon(POOL + MORE)


@pytest.fixture
def connect(daemon):
    clients = []

    def new():
        clients.append(tinyserve.connect(daemon.url))
        return clients[-1]
    yield new
    for client in clients:
        client.close()


def close_beside_a_call(daemon, what):
    """Closes it in another thread; returns when that waits for the call."""
    closing = Call(what.close)
    while "closed" not in repr(what):
        pass
    assert closing.is_alive()
    return closing


def sessions(daemon):
    return {int(session["session"], 16) for session in tsctl(daemon, "sessions")}


@pytest.mark.parametrize("which", ["client", "pool"])
def test_a_close_waits_for_another_threads_call_and_ends_the_step_it_made(daemon, connect, which):
    holder, client = connect().pool("p", writable=True), connect()
    seq, pool = fill(holder, 60), client.pool("p")
    want, = pool.create()
    begin = Call(pool.step, [want], [10 * BLOCK], heads=HEADS, wait=LONG)
    until_waiting(daemon, 1)
    closing = close_beside_a_call(daemon, client if which == "client" else pool)
    with pytest.raises(tinyserve.DisconnectedError, match="closed"):
        pool.stats()  # none comes before the close that waits
    holder.free([seq])
    step = begin.result()
    closing.result()
    for use in (lambda: step.run(0), lambda: step.q, lambda: step.slots, step.commit, step.abort):
        with pytest.raises(tinyserve.DisconnectedError, match="closed"):
            use()
    if which == "pool":
        assert client.pool("p").lengths([want]) == [0]
        client.pool("p").free([want])  # it is in no step
    del step, begin
    gc.collect()


@pytest.mark.parametrize("which", ["client", "pool"])
def test_a_call_that_fails_as_its_client_is_closed_says_why(daemon, connect, which):
    client = connect()
    fill(connect().pool("p", writable=True), 60)
    pool = client.pool("p")
    begin = Call(pool.step, pool.create(), [10 * BLOCK], heads=HEADS, wait=LONG)
    until_waiting(daemon, 1)
    closing = close_beside_a_call(daemon, client if which == "client" else pool)
    tsctl(daemon, "--yes", "session", "kick", f"{min(waiting_sessions(daemon)):x}")
    with pytest.raises(tinyserve.DisconnectedError, match="session"):
        begin.result()
    closing.result()


def waiting_sessions(daemon):
    """Those without a block."""
    return [int(s["session"], 16) for s in tsctl(daemon, "sessions") if s["blocks"] == 0]


def test_a_close_between_another_threads_calls_ends_them(daemon, connect):
    for _ in range(100):
        client = connect()
        pool, began = client.pool("p"), threading.Event()

        def ask(pool=pool, began=began):
            while True:
                pool.stats()
                began.set()

        asking = Call(ask)
        began.wait()
        client.close()
        with pytest.raises(tinyserve.DisconnectedError, match="the client was closed"):
            asking.result()


def test_a_client_is_closed_after_its_wait_was_undone(daemon, connect):
    prompt = list(range(100, 140))
    holder = connect().pool("p")
    _, matched = holder.match(prompt, SPACE, wait=LONG)  # it is going to compute it
    assert matched == 0
    client = connect()
    session, pool = client.session, client.pool("p")
    undoing = interrupt_twice(daemon, pool, prompt)
    closing = close_beside_a_call(daemon, client)
    assert any(t.is_alive() for t in undoing)
    daemon.resume()
    closing.result()
    for thread in undoing:
        thread.join(LONG)
    while session in sessions(daemon):
        pass


def paused_call(daemon, pool, seq):
    """A call that another thread is inside until the daemon is resumed."""
    answered = threading.Event()
    daemon.pause()

    def ask():
        while not answered.is_set():
            try:
                found = pool.lengths([seq])
                answered.set()
                return found
            except tinyserve.BusyError:
                pass  # the test's own thread was inside, for the moment

    call = Call(ask)
    while True:
        try:
            pool.kv(0, 99)
        except tinyserve.InvalidError:
            pass  # there is no such layer, which no daemon is asked for
        except tinyserve.BusyError:
            return call


def test_a_step_that_is_dropped_beside_another_threads_call_waits_for_nothing(daemon, connect):
    pool = connect().pool("p")
    seq, other = pool.create(2)
    step = pool.step([seq], [1], heads=HEADS)
    call = paused_call(daemon, pool, other)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del step
    assert [w.category for w in said] == [ResourceWarning]
    assert call.is_alive()
    daemon.resume()
    assert call.result() == [0]
    pool.free([seq])  # whoever left the call has aborted the step


def test_a_forked_child_closes_what_another_thread_was_inside(daemon, connect):
    client = connect()
    pool = client.pool("p")
    seq, = pool.create()
    call = paused_call(daemon, pool, seq)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        client.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    daemon.resume()
    assert call.result() == [0]
    assert pool.lengths([seq]) == [0]


def test_a_step_that_one_thread_aborts_has_ended_for_the_others(daemon, connect):
    pool = connect().pool("p")
    for _ in range(30):
        step, began = pool.step(pool.create(), [1], heads=HEADS), threading.Event()

        def use(step=step, began=began):
            while True:
                step.q.numpy()[...] = 1
                began.set()
                assert len(step.slots) == 1
                step.run(0)

        using = Call(use)
        began.wait()
        step.abort()
        with pytest.raises(tinyserve.DisconnectedError, match="the step has ended"):
            using.result()
