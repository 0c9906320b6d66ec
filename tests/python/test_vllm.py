"""What vLLM's connector does without vLLM: the order of pages, the plan of loads and saves, the
scheduler's questions, the worker's copies. tests/engines/vllm/ has the tests with the engine."""

import subprocess
import sys
import time

import pytest

import tinyserve

np = pytest.importorskip("numpy")

from tinyserve.vllm import plan  # noqa: E402
from tinyserve.vllm.finder import Finder  # noqa: E402
from tinyserve.vllm.pages import HostPages, cpu_layout, gpu_layout  # noqa: E402
from tinyserve.vllm.sessions import Backoff  # noqa: E402
from tinyserve.vllm.store import Store  # noqa: E402

LAYERS, HEADS, DIM, BLOCK = 2, 2, 32, 16
POOL = f"kv:layers={LAYERS},kv_heads={HEADS},head_dim={DIM},dtype=fp32,block_tokens={BLOCK}," \
       "blocks=64,client_write=all"
SPACE = b"model"
LONG = 60.0  # seconds; no test waits that long


# ---- the order of pages ----

def place(isa, which, element_bytes, page_tokens, dim, t, d):
    """Where the CPU backend puts dimension d of token t in a head's K, or V."""
    r = max(1, 4 // element_bytes)
    if isa == "amx":
        if which == 0:  # tiles of 16 tokens; in a row of one, r dimensions of each token
            return t // 16 * 16 * dim + d // r * 16 * r + t % 16 * r + d % r
        return d // 16 * 16 * page_tokens + t // r * 16 * r + d % 16 * r + t % r
    return d * page_tokens + t if which == 0 else t * dim + d


def rows_of(seed, tokens, dtype="uint32"):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, np.iinfo(dtype).max, (tokens, HEADS, DIM), dtype=dtype)
            for _ in range(2)]


def host_pages(isa, page_tokens=32, pages=8, dtype="uint32"):
    half = page_tokens * DIM
    layout = cpu_layout(isa, page_tokens, HEADS, DIM, np.dtype(dtype).itemsize, HEADS * 2 * half,
                        2 * half)
    layers = [np.zeros(pages * HEADS * 2 * half, dtype) for _ in range(LAYERS)]
    return HostPages(layout, layers, pages), layers


