"""Checks of what callers pass. C sees an argument only after it was checked here: ctypes would cut
a string at its first NUL and a number to its type's bits, without a word."""

from __future__ import annotations

import array
import ctypes
import math
import numbers
import operator
import os
from ctypes import POINTER
from typing import Any, Iterable

U32, U64 = 2**32 - 1, 2**64 - 1
NAMESPACE_MAX = 64  #: bytes
BATCH_MAX = 1 << 20  #: sequences of one call, whatever the daemon's own limit (batch) is
TICKET_BYTES = 16
TICKET_SECONDS_MAX = 3600
TTL_SECONDS_MAX = 10**12  #: of a kept sequence
_SECONDS_MAX = (2**31 - 1) // 1000  # of a timeout in NNG's milliseconds: 24 days


def text(name: str, value: str) -> bytes:
    """A C string of the text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {_kind(value)}")
    _refuse_nul(name, value, "\0")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {value!r} isn't Unicode text: {error.reason}") from None


def path(name: str, value: str | os.PathLike[str]) -> bytes:
    """A C string of a path, or of an address with a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a string or a path, not {_kind(value)}")
    encoded = os.fsencode(value)
    _refuse_nul(name, encoded, b"\0")
    return encoded


def _refuse_nul(name: str, value: Any, nul: Any) -> None:
    if nul in value:
        raise ValueError(f"{name} {value!r} has a NUL at {value.index(nul)}: there it would end")


def _kind(value: object) -> str:
    return f"{type(value).__name__} ({value!r:.60})"


def integer(name: str, value: int, least: int = 0, most: int = U32) -> int:
    """The integer, within its limits."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {_kind(value)}") from None
    if number < least and most in (U32, U64, BATCH_MAX):  # others have limits that are less
        raise ValueError(f"{name} {number}; at least {least} is needed")
    if not least <= number <= most:
        raise ValueError(f"{name} {number}; the limits are {least}..{most}")
    return number


def real(name: str, value: float) -> float:
    """The number. The library checks its range."""
    if type(value) is not float and not isinstance(value, numbers.Real):  # the latter is slow
        raise TypeError(f"{name} must be a number, not {_kind(value)}")
    return float(value)


def milliseconds(name: str, value: float, *, may_be_0: bool, most: int = _SECONDS_MAX) -> int:
    """Of a time in seconds; at least 1 if it is more than 0."""
    seconds = real(name, value)
    if not (0 <= seconds <= most and (seconds > 0 or may_be_0)):
        least = "at least" if may_be_0 else "more than"
        raise ValueError(f"{name} {value} seconds; it must be {least} 0 and at most {most}")
    return math.ceil(seconds * 1000)


def choice(name: str, value: str, known: tuple[str, ...]) -> int:
    """The value's place among those that are known."""
    if value not in known:
        raise ValueError(f"{name} {value!r}; known are {', '.join(known)}")
    return known.index(value)


def integers(name: str, ctype: type[ctypes.c_uint32] | type[ctypes.c_uint64],
             values: Iterable[int]) -> tuple[Any, int]:
    """A C array of the integers, and how many they are; a contiguous NumPy array of the right type
    is not copied."""
    interface = getattr(values, "__array_interface__", None)
    size = ctypes.sizeof(ctype)
    if interface is not None and interface["typestr"] == f"<u{size}" and \
            interface.get("strides") is None and len(interface["shape"]) == 1:
        pointer: Any = ctypes.cast(interface["data"][0], POINTER(ctype))
        pointer.keeps = values
        return pointer, interface["shape"][0]
    listed = _iterate(name, values)
    try:
        packed = array.array("I" if size == 4 else "Q", listed)  # many times quicker than ctypes
    except OverflowError:
        wrong = next(v for v in listed if not 0 <= operator.index(v) < 1 << (8 * size))
        raise OverflowError(f"{name}: {wrong} doesn't fit into {8 * size} bits without sign") \
            from None
    except TypeError:
        odd: list[Any] = [v for v in listed
                          if not hasattr(v, "__index__") or getattr(v, "ndim", 0) > 0]
        raise TypeError(f"{name}: {(odd or listed)[0]!r:.60} isn't an integer") from None
    return (ctype * len(packed)).from_buffer(packed), len(packed)


def token_ids(name: str, values: Iterable[int], wanted: int | None = None) -> tuple[Any, int]:
    """A C array of token ids, and how many they are: `wanted`, unless that is None. NumPy arrays of
    int32 and uint32 are not copied; of int64 they are. -1 is an id that isn't known."""
    interface = getattr(values, "__array_interface__", None)
    if interface is not None and interface["typestr"] in ("<i4", "<i8") and \
            len(interface["shape"]) == 1:
        array_: Any = values
        wrong = array_[(array_ < -1) | (array_ > U32)]
        if len(wrong) > 0:
            raise OverflowError(f"{name}: {wrong[0]} is no token id")
        if interface["typestr"] == "<i4" and interface.get("strides") is None:
            values = array_.view("uint32")
        else:
            values = array_.astype("uint32")
    elif interface is None:
        values = [U32 if v == -1 else v for v in _iterate(name, values)]
    packed, n = integers(name, ctypes.c_uint32, values)
    if wanted is not None and n != wanted:
        raise ValueError(f"{wanted} new tokens, but {n} {name}")
    return packed, n


def _iterate(name: str, values: Iterable[int]) -> list[int]:
    if isinstance(values, (str, bytes, dict)):
        raise TypeError(f"{name} must be a list of integers, not {_kind(values)}")
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of integers, not {_kind(values)}") from None


def ticket(value: bytes) -> bytes:
    """The bytes of a ticket."""
    if not isinstance(value, bytes):
        raise TypeError(f"ticket must be bytes, not {type(value).__name__}")
    if len(value) != TICKET_BYTES:
        raise ValueError(f"ticket of {len(value)} bytes; it has {TICKET_BYTES}")
    return value


def namespace(value: bytes) -> bytes:
    """The bytes of a namespace."""
    if not isinstance(value, bytes):
        raise TypeError(f"namespace must be bytes, not {_kind(value)}")
    if len(value) > NAMESPACE_MAX:
        raise ValueError(f"namespace of {len(value)} bytes; the limit is {NAMESPACE_MAX}")
    return value


def pair(name: str, seqs: Iterable[int], values: Iterable[int]) -> tuple[Any, Any, int]:
    """C arrays of sequences and of a number for each of them."""
    ids, n = integers("seqs", ctypes.c_uint64, seqs)
    numbers_, m = integers(name, ctypes.c_uint32, values)
    if n != m:
        raise ValueError(f"{n} sequences, but {m} {name}")
    return ids, numbers_, n
