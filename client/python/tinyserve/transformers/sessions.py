"""Sessions with the daemon: one for each thread that makes caches, used by one thread at a time."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any, Callable, Iterable

from ..client import Client
from ..errors import BusyError, DisconnectedError, Error, NotFoundError, TimedOutError
from ..pool import Pool


class Session:
    """A connection and its pool. Whoever uses them holds `lock`."""

    def __init__(self, client: Client, pool: Pool) -> None:
        self.client, self.pool = client, pool
        self.lock = threading.RLock()
        self._dropped: deque[int] = deque()  # sequences to be freed, by whichever thread comes next
        self._views: dict[str, tuple[Any, Any, Any]] = {}

    @property
    def usable(self) -> bool:
        return not self.client._opened.closed

    def drop(self, seqs: Iterable[int]) -> None:
        """Frees sequences; at once, unless another thread is using the session."""
        self._dropped.extend(seqs)
        if self.lock.acquire(blocking=False):
            try:
                self.sweep()
            finally:
                self.lock.release()

    def sweep(self) -> None:
        """Frees what was dropped. What can't be freed now stays for whoever comes next: a finalizer
        may run in the midst of another call."""
        seqs: list[int] = []
        try:
            while self._dropped:
                seqs.append(self._dropped.popleft())
            if seqs and self.usable:
                self._free(seqs)
        except DisconnectedError:
            pass  # they went with the session
        except TimedOutError:
            self._dropped.extend(seqs)
        except BaseException:
            self._dropped.extend(seqs)
            raise

    def _free(self, seqs: list[int]) -> None:
        try:
            self.pool.free(seqs)  # all or none
        except (DisconnectedError, TimedOutError):
            raise
        except Error:  # an operator has freed some, or they are too many at once: one by one
            for seq in dict.fromkeys(seqs):
                try:
                    self.pool.free([seq])
                except NotFoundError:
                    pass
                except BusyError:
                    self._dropped.append(seq)

    def tensor(self, name: str, view: Any) -> Any:
        """The view as a torch tensor; steps of one shape in one place get the same one."""
        key = (view.ptr, view.shape, id(view._memory))
        known = self._views.get(name)
        if known is not None and known[0] == key:
            return known[1]
        tensor = view.torch()
        self._views[name] = key, tensor, view._memory  # so that no other memory has its address
        return tensor

    def close(self) -> None:
        with self.lock:
            self._views.clear()
            self.client.close()


class _Lease:
    """A thread's hold of a session. It goes when the thread ends."""

    def __init__(self, sessions: "Sessions", session: Session) -> None:
        self.session, self._sessions = session, weakref.ref(sessions)

    def __del__(self) -> None:
        sessions = self._sessions()
        if sessions is not None:
            sessions._idle.append(self.session)


class Sessions:
    """Opens them with `connect`, and closes them."""

    def __init__(self, connect: Callable[[], tuple[Client, Pool]]) -> None:
        self._connect = connect
        self._thread = threading.local()
        self._idle: deque[Session] = deque()
        self._all: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.closed = False

    def mine(self) -> Session:
        """This thread's session; one that was lost is replaced."""
        if self.closed:
            raise DisconnectedError("the model was detached: attach it again", 11, "TS_ECONN")
        lease = getattr(self._thread, "lease", None)
        if lease is None or not lease.session.usable:
            lease = self._thread.lease = _Lease(self, self._take())
        session: Session = lease.session
        return session

    def _take(self) -> Session:
        while self._idle:
            session = self._idle.popleft()
            if session.usable:
                return session
        return self._open()

    def _open(self) -> Session:
        session = Session(*self._connect())
        with self._lock:
            self._all.add(session)
        return session

    def anew(self) -> Session:
        """Another session, which was opened just now, for this thread."""
        session = self._open()
        self._thread.lease = _Lease(self, session)
        return session

    def lost(self, session: Session) -> None:
        """The session's daemon is gone: the next one to ask gets another."""
        try:
            session.close()
        except Error:
            pass

    def close(self) -> None:
        self.closed = True
        with self._lock:
            sessions = list(self._all)
        for session in sessions:
            session.close()
        self._idle.clear()
