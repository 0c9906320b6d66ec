"""Sessions with the daemon that are lost and made again."""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable

from ..client import Client
from ..errors import DisconnectedError, Error, InternalError, ProtocolError, TimedOutError
from ..pool import Pool

log = logging.getLogger("vllm.tinyserve")
SESSION_ENDS = (DisconnectedError, TimedOutError, ProtocolError, InternalError)
_PAUSE_LEAST, _PAUSE_MOST = 0.1, 5.0  #: seconds between attempts to connect


class Backoff:
    """Pauses between attempts that double as they fail."""

    def __init__(self) -> None:
        self.failures, self._until = 0, 0.0

    def failed(self) -> float:
        """Seconds to pause."""
        pause = min(_PAUSE_MOST, _PAUSE_LEAST * 2.0 ** min(self.failures, 32))
        self.failures += 1
        self._until = time.monotonic() + pause
        return pause

    def worked(self) -> None:
        self.failures, self._until = 0, 0.0

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until


class Connecting:
    """Connects by a thread of its own, so that nobody waits for a daemon that doesn't answer.
    Otherwise for one thread."""

    def __init__(self, connect: Callable[[], tuple[Client, Pool]]) -> None:
        self._connect = connect
        self._backoff = Backoff()
        self._thread: threading.Thread | None = None
        self._made: tuple[Client, Pool] | None = None
        self._old: tuple[Client, Pool] | None = None
        self._error: Exception | None = None

    def lost(self, session: tuple[Client, Pool]) -> None:
        """The session is no good, and is closed here: that, too, may wait for the daemon."""
        self._old = session
        self._backoff.failed()

    def poll(self) -> tuple[Client, Pool] | None:
        """A session, once; the caller closes it. None: there is none yet."""
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._thread = None
            made, self._made = self._made, None
            if made is not None:
                self._backoff.worked()
                return made
            if self._backoff.failures == 0:
                log.warning("TinyServe: %s; trying again", self._error)
            self._backoff.failed()
        if self._backoff.over:
            self._thread = threading.Thread(target=self._run, name="tinyserve-connect", daemon=True)
            self._thread.start()
        return None

    def _run(self) -> None:
        old, self._old = self._old, None
        if old is not None:
            old[0].close()
        try:
            self._made = self._connect()
        except (Error, OSError, ValueError) as error:
            self._error = error

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join(2.0)
        for session in self._made, self._old:
            if session is not None:
                session[0].close()
