"""The weights of a torch model as bytes, and what tells that they have changed."""

from __future__ import annotations

import ctypes
import pathlib
import threading
from typing import Any, Callable, Iterator

import torch

from ..engines.identity import PIECE_BYTES, Remembered, digest_of, files_key

_SAMPLE_BYTES = 4096  #: of the beginning, the middle and the end of each tensor
_thread = threading.local()


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.named_parameters(remove_duplicate=True):
        yield name, tensor
    for name, tensor in model.named_buffers(remove_duplicate=True):
        yield name, tensor


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


def _adapters(model: torch.nn.Module) -> list[Any]:
    """Of each layer with adapters (PEFT's): which are there, which are active, and how strongly;
    none of that is a parameter."""
    state = []
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, (list, tuple)):
            state.append([name, list(active), dict(getattr(module, "scaling", None) or {}),
                          bool(getattr(module, "disable_adapters", False)),
                          list(getattr(module, "merged_adapters", None) or ())])
    return state


def fingerprint(model: torch.nn.Module) -> tuple[Any, ...]:
    """What changes when somebody writes weights by torch, replaces one, or switches an adapter. It
    takes no look at the weights themselves."""
    return (tuple((t.data_ptr(), t._version) for _, t in _tensors(model)), repr(_adapters(model)))


def _said(model: torch.nn.Module, config: Any) -> dict[str, Any]:
    said = dict(config.to_dict())
    adapters = _adapters(model)
    if adapters:
        said["tinyserve adapters"] = adapters
    return said


def digest(model: torch.nn.Module, config: Any, threads: int | None = None) -> bytes:
    """16 bytes of the configuration, all parameters and buffers, and the adapters' state."""
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
