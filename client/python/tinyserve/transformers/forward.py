"""One forward pass of an attached model: a step of the pool, from before its first layer until
after its last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .._lib import CRunOptions
from ..engines.geometry import Unsupported

if TYPE_CHECKING:
    from .cache import PooledCache

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_OPTIONS_MOST = 1024
_options: dict[tuple[float, float, int, bool, int | None], CRunOptions] = {}


def _run_options(scale: float, soft_cap: float, window: int, sinks: bool,
                 stream: int | None) -> CRunOptions:
    key = scale, soft_cap, window, sinks, stream
    options = _options.get(key)
    if options is None:
        if len(_options) >= _OPTIONS_MOST:
            _options.clear()
        options = _options[key] = CRunOptions(scale=scale, soft_cap=soft_cap, window=window,
                                              sinks=sinks, on_stream=stream is not None,
                                              stream=stream)
    return options


class Forward:
    """shape: [rows, columns, heads, head_dim] of what the model computes. The step has the tokens
    of every `copies`-th row alone, since rows in between are the same; index: which positions
    (row * columns + column) of those rows are tokens, in the step's order; None: all of them."""

    def __init__(self, cache: "PooledCache", rows: int, columns: int, step: Any,
                 index: torch.Tensor | None, copies: int) -> None:
        needs = cache.kv.needs
        self.cache, self.step, self.copies = cache, step, copies
        self.shape = rows, columns, needs.heads, needs.head_dim
        self.ran = 0  # layers, a bit each
        self.before: Forward | None = None  # that this thread was in
        self.new: tuple[list[int], list[int]] = [], []  # the step's rows: padding, new tokens
        self.known = True  # what the cache said before
        self.had = 0  # sequences of the cache before; 0: they were made for this pass
        self._dtype = _DTYPES[needs.dtype]
        self._index = index
        self._kv_heads = needs.kv_heads
        self._stream = torch.cuda.current_stream(cache.kv.device).cuda_stream \
            if cache.kv.on_gpu else None
        if step is not None:
            self._q, self._k, self._v, self._out = (
                cache.session.tensor(name, getattr(step, name)) for name in ("q", "k", "v", "out"))
            if index is None:
                self._q, self._k, self._v, self._out = (
                    t.unflatten(0, (-1, columns)) for t in (self._q, self._k, self._v, self._out))

    def _tokens(self, name: str, tensor: torch.Tensor, heads: int) -> torch.Tensor:
        """[rows, heads, columns, head_dim] as [rows of the step, columns, heads, head_dim]."""
        rows, columns, _, dim = self.shape
        if tensor.shape != (rows, heads, columns, dim):
            raise Unsupported(f"attention with {name} of shape {list(tensor.shape)}; the model's "
                              f"configuration says {[rows, heads, columns, dim]}")
        if tensor.dtype is not self._dtype:
            raise Unsupported(f"attention with {name} of {tensor.dtype}; the model was attached "
                              f"with {self._dtype} (autocast isn't supported)")
        tokens = tensor.transpose(1, 2)
        return tokens[::self.copies] if self.copies > 1 else tokens

    def _put(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Into the step's [tokens, heads, head_dim]."""
        heads, kv_heads = self.shape[2], self._kv_heads
        tokens = [self._tokens("q", query, heads), self._tokens("k", key, kv_heads),
                  self._tokens("v", value, kv_heads)]
        buffers = [self._q, self._k, self._v]
        if self._index is None:
            torch._foreach_copy_(buffers, tokens)  # on a GPU one kernel, where strides are alike
        else:
            for buffer, given in zip(buffers, tokens):
                torch.index_select(given.flatten(0, 1), 0, self._index, out=buffer)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float, softcap: float, window: int,
               sinks: torch.Tensor | None) -> torch.Tensor:
        """The result [rows, columns, heads, head_dim], good until the next layer attends."""
        if query.requires_grad and torch.is_grad_enabled():
            raise Unsupported("gradients: they don't pass through the pool; use torch.no_grad()")
        if self.ran >> layer & 1:
            raise Unsupported(f"layer {layer} attends twice in one forward pass")
        self.ran |= 1 << layer
        if self.step is None:
            return query.new_zeros(self.shape)
        self._put(query, key, value)
        if sinks is not None:
            self.step.sinks.torch().copy_(sinks.detach().reshape(-1))
        options = _run_options(scaling, softcap, window, sinks is not None, self._stream)
        self.step._run(layer, options)
        return self._result()

    def _result(self) -> torch.Tensor:
        rows, columns, heads, dim = self.shape
        out = self._out
        if self._index is not None:  # what is padding gets zeros
            out = out.new_zeros(rows // self.copies * columns, heads, dim)
            out = out.index_copy_(0, self._index, self._out).unflatten(0, (-1, columns))
        return out.repeat_interleave(self.copies, 0) if self.copies > 1 else out
