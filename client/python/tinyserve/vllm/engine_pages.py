"""The pages of a running vLLM, whose order is tried before it is relied on."""

from __future__ import annotations

import re
from typing import Any, Mapping

import torch

from ..engines.geometry import Needs, Unsupported
from .pages import DevicePages, HostPages, Layout, cpu_layout, gpu_layout

_PROBED_PAGES = 3


def pages_of(caches: Mapping[str, Any], layers: Mapping[str, Any], needs: Needs,
             page_tokens: int) -> HostPages | DevicePages:
    """caches: each layer's tensor; layers: its attention. Unsupported: an order of elements that
    isn't known."""
    names = sorted(caches, key=_layer_number)
    if len(names) != needs.layers:
        raise Unsupported(f"caches of {len(names)} layers; the group has {needs.layers}")
    first = caches[names[0]]
    on_host = first.device.type == "cpu"
    for name in names:
        cache = caches[name]
        if (cache.shape, cache.stride(), cache.dtype, cache.device) != \
                (first.shape, first.stride(), first.dtype, first.device):
            raise Unsupported(f"the cache of layer {name} is unlike the first layer's")
    expected = (first.shape[0], needs.kv_heads, page_tokens, 2 * needs.head_dim)
    if tuple(first.shape) != expected:
        raise Unsupported(f"a layer's cache of shape {list(first.shape)}; known is "
                          f"{list(expected)}: [pages][kv_heads][tokens][K and V]")
    try:
        layout = _layout(first, layers[names[0]], needs, on_host)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    _probe(first, layers[names[0]], layout, on_host)
    return _make(layout, [caches[name] for name in names], first.shape[0], on_host)


def _layer_number(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", name)]


def _layout(cache: Any, layer: Any, needs: Needs, on_host: bool) -> Layout:
    if not on_host:
        return gpu_layout(cache.shape, cache.stride(), needs.head_dim)
    page, head, token, dim = cache.stride()
    if (token, dim) != (2 * needs.head_dim, 1):
        raise ValueError(f"a layer's cache with strides {cache.stride()}; a head of a page must be "
                         "contiguous")
    return cpu_layout(str(getattr(layer, "isa", None)), cache.shape[2], needs.kv_heads,
                      needs.head_dim, cache.element_size(), page, head)


def _make(layout: Layout, caches: list[Any], pages: int, on_host: bool) -> HostPages | DevicePages:
    if not on_host:
        return DevicePages(layout, caches, pages)
    flat = []
    for cache in caches:
        bits = {2: torch.int16, 4: torch.int32}[cache.element_size()]
        whole = torch.empty(0, dtype=cache.dtype).set_(cache.untyped_storage())
        flat.append(whole.view(bits)[cache.storage_offset():].numpy()
                    .view(f"uint{8 * cache.element_size()}"))
    return HostPages(layout, flat, pages)


def _probe(cache: Any, layer: Any, layout: Layout, on_host: bool) -> None:
    """Has the engine write known rows into a cache of its own, and reads them as the layout says.
    Unsupported: something else is there."""
    shape = (_PROBED_PAGES, *cache.shape[1:])
    strides = cache.stride()
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    scratch = torch.zeros(extent, dtype=cache.dtype, device=cache.device).as_strided(shape, strides)
    tokens, heads, dim = layout.page_tokens, layout.kv_heads, layout.head_dim
    number = torch.arange(tokens * heads * dim, device=cache.device)
    # Few and small enough to be exact in any type; two rounds, with the digits of each number.
    for digits in (number % 128, number // 128 % 128, number // 128 // 128):
        k = digits.reshape(tokens, heads, dim).to(cache.dtype) + 1
        v = -k
        slots = torch.arange(tokens, 2 * tokens, device=cache.device)
        layer.impl.do_kv_cache_update(layer, k, v, scratch, slots)
        found = _make(layout, [scratch], _PROBED_PAGES, on_host).read(0, [1])
        for name, rows, want in ("K", found[0], k), ("V", found[1], v):
            bits = {2: torch.int16, 4: torch.int32}[cache.element_size()]
            if rows.tobytes() != want.view(bits).cpu().numpy().tobytes():
                raise Unsupported(f"the engine writes {name} in another order than {layout.name!r}")
