"""The namespace of a model: 128 bits of its configuration and all of its weights.

K and V depend on the weights, on what is attached to them (adapters) and on the configuration. Two
models of different content get different namespaces, so that neither finds what the other stored.
The hash is XXH3 with 128 bits (of the package xxhash): it tells models apart that differ by
accident or by training, and isn't meant to withstand somebody who makes two on purpose.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable

PIECE_BYTES = 32 << 20
_FORMAT = b"tinyserve weights 1"
_REMEMBERED_MOST = 64  #: models
#: of a configuration: they say where a model came from, or how it is run, and not what it computes
_IGNORED = ("_name_or_path", "name_or_path", "transformers_version", "_attn_implementation",
            "_attn_implementation_internal", "attn_implementation", "use_cache",
            "output_attentions", "output_hidden_states", "return_dict", "architectures",
            "_experts_implementation", "_experts_implementation_internal")


def _xxhash() -> Any:
    try:
        import xxhash
    except ImportError:
        raise ImportError("the identity of a model's weights needs the package xxhash: "
                          "pip install xxhash, or pip install 'tinyserve[transformers]'") from None
    return xxhash


def digest_of(pieces: Iterable[tuple[str, Callable[[], Any]]], config: dict[str, Any],
              threads: int | None = None) -> bytes:
    """16 bytes. pieces: in any order, a label (name, type, shape and offset of a part of a tensor)
    and a function that gives its bytes as a buffer; each is called once, by several threads
    (xxhash lets others run meanwhile)."""
    xxhash = _xxhash()

    def hashed(piece: tuple[str, Callable[[], Any]]) -> tuple[str, bytes]:
        label, content = piece
        return label, xxhash.xxh3_128_digest(content())

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        parts = sorted(pool.map(hashed, pieces))
    whole = xxhash.xxh3_128(_FORMAT)
    whole.update(json.dumps({k: v for k, v in config.items() if k not in _IGNORED},
                            sort_keys=True, default=str).encode())
    for label, digest in parts:
        whole.update(b"\0" + label.encode() + b"\0" + digest)
    result: bytes = whole.digest()
    return result


def namespace_of(digest: bytes, salt: bytes = b"") -> bytes:
    """The namespace: "hf-" and the digest in hexadecimal, and the salt's own digest after it."""
    return salted(b"hf-" + digest.hex().encode(), salt)


def salted(name: bytes, salt: bytes) -> bytes:
    """The name, and 17 bytes more that tell the salt, if there is one."""
    if salt:
        name += b"-" + str(_xxhash().xxh3_64_hexdigest(salt)).encode()
    return name


def files_key(paths: Iterable[str | os.PathLike[str]], sample: bytes) -> str:
    """What tells a model's files from others, and from what they were before: where they are, their
    inode, size and time of change. sample: a digest of some of the weights in memory."""
    said = []
    for path in sorted(os.path.realpath(p) for p in paths):
        s = os.stat(path)
        said.append([path, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns])
    return str(_xxhash().xxh3_128_hexdigest(json.dumps([said, sample.hex()]).encode()))


class Remembered:
    """Digests by files_key(), in the user's cache folder. What can't be read or written there is
    computed again."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        cache = folder or os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        self._path = pathlib.Path(cache, "tinyserve", "weights.json")

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def get(self, key: str) -> bytes | None:
        try:
            digest = bytes.fromhex(self._read()[key])
        except (KeyError, TypeError, ValueError):
            return None
        return digest if len(digest) == 16 else None

    def put(self, key: str, digest: bytes) -> None:
        known = self._read()
        known.pop(key, None)
        known[key] = digest.hex()
        for old in list(known)[:-_REMEMBERED_MOST]:
            del known[old]
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as new:
                json.dump(known, new)
            os.replace(new.name, self._path)
        except OSError:
            pass  # then it is computed again
