"""The scheduler's questions to the daemon, asked by a thread of their own.

The scheduler never waits longer than its allowance (2 ms for each pass over its queue). What isn't
answered by then is asked for again in the next pass, and after `patience` it is a miss. While the
daemon can't be reached, or hasn't answered for that long, every question is a miss at once, and
the thread connects again with growing pauses.

An answer holds a ticket: the matched sequence is nobody's, and freed when the ticket's time is
over, also if this process dies.
"""

from __future__ import annotations

import array
import collections
import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Sequence

from ..client import Client
from ..errors import Error
from ..pool import Pool

from .sessions import SESSION_ENDS, Backoff

log = logging.getLogger("vllm.tinyserve")


@dataclass
class _Question:
    key: str
    ids: Sequence[int]
    namespace: bytes
    least: int  #: tokens that the engine has itself
    begun: float
    answered: threading.Event
    dropped: bool = False
    found: int = 0
    ticket: bytes | None = None


@dataclass
class FinderStats:
    asked: int = 0
    found: int = 0  #: questions that got a ticket
    missed_late: int = 0  #: not answered within the patience
    missed_down: int = 0  #: the daemon couldn't be reached
    sessions: int = 0


class Finder:
    """ask(), take(), drop() and begin_pass() are for one thread, the scheduler's.

    connect: gives a session and its pool; called by the thread, and again after failures."""

    def __init__(self, connect: Callable[[], tuple[Client, Pool]], *, allowance: float = 0.002,
                 patience: float = 0.1, ttl: float = 30.0) -> None:
        self._connect, self._allowance = connect, allowance
        self._patience, self._ttl = patience, ttl
        self._left = allowance
        self._asked: dict[str, _Question] = {}
        self._work: queue.SimpleQueue[Callable[[Pool], None] | None] = queue.SimpleQueue()
        self._up, self._stop = threading.Event(), threading.Event()
        self._late_until_connected = False
        self.stats = FinderStats()
        self.waits: collections.deque[float] = collections.deque(maxlen=10000)  #: seconds, of asks
        self._thread = threading.Thread(target=self._run, name="tinyserve-finder", daemon=True)

    def start(self, session: tuple[Client, Pool] | None = None) -> None:
        """session: one that is there already, from now on the thread's."""
        if session is not None:
            self._up.set()
            self.stats.sessions += 1
        self._session = session
        self._thread.start()

    # ---- the scheduler ----

    def begin_pass(self) -> None:
        self._left = self._allowance

    def ask(self, key: str, ids: Sequence[int], namespace: bytes, least: int) -> int | None:
        """How many of the ids' tokens the pool has: 0 unless it is at least a block more than
        `least`. None: ask again. ids aren't changed until they are answered for."""
        begun = time.perf_counter()
        try:
            return self._ask(key, ids, namespace, least)
        finally:
            self.waits.append(time.perf_counter() - begun)

    def _ask(self, key: str, ids: Sequence[int], namespace: bytes, least: int) -> int | None:
        now = time.monotonic()
        question = self._asked.get(key)
        if question is not None and (
                (question.namespace, question.least) != (namespace, least)
                or now - question.begun > max(self._ttl / 2, 2 * self._patience)):
            self.drop(key)
            question = None
        if question is None:
            self.stats.asked += 1
            if not self._up.is_set():
                self.stats.missed_down += 1
                return 0
            question = _Question(key, ids, namespace, least, now, threading.Event())
            self._asked[key] = question
            self._work.put(lambda pool, q=question: self._answer(pool, q))  # type: ignore[misc]
        if not question.answered.is_set():
            waited = time.perf_counter()
            question.answered.wait(self._left)
            self._left = max(0.0, self._left - (time.perf_counter() - waited))
        if question.answered.is_set():
            if question.ticket is None:
                self._asked.pop(key, None)
            return question.found
        if time.monotonic() - question.begun > self._patience:
            # Down until the thread has done something more. It may have answered just now, and
            # have nothing more to do: so it gets something, after which it is up again.
            self._up.clear()
            self._work.put(lambda pool: None)
            self.stats.missed_late += 1
            self.drop(key)
            return 0
        return None

    def take(self, key: str) -> tuple[int, bytes]:
        """Of the last answer, which was more than 0: its `least`, and the ticket, which is the
        caller's now."""
        question = self._asked.pop(key)
        assert question.ticket is not None
        return question.least, question.ticket

    def drop(self, key: str) -> None:
        """The answer isn't wanted; its sequence is freed."""
        question = self._asked.pop(key, None)
        if question is None:
            return
        question.dropped = True
        if question.ticket is not None and self._up.is_set():
            ticket = question.ticket
            self._work.put(lambda pool: _free_ticket(pool, ticket))

    def close(self) -> None:
        self._stop.set()
        self._work.put(None)
        if self._thread.is_alive():
            self._thread.join(2.0)

    # ---- the thread ----

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stop.is_set():
            if self._session is None and not self._try_connect(backoff):
                continue
            work = self._work.get()
            if work is None or self._session is None:
                continue
            try:
                work(self._session[1])
                self._up.set()
            except SESSION_ENDS as error:
                log.warning("TinyServe: %s; nothing is found until the daemon is there again",
                            error)
                self._lose()
            except Exception:  # of our own making: this prompt's alone
                log.exception("TinyServe: a prompt wasn't matched")
                self._up.set()
        self._lose()

    def _try_connect(self, backoff: Backoff) -> bool:
        try:
            self._session = self._connect()
        except (Error, OSError, ValueError) as error:
            pause = backoff.failed()
            if backoff.failures == 1:
                log.warning("TinyServe: %s; trying again", error)
            self._forget_work()
            self._stop.wait(pause)
            return False
        backoff.worked()
        self._forget_work()
        self.stats.sessions += 1
        if self.stats.sessions > 1:
            log.warning("TinyServe: connected again")
        self._up.set()
        return True

    def _lose(self) -> None:
        self._up.clear()
        session, self._session = self._session, None
        if session is not None:
            session[0].close()
        self._forget_work()

    def _forget_work(self) -> None:
        """What was asked while there was no daemon is a miss."""
        while True:
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                return
            if work is None:
                self._work.put(None)
                return
            work(None)  # type: ignore[arg-type]

    def _answer(self, pool: Pool | None, question: _Question) -> None:
        try:
            if pool is not None and not question.dropped:
                self._match(pool, question)
        except SESSION_ENDS:
            raise
        except Error as error:
            log.warning("TinyServe: a prompt of %d tokens wasn't matched: %s",
                        len(question.ids), error)
        finally:
            question.answered.set()

    def _match(self, pool: Pool, question: _Question) -> None:
        import numpy as np
        ids = np.frombuffer(array.array("I", question.ids), np.uint32)  # quicker than NumPy's own
        seq, found = pool.match(ids, question.namespace)
        if found < question.least + pool.geometry.block_tokens or question.dropped:
            pool.free([seq])
            return
        question.ticket = pool.ticket(seq, self._ttl)
        question.found = found
        self.stats.found += 1
        if question.dropped:  # meanwhile
            _free_ticket(pool, question.ticket)

    _session: tuple[Client, Pool] | None = None


def _free_ticket(pool: Any, ticket: bytes) -> None:
    if pool is None:
        return
    try:
        pool.free([pool.redeem(ticket)])
    except SESSION_ENDS:
        raise
    except Error:
        pass  # its time was over
