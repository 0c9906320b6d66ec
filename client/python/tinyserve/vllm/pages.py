"""Pages of an engine's cache, and how their elements follow each other.

The engine keeps K and V of a layer in pages of `page_tokens` tokens, in an order that its kernels
like. The pool has rows: [tokens][kv_heads][head_dim]. A `Layout` says where an element of a row
lies in a page, by strides alone: tokens and dimensions of a head may both be cut into two axes, so
that packed orders (pairs, tiles of 16) are strides, too. Copying is then an assignment between two
views of one shape.

Nothing here needs an engine. Pages in host memory are NumPy arrays of bits; on a GPU, tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

_TILE = 16  #: tokens, or dimensions, of a tile of the AMX order


@dataclass(frozen=True)
class Axis:
    """Of tokens, or of dimensions: index i lies at i // inner * outer_stride + i % inner *
    inner_stride."""
    size: int
    inner: int
    outer_stride: int
    inner_stride: int

    @classmethod
    def plain(cls, size: int, stride: int) -> "Axis":
        return cls(size, 1, stride, 0)


@dataclass(frozen=True)
class Half:
    """K, or V, of one layer. Strides and the offset are in elements."""
    offset: int
    page_stride: int
    head_stride: int
    tokens: Axis
    dims: Axis

    def shape(self, pages: int, heads: int) -> tuple[int, ...]:
        """[pages][tokens, outer and inner][heads][dims, outer and inner]"""
        t, d = self.tokens, self.dims
        return pages, t.size // t.inner, t.inner, heads, d.size // d.inner, d.inner

    @property
    def strides(self) -> tuple[int, ...]:
        t, d = self.tokens, self.dims
        return (self.page_stride, t.outer_stride, t.inner_stride, self.head_stride, d.outer_stride,
                d.inner_stride)


@dataclass(frozen=True)
class Layout:
    """Of one layer's cache in the engine."""
    name: str
    page_tokens: int
    kv_heads: int
    head_dim: int
    k: Half
    v: Half


def cpu_layout(isa: str, page_tokens: int, kv_heads: int, head_dim: int, element_bytes: int,
               page_stride: int, head_stride: int) -> Layout:
    """vLLM's pages on a processor: of each head first K, then V. isa: how its kernels read them.
    "vec", "vec16": K is [head_dim][tokens], V is [tokens][head_dim]. "amx": both are tiles of 16
    (K: tokens, V: dimensions), with elements of 4 bytes together. ValueError: another order."""
    p, d, half = page_tokens, head_dim, page_tokens * head_dim
    if isa in ("vec", "vec16"):
        k = Half(0, page_stride, head_stride, Axis.plain(p, 1), Axis.plain(d, p))
        v = Half(half, page_stride, head_stride, Axis.plain(p, d), Axis.plain(d, 1))
    elif isa == "amx":
        if p % _TILE or d % _TILE:
            raise ValueError(f"pages of {p} tokens with heads of {d} in the order \"amx\"; both "
                             f"must be multiples of {_TILE}")
        r = max(1, 4 // element_bytes)
        k = Half(0, page_stride, head_stride, Axis(p, _TILE, _TILE * d, r),
                 Axis(d, r, _TILE * r, 1))
        v = Half(half, page_stride, head_stride, Axis(p, r, _TILE * r, 1),
                 Axis(d, _TILE, _TILE * p, r))
    else:
        raise ValueError(f"pages in the order {isa!r} of the CPU backend; known are \"vec\", "
                         "\"vec16\" and \"amx\"")
    return Layout(isa, p, kv_heads, d, k, v)


def gpu_layout(shape: Sequence[int], strides: Sequence[int], head_dim: int) -> Layout:
    """vLLM's pages on a GPU: a tensor [pages][kv_heads][tokens][2 * head_dim], whatever its
    strides; of each row first K, then V. ValueError: another shape."""
    if len(shape) != 4 or shape[3] != 2 * head_dim:
        raise ValueError(f"a layer's cache of shape {list(shape)}; known is [pages][kv_heads]"
                         f"[tokens][{2 * head_dim}]")
    page, head, token, dim = strides
    k, v = (Half(offset, page, head, Axis.plain(shape[2], token), Axis.plain(head_dim, dim))
            for offset in (0, head_dim * dim))
    return Layout("rows", shape[2], shape[1], head_dim, k, v)


class HostPages:
    """The pages of all layers in host memory, as arrays of unsigned integers: one-dimensional, each
    from the layer's first element on."""

    def __init__(self, layout: Layout, layers: Sequence[Any], pages: int) -> None:
        self.layout, self.pages = layout, pages
        self._views = [tuple(self._view(flat, half) for half in (layout.k, layout.v))
                       for flat in layers]

    def _view(self, flat: Any, half: Half) -> Any:
        from numpy.lib.stride_tricks import as_strided
        last = half.offset + sum((n - 1) * s for n, s in
                                 zip(half.shape(self.pages, self.layout.kv_heads), half.strides))
        if flat.ndim != 1 or last >= flat.size:
            raise ValueError(f"pages of {self.layout.name!r} end at element {last}; the layer's "
                             f"cache has {flat.size}")
        size = flat.itemsize
        return as_strided(flat[half.offset:], half.shape(self.pages, self.layout.kv_heads),
                          [s * size for s in half.strides])

    def write(self, layer: int, pages: Any, rows: Sequence[Any]) -> None:
        """pages: their numbers, an array; rows: K and V, [len(pages) * tokens][heads][dims]."""
        for view, new in zip(self._views[layer], rows):
            view[pages] = new.reshape(len(pages), *view.shape[1:])

    def read(self, layer: int, pages: Any) -> list[Any]:
        """K and V of these pages: copies, [len(pages) * tokens][heads][dims]."""
        a = self.layout
        return [view[pages].reshape(len(pages) * a.page_tokens, a.kv_heads, a.head_dim)
                for view in self._views[layer]]


class DevicePages:
    """The pages of all layers in a GPU's memory, as tensors. Copies are made on the current
    stream."""

    def __init__(self, layout: Layout, layers: Sequence[Any], pages: int) -> None:
        import torch
        self.layout, self.pages, self._torch = layout, pages, torch
        self._views = [tuple(torch.as_strided(cache, half.shape(pages, layout.kv_heads),
                                              half.strides, cache.storage_offset() + half.offset)
                             for half in (layout.k, layout.v)) for cache in layers]

    def _bits(self, view: Any) -> Any:
        torch = self._torch
        return view if view.dtype == torch.float32 else view.view(torch.int16)

    def write(self, layer: int, pages: Any, rows: Sequence[Any]) -> None:
        torch = self._torch
        for view, new in zip(self._views[layer], rows):
            at = torch.as_tensor(pages, device=view.device)
            bits = torch.from_numpy(new.view("int16" if new.itemsize == 2 else "float32"))
            self._bits(view)[at] = bits.reshape(len(pages), *view.shape[1:]).to(view.device)

    def read(self, layer: int, pages: Any) -> list[Any]:
        a, torch = self.layout, self._torch
        rows = []
        for view in self._views[layer]:
            at = torch.as_tensor(pages, device=view.device)
            bits = self._bits(view)[at].reshape(len(pages) * a.page_tokens, a.kv_heads, a.head_dim)
            rows.append(bits.cpu().numpy().view(f"uint{8 * view.element_size()}"))
        return rows
