"""The attention function and the mask function that Transformers calls by name.

A model's forward pass with a cache of TinyServe is a `Forward`: a step of the pool that is open
from before the first layer until after the last. Neither the attention function nor the mask
function is given the cache, so the forward pass that this thread is in is found by the thread.
Without one (the model is called with another cache, or with none) both do what they did before the
model was attached.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..engines.geometry import Unsupported

if TYPE_CHECKING:
    from .forward import Forward

_PREFIX = "tinyserve_"
_thread = threading.local()

#: arguments of an attention function that change nothing of what it computes
_HARMLESS = frozenset((
    "position_ids", "cache_position", "position_embeddings", "use_cache", "output_hidden_states",
    "return_dict", "logits_to_keep", "output_router_logits", "kwargs", "cache", "past_key_values",
    "num_items_in_batch", "is_first_iteration", "head_mask"))


class _NoTensor(Unsupported, AttributeError):
    """An AttributeError, too, so that hasattr() of a mask says what is so."""


class Mask:
    """What the mask function gives the layers in place of a tensor: `window` tokens are seen, the
    token itself included (0: all that are before it). Padding is no part of it: it isn't stored.
    A layer that computes with it, as if it were a tensor, is refused."""

    __slots__ = ("window",)

    def __init__(self, window: int) -> None:
        self.window = window

    def __getattr__(self, name: str) -> Any:
        raise _NoTensor(f"a layer that computes with its attention mask by itself (mask.{name})")

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> Any:
        name = getattr(function, "__name__", function)
        raise _NoTensor(f"a layer that computes with its attention mask by itself ({name})")

    def __getitem__(self, key: Any) -> Any:
        raise _NoTensor("a layer that computes with its attention mask by itself (mask[...])")

    def __repr__(self) -> str:
        return f"<tinyserve mask, window {self.window}>"


_MASKS: dict[int, Mask] = {0: Mask(0)}


def current() -> "Forward | None":
    """The forward pass that this thread is in, with a cache of TinyServe."""
    return getattr(_thread, "forward", None)


def enter(forward: "Forward | None") -> "Forward | None":
    """Makes it this thread's; the one before."""
    before = current()
    _thread.forward = forward
    return before


def _overlay_code(make: Callable[..., Any]) -> Any:
    return make(1).__code__


_SLIDING = _overlay_code(masking_utils.sliding_window_overlay)
_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__


def _held(function: Any, name: str) -> Any:
    """What a function that was made within another one keeps of it under this name."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _parts(function: Any) -> list[Any]:
    """The mask functions that all must say yes."""
    if getattr(function, "__code__", None) is not _AND:
        return [function]
    return [part for f in _held(function, "mask_functions") for part in _parts(f)]


def _window_of(function: Any) -> int:
    """The window of a mask function: causal (0), or causal within windows, of which the smallest
    counts. Unsupported: another."""
    parts = _parts(function)
    rest = [p for p in parts if p is not masking_utils.causal_mask_function]
    if len(rest) == len(parts):
        raise Unsupported(f"attention mask: {_name(function)} lets tokens see later ones")
    for part in rest:
        if getattr(part, "__code__", None) is not _SLIDING:
            raise Unsupported(f"attention mask: {_name(part)}; supported are causal masks, and "
                              "causal masks within a sliding window")
    return min((int(_held(part, "sliding_window")) for part in rest), default=0)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", function)).replace(".<locals>", "")


def _mask(before: Any, *, mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
          local_size: int | None = None, **arguments: Any) -> Any:
    if current() is None:
        return before(mask_function=mask_function, local_size=local_size, **arguments)
    window = _window_of(mask_function)
    return _MASKS.setdefault(window, Mask(window))


def _attend(before: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            attention_mask: Any, scaling: float | None = None, dropout: float = 0.0,
            softcap: float | None = None, s_aux: torch.Tensor | None = None,
            sliding_window: int | None = None, is_causal: bool | None = None,
            **others: Any) -> Any:
    forward = current()
    if forward is None:
        given = {"softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window,
                 "is_causal": is_causal}
        return _attend_before(before, module, query, key, value, attention_mask, scaling=scaling,
                              dropout=dropout, **others,
                              **{n: v for n, v in given.items() if v is not None})
    if type(attention_mask) is not Mask:
        raise Unsupported(
            "the model gave the layers " + ("no mask" if attention_mask is None else
                                            "a mask of its own") + ": it must come from "
            "transformers.masking_utils, or padding and windows would be ignored")
    if dropout:
        raise Unsupported(f"dropout {dropout} of attention: call model.eval()")
    if is_causal is False:
        raise Unsupported("is_causal = False: tokens that see later ones")
    for name, argument in others.items():
        if argument is not None and argument is not False and name not in _HARMLESS:
            raise Unsupported(f"attention with {name}")
    out = forward.attend(module.layer_idx, query, key, value, scaling or 0.0, softcap or 0.0,
                         attention_mask.window, s_aux)
    return out, None


def _attend_before(name: str, module: Any, *tensors: Any, **arguments: Any) -> Any:
    if name == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    return function(module, *tensors, **arguments)


def register(before: str) -> str:
    """The name of the implementation that does as `before` where no cache of TinyServe is used."""
    name = _PREFIX + before
    if name not in ALL_ATTENTION_FUNCTIONS:
        mask_before = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[before]

        @torch.compiler.disable
        def attend(*tensors: Any, **arguments: Any) -> Any:
            return _attend(before, *tensors, **arguments)

        def mask(*positional: Any, **arguments: Any) -> Any:
            names = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset")
            return _mask(mask_before, **dict(zip(names, positional)), **arguments)

        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, mask)
    return name


def before_of(name: str) -> str | None:
    """The implementation that an attached model had; None: it isn't attached."""
    return name[len(_PREFIX):] if name.startswith(_PREFIX) else None
