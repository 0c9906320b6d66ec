"""The namespace of a model: 128 bits of its configuration and all of its weights.

K and V depend on the weights, on what is attached to them (adapters) and on the configuration. Two
models of different content get different namespaces, so that neither finds what the other stored.
The hash is XXH3 with 128 bits (of the package xxhash): it tells models apart that differ by
accident or by training, and isn't meant to withstand somebody who makes two on purpose.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable

PIECE_BYTES = 32 << 20
_FORMAT = b"tinyserve weights 1"
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
    name = b"hf-" + digest.hex().encode()
    if salt:
        name += b"-" + str(_xxhash().xxh3_64_hexdigest(salt)).encode()
    return name
