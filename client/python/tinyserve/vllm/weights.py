"""The identity of a model by its files: what vLLM loads them from, in any process."""

from __future__ import annotations

import json
import mmap
import os
import pathlib
from typing import Any, Callable, Iterator, Sequence

from ..engines.identity import PIECE_BYTES, Remembered, digest_of, files_key

_KINDS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")  #: the first that is there


def files_of(model: str, revision: str | None = None) -> list[pathlib.Path]:
    """The model's weights: a folder's, a file's own, or those of the hub's cache. ValueError: they
    aren't in files here."""
    path = pathlib.Path(model)
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = _hub_folder(model, revision) or path
    for kind in _KINDS:
        files = sorted(path.glob(kind)) if path.is_dir() else []
        if files:
            return files
    raise ValueError(f"no weights of model {model!r} are in files here, so that nothing tells them "
                     "from others: set \"identity\" in kv_connector_extra_config (32 hexadecimal "
                     "digits that change whenever the weights do)")


def _hub_folder(model: str, revision: str | None) -> pathlib.Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    at = try_to_load_from_cache(model, "config.json", revision=revision)
    return pathlib.Path(at).parent if isinstance(at, str) else None


def _pieces(files: Sequence[pathlib.Path]) -> Iterator[tuple[str, Callable[[], Any]]]:
    for file in files:
        size = os.stat(file).st_size
        if size == 0:
            continue
        with open(file, "rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        for at in range(0, size, PIECE_BYTES):
            yield (f"{file.name} {size} {at:016x}",
                   lambda m=mapped, a=at: memoryview(m)[a:a + PIECE_BYTES])  # type: ignore[misc]


def digest(files: Sequence[pathlib.Path], config: dict[str, Any],
           memory: Remembered | None = None) -> bytes:
    """16 bytes of the files' content and the configuration; remembered by the files' identity
    (path, inode, size, time) and the configuration."""
    memory = memory or Remembered()
    text = json.dumps(config, sort_keys=True, default=str).encode()
    key = files_key(files, b"vllm" + text)
    known = memory.get(key)
    if known is None:
        known = digest_of(_pieces(files), config)
        memory.put(key, known)
    return known
