"""Hugging Face Transformers on a pool of TinyServe.

    import tinyserve.transformers as ts
    kv = ts.attach(model)
    out = model.generate(**inputs, past_key_values=kv.cache(**inputs))
    print(kv.stats)
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import transformers as _transformers

from ..engines.geometry import Unsupported

SUPPORTED = (5, 17), (5, 24)  #: the oldest and the newest Transformers


def _version() -> tuple[int, int]:
    major, minor = _transformers.__version__.split(".")[:2]
    return int(major), int(minor)


if not SUPPORTED[0] <= _version() <= SUPPORTED[1]:
    raise ImportError(f"transformers {_transformers.__version__}; tinyserve.transformers supports "
                      + " to ".join(f"{a}.{b}" for a, b in SUPPORTED))

from .attached import Attached, Options, Stats  # noqa: E402
from .cache import PooledCache  # noqa: E402

__all__ = ["Attached", "PooledCache", "SUPPORTED", "Stats", "Unsupported", "attach"]


def attach(model: Any, *, url: str | PathLike[str] | None = None, pool: str | None = None,
           execution: str | None = None, tokens: int = 65536, identity: bytes | str | None = None,
           salt: bytes = b"", wait: float = 0.0, share_wait: float = 30.0, timeout: float = 30.0,
           threads: int = 0) -> Attached:
    """Makes a Transformers model of text use a pool of TinyServe for the K and V of the caches that
    kv.cache() makes. With other caches it works as before.

    url: the daemon's, as tinyserve.connect() takes it.
    pool: its name; None: one that fits is found, or made with room for `tokens` tokens.
    execution: who attends, "daemon", "local" or "auto"; None: the daemon in host memory, on a GPU
    "auto" if the pool allows it.
    identity: what tells these weights from all others. None: all of them are read, now and whenever
    they have been changed by torch. "files": their digest is remembered by the files that the model
    was loaded from; take it if you know that nothing has changed it since. Or 16 bytes of your own.
    salt: bytes that keep apart what equal models store.
    wait: seconds that a forward pass waits for room in the pool.
    share_wait: seconds that cache() waits for another process that computes the same beginning.
    timeout: seconds of one call to the daemon. threads: of local execution on the host.

    Raises Unsupported for models that can't be served, DisconnectedError without a daemon,
    InvalidError where the pool doesn't fit."""
    if identity not in (None, "files") and not (isinstance(identity, bytes) and
                                                len(identity) == 16):
        raise ValueError("identity must be 16 bytes, or \"files\", or None")
    return Attached(model, Options(url, pool, execution, tokens, identity, salt, wait, share_wait,
                                   timeout, threads, _version() < (5, 18), _version() < (5, 21)))
