"""kv_connector_extra_config: its keys, and what they may be."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Mapping

_IDENTITY_DIGITS = 32
_NAMESPACE_MOST = 47  #: bytes; 64, less room for a salt's digest


@dataclass(frozen=True)
class Settings:
    url: str | None = None  #: the daemon's, as tinyserve.connect() takes it
    pool: str | None = None  #: its name; None: one that fits is found, or made
    tokens: int = 65536  #: that a pool which is made has room for
    identity: str | None = None  #: of the weights, 32 hexadecimal digits; None: of their files
    namespace: str | None = None  #: in place of one made of the identity
    salt: str = ""  #: keeps apart what equal models store
    timeout: float = 1.0  #: seconds, of one call of a worker to the daemon
    ticket_ttl: float = 30.0  #: seconds between a match and the load of what it found
    on_load_failure: str = "recompute"  #: or "fail": the request ends with an error

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> "Settings":
        """ValueError, TypeError: an unknown key, or a value that can't be."""
        known = {f.name: f for f in fields(cls)}
        for key, value in extra.items():
            if key not in known:
                raise ValueError(f"kv_connector_extra_config: no key {key!r}; known are "
                                 f"{', '.join(known)}")
            _check_type(key, value, known[key].default)
        made = cls(**extra)
        made._check()
        return made

    def _check(self) -> None:
        if self.identity is not None:
            try:
                right = len(bytes.fromhex(self.identity)) * 2 == _IDENTITY_DIGITS
            except ValueError:
                right = False
            if not right:
                raise ValueError(f"identity {self.identity!r}; it has {_IDENTITY_DIGITS} "
                                 "hexadecimal digits")
            if self.namespace is not None:
                raise ValueError("identity and namespace; a namespace stands in place of one that "
                                 "is made of the identity")
        if self.namespace is not None and not 0 < len(self.namespace.encode()) <= _NAMESPACE_MOST:
            raise ValueError(f"namespace of {len(self.namespace.encode())} bytes; the limits are "
                             f"1..{_NAMESPACE_MOST}")
        if self.tokens < 1:
            raise ValueError(f"tokens {self.tokens}; the least is 1")
        for name, most in ("timeout", 3600), ("ticket_ttl", 3600):
            value = getattr(self, name)
            if not 0 < value <= most:
                raise ValueError(f"{name} {value} seconds; it must be more than 0 and at most "
                                 f"{most}")
        if self.on_load_failure not in ("recompute", "fail"):
            raise ValueError(f"on_load_failure {self.on_load_failure!r}; known are \"recompute\" "
                             "and \"fail\"")

    @property
    def where(self) -> str:
        return self.url or os.environ.get("TINYSERVE_URL") or "the default socket"


def _check_type(key: str, value: Any, default: Any) -> None:
    if value is None and default is None:
        return
    wanted: Any = str if default is None else type(default)
    if wanted is float and type(value) is int:
        return
    if type(value) is not wanted:
        raise TypeError(f"{key} must be of type {wanted.__name__}, not {type(value).__name__}")
