"""What is open at the library, and the memory that views of it refer to."""

from __future__ import annotations

from ctypes import c_void_p
from typing import Any, Callable

from ._lib import lib
from .errors import DisconnectedError


class Opened:
    """A pool, step or frame as the library knows it. Its Python object and its views share it, so
    that a view says so when it has ended, and doesn't keep the object itself alive."""

    __slots__ = ("handle", "ended")

    def __init__(self, handle: c_void_p, ended: str) -> None:
        self.handle: c_void_p | None = handle
        self.ended = ended  #: what is said once there is no handle

    def get(self) -> c_void_p:
        if self.handle is None:
            raise DisconnectedError(self.ended, 11, "TS_ECONN")
        return self.handle

    def take(self) -> c_void_p | None:
        """The handle, which is the caller's to end."""
        handle, self.handle = self.handle, None
        return handle


class Memory:
    """Mapped memory. It stays mapped as long as this lives, whatever is closed meanwhile; a GPU's
    isn't held."""

    __slots__ = ("_held",)

    def __init__(self, hold: Callable[[c_void_p], int | None], handle: c_void_p) -> None:
        self._held = hold(handle)

    def __del__(self, release: Any = lib.ts_memory_release) -> None:  # modules may be gone already
        release(self._held)