@pytest.mark.parametrize("dtype", ["uint32", "uint16"])
@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
def test_rows_lie_where_the_cpu_backend_has_them(isa, dtype):
    pages, layers = host_pages(isa, dtype=dtype)
    rows = rows_of(1, 64, dtype)
    pages.write(1, np.array([5, 2]), rows)
    cache = layers[1].reshape(8, HEADS, 2, 32 * DIM)
    for t in range(64):
        for h in range(HEADS):
            for d in range(DIM):
                for which in range(2):
                    at = place(isa, which, np.dtype(dtype).itemsize, 32, DIM, t % 32, d)
                    assert cache[(5, 2)[t // 32], h, which, at] == rows[which][t, h, d]
    assert not layers[0].any() and not cache[[0, 1, 3, 4, 6, 7]].any()
    for found, want in zip(pages.read(1, np.array([2, 5])), rows):
        assert (found == np.concatenate([want[32:], want[:32]])).all()


def test_rows_lie_where_a_gpu_has_them_whatever_the_strides():
    for order in (0, 1, 2, 3), (0, 2, 1, 3):  # [heads][tokens] in a page, or [tokens][heads]
        whole = np.zeros([(4, HEADS, 16, 2 * DIM)[i] for i in order], "uint16")
        seen = whole.transpose(order)
        pages = HostPages(gpu_layout(seen.shape, [s // 2 for s in seen.strides], DIM),
                          [whole.reshape(-1)], 4)
        k, v = rows_of(2, 16, "uint16")
        pages.write(0, np.array([3]), (k, v))
        assert (seen[3, ..., :DIM] == k.transpose(1, 0, 2)).all()
        assert (seen[3, ..., DIM:] == v.transpose(1, 0, 2)).all()
        assert not seen[:3].any()


def test_other_orders_are_refused_by_name():
    with pytest.raises(ValueError, match="pages in the order 'neon' of the CPU backend; known are"):
        cpu_layout("neon", 32, 2, 64, 4, 0, 0)
    with pytest.raises(ValueError, match="pages of 24 tokens with heads of 64 in the order .amx"):
        cpu_layout("amx", 24, 2, 64, 4, 0, 0)
    with pytest.raises(ValueError, match=r"shape \[2, 8, 32, 2, 64\]; known is"):
        gpu_layout((2, 8, 32, 2, 64), (1, 1, 1, 1, 1), 64)
    with pytest.raises(ValueError, match="end at element 31743; the layer's cache has 4096"):
        HostPages(cpu_layout("vec", 32, 2, 32, 4, 4096, 2048), [np.zeros(4096, "uint32")], 8)


# ---- the plan ----

def saved(step):
    return [(s.request, list(s.ids), s.pages) for s in step.saves]


def test_whole_pages_that_fill_whole_blocks_are_stored_once():
    planner = plan.Planner(page_tokens=4, block_tokens=8)
    ids = list(range(100, 122))
    planner.scheduled("a", SPACE, ids, [7, 8])
    assert saved(planner.step({"a": 7})) == []
    planner.pages("a", [9], replaced=False)
    assert saved(planner.step({"a": 12})) == [("a", ids[:8], [7, 8])]
    assert saved(planner.step({"a": 15})) == []
    planner.pages("a", [3, 4], replaced=False)
    assert saved(planner.step({"a": 18, "unknown": 9})) == [("a", ids[:16], [7, 8, 9, 3])]
    planner.finished("a")
    assert saved(planner.step({"a": 22})) == []


def test_tokens_whose_ids_are_not_known_yet_wait():
    planner = plan.Planner(4, 4)
    ids = list(range(6))
    planner.scheduled("a", SPACE, ids, [1, 2, 3])
    assert saved(planner.step({"a": 6})) == [("a", [0, 1, 2, 3], [1])]
    assert saved(planner.step({"a": 8})) == []  # sampled ahead: two ids aren't there
    ids += [6, 7, 8]
    assert saved(planner.step({"a": 9})) == [("a", list(range(8)), [1, 2])]


def test_a_load_goes_into_the_pages_of_its_tokens():
    planner = plan.Planner(4, 4)
    planner.scheduled("a", SPACE, list(range(20)), [1, 2, 3, 4, 5])
    planner.load("a", b"t", 4, 9)
    step = planner.step({"a": 19})
    assert step.loads == [plan.Load("a", b"t", 4, 9, [2, 3, 4])]
    assert saved(step) == [("a", list(range(16)), [1, 2, 3, 4])]
    assert planner.step({"a": 19}).loads == []


def test_what_was_loaded_is_not_stored_again():
    planner = plan.Planner(4, 4)
    planner.scheduled("a", SPACE, list(range(9)), [1, 2, 3])
    planner.load("a", b"t", 0, 8)
    assert saved(planner.step({"a": 9})) == []


def test_after_a_failed_load_all_is_told_again():
    planner = plan.Planner(4, 4)
    planner.scheduled("a", SPACE, list(range(9)), [1, 2, 3])
    planner.load("a", b"t", 0, 4)
    step = planner.step({"a": 9})
    assert step.failures_known == 0 and len(step.saves) == 1
    planner.load_failed()
    step = planner.step({"a": 9})
    assert step.failures_known == 1 and saved(step) == [("a", list(range(8)), [1, 2])]


def test_a_preempted_request_gets_other_pages():
    planner = plan.Planner(4, 4)
    ids = list(range(12))
    planner.scheduled("a", SPACE, ids, [1, 2])
    planner.step({"a": 8})
    planner.scheduled("a", SPACE, ids, [5])
    planner.pages("a", [5, 6, 7], replaced=True)
    assert saved(planner.step({"a": 12})) == [("a", ids, [5, 6, 7])]


def test_an_engine_that_only_reads_plans_no_saves():
    planner = plan.Planner(4, 4, saves=False)
    planner.scheduled("a", SPACE, list(range(9)), [1, 2, 3])
    assert planner.step({"a": 9}).saves == []


# ---- with a daemon ----

class Side:
    """Connects as the connector does, and counts how often."""

    def __init__(self, url, timeout=5.0):
        self.url, self.timeout, self.clients = url, timeout, []

    def __call__(self):
        client = tinyserve.connect(self.url, timeout=self.timeout)
        self.clients.append(client)
        return client, client.pool("kv", writable=True)


@pytest.fixture
def daemon(start_daemon):
    return start_daemon(POOL)


@pytest.fixture
def start_finder():
    finders = []

    def start(url, **how):
        finders.append(Finder(Side(url, timeout=how.pop("timeout", 5.0)), **how))
        finders[-1].start()
        return finders[-1]

    yield start
    for finder in finders:
        finder.close()


@pytest.fixture
def make_store(daemon):
    stores = []

    def make(isa="vec", page_tokens=32, timeout=5.0, url=daemon.url):
        pages, layers = host_pages(isa, page_tokens)
        stores.append(Store(Side(url, timeout), pages))
        until(stores[-1]._pool)
        return stores[-1], pages

    yield make
    for store in stores:
        store.close()


def until(true):
    """The first result that isn't false."""
    deadline = time.monotonic() + LONG
    while not (result := true()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return result


def up(finder):
    until(finder._up.is_set)


def answer(finder, key, ids, least=0):
    """What the finder says once it knows."""
    def asked():
        finder.begin_pass()
        found = finder.ask(key, ids, SPACE, least)
        return None if found is None else [found]
    return until(asked)[0]


def fill(pages, seed, numbers):
    """Writes random K and V into these pages; of each layer both."""
    rows = [rows_of(seed * 10 + layer, len(numbers) * pages.layout.page_tokens)
            for layer in range(LAYERS)]
    for layer in range(LAYERS):
        pages.write(layer, np.array(numbers), rows[layer])
    return rows


def save(store, ids, pages, known=0, request="r", space=SPACE):
    store.save(plan.StepPlan(saves=[plan.Save(request, space, np.array(ids, np.uint32), pages)],
                             failures_known=known))


def load(store, finder, ids, pages, least=0):
    """Loads what the finder finds of the ids beyond `least`."""
    found = answer(finder, "load", ids, least)
    first, ticket = finder.take("load")
    store.load(plan.StepPlan(loads=[plan.Load("r", ticket, first, found - first, pages)]))
    return found


IDS = list(range(1000, 1096))


@pytest.mark.parametrize("to, page_tokens, least", [
    ("vec", 32, 0), ("amx", 32, 32), ("vec", 48, 0), ("amx", 16, 0), ("vec", 4, 72)])
@pytest.mark.parametrize("isa", ["vec", "amx"])
def test_what_one_engine_stores_another_loads_into_other_pages(daemon, make_store, start_finder,
                                                               isa, to, page_tokens, least):
    store, pages = make_store(isa)
    rows = fill(pages, 1, [4, 1, 6])
    save(store, IDS, [4, 1, 6])
    assert store.stats.stored == 96
    other, others = make_store(to, page_tokens)
    count = 90 - least
    numbers = list(range(7, -1, -1))[:-(-count // page_tokens)]
    finder = start_finder(daemon.url)
    up(finder)
    assert load(other, finder, IDS[:90] + [1], numbers, least) == 90
    assert other.failed_pages() == set() and other.stats.loaded == count
    for layer in range(LAYERS):
        for found, want in zip(others.read(layer, np.array(numbers)), rows[layer]):
            assert (found[:count] == want[least:90]).all()
            assert not found[count:].any()


def test_what_is_longer_than_a_sequence_may_be_is_left_out(start_daemon):
    pages, _ = host_pages("vec", 32)
    store = Store(Side(start_daemon(POOL + ",sequence_tokens=64").url), pages)
    until(store._pool)
    fill(pages, 1, [0, 1, 2])
    saves = [plan.Save(name, SPACE, np.array(IDS[:count], np.uint32), [0, 1, 2])
             for name, count in (("long", 96), ("whole", 64), ("short", 32))]
    store.save(plan.StepPlan(saves=saves))
    store.close()
    assert store.stats.stored == 32 and store.stats.dropped_saves == 2


def test_what_is_stored_already_is_not_stored_again(make_store, daemon):
    store, pages = make_store()
    fill(pages, 1, [0, 1, 2])
    save(store, IDS[:64], [0, 1])
    save(store, IDS, [0, 1, 2])
    save(store, IDS, [0, 1, 2])
    assert store.stats.stored == 96
    save(store, IDS[:40] + list(range(24)), [0, 1])  # goes another way within a block
    assert store.stats.stored == 96 + 24
    save(store, IDS[:64], [0, 1], space=b"another")
    assert store.stats.stored == 96 + 24 + 64
    with tinyserve.connect(daemon.url) as client, client.pool("kv") as pool:
        assert pool.stats().sequences == 0 and pool.stats().used == 0


def test_nothing_of_a_step_with_a_failed_load_is_stored(make_store, start_finder, daemon):
    store, pages = make_store()
    fill(pages, 1, [0, 1, 2])
    store.load(plan.StepPlan(loads=[plan.Load("r", bytes(16), 0, 40, [0, 1]),
                                    plan.Load("q", bytes(16), 0, 20, [5])]))
    assert store.failed_pages() == {0, 1, 5} and store.failed_pages() == set()
    assert store.stats.failed_loads == 2
    save(store, IDS, [0, 1, 2])
    save(store, IDS, [3, 4, 7], request="another")  # made before the scheduler knew
    assert store.stats.stored == 0 and store.stats.dropped_saves == 2
    save(store, IDS, [0, 1, 2], known=1)
    assert store.stats.stored == 96


def test_a_full_pool_stores_what_fits(make_store, start_daemon):
    store, pages = make_store()
    fill(pages, 1, range(8))
    client, pool = store._pool().client, store._pool()
    held = pool.create(1)
    with pool.step(held, [(pool.blocks - 4) * BLOCK], run=False) as step:
        step.commit()
    store.save(plan.StepPlan(saves=[
        plan.Save("a", SPACE, np.array(IDS, np.uint32), [0, 1, 2]),  # 6 blocks
        plan.Save("b", SPACE, np.arange(64, dtype=np.uint32), [3, 4])]))  # 4
    assert (store.stats.stored, store.stats.dropped_saves) == (64, 1)
    assert pool.matching([list(range(64)) + [0]], SPACE) == [64]
    pool.free(held)
    assert client is store._pool().client


def test_a_worker_goes_on_when_the_daemon_was_killed(make_store, daemon, start_daemon):
    store, pages = make_store()
    fill(pages, 1, [0, 1, 2])
    save(store, IDS[:32], [0])
    daemon.process.kill()
    daemon.process.wait()
    save(store, IDS, [0, 1, 2])
    assert store.stats.dropped_saves == 1
    store.load(plan.StepPlan(loads=[plan.Load("r", bytes(16), 0, 40, [0, 1])]))
    assert store.failed_pages() == {0, 1}
    start_daemon(POOL)

    def stored():
        save(store, IDS, [0, 1, 2], known=1)
        return store.stats.stored == 32 + 96
    until(stored)
    assert store.stats.sessions == 2


def test_a_daemon_that_another_takes_over_from_costs_nothing(start_supervised, make_store,
                                                             start_finder):
    """Saves, answers, tickets and loads are as if it had lived."""
    daemon = start_supervised(f"{POOL},device=host")
    store, pages = make_store(url=daemon.url, timeout=LONG)
    finder = start_finder(daemon.url, timeout=LONG, patience=LONG)
    up(finder)
    rows = fill(pages, 1, [0, 1, 2])
    save(store, IDS[:64], [0, 1])
    daemon.kill()
    save(store, IDS, [0, 1, 2])
    daemon.kill()
    assert answer(finder, "load", IDS) == 95
    first, ticket = finder.take("load")
    daemon.kill()
    store.load(plan.StepPlan(loads=[plan.Load("r", ticket, first, 95, [4, 5, 6])]))
    assert store.failed_pages() == set() and vars(store.stats) == {
        "loaded": 95, "stored": 96, "failed_loads": 0, "dropped_saves": 0, "sessions": 1}
    for layer in range(LAYERS):
        for found, want in zip(pages.read(layer, np.array([4, 5, 6])), rows[layer]):
            assert (found[:95] == want[:95]).all()
    assert finder.stats.sessions == 1


def test_a_worker_waits_for_a_paused_daemon_no_longer_than_its_timeout(make_store, daemon):
    store, pages = make_store(timeout=0.2)
    fill(pages, 1, [0, 1, 2])
    save(store, IDS[:32], [0])
    daemon.pause()
    save(store, IDS, [0, 1, 2])
    save(store, IDS, [0, 1, 2])
    assert store.stats.dropped_saves == 2 and store._session is None
    daemon.resume()


# ---- the scheduler's questions ----

def stored_prompt(make_store):
    store, pages = make_store()
    fill(pages, 1, [0, 1, 2])
    save(store, IDS, [0, 1, 2])


def sequences(daemon):
    with tinyserve.connect(daemon.url) as client, client.pool("kv") as pool:
        return pool.stats().sequences


def test_an_answer_is_worth_a_block_or_nothing(make_store, start_finder, daemon):
    stored_prompt(make_store)
    finder = start_finder(daemon.url)
    up(finder)
    assert answer(finder, "a", IDS, least=64) == 95
    assert sequences(daemon) == 1
    assert finder.take("a")[0] == 64
    assert answer(finder, "b", IDS, least=80) == 0  # 15 more
    assert answer(finder, "c", IDS[:40] + [1], least=0) == 40
    finder.drop("c")
    until(lambda: sequences(daemon) == 1)  # c's is freed; a's is its ticket's
    assert finder.stats.found == 2


def test_a_ticket_ends_with_its_time(make_store, start_finder, daemon):
    stored_prompt(make_store)
    finder = start_finder(daemon.url, ttl=0.05)
    up(finder)
    assert answer(finder, "a", IDS) == 95
    until(lambda: sequences(daemon) == 0)


def test_tickets_of_an_engine_that_is_killed_end_with_their_time(make_store, daemon):
    stored_prompt(make_store)
    code = """
import sys, tinyserve
client = tinyserve.connect(sys.argv[1]); pool = client.pool("kv")
seq, found = pool.match(range(1000, 1096), b"model")
pool.ticket(seq, 0.5); print(found, flush=True); sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code, daemon.url], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout.readline() == "95\n"
        engine.kill()
    until(lambda: sequences(daemon) == 0)


class Clock:
    """Stands in for the time, and for a question's event: waiting is all that takes time."""

    def __init__(self):
        self.now, self.waited = 100.0, []

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def is_set(self):
        return False

    def set(self):
        pass

    def wait(self, seconds):
        self.waited.append(seconds)
        self.now += seconds


def test_a_pass_waits_its_allowance_and_no_longer(daemon, start_finder, monkeypatch):
    finder = start_finder(daemon.url, allowance=0.25, patience=0.6)
    up(finder)
    clock = Clock()
    monkeypatch.setattr("tinyserve.vllm.finder.time", clock)
    monkeypatch.setattr("tinyserve.vllm.finder.threading.Event", lambda: clock)
    for key in "abcd":
        assert finder.ask(key, IDS, SPACE, 0) is None
    assert clock.waited == [0.25, 0, 0, 0] and sum(finder.waits) == 0.25
    finder.begin_pass()
    assert finder.ask("a", IDS, SPACE, 0) is None
    finder.begin_pass()
    assert finder.ask("a", IDS, SPACE, 0) == 0  # its patience is over
    assert clock.waited[4:] == [0.25, 0.25] and finder.stats.missed_late == 1
    up(finder)  # the thread had answered already: nothing else would say so


def test_an_error_of_the_finders_own_is_a_miss(daemon, start_finder, monkeypatch, caplog):
    finder = start_finder(daemon.url)
    up(finder)
    with monkeypatch.context() as patched:
        patched.setattr(Finder, "_match", lambda *_: 1 // 0)
        assert answer(finder, "a", IDS) == 0
        until(lambda: "ZeroDivisionError" in caplog.text)
    assert answer(finder, "b", IDS) == 0 and finder._thread.is_alive()
    assert finder.stats.missed_late == 0


def test_a_paused_daemon_is_a_miss(daemon, start_finder):
    finder = start_finder(daemon.url, patience=0.02, timeout=LONG)
    up(finder)
    daemon.pause()
    assert answer(finder, "a", IDS) == 0
    assert finder.stats.missed_late == 1
    finder.begin_pass()
    for key in "bcd":  # at once: the thread hasn't an answer yet
        assert finder.ask(key, IDS, SPACE, 0) == 0
    assert finder.stats.missed_down == 3
    daemon.resume()
    up(finder)
    assert answer(finder, "e", IDS) == 0 and finder.stats.missed_down == 3
    assert sequences(daemon) == 0


def test_a_killed_daemon_is_a_miss_until_there_is_another(daemon, make_store, start_daemon,
                                                          start_finder):
    finder = start_finder(daemon.url)
    up(finder)
    daemon.process.kill()
    daemon.process.wait()
    assert answer(finder, "a", IDS) == 0
    until(lambda: not finder._up.is_set())
    assert finder.ask("b", IDS, SPACE, 0) == 0
    start_daemon(POOL)
    stored_prompt(make_store)
    up(finder)
    assert answer(finder, "c", IDS) == 95 and finder.stats.sessions == 2


def test_an_engine_may_start_before_the_daemon(tmp_path, start_finder, start_daemon):
    finder = start_finder(str(tmp_path / "s"))
    assert finder.ask("a", IDS, SPACE, 0) == 0
    start_daemon(POOL)
    up(finder)
    assert answer(finder, "b", IDS) == 0 and finder.stats.sessions == 1


def test_pauses_between_attempts_grow():
    backoff = Backoff()
    assert [backoff.failed() for _ in range(9)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert not backoff.over
    backoff.worked()
    assert backoff.over and backoff.failed() == 0.1
