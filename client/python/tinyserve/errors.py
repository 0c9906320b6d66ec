"""Exceptions: one for each status, all of them tinyserve.Error."""

from __future__ import annotations


class Error(Exception):
    """A call failed. `status` is the ts_status's number, `name` its name ("TS_ENOSPC"); the text is
    the library's sentence, which names the thing, its value and the limit. The same in numbers, in
    the sentence's units (blocks, sequences, ...; 0 where they do not apply): `needed` is what the
    call asked for, `free` what there is of it to be had, `limit` the quota, the pool's size or the
    most that is allowed; where a step finds no room, in blocks, `cached` how many of `free` are
    cached, `pinned` what this user's kept sequences hold, and `others` what other users use."""

    status = 0
    name = ""
    needed = free = limit = cached = pinned = others = 0

    def __init__(self, message: str, status: int = 0, name: str = "") -> None:
        super().__init__(message)
        if name:
            self.status, self.name = status, name


class InvalidError(Error, ValueError):
    """TS_EINVAL: an argument is malformed or out of range."""


class NotFoundError(Error, LookupError):
    """TS_ENOENT: no such pool, sequence, step, name or session."""


class ExistsError(Error):
    """TS_EEXIST: the name is taken."""


class NoSpaceError(Error):
    """TS_ENOSPC: the pool has too few free blocks; nothing was taken."""


class QuotaError(Error):
    """TS_EQUOTA: a limit of this session or tenant would be passed; nothing was taken."""


class BusyError(Error):
    """TS_EBUSY: the sequence is in an open step, the step has a run in flight, or another thread is
    inside a call on the client."""


class DeniedError(Error, PermissionError):
    """TS_EPERM: it belongs to somebody else, or the configuration forbids it."""


class StaleError(Error):
    """TS_ESTALE: a repeated request whose first answer is no longer kept."""


class ProtocolError(Error):
    """TS_EPROTO: the message could not be understood, or a protocol version is not spoken."""


class OutOfMemoryError(Error, MemoryError):
    """TS_ENOMEM: memory or another system resource ran out."""


class DisconnectedError(Error, ConnectionError):
    """TS_ECONN: the daemon can't be reached, or went away: the session is over."""


class TimedOutError(Error, TimeoutError):
    """TS_ETIMEOUT: no answer within the timeout; the request may or may not have been applied."""


class DeviceError(Error):
    """TS_EDEVICE: the device (or its memory) failed."""


class InternalError(Error):
    """TS_EINTERNAL: a bug in TinyServe."""


BY_STATUS: dict[int, type[Error]] = {
    number: error for number, error in enumerate(
        [InvalidError, NotFoundError, ExistsError, NoSpaceError, QuotaError, BusyError, DeniedError,
         StaleError, ProtocolError, OutOfMemoryError, DisconnectedError, TimedOutError, DeviceError,
         InternalError], start=1)
}
