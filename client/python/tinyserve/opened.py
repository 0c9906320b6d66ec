"""What is open at the library, who is inside a call on it, and the memory that views refer to.

A handle may be freed by one thread (closed, ended) while another one uses it. So a thread that
calls the library holds its client's lock from before it reads the handle until it has read the
error, and whoever frees takes the handle away under that lock. Finalizers run in any thread, also
in one that holds locks, and so never wait.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from ctypes import c_void_p
from typing import Any, Callable

from ._lib import lib
from .errors import BusyError, DisconnectedError


class OfOneProcess:
    """Stands for something that the library has, which ends it once: no copy, no pickle."""

    __slots__ = ()

    _instead = "it is its session's own"  #: what is said to whoever tries

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"a tinyserve.{type(self).__name__} can't be copied or pickled: "
                        f"{self._instead}")


_all_calls: weakref.WeakSet[Calls] = weakref.WeakSet()


class Calls(OfOneProcess):
    """Who is inside a call on a client and on what was opened from it: the thread that has `lock`.

    looking: held by who only reads through a handle, which another thread's call doesn't hinder,
    and to take a handle away. ending: the same for ts_wait_end and the client's handle."""

    __slots__ = ("lock", "looking", "ending", "_dropped", "__weakref__")

    def __init__(self) -> None:
        self._dropped: deque[Callable[[], None]] = deque()
        self.renew()
        _all_calls.add(self)

    def renew(self) -> None:
        self.lock, self.looking, self.ending = (threading.RLock() for _ in range(3))

    def leave(self) -> None:
        self.lock.release()
        if self._dropped:
            self._sweep()

    def drop(self, end: Callable[[], None]) -> None:
        """Does at once what a finalizer wants, or when the thread that is inside leaves."""
        self._dropped.append(end)
        self._sweep()

    def _sweep(self) -> None:
        while self._dropped and self.lock.acquire(False):
            try:
                while self._dropped:
                    self._dropped.popleft()()
            finally:
                self.lock.release()  # and looks again: one may have been dropped meanwhile


def _after_fork() -> None:
    for calls in list(_all_calls):  # a thread that was inside isn't in this process
        calls.renew()


os.register_at_fork(after_in_child=_after_fork)


class Opened(OfOneProcess):
    """A client, pool, step or frame as the library knows it. Its Python object and its views share
    it, so that a view says so when it has ended, and doesn't keep the object itself alive.

    `with opened as handle:` is a call: it refuses a second thread."""

    __slots__ = ("handle", "calls", "_of", "_ended", "_ending")

    def __init__(self, handle: c_void_p, ended: str, of: Opened | None = None) -> None:
        """of: what it was opened from; None: it is a client."""
        self.handle: c_void_p | None = handle
        self.calls: Calls = of.calls if of is not None else Calls()
        self._of = of
        self._ended = ended  # what is said once there is no handle
        self._ending = False  # a thread waits to end it: no other call comes before

    @property
    def closed(self) -> bool:
        """Or will be, once the call that another thread is in has returned."""
        return self.handle is None or self._ending

    def get(self) -> c_void_p:
        """The handle, which the caller uses while it holds the lock (or `looking`, to read)."""
        if self._of is not None:
            self._of.get()
        handle = self.handle
        if handle is None or self._ending:
            raise DisconnectedError(self._ended, 11, "TS_ECONN")
        return handle

    def check(self) -> None:
        """Of a view, which has outlived its step before it outlives its pool."""
        if self.closed:
            raise DisconnectedError(self._ended, 11, "TS_ECONN")

    def __enter__(self) -> c_void_p:
        calls = self.calls
        if not calls.lock.acquire(False):
            self.get()
            raise BusyError("another thread is inside a call on this client: a client, and what "
                            "was opened from it, is used by one thread at a time", 6, "TS_EBUSY")
        try:
            return self.get()
        except BaseException:
            calls.leave()
            raise

    def __exit__(self, *_: object) -> None:
        self.calls.leave()

    def look(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function says that only reads, whether another thread is inside a call or not."""
        with self.calls.looking:
            return function(self.get(), *arguments)

    def take(self) -> c_void_p | None:
        """The handle, which is the caller's to end. It holds the lock."""
        with self.calls.looking:
            handle, self.handle = self.handle, None
        return handle

    def end(self, close: Callable[[], Any]) -> Any:
        """Calls `close`, which ends it, when the call that another thread may be in has returned.
        That thread's next one is refused."""
        self._ending = True
        try:
            with self.calls.lock:
                return close()
        finally:
            self._ending = False  # it has no handle now, or the wait was interrupted


class Memory(OfOneProcess):
    """Mapped memory. It stays mapped as long as this lives, whatever is closed meanwhile; a GPU's
    isn't held."""

    __slots__ = ("_held",)

    def __init__(self, held: int | None) -> None:
        self._held = held  # a ts_memory

    def __del__(self, release: Any = lib.ts_memory_release) -> None:  # modules may be gone already
        release(self._held)
