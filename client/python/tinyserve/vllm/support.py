"""What the connector supports, and the refusals of the rest, by name. Needs no engine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..engines.geometry import Needs, Unsupported

OLDEST, NEWEST = (0, 29), (0, 32)  #: versions of vLLM
_DTYPES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
#: ways of drafting tokens that have no K and V of their own
_DRAFTS_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix")


def check_version(version: str) -> None:
    """Unsupported: this vLLM isn't one that the connector was tested with."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        raise Unsupported(f"vLLM {version}; TinyServe's connector supports "
                          f"{_text(OLDEST)} to {_text(NEWEST)}")


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True)
class Engine:
    """What the connector needs to know of an engine."""
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    groups: int  #: of layers that have page tables of their own
    spec: str  #: the name of the first group's kind of cache
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str  #: of the cache, as torch writes it
    page_tokens: int
    drafts: str | None  #: the method of speculative decoding

    def needs(self) -> Needs:
        """The pool that it needs. Unsupported: it can't be served, and why."""
        for name, value, why in (
                ("tensor_parallel_size", self.tensor_parallel,
                 "each rank has K and V of other heads, and the pool's namespace has no rank"),
                ("pipeline_parallel_size", self.pipeline_parallel,
                 "each rank has K and V of other layers"),
                ("context parallelism", self.context_parallel,
                 "each rank has K and V of other tokens")):
            if value != 1:
                raise Unsupported(f"{name} = {value}: {why}; the limit is 1")
        if self.groups != 1:
            raise Unsupported(f"{self.groups} groups of layers with page tables of their own (kv "
                              "cache groups); the limit is 1: --disable-hybrid-kv-cache-manager "
                              "makes one of full and windowed layers")
        if self.spec != "FullAttentionSpec":
            raise Unsupported(f"layers of the kind {self.spec}; supported is FullAttentionSpec")
        if self.dtype not in _DTYPES:
            raise Unsupported(f"a cache of {self.dtype} (kv_cache_dtype); supported are "
                              f"{', '.join(_DTYPES)}")
        if self.drafts is not None and self.drafts not in _DRAFTS_WITHOUT_KV:
            raise Unsupported(f"speculative decoding by {self.drafts!r}, whose K and V depend on "
                              f"other weights; supported are {', '.join(_DRAFTS_WITHOUT_KV)}")
        return Needs(self.layers, self.heads, self.kv_heads, self.head_dim, _DTYPES[self.dtype])
