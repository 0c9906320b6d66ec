"""What calls tell of pools and sequences."""

from __future__ import annotations

from dataclasses import dataclass

from ._lib import CGeometry
from .view import DTYPES

DTYPE_NAMES = ("fp32", "fp16", "bf16", "fp8_e4m3")
_LAYOUT_NAMES = ("nhd", "hnd")

Seq = int  #: a sequence's id: never 0, never used again once it is freed


@dataclass(frozen=True)
class Kept:
    """A kept sequence."""
    name: str
    seq: Seq
    length: int  #: tokens
    blocks: int  #: that it refers to
    left: float | None  #: seconds until it is freed, if it isn't used before; None: it never is


@dataclass(frozen=True)
class Room:
    """What a user has of a pool, in blocks unless it says otherwise."""
    blocks: int  #: of the pool
    available: int  #: that a step could take now: free ones, and cached ones that would go
    used: int  #: by the user's sequences, each counted once
    cached: int  #: of the user: no sequence uses them, and a match may find them
    pinned: int  #: of `used`, by kept sequences
    limit: int  #: that the user may use
    others: int  #: used by other users
    sequences: int  #: of the user
    waiting: int  #: sessions of all users that wait in the pool
    asked_tokens: int  #: of the user's prompts that were matched
    found_tokens: int  #: of those, that were found


@dataclass(frozen=True)
class Geometry:
    """Shape of a pool's cache: a block is [layers][2 (K, V)][one layer's tokens]."""
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str  #: "fp32", "fp16", "bf16" or "fp8_e4m3"
    layout: str  #: "nhd": [block_tokens][kv_heads][head_dim] in a layer; "hnd": heads first

    @classmethod
    def of(cls, g: CGeometry) -> "Geometry":
        return cls(g.layers, g.kv_heads, g.head_dim, g.block_tokens, DTYPE_NAMES[g.dtype],
                   _LAYOUT_NAMES[g.layout])

    @property
    def element_bytes(self) -> int:
        """Bytes of one number of K or V as the cache holds it."""
        return DTYPES[self.dtype][0]

    @property
    def plane_bytes(self) -> int:
        """Bytes of one layer's K (or V) in one block."""
        return self.block_tokens * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes from one block to the next, as ts_geometry_block_bytes (tinyserve_types.h)."""
        size = self.plane_bytes * 2 * self.layers
        more = 1 << ((size // 32).bit_length() - 1)
        while size % (80 << 10) == 0 or size % (376 << 10) == 0:
            size += more
        return size


@dataclass(frozen=True)
class PoolInfo:
    """A pool of the daemon."""
    name: str
    device: str  #: "host", "cuda:0" (the daemon's)
    geometry: Geometry
    blocks: int  #: the most that it can have
