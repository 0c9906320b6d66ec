"""The weights of a torch model as bytes, and what tells that they have changed."""

from __future__ import annotations

import ctypes
import operator
import pathlib
import threading
from typing import Any, Callable, Iterable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..engines.identity import PIECE_BYTES, Remembered, digest_of, files_key

_SAMPLE_BYTES = 4096  #: of the beginning, the middle and the end of each tensor
_thread = threading.local()


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and buffers that are saved with them. Others are made of the configuration, and
    some (frequencies of rotary embeddings) are written in every pass."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", tensor


def _on_host(piece: torch.Tensor) -> torch.Tensor:
    """The piece, or a copy of it in this thread's pinned memory, which the next one overwrites."""
    if piece.device.type == "cpu":
        return piece
    pinned = getattr(_thread, "pinned", None)
    if pinned is None:
        pinned = _thread.pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
    copy: torch.Tensor = pinned[:piece.numel()].copy_(piece)
    return copy


def _bytes_of(piece: torch.Tensor) -> Callable[[], Any]:
    def content() -> Any:
        host = _on_host(piece)
        view = (ctypes.c_char * host.numel()).from_address(host.data_ptr())
        view.tensor = host  # which owns the memory
        return view
    return content


def _flat(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor's label and bytes."""
    for name, tensor in _tensors(model):
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: it has no content")
        yield (f"{name} {tensor.dtype} {list(tensor.shape)}",
               tensor.detach().contiguous().reshape(-1).view(torch.uint8))


def _pieces(model: torch.nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    for label, flat in _flat(model):
        for at in range(0, max(flat.numel(), 1), PIECE_BYTES):
            yield f"{label} {at:016x}", _bytes_of(flat[at:at + PIECE_BYTES])


def _samples(model: torch.nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    for label, flat in _flat(model):
        last = max(0, flat.numel() - _SAMPLE_BYTES)
        for at in sorted({0, last // 2, last}):
            yield f"{label} {at:016x}", _bytes_of(flat[at:at + _SAMPLE_BYTES])


def _is_adapter(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "active_adapters", None), (list, tuple))


def _adapter_states(modules: Iterable[tuple[str, torch.nn.Module]]) -> list[Any]:
    """Of each layer with adapters (PEFT's): which are active, and how strongly; none of that is a
    parameter."""
    return [[name, list(m.active_adapters),
             dict(getattr(m, "scaling", None) or {}), bool(getattr(m, "disable_adapters", False)),
             list(getattr(m, "merged_adapters", None) or ())] for name, m in modules]


def _adapters(model: torch.nn.Module) -> list[Any]:
    return _adapter_states((name, m) for name, m in model.named_modules() if _is_adapter(m))


def _version(tensor: torch.Tensor) -> int:
    """How often it was written. Of one that was made in inference mode torch doesn't count that."""
    return -1 if tensor.is_inference() else int(tensor._version)


class Fingerprint:
    """What changes when somebody writes weights by torch's operations, replaces one, or switches an
    adapter. It takes no look at the weights, so that writing by `.data`, past torch, or those that
    were made in inference mode, isn't seen.

    It holds the tensors' storages weakly: their memory may go, and no later one is taken for
    them."""

    def __init__(self, model: torch.nn.Module) -> None:
        tensors = [t for _, t in _tensors(model)]
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        self._said = ([(s.cdata, t.storage_offset(), _version(t))
                       for s, t in zip(self._storages, tensors)], _adapters(model))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._said == other._said


class Glance:
    """The parameters, for a namespace: a tenth of a millisecond tells whether one was written or
    replaced, a module was added or replaced, or an adapter switched. Buffers aren't looked at. It
    keeps what it has seen alive."""

    def __init__(self, model: torch.nn.Module, namespace: bytes) -> None:
        modules = list(model.modules())
        self._of_modules = [m._parameters for m in modules]
        self._parents = [m._modules for m in modules]
        self._adapters = [(name, m) for name, m in model.named_modules() if _is_adapter(m)]
        self._namespace, self._children = namespace, self._modules()
        self._parameters = [p for of_one in self._of_modules for p in of_one.values()]
        self._there = [p for p in self._parameters if p is not None]
        self._counted = [p for p in self._there if not p.is_inference()]
        self._said = self._say()

    def _modules(self) -> list[torch.nn.Module | None]:
        return [m for children in self._parents for m in children.values()]

    def _say(self) -> tuple[list[int], list[int], list[Any]]:
        return ([p.data_ptr() for p in self._there], [p._version for p in self._counted],
                _adapter_states(self._adapters))

    def is_as_it_was(self, namespace: bytes) -> bool:
        now = [p for of_one in self._of_modules for p in of_one.values()]
        return namespace == self._namespace and len(now) == len(self._parameters) and \
            all(map(operator.is_, now, self._parameters)) and \
            self._modules() == self._children and self._say() == self._said


def _said(model: torch.nn.Module, config: Any) -> dict[str, Any]:
    said = dict(config.to_dict())
    adapters = _adapters(model)
    if adapters:
        said["tinyserve adapters"] = adapters
    return said


def digest(model: torch.nn.Module, config: Any, threads: int | None = None) -> bytes:
    """16 bytes of the configuration, all parameters, buffers that are saved with them, and the
    adapters' state."""
    return digest_of(_pieces(model), _said(model, config), threads)


def _files_of(config: Any) -> list[pathlib.Path]:
    """The files that from_pretrained() has read: a folder's, or those of the hub's cache."""
    name = str(getattr(config, "_name_or_path", "") or "")
    folder = pathlib.Path(name)
    if name and not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        at = try_to_load_from_cache(name, "config.json",
                                    revision=getattr(config, "_commit_hash", None))
        folder = pathlib.Path(at).parent if isinstance(at, str) else folder
    files = sorted(folder.glob("*.safetensors")) if name and folder.is_dir() else []
    if not files:
        raise ValueError(f"identity=\"files\": no files of {name!r}, from which the model was "
                         "loaded, are there")
    return files


def remembered_digest(model: torch.nn.Module, config: Any,
                      memory: Remembered | None = None) -> bytes:
    """The digest of a model that is as its files say: it is computed once, and then known by the
    files' identity. A sample of each tensor is looked at. ValueError: there are no files."""
    memory = memory or Remembered()
    sample = digest_of(_samples(model), _said(model, config))
    key = files_key(_files_of(config), sample)
    known = memory.get(key)
    if known is None:
        known = digest(model, config)
        memory.put(key, known)
    return known
