"""The order of elements in pages: what vLLM's own operators write, and what the connector reads."""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from tinyserve.engines.geometry import Needs, Unsupported
from tinyserve.vllm import engine_pages
from tinyserve.vllm.pages import DevicePages, gpu_layout

HEADS, DIM, PAGE, PAGES = 2, 64, 32, 5
NEEDS = Needs(layers=2, heads=4, kv_heads=HEADS, head_dim=DIM, dtype="fp32")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
current_platform.import_kernels()


def layer(isa, writes=None):
    """An attention layer of the CPU backend, which says that its order is isa's, and writes so."""
    def update(self, key, value, cache, slots):
        halves = cache.view(cache.shape[0], HEADS, 2 * PAGE, DIM).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, writes or isa)
    return SimpleNamespace(isa=isa, impl=SimpleNamespace(do_kv_cache_update=update))


def caches(dtype, shape=(PAGES, HEADS, PAGE, 2 * DIM)):
    return {f"model.layers.{i}.attn": torch.zeros(shape, dtype=dtype) for i in (1, 0)}


def pages_of(given, attention, page_tokens=PAGE):
    return engine_pages.pages_of(given, dict.fromkeys(given, attention), NEEDS, page_tokens)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
def test_what_the_operators_write_is_read(isa, dtype):
    given = caches(dtype)
    pages = pages_of(given, layer(isa))
    for number in range(2):
        rows = [torch.randn(PAGE, HEADS, DIM).to(dtype) for _ in range(2)]
        slots = torch.arange(3 * PAGE, 4 * PAGE)
        attention = layer(isa)
        attention.impl.do_kv_cache_update(attention, *rows, given[f"model.layers.{number}.attn"],
                                          slots)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        for found, want in zip(pages.read(number, [3]), rows):
            assert found.tobytes() == want.view(bits).numpy().tobytes()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("isa, writes", [("vec", "amx"), ("amx", "vec")])
def test_an_engine_that_writes_otherwise_is_refused(isa, writes, dtype):
    with pytest.raises(Unsupported, match=f"writes K in another order than '{isa}'"):
        pages_of(caches(dtype), layer(isa, writes))


def test_orders_and_shapes_that_are_not_known_are_refused():
    with pytest.raises(Unsupported, match="order 'neon' of the CPU backend; known are"):
        pages_of(caches(torch.float32), layer("neon"))
    with pytest.raises(Unsupported, match=r"shape \[2, 5, 32, 2, 64\]; known is \[2, 2, 32, 128\]"):
        pages_of(caches(torch.float32, (2, PAGES, PAGE, HEADS, DIM)), layer("vec"))
    with pytest.raises(Unsupported, match="shape .5, 2, 32, 128.; known is .5, 2, 16, 128."):
        pages_of(caches(torch.float32), layer("vec"), page_tokens=16)
    given = caches(torch.float32)
    given.popitem()
    with pytest.raises(Unsupported, match="caches of 1 layers; the group has 2"):
        pages_of(given, layer("vec"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens_first", [False, True])
def test_pages_of_a_gpu(dtype, tokens_first):
    """The tensors are the host's here."""
    cache = torch.zeros(PAGES, PAGE, HEADS, 2 * DIM, dtype=dtype).transpose(1, 2) if tokens_first \
        else torch.zeros(PAGES, HEADS, PAGE, 2 * DIM, dtype=dtype)
    pages = DevicePages(gpu_layout(cache.shape, cache.stride(), DIM), [cache], PAGES)
    k, v = (torch.randn(2 * PAGE, HEADS, DIM).to(dtype) for _ in range(2))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    pages.write(0, [4, 1], [x.view(bits).numpy().view(f"uint{8 * dtype.itemsize}")
                            for x in (k, v)])
    for page, rows in (4, slice(0, PAGE)), (1, slice(PAGE, 2 * PAGE)):
        assert torch.equal(cache[page, :, :, :DIM], k[rows].transpose(0, 1))
        assert torch.equal(cache[page, :, :, DIM:], v[rows].transpose(0, 1))
    assert [x.tobytes() for x in pages.read(0, [4, 1])] == \
        [x.view(bits).numpy().tobytes() for x in (k, v)]
