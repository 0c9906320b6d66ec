"""The pool that a model's configuration needs, and the models that can't be served, by name.

A configuration is one of Hugging Face's: the attributes that are read here are the same in all of
their text models. Nothing is imported for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..records import Geometry

HEAD_DIM_LEAST, HEAD_DIM_MOST = 32, 256
LAYER_TYPES = ("full_attention", "sliding_attention")
BLOCK_TOKENS = 16


class Unsupported(NotImplementedError):
    """The model, or the way in which it is called, isn't supported; the text says what it is."""


@dataclass(frozen=True)
class Needs:
    """What a model stores and how it attends."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str  #: of q, k and v: "fp32", "fp16" or "bf16"

    def misfit(self, g: Geometry) -> str | None:
        """Why a pool of this geometry can't hold the model's K and V; None: it can. An fp8 pool
        holds those of any model, rounded."""
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(g, name) != getattr(self, name):
                return f"{name} = {getattr(g, name)}, and the model has {getattr(self, name)}"
        if g.dtype not in (self.dtype, "fp8_e4m3"):
            return f"dtype = {g.dtype}, and the model's is {self.dtype}"
        return None

    @property
    def pool_name(self) -> str:
        """The name of a pool that is made for models of this shape."""
        return f"hf-{self.layers}x{self.kv_heads}x{self.head_dim}-{self.dtype}"

    def stanza(self, name: str, device: str, tokens: int, writable: bool) -> str:
        """A [pool] section of tinyserved.conf that fits."""
        return f"[pool {name}]\n" + "".join(f"{key} = {value}\n" for key, value in
                                            self._keys(device, tokens, writable).items())

    def create_text(self, name: str, device: str, tokens: int, writable: bool) -> str:
        """The same as `tsctl pool create` takes it."""
        return f"{name}:" + ",".join(f"{key}={value}" for key, value in
                                     self._keys(device, tokens, writable).items())

    def _keys(self, device: str, tokens: int, writable: bool) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "layers": self.layers, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "dtype": self.dtype, "block_tokens": BLOCK_TOKENS,
            "blocks": -(-tokens // BLOCK_TOKENS), "device": device}
        if writable:
            keys["client_write"] = "all"
        return keys


def _refuse(condition: object, name: str, what: str) -> None:
    if condition:
        raise Unsupported(f"{name}: {what}")


def needs_of(config: Any, dtype: str) -> Needs:
    """What a text model of this configuration needs. Unsupported: it can't be served."""
    name = str(getattr(config, "model_type", type(config).__name__))

    def get(attribute: str) -> Any:
        return getattr(config, attribute, None)

    _refuse(get("is_encoder_decoder"), name, "encoder-decoder models have two kinds of cache")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    _refuse(text is not config, name,
            "a model of text and other inputs: K and V depend on more than token ids")
    _refuse(get("is_causal") is False or get("use_bidirectional_attention"), name,
            "it attends to later tokens, too")
    types = get("layer_types")
    if types is None:
        _refuse(get("attention_chunk_size"), name, "chunked attention (attention_chunk_size)")
    for kind in sorted(set(types or ()) - set(LAYER_TYPES)):
        _refuse(True, name, f"layers of type {kind!r}; supported are {', '.join(LAYER_TYPES)}")
    _refuse(get("num_kv_shared_layers"), name, "layers that use the K and V of other layers")
    _refuse(get("kv_sharing_modes"), name, "layers that use the K and V of other layers")
    _refuse(get("kv_lora_rank"), name, "latent attention (kv_lora_rank)")
    _refuse(get("reorder_and_upcast_attn"), name,
            "reorder_and_upcast_attn is an attention of the model's own")
    _refuse(get("add_cross_attention"), name, "cross-attention")
    heads = get("num_attention_heads")
    kv_heads = get("num_key_value_heads") or heads
    _refuse(not isinstance(heads, int) or not isinstance(kv_heads, int), name,
            "layers with different numbers of heads")
    head_dim = get("head_dim") or get("hidden_size") // heads
    for other in ("global_head_dim", "v_head_dim", "swa_head_dim"):
        _refuse(get(other) not in (None, head_dim), name, f"{other} differs from head_dim")
    _refuse(not HEAD_DIM_LEAST <= head_dim <= HEAD_DIM_MOST, name,
            f"head_dim {head_dim}; the limits are {HEAD_DIM_LEAST}..{HEAD_DIM_MOST}")
    return Needs(get("num_hidden_layers"), heads, kv_heads, head_dim, dtype)


def share_limit(config: Any) -> int | None:
    """The number of tokens up to which K depends on nothing but the tokens before it; None: always.
    Rotary embeddings of these types turn K otherwise in prompts that are longer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = rope.values() if all(isinstance(v, dict) for v in rope.values()) and rope else [rope]
    for kind in kinds:
        if kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope"):
            limit: Any = kind.get("original_max_position_embeddings") or \
                getattr(config, "original_max_position_embeddings", None) or \
                getattr(config, "max_position_embeddings", 0)
            return int(limit)
    return None
