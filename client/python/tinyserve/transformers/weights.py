"""The weights of a torch model as bytes, and what tells that they have changed."""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Iterator

import torch

from ..engines.identity import PIECE_BYTES, digest_of


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.named_parameters(remove_duplicate=True):
        yield name, tensor
    for name, tensor in model.named_buffers(remove_duplicate=True):
        yield name, tensor


def _bytes_of(piece: torch.Tensor) -> Callable[[], Any]:
    def content() -> Any:
        host = piece if piece.device.type == "cpu" else piece.to("cpu")
        view = (ctypes.c_char * host.numel()).from_address(host.data_ptr())
        view.tensor = host  # which owns the memory
        return view
    return content


def _pieces(model: torch.nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, tensor in _tensors(model):
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: it has no content")
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for at in range(0, max(flat.numel(), 1), PIECE_BYTES):
            yield (f"{name} {tensor.dtype} {list(tensor.shape)} {at:016x}",
                   _bytes_of(flat[at:at + PIECE_BYTES]))


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


def digest(model: torch.nn.Module, config: Any, threads: int | None = None) -> bytes:
    """16 bytes of the configuration, all parameters and buffers, and the adapters' state."""
    said = dict(config.to_dict())
    adapters = _adapters(model)
    if adapters:
        said["tinyserve adapters"] = adapters
    return digest_of(_pieces(model), said, threads)
